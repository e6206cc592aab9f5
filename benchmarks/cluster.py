"""Clustering against the same steps as people write them, and how its time and memory grow with a class's rows.

usage   python -c "from benchmarks.cluster import cluster; print(cluster(quick=True))"

Each side and each size runs in a fresh process, so that imports and compilation count.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FULL, QUICK = (20, 2500), (4, 800)  # coarse classes and rows of each; the full size is CIFAR-100's
SCALE, SCALE_QUICK = [2500, 10_000, 40_000, 100_000], [1000, 4000]  # rows of one class
N_FINE, N_LATENT, N_FEATURES = 5, 16, 512


def cluster(quick: bool) -> dict:
    """Rows a second through clustering: ours (`discover`, defaults) against umap-learn and hdbscan class after class.

    Full size: two pairs, the peer's with seeds 0 and 1.  'ari_to_peer': agreement of our labels with the peer's, the
    mean over its seeds; 'ari_peer_seeds': of the peer's two with each other (None with --quick, which runs one), what
    can be asked for at most.  Each is one draw: it is the size of their difference that tells.  'ari_truth' and
    'ari_truth_peer': agreement with the planted fine classes.
    """
    (n_classes, n_rows), seeds = (QUICK, "0") if quick else (FULL, "01")
    seconds, labels = {"ours": [], "peer": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        fine = write_features(Path(folder), n_classes, n_rows)
        for seed in seeds:
            for side, side_seed in (("ours", "0"), ("peer", seed)):
                seconds[side].append(run_alone(side, side_seed, folder)["seconds"])
                labels[side + side_seed] = np.load(Path(folder) / f"{side}-{side_seed}.npy")
    peers = [labels["peer" + seed] for seed in seeds]
    ours, peer = (n_classes * n_rows / statistics.median(seconds[side]) for side in ("ours", "peer"))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)]
    return {
        "ratio": statistics.median(ratios), "ours": ours, "peer": peer, "unit": "rows/s", "ratios": ratios,
        "ari_to_peer": statistics.mean(agreement(labels["ours0"], other) for other in peers),
        "ari_peer_seeds": None if quick else agreement(*peers),
        "ari_truth": agreement(fine, labels["ours0"]), "ari_truth_peer": agreement(fine, peers[0]),
        "n_classes": n_classes, "n_rows": n_rows,
    }  # fmt: skip


def cluster_scale(quick: bool) -> dict:
    """Seconds and peak memory of `discover` on one class by its rows, and the slopes of both on log-log axes."""
    seconds, peak_mb = [], []
    sizes = SCALE_QUICK if quick else SCALE
    for n_rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_features(Path(folder), 1, n_rows)
            run = run_alone("ours", "0", folder)
        seconds.append(run["seconds"])
        peak_mb.append(run["peak_mb"])
    slope_seconds, slope_memory = (float(np.polyfit(np.log(sizes), np.log(y), 1)[0]) for y in (seconds, peak_mb))
    return {
        "ratio": slope_seconds, "unit": "log s / log rows", "slope_seconds": slope_seconds,
        "slope_memory": slope_memory, "rows": list(sizes), "seconds": seconds, "peak_mb": peak_mb,
    }  # fmt: skip


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(a, b))


def write_features(folder: Path, n_classes: int, n_rows: int, seed: int = 0) -> np.ndarray:
    """features.npy (n_classes * n_rows, N_FEATURES) float32 and coarse.npy; returns the planted fine labels, int64.

    Each class has N_FINE overlapping normal clusters in a random N_LATENT-dimensional plane, noise in all dimensions,
    and a rectifier on top, as behind a network's last convolution.
    """
    rng = np.random.default_rng(seed)
    fine = np.empty((n_classes, n_rows), np.int64)
    shape = (n_classes * n_rows, N_FEATURES)
    features = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float32, shape=shape)
    for c in range(n_classes):
        fine[c] = rng.integers(0, N_FINE, n_rows)
        latent = rng.normal(size=(N_FINE, N_LATENT))[fine[c]] + rng.normal(size=(n_rows, N_LATENT))
        plane = rng.normal(size=(N_LATENT, N_FEATURES))
        noise = rng.normal(size=(n_rows, N_FEATURES)).astype(np.float32)
        x = 12 * rng.normal(size=N_FEATURES) + latent @ plane + 1.2 * noise
        features[c * n_rows : (c + 1) * n_rows] = x.clip(0)
    features.flush()
    np.save(folder / "coarse.npy", np.repeat(np.arange(n_classes), n_rows))
    return (fine + N_FINE * np.arange(n_classes)[:, None]).ravel()


def run_alone(side: str, seed: str, folder: str) -> dict:
    """A fresh process that labels the data and saves <side>-<seed>.npy.

    'seconds' from its start to the labels, 'peak_mb' of it without its workers (one class has none).
    """
    started = time.time()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cluster", side, seed, folder]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout)
    return {"seconds": told["done"] - started, "peak_mb": told["peak_mb"]}


def peak_mb() -> float:
    """Largest resident set of this process, in MB (2^20 bytes), from its start; getrusage would count its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main(side: str, seed: str, folder: str) -> None:
    features = np.load(Path(folder) / "features.npy", mmap_mode="r")
    coarse = np.load(Path(folder) / "coarse.npy")
    labels = {"ours": our_labels, "peer": peer_labels}[side](features, coarse, int(seed))
    np.save(Path(folder) / f"{side}-{seed}.npy", labels)
    print(json.dumps({"done": time.time(), "peak_mb": peak_mb()}))


def our_labels(features: np.ndarray, coarse: np.ndarray, seed: int) -> np.ndarray:
    from utils.clustering import discover
    from utils.config import ClusterConfig, MetricsConfig

    every, names = np.ones(len(coarse), bool), [str(c) for c in range(coarse.max() + 1)]
    tests = features[:0], coarse[:0]
    return discover(
        features, coarse, every, every, *tests, names, ClusterConfig(), seed, MetricsConfig().max_points
    ).labels


def peer_labels(features: np.ndarray, coarse: np.ndarray, seed: int) -> np.ndarray:
    import hdbscan
    import umap
    from sklearn.preprocessing import normalize

    labels, n_found = np.full(len(coarse), -1), 0
    for c in range(coarse.max() + 1):
        rows = coarse == c
        reducer = umap.UMAP(n_neighbors=30, min_dist=0.0, n_components=4, random_state=seed)
        clusterer = hdbscan.HDBSCAN(min_cluster_size=100, prediction_data=True)
        clusterer.fit(reducer.fit_transform(normalize(features[rows])))
        memberships = hdbscan.all_points_membership_vectors(clusterer)
        labels[rows] = n_found + (memberships.argmax(axis=1) if memberships.ndim > 1 else 0)
        n_found = labels.max() + 1
    return labels


if __name__ == "__main__":
    main(*sys.argv[1:])
