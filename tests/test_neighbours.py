"""utils/neighbours.py: the same neighbours as scikit-learn's, and the same UMAP graph, whatever the blocks."""

import numpy as np
import pytest
import torch
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from utils import neighbours
from utils.config import EXACT_METRICS
from utils.neighbours import exact_neighbours

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(90, 12)).astype(np.float32) + 5


def by_sorting(x, k, metric):
    """All distances in float64, sorted by (itself first, distance, index): the plain reference."""
    if metric == "correlation":
        x = x - x.mean(axis=1, keepdims=True)
    distances = pairwise_distances(x.astype(np.float64), metric="euclidean" if metric == "euclidean" else "cosine")
    first = distances.copy()
    np.fill_diagonal(first, -1)
    order = np.lexsort((np.broadcast_to(np.arange(len(x)), first.shape), first), axis=1)[:, :k]
    np.fill_diagonal(distances, 0)
    return order, np.take_along_axis(distances, order, axis=1)


def in_torch(monkeypatch):
    """Let device cpu run what a CUDA device runs."""
    monkeypatch.setattr(neighbours, "_NumpySearch", lambda points: neighbours._TorchSearch(points, "cpu"))


@pytest.mark.parametrize("search", ["numpy", "torch"])
@pytest.mark.parametrize("metric", EXACT_METRICS)
@pytest.mark.parametrize("k", [1, 10, 90, 200])
def test_agrees_with_sorting_all_distances(monkeypatch, search, metric, k):
    if search == "torch":
        in_torch(monkeypatch)
    indices, distances = exact_neighbours(POINTS, k, metric)
    expected, exact = by_sorting(POINTS, k, metric)
    assert (indices.dtype, distances.dtype) == (np.int32, np.float32) and indices.shape == (90, min(k, 90))
    assert np.array_equal(indices, expected) and distances == pytest.approx(exact, abs=2e-6)


def test_agrees_with_scikit_learn():
    indices, distances = exact_neighbours(POINTS, 15)
    expected, found = NearestNeighbors(n_neighbors=15).fit(POINTS).kneighbors(POINTS)
    assert np.array_equal(indices, found) and distances == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("search", ["numpy", "torch"])
def test_size_of_the_blocks_changes_nothing(monkeypatch, search):
    if search == "torch":
        in_torch(monkeypatch)
    whole = exact_neighbours(POINTS, 10)
    for block in (1, 7, 90):
        monkeypatch.setattr(neighbours, "CPU_BLOCK", block)
        assert all(np.array_equal(a, b) for a, b in zip(whole, exact_neighbours(POINTS, 10), strict=True))


def test_memory_bounds_the_rows_of_a_block(monkeypatch):
    asked = []
    search = neighbours._NumpySearch.__call__
    monkeypatch.setattr(neighbours._NumpySearch, "__call__", lambda *a: asked.append(len(a[1])) or search(*a))
    exact_neighbours(np.zeros((4000, 500), np.float32), 2, memory_mb=1)
    assert max(asked) == 2**20 // (16 * 4000 + 8 * 10 * 500) and sum(asked) == 4000


@pytest.mark.parametrize("search", ["numpy", "torch"])
def test_duplicates_go_by_index_behind_the_row_itself(monkeypatch, search):
    if search == "torch":
        in_torch(monkeypatch)
    x = np.repeat(POINTS[:4], 3, axis=0)
    indices, distances = exact_neighbours(x, 3)
    assert indices[:3].tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]] and not distances.any()
    indices, _ = exact_neighbours(np.ones((60, 3), np.float32), 5)  # more duplicates than candidates
    assert np.array_equal(indices[:, 0], np.arange(60))


def test_near_duplicates_far_from_the_origin_keep_their_distances():
    x = np.zeros((50, 2), np.float32)
    x[:, 0], x[:, 1] = 4096, np.arange(50) * 2**-10
    indices, distances = exact_neighbours(x, 3)
    assert np.array_equal(indices, by_sorting(x, 3, "euclidean")[0])
    assert distances[:, 1] == pytest.approx(2**-10, rel=1e-4)


def test_rows_without_direction_are_as_in_umap():
    from umap.distances import correlation, cosine

    x = POINTS[:6].copy()
    x[[1, 4]] = 0
    for metric, reference in (("cosine", cosine), ("correlation", correlation)):
        indices, distances = exact_neighbours(x, 6, metric)
        expected = [[reference(x[i], x[j]) for j in indices[i]] for i in range(6)]
        assert distances == pytest.approx(np.array(expected), abs=1e-6)


@pytest.mark.parametrize("n", [640, 4999, 5000])
def test_smallest_entries_with_and_without_groups(n):
    scores = RNG.normal(size=(5, n)).astype(np.float32)
    scores[1] = np.arange(n)[::-1]  # the smallest are the columns that no group holds
    for count in (1, 12):
        columns = neighbours._smallest(scores, count)
        assert np.array_equal(np.sort(columns), np.sort(np.argsort(scores, axis=1)[:, :count]))


def test_umap_makes_the_same_graph_of_them():
    import umap

    metric = "cosine"
    settings = {"n_neighbors": 10, "metric": metric, "n_epochs": 0, "init": "random", "random_state": 0, "n_jobs": 1}
    own = umap.UMAP(**settings).fit(POINTS).graph_
    given = umap.UMAP(**settings, precomputed_knn=exact_neighbours(POINTS, 10, metric)).fit(POINTS).graph_
    assert (own != 0).nnz == (given != 0).nnz
    assert abs(own - given).max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_finds_the_same():
    assert np.array_equal(exact_neighbours(POINTS, 10, device="cuda")[0], exact_neighbours(POINTS, 10)[0])
