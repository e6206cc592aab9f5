"""utils/validity.py against hdbscan.validity on exact distances."""

import warnings

import numpy as np
import pytest
from hdbscan.validity import validity_index
from scipy.spatial.distance import cdist

from utils import validity


def reference(points: np.ndarray, labels: np.ndarray) -> float:
    """hdbscan's index on exact distances: its own are off by a rounding error between repeated rows, not 0."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return validity_index(cdist(points, points), labels, metric="precomputed", d=points.shape[1])


def clusters(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    k, dimensions = rng.integers(2, 5), rng.integers(1, 6)
    labels = np.concatenate([np.repeat(np.arange(k), 3), rng.integers(0, k, rng.integers(0, 100))])
    points = rng.normal(size=(len(labels), dimensions)) + 3 * rng.random() * rng.normal(size=(k, dimensions))[labels]
    if kind == "ties":
        points = points.round()
    if kind == "repeated":
        points = points[rng.integers(0, len(points), len(points))]
    return points, labels


@pytest.mark.parametrize("kind", ["normal", "ties", "repeated"])
@pytest.mark.parametrize("block", [1, 7, 512])
def test_dbcv_is_hdbscans(kind, block, monkeypatch):
    monkeypatch.setattr(validity, "BLOCK", block)
    for seed in range(12):
        points, labels = clusters(seed, kind)
        with np.errstate(all="ignore"):
            found = validity.dbcv(points, labels)
        np.testing.assert_allclose(found, reference(points, labels), atol=1e-9)


def test_dbcv_by_hand():
    """Two classes of three points on a line; the inner vertex of each tree is its middle, and no edge is inner."""
    points = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    core = 1 / (1 / 1 + 1 / 2) * 2, 1 / (1 / 1 + 1 / 1) * 2  # of an outer point and of the middle
    within, apart = max(1, *core), max(10.0, *core)  # the longest edge; the distance of the two middles
    assert validity.dbcv(points, np.repeat([0, 1], 3)) == pytest.approx((apart - within) / apart)


def test_memory_does_not_grow_with_pairs_of_rows():
    import tracemalloc

    rng = np.random.default_rng(0)
    peaks = []
    for n in (1000, 2000):
        points, labels = rng.normal(size=(n, 4)), np.arange(n) % 2
        tracemalloc.start()
        validity.dbcv(points, labels)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0] and peaks[1] < 20e6  # one matrix of a class's pairs alone would be 8 MB
