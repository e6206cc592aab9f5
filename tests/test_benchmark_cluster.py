"""benchmarks/cluster.py at a size at which it says nothing: the figures have their keys."""

from benchmarks import cluster


def test_cluster_has_its_keys(monkeypatch):
    monkeypatch.setattr(cluster, "QUICK", (2, 250))
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
