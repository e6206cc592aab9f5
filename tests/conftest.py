"""Shared fixtures: a tiny data set with planted fine classes, and one finished run of all stages on it."""

import os
import shutil
import signal
from pathlib import Path

# Small networks gain nothing from a second thread, and threads that wait for each other crawl on a busy machine.
for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# A shell starts background jobs with SIGINT ignored, which children inherit: the tests that interrupt stages need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
STAGE_SCRIPTS = ["train_coarse", "extract_features", "uncertainty_filter", "cluster_fine", "finetune", "multihead"]
SETTINGS = """
data: {{name: arrays, root: {root}}}
precision: fp32
device: cpu
threads: 1
model: {{width: 4}}
augment: crop_flip
crop_flip: {{crop_padding: 1, hflip_p: 0}}
train: {{batch_size: 64}}
coarse: {{epochs: 6, lr: 0.1}}
filter: {{n_views: 3, views: {{crop_padding: 1, hflip_p: 0, vflip_p: 0}}}}
cluster: {{n_neighbors: 10, min_cluster_size: 0.15, min_samples: 5, n_epochs: 100, n_jobs: 1}}
finetune: {{fine_epochs: 3, coarse_epochs: 3}}
multihead: {{epochs: 3, alpha: 0.5}}
"""


def planted_images(n_per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two coarse classes (bright bar above or below the middle) of three fine ones (where along it a square sits).

    Returns images (n, 12, 12) uint8, coarse (n,) and fine (n,) int64 labels, in shuffled order.
    """
    rng = np.random.default_rng(seed)
    fine = np.repeat(np.arange(6), n_per_class)
    images = rng.integers(0, 60, (len(fine), 12, 12))
    for image, label in zip(images, fine, strict=True):
        coarse, place = divmod(int(label), 3)
        row = 2 if coarse == 0 else 8
        image[row : row + 2, :] += 120
        image[4:8, 1 + 4 * place : 3 + 4 * place] += 170
    order = rng.permutation(len(fine))
    return (
        images[order].clip(0, 255).astype(np.uint8),
        (fine // 3)[order].astype(np.int64),
        fine[order].astype(np.int64),
    )


def write_planted(root: Path, n_train: int = 60, n_test: int = 20) -> Path:
    """The planted set as data.name=arrays reads it: 6 * n_train training and 6 * n_test test images."""
    root.mkdir(parents=True, exist_ok=True)
    for split, n, seed in (("train", n_train, 0), ("test", n_test, 1)):
        for part, array in zip(("images", "coarse_labels", "fine_labels"), planted_images(n, seed), strict=True):
            np.save(root / f"{split}_{part}.npy", array)
    return root


def run_stage(script: str, *argv: str) -> None:
    """Run a stage script's main in this process."""
    import importlib

    importlib.import_module(script).main([str(a) for a in argv])


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="session")
def config_file(planted, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "planted.yaml"
    path.write_text(SETTINGS.format(root=planted))
    return path


@pytest.fixture(scope="session")
def finished_run(config_file, tmp_path_factory) -> Path:
    """output_dir of a run with all six stages done; tests must not change it (see `run_copy`)."""
    output_dir = tmp_path_factory.mktemp("runs")
    for script in STAGE_SCRIPTS:
        run_stage(script, "--config", config_file, f"output_dir={output_dir}")
    return output_dir


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    """A private copy of the finished run: <output_dir>/planted/seed0/..."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs"))
