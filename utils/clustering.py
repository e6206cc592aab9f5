"""Find fine classes inside each coarse class: UMAP, then HDBSCAN (or k-means, or a Gaussian mixture), class by class.

`cluster_class` clusters the rows of one coarse class, `discover` the whole training set. `discover_random` and
`discover_oracle` make the two controls in the same form. Pseudo labels are int64; NOISE = -1 means no label.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils import neighbours, parallel
from utils.config import EXACT_METRICS, ClusterConfig, UserError
from utils.metrics import embedding_scores, silhouette

NOISE = -1
CPU_EXACT_ROWS = 40_000  # knn=auto on the CPU: from here on UMAP's own search, compilation included, is faster
CHUNK_MB = 64  # of memberships at once
Neighbours = tuple[np.ndarray, np.ndarray]  # indices (n, k) int32 and distances (n, k) float32, as exact_neighbours


@dataclass
class ClassResult:
    """What `cluster_class` finds among the n rows of one coarse class."""

    labels: np.ndarray  # (n,) int64 local ids 0..k-1, the largest cluster first (equal sizes: by first row), or NOISE
    membership: np.ndarray  # (n,) float32 in [0, 1], how strongly a row belongs to its cluster
    embedding: np.ndarray  # (n, d) float32, NaN rows where not embedded
    n_noise: int = 0  # rows that HDBSCAN called noise, before cluster.noise is applied
    settings: dict = field(default_factory=dict)  # values used, where they depend on the class
    warnings: list[str] = field(default_factory=list)


@dataclass
class ClassPart:
    """What `label_class` makes of one coarse class: n training rows, in data set order, and its test rows."""

    labels: np.ndarray  # (n,) int64 local ids, the largest first counting every labelled row, or NOISE
    membership: np.ndarray  # (n,) float32 in [0, 1]
    embedding: np.ndarray  # (n, d) float32, NaN rows where not embedded
    test_labels: np.ndarray  # (n_test,) int64 local ids, or NOISE
    entry: dict  # this class in clusters.json, all but n_rows


@dataclass
class Discovery:
    """Fine classes of a data set with N training rows: what a discoverer writes to labels/<source>/."""

    labels: np.ndarray  # (N,) int64 ids contiguous over the data set, ordered by coarse class, then by size; or NOISE
    membership: np.ndarray  # (N,) float32 in [0, 1], 0 where there is no label
    parents: np.ndarray  # (K_F,) int64, the coarse class of each fine class
    embedding: np.ndarray  # (N, d) float32, NaN rows where not embedded
    test_labels: np.ndarray  # (N_test,) int64 ids or NOISE: they group test rows in metrics and are never learned from
    classes: dict[str, dict]  # by coarse name: n_rows n_fit n_clusters sizes n_noise silhouette dbcv settings warnings
    names: list[str]  # (K_F,) '<coarse>/<k>', k from 1, the largest first
    warnings: list[str]  # of all classes, each behind its coarse name


# One coarse class


def cluster_class(
    features: np.ndarray, cluster: ClusterConfig, seed: int, max_points: int, found: Neighbours | None = None
) -> ClassResult:
    """Cluster the rows of one coarse class by `cluster.method`: umap_hdbscan, kmeans or gmm.

    features: (n, D) float32.  `max_points`: rows that each silhouette is computed on at most (kmeans, gmm).
    `found`: what `find_neighbours` found on another device; without it the rows are searched on the CPU.
    Rows that cannot be split (too few, all the same, all noise) become one fine class with a warning, whatever
    `cluster.noise` says; no rows give no class.  Raises UserError where features are not finite.
    """
    x = _prepare(features, cluster.normalize)
    blank = np.full((len(x), cluster.n_components), np.nan, np.float32)
    if len(x) == 0:
        return ClassResult(np.zeros(0, np.int64), np.zeros(0, np.float32), blank, warnings=["no rows to cluster"])
    if len(x) <= cluster.n_components + 2:  # UMAP's spectral start needs more rows than that
        return _one_class(blank, f"{len(x)} rows are too few to embed in {cluster.n_components} dimensions")
    if np.ptp(x, axis=0).max() <= 1e-6 * np.abs(x).max():
        return _one_class(blank, f"all {len(x)} rows have the same features")
    found = found or find_neighbours(x, cluster)
    embedding = _embed(x, cluster, seed, found)
    is_embedded = np.isfinite(embedding).all(axis=1)
    fit = _fit_hdbscan if cluster.method == "umap_hdbscan" else _fit_k
    result = fit(embedding[is_embedded], cluster, seed, max_points)
    if not is_embedded.all():
        result = _with_unembedded(result, x, embedding, cluster)
    if cluster.n_neighbors >= len(x):
        result.warnings.insert(0, f"n_neighbors lowered from {cluster.n_neighbors} to {len(x) - 1}: only {len(x)} rows")
    how = {"n_neighbors": min(cluster.n_neighbors, len(x) - 1), "knn": "exact" if found else "umap"}
    result.settings = how | result.settings
    result.labels = renumber(result.labels)
    return result


def _prepare(features: np.ndarray, normalize: bool) -> np.ndarray:
    x = np.asarray(features, dtype=np.float32)
    n_bad = int((~np.isfinite(x).all(axis=1)).sum())
    if n_bad:
        raise UserError(
            f"features: {n_bad} of {len(x)} rows of a coarse class are not finite; "
            "the network that made them has diverged: train it again with a lower rate, then run extract_features.py"
        )
    if not normalize or len(x) == 0:
        return x
    from sklearn.preprocessing import normalize as to_unit_length

    return to_unit_length(x)  # rows of zeros stay zero


def _one_class(embedding: np.ndarray, reason: str, n_noise: int = 0, settings: dict | None = None) -> ClassResult:
    n = len(embedding)
    note = f"{reason}; kept as one fine class"
    return ClassResult(np.zeros(n, np.int64), np.ones(n, np.float32), embedding, n_noise, settings or {}, [note])


def find_neighbours(x: np.ndarray, cluster: ClusterConfig, device: str = "cpu") -> Neighbours | None:
    """The neighbours of (n, D) prepared rows for UMAP, by `cluster.knn`; None where UMAP is to search by itself.

    auto: exact where the metric is one of EXACT_METRICS, on the CPU up to CPU_EXACT_ROWS rows. So the choice
    depends on the settings, the number of rows and the kind of device, never on time or the number of processes.
    """
    too_many = cluster.knn == "auto" and device == "cpu" and len(x) > CPU_EXACT_ROWS
    if cluster.knn == "umap" or too_many or cluster.metric not in EXACT_METRICS:
        return None
    k = min(cluster.n_neighbors, len(x) - 1)
    return neighbours.exact_neighbours(x, k, cluster.metric, device, cluster.knn_memory_mb)


@functools.cache
def _cache_compiled() -> None:
    """Let numba keep on disk what umap-learn (0.5.12) compiles anew in every process: 6 of its 9 first seconds.

    It keeps most of its functions there itself (cache=True). Where another version has other names, nothing is kept.
    """
    from umap import layouts, umap_

    names = "smooth_knn_dist compute_membership_strengths _nb_optimize_layout_euclidean_single_epoch".split()
    for function in (getattr(module, name, None) for module in (umap_, layouts) for name in names):
        if hasattr(function, "enable_caching"):
            function.enable_caching()


def _embed(x: np.ndarray, cluster: ClusterConfig, seed: int, found: Neighbours | None) -> np.ndarray:
    """UMAP of (n, D) rows: (n, d) float32, the same bits for the same seed; NaN rows where no neighbour is in reach."""
    import umap

    _cache_compiled()
    with warnings.catch_warnings():  # about the fixed seed and about rows out of reach: both are dealt with
        warnings.simplefilter("ignore")
        return umap.UMAP(
            n_neighbors=min(cluster.n_neighbors, len(x) - 1),
            min_dist=cluster.min_dist,
            n_components=cluster.n_components,
            metric=cluster.metric,
            n_epochs=cluster.n_epochs or None,
            random_state=seed,
            n_jobs=1,
            precomputed_knn=found or (None, None, None),
        ).fit_transform(x)


def _with_unembedded(result: ClassResult, x: np.ndarray, embedding: np.ndarray, cluster: ClusterConfig) -> ClassResult:
    # Under cosine and correlation a row opposite to all others is left out of UMAP's graph. It counts as noise.
    is_embedded = np.isfinite(embedding).all(axis=1)
    n_out = int((~is_embedded).sum())
    labels, membership = np.full(len(x), NOISE), np.zeros(len(x), np.float32)
    labels[is_embedded], membership[is_embedded] = result.labels, result.membership
    if cluster.noise != "keep" or cluster.method != "umap_hdbscan":
        labels[~is_embedded], membership[~is_embedded] = nearest_labels(
            x[is_embedded], result.labels, x[~is_embedded], cluster.assign_k
        )
    notes = [*result.warnings, f"UMAP could not embed {n_out} of {len(x)} rows"]
    return ClassResult(labels, membership, embedding, result.n_noise + n_out, result.settings, notes)


def renumber(labels: np.ndarray) -> np.ndarray:
    """The same groups with ids 0..k-1, the largest first, equal sizes by their first row.  (n,) int64; NOISE stays."""
    ids, first, sizes = np.unique(labels[labels >= 0], return_index=True, return_counts=True)
    new_ids = np.full(ids.max(initial=-1) + 2, NOISE)  # the last entry is where NOISE looks
    new_ids[ids[np.lexsort((first, -sizes))]] = np.arange(len(ids))
    return new_ids[labels]


# HDBSCAN and its noise


def _fit_hdbscan(embedding: np.ndarray, cluster: ClusterConfig, seed: int, max_points: int) -> ClassResult:
    """HDBSCAN of (n, d) finite rows; it draws nothing, so `seed` and `max_points` are not used."""
    n = len(embedding)
    size = cluster.min_cluster_size
    size = max(2, round(size * n)) if size < 1 else int(size)
    settings = {"min_cluster_size": size, "min_samples": min(cluster.min_samples or size, n - 1)}
    if n < 2 * size:
        return _one_class(embedding, f"{n} rows are fewer than two clusters of {size}", settings=settings)
    clusterer = _run_hdbscan(embedding, cluster, settings)
    hard, probabilities = clusterer.labels_.astype(np.int64), np.nan_to_num(clusterer.probabilities_)
    n_noise = int((hard == NOISE).sum())
    if n_noise == n:
        return _one_class(embedding, f"HDBSCAN called all {n} rows noise", n_noise, settings)
    n_found = hard.max() + 1
    # With one cluster every row is in it, noise with next to no membership.
    soft = np.zeros(n, np.int64), probabilities.clip(np.finfo(np.float32).tiny)
    if n_found > 1 and cluster.noise == "soft":
        soft = _soft_labels(clusterer)
    labels, membership = settle_noise(hard, probabilities, soft, embedding, cluster.noise, cluster.assign_k)
    notes = ["HDBSCAN found one cluster"] if n_found == 1 else []
    return ClassResult(labels, membership, embedding, n_noise, settings, notes)


def _run_hdbscan(embedding: np.ndarray, cluster: ClusterConfig, settings: dict):
    import hdbscan

    with warnings.catch_warnings(), np.errstate(all="ignore"):  # repeated rows: zero distances, infinite densities
        warnings.simplefilter("ignore")
        return hdbscan.HDBSCAN(
            **settings,
            cluster_selection_method=cluster.cluster_selection_method,
            cluster_selection_epsilon=float(cluster.cluster_selection_epsilon),
            allow_single_cluster=cluster.allow_single_cluster,
            core_dist_n_jobs=1,
        ).fit(embedding.astype(np.float64))


def _soft_labels(clusterer) -> tuple[np.ndarray, np.ndarray]:
    """Each row's label by its largest all-points membership, and that, as `strongest`.  hdbscan fails with one cluster.

    hdbscan orders the columns by tree node, which is another order than its labels' where a cluster splits with no row
    of its own; so they are matched by where the hard-labelled rows put their weight.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        clusterer.generate_prediction_data()
        hard = clusterer.labels_
        columns, membership = np.empty(len(hard), np.int64), np.empty(len(hard))
        n_found = hard.max() + 1
        weight = np.zeros((n_found, n_found))
        for rows, vectors in membership_chunks(clusterer):
            columns[rows], membership[rows] = strongest(vectors)
            is_hard = hard[rows] >= 0
            np.add.at(weight, hard[rows][is_hard], np.nan_to_num(vectors[is_hard]))
    return np.append(labels_of_columns(weight), NOISE)[columns], membership


def membership_chunks(clusterer, memory_mb: float = CHUNK_MB) -> Iterator[tuple[slice, np.ndarray]]:
    """`hdbscan.all_points_membership_vectors` row chunk by row chunk: (rows, memberships (b, k) float64).

    Holds about memory_mb MB (at least one row), where hdbscan holds some six arrays of all n rows and k clusters at
    once. Made of hdbscan's own pieces, from the condensed tree cut down to the rows of the chunk.
    """
    from hdbscan import _prediction_utils as pieces

    data, tree = clusterer.prediction_data_, clusterer.condensed_tree_._raw_tree
    clusters = np.array(sorted(clusterer.condensed_tree_._select_clusters()), dtype=np.intp)
    points = tree[tree["child_size"] == 1]
    points = points[np.argsort(points["child"])]  # row i is point i
    step = max(1, int(memory_mb * 2**20) // (48 * len(clusters)))
    for start in range(0, len(points), step):
        rows = slice(start, min(start + step, len(points)))
        part = points[rows].copy()
        part["child"] -= start
        n = len(part)
        by_tree = clusters, part, data.leaf_max_lambdas, data.cluster_tree
        near = pieces.all_points_dist_membership_vector(data.raw_data[rows], data.exemplars, data.dist_metric)
        scores = pieces.all_points_per_cluster_scores(*by_tree)[:n]  # the rows behind are reserved and never touched
        inside = np.exp(scores - np.nanmax(scores))
        vectors = near * (inside / inside.sum(axis=1, keepdims=True))
        vectors /= vectors.sum(axis=1, keepdims=True)
        yield rows, vectors * pieces.all_points_prob_in_some_cluster(*by_tree)[:n, None]


def strongest(memberships: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and size of the largest entry of each row of (n, k) memberships; NOISE and 0 where they are unusable.

    Unusable are NaN and all-zero memberships, as hdbscan gives to repeated rows (its issue 568).
    """
    is_usable = np.isfinite(memberships).all(axis=1) & (memberships.max(axis=1) > 0)
    columns = np.where(is_usable, memberships.argmax(axis=1), NOISE)
    return columns, np.where(is_usable, memberships.max(axis=1), 0)


def labels_of_columns(weight: np.ndarray) -> np.ndarray:
    """The hard label of each membership column, (k,) int64.  weight: (k, k) membership of hard label i in column j."""
    from scipy.optimize import linear_sum_assignment

    return np.argsort(linear_sum_assignment(weight, maximize=True)[1])


def settle_noise(
    hard: np.ndarray,
    probabilities: np.ndarray,
    soft: tuple[np.ndarray, np.ndarray],
    embedding: np.ndarray,
    noise: str,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Apply `cluster.noise` to HDBSCAN's answer: labels (n,) int64 (a cluster may end empty), membership (n,) float32.

    hard: (n,) labels with NOISE; probabilities: (n,) in [0, 1]; soft: the label (n,) of each row's largest membership
    (NOISE where it has none that is usable) and that membership (n,).
    keep: as found.  nearest: noise rows get a vote of their k nearest clustered rows in the embedding.  soft: EVERY
    row gets the label of its largest membership, also rows that HDBSCAN had put elsewhere; where it has none, the hard
    label, and if that is NOISE the vote.
    """
    labels, membership = hard.copy(), probabilities.astype(np.float32)
    if noise == "soft":
        soft_labels, soft_membership = soft
        is_usable = soft_labels != NOISE
        labels[is_usable], membership[is_usable] = soft_labels[is_usable], soft_membership[is_usable]
    is_noise = labels == NOISE
    if noise != "keep" and is_noise.any():
        labels[is_noise], membership[is_noise] = nearest_labels(embedding, labels, embedding[is_noise], k)
    return labels, membership.clip(0, 1)


def nearest_labels(
    fit_features: np.ndarray, fit_labels: np.ndarray, query_features: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vote of the k nearest labelled rows by Euclidean distance: labels (m,) int64 and share of votes (m,) float32.

    fit_features: (n, D); fit_labels: (n,) int, rows with NOISE have no vote; query_features: (m, D).  Fewer than k
    labelled rows all vote; equal votes go to the label of the nearest.  Without a labelled row: NOISE and 0.
    """
    is_labelled = fit_labels >= 0
    k, m = min(k, int(is_labelled.sum())), len(query_features)
    if k == 0 or m == 0:
        return np.full(m, NOISE), np.zeros(m, np.float32)
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=k).fit(fit_features[is_labelled])
    near = fit_labels[is_labelled][neighbours.kneighbors(query_features, return_distance=False)]  # (m, k)
    votes = np.zeros((m, near.max() + 1), np.int64)
    np.add.at(votes, (np.arange(m)[:, None], near), 1)
    votes_of_near = np.take_along_axis(votes, near, axis=1)
    winner = votes_of_near.argmax(axis=1)[:, None]  # the first of equals is the nearest
    share = np.take_along_axis(votes_of_near, winner, axis=1)[:, 0] / k
    return np.take_along_axis(near, winner, axis=1)[:, 0].astype(np.int64), share.astype(np.float32)


# k-means and Gaussian mixture


def _fit_k(embedding: np.ndarray, cluster: ClusterConfig, seed: int, max_points: int) -> ClassResult:
    """k-means or a mixture with `cluster.n_clusters`, or the number from k_min to k_max with the best silhouette.

    Source of the choice by silhouette: GEORGE (Sohoni et al. 2020, NeurIPS); equal silhouettes go to fewer clusters.
    """
    n_distinct = len(np.unique(embedding, axis=0))
    if cluster.n_clusters:
        counts = [min(cluster.n_clusters, n_distinct)]
    else:
        counts = range(cluster.k_min, min(cluster.k_max, n_distinct - 1) + 1)
    if not counts:
        return _one_class(embedding, f"{n_distinct} different rows are too few for {cluster.k_min} clusters")
    fits = [_partition(embedding, cluster.method, k, seed) for k in counts]
    scores = [silhouette(embedding, labels, max_points, seed) for labels, _ in fits]
    labels, membership = fits[int(np.argmax([-1 if score is None else score for score in scores]))]
    n_found = len(np.unique(labels))
    low = cluster.n_clusters or cluster.k_min
    notes = [f"{n_found} clusters where {low} were asked for: no more could be told apart"] if n_found < low else []
    return ClassResult(labels, membership, embedding, 0, {"n_clusters": n_found}, notes)


def _partition(embedding: np.ndarray, method: str, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) int64 and membership (n,) float32: the mixture's posterior, 1 for k-means."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    points = embedding.astype(np.float64)
    with warnings.catch_warnings():  # fewer clusters than asked for, or no convergence: the caller counts what it got
        warnings.simplefilter("ignore")
        if method == "kmeans":
            labels = KMeans(k, n_init=10, random_state=seed).fit_predict(points)
            return labels.astype(np.int64), np.ones(len(points), np.float32)
        mixture = GaussianMixture(k, covariance_type="full", reg_covar=1e-4, n_init=3, random_state=seed).fit(points)
        posterior = mixture.predict_proba(points)
    return posterior.argmax(axis=1), posterior.max(axis=1).astype(np.float32)


# The whole data set


def discover(
    features: np.ndarray,
    coarse_labels: np.ndarray,
    train_rows: np.ndarray,
    kept: np.ndarray,
    test_features: np.ndarray,
    test_coarse_labels: np.ndarray,
    coarse_names: Sequence[str],
    cluster: ClusterConfig,
    seed: int,
    max_points: int,
    progress: Callable[[str, dict], None] | None = None,
    device: str = "cpu",
) -> Discovery:
    """Fine classes of every coarse class, from its kept training rows.

    features: (N, D) float32, test_features: (N_test, D), both may be memory maps: one class is read at a time.
    coarse_labels: (N,) int64; train_rows: (N,) bool, False on validation rows, which never get a label; kept: (N,)
    bool, False on rows that the uncertainty filter drops: they get a label only with `cluster.assign=nearest`, by a
    vote of the `assign_k` nearest labelled rows of their class in (normalised) feature space.  Test rows get the same
    vote, inside their own true coarse class.  A coarse class with no kept row gets no fine class, and a warning.
    progress: called with the coarse name and the clusters.json entry of each class when it is done.
    device: where neighbours are searched, cpu or a torch device.  Labels are the same to the bit for every n_jobs and
    backend on one kind of machine.
    Raises UserError where features that are read are not finite, and as the functions of utils/parallel.py do.
    """
    usable = train_rows & (kept | (cluster.assign == "nearest"))
    rows_of = [np.flatnonzero(usable & (coarse_labels == c)) for c in range(len(coarse_names))]
    test_rows_of = [np.flatnonzero(test_coarse_labels == c) for c in range(len(coarse_names))]
    on_dask = cluster.joblib_backend == "dask"
    n_jobs = parallel.n_processes(cluster.n_jobs, len(coarse_names))

    def call(c: int) -> tuple:
        """Arguments of `_label_rows`: a process of this machine reads its class from the file, others are sent it."""
        rows, test_rows = rows_of[c], test_rows_of[c]
        is_fit = kept[rows]
        found = None if device == "cpu" else _search_ahead(features[rows[is_fit]], cluster, device)
        parts = [(features, rows), (test_features, test_rows)]
        if on_dask or not isinstance(features, np.memmap):
            parts = [(array[own], slice(None)) for array, own in parts]
        return c, *parts, is_fit, cluster, _class_seed(seed, c), max_points, found

    largest_first = sorted(range(len(coarse_names)), key=lambda c: -len(rows_of[c]))  # the last to end ends early
    calls = (call(c) for c in largest_first)
    if on_dask:
        results = parallel.on_dask(_label_rows, calls, cluster.n_jobs, cluster.dask_scheduler)
    elif n_jobs > 1:
        results = parallel.in_processes(_label_rows, calls, n_jobs)
    else:
        results = (_label_rows(*arguments) for arguments in calls)
    parts = {}
    with contextlib.closing(results):
        for c, part in results:
            part.entry = {"n_rows": int((train_rows & (coarse_labels == c)).sum())} | part.entry
            parts[c] = part
            if progress:
                progress(coarse_names[c], part.entry)
    parts = [parts[c] for c in range(len(coarse_names))]
    return _join(parts, rows_of, test_rows_of, len(coarse_labels), len(test_coarse_labels), coarse_names)


def _search_ahead(features: np.ndarray, cluster: ClusterConfig, device: str) -> Neighbours | None:
    """The neighbours of one class's rows from the one process that holds the device: a context a worker costs more."""
    x = _prepare(features, cluster.normalize)
    return find_neighbours(x, cluster, device) if len(x) > 1 else None


_ONE_CLASS_AT_A_TIME = threading.Lock()  # in a process: numba's threads and the limit below are the process's own


def _label_rows(
    c: int,
    train: tuple[np.ndarray, np.ndarray | slice],
    test: tuple[np.ndarray, np.ndarray | slice],
    *arguments,
) -> tuple[int, ClassPart]:
    """`label_class` of the rows of (array, rows), wherever it runs: class index and what was found.

    In one thread: UMAP with a fixed seed has no use for more, and sums would depend on their number.
    """
    import scipy.linalg  # noqa: F401  the limit holds for libraries that are loaded: numpy's and scipy's BLAS
    import sklearn.neighbors  # noqa: F401  and OpenMP
    from threadpoolctl import threadpool_limits

    with _ONE_CLASS_AT_A_TIME, threadpool_limits(1):
        (features, rows), (test_features, test_rows) = train, test
        is_fit, *settings = arguments
        return c, label_class(features[rows], is_fit, test_features[test_rows], *settings)


def label_class(
    features: np.ndarray,
    is_fit: np.ndarray,
    test_features: np.ndarray,
    cluster: ClusterConfig,
    seed: int,
    max_points: int,
    found: Neighbours | None = None,
) -> ClassPart:
    """Cluster one coarse class and vote for its other rows; a pure function, so classes can run in parallel.

    features: (n, D) float32, the class's training rows; is_fit: (n,) bool, those to cluster; test_features: (m, D);
    found: as in `cluster_class`.
    """
    result = cluster_class(features[is_fit], cluster, seed, max_points, found)
    x = _prepare(features, cluster.normalize)
    labels, membership = np.full(len(x), NOISE), np.zeros(len(x), np.float32)
    labels[is_fit], membership[is_fit] = result.labels, result.membership
    labels[~is_fit], membership[~is_fit] = nearest_labels(x[is_fit], result.labels, x[~is_fit], cluster.assign_k)
    labels = renumber(labels)
    membership[labels == NOISE] = 0
    embedding = np.full((len(x), cluster.n_components), np.nan, np.float32)
    embedding[is_fit] = result.embedding
    test_labels, _ = nearest_labels(x, labels, _prepare(test_features, cluster.normalize), cluster.assign_k)
    sizes = np.bincount(labels[labels >= 0]).tolist()
    entry = {"n_fit": int(is_fit.sum()), "n_clusters": len(sizes), "sizes": sizes, "n_noise": result.n_noise}
    entry |= embedding_scores(embedding, labels, max_points, seed)
    entry |= {"settings": result.settings, "warnings": result.warnings}
    return ClassPart(labels, membership, embedding, test_labels, entry)


def _class_seed(seed: int, coarse: int) -> int:
    return int(np.random.SeedSequence([seed, coarse]).generate_state(1)[0])


def _join(
    parts: list[ClassPart], rows_of: list, test_rows_of: list, n: int, n_test: int, coarse_names: Sequence[str]
) -> Discovery:
    counts = [part.entry["n_clusters"] for part in parts]
    offsets = np.cumsum([0, *counts[:-1]])
    labels, test_labels = np.full(n, NOISE), np.full(n_test, NOISE)
    membership = np.zeros(n, np.float32)
    embedding = np.full((n, parts[0].embedding.shape[1]), np.nan, np.float32)
    for part, rows, test_rows, offset in zip(parts, rows_of, test_rows_of, offsets, strict=True):
        labels[rows] = np.where(part.labels >= 0, part.labels + offset, NOISE)
        test_labels[test_rows] = np.where(part.test_labels >= 0, part.test_labels + offset, NOISE)
        membership[rows], embedding[rows] = part.membership, part.embedding
    parents = np.repeat(np.arange(len(parts)), counts)
    classes = {name: part.entry for name, part in zip(coarse_names, parts, strict=True)}
    notes = [f"{name}: {note}" for name, entry in classes.items() for note in entry["warnings"]]
    names = [f"{coarse_names[c]}/{k + 1}" for c, count in enumerate(counts) for k in range(count)]
    return Discovery(labels, membership, parents, embedding, test_labels, classes, names, notes)


def summary(discovery: Discovery, method: str) -> dict:
    """The content of clusters.json.  'noise_fraction': HDBSCAN's noise over all clustered rows, None without any."""
    n_fit = sum(entry["n_fit"] for entry in discovery.classes.values())
    n_noise = sum(entry["n_noise"] for entry in discovery.classes.values())
    return {
        "method": method,
        "n_fine": len(discovery.parents),
        "n_labelled": int((discovery.labels >= 0).sum()),
        "noise_fraction": n_noise / n_fit if n_fit else None,
        "classes": discovery.classes,
        "names": discovery.names,
        "warnings": discovery.warnings,
    }


# Controls


def random_labels(labels: np.ndarray, coarse_labels: np.ndarray, seed: int) -> np.ndarray:
    """`labels` shuffled inside each coarse class: the same rows are labelled, each id keeps its size.  (N,) int64."""
    shuffled = labels.copy()
    for c in np.unique(coarse_labels):
        rows = np.flatnonzero((coarse_labels == c) & (labels >= 0))
        shuffled[rows] = np.random.default_rng([seed, int(c)]).permutation(labels[rows])
    return shuffled


def oracle_labels(
    fine_labels: np.ndarray, coarse_labels: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True fine labels of `rows` (N,) bool as pseudo labels: labels (N,), parents (K_F,), true id of each z (K_F,).

    All int64; ids are contiguous, by coarse class, then the largest first; rows without a true label (< 0) stay NOISE.
    """
    labels, parents = _contiguous(np.where(rows, fine_labels, NOISE), coarse_labels)
    first_rows = [int(np.argmax(labels == z)) for z in range(len(parents))]
    return labels, parents, fine_labels[first_rows].astype(np.int64)


def _contiguous(groups: np.ndarray, coarse_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Any ids (N,), negative = none, as contiguous labels (N,) by coarse class, then size; and parents (K_F,)."""
    labels, parents = np.full(len(groups), NOISE), []
    for c in np.unique(coarse_labels):
        rows = np.flatnonzero((coarse_labels == c) & (groups >= 0))
        labels[rows] = renumber(groups[rows]) + len(parents)
        parents += [int(c)] * len(np.unique(groups[rows]))
    return labels, np.array(parents, dtype=np.int64)


def discover_random(
    labels: np.ndarray,
    coarse_labels: np.ndarray,
    train_rows: np.ndarray,
    test_coarse_labels: np.ndarray,
    coarse_names: Sequence[str],
    n_components: int,
    seed: int,
) -> Discovery:
    """The control of a discoverer: its `labels` (N,) shuffled inside each coarse class.

    A vote for test rows would mean nothing here: their groups are drawn in the proportions of the class's labelled
    rows.
    """
    shuffled, parents = _contiguous(random_labels(labels, coarse_labels, seed), coarse_labels)
    test_labels = np.full(len(test_coarse_labels), NOISE)
    for c in np.unique(parents):
        ids, sizes = np.unique(shuffled[(coarse_labels == c) & (shuffled >= 0)], return_counts=True)
        rows = np.flatnonzero(test_coarse_labels == c)
        # Another stream than random_labels', which would draw from the same bits.
        test_labels[rows] = np.random.default_rng([seed, int(c), 1]).choice(ids, len(rows), p=sizes / sizes.sum())
    names = [f"{coarse_names[c]}/{z - np.argmax(parents == c) + 1}" for z, c in enumerate(parents)]
    return _control(shuffled, parents, test_labels, names, coarse_labels, train_rows, coarse_names, n_components)


def discover_oracle(
    fine_labels: np.ndarray,
    coarse_labels: np.ndarray,
    rows: np.ndarray,
    train_rows: np.ndarray,
    test_fine_labels: np.ndarray,
    test_coarse_labels: np.ndarray,
    coarse_names: Sequence[str],
    fine_names: Sequence[str] | None,
    n_components: int,
) -> Discovery:
    """The upper bound: the true fine classes of `rows` (N,) bool, and of every test row whose class is among them.

    Names are '<coarse>/<fine name>', or '<coarse>/<true id>' where `fine_names` is None.
    """
    labels, parents, fine_ids = oracle_labels(fine_labels, coarse_labels, rows)
    test_labels = np.full(len(test_coarse_labels), NOISE)
    for z, (c, fine) in enumerate(zip(parents, fine_ids, strict=True)):
        test_labels[(test_coarse_labels == c) & (test_fine_labels == fine)] = z
    words = [fine_names[fine] if fine_names else fine for fine in fine_ids]
    names = [f"{coarse_names[c]}/{word}" for c, word in zip(parents, words, strict=True)]
    return _control(labels, parents, test_labels, names, coarse_labels, train_rows, coarse_names, n_components)


def _control(
    labels, parents, test_labels, names, coarse_labels, train_rows, coarse_names, n_components: int
) -> Discovery:
    classes = {}
    for c, coarse_name in enumerate(coarse_names):
        is_class = coarse_labels == c
        sizes = [int((labels == z).sum()) for z in np.flatnonzero(parents == c)]
        entry = {"n_rows": int((train_rows & is_class).sum()), "n_fit": sum(sizes), "n_clusters": len(sizes)}
        entry |= {"sizes": sizes, "n_noise": 0, "silhouette": None, "dbcv": None}
        entry |= {"settings": {}, "warnings": [] if sizes else ["no rows to label"]}
        classes[coarse_name] = entry
    embedding = np.full((len(labels), n_components), np.nan, np.float32)
    notes = [f"{name}: {note}" for name, entry in classes.items() for note in entry["warnings"]]
    membership = (labels >= 0).astype(np.float32)
    return Discovery(labels, membership, parents, embedding, test_labels, classes, names, notes)
