"""How certain the coarse network is of an image, from its predictions on augmented views.

All scores grow with uncertainty, so that "the smallest are kept" holds for each.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from utils import distributed, loader, plain, training
from utils.config import Config, FilterConfig

TINY = 1e-12  # keeps log(0) finite; far below float32's resolution at 1


def view_probs(
    cfg: Config, runtime: training.Runtime, network: nn.Module, inputs: loader.Inputs, rows: np.ndarray
) -> Iterator[np.ndarray]:
    """Softmax of `network` on cfg.filter.n_views augmented views of each row: (b, V, K) float32 blocks in row order.

    View v of row i depends on (seed, i, v) only. Views that are the same image are computed once: flips alone make at
    most four. Every process gets all blocks, each having computed its share of the rows.
    """
    if runtime.is_plain:
        yield from plain.view_probs(cfg, runtime, network, inputs, rows)
        return
    network.eval()
    size = max(1, cfg.filter.batch_size // cfg.filter.n_views) * distributed.world_size()

    def forward(block: np.ndarray) -> Tensor:
        own = block[distributed.share(len(block))]
        with torch.inference_mode(), runtime.autocast():
            views, index = loader.distinct_views(cfg, inputs, own)
            probs = network(views).float().softmax(1)
            return probs[index].reshape(len(own), cfg.filter.n_views, -1)

    yield from training.one_behind(forward, (rows[start : start + size] for start in range(0, len(rows), size)))


def entropy(probs: np.ndarray) -> np.ndarray:
    """Shannon entropy in nats over the last axis.  (..., K) -> (...)."""
    return -(probs * np.log(np.maximum(probs, TINY))).sum(-1)


def signed_max_prob(view_probs: np.ndarray, coarse_labels: np.ndarray) -> np.ndarray:
    """U = 1 - p if the most likely class is the given label, else 1 + p, where p is its mean probability over views.

    view_probs: (N, V, K_C) float32.  coarse_labels: (N,) int64.  Returns (N,) float32 in [0, 2]: certain and right is
    0, certain and wrong is 2.  Source: the uncertainty-driven pipeline's equation for U.
    """
    mean = view_probs.mean(1)
    predicted = mean.argmax(1)
    p = mean[np.arange(len(mean)), predicted]
    return np.where(predicted == coarse_labels, 1 - p, 1 + p).astype(np.float32)


def predictive_entropy(view_probs: np.ndarray) -> np.ndarray:
    """Entropy of the mean prediction, nats.  (N, V, K_C) -> (N,) float32 in [0, ln K_C]."""
    return entropy(view_probs.mean(1)).astype(np.float32)


def mutual_information(view_probs: np.ndarray) -> np.ndarray:
    """Entropy of the mean minus mean entropy of the views, nats (BALD, Houlsby et al. 2011).

    (N, V, K_C) -> (N,) float32.
    """
    information = entropy(view_probs.mean(1)) - entropy(view_probs).mean(1)
    return np.maximum(information, 0).astype(np.float32)


def variation_ratio(view_probs: np.ndarray) -> np.ndarray:
    """Share of views that disagree with the majority vote.  (N, V, K_C) -> (N,) float32 in [0, 1); 0 = all agree.

    A tied vote counts the tied class once (Freeman 1965).
    """
    n_classes = view_probs.shape[2]
    votes = view_probs.argmax(2)
    counts = (votes[:, :, None] == np.arange(n_classes)).sum(1)
    return (1 - counts.max(1) / votes.shape[1]).astype(np.float32)


def margin(view_probs: np.ndarray) -> np.ndarray:
    """1 minus the gap between the two largest mean probabilities.  (N, V, K_C) -> (N,) float32 in [0, 1].

    With a single class the gap is the whole probability, so the score is 0.
    """
    mean = np.sort(view_probs.mean(1), axis=1)
    runner_up = mean[:, -2] if mean.shape[1] > 1 else 0
    return (1 - (mean[:, -1] - runner_up)).astype(np.float32)


def score_views(settings: FilterConfig, view_probs: np.ndarray, coarse_labels: np.ndarray) -> np.ndarray:
    """The score that filter.score names.  (N, V, K_C) float32, (N,) int64 -> (N,) float32."""
    if settings.score == "signed_max_prob":
        return signed_max_prob(view_probs, coarse_labels)
    by_name = {
        "entropy": predictive_entropy,
        "mutual_information": mutual_information,
        "variation_ratio": variation_ratio,
        "margin": margin,
    }
    return by_name[settings.score](view_probs)


def keep_most_certain(
    scores: np.ndarray, coarse_labels: np.ndarray, rows: np.ndarray, keep_fraction: float
) -> np.ndarray:
    """Per coarse class the `keep_fraction` of `rows` with the smallest scores; ties go to the smaller row.

    scores: (N,).  rows: (n,) int64, the training rows.  Returns (N,) bool, False on all other rows.  A class keeps
    round(keep_fraction * its rows), at least 1.
    """
    kept = np.zeros(len(scores), dtype=bool)
    rows = np.sort(rows)
    for label in np.unique(coarse_labels[rows]):
        members = rows[coarse_labels[rows] == label]
        n_kept = max(1, int(np.floor(keep_fraction * len(members) + 0.5)))
        kept[members[np.argsort(scores[members], kind="stable")[:n_kept]]] = True
    return kept


def suspects(mean_probs: np.ndarray, coarse_labels: np.ndarray, min_prob: float) -> np.ndarray:
    """Rows whose mean prediction contradicts the label with at least `min_prob`, most confident first: (m,) int64."""
    predicted = mean_probs.argmax(1)
    p = mean_probs.max(1)
    rows = np.flatnonzero((predicted != coarse_labels) & (p >= min_prob))
    return rows[np.argsort(-p[rows], kind="stable")]
