"""utils/uncertainty.py by hand, against slow formulas, and the filter stage's stored numbers against a plain loop."""

import math

import numpy as np
import pytest
import torch
from conftest import run_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from utils import augment, loader, models, uncertainty
from utils.config import SCORES, FilterConfig, load_config
from utils.data import load_dataset

# Three images, two views, two classes: agreeing and sure; agreeing and unsure; disagreeing.
VIEWS = np.array([[[0.9, 0.1], [0.7, 0.3]], [[0.4, 0.6], [0.4, 0.6]], [[1.0, 0.0], [0.25, 0.75]]], np.float32)


def h(*probs: float) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


# By hand


def test_signed_max_prob_by_hand():
    """U = 1 - p for a right prediction and 1 + p for a wrong one (DESIGN, 1.3); mean p here: 0.8, 0.6, 0.625."""
    np.testing.assert_allclose(uncertainty.signed_max_prob(VIEWS, np.array([0, 1, 0])), [0.2, 0.4, 0.375], atol=1e-6)
    np.testing.assert_allclose(uncertainty.signed_max_prob(VIEWS, np.array([1, 0, 1])), [1.8, 1.6, 1.625], atol=1e-6)


def test_signed_max_prob_at_its_ends():
    sure = np.array([[[1.0, 0.0]]], np.float32)
    assert uncertainty.signed_max_prob(sure, np.array([0])) == 0
    assert uncertainty.signed_max_prob(sure, np.array([1])) == 2


def test_predictive_entropy_by_hand():
    expected = [h(0.8, 0.2), h(0.4, 0.6), h(0.625, 0.375)]
    np.testing.assert_allclose(uncertainty.predictive_entropy(VIEWS), expected, rtol=1e-5)


def test_mutual_information_by_hand():
    expected = [h(0.8, 0.2) - (h(0.9, 0.1) + h(0.7, 0.3)) / 2, 0, h(0.625, 0.375) - h(0.25, 0.75) / 2]
    np.testing.assert_allclose(uncertainty.mutual_information(VIEWS), expected, atol=1e-6)


def test_variation_ratio_by_hand():
    assert uncertainty.variation_ratio(VIEWS).tolist() == [0, 0, 0.5]
    votes = np.eye(3, dtype=np.float32)[[[0, 1, 1, 2, 1], [2, 2, 2, 2, 2], [0, 0, 1, 1, 2]]]
    np.testing.assert_allclose(uncertainty.variation_ratio(votes), [0.4, 0, 0.6], atol=1e-6)  # a tie counts once


def test_margin_by_hand():
    np.testing.assert_allclose(uncertainty.margin(VIEWS), [0.4, 0.8, 0.75], atol=1e-6)
    three = np.array([[[0.5, 0.2, 0.3]]], np.float32)
    np.testing.assert_allclose(uncertainty.margin(three), [0.8], atol=1e-6)


def test_entropy_of_certainty_is_zero_and_of_ignorance_ln_k():
    assert uncertainty.entropy(np.array([1.0, 0.0, 0.0])) == 0
    assert uncertainty.entropy(np.full(7, 1 / 7)) == pytest.approx(math.log(7))


# Against slow formulas


def slow_scores(name: str, views: np.ndarray, labels: np.ndarray) -> list[float]:
    scores = []
    for image, label in zip(views.astype(float), labels, strict=True):
        mean = [sum(view[k] for view in image) / len(image) for k in range(image.shape[1])]
        best = max(range(len(mean)), key=lambda k: mean[k])
        ranked = sorted([*mean, 0.0], reverse=True)
        votes = [max(range(len(view)), key=lambda k: view[k]) for view in image]  # noqa: B023
        scores.append({
            "signed_max_prob": 1 - mean[best] if best == label else 1 + mean[best],
            "entropy": h(*mean),
            "mutual_information": h(*mean) - sum(h(*view) for view in image) / len(image),
            "variation_ratio": 1 - max(votes.count(k) for k in votes) / len(votes),
            "margin": 1 - ranked[0] + (ranked[1] if len(mean) > 1 else 0),
        }[name])  # fmt: skip
    return scores


def random_views(n=50, v=5, k=4, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.5), (n, v)).astype(np.float32)


@pytest.mark.parametrize("n_views, n_classes", [(5, 4), (2, 2), (3, 1), (20, 10)])
@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_the_slow_formulas(score, n_views, n_classes):
    views = random_views(50, n_views, n_classes)
    labels = np.random.default_rng(1).integers(0, n_classes, 50)
    scores = uncertainty.score_views(FilterConfig(score=score), views, labels)
    assert scores.dtype == np.float32 and scores.shape == (50,)
    np.testing.assert_allclose(scores, slow_scores(score, views, labels), atol=2e-6)


@st.composite
def view_probs(draw) -> np.ndarray:
    """(n, V, K) float32 rows of softmaxes, with sure, tied and repeated rows among them."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)))
    logits = draw(arrays(np.float32, shape, elements=st.sampled_from([-200.0, -3.0, 0.0, 1.5, 30.0])))
    return torch.from_numpy(logits).softmax(-1).numpy()


@settings(max_examples=80, deadline=None)
@given(view_probs(), st.integers(0, 4))
def test_scores_stay_in_their_ranges(views, label):
    n, n_views, k = views.shape
    labels = np.full(n, label % k)
    highest = {
        "signed_max_prob": 2, "entropy": math.log(k), "mutual_information": math.log(k),
        "variation_ratio": 1 - 1 / n_views, "margin": 1,
    }  # fmt: skip
    for score in SCORES:
        values = uncertainty.score_views(FilterConfig(score=score), views, labels)
        assert np.isfinite(values).all()
        assert values.min() >= -1e-6 and values.max() <= highest[score] + 1e-5, score
    right = views.mean(1).argmax(1) == labels
    signed = uncertainty.signed_max_prob(views, labels)
    assert (signed[right] <= 1).all() and (signed[~right] >= 1).all()


def test_one_view_has_no_disagreement():
    views = random_views(20, 1, 3)
    assert (uncertainty.variation_ratio(views) == 0).all()
    np.testing.assert_allclose(uncertainty.mutual_information(views), 0, atol=1e-6)
    np.testing.assert_allclose(uncertainty.predictive_entropy(views), uncertainty.entropy(views[:, 0]), rtol=1e-5)


def test_one_class_is_certain_by_every_score():
    for score in SCORES:
        assert (
            uncertainty.score_views(FilterConfig(score=score), np.ones((3, 4, 1), np.float32), np.zeros(3, int)) == 0
        ).all()


# Which rows stay


def test_keep_most_certain_by_hand():
    scores = np.array([0.3, 0.1, 0.2, 0.9, 0.5, 0.0, 0.4])
    labels = np.array([0, 0, 0, 1, 1, 1, 0])
    kept = uncertainty.keep_most_certain(scores, labels, np.array([0, 1, 2, 3, 4]), 0.67)  # rows 5 and 6 are validation
    assert kept.tolist() == [False, True, True, False, True, False, False]


def test_equal_scores_go_to_the_smaller_row_whatever_the_order_of_rows():
    """3,000 rows, for numpy sorts short arrays stably whatever it is told."""
    scores = np.tile([0.5, 0.25, 0.5], 1000)
    expected = np.sort(np.concatenate([np.arange(1, 3000, 3), np.flatnonzero(scores == 0.5)[:500]]))
    for rows in (np.arange(3000), np.arange(3000)[::-1]):
        kept = uncertainty.keep_most_certain(scores, np.zeros(3000, int), rows, 0.5)
        assert np.array_equal(np.flatnonzero(kept), expected)


@pytest.mark.parametrize(
    "fraction, n, n_kept",
    [(1.0, 7, 7), (1e-9, 7, 1), (0.5, 7, 4), (0.9, 10, 9), (0.35, 10, 4), (0.9, 1, 1), (0.01, 1, 1)],
)
def test_keep_fraction_rounds_half_up_and_keeps_one(fraction, n, n_kept):
    kept = uncertainty.keep_most_certain(np.arange(n, dtype=float), np.zeros(n, int), np.arange(n), fraction)
    assert np.flatnonzero(kept).tolist() == list(range(n_kept))


def test_a_class_without_training_rows_keeps_none():
    kept = uncertainty.keep_most_certain(np.zeros(4), np.array([0, 0, 1, 2]), np.array([0, 1, 3]), 1.0)
    assert kept.tolist() == [True, True, False, True]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 10**6))
def test_kept_rows_are_never_less_certain_than_dropped_ones(n, fraction, seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 5, n) / 4, rng.integers(0, 3, n)
    rows = np.flatnonzero(rng.random(n) < 0.8)
    kept = uncertainty.keep_most_certain(scores, labels, rows, fraction)
    is_row = np.isin(np.arange(n), rows)
    assert not kept[~is_row].any()
    for label in np.unique(labels[is_row]):
        of_class = is_row & (labels == label)
        assert kept[of_class].sum() == max(1, math.floor(fraction * of_class.sum() + 0.5))
        if (of_class & ~kept).any():
            assert scores[of_class & kept].max() <= scores[of_class & ~kept].min()


# Suspects


def test_suspects_are_contradicted_rows_the_most_confident_first():
    probs = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.05, 0.95]])
    labels = np.array([0, 0, 0, 1, 0, 1])
    assert uncertainty.suspects(probs, labels, 0.0).tolist() == [2, 1, 4, 3]  # 1 before 4: equal, by row
    assert uncertainty.suspects(probs, labels, 0.7).tolist() == [2, 1, 4]  # at least
    assert uncertainty.suspects(probs, labels, 0.81).tolist() == []


# The stage


FLIPS = ["filter.views.hflip_p=0.8", "filter.views.vflip_p=0.3", "filter.views.crop_padding=2"]


def filter_again(config_file, run_copy, *overrides):
    """The arrays that uncertainty_filter.py writes with these settings."""
    run_stage("uncertainty_filter", "--config", config_file, f"output_dir={run_copy}", "--force", *overrides)
    folder = run_copy / "planted/seed0/uncertainty"
    return {name: np.load(folder / f"{name}.npy") for name in ("scores", "probs", "view_probs", "kept")}


def test_stored_scores_are_those_of_one_image_at_a_time(config_file, run_copy):
    stored = filter_again(config_file, run_copy, *FLIPS)
    cfg = load_config(str(config_file), (f"output_dir={run_copy}", *FLIPS))
    train = load_dataset(cfg.data).train
    network = models.load_network(cfg.model, train, 2, cfg.run_dir / "coarse/model.pt").eval()
    for row in range(0, train.n, 7):
        image = torch.from_numpy(np.array(train.inputs[row])).permute(2, 0, 1)[None]
        views = []
        for view in range(3):
            draws = augment.uniform(0, augment.VIEWS, row, view, n_draws=4)
            with torch.inference_mode():
                views.append(network(augment.crop_flip(image, draws[None], cfg.filter.views)).softmax(1)[0].tolist())
        np.testing.assert_allclose(stored["view_probs"][row], views, atol=1e-5)
        mean = np.mean(views, 0)
        label, best = train.coarse_labels[row], mean.argmax()
        expected = 1 - mean[best] if best == label else 1 + mean[best]
        assert stored["scores"][row] == pytest.approx(expected, abs=1e-5)


def test_batch_size_changes_no_score(config_file, run_copy):
    seven = filter_again(config_file, run_copy, *FLIPS, "filter.batch_size=7")
    one = filter_again(config_file, run_copy, *FLIPS, "filter.batch_size=1")  # less than the views of one image
    large = filter_again(config_file, run_copy, *FLIPS, "filter.batch_size=512")
    for other in (seven, one):
        for name in ("scores", "probs", "view_probs"):
            np.testing.assert_allclose(other[name], large[name], atol=1e-6)
        assert np.array_equal(other["kept"], large["kept"])


def test_memory_mapped_images_give_the_same_scores(config_file, run_copy, monkeypatch):
    resident = filter_again(config_file, run_copy, *FLIPS)
    monkeypatch.setattr(loader, "RESIDENT_SHARE", 0)
    mapped = filter_again(config_file, run_copy, *FLIPS)
    assert all(np.array_equal(resident[name], mapped[name]) for name in resident)
