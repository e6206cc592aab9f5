"""The whole pipeline on planted classes, and what every stage leaves on disk."""

import json

import numpy as np


def test_pipeline_finds_the_planted_classes(finished_run):
    quality = json.loads((finished_run / "planted/seed0/labels/umap_hdbscan/metrics.json").read_text())
    assert quality["kept"]["ari"] > 0.9
    for learner in ("coarse", "finetune/umap_hdbscan", "multihead/umap_hdbscan-alpha0.5"):
        metrics = json.loads((finished_run / "planted/seed0" / learner / "metrics.json").read_text())
        assert metrics["test"]["accuracy"] > 0.9, learner
    labels = np.load(finished_run / "planted/seed0/labels/umap_hdbscan/labels.npy")
    assert labels.shape == (360,)
