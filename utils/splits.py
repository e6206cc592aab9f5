"""What a loaded data set is, and the draws that divide it: test part, `data.limit`, validation.

Coarse labels alone decide every draw; fine labels are carried for metrics, reports and the oracle control.
"""

import difflib
from dataclasses import dataclass

import numpy as np

from utils.config import UserError

TEST_DRAW, LIMIT_DRAW, VALIDATION_DRAW = 101, 102, 103  # keep the three draws independent of each other


@dataclass
class Split:
    """The training or the test part of a data set; row i of every array is the same image."""

    # uint8 (N, H, W, C) images, C in {1, 3} (may be a read-only memmap or ImagesOnDemand), or float32 (N, D) vectors
    inputs: np.ndarray
    coarse_labels: np.ndarray  # (N,) int64 in [0, K_C)
    fine_labels: np.ndarray | None  # (N,) int64 in [0, K_true), None where unknown
    names: list[str] | None  # image path relative to data.root (image folders), None elsewhere
    source_rows: np.ndarray  # (N,) int64, row in the source before data.limit and the test part were drawn

    @property
    def n(self) -> int:
        return len(self.coarse_labels)

    @property
    def is_vector(self) -> bool:
        return self.inputs.ndim == 2

    def row_name(self, i: int) -> str:
        """What a person finds row i by: its path, or its row in the source."""
        return self.names[i] if self.names else str(self.source_rows[i])


@dataclass
class Dataset:
    train: Split
    test: Split
    coarse_names: list[str]
    fine_names: list[str] | None
    fine_to_coarse: np.ndarray | None  # (K_true,) int64
    signature: str = ""  # data_signature of the source

    @property
    def K_C(self) -> int:
        return len(self.coarse_names)


def validation_mask(coarse_labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """True on the rows held out for validation: round(fraction * n) of each coarse class's n rows, drawn from `seed`.

    coarse_labels: (N,) int64.  Returns (N,) bool. A class of two or more rows has at least one row on either side; a
    class of one row keeps it for training.
    """
    return _draw(coarse_labels, _share_sizes(coarse_labels, fraction), [seed, VALIDATION_DRAW])


def limit_rows(coarse_labels: np.ndarray, limit: int) -> np.ndarray:
    """Rows of a coarse-stratified subset, ascending: shares as in the whole by largest remainder, at least one a class.

    coarse_labels: (N,) int64.  Returns (min(limit, N),) int64, all rows for limit 0. Raises UserError where `limit` is
    less than the number of classes. The draw is the same for every seed.
    """
    n = len(coarse_labels)
    if limit == 0 or limit >= n:
        return np.arange(n)
    counts = np.bincount(coarse_labels)
    if limit < (n_classes := np.count_nonzero(counts)):
        raise UserError(f"data.limit: {limit} is less than one row for each of the {n_classes} coarse classes")
    sizes, remainders = np.divmod(counts * limit, n)
    sizes[np.argsort(-remainders, kind="stable")[: limit - sizes.sum()]] += 1
    for left_out in np.flatnonzero((sizes == 0) & (counts > 0)):
        sizes[sizes.argmax()] -= 1
        sizes[left_out] = 1
    return np.flatnonzero(_draw(coarse_labels, sizes, [LIMIT_DRAW]))


def test_mask(coarse_labels: np.ndarray, fraction: float) -> np.ndarray:
    mask = _draw(coarse_labels, _share_sizes(coarse_labels, fraction), [TEST_DRAW])
    if not mask.any():
        raise UserError("data.root: no coarse class has two images, so no test part can be drawn")
    return mask


def _share_sizes(labels: np.ndarray, fraction: float) -> np.ndarray:
    counts = np.bincount(labels)
    return np.where(counts >= 2, np.clip(np.rint(fraction * counts), 1, np.maximum(counts - 1, 1)), 0).astype(int)


def _draw(labels: np.ndarray, sizes: np.ndarray, entropy: list[int]) -> np.ndarray:
    """(N,) bool, True on sizes[c] rows of each class c."""
    rng = np.random.default_rng(entropy)
    mask = np.zeros(len(labels), bool)
    for c, size in enumerate(sizes):
        mask[rng.permutation(np.flatnonzero(labels == c))[:size]] = True
    return mask


def take(split: Split, rows: np.ndarray) -> Split:
    if len(rows) == split.n:  # all of them: a memory-mapped array stays one
        return split
    return Split(
        split.inputs[rows],
        split.coarse_labels[rows],
        None if split.fine_labels is None else split.fine_labels[rows],
        None if split.names is None else [split.names[row] for row in rows],
        split.source_rows[rows],
    )


def new_split(inputs: np.ndarray, coarse_labels: np.ndarray, fine_labels: np.ndarray | None) -> Split:
    return Split(inputs, coarse_labels, fine_labels, None, np.arange(len(coarse_labels)))


def read_coarse_map(coarse_map: dict[str, list], fine_names: list[str]) -> tuple[list[str], np.ndarray]:
    """`data.coarse_map` as (coarse names in its order, fine_to_coarse (K_true,) int64).

    Fine classes are compared as str(x). Raises UserError unless every one stands in exactly one coarse class.
    """
    owner = {}
    for coarse, members in coarse_map.items():
        if not members:
            raise UserError(f"data.coarse_map: coarse class '{coarse}' has no fine classes")
        for fine in map(str, members):
            if fine not in fine_names:
                near = difflib.get_close_matches(fine, fine_names, n=1)
                hint = f" Did you mean: '{near[0]}'?" if near else f" Known: {', '.join(fine_names)}"
                raise UserError(f"data.coarse_map: '{fine}' in '{coarse}' is no fine class of this data set.{hint}")
            if fine in owner:
                raise UserError(f"data.coarse_map: '{fine}' stands in '{owner[fine]}' and again in '{coarse}'")
            owner[fine] = coarse
    if missing := [fine for fine in fine_names if fine not in owner]:
        raise UserError(
            f"data.coarse_map: '{', '.join(missing)}' missing; every fine class must stand in one coarse class"
        )
    coarse_names = list(coarse_map)
    return coarse_names, np.array([coarse_names.index(owner[fine]) for fine in fine_names], np.int64)
