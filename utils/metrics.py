"""Scores of coarse predictions, of discovered classes and of seeds against each other.

Arrays in, plain dicts of Python numbers out, so that they go into JSON as they are: an undefined value is None, never
NaN. scikit-learn, scipy and hdbscan compute; this module only arranges. True fine labels are read here and nowhere
else but in the oracle control.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np

CHUNK_MB = 64  # MB (2^20 bytes) of distances that the silhouette holds at once
QUALITY = ["hungarian", "purity", "ari", "nmi", "ami", "v_measure"]


def coarse_scores(coarse_labels: np.ndarray, preds: np.ndarray) -> dict[str, float | None]:
    """Accuracy and balanced accuracy (mean recall over the classes that occur in `coarse_labels`), in [0, 1].

    coarse_labels, preds: (n,) int.  Both are None without rows.
    """
    if len(coarse_labels) == 0:
        return {"accuracy": None, "balanced_accuracy": None}
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    with warnings.catch_warnings():  # scikit-learn warns where a class is predicted that has no true row
        warnings.simplefilter("ignore")
        balanced = balanced_accuracy_score(coarse_labels, preds)
    return {"accuracy": float(accuracy_score(coarse_labels, preds)), "balanced_accuracy": float(balanced)}


def worst_group_accuracy(coarse_labels: np.ndarray, preds: np.ndarray, groups: np.ndarray) -> float | None:
    """Smallest coarse accuracy over the groups: true fine classes, or discovered ones.

    groups: (n,) int; rows with a negative group are left out.  None if no row has a group.
    """
    is_grouped = groups >= 0
    if not is_grouped.any():
        return None
    correct = (coarse_labels == preds)[is_grouped]
    sizes = np.bincount(groups[is_grouped])
    hits = np.bincount(groups[is_grouped], weights=correct)
    return float((hits[sizes > 0] / sizes[sizes > 0]).min())


def hungarian_accuracy(true: np.ndarray, pred: np.ndarray) -> float | None:
    """Share of rows that agree under the best one-to-one match of predicted to true classes.

    The match is rectangular: with unequal numbers of classes some stay unmatched, and all their rows count as wrong.
    true, pred: (n,) int, any ids; -1 is a class like any other.  None without rows.
    """
    if len(true) == 0:
        return None
    from scipy.optimize import linear_sum_assignment

    table = _contingency(true, pred)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(true))


def purity(true: np.ndarray, pred: np.ndarray) -> float | None:
    """Share of rows that agree when each predicted class stands for its commonest true class (many to one).

    true, pred: (n,) int.  None without rows.  It never falls when a predicted class is split: read it with the others.
    """
    return float(_contingency(true, pred).max(axis=0).sum() / len(true)) if len(true) else None


def _contingency(true: np.ndarray, pred: np.ndarray) -> np.ndarray:
    from sklearn.metrics.cluster import contingency_matrix

    return contingency_matrix(true, pred)


def cluster_quality(
    true_fine: np.ndarray,
    pseudo: np.ndarray,
    coarse_labels: np.ndarray | None = None,
    coarse_names: Sequence[str] | None = None,
) -> dict:
    """Discovered classes against the true ones: 'n', 'n_clusters', hungarian, purity, ari, nmi, ami, v_measure.

    true_fine, pseudo: (n,) int.  Rows without a pseudo label (-1) form one class of their own, which 'n_clusters'
    does not count.  ARI and AMI can be negative, the others lie in [0, 1]; all are None without rows.  With
    `coarse_labels` and `coarse_names` the dict also has 'per_class': the same scores for the rows of each coarse
    class that has any.
    """
    n_clusters = len(np.unique(pseudo[pseudo >= 0]))
    quality: dict = {"n": len(true_fine), "n_clusters": n_clusters} | dict.fromkeys(QUALITY)
    if len(true_fine):
        quality |= _agreement(true_fine, pseudo)
    if coarse_labels is not None:
        quality["per_class"] = {
            name: cluster_quality(true_fine[coarse_labels == c], pseudo[coarse_labels == c])
            for c, name in enumerate(coarse_names)
            if (coarse_labels == c).any()
        }
    return quality


def _agreement(true_fine: np.ndarray, pseudo: np.ndarray) -> dict[str, float]:
    from sklearn import metrics

    with warnings.catch_warnings():  # scikit-learn warns where nearly every row is a class of its own
        warnings.simplefilter("ignore")
        return {
            "hungarian": hungarian_accuracy(true_fine, pseudo),
            "purity": purity(true_fine, pseudo),
            "ari": float(metrics.adjusted_rand_score(true_fine, pseudo)),
            "nmi": float(metrics.normalized_mutual_info_score(true_fine, pseudo)),
            "ami": float(metrics.adjusted_mutual_info_score(true_fine, pseudo)),
            "v_measure": float(metrics.v_measure_score(true_fine, pseudo)),
        }


def quality_report(
    true_fine: np.ndarray | None,
    pseudo: np.ndarray,
    coarse_labels: np.ndarray,
    coarse_names: Sequence[str],
    kept: np.ndarray,
    train_rows: np.ndarray,
) -> dict:
    """The content of labels/<source>/metrics.json: {'kept', 'all', 'per_class', 'per_class_all'}.

    All arrays are (N,).  'kept' scores the rows with `kept`; 'all' the rows with `train_rows`, which holds no
    validation row, as those are never labelled; 'per_class' and 'per_class_all' are {coarse name: scores} over the same
    two sets of rows.  In all of them the rows without a pseudo label are one class of their own, so leaving rows
    unlabelled costs score.  Without truth: None, None, {}, {}.
    """
    if true_fine is None:
        return {"kept": None, "all": None, "per_class": {}, "per_class_all": {}}
    on_kept, on_all = (
        cluster_quality(true_fine[rows], pseudo[rows], coarse_labels[rows], coarse_names) for rows in (kept, train_rows)
    )
    per_class, per_class_all = on_kept.pop("per_class"), on_all.pop("per_class")
    return {"kept": on_kept, "all": on_all, "per_class": per_class, "per_class_all": per_class_all}


def embedding_scores(embedding: np.ndarray, labels: np.ndarray, max_points: int, seed: int) -> dict[str, float | None]:
    """Silhouette and DBCV, both in [-1, 1], of the labelled rows in the embedding; they need no truth.

    embedding: (n, d) float, NaN rows are left out; labels: (n,) int, -1 rows are left out, so neither score punishes
    noise. At most `max_points` rows are used, drawn from `seed` without replacement: the time of both grows
    with the pairs of rows, their memory does not.
    A score is None where it is not defined: fewer than two classes, or no two rows apart. DBCV: Moulavi et al.
    2014 (SDM), over the classes with three or more of the drawn rows.
    """
    points, groups = _scored_rows(embedding, labels, max_points, seed)
    return {"silhouette": _silhouette(points, groups), "dbcv": _dbcv(points, groups)}


def silhouette(embedding: np.ndarray, labels: np.ndarray, max_points: int, seed: int) -> float | None:
    """The silhouette of `embedding_scores` alone."""
    return _silhouette(*_scored_rows(embedding, labels, max_points, seed))


def _scored_rows(embedding, labels, max_points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.flatnonzero((labels >= 0) & np.isfinite(embedding).all(axis=1))
    if len(rows) > max_points:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_points, replace=False))
    return embedding[rows].astype(np.float64), labels[rows]


def _silhouette(points: np.ndarray, labels: np.ndarray) -> float | None:
    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    from sklearn import config_context
    from sklearn.metrics import silhouette_score

    with config_context(working_memory=CHUNK_MB):
        return _finite(silhouette_score(points, labels))


def _dbcv(points: np.ndarray, labels: np.ndarray) -> float | None:
    # One row has no spanning tree and two have no inner edge.
    names, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    is_used = sizes[index] >= 3 if len(names) else np.zeros(0, bool)
    _, index = np.unique(labels[is_used], return_inverse=True)
    if len(np.unique(index)) < 2:
        return None
    from utils.validity import dbcv

    with np.errstate(all="ignore"):  # all rows of a class may be one point
        return _finite(dbcv(points[is_used], index))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def stability(labels_a: np.ndarray, labels_b: np.ndarray) -> float | None:
    """ARI of two labellings, as of two seeds, over the rows that both label (>= 0); None if fewer than two."""
    from sklearn.metrics import adjusted_rand_score

    both = (labels_a >= 0) & (labels_b >= 0)
    return float(adjusted_rand_score(labels_a[both], labels_b[both])) if both.sum() >= 2 else None


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> dict[str, float | int | None]:
    """Mean of paired differences (one a seed) with Student's t interval: {'mean', 'std', 'n', 'low', 'high'}.

    'std' has n - 1 in its denominator, the interval n - 1 degrees of freedom.  One difference has neither std nor
    interval (None); no difference has no mean either.
    """
    n = len(differences)
    mean = float(np.mean(differences)) if n else None
    if n < 2:
        return {"mean": mean, "std": None, "n": n, "low": None, "high": None}
    from scipy.stats import t

    std = float(np.std(differences, ddof=1))
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * std / math.sqrt(n)
    return {"mean": mean, "std": std, "n": n, "low": mean - half, "high": mean + half}


def gain_recovered(method: float | None, matched: float | None, oracle: float | None) -> float | None:
    """Share of the gain with true fine labels that the method reaches: (method - matched) / (oracle - matched).

    Negative where the method loses, above 1 where it beats the oracle.  None where a score is missing or the oracle
    gains nothing, as there is nothing to recover then.
    """
    if method is None or matched is None or oracle is None or oracle <= matched:
        return None
    return (method - matched) / (oracle - matched)
