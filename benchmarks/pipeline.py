"""The six stages as a user runs them, each a process of its own, against the same with speed=plain.

With --quick a side's stages share one process, as most of a stage's seconds would be the import of its libraries.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import seconds_of
from utils import data
from utils.config import UserError, load_config

ROOT = Path(__file__).parents[1]
STAGES = ["train_coarse", "extract_features", "uncertainty_filter", "cluster_fine", "finetune", "multihead"]
LEARNERS = {"train_coarse": "coarse", "finetune": "finetune/*", "multihead": "multihead/*"}  # stage: its folder
LIMIT, QUICK_LIMIT = 4_000, 400  # training rows of Fashion-MNIST, of digits with --quick
ONE_EPOCH = ("coarse.epochs=1", "finetune.fine_epochs=1", "finetune.coarse_epochs=1", "multihead.epochs=1")
SIDES = {"ours": "fast", "peer": "plain"}  # speed=


def choose_data(quick: bool) -> tuple[str, list[str]]:
    """(what it is in words, arguments): Fashion-MNIST; digits where the machine lacks it and in a quick run."""
    config, settings, note = "configs/fashion_mnist_cpu.yaml", [f"data.limit={LIMIT}"], ""
    try:
        data.source_files(load_config(str(ROOT / config), ("data.download=false",)).data)
    except UserError:
        note = ", as Fashion-MNIST is not on this machine"
    if quick or note:
        config, settings = "configs/digits.yaml", []
    if quick:
        settings, note = [f"data.limit={QUICK_LIMIT}", *ONE_EPOCH], ""
    return " ".join([config, *settings]) + note, ["--config", str(ROOT / config), *settings]


RUN = """
import importlib, sys
for stage in sys.argv[1].split(","):
    importlib.import_module(stage).main(sys.argv[2:])
"""


def run_stages(stages: list[str], argv: list[str]) -> None:
    """Stages one after another in one process."""
    command = [sys.executable, "-c", RUN, ",".join(stages), *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"{', '.join(stages)} {' '.join(argv)} failed: {done.stderr.strip().splitlines()[-1]}")


def test_accuracies(output_dir: Path) -> dict[str, float]:
    found = {stage: next(output_dir.glob(f"*/seed0/{folder}/metrics.json")) for stage, folder in LEARNERS.items()}
    return {stage: json.loads(path.read_text())["test"]["accuracy"] for stage, path in found.items()}


def pipeline(quick: bool) -> dict:
    """Seconds of all six stages.  The sides run in turns, stage by stage, on all cores (threads=0)."""
    what, argv = choose_data(quick)
    groups = {"all": STAGES} if quick else {stage: [stage] for stage in STAGES}
    seconds = {name: {} for name in groups}
    with tempfile.TemporaryDirectory() as folder:
        for name, stages in groups.items():
            for side, speed in SIDES.items():
                how = [*argv, f"speed={speed}", f"output_dir={folder}/{side}", "threads=0"]
                seconds[name][side] = seconds_of(lambda stages=stages, how=how: run_stages(stages, how))
        accuracies = {side: test_accuracies(Path(folder, side)) for side in SIDES}
    total = {side: sum(of_stage[side] for of_stage in seconds.values()) for side in SIDES}
    ratio = total["peer"] / total["ours"]
    return {
        "ratio": ratio,
        **total,
        "unit": "s",
        "ratios": [ratio],
        "stage_seconds": seconds,
        "ours_accuracy": accuracies["ours"],
        "peer_accuracy": accuracies["peer"],
        "data": what,
    }
