"""benchmarks/cluster.py at a size at which it says nothing: the figures have their keys."""

from pathlib import Path

import numpy as np

from benchmarks import cluster


def run_here(side, seeds, folder):
    """The labels of both sides are ours."""
    cluster.main("ours", seeds, folder)
    for path in Path(folder).glob("ours-*.npy"):
        path.with_name(path.name.replace("ours", side)).write_bytes(path.read_bytes())
    return {"seconds": 1.0, "peak_mb": 1.0}


def test_cluster_has_its_keys(monkeypatch):
    monkeypatch.setattr(cluster, "QUICK", (2, 250))
    monkeypatch.setattr(cluster, "run_alone", run_here)  # umap-learn compiles for long in a fresh process
    figure = cluster.cluster(quick=True)
    keys = "ratio ours peer unit ratios ari_to_peer ari_peer_seeds ari_truth ari_truth_peer n_classes n_rows".split()
    assert list(figure) == keys and figure["ratios"] == [figure["ratio"]] and figure["ratio"] > 0
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
