"""Peak memory of the stages that read every image, for a data set and for one ten times as large."""

import contextlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.config import load_config

ROOT = Path(__file__).parents[1]
N_ROWS = {True: (1_000, 10_000), False: (10_000, 100_000)}  # training images; True = --quick
SIDE = 72  # pixels: above 64 the stem divides the side by 4, so that large images cost little time
WIDTH = 2
POLL_S = 0.005
# A network with random weights contradicts half of the labels: without suspects, as there are few with a trained one.
SETTINGS = (
    "name=memory", "threads=1", f"model.width={WIDTH}", "features.batch_size=128", "filter.batch_size=128",
    "filter.n_views=2", "filter.suspect_min_prob=1",
)  # fmt: skip


def write_images(root: Path, n_train: int) -> None:
    """An `arrays` data set of `n_train` black images: a sparse file, as memory does not depend on what they show."""
    root.mkdir(parents=True)
    for part, n in (("train", n_train), ("test", 100)):
        np.lib.format.open_memmap(root / f"{part}_images.npy", "w+", np.uint8, (n, SIDE, SIDE, 3))
        np.save(root / f"{part}_coarse_labels.npy", np.arange(n) % 2)


def write_untrained(overrides: tuple[str, ...]) -> None:
    """The stage `coarse` as train_coarse.py leaves it, with random weights."""
    import torch

    from utils import models
    from utils.data import load_dataset
    from utils.stages import open_stage

    cfg = load_config("", overrides)
    split = load_dataset(cfg.data).train
    torch.manual_seed(0)
    normalise = models.Normalise(np.full(3, 0.5), np.ones(3))
    with contextlib.redirect_stdout(sys.stderr), open_stage(cfg, "coarse") as stage:
        stage.save_torch("model.pt", models.Network(models.make_backbone(cfg.model, split, normalise), 2).state_dict())
        stage.finish("")


def peak_memory(argv: list[str]) -> float:
    """Peak anonymous memory in MB (10^6 bytes) of a Python process started with `argv`.

    Anonymous memory (RssAnon of /proc/<pid>/status, read every 5 ms) is what the program itself holds. The peak of the
    resident set would count the pages of memory-mapped images too, which the system may drop at any time.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=said, stderr=said)
        status, peak = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
            peak = max([peak, *(int(line.split()[1]) for line in lines)])
            time.sleep(POLL_S)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(argv)} failed: {said.read().strip().splitlines()[-1]}")
    return peak * 1024 / 1e6


def extract_memory(quick: bool) -> dict:
    """Peak of extract_features.py on ten times the images over its peak; the same of uncertainty_filter.py."""
    sizes = N_ROWS[quick]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        settings = {}
        for n in sizes:
            root, runs = Path(folder, f"data{n}"), Path(folder, f"runs{n}")
            settings[n] = (f"data={{name: arrays, root: {root}}}", f"output_dir={runs}", *SETTINGS)
            write_images(root, n)
            write_untrained(settings[n])

        def peaks(script: str, placement: str) -> list:
            """Of both sizes, in MB; two processes at a time, as nothing is timed."""
            how = (f"loader.placement={placement}", "--force")
            return [pool.submit(peak_memory, [str(ROOT / script), *settings[n], *how]) for n in sizes]

        jobs = {"extract": peaks("extract_features.py", "host"), "filter": peaks("uncertainty_filter.py", "host")}
        if not quick:
            jobs["baseline"] = [pool.submit(peak_memory, ["-c", "import torchvision.models.resnet, utils.training"])]
        peak = {name: [job.result() for job in submitted] for name, submitted in jobs.items()}
        if not quick:  # now that the folders of extract are free
            peak["default"] = [job.result() for job in peaks("extract_features.py", "auto")]
    ratio = {name: pair[-1] / pair[0] for name, pair in peak.items()}
    return {
        "ratio": ratio["extract"],
        "ours": peak["extract"][1],
        "peer": peak["extract"][0],
        "unit": "MB",
        "ratios": [ratio["extract"]],
        "filter_ratio": ratio["filter"],
        "default_ratio": ratio.get("default"),
        "peaks_mb": peak,
        "rows": list(sizes),
        "image_bytes": SIDE * SIDE * 3,
        "measure": "peak anonymous memory",
    }
