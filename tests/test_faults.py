"""Interrupted, killed, diverged, fed odd data: a right result, or one line and exit 2, and nothing written is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STAGE_SCRIPTS, planted_images, run_stage, write_planted
from shell import contents, error_of, forge, history, read_json

import reproduce
from utils import artifacts, loader, training

SETTINGS = """
data: {{name: arrays, root: {root}}}
precision: fp32
device: cpu
model: {{width: 4}}
crop_flip: {{crop_padding: 1, hflip_p: 0}}
train: {{batch_size: 32}}
coarse: {{epochs: 6}}
filter: {{n_views: 2, views: {{crop_padding: 1, hflip_p: 0, vflip_p: 0}}}}
cluster: {{n_neighbors: 10, min_cluster_size: 0.15, min_samples: 5, n_epochs: 50}}
finetune: {{labels: oracle, fine_epochs: 4, coarse_epochs: 4}}
multihead: {{labels: oracle, epochs: 6, alpha: 0.5}}
"""
TRAINING = {"train_coarse": "coarse", "finetune": "finetune/oracle", "multihead": "multihead/oracle-alpha0.5"}
STEPS = 3  # an epoch, of 108 training rows (96 to 97 of them with a label)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """(config file, output_dir) of a small set with all three training stages undisturbed, on the oracle's labels."""
    root = tmp_path_factory.mktemp("faults")
    config = root / "small.yaml"
    config.write_text(SETTINGS.format(root=write_planted(root / "data", n_train=20, n_test=5)))
    argv = ["--config", config, f"output_dir={root / 'runs'}"]
    for script in ("train_coarse", "uncertainty_filter"):
        run_stage(script, *argv)
    run_stage("cluster_fine", *argv, "cluster.method=oracle")
    for script in ("finetune", "multihead"):
        run_stage(script, *argv)
    return config, root / "runs"


@pytest.fixture
def disturbed(small, tmp_path):
    """(argv, run folder): a copy of the undisturbed run in which a script's own folder is taken out by the test."""
    config, runs = small
    shutil.copytree(runs, tmp_path / "runs")
    return ["--config", str(config), f"output_dir={tmp_path / 'runs'}"], tmp_path / "runs/small/seed0"


def assert_same_result(folder: Path, reference: Path) -> None:
    """The same files with the same bits, but for the seconds in history and manifest."""
    assert history(folder) == history(reference)
    mine, theirs = contents(folder), contents(reference)
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"history.jsonl", "manifest.json"}:
        assert mine[name] == theirs[name], name
    outputs = [read_json(f / "manifest.json")["outputs"] for f in (folder, reference)]
    assert outputs[0].keys() == outputs[1].keys() and outputs[0]["model.pt"] == outputs[1]["model.pt"]


# Killed


def run_and_die(script: str, argv: list[str], n: int, name: str) -> None:
    """In a process of its own: SIGKILL at the n-th writing of file `name`, its new content lying beside the old."""
    replace, written = os.replace, []

    def replace_or_die(source, target):
        written.append(Path(target).name)
        if written.count(name) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    artifacts.os.replace = replace_or_die
    run_stage(script, *argv)


@pytest.mark.parametrize(
    ("script", "name", "n", "saved"),
    [
        ("train_coarse", "checkpoint.pt", 1, {}),
        ("train_coarse", "checkpoint.pt", 4, {"coarse": 3}),
        ("train_coarse", "history.jsonl", 6, {"coarse": 5}),  # all six epochs are in the checkpoint
        ("finetune", "checkpoint.pt", 3, {"fine": 2}),
        ("finetune", "checkpoint.pt", 5, {"fine": 4}),
        ("finetune", "checkpoint.pt", 7, {"fine": 4, "coarse": 2}),
        ("multihead", "checkpoint.pt", 4, {"multihead": 3}),
        ("multihead", "model.pt", 1, {"multihead": 6}),
    ],
)
def test_sigkill_then_the_same_bits(disturbed, small, script, name, n, saved):
    argv, run = disturbed
    folder = run / TRAINING[script]
    shutil.rmtree(folder)
    process = reproduce.processes().Process(target=run_and_die, args=(script, argv, n, name))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(folder.glob(f".{name}.*.tmp")) and not (folder / "manifest.json").exists()
    epochs = {}
    for line in history(folder) if saved else []:
        epochs[line["phase"]] = line["epoch"]
    assert epochs == saved
    run_stage(script, *argv)
    assert_same_result(folder, small[1] / "small/seed0" / TRAINING[script])


def wait_for_epochs(process: subprocess.Popen, folder: Path, n: int) -> None:
    path, deadline = folder / "history.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < n:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def test_sigint_and_sigkill_from_a_shell_then_the_same_bits(small, tmp_path):
    config, runs = small
    argv = ["--config", str(config), "coarse.epochs=25"]
    folder, command = tmp_path / "small/seed0/coarse", [sys.executable, ROOT / "train_coarse.py", *argv]
    command.append(f"output_dir={tmp_path}")

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_epochs(process, folder, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("interrupted: ") and last.endswith(f"{folder}/checkpoint.pt; run the same command to go on")
    assert "Traceback" not in err and {p.name for p in folder.iterdir()} == {".lock", "checkpoint.pt", "history.jsonl"}

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_epochs(process, folder, len(history(folder)) + 3)
    process.kill()
    assert "coarse: going on at step" in process.communicate()[1]
    assert not (folder / "manifest.json").exists()

    run_stage("train_coarse", *argv, f"output_dir={tmp_path}")
    run_stage("train_coarse", *argv, f"output_dir={tmp_path / 'undisturbed'}")
    assert_same_result(folder, tmp_path / "undisturbed/small/seed0/coarse")


# Interrupted


def interrupt_at(monkeypatch, n: int) -> None:
    """Send SIGINT to this process when the n-th batch of the run is drawn."""
    batches, drawn = loader.training_batches, []

    def watched(*args):
        for batch in batches(*args):
            drawn.append(1)
            if len(drawn) == n:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(training.loader, "training_batches", watched)


@pytest.mark.parametrize(
    ("script", "step", "said"),
    [
        ("train_coarse", 1, "step 1 of 18"),
        ("train_coarse", 3 * STEPS + 2, "step 11 of 18"),
        ("train_coarse", 3 * STEPS, "coarse epoch 3 of 6"),
        ("finetune", STEPS + 2, "step 5 of 12"),
        ("finetune", 4 * STEPS, "fine epoch 4 of 4"),
        ("finetune", 4 * STEPS + STEPS + 1, "step 4 of 12"),
        ("multihead", STEPS + 1, "step 4 of 18"),
        ("multihead", 6 * STEPS, "multihead epoch 6 of 6"),
    ],
)
def test_sigint_saves_and_says_how_to_go_on(disturbed, small, capsys, monkeypatch, script, step, said):
    argv, run = disturbed
    folder = run / TRAINING[script]
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(SystemExit) as stop:
            run_stage(script, *argv)
    checkpoint = folder / "checkpoint.pt"
    assert stop.value.code == 130 and checkpoint.exists() and not (folder / "manifest.json").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"interrupted: {said} is saved in {checkpoint}; run the same command to go on"
    run_stage(script, *argv)
    assert_same_result(folder, small[1] / "small/seed0" / TRAINING[script])


# Checkpoints that do not fit


@pytest.fixture
def unfinished(disturbed, monkeypatch):
    """(argv, folder) of train_coarse, interrupted in its third epoch."""
    argv, run = disturbed
    shutil.rmtree(run / "coarse")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2 * STEPS + 1)
        with pytest.raises(SystemExit):
            run_stage("train_coarse", *argv)
    return argv, run / "coarse"


def test_a_truncated_checkpoint_is_named_and_force_starts_anew(unfinished, small, capsys):
    argv, folder = unfinished
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = contents(folder)
    said = error_of(capsys, "train_coarse", *argv)
    assert said.startswith(f"{path}: damaged, or not a plain checkpoint (")
    assert said.endswith("--force starts its stage anew") and contents(folder) == before
    artifacts.save_torch(path, {"weights": 1})
    said = error_of(capsys, "train_coarse", *argv)
    assert said == f"{path}: not a checkpoint of this program; --force starts the stage anew"
    run_stage("train_coarse", *argv, "--force")
    assert_same_result(folder, small[1] / "small/seed0/coarse")


def test_a_checkpoint_of_other_settings_names_the_key(unfinished, small, capsys):
    argv, folder = unfinished
    before = contents(folder)
    said = error_of(capsys, "train_coarse", *argv, "coarse.epochs=9", "train.momentum=0")
    assert said.startswith(f"{folder}/checkpoint.pt is of an unfinished run made otherwise (")
    assert "train.momentum was 0.9, now 0.0" in said and "coarse.epochs was 6, now 9" in said and "--force" in said
    assert contents(folder) == before
    run_stage("train_coarse", *argv)
    assert_same_result(folder, small[1] / "small/seed0/coarse")


def test_a_checkpoint_of_other_labels_names_the_file(disturbed, capsys, monkeypatch):
    argv, run = disturbed
    shutil.rmtree(run / "multihead")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, 2)
        run_stage("multihead", *argv)
    run_stage("cluster_fine", *argv, "cluster.method=oracle", "cluster.assign=nearest", "--force")
    said = error_of(capsys, "multihead", *argv)
    assert "checkpoint.pt is of an unfinished run made otherwise (" in said and "labels/oracle/labels.npy was " in said


# Diverged


@pytest.mark.parametrize(
    ("script", "key", "phase"),
    [
        ("train_coarse", "coarse.lr", "coarse"),
        ("finetune", "finetune.fine_lr", "fine"),
        ("finetune", "finetune.coarse_lr", "coarse"),
        ("multihead", "multihead.lr", "multihead"),
    ],
)
def test_a_loss_that_is_not_finite_names_phase_step_and_setting(disturbed, capsys, script, key, phase):
    argv, run = disturbed
    shutil.rmtree(run / TRAINING[script])
    before = contents(run)
    said = error_of(capsys, script, *argv, f"{key}=1e30")
    assert said.startswith(f"{phase}: the loss is ") and " at step " in said
    assert said.endswith(f"; lower {key}, now 1e+30, or check the inputs")
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert not (run / TRAINING[script] / "manifest.json").exists()


def test_a_network_that_diverges_in_the_last_step_is_noticed(disturbed, capsys):
    """The training loss of an epoch's only step is still that of the weights before it."""
    argv, run = disturbed
    before = contents(run)
    said = error_of(capsys, "train_coarse", *argv, "train.batch_size=100", "coarse.lr=1e30", "--force")
    assert said.startswith("coarse: the loss is ") and "lower coarse.lr" in said
    assert contents(run) == before  # the older result, which --force would have replaced, still counts
    run_stage("train_coarse", *argv)
    assert "done already" in capsys.readouterr().out


# Labels and features that cannot be learned from


def forge_labels(run: Path, change) -> None:
    """Change labels/oracle/labels.npy, hash and all, by a function of the array."""
    labels = np.load(run / "labels/oracle/labels.npy")
    forge(run / "labels/oracle/labels.npy", change(labels))


def one_label(labels):
    return np.where(np.arange(len(labels)) == np.argmax(labels >= 0), labels, -1)


@pytest.mark.parametrize("script", ["finetune", "multihead"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda z: z * 0 - 1, "labels.npy: no training row has a label (all are -1); cluster with other settings"),
        (one_label, "labels.npy: one training row has a label; batch normalisation needs two"),
        (lambda z: z + (z == 5), "labels.npy: ids must lie in [-1, 6), the length of parents.npy"),
        (lambda z: z - (z == -1), "labels.npy: ids must lie in [-1, 6), the length of parents.npy"),
        (lambda z: z[::-1].copy(), ": some rows' pseudo label has a parent other than their coarse label"),
    ],
    ids=["all -1", "one", "too large", "too small", "other parents"],
)
def test_labels_that_cannot_be_learned_from(disturbed, capsys, script, change, said):
    argv, run = disturbed
    forge_labels(run, change)
    assert error_of(capsys, script, *argv, "--force") == f"{run}/labels/oracle{'/' * (said[0] != ':')}{said}"


def test_features_that_are_not_finite(disturbed, capsys):
    argv, run = disturbed
    run_stage("extract_features", *argv)
    features = np.load(run / "features/coarse/train.npy")
    features[:, 3] = np.nan
    forge(run / "features/coarse/train.npy", features)
    said = error_of(capsys, "cluster_fine", *argv)
    assert (
        said.startswith("features: ")
        and "rows of a coarse class are not finite" in said
        and "extract_features.py" in said
    )
    assert not (run / "labels/umap_hdbscan/manifest.json").exists()


# Odd data


def write_set(
    root: Path, images: np.ndarray, coarse: np.ndarray, test_images: np.ndarray, test_coarse: np.ndarray
) -> Path:
    """A data set of data.name=arrays without fine labels."""
    root.mkdir()
    for split, x, y in (("train", images, coarse), ("test", test_images, test_coarse)):
        np.save(root / f"{split}_images.npy", x.astype(np.uint8))
        np.save(root / f"{split}_coarse_labels.npy", np.asarray(y, dtype=np.int64))
    return root


def run_all_stages(tmp_path: Path, root: Path, *overrides: str) -> Path:
    config = tmp_path / "odd.yaml"
    config.write_text(SETTINGS.format(root=root).replace("labels: oracle", "labels: umap_hdbscan"))
    for script in STAGE_SCRIPTS:
        run_stage(script, "--config", config, f"output_dir={tmp_path / 'runs'}", *overrides)
    return tmp_path / "runs/odd/seed0"


def test_coarse_classes_of_1_row_of_20_rows_and_of_identical_images(tmp_path, capsys):
    """Beside a class with planted fine ones: each odd class becomes one fine class, with a warning."""
    images, coarse, _ = planted_images(40, 0)
    one, twenty, planted = images[coarse == 0][:1], images[coarse == 0][1:21], images[coarse == 1]
    same = np.repeat(images[coarse == 0][30:31], 50, axis=0)
    parts = [one, twenty, same, planted]
    labels = np.repeat(np.arange(4), [len(part) for part in parts])
    everything = np.concatenate(parts)
    run = run_all_stages(tmp_path, write_set(tmp_path / "data", everything, labels, everything[::2], labels[::2]))

    warned = capsys.readouterr().err
    clusters = read_json(run / "labels/umap_hdbscan/clusters.json")
    one, twenty, same, planted = clusters["classes"].values()
    assert (one["n_rows"], one["n_fit"], one["n_clusters"]) == (1, 1, 1)
    assert one["warnings"] == ["1 rows are too few to embed in 4 dimensions; kept as one fine class"]
    assert (twenty["n_rows"], twenty["n_fit"]) == (18, 16) and twenty["n_clusters"] >= 1
    assert (same["n_fit"], same["n_clusters"]) == (41, 1)  # 50 - 5 for validation; 90 % of them are 40.5
    assert planted["n_rows"] == 108 and sum(planted["sizes"]) == 97
    for warning in clusters["warnings"]:
        assert f"warning: {warning}" in warned
    labels_found, parents = (np.load(run / f"labels/umap_hdbscan/{name}.npy") for name in ("labels", "parents"))
    assert (
        set(parents) == {0, 1, 2, 3} and (parents[labels_found[labels_found >= 0]] == labels[labels_found >= 0]).all()
    )
    for folder in ("coarse", "finetune/umap_hdbscan", "multihead/umap_hdbscan-alpha0.5"):
        test = read_json(run / folder / "metrics.json")["test"]
        assert test["accuracy"] > 0.5 and test["worst_subclass_accuracy"] is None


def test_a_single_coarse_class(tmp_path):
    images, coarse, _ = planted_images(30, 0)
    images = images[coarse == 0]
    zeros = np.zeros(len(images))
    run = run_all_stages(tmp_path, write_set(tmp_path / "data", images, zeros, images, zeros))
    for folder in ("coarse", "finetune/umap_hdbscan", "multihead/umap_hdbscan-alpha0.5"):
        metrics = read_json(run / folder / "metrics.json")
        assert metrics["test"]["accuracy"] == metrics["test"]["balanced_accuracy"] == metrics["val"]["accuracy"] == 1
    assert read_json(run / "labels/umap_hdbscan/clusters.json")["n_fine"] >= 1
    assert read_json(run / "uncertainty/metrics.json")["n_suspects"] == 0


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        ("cluster.min_cluster_size=1000", "rows are fewer than two clusters of 1000; kept as one fine class"),
        ("cluster.min_cluster_size=70 cluster.min_samples=100", "rows noise; kept as one fine class"),
        ("cluster.allow_single_cluster=true cluster.cluster_selection_epsilon=1000", "HDBSCAN found one cluster"),
    ],
)
@pytest.mark.parametrize("noise", ["soft", "keep", "nearest"])
def test_classes_in_which_hdbscan_finds_0_or_1_clusters(run_copy, config_file, capsys, overrides, warning, noise):
    argv = ["--config", config_file, f"output_dir={run_copy}", "cluster.source=odd", f"cluster.noise={noise}"]
    run_stage("cluster_fine", *argv, *overrides.split())
    folder = run_copy / "planted/seed0/labels/odd"
    clusters = read_json(folder / "clusters.json")
    assert [entry["n_clusters"] for entry in clusters["classes"].values()] == [1, 1]
    assert all(warning in w for w in clusters["warnings"]) and len(clusters["warnings"]) == 2
    assert f"warning: {clusters['warnings'][0]}" in capsys.readouterr().err
    assert np.load(folder / "parents.npy").tolist() == [0, 1]


def test_fn_and_mh_learn_from_one_fine_class_a_coarse_class(run_copy, config_file):
    argv = ["--config", config_file, f"output_dir={run_copy}"]
    run_stage("cluster_fine", *argv, "cluster.source=odd", "cluster.min_cluster_size=1000")
    run_stage("finetune", *argv, "finetune.labels=odd")
    run_stage("multihead", *argv, "multihead.labels=odd", "multihead.epochs=6")
    for folder in ("finetune/odd", "multihead/odd-alpha0.5"):
        metrics = read_json(run_copy / "planted/seed0" / folder / "metrics.json")
        assert metrics["n_fine"] == 2 and metrics["test"]["accuracy"] > 0.9


def test_keep_fraction_1_keeps_every_training_row(run_copy, config_file):
    argv = ["--config", config_file, f"output_dir={run_copy}", "filter.keep_fraction=1.0"]
    run_stage("uncertainty_filter", *argv, "--force")
    run = run_copy / "planted/seed0"
    assert np.load(run / "uncertainty/kept.npy").sum() == read_json(run / "uncertainty/metrics.json")["n_train"] == 324
    run_stage("cluster_fine", *argv, "--force")
    assert (np.load(run / "labels/umap_hdbscan/labels.npy") >= 0).sum() == 324


def test_data_too_small_to_train_on(tmp_path, capsys):
    images, _, _ = planted_images(1, 0)
    config = tmp_path / "odd.yaml"
    for n, labels, said in [
        (2, [0, 0], "data: 1 training rows are too few to train on"),
        (2, [0, 1], "data.val_fraction: no coarse class has the two rows that a validation row needs"),
    ]:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        root = write_set(tmp_path / "data", images[:n], np.array(labels), images[:n], np.array(labels))
        config.write_text(SETTINGS.format(root=root))
        assert error_of(capsys, "train_coarse", "--config", config, f"output_dir={tmp_path / 'runs'}") == said


def test_history_is_whole_json_lines(small):
    for folder in TRAINING.values():
        for line in (small[1] / "small/seed0" / folder / "history.jsonl").read_text().splitlines():
            assert json.loads(line).keys() == {
                "phase", "epoch", "epochs", "loss", "val_accuracy", "val_loss", "lr", "images_seen", "seconds",
                "images_per_s", "waiting", "compiled",
            }  # fmt: skip
