"""utils/metrics.py against answers worked by hand, with the edges, and properties every clustering score must have."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import metrics

RNG = np.random.default_rng(0)


def blobs(sizes, gap=10.0, d=3, seed=0):
    """Points (n, d) float32 around centres `gap` apart, and their labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    points = rng.normal(size=(len(labels), d)) * 0.5
    points[:, 0] += gap * labels
    return points.astype(np.float32), labels


# Coarse predictions


def test_coarse_scores_by_hand():
    scores = metrics.coarse_scores(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
    assert scores == {"accuracy": 0.75, "balanced_accuracy": pytest.approx((2 / 3 + 1) / 2)}


def test_coarse_scores_ignore_a_class_that_is_only_predicted(recwarn):
    scores = metrics.coarse_scores(np.array([0, 0]), np.array([0, 2]))
    assert scores == {"accuracy": 0.5, "balanced_accuracy": 0.5}
    assert not recwarn.list


def test_coarse_scores_without_rows_are_none():
    none = np.zeros(0, np.int64)
    assert metrics.coarse_scores(none, none) == {"accuracy": None, "balanced_accuracy": None}


def test_worst_group_is_the_smallest_and_ungrouped_rows_do_not_count():
    labels, preds = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 0, 0])
    groups = np.array([4, 4, 4, 9, 9, -1])  # 2 of 3, 1 of 2, and a wrong row without a group
    assert metrics.worst_group_accuracy(labels, preds, groups) == 0.5


def test_worst_group_without_groups_is_none():
    labels = np.array([0, 1])
    assert metrics.worst_group_accuracy(labels, labels, np.array([-1, -1])) is None
    assert metrics.worst_group_accuracy(labels[:0], labels[:0], labels[:0]) is None


# Clusters against truth


def test_hungarian_and_purity_by_hand():
    true = np.array([0, 0, 0, 0, 1, 1])
    pred = np.array([5, 5, 7, 7, 9, 9])  # the first class is cut in two: one half stays unmatched
    assert metrics.hungarian_accuracy(true, pred) == pytest.approx(4 / 6)
    assert metrics.purity(true, pred) == 1.0
    assert metrics.hungarian_accuracy(pred, true) == pytest.approx(4 / 6)  # rectangular the other way round
    assert metrics.purity(pred, true) == pytest.approx(4 / 6)


def test_quality_counts_noise_as_a_class_of_its_own():
    true, pseudo = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, -1, 1, 1, -1])
    quality = metrics.cluster_quality(true, pseudo)
    assert (quality["n"], quality["n_clusters"]) == (6, 2)
    assert quality["hungarian"] == pytest.approx(4 / 6)
    assert quality["purity"] == pytest.approx(5 / 6)
    # pairs: 6 together in truth, 3 in pseudo labels, 2 in both, of 15
    expected = 6 * 3 / 15
    assert quality["ari"] == pytest.approx((2 - expected) / ((6 + 3) / 2 - expected))


def test_perfect_quality_has_every_score_one():
    true = np.array([3, 3, 1, 1, 2])
    quality = metrics.cluster_quality(true, np.array([0, 0, 1, 1, 2]))
    assert quality == {"n": 5, "n_clusters": 3} | dict.fromkeys(metrics.QUALITY, pytest.approx(1.0))


def test_quality_edges():
    none = np.zeros(0, np.int64)
    assert metrics.cluster_quality(none, none) == {"n": 0, "n_clusters": 0} | dict.fromkeys(metrics.QUALITY)
    all_noise = metrics.cluster_quality(np.array([0, 0, 1]), np.full(3, -1))
    assert all_noise["n_clusters"] == 0 and all_noise["ari"] == 0.0 and all_noise["hungarian"] == pytest.approx(2 / 3)
    one_row = metrics.cluster_quality(np.array([4]), np.array([0]))
    assert one_row["hungarian"] == 1.0


def test_quality_per_class_skips_classes_without_rows():
    true, coarse = np.array([0, 0, 1, 2]), np.array([0, 0, 0, 2])
    quality = metrics.cluster_quality(true, np.array([0, 0, 0, 1]), coarse, ["a", "empty", "c"])
    assert list(quality["per_class"]) == ["a", "c"]
    assert quality["per_class"]["a"]["hungarian"] == pytest.approx(2 / 3)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 4)), min_size=1, max_size=40), st.randoms())
def test_quality_depends_on_neither_row_order_nor_ids(pairs, random):
    true, pseudo = np.array(pairs).T
    order = np.array(random.sample(range(len(pairs)), len(pairs)))
    renamed = np.array([-1, *random.sample(range(100), 5)])[pseudo + 1]
    quality = metrics.cluster_quality(true, pseudo)
    assert metrics.cluster_quality(true[order], renamed[order]) == pytest.approx(quality)
    assert quality["purity"] >= quality["hungarian"] > 0
    assert all(quality[key] <= 1 + 1e-9 for key in metrics.QUALITY)
    json.dumps(quality, allow_nan=False)


def test_quality_report_rows():
    true = np.array([0, 0, 1, 1, 2, 2, 2])
    pseudo = np.array([0, 0, 1, -1, 2, 2, -1])
    coarse = np.array([0, 0, 0, 0, 1, 1, 1])
    kept = np.array([1, 1, 1, 0, 1, 1, 0], bool)  # row 3 was dropped by the filter, row 6 is validation
    train = np.array([1, 1, 1, 1, 1, 1, 0], bool)
    report = metrics.quality_report(true, pseudo, coarse, ["a", "b"], kept, train)
    assert report["kept"]["n"] == 5 and report["kept"]["ari"] == 1.0 and "per_class" not in report["kept"]
    assert report["all"]["n"] == 6 and report["all"]["hungarian"] == pytest.approx(5 / 6)
    assert {name: q["n"] for name, q in report["per_class"].items()} == {"a": 3, "b": 2}
    assert {name: q["n"] for name, q in report["per_class_all"].items()} == {"a": 4, "b": 2}
    assert report["per_class_all"]["a"]["hungarian"] == pytest.approx(3 / 4)
    empty = {"kept": None, "all": None, "per_class": {}, "per_class_all": {}}
    assert metrics.quality_report(None, pseudo, coarse, ["a", "b"], kept, train) == empty


# Without truth


def test_embedding_scores_prefer_the_true_groups():
    points, labels = blobs([40, 30, 50])
    good = metrics.embedding_scores(points, labels, 1000, 0)
    bad = metrics.embedding_scores(points, RNG.permutation(labels), 1000, 0)
    assert good["silhouette"] > 0.8 and good["dbcv"] > 0.5
    assert bad["silhouette"] < 0 and bad["dbcv"] < 0
    assert metrics.silhouette(points, labels, 1000, 0) == good["silhouette"]


def test_embedding_scores_leave_out_noise_and_unembedded_rows():
    points, labels = blobs([30, 30])
    extra = np.vstack([points, np.full((5, 3), np.nan, np.float32), np.full((5, 3), 5.0, np.float32)])
    extra_labels = np.concatenate([labels, np.zeros(5, int), np.full(5, -1)])
    assert metrics.embedding_scores(extra, extra_labels, 1000, 0) == metrics.embedding_scores(points, labels, 1000, 0)


def test_embedding_scores_are_drawn_from_the_seed():
    points, labels = blobs([60, 60], gap=2.0)
    scores = [metrics.embedding_scores(points, labels, 40, seed) for seed in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]


def test_dbcv_drops_classes_of_one_or_two_rows():
    points, labels = blobs([30, 30, 2, 1])
    small = metrics.embedding_scores(points, labels, 1000, 0)
    assert small["dbcv"] == metrics.embedding_scores(points[:60], labels[:60], 1000, 0)["dbcv"]
    assert metrics.embedding_scores(*blobs([30, 2]), 1000, 0)["dbcv"] is None


NOTHING = {"silhouette": None, "dbcv": None}


@pytest.mark.parametrize(
    ("points", "labels"),
    [
        (np.zeros((0, 2)), np.zeros(0, int)),
        (np.ones((1, 2)), np.zeros(1, int)),
        (RNG.normal(size=(9, 2)), np.zeros(9, int)),  # one class
        (RNG.normal(size=(9, 2)), np.arange(9)),  # every row a class
        (RNG.normal(size=(9, 2)), np.full(9, -1)),
        (np.full((9, 2), np.nan), np.arange(9) % 2),
    ],
)
def test_embedding_scores_are_none_where_undefined(points, labels):
    assert metrics.embedding_scores(points, labels, 100, 0) == NOTHING


def test_embedding_scores_of_identical_points_do_not_raise():
    scores = metrics.embedding_scores(np.ones((12, 4)), np.arange(12) % 3, 100, 0)
    assert scores["dbcv"] is None and scores["silhouette"] in (None, 0.0)
    apart = metrics.embedding_scores(np.repeat(np.eye(3), 4, axis=0), np.repeat(np.arange(3), 4), 100, 0)
    assert apart == {"silhouette": 1.0, "dbcv": 1.0}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 25), st.integers(1, 4), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), st.integers(0, 10**6))
def test_embedding_scores_are_finite_or_none(n, n_labels, scale, seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 3)).round(int(rng.integers(0, 3))) * scale
    scores = metrics.embedding_scores(points, rng.integers(-1, n_labels, n), 20, seed)
    assert all(score is None or -1.0001 <= score <= 1.0001 for score in scores.values())


# Seeds


def test_stability_uses_rows_labelled_in_both():
    a, b = np.array([0, 0, 1, 1, -1, 0]), np.array([2, 2, 0, 0, 1, -1])
    assert metrics.stability(a, b) == 1.0
    assert metrics.stability(a, np.array([-1, -1, -1, -1, 1, 1])) is None


def test_paired_interval_by_hand():
    interval = metrics.paired_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 * 1.0 / np.sqrt(3)  # t(0.975, 2 degrees of freedom), from tables
    assert interval == {
        "mean": 2.0,
        "std": 1.0,
        "n": 3,
        "low": pytest.approx(2 - half),
        "high": pytest.approx(2 + half),
    }


def test_paired_interval_edges():
    assert metrics.paired_interval([0.5]) == {"mean": 0.5, "std": None, "n": 1, "low": None, "high": None}
    assert metrics.paired_interval([]) == {"mean": None, "std": None, "n": 0, "low": None, "high": None}
    assert metrics.paired_interval([0.25, 0.25])["low"] == 0.25
    wide, narrow = metrics.paired_interval([0, 1, 2], 0.99), metrics.paired_interval([0, 1, 2], 0.5)
    assert wide["low"] < narrow["low"] and narrow["high"] < wide["high"]


@pytest.mark.parametrize(
    ("scores", "share"),
    [
        ((0.85, 0.8, 0.9), pytest.approx(0.5)),
        ((0.75, 0.8, 0.9), pytest.approx(-0.5)),
        ((0.95, 0.8, 0.9), pytest.approx(1.5)),
        ((0.85, 0.9, 0.9), None),  # the oracle gains nothing
        ((0.85, 0.9, 0.8), None),
        ((None, 0.8, 0.9), None),
        ((0.85, 0.8, None), None),
        ((0.85, None, 0.9), None),
    ],
)
def test_gain_recovered(scores, share):
    assert metrics.gain_recovered(*scores) == share
