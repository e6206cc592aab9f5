"""reproduce.py: every stage of every seed once, an interruption it goes on after, and only what changed redone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STAGE_SCRIPTS, run_stage, write_planted
from shell import contents, error_of, history, read_json

import reproduce
from utils.config import load_config

SOURCES = ["umap_hdbscan", "random", "oracle"]
LABELS = [f"labels/{source}" for source in SOURCES]
LEARNERS = [
    "coarse", "coarse_matched", *(f"finetune/{s}" for s in SOURCES), *(f"multihead/{s}-alpha0.5" for s in SOURCES)
]  # fmt: skip
FOLDERS = {"features/coarse", "uncertainty", *LABELS, *LEARNERS}
BATCH = 64


def results(output_dir: Path) -> dict[str, bytes]:
    """What the stages wrote: all files but the report, whose figures may carry other bytes, and the logs."""
    files = contents(output_dir / "planted")
    return {name: content for name, content in files.items() if name.startswith("seed")}


def lines_of(text: str) -> list[str]:
    """The line of each job: '[ 3/20] seed 0  features/coarse   done before'."""
    return [line for line in text.splitlines() if re.match(r"\[ *\d+/\d+\] seed ", line)]


@pytest.fixture(scope="module")
def started(finished_run, config_file, tmp_path_factory) -> tuple[list[str], Path]:
    """(arguments, output_dir): seed 0 with its six stages done, seed 1 up to its labels: UMAP compiles for long."""
    output_dir = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("reproduce") / "runs"))
    for script in STAGE_SCRIPTS[:4]:
        run_stage(script, "--config", config_file, f"output_dir={output_dir}", "seed=1")
    argv = ["--config", str(config_file), f"output_dir={output_dir}", "seeds=[0,1]", "reproduce.alphas=[0.5]"]
    return argv, output_dir


@pytest.fixture(scope="module")
def reproduced(started) -> tuple[list[str], Path, str, str]:
    """(arguments, output_dir, stderr of a run interrupted in the middle, stderr of the run that went on)."""
    argv, output_dir = started
    command = [sys.executable, ROOT / "reproduce.py", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    matched, deadline = output_dir / "planted/seed0/coarse_matched/history.jsonl", time.monotonic() + 120
    while not matched.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to the stage's process too
    first = process.communicate()[1]
    assert process.returncode == 130
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "# planted: coarse2fine results" in done.stdout
    return argv, output_dir, first, done.stderr


def test_an_interruption_is_one_line_and_the_rest_is_run_later(reproduced):
    _, output_dir, first, second = reproduced
    assert first.splitlines()[-1] == (
        "interrupted: the stage in hand has saved what it had; run the same command to go on"
    )
    assert "Traceback" not in first
    log = output_dir / "planted/logs/seed0-coarse_matched.log"
    assert "coarse: going on at step" in log.read_text()
    jobs = lines_of(second)
    assert len(jobs) == 2 * len(FOLDERS) and jobs[0].startswith("[ 1/26] seed 0  coarse  ")
    done_before = [line.split()[-3] for line in jobs if line.endswith("done before")]
    assert done_before[:4] == ["coarse", "features/coarse", "uncertainty", "labels/umap_hdbscan"]
    assert "finetune/umap_hdbscan" in done_before and "coarse_matched" not in done_before
    assert all("min left" in line for line in jobs if not line.endswith("done before"))


def test_every_stage_of_every_seed_is_there_and_the_report(reproduced):
    _, output_dir, _, _ = reproduced
    for seed in (0, 1):
        run = output_dir / f"planted/seed{seed}"
        assert {str(path.parent.relative_to(run)) for path in run.rglob("manifest.json")} == FOLDERS
        for folder in LEARNERS:
            metrics = read_json(run / folder / "metrics.json")
            assert metrics["seed"] == seed and metrics["test"]["accuracy"] > 0.8, folder
    report = output_dir / "planted/report"
    assert {"table.md", "table.tex", "table.csv", "runs.csv", "summary.json"} <= {p.name for p in report.iterdir()}
    assert read_json(report / "summary.json")["learners"].keys() == set(LEARNERS)
    assert list((report / "figures").rglob("*.png"))


def test_the_baseline_saw_as_many_images_as_fn(reproduced):
    _, output_dir, _, _ = reproduced
    for seed in (0, 1):
        run = output_dir / f"planted/seed{seed}"
        seen = {
            f: read_json(run / f / "metrics.json")["images_seen"] for f in ("coarse_matched", "finetune/umap_hdbscan")
        }
        assert abs(seen["coarse_matched"] - seen["finetune/umap_hdbscan"]) <= BATCH
        assert seen["coarse_matched"] == history(run / "coarse_matched")[-1]["images_seen"]


def test_the_random_control_has_the_discoverers_rows_and_group_sizes(reproduced):
    _, output_dir, _, _ = reproduced
    for seed in (0, 1):
        found, random = (
            np.load(output_dir / f"planted/seed{seed}/labels/{source}/labels.npy") for source in SOURCES[:2]
        )
        assert ((found >= 0) == (random >= 0)).all() and (found != random).mean() > 0.3
        assert np.bincount(found[found >= 0]).tolist() == np.bincount(random[random >= 0]).tolist()


def test_a_second_call_finds_everything_done_and_changes_nothing(reproduced, capfd):
    argv, output_dir, _, _ = reproduced
    before = results(output_dir)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(argv)
    said = capfd.readouterr()
    assert stop.value.code == 0 and "# planted: coarse2fine results" in said.out
    assert [line.endswith("done before") for line in lines_of(said.err)] == [True] * 2 * len(FOLDERS)
    assert results(output_dir) == before


@pytest.fixture
def no_report(monkeypatch):
    """report.py has tests of its own, and matplotlib costs seconds."""
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))


def test_a_changed_setting_stops_with_its_name_and_force_redoes_what_it_changes(reproduced, tmp_path, capfd, no_report):
    argv, output_dir, _, _ = reproduced
    copy = Path(shutil.copytree(output_dir, tmp_path / "runs"))
    argv = [*argv[:2], f"output_dir={copy}", "seeds=[1]", "reproduce.alphas=[0.5]", "multihead.epochs=1"]
    before = results(copy)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(argv)
    said = capfd.readouterr().err.splitlines()
    folder = copy / "planted/seed1/multihead/umap_hdbscan-alpha0.5"
    assert stop.value.code == 2 and said[-1] == (
        f"error: {folder} is already there with other settings (multihead.epochs was 3, now 1); --force redoes it"
    )
    assert re.match(r"multihead.py .*multihead.labels=umap_hdbscan multihead.alpha=0.5 failed; the end of ", said[-2])
    assert results(copy) == before
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*argv, "--force"])
    assert stop.value.code == 0
    redone = [line for line in lines_of(capfd.readouterr().err) if not line.endswith("done before")]
    assert [line.split()[3] for line in redone] == [f"multihead/{source}-alpha0.5" for source in SOURCES]
    changed = {name for name, content in results(copy).items() if before[name] != content}
    assert changed and all(name.startswith("seed1/multihead/") for name in changed)
    assert len(history(folder)) == 1


def test_a_failing_stage_shows_its_error_and_passes_its_exit_code_on(tmp_path, config_file, capfd, no_report):
    argv = ["--config", str(config_file), f"output_dir={tmp_path}", "reproduce.labels=[umap_hdbscan]"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*argv, "coarse.lr=1e30"])
    said = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: coarse: the loss is ")
    log = tmp_path / "planted/logs/seed0-coarse.log"
    command = f"train_coarse.py {' '.join(argv)} coarse.lr=1e30 seed=0"
    assert f"{command} failed; the end of {log}:" in said
    assert not list(tmp_path.rglob("manifest.json"))


def die(script: str, argv: list[str], log: Path, n_processes: int) -> None:
    """A stage that the system kills, as when memory runs out."""
    log.write_text("so far so good\n")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_stage_says_so_and_exits_1(tmp_path, config_file, capfd, no_report, monkeypatch):
    monkeypatch.setattr(reproduce, "run_script", die)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--config", str(config_file), f"output_dir={tmp_path}", "reproduce.labels=[umap_hdbscan]"])
    said = capfd.readouterr().err.splitlines()
    assert stop.value.code == 1 and " was killed by signal 9; the end of " in said[-2] and said[-1] == "so far so good"


# Which stages a run is made of


def jobs(config_file, *overrides: str) -> list[tuple[str, str]]:
    """(script, what its own settings are) of seed 3."""
    cfg = load_config(str(config_file), overrides)
    return [
        (job.stage, " ".join(job.overrides[1:]))
        for job in reproduce.jobs_of_seed(cfg, 3, reproduce.usable_sources(cfg))
        if job.overrides[0] == "seed=3"
    ]


def test_the_stages_of_a_seed_in_an_order_in_which_inputs_come_first(config_file):
    assert jobs(config_file, "reproduce.labels=[random,oracle,gmm]", "reproduce.alphas=[0.1,0.9]") == [
        ("coarse", ""),
        ("features", ""),
        ("uncertainty", ""),
        ("labels", "cluster.method=oracle cluster.source=oracle"),
        ("labels", "cluster.method=gmm cluster.source=gmm"),
        ("labels", "cluster.method=random cluster.source=random cluster.random_of=gmm"),
        ("finetune", "finetune.labels=gmm"),
        ("coarse", "coarse.match=finetune/gmm"),
        ("finetune", "finetune.labels=random"),
        ("finetune", "finetune.labels=oracle"),
        *(
            ("multihead", f"multihead.labels={source} multihead.alpha={alpha}")
            for source in ("random", "oracle", "gmm")
            for alpha in (0.1, 0.9)
        ),
    ]


def test_settings_of_the_command_line_reach_every_stage_but_seed_and_seeds(config_file):
    cfg = load_config(str(config_file), ("seeds=[3]", "train.batch_size=16", "seed=5"))
    for job in reproduce.jobs_of_seed(cfg, 3, ["umap_hdbscan"]):
        made = job.config(cfg)
        assert (made.seed, made.train.batch_size, made.config_path) == (3, 16, str(config_file))


def test_the_oracle_is_left_out_where_no_truth_is_known(config_file, tmp_path, capsys):
    root = write_planted(tmp_path / "data", n_train=5, n_test=2)
    for split in ("train", "test"):
        (root / f"{split}_fine_labels.npy").unlink()
    made = jobs(config_file, f"data.root={root}", f"output_dir={tmp_path}")
    assert "arrays has no true fine labels: the oracle control is left out" in capsys.readouterr().err
    assert made and not any("oracle" in settings for _, settings in made)
    argv = ["--config", config_file, f"data.root={root}", f"output_dir={tmp_path}"]
    for script in ("train_coarse", "uncertainty_filter"):
        run_stage(script, *argv, "coarse.epochs=1")
    said = error_of(capsys, "cluster_fine", *argv, "cluster.method=oracle")
    assert said == "cluster.method: the oracle needs true fine labels, and arrays has none"


def test_labels_that_nobody_can_make_are_named(config_file, started, tmp_path, capsys):
    argv = ["--config", config_file, f"output_dir={tmp_path}", "seeds=[0,4]"]
    assert error_of(capsys, "reproduce", *argv, "reproduce.labels=[falcon]") == (
        "reproduce.labels: falcon is no cluster.method and seeds [0, 4] have no labels/falcon yet"
    )
    assert error_of(capsys, "reproduce", *argv, "reproduce.labels=[random,oracle]") == (
        "reproduce.labels: random shuffles what a discoverer found; name one beside it (umap_hdbscan)"
    )
    runs = Path(shutil.copytree(started[1], tmp_path / "with"))
    shutil.copytree(runs / "planted/seed0/labels/umap_hdbscan", runs / "planted/seed0/labels/falcon")
    made = jobs(config_file, f"output_dir={runs}", "reproduce.labels=[falcon,random]")
    assert ("labels", "cluster.method=random cluster.source=random cluster.random_of=falcon") in made
    assert not any("cluster.source=falcon" in settings for _, settings in made)
