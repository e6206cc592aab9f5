"""Data sets as arrays: images or vectors with coarse labels and, where the source knows them, fine labels.

Row i of a split is image i of the source, in the source's own order. Coarse labels alone decide every draw (test part,
`data.limit`, validation); fine labels are carried for metrics, reports and the oracle control.
"""

import difflib
import gzip
import hashlib
import http.client
import importlib.metadata
import io
import json
import math
import os
import re
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.config import MEDMNIST, DataConfig, UserError

DIGITS = [str(digit) for digit in range(10)]
FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
STL10 = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
PATHMNIST = [
    "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
    "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
]  # fmt: skip
FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # where dataset-fashion-mnist (Debian, Ubuntu) puts it
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
TORCHVISION_FILES = {  # below data.root; the unlabelled images of STL-10 are not used
    "cifar10": [f"cifar-10-batches-py/{f}" for f in
                [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]],
    "cifar100": [f"cifar-100-python/{f}" for f in ("train", "test", "meta")],
    "stl10": [f"stl10_binary/{f}" for f in ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
}  # fmt: skip
HOW_TO_GET = {
    "fashion_mnist": "put its four IDX .gz files there, install the package dataset-fashion-mnist (Debian, Ubuntu)",
    "cifar10": "unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there",
    "cifar100": "unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz there",
    "stl10": "unpack http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz there",
    "svhn": "put train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers there",
}
# Suffixes of the pixel formats Pillow opens. Not its whole list: .eps would start Ghostscript, .mpg, .h5 are no images.
IMAGE_SUFFIXES = set(
    ".apng .avif .bmp .dds .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pgm .png .pnm .ppm .qoi .sgi "
    ".tga .tif .tiff .webp .xbm .xpm".split()
)
TEST_DRAW, LIMIT_DRAW, VALIDATION_DRAW = 101, 102, 103  # keep the three draws independent of each other


@dataclass
class Split:
    """The training or the test part of a data set; row i of every array is the same image."""

    inputs: np.ndarray  # uint8 (N, H, W, C) images, C in {1, 3} (may be a read-only memmap), or float32 (N, D) vectors
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


def load_dataset(cfg: DataConfig, cache_dir: Path | None = None) -> Dataset:
    """Load `data.name`; downloads it first where torchvision can and `data.download` allows.

    cache_dir: where an image folder's decoded pixels are kept as a memory-mapped file, so that RAM does not grow with N
    and the next stage does not decode again; None keeps them in memory.
    Raises UserError for missing, damaged or contradictory data, naming the file or the setting.
    """
    _check_settings(cfg)
    signature = data_signature(cfg)
    if cfg.name == "imagefolder":
        dataset = _load_image_folder(cfg, Path(cache_dir) if cache_dir else None)
    else:
        load = {"arrays": _load_arrays, **dict.fromkeys(MEDMNIST, _load_medmnist)}.get(cfg.name, _load_mapped)
        dataset = load(cfg)
        dataset.train = _take(dataset.train, limit_rows(dataset.train.coarse_labels, cfg.limit))
    dataset.signature = signature
    counts = np.bincount(dataset.train.coarse_labels, minlength=dataset.K_C)
    if not counts.all():
        raise UserError(f"data.root: coarse class '{dataset.coarse_names[counts.argmin()]}' has no training rows")
    return dataset


def _check_settings(cfg: DataConfig) -> None:
    has_own_coarse = cfg.name in MEDMNIST or cfg.name == "arrays"
    if has_own_coarse and cfg.coarse_map:
        raise UserError(f"data.coarse_map: does not apply to {cfg.name}, which brings its coarse labels; leave it out")
    if not has_own_coarse and cfg.name != "imagefolder" and not cfg.coarse_map:
        raise UserError(
            f"data.coarse_map: {cfg.name} needs one that lists each coarse class's fine classes; "
            f"configs/{cfg.name}.yaml has one to copy"
        )
    if cfg.image_size and cfg.name not in MEDMNIST and cfg.name != "imagefolder":
        raise UserError(f"data.image_size: does not apply to {cfg.name}, whose images keep their size; leave it at 0")
    if cfg.name in MEDMNIST and cfg.image_size not in (0, 28, 64, 128, 224):
        raise UserError(f"data.image_size: {cfg.name} comes in 28, 64, 128 and 224 pixels, not {cfg.image_size}")


# Draws: which rows are test, training and validation


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


def _test_mask(coarse_labels: np.ndarray, fraction: float) -> np.ndarray:
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


def _take(split: Split, rows: np.ndarray) -> Split:
    if len(rows) == split.n:  # all of them: a memory-mapped array stays one
        return split
    return Split(
        split.inputs[rows],
        split.coarse_labels[rows],
        None if split.fine_labels is None else split.fine_labels[rows],
        None if split.names is None else [split.names[row] for row in rows],
        split.source_rows[rows],
    )


def _new_split(inputs: np.ndarray, coarse_labels: np.ndarray, fine_labels: np.ndarray | None) -> Split:
    return Split(inputs, coarse_labels, fine_labels, None, np.arange(len(coarse_labels)))


# Changed data


def data_signature(cfg: DataConfig) -> str:
    """sha256 that changes when the source files do; nothing is decoded.  Raises UserError where they are missing.

    Over names, sizes and contents (first and last MB of files above 64 MB); of an image folder, names and sizes only;
    of digits, scikit-learn's version. Settings such as data.limit do not enter: stages compare those themselves.
    """
    digest = hashlib.sha256(cfg.name.encode())
    if cfg.name == "digits":
        digest.update(f"load_digits of scikit-learn {importlib.metadata.version('scikit-learn')}".encode())
    elif cfg.name == "imagefolder":
        for file in (file for part in _list_parts(Path(cfg.root)) for file in part):
            digest.update(os.fsencode(f"{file.name}\0{file.size}\n"))
    else:
        for path in source_files(cfg):
            digest.update(f"{path.name}\0{path.stat().st_size}\n".encode())
            _hash_content(digest, path)
    return digest.hexdigest()


def _hash_content(digest, path: Path, whole: int = 64 << 20, end: int = 1 << 20) -> None:
    with open(path, "rb") as file:
        if path.stat().st_size > whole:
            digest.update(file.read(end))
            file.seek(-end, os.SEEK_END)
        while chunk := file.read(end):
            digest.update(chunk)


def source_files(cfg: DataConfig) -> list[Path]:
    """The files of a data set that comes in files, downloaded first where torchvision can and `data.download` allows.

    Raises UserError naming data.root and the ways to get them.
    """
    root = Path(cfg.root)
    if cfg.name == "arrays":
        return _array_files(root)
    if cfg.name in MEDMNIST:
        path = _medmnist_path(cfg)
        if not path.is_file():
            raise UserError(
                f"data.root: {path} is missing; get {path.name} from https://medmnist.com, "
                "or set data.root to the folder that has it"
            )
        return [path]
    failure = ""
    if not (files := _present_files(cfg)) and cfg.download:
        failure = _download(cfg)
        files = _present_files(cfg)
    if not files:
        raise UserError(
            f"data.root: {root} does not hold {cfg.name}{failure}; {HOW_TO_GET[cfg.name]}, set data.root to the folder "
            f"that has it, or {'go online' if cfg.download else 'set data.download=true'}"
        )
    return files


def _present_files(cfg: DataConfig) -> list[Path]:
    """All files of a fashion_mnist, cifar10, cifar100, stl10 or svhn found on this machine, or []."""
    root = Path(cfg.root)
    if cfg.name == "fashion_mnist":
        folders = [root, root / "FashionMNIST" / "raw", FASHION_PACKAGE]
        choices = [[folder / (name + suffix) for name in IDX_FILES] for folder in folders for suffix in (".gz", "")]
    else:
        choices = [[root / name for name in TORCHVISION_FILES[cfg.name]]]
    return next((files for files in choices if all(path.is_file() for path in files)), [])


def _download(cfg: DataConfig) -> str:
    """Let torchvision download the data set; returns '' or why it failed."""
    from filelock import FileLock

    try:
        Path(cfg.root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(cfg.root) / f".{cfg.name}.lock"):  # ranks of one job do not write over each other
            if not _present_files(cfg):
                _open_torchvision(cfg, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        return f" (the download failed: {' '.join(str(error).split())})"
    return ""


def _open_torchvision(cfg: DataConfig, download: bool = False) -> list:
    """torchvision's [train, test] objects, which check md5 sums and so raise RuntimeError on other or damaged files."""
    from torchvision import datasets

    class LabelledSTL10(datasets.STL10):
        train_list = datasets.STL10.train_list[:2]  # neither needs nor checks the 2.6 GB of unlabelled images

    if cfg.name in ("stl10", "svhn"):
        kind = LabelledSTL10 if cfg.name == "stl10" else datasets.SVHN
        return [kind(cfg.root, split=split, download=download) for split in ("train", "test")]
    kind = {"fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    return [kind[cfg.name](cfg.root, train=train, download=download) for train in (True, False)]


# Sets with fine labels and a coarse_map: digits, fashion_mnist, cifar10, cifar100, stl10, svhn


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


def _load_mapped(cfg: DataConfig) -> Dataset:
    read = {"digits": _read_digits, "fashion_mnist": _read_fashion_mnist}.get(cfg.name, _read_torchvision)
    parts, fine_names = read(cfg)
    coarse_names, fine_to_coarse = read_coarse_map(cfg.coarse_map, fine_names)
    for _, fine in parts:
        if len(fine) and not 0 <= fine.min() <= fine.max() < len(fine_names):
            raise UserError(f"data.root: {cfg.name} holds label {fine.max()}, beyond its {len(fine_names)} classes")
    splits = [_new_split(images, fine_to_coarse[fine], fine) for images, fine in parts]
    if len(splits) == 1:
        is_test = _test_mask(splits[0].coarse_labels, cfg.test_fraction)
        splits = [_take(splits[0], np.flatnonzero(mask)) for mask in (~is_test, is_test)]
    return Dataset(*splits, coarse_names, fine_names, fine_to_coarse)


def _read_digits(cfg: DataConfig) -> tuple[list, list[str]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return [(images[..., None], digits.target.astype(np.int64))], DIGITS


def _read_fashion_mnist(cfg: DataConfig) -> tuple[list, list[str]]:
    parts, files = [], source_files(cfg)
    for images_path, labels_path in (files[:2], files[2:]):
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise UserError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
        parts.append((images[..., None], labels.astype(np.int64)))
    return parts, FASHION


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """A uint8 array of `ndim` dimensions from an IDX file (magic 00 00 08 ndim, sizes as big-endian uint32, data).

    Gzip where the name ends in .gz.  Raises UserError on another magic number or a length unlike the header's.
    Source: http://yann.lecun.com/exdb/mnist (file format).
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); get it again") from None
    magic, start = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if raw[:4] != magic or len(raw) < start:
        raise UserError(f"{path}: starts with {raw[:4].hex(' ')}, not {magic.hex(' ')}: no IDX file of {ndim}-d bytes")
    shape = [int(size) for size in np.frombuffer(raw, ">u4", ndim, offset=4)]
    if len(raw) - start != math.prod(shape):
        raise UserError(f"{path}: holds {len(raw) - start} bytes, its header promises {shape}: truncated; get it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _read_torchvision(cfg: DataConfig) -> tuple[list, list[str]]:
    folder = source_files(cfg)[0].parent
    try:
        train, test = _open_torchvision(cfg)
    except RuntimeError:
        raise UserError(
            f"{folder}: the files of {cfg.name} fail torchvision's md5 check; delete them and get them again"
        ) from None
    names = {"stl10": STL10, "svhn": DIGITS}.get(cfg.name) or train.classes
    return [_as_channels_last(part) for part in (train, test)], names


def _as_channels_last(part) -> tuple[np.ndarray, np.ndarray]:
    is_cifar = hasattr(part, "targets")  # CIFAR is (N, H, W, C) and calls its labels targets; STL-10, SVHN (N, C, H, W)
    images = part.data if is_cifar else part.data.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(part.targets if is_cifar else part.labels, np.int64)


# MedMNIST: its classes are the coarse labels


def _medmnist_path(cfg: DataConfig) -> Path:
    size = "" if cfg.image_size in (0, 28) else f"_{cfg.image_size}"
    return Path(cfg.root) / f"{cfg.name}{size}.npz"


def _load_medmnist(cfg: DataConfig) -> Dataset:
    path = _medmnist_path(cfg)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: no .npz file; get it again")
    splits = []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            # The official val split stays unused: validation rows come from the seed, as for every other data set.
            for part in ("train", "test"):
                images = _as_images(arrays[f"{part}_images"], f"{path}, {part}_images")
                labels = arrays[f"{part}_labels"]
                if labels.ndim == 2 and labels.shape[1] == 1:
                    labels = labels[:, 0]
                labels = _as_labels(labels, len(images), f"{path}, {part}_labels")
                splits.append(_new_split(images, labels, None))
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; it must hold train_ and test_ images and labels") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged .npz file ({error}); get it again") from None
    labels = np.concatenate([split.coarse_labels for split in splits])
    names = PATHMNIST if cfg.name == "pathmnist" else _numbered("class", labels)
    _check_range(labels, names, path)
    return Dataset(*splits, names, None, None)


def _numbered(word: str, labels: np.ndarray) -> list[str]:
    return [f"{word} {c}" for c in range(len(np.unique(labels)))]


# Arrays of the user


def _array_files(root: Path) -> list[Path]:
    """[train inputs, test inputs, train and test coarse labels, then fine labels and names.json where they exist]."""
    kinds = [kind for kind in ("images", "vectors") if (root / f"train_{kind}.npy").is_file()]
    if len(kinds) != 1:
        found = "both train_images.npy and train_vectors.npy" if kinds else "no train_images.npy or train_vectors.npy"
        raise UserError(f"data.root: {root} holds {found}; data.name=arrays needs one of the two")
    needed = [root / f"{part}_{what}.npy" for what in (kinds[0], "coarse_labels") for part in ("train", "test")]
    fine = [root / f"{part}_fine_labels.npy" for part in ("train", "test")]
    if any(path.is_file() for path in fine):
        needed += fine
    if missing := [path.name for path in needed if not path.is_file()]:
        raise UserError(f"data.root: {root} lacks {', '.join(missing)}; write each with np.save")
    names = root / "names.json"
    return [*needed, names] if names.is_file() else needed


def _load_arrays(cfg: DataConfig) -> Dataset:
    files = _array_files(Path(cfg.root))
    has_fine = len(files) >= 6
    names = _read_names(files[-1]) if files[-1].suffix == ".json" else {}
    splits = []
    for i in (0, 1):
        array = _load_npy(files[i], mmap_mode="r")
        inputs = (_as_images if files[i].stem.endswith("images") else _as_vectors)(array, files[i])
        coarse = _as_labels(_load_npy(files[2 + i]), len(inputs), files[2 + i])
        fine = _as_labels(_load_npy(files[4 + i]), len(inputs), files[4 + i]) if has_fine else None
        splits.append(_new_split(inputs, coarse, fine))
    train, test = splits
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise UserError(f"{files[1]}: rows of shape {test.inputs.shape[1:]}, but {train.inputs.shape[1:]} in training")
    coarse = np.concatenate([split.coarse_labels for split in splits])
    coarse_names = names.get("coarse", _numbered("class", coarse))
    for split, path in zip(splits, files[2:4], strict=True):
        _check_range(split.coarse_labels, coarse_names, path)
    if not has_fine:
        return Dataset(train, test, coarse_names, None, None)
    fine = np.concatenate([split.fine_labels for split in splits])
    fine_names = names.get("fine", _numbered("fine", fine))
    for split, path in zip(splits, files[4:6], strict=True):
        _check_range(split.fine_labels, fine_names, path)
    if len(unused := np.setdiff1d(np.arange(len(fine_names)), fine)):
        raise UserError(f"{files[4]}: no row, in test neither, has label {unused[0]} ('{fine_names[unused[0]]}')")
    return Dataset(train, test, coarse_names, fine_names, _parents(fine, coarse, fine_names, coarse_names, files[4]))


def _parents(fine, coarse, fine_names, coarse_names, what: Path) -> np.ndarray:
    """(K_true,) int64: the one coarse class of each fine class.  Raises UserError where a fine class has two."""
    parents = np.zeros(len(fine_names), np.int64)
    parents[fine] = coarse
    if (mixed := parents[fine] != coarse).any():
        row = mixed.argmax()
        raise UserError(
            f"{what}: fine class {fine[row]} ('{fine_names[fine[row]]}') has rows in two coarse classes, "
            f"'{coarse_names[coarse[row]]}' and '{coarse_names[parents[fine[row]]]}'"
        )
    return parents


def _load_npy(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if "ickle" in str(error) or "Python objects" in str(error):
            error = "pickled objects are never loaded"
        raise UserError(f"{path}: no plain .npy array ({error}); write it again with np.save") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: no plain .npy array (an .npz archive); write it again with np.save")
    return array


def _as_images(array: np.ndarray, what: Path | str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise UserError(f"{what}: {array.dtype} of shape {array.shape}; images must be uint8 (N, H, W[, C]), C 1 or 3")
    if array.size == 0:
        raise UserError(f"{what}: holds no pixels, shape {array.shape}")
    return array[..., None] if array.ndim == 3 else array


def _as_vectors(array: np.ndarray, what: Path | str) -> np.ndarray:
    if array.dtype != np.float32 or array.ndim != 2 or array.size == 0:
        raise UserError(f"{what}: {array.dtype} of shape {array.shape}; vectors must be float32 (N, D), not empty")
    if not (finite := np.isfinite(array).all(axis=1)).all():
        raise UserError(f"{what}: row {finite.argmin()} holds NaN or infinity")
    return array


def _as_labels(array: np.ndarray, n: int, what: Path | str) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UserError(f"{what}: {array.dtype} of shape {array.shape}; labels must be integers of shape (N,)")
    if len(array) != n:
        raise UserError(f"{what}: {len(array)} labels for {n} rows")
    return array.astype(np.int64)


def _check_range(labels: np.ndarray, names: list[str], what: Path) -> None:
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(names):
        raise UserError(
            f"{what}: label {low if low < 0 else high} is out of range; "
            f"there are {len(names)} classes, so labels run from 0 to {len(names) - 1} without gaps"
        )


def _read_names(path: Path) -> dict[str, list[str]]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(names, dict) or names.keys() - {"coarse", "fine"}:
        raise UserError(f'{path}: must be {{"coarse": [...], "fine": [...]}}')
    for kind, entries in names.items():
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{path}: '{kind}' must be a list of names in the order of the labels")
        if len(set(entries)) != len(entries):
            raise UserError(f"{path}: '{kind}' has a name twice")
    return names


# Image folders


class ImageFile(NamedTuple):
    name: str  # path relative to data.root, with /
    size: int  # bytes
    mtime_ns: int
    folders: tuple[str, ...]  # below data.root or its train/ or test/: the coarse class, then what lies below it


def _load_image_folder(cfg: DataConfig, cache_dir: Path | None) -> Dataset:
    """Test part and limit are drawn from the file names, so that only images in use are decoded.

    Unreadable images that data.skip_unreadable drops are missing from either part; none is drawn in their place.
    """
    parts = _list_parts(Path(cfg.root))
    coarse_names, fine_names, fine_to_coarse, labels_of = _folder_classes(parts, cfg.coarse_map)
    files = [file for part in parts for file in part]
    coarse, fine = (np.array(column, np.int64) for column in zip(*map(labels_of, files), strict=True))
    if len(parts) == 2:
        is_test = np.arange(len(files)) >= len(parts[0])
    else:
        is_test = _test_mask(coarse, cfg.test_fraction)
    train_rows, test_rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    train_rows = train_rows[limit_rows(coarse[train_rows], cfg.limit)]
    rows = np.concatenate([train_rows, test_rows])
    images, is_readable = _load_images(cfg, [files[row] for row in rows], cache_dir)
    n_train, rows = np.count_nonzero(is_readable[: len(train_rows)]), rows[is_readable]
    source_row = np.concatenate([np.arange(len(part)) for part in parts])
    splits = []
    for part in (slice(None, n_train), slice(n_train, None)):
        names = [files[row].name for row in rows[part]]
        known_fine = fine[rows[part]] if fine_names else None
        splits.append(Split(images[part], coarse[rows[part]], known_fine, names, source_row[rows[part]]))
    if not splits[1].n:
        raise UserError(f"data.root: {cfg.root} has no readable test image")
    return Dataset(*splits, coarse_names, fine_names, fine_to_coarse)


def _list_parts(root: Path) -> list[list[ImageFile]]:
    """[train, test] image files where root has both folders, else [all of them].  Raises UserError on other layouts."""
    if not root.is_dir():
        raise UserError(
            f"data.root: {root} is no folder; make <data.root>/<coarse class>/ folders of images or set data.root"
        )
    folders = _folders(root)
    if len(present := [part for part in ("train", "test") if part in folders]) != 2:
        if present and set(folders) <= {"train", "test", "val", "valid", "validation"}:  # else: a class of that name
            raise UserError(f"data.root: {root} has {present[0]}/ but not both train/ and test/; add or rename one")
        present = [""]
    parts = [_list_images(root, part) for part in present]
    for part, files in zip(present, parts, strict=True):
        if not files:
            raise UserError(f"data.root: no images found below {root / part}; need <coarse class>/*.png or the like")
        if loose := [file.name for file in files if not file.folders]:
            raise UserError(f"data.root: {root / loose[0]} lies in no class folder; move it into one")
        if empty := sorted(set(_folders(root / part)) - {file.folders[0] for file in files}):
            raise UserError(f"data.root: class folder {root / part / empty[0]} holds no images; fill or remove it")
    return parts


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name)]


def _list_images(root: Path, part: str) -> list[ImageFile]:
    """Every image file below root/part, hidden ones left out, sorted by path; links are followed."""

    def stop(error: OSError):
        raise error  # os.walk would pass over a folder that it may not read

    files = []
    for folder, subfolders, names in os.walk(root / part, onerror=stop, followlinks=True):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        folders = Path(folder).relative_to(root / part).parts
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not _is_hidden(name):
                path = os.path.join(folder, name)
                stat = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a dead link: found when decoding
                files.append(ImageFile("/".join([*filter(None, [part]), *folders, name]),
                                       stat.st_size, stat.st_mtime_ns, folders))  # fmt: skip
    return sorted(files)


def _folder_classes(parts: list[list[ImageFile]], coarse_map: dict[str, list]):
    """(coarse names, fine names or None, fine_to_coarse or None, function: ImageFile -> (coarse id, fine id or -1)).

    Top folders are coarse classes and, where every image lies exactly one folder deeper, those sub-folders fine classes
    named <coarse>/<fine>. With a coarse_map the top folders are the fine classes that it groups.
    """
    files = [file for part in parts for file in part]
    tops = sorted({file.folders[0] for file in files})
    if not coarse_map and not all(len(file.folders) == 2 for file in files):
        return tops, None, None, lambda file: (tops.index(file.folders[0]), -1)
    depth = 1 if coarse_map else 2
    fine_names = sorted({"/".join(file.folders[:depth]) for file in files})
    if coarse_map:
        coarse_names, fine_to_coarse = read_coarse_map(coarse_map, fine_names)
    else:
        coarse_names, fine_to_coarse = tops, np.array([tops.index(name.split("/")[0]) for name in fine_names], np.int64)
    fine_id = {name: f for f, name in enumerate(fine_names)}

    def labels_of(file: ImageFile) -> tuple[int, int]:
        fine = fine_id["/".join(file.folders[:depth])]
        return fine_to_coarse[fine], fine

    return coarse_names, fine_names, fine_to_coarse, labels_of


def _load_images(cfg: DataConfig, files: list[ImageFile], cache_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Decode `files`, or map the cache an earlier process left: uint8 (M, H, W, 3), is_readable (len(files),) bool."""
    if cache_dir is None:
        sink = io.BytesIO()
        info = _decode_all(cfg, files, sink)
        pixels = np.frombuffer(sink.getbuffer(), np.uint8)
    else:
        pixels_path, info = _cached_pixels(cfg, files, cache_dir)
        pixels = np.memmap(pixels_path, np.uint8, "r")
    is_readable = np.ones(len(files), bool)
    is_readable[info["unreadable"]] = False
    if info["unreadable"]:
        print(f"data.skip_unreadable: {len(info['unreadable'])} of {len(files)} images left out", file=sys.stderr)
    return pixels.reshape(-1, *info["shape"]), is_readable


def _cached_pixels(cfg: DataConfig, files: list[ImageFile], cache_dir: Path) -> tuple[Path, dict]:
    """The file of decoded pixels for exactly these image files and settings, made where it does not exist yet."""
    from filelock import FileLock

    cache_dir.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{cfg.image_size} {cfg.skip_unreadable}\n".encode())
    for file in files:
        key.update(os.fsencode(f"{file.name}\0{file.size} {file.mtime_ns}\n"))
    stem = f"images-{key.hexdigest()[:24]}"
    pixels_path, info_path, temporary = (cache_dir / f"{stem}.{kind}" for kind in ("u8", "json", "tmp"))
    with FileLock(cache_dir / f"{stem}.lock"):  # processes that start together decode once
        if not (info_path.is_file() and pixels_path.is_file()):
            try:
                with open(temporary, "wb") as sink:
                    info = _decode_all(cfg, files, sink)
                os.replace(temporary, pixels_path)
                temporary.write_text(json.dumps(info))
                os.replace(temporary, info_path)  # last: its presence says that the pixels are whole
            finally:
                temporary.unlink(missing_ok=True)
    return pixels_path, json.loads(info_path.read_text())


def _decode_all(cfg: DataConfig, files: list[ImageFile], sink) -> dict:
    """Write the readable images' pixels to `sink` in order; returns {"shape": [H, W, 3], "unreadable": [rows]}.

    Raises UserError naming every image that cannot be read unless data.skip_unreadable, and the first one whose size
    differs from the first image's.
    """
    from tqdm import tqdm

    unreadable, first, odd = {}, None, ""
    decoded = _decode_in_order([Path(cfg.root, file.name) for file in files], cfg.image_size)
    for row, image in enumerate(tqdm(decoded, "decode", len(files), unit="image", disable=None)):
        if isinstance(image, str):
            unreadable[row] = f"{files[row].name} ({image})"
            continue
        first = first or (files[row].name, image.shape)
        if image.shape == first[1]:
            sink.write(image)
        elif not odd:
            odd = f"{files[row].name} is {_size(image.shape)} pixels but {first[0]} {_size(first[1])}"
    if unreadable and (not cfg.skip_unreadable or first is None):
        listed = "; ".join(list(unreadable.values())[:20])
        more = f"; ... and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
        raise UserError(
            f"data.root: {len(unreadable)} of {len(files)} images in {cfg.root} cannot be read: {listed}{more}: "
            "mend or remove them, or set data.skip_unreadable=true"
        )
    if odd:
        raise UserError(f"data.root: in {cfg.root}, {odd}: set data.image_size to bring all images to one size")
    return {"shape": first[1], "unreadable": list(unreadable)}


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _decode_in_order(paths: list[Path], image_size: int) -> Iterator[np.ndarray | str]:
    """What `decode_image` gives for each path, some threads ahead of the reader and no further: RAM stays bounded."""
    n_threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_threads) as pool:
        ahead = deque()
        for path in paths:
            ahead.append(pool.submit(decode_image, path, image_size))
            if len(ahead) > 4 * n_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def decode_image(path: Path, image_size: int) -> np.ndarray | str:
    """uint8 (H, W, 3) of any format Pillow reads, upright by its EXIF tag; a short reason where it cannot be read.

    image_size: the short side is brought to it (bilinear, antialiased) and the centre cut out, square; 0 = as stored.
    Alpha is dropped, 16-bit grey divided by 257.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        return "not an image" if path.stat().st_size else "empty file"
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        return re.sub(r"\s+", " ", getattr(error, "strerror", None) or str(error) or type(error).__name__)
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):  # I;16 and its byte orders; I where the format has no 16-bit mode. RGB would clip.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels beyond 16 bits")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
