"""utils/clustering.py: planted classes are found, every edge case ends in a right result, controls keep their promise.

UMAP compiles for many seconds on first use, so few tests run it: those on `planted` and those with umap in their name.
In the others `plain_embedding` stands in for it: the first columns of the features.
"""

import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from utils import clustering
from utils.clustering import NOISE, cluster_class, discover, nearest_labels, renumber, settle_noise, strongest
from utils.config import ClusterConfig, UserError

NAMES = ["round", "square"]


def config(**changes) -> ClusterConfig:
    return ClusterConfig(
        **{"n_neighbors": 10, "min_cluster_size": 10, "n_epochs": 50, "normalize": False, "n_jobs": 1} | changes
    )


def blobs(sizes, d=16, gap=8.0, seed=0):
    """Points (n, D) float32 around random centres, and the index of the centre of each (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), d))
    centres *= gap / np.linalg.norm(centres, axis=1, keepdims=True)
    return (centres[labels] + rng.normal(size=(len(labels), d))).astype(np.float32), labels


@pytest.fixture
def plain_embedding(monkeypatch):
    monkeypatch.setattr(clustering, "_embed", lambda x, cluster, seed, found: x[:, : cluster.n_components].copy())


def equal(a, b) -> bool:
    """Whether two results of one dataclass agree in every field, NaN equal to NaN."""
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if not (np.array_equal(x, y, equal_nan=x.dtype.kind == "f") if isinstance(x, np.ndarray) else x == y):
            return False
    return True


def assert_consistent(found: clustering.Discovery, coarse_labels, test_coarse_labels, coarse_names):
    """What every discovery promises, whoever made it."""
    labels, test = found.labels, found.test_labels
    assert (labels.dtype, found.parents.dtype, test.dtype) == (np.int64,) * 3
    assert (found.membership.dtype, found.embedding.dtype) == (np.float32,) * 2
    assert np.array_equal(np.unique(labels[labels >= 0]), np.arange(len(found.parents)))
    assert labels.min(initial=NOISE) == NOISE and test.min(initial=NOISE) >= NOISE
    assert np.array_equal(found.parents[labels[labels >= 0]], coarse_labels[labels >= 0])
    assert np.array_equal(found.parents[test[test >= 0]], test_coarse_labels[test >= 0])
    assert (np.diff(found.parents) >= 0).all()
    assert np.isfinite(found.membership).all() and found.membership.min() >= 0 and found.membership.max() <= 1
    assert (found.membership[labels == NOISE] == 0).all()
    assert len(found.names) == len(set(found.names)) == len(found.parents)
    assert list(found.classes) == list(coarse_names)
    for c, name in enumerate(coarse_names):
        sizes = [int((labels == z).sum()) for z in np.flatnonzero(found.parents == c)]
        assert found.classes[name]["sizes"] == sizes == sorted(sizes, reverse=True)
        assert found.classes[name]["n_clusters"] == len(sizes)
    json.dumps(clustering.summary(found, "any"), allow_nan=False)


# Planted classes, with UMAP


def planted_data():
    """Two coarse classes of three blobs each: train features, fine and coarse labels, and the same for test."""
    sizes = [60, 50, 40, 70, 45, 35]
    features, fine = blobs(sizes, gap=12.0)
    order = np.random.default_rng(1).permutation(len(fine))
    features, fine = features[order], fine[order]
    is_test = np.arange(len(fine)) % 6 == 0
    return features[~is_test], fine[~is_test], features[is_test], fine[is_test]


@pytest.fixture(scope="module")
def planted():
    """The data, the discovery on it, made twice, and what `progress` was told."""
    features, fine, test_features, test_fine = planted_data()
    n = len(fine)
    train_rows = np.arange(n) % 10 != 0
    kept = train_rows & (np.arange(n) % 10 != 1)
    told = []
    arguments = (
        features,
        fine // 3,
        train_rows,
        kept,
        test_features,
        test_fine // 3,
        NAMES,
        config(assign="nearest"),
        3,
    )
    found = discover(*arguments, 100, lambda name, entry: told.append((name, entry["n_clusters"])))
    return {"found": found, "again": discover(*arguments, 100), "fine": fine, "test_fine": test_fine,
            "train_rows": train_rows, "kept": kept, "told": told}  # fmt: skip


def test_planted_classes_are_found(planted):
    found, train = planted["found"], planted["train_rows"]
    assert (found.labels[train] >= 0).all() and (found.labels[~train] == NOISE).all()
    assert found.parents.tolist() == [0, 0, 0, 1, 1, 1]
    assert adjusted_rand_score(planted["fine"][train], found.labels[train]) > 0.95
    assert adjusted_rand_score(planted["test_fine"], found.test_labels) > 0.95
    assert found.names == ["round/1", "round/2", "round/3", "square/1", "square/2", "square/3"]
    assert_consistent(found, planted["fine"] // 3, planted["test_fine"] // 3, NAMES)


def test_same_seed_twice_is_equal(planted):
    assert equal(planted["found"], planted["again"])


def test_only_kept_rows_are_embedded(planted):
    embedded = np.isfinite(planted["found"].embedding).all(axis=1)
    assert np.array_equal(embedded, planted["kept"])
    assert planted["found"].embedding.shape == (len(planted["fine"]), 4)


def test_entries_and_summary_of_planted_classes(planted):
    found, train, kept, fine = (planted[key] for key in ("found", "train_rows", "kept", "fine"))
    entry = found.classes["round"]
    assert list(entry) == "n_rows n_fit n_clusters sizes n_noise silhouette dbcv settings warnings".split()
    assert entry["n_rows"] == (train & (fine < 3)).sum() and entry["n_fit"] == (kept & (fine < 3)).sum()
    assert entry["silhouette"] > 0.5 and entry["dbcv"] > 0.5
    assert entry["settings"] == {"n_neighbors": 10, "knn": "exact", "min_cluster_size": 10, "min_samples": 10}
    assert planted["told"] == [("round", 3), ("square", 3)]
    summary = clustering.summary(found, "umap_hdbscan")
    assert summary["n_fine"] == 6 and summary["n_labelled"] == train.sum() and 0 <= summary["noise_fraction"] < 0.2
    assert (summary["method"], summary["warnings"]) == ("umap_hdbscan", [])


def test_umap_with_many_duplicates():
    points, labels = blobs([2, 2, 2], gap=12.0)
    result = cluster_class(np.repeat(points[::2], 25, axis=0), config(), 0, 100)
    assert adjusted_rand_score(np.repeat(labels[::2], 25), result.labels) == 1.0
    assert np.bincount(result.labels).tolist() == [25, 25, 25]


def test_umap_with_fewer_rows_than_neighbours():
    result = cluster_class(blobs([6, 6])[0], config(n_neighbors=30, min_cluster_size=3), 0, 100)
    assert result.settings["n_neighbors"] == 11
    assert "n_neighbors lowered from 30 to 11" in result.warnings[0]
    assert np.isfinite(result.embedding).all()


@pytest.mark.parametrize(("noise", "label"), [("soft", 0), ("keep", NOISE)])
def test_umap_leaves_out_a_row_opposite_to_all_others(noise, label):
    features = np.ones((41, 16), np.float32)
    features[40] = -1
    result = cluster_class(features, config(metric="cosine", noise=noise), 0, 100)
    assert np.isnan(result.embedding[40]).all() and np.isfinite(result.embedding[:40]).all()
    assert result.labels.tolist() == [0] * 40 + [label]
    assert "UMAP could not embed 1 of 41 rows" in result.warnings


# One coarse class, edge cases


@pytest.mark.parametrize("method", ["umap_hdbscan", "kmeans", "gmm"])
@pytest.mark.parametrize("n", [0, 1, 2, 6])
def test_few_rows_are_one_fine_class_without_embedding(method, n):
    result = cluster_class(blobs([n])[0], config(method=method, min_cluster_size=2), 0, 100)
    assert result.labels.tolist() == [0] * n and result.membership.tolist() == [1.0] * n
    assert result.embedding.shape == (n, 4) and np.isnan(result.embedding).all()
    assert len(result.warnings) == 1
    assert (result.labels.dtype, result.membership.dtype, result.embedding.dtype) == (np.int64, np.float32, np.float32)


@pytest.mark.parametrize("row", [np.zeros(16), np.ones(16), np.full(16, 1e-20)])
@pytest.mark.parametrize("normalize", [True, False])
def test_identical_rows_are_one_fine_class_without_embedding(row, normalize):
    result = cluster_class(np.tile(row, (50, 1)).astype(np.float32), config(normalize=normalize), 0, 100)
    assert result.labels.tolist() == [0] * 50 and np.isnan(result.embedding).all()
    assert "same features" in result.warnings[0]


def test_rows_of_one_direction_are_identical_after_normalisation():
    rows = np.outer(np.arange(1, 51), np.ones(16)).astype(np.float32)
    assert "same features" in cluster_class(rows, config(normalize=True), 0, 100).warnings[0]


def test_rows_of_zeros_stay_zero():
    x = clustering._prepare(np.array([[0, 0], [3, 4]], np.float32), True)
    assert x.tolist() == [[0, 0], [pytest.approx(0.6), pytest.approx(0.8)]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_counted(bad):
    features = blobs([40])[0]
    features[[3, 7], 2] = bad
    with pytest.raises(UserError, match="2 of 40 rows .* not finite"):
        cluster_class(features, config(), 0, 100)


def test_fewer_rows_than_two_clusters_are_one_fine_class_but_embedded(plain_embedding):
    result = cluster_class(blobs([10, 9])[0], config(), 0, 100)
    assert result.labels.tolist() == [0] * 19 and np.isfinite(result.embedding).all()
    assert result.warnings == ["19 rows are fewer than two clusters of 10; kept as one fine class"]
    enough = cluster_class(blobs([10, 10], gap=30)[0], config(min_samples=2), 0, 100)
    assert np.bincount(enough.labels).tolist() == [10, 10]


@pytest.mark.parametrize("noise", ["soft", "keep", "nearest"])
def test_all_noise_is_one_fine_class(plain_embedding, noise):
    uniform = np.random.default_rng(0).random((60, 16)).astype(np.float32)
    result = cluster_class(uniform, config(noise=noise, min_cluster_size=20), 0, 100)
    assert result.labels.tolist() == [0] * 60 and result.n_noise == 60
    assert result.warnings == ["HDBSCAN called all 60 rows noise; kept as one fine class"]


@pytest.mark.parametrize(("noise", "n_left"), [("soft", 0), ("keep", 5), ("nearest", 0)])
def test_one_cluster_found(plain_embedding, noise, n_left):
    rng = np.random.default_rng(0)
    far = np.array([[50, 0, 0, 0], [-50, 0, 0, 0], [0, 50, 0, 0], [0, -50, 0, 0], [0, 0, 50, 0]])
    features = np.vstack([rng.normal(size=(55, 4)) * 0.1, far]).astype(np.float32)
    cluster = config(noise=noise, allow_single_cluster=True, min_cluster_size=20, cluster_selection_epsilon=5.0)
    result = cluster_class(features, cluster, 0, 100)
    assert result.labels.max() == 0 and result.warnings == ["HDBSCAN found one cluster"]
    assert (result.labels == NOISE).sum() == n_left and result.n_noise == 5
    assert (result.membership[:55] > 0).all() and result.membership.max() <= 1


@pytest.mark.parametrize(("size", "used"), [(10, 10), (10.0, 10), (0.1, 6), (0.001, 2), (0.29, 17)])
def test_min_cluster_size_is_a_count_or_a_fraction(plain_embedding, size, used):
    result = cluster_class(blobs([30, 30], gap=30)[0], config(min_cluster_size=size), 0, 100)
    assert result.settings == {"n_neighbors": 10, "knn": "exact", "min_cluster_size": used, "min_samples": used}


def test_min_samples_beyond_the_rows_is_lowered(plain_embedding):
    result = cluster_class(blobs([20, 20], gap=30)[0], config(min_samples=500), 0, 100)
    assert result.settings["min_samples"] == 39 and len(result.labels) == 40


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_hdbscan_step_always_ends_in_valid_labels(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    n, k = data.draw(st.integers(7, 80)), data.draw(st.integers(1, 5))
    spread = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    points = rng.normal(size=(k, 3))[rng.integers(0, k, n)] * 5 + rng.normal(size=(n, 3)) * spread
    points = points.round(data.draw(st.integers(0, 6))).astype(np.float32)  # rounding makes duplicates
    noise = data.draw(st.sampled_from(["soft", "keep", "nearest"]))
    cluster = config(
        noise=noise,
        min_cluster_size=data.draw(st.integers(2, 12)),
        min_samples=data.draw(st.sampled_from([0, 1, 5, 100])),
        cluster_selection_method=data.draw(st.sampled_from(["eom", "leaf"])),
        cluster_selection_epsilon=data.draw(st.sampled_from([0.0, 0.5, 5.0])),
        allow_single_cluster=data.draw(st.booleans()),
    )
    result = clustering._fit_hdbscan(points, cluster, 0, 100)
    assert len(result.labels) == n and (result.labels >= 0).any()
    assert noise == "keep" or (result.labels >= 0).all()
    assert np.isfinite(result.membership).all() and 0 <= result.membership.min() <= result.membership.max() <= 1


# Noise, by hand


HARD = np.array([0, 0, 1, 1, NOISE])
PROBABILITIES = np.array([1.0, 0.5, 1.0, 0.7, 0.0])
NO_SOFT = np.full(5, NOISE), np.zeros(5)
LINE = np.array([[0.0], [1.0], [10.0], [11.0], [8.0]])


def test_noise_kept():
    labels, membership = settle_noise(HARD, PROBABILITIES, NO_SOFT, LINE, "keep", 1)
    assert labels.tolist() == HARD.tolist() and membership == pytest.approx(PROBABILITIES)


def test_noise_to_the_nearest():
    labels, membership = settle_noise(HARD, PROBABILITIES, NO_SOFT, LINE, "nearest", 3)
    assert labels.tolist() == [0, 0, 1, 1, 1]
    assert membership == pytest.approx([1.0, 0.5, 1.0, 0.7, 2 / 3])


def test_soft_is_the_largest_membership_of_every_row():
    soft = np.array([[0.9, 0.1], [0.3, 0.6], [0.0, 0.8], [0.1, 0.2], [0.02, 0.01]])
    labels, membership = settle_noise(HARD, PROBABILITIES, strongest(soft), LINE, "soft", 1)
    assert labels.tolist() == [0, 1, 1, 1, 0]  # row 1 moves although HDBSCAN had put it in cluster 0
    assert membership == pytest.approx([0.9, 0.6, 0.8, 0.2, 0.02])


def test_soft_falls_back_to_the_hard_label_then_to_the_nearest():
    soft = np.array([[np.nan, np.nan], [0.8, 0.1], [0, 0], [0.1, 0.9], [np.nan, np.nan]])
    labels, membership = settle_noise(HARD, PROBABILITIES, strongest(soft), LINE, "soft", 1)
    assert labels.tolist() == [0, 0, 1, 1, 1]
    assert membership == pytest.approx([1.0, 0.8, 1.0, 0.9, 1.0])


def test_hdbscan_issue_568(plain_embedding):
    rows = [[1, 4, 4], [2, 4, 4], [2, 4.1, 4], [2, 4, 4.1], [5, 1, 1], [5, 1.1, 1.1], [5, 1.1, 1], [5, 1, 1], [5, 1, 1]]
    cluster = config(n_components=3, min_cluster_size=2, min_samples=2)
    result = cluster_class(np.array(rows, np.float32), cluster, 0, 100)
    assert result.labels.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert np.isfinite(result.membership).all() and (result.membership >= 0).all()


def test_columns_are_matched_to_the_hard_labels_by_weight():
    weight = np.array([[0.1, 0.2, 9.0], [5.0, 0.3, 1.0], [0.0, 2.0, 3.0]])  # label 0 in column 2, 1 in 0, 2 in 1
    assert clustering.labels_of_columns(weight).tolist() == [1, 2, 0]


def test_strongest_membership_and_unusable_rows():
    columns, membership = strongest(np.array([[0.2, 0.7], [0.5, 0.1], [0.0, 0.0], [np.nan, 0.3]]))
    assert columns.tolist() == [1, 0, NOISE, NOISE] and membership.tolist() == [0.7, 0.5, 0.0, 0.0]


# Votes and ids


def test_vote_by_hand():
    fit, labels = np.array([[0.0], [1.0], [2.0], [10.0]]), np.array([4, 4, 7, 7])
    voted, share = nearest_labels(fit, labels, np.array([[0.2], [9.0]]), 3)
    assert voted.tolist() == [4, 7] and share == pytest.approx([2 / 3, 2 / 3])


def test_equal_votes_go_to_the_nearest():
    fit, labels = np.array([[0.0], [1.0]]), np.array([3, 2])
    voted, share = nearest_labels(fit, labels, np.array([[0.4], [0.6]]), 2)
    assert voted.tolist() == [3, 2] and share.tolist() == [0.5, 0.5]


def test_rows_without_a_label_have_no_vote():
    fit, labels = np.array([[0.0], [5.0]]), np.array([NOISE, 1])
    voted, share = nearest_labels(fit, labels, np.array([[0.1]]), 10)  # more neighbours asked for than there are
    assert (voted.tolist(), share.tolist()) == ([1], [1.0])
    voted, share = nearest_labels(fit, np.full(2, NOISE), np.array([[0.1], [1.0]]), 3)
    assert (voted.tolist(), share.tolist()) == ([NOISE, NOISE], [0.0, 0.0])
    assert nearest_labels(fit, labels, np.zeros((0, 1)), 3)[0].tolist() == []


def test_renumber_by_hand():
    assert renumber(np.array([5, 2, 2, NOISE, 9, 5, 2])).tolist() == [1, 0, 0, NOISE, 2, 1, 0]
    assert renumber(np.array([8, 3])).tolist() == [0, 1]  # equal sizes: by first row
    assert renumber(np.full(2, NOISE)).tolist() == [NOISE, NOISE]
    assert renumber(np.zeros(0, np.int64)).tolist() == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-1, 6), max_size=30))
def test_renumber_keeps_the_groups_and_sorts_the_sizes(ids):
    labels = np.array(ids, np.int64)
    new = renumber(labels)
    assert np.array_equal(new == NOISE, labels == NOISE)
    assert len(set(zip(ids, new.tolist(), strict=True))) == len(set(ids)) == len(set(new.tolist()))
    sizes = np.bincount(new[new >= 0])
    assert (sizes > 0).all() and (np.diff(sizes) <= 0).all()
    assert np.array_equal(renumber(new), new)


# k-means and mixture


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_number_of_clusters_by_silhouette(plain_embedding, method):
    features, fine = blobs([50, 40, 30], d=4, gap=20.0)
    result = cluster_class(features, config(method=method, k_max=4), 0, 80)
    assert adjusted_rand_score(fine, result.labels) == 1.0
    assert np.bincount(result.labels).tolist() == [50, 40, 30]
    assert result.settings == {"n_neighbors": 10, "knn": "exact", "n_clusters": 3} and result.n_noise == 0
    assert (result.membership > 0.9).all() and result.warnings == []
    assert equal(result, cluster_class(features, config(method=method, k_max=4), 0, 80))


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
@pytest.mark.parametrize(("asked", "got"), [(1, 1), (2, 2), (5, 3)])
def test_given_number_of_clusters_and_duplicates(plain_embedding, method, asked, got):
    features = np.repeat(np.eye(4, dtype=np.float32)[:3], 10, axis=0)  # three different rows
    result = cluster_class(features, config(method=method, n_clusters=asked), 0, 100)
    assert len(np.unique(result.labels)) == got == result.settings["n_clusters"]
    assert bool(result.warnings) == (got < asked)


def test_too_few_different_rows_for_k_min(plain_embedding):
    features = np.repeat(np.eye(4, dtype=np.float32)[:2], 10, axis=0)
    result = cluster_class(features, config(method="kmeans", k_min=4), 0, 100)
    assert result.labels.tolist() == [0] * 20
    assert result.warnings == ["2 different rows are too few for 4 clusters; kept as one fine class"]


# The whole data set


def toy(assign="none", **changes):
    """Arguments of discover: classes of two blobs, of too few rows, and of no kept row."""
    two, _ = blobs([30, 24], gap=30.0)
    few, _ = blobs([5], seed=2)
    gone, _ = blobs([8], seed=3)
    features = np.vstack([few, two, gone])
    coarse = np.repeat([1, 0, 2], [5, 54, 8])
    train = np.ones(67, bool)
    train[[4, 20, 40]] = False
    kept = train & (coarse != 2)
    kept[10:14] = False
    test, test_coarse = features[[0, 5, 58, 60]], np.array([1, 0, 0, 2])
    return [features, coarse, train, kept, test, test_coarse, ["a", "b", "c"], config(assign=assign, **changes), 0, 100]


def test_rows_outside_the_fit_have_no_label(plain_embedding):
    features, coarse, train, kept, test, test_coarse, names, *_ = arguments = toy()
    found = discover(*arguments)
    assert_consistent(found, coarse, test_coarse, names)
    assert np.array_equal(found.labels >= 0, kept)
    assert found.parents.tolist() == [0, 0, 1] and found.names == ["a/1", "a/2", "b/1"]
    assert found.test_labels.tolist() == [2, 0, 1, NOISE]
    assert found.classes["c"] | {"warnings": []} == {
        "n_rows": 8, "n_fit": 0, "n_clusters": 0, "sizes": [], "n_noise": 0, "silhouette": None, "dbcv": None,
        "settings": {}, "warnings": []}  # fmt: skip
    assert found.warnings == [
        "b: 4 rows are too few to embed in 4 dimensions; kept as one fine class",
        "c: no rows to cluster",
    ]


def test_rows_outside_the_fit_get_a_vote(plain_embedding):
    features, coarse, train, kept, test, test_coarse, names, *_ = arguments = toy("nearest")
    found = discover(*arguments)
    assert_consistent(found, coarse, test_coarse, names)
    assert np.array_equal(found.labels >= 0, train & (coarse != 2))  # class c has nobody to vote
    assert (found.labels[10:14] == found.labels[5]).all() and (found.membership[10:14] == 1).all()
    assert np.isnan(found.embedding[10:14]).all()


def test_names_go_by_size_after_the_vote(plain_embedding):
    features, coarse, train, kept, *rest = toy("nearest", min_samples=3)
    kept[5:25] = False  # of 30 rows 10 are left, of 24 rows 24: the larger blob is the smaller one in the fit
    kept[50:53] = False
    found = discover(features, coarse, train, kept, *rest)
    assert found.classes["a"]["sizes"] == [29, 23]
    assert (found.labels[5:20] == 0).all() and (found.labels[54:59] == 1).all()


def test_features_on_disk_are_read_class_by_class(plain_embedding, tmp_path):
    arguments = toy("nearest")
    in_memory = discover(*arguments)
    np.save(tmp_path / "train.npy", arguments[0])
    arguments[0] = np.load(tmp_path / "train.npy", mmap_mode="r")
    assert equal(discover(*arguments), in_memory)


def test_validation_rows_and_rows_of_other_classes_change_nothing(plain_embedding):
    arguments = toy("nearest")
    found = discover(*arguments)
    features, train = arguments[0], arguments[2]
    features[~train] = 99.0
    assert equal(discover(*arguments), found)
    features[arguments[1] == 1] *= -3  # class b
    changed = discover(*arguments)
    assert np.array_equal(changed.labels[5:59], found.labels[5:59])


def test_features_that_are_not_finite_stop_the_discovery(plain_embedding):
    arguments = toy()
    arguments[4][1] = np.nan
    with pytest.raises(UserError, match="1 of 2 rows"):
        discover(*arguments)


# Controls


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 3)), min_size=1, max_size=40), st.integers(0, 99))
def test_random_keeps_rows_sizes_and_parents(pairs, seed):
    coarse, local = np.array(pairs).T
    labels = np.where(local >= 0, local + 4 * coarse, NOISE)
    shuffled = clustering.random_labels(labels, coarse, seed)
    assert np.array_equal(shuffled >= 0, labels >= 0)
    for c in range(3):
        assert sorted(shuffled[coarse == c]) == sorted(labels[coarse == c])
    assert np.array_equal(shuffled, clustering.random_labels(labels, coarse, seed))
    found = clustering.discover_random(labels, coarse, labels >= 0, coarse, ["a", "b", "c"], 4, seed)
    assert_consistent(found, coarse, coarse, ["a", "b", "c"])
    assert np.array_equal(found.labels >= 0, labels >= 0)
    assert sorted(np.bincount(found.labels[labels >= 0])) == sorted(
        np.unique(labels[labels >= 0], return_counts=True)[1]
    )
    assert np.array_equal(found.test_labels >= 0, np.isin(coarse, found.parents))


def test_random_differs_from_its_source_and_between_seeds():
    coarse = np.repeat([0, 1], 200)
    labels = np.arange(400) % 2 + 2 * coarse
    one, two = (clustering.random_labels(labels, coarse, seed) for seed in (0, 1))
    assert abs(adjusted_rand_score(labels[:200], one[:200])) < 0.05
    assert not np.array_equal(one, two)
    assert not np.array_equal(one[:200], one[200:] - 2)  # each coarse class has its own stream


def test_random_test_groups_have_the_same_proportions():
    labels, coarse = np.repeat([0, 1], [300, 100]), np.zeros(400, np.int64)
    found = clustering.discover_random(labels, coarse, labels >= 0, np.zeros(4000, np.int64), ["a"], 4, 0)
    assert np.mean(found.test_labels == 0) == pytest.approx(0.75, abs=0.03)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 5), st.booleans()), min_size=1, max_size=40))
def test_oracle_labels_are_the_true_classes(triples):
    coarse, fine, rows = np.array(triples, np.int64).T  # a fine id may occur in two coarse classes: two classes then
    rows = rows.astype(bool)
    labels, parents, fine_ids = clustering.oracle_labels(fine, coarse, rows)
    assert np.array_equal(labels >= 0, rows & (fine >= 0))
    assert np.array_equal(fine_ids[labels[labels >= 0]], fine[labels >= 0])
    assert np.array_equal(parents[labels[labels >= 0]], coarse[labels >= 0])
    found = clustering.discover_oracle(fine, coarse, rows, rows, fine, coarse, ["a", "b", "c"], None, 4)
    assert_consistent(found, coarse, coarse, ["a", "b", "c"])
    assert np.array_equal(found.labels[labels >= 0], found.test_labels[labels >= 0])


def test_oracle_by_hand():
    fine, coarse = np.array([2, 2, 0, 1, 1, 1, 3]), np.array([0, 0, 0, 1, 1, 1, 1])
    rows = np.array([1, 1, 1, 1, 1, 0, 0], bool)
    found = clustering.discover_oracle(
        fine, coarse, rows, np.ones(7, bool), np.array([3, 0, 1]), np.array([1, 0, 1]), NAMES, ["p", "q", "r", "s"], 4
    )
    assert found.labels.tolist() == [0, 0, 1, 2, 2, NOISE, NOISE]
    assert found.parents.tolist() == [0, 0, 1] and found.names == ["round/r", "round/p", "square/q"]
    assert found.test_labels.tolist() == [NOISE, 1, 2]  # no training row has class s
    assert found.membership.tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert found.embedding.shape == (7, 4) and np.isnan(found.embedding).all()
    assert found.classes["square"] == {
        "n_rows": 4, "n_fit": 2, "n_clusters": 1, "sizes": [2], "n_noise": 0, "silhouette": None, "dbcv": None,
        "settings": {}, "warnings": []}  # fmt: skip


def test_summary_without_a_labelled_row():
    coarse = np.array([0, 1])
    found = clustering.discover_random(np.full(2, NOISE), coarse, np.ones(2, bool), coarse, NAMES, 4, 0)
    summary = clustering.summary(found, "random")
    assert (summary["n_fine"], summary["n_labelled"], summary["noise_fraction"]) == (0, 0, None)
    assert summary["warnings"] == ["round: no rows to label", "square: no rows to label"]
