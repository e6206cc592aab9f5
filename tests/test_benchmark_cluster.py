"""benchmarks/cluster.py at a size at which it says nothing: the figures have their keys."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import cluster


def run_here(side, seed, folder):
    """The labels of both sides are ours."""
    cluster.main("ours", seed, folder)
    path = Path(folder) / f"ours-{seed}.npy"
    path.with_name(f"{side}-{seed}.npy").write_bytes(path.read_bytes())
    return {"seconds": {"ours": 2.0, "peer": 5.0}[side], "peak_mb": 1.0}


@pytest.mark.parametrize("quick", [True, False])
def test_cluster_has_its_keys(monkeypatch, quick):
    monkeypatch.setattr(cluster, "QUICK" if quick else "FULL", (2, 250))
    monkeypatch.setattr(cluster, "run_alone", run_here)  # umap-learn compiles for long in a fresh process
    figure = cluster.cluster(quick)
    keys = "ratio ours peer unit ratios ari_to_peer ari_peer_seeds ari_truth ari_truth_peer n_classes n_rows".split()
    assert list(figure) == keys and figure["ratios"] == [2.5] * (1 if quick else 2) and figure["ratio"] == 2.5
    assert (figure["ari_peer_seeds"] is None) == quick
    assert (figure["n_classes"], figure["n_rows"], figure["unit"]) == (2, 250, "rows/s")


def test_cluster_scale_has_its_keys(monkeypatch):
    monkeypatch.setattr(cluster, "SCALE_QUICK", [100, 250])
    figure = cluster.cluster_scale(quick=True)
    assert list(figure) == "ratio unit slope_seconds slope_memory rows seconds peak_mb".split()
    assert figure["rows"] == [100, 250] and len(figure["seconds"]) == len(figure["peak_mb"]) == 2
    assert figure["ratio"] == figure["slope_seconds"] and min(figure["peak_mb"]) > 50


def test_the_peer_labels_every_row_with_ids_of_its_class(tmp_path):
    cluster.write_features(tmp_path, 2, 210)
    features, coarse = np.load(tmp_path / "features.npy"), np.load(tmp_path / "coarse.npy")
    labels = cluster.peer_labels(features, coarse, 0)
    assert labels.shape == (420,) and labels.min() == 0 and not set(labels[:210]) & set(labels[210:])
