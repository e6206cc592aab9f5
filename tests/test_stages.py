"""What each stage writes, when it counts as done, and what it says where its inputs or its folder are not in order."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STAGE_SCRIPTS, run_stage
from shell import advised, contents, error_of, forge, history, read_json

from utils import artifacts
from utils.config import interpreter, load_config
from utils.splits import validation_mask
from utils.stages import STAGES, is_finished, open_stage, stage_settings

N, N_TEST, K_C, K_F, D, V = 360, 120, 2, 6, 32, 3
LEARNER = {"model.pt", "metrics.json", "history.jsonl", "test_preds.npy"}
PREDS = {"test_preds.npy": ((N_TEST,), "int64")}
FILES = {  # what DESIGN promises, folder by folder
    "coarse": LEARNER,
    "features/coarse": {"train.npy", "test.npy"},
    "uncertainty": {"scores.npy", "probs.npy", "view_probs.npy", "kept.npy", "suspects.csv", "metrics.json"},
    "labels/umap_hdbscan": {
        "labels.npy", "membership.npy", "parents.npy", "embedding.npy", "test_labels.npy",
        "clusters.json", "labels.csv", "metrics.json",
    },
    "finetune/umap_hdbscan": LEARNER | {"fine_model.pt"},
    "multihead/umap_hdbscan-alpha0.5": LEARNER,
}  # fmt: skip
ARRAYS = {
    "coarse": PREDS,
    "features/coarse": {"train.npy": ((N, D), "float32"), "test.npy": ((N_TEST, D), "float32")},
    "uncertainty": {
        "scores.npy": ((N,), "float32"), "probs.npy": ((N, K_C), "float32"),
        "view_probs.npy": ((N, V, K_C), "float32"), "kept.npy": ((N,), "bool"),
    },
    "labels/umap_hdbscan": {
        "labels.npy": ((N,), "int64"), "membership.npy": ((N,), "float32"), "parents.npy": ((K_F,), "int64"),
        "embedding.npy": ((N, 4), "float32"), "test_labels.npy": ((N_TEST,), "int64"),
    },
    "finetune/umap_hdbscan": PREDS,
    "multihead/umap_hdbscan-alpha0.5": PREDS,
}  # fmt: skip
FOLDER = dict(zip(STAGE_SCRIPTS, FILES, strict=True))


@pytest.fixture(scope="module")
def run_dir(finished_run) -> Path:
    return finished_run / "planted/seed0"


@pytest.fixture
def argv(config_file, run_copy) -> list[str]:
    """Arguments that put a stage into the private copy of the finished run."""
    return ["--config", str(config_file), f"output_dir={run_copy}"]


@pytest.fixture
def copy_dir(run_copy) -> Path:
    return run_copy / "planted/seed0"


# What a finished run holds


@pytest.mark.parametrize("folder", FILES)
def test_a_stage_writes_these_files(run_dir, folder):
    assert {p.name for p in (run_dir / folder).iterdir()} == FILES[folder] | {"manifest.json", ".lock"}
    arrays = {p.name: np.load(p, allow_pickle=False) for p in (run_dir / folder).glob("*.npy")}
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == ARRAYS[folder]


@pytest.mark.parametrize("folder", FILES)
def test_the_manifest_describes_every_file(run_dir, config_file, folder):
    manifest = read_json(run_dir / folder / "manifest.json")
    assert manifest["outputs"].keys() == FILES[folder]
    for name, output in manifest["outputs"].items():
        assert output == artifacts.describe_output(run_dir / folder / name)
    for path, digest in manifest["inputs"].items():
        assert digest == artifacts.sha256(run_dir / path)
    assert (manifest["stage"], manifest["seed"]) == (folder.split("/")[0], 0)
    assert manifest.get("precision") == (None if folder.startswith("labels") else "fp32")
    assert manifest["config"]["data"]["name"] == "arrays" and manifest["seconds"] >= 0 and manifest["device"]
    assert {"code", "versions", "data_signature", "finished", "settings"} <= manifest.keys()


def test_each_stage_names_the_inputs_it_read(run_dir):
    inputs = {folder: list(read_json(run_dir / folder / "manifest.json")["inputs"]) for folder in FILES}
    labels = [f"labels/umap_hdbscan/{name}.npy" for name in ("labels", "parents", "test_labels")]
    assert inputs == {
        "coarse": [],
        "features/coarse": ["coarse/model.pt"],
        "uncertainty": ["coarse/model.pt"],
        "labels/umap_hdbscan": ["features/coarse/train.npy", "features/coarse/test.npy", "uncertainty/kept.npy"],
        "finetune/umap_hdbscan": labels,
        "multihead/umap_hdbscan-alpha0.5": labels,
    }


@pytest.fixture(scope="module")
def truth(planted) -> dict[str, np.ndarray]:
    """The planted coarse labels, and which rows are training rows."""
    coarse, test = (np.load(planted / f"{split}_coarse_labels.npy") for split in ("train", "test"))
    return {"coarse": coarse, "test": test, "is_train": ~validation_mask(coarse, 0.1, seed=0)}


def test_validation_rows_are_neither_kept_nor_labelled(run_dir, truth):
    kept, labels = np.load(run_dir / "uncertainty/kept.npy"), np.load(run_dir / "labels/umap_hdbscan/labels.npy")
    assert truth["is_train"].sum() == 324 and not kept[~truth["is_train"]].any()
    assert (labels[~truth["is_train"]] == -1).all() and ((labels >= 0) == kept).all()
    kept_share = [
        kept[truth["coarse"] == c].sum() / (truth["is_train"] & (truth["coarse"] == c)).sum() for c in range(K_C)
    ]
    assert kept_share == pytest.approx([0.9, 0.9], abs=0.005)


def test_every_label_belongs_to_its_rows_coarse_class(run_dir, truth):
    folder = run_dir / "labels/umap_hdbscan"
    labels, parents, test = (np.load(folder / f"{name}.npy") for name in ("labels", "parents", "test_labels"))
    assert sorted(set(labels)) == [-1, *range(K_F)] and (np.diff(parents) >= 0).all()
    assert (parents[labels[labels >= 0]] == truth["coarse"][labels >= 0]).all()
    assert (parents[test] == truth["test"]).all()
    membership, embedding = np.load(folder / "membership.npy"), np.load(folder / "embedding.npy")
    assert (membership[labels < 0] == 0).all() and ((membership >= 0) & (membership <= 1)).all()
    assert (np.isfinite(embedding).all(1) == (labels >= 0)).all()


def test_labels_csv_says_what_the_arrays_say(run_dir, truth):
    folder = run_dir / "labels/umap_hdbscan"
    header, *rows = csv.reader((folder / "labels.csv").open(newline=""))
    labels, membership = np.load(folder / "labels.npy"), np.load(folder / "membership.npy")
    names = read_json(folder / "clusters.json")["names"]
    coarse_names = list(read_json(folder / "clusters.json")["classes"])
    assert header == ["row", "image", "coarse", "discovered", "membership"] and len(rows) == N
    assert rows == [
        [
            str(i),
            str(i),
            coarse_names[truth["coarse"][i]],
            names[labels[i]] if labels[i] >= 0 else "",
            f"{membership[i]:.4f}",
        ]
        for i in range(N)
    ]
    assert names == [f"{name}/{k}" for name in coarse_names for k in (1, 2, 3)]


def test_suspects_are_the_rows_the_network_contradicts(run_dir, truth, run_copy, config_file):
    """On labels of which ten are wrong: those ten lead the list."""
    header, *rows = csv.reader((run_dir / "uncertainty/suspects.csv").open(newline=""))
    assert header == ["row", "image", "split", "given", "predicted", "probability"]
    probs = np.load(run_dir / "uncertainty/probs.npy")
    wrong = np.flatnonzero((probs.argmax(1) != truth["coarse"]) & (probs.max(1) >= 0.5))
    assert sorted(int(row[0]) for row in rows) == wrong.tolist()
    assert read_json(run_dir / "uncertainty/metrics.json")["n_suspects"] == len(rows)


@pytest.mark.parametrize("folder", ["coarse", "finetune/umap_hdbscan", "multihead/umap_hdbscan-alpha0.5"])
def test_metrics_of_a_learner(run_dir, truth, folder):
    metrics = read_json(run_dir / folder / "metrics.json")
    preds = np.load(run_dir / folder / "test_preds.npy")
    assert metrics["test"]["accuracy"] == pytest.approx((preds == truth["test"]).mean())
    assert metrics["n_train"] == 324 and metrics["seed"] == 0 and metrics["stage"] == folder.split("/")[0]
    lines = history(run_dir / folder)
    n_steps = {"coarse": 6 * 5, "finetune": 3 * 4 + 3 * 5, "multihead": 3 * 5}[metrics["stage"]]  # whole batches of 64
    assert metrics["images_seen"] == lines[-1]["images_seen"] == n_steps * 64
    for phase, epoch in metrics["best_epoch"].items():
        of_phase = [line for line in lines if line["phase"] == phase]
        best = max(line["val_accuracy"] for line in of_phase)
        assert epoch == max(line["epoch"] for line in of_phase if line["val_accuracy"] == best)
    if folder == "coarse":
        assert metrics["labels"] is metrics["n_fine"] is metrics["n_labelled"] is metrics["test_fine"] is None
    else:
        assert (metrics["labels"], metrics["n_fine"], metrics["n_labelled"]) == ("umap_hdbscan", K_F, 292)
        assert metrics["test_fine"]["n"] == N_TEST


# The same seed, the same bytes


def test_the_same_seed_gives_the_same_bytes(run_dir, config_file, tmp_path):
    for script in STAGE_SCRIPTS[:4]:
        run_stage(script, "--config", config_file, f"output_dir={tmp_path}")
    again = tmp_path / "planted/seed0"
    for folder in list(FILES)[:4]:
        for name in FILES[folder] - {"history.jsonl"}:  # which has seconds in it
            assert (again / folder / name).read_bytes() == (run_dir / folder / name).read_bytes(), name
    assert history(again / "coarse") == history(run_dir / "coarse")


def test_another_seed_gives_other_weights_and_rows(run_dir, config_file, tmp_path):
    run_stage("train_coarse", "--config", config_file, f"output_dir={tmp_path}", "seed=1", "coarse.epochs=1")
    assert history(tmp_path / "planted/seed1/coarse")[0]["loss"] != history(run_dir / "coarse")[0]["loss"]


# Which settings decide a stage

DECIDES = {  # stage: (settings that make another result, settings that do not)
    "coarse": (
        "seed=1 coarse.epochs=9 coarse.lr=0.3 train.batch_size=32 train.momentum=0 model.width=8 augment=none "
        "crop_flip.hflip_p=1 precision=bf16 data.val_fraction=0.2 data.limit=100 data.coarse_map.a=[b]",
        "filter.n_views=9 cluster.noise=keep features.source=x finetune.fine_lr=1 multihead.alpha=1",
    ),
    "coarse coarse.match=finetune/x": ("coarse.match=finetune/y coarse.lr=3", "coarse.epochs=9"),
    "features": (
        "seed=1 features.source=coarse_matched model.width=8 precision=bf16",
        "coarse.lr=3 features.batch_size=9 train.batch_size=9",
    ),
    "uncertainty": (
        "filter.score=margin filter.views.hflip_p=0.3 filter.keep_fraction=1",
        "filter.batch_size=9 coarse.lr=3 crop_flip.hflip_p=0",
    ),
    "labels": (
        "cluster.n_neighbors=5 cluster.noise=keep cluster.min_samples=3 cluster.source=x metrics.max_points=99",
        "cluster.k_max=5 cluster.n_clusters=3 cluster.random_of=x model.width=8 filter.n_views=9",
    ),
    "labels cluster.method=kmeans": (
        "cluster.k_max=5 cluster.n_neighbors=5",
        "cluster.min_samples=3 cluster.noise=keep",
    ),
    "labels cluster.method=random": (
        "cluster.random_of=gmm seed=1",
        "cluster.n_neighbors=5 metrics.max_points=99",
    ),
    "labels cluster.method=oracle": ("cluster.assign=nearest", "cluster.n_neighbors=5 cluster.random_of=gmm"),
    "finetune": (
        "finetune.head=stack finetune.fine_lr=1 train.warmup=0.1",
        "coarse.lr=3 multihead.lr=3 cluster.noise=keep",
    ),
    "multihead": ("multihead.alpha=1 multihead.epochs=1 augment=none", "coarse.lr=3 finetune.fine_lr=1"),
}
NEVER = "name=x output_dir=x seeds=[5] device=cuda threads=2 data.root=x data.download=false reproduce.alphas=[1]"


@pytest.mark.parametrize("stage", DECIDES)
def test_the_settings_that_decide_a_stage(stage):
    def settings(*overrides):
        return stage_settings(load_config("", (*given, *overrides)), STAGES[name])

    name, *given = stage.split()
    decide, ignored = (text.split() for text in DECIDES[stage])
    for override in decide:
        assert settings(override) != settings(), override
    for override in [*ignored, *NEVER.split()]:
        assert settings(override) == settings(), override


# Done, done otherwise, done again


def test_a_finished_stage_exits_at_once_and_changes_no_byte(finished_run, config_file, capsys, monkeypatch):
    def load_dataset(*_):
        raise AssertionError("a finished stage loads no data")

    monkeypatch.setattr("utils.data.load_dataset", load_dataset)
    before = contents(finished_run)
    for script in STAGE_SCRIPTS:
        run_stage(script, "--config", config_file, f"output_dir={finished_run}")
        said = capsys.readouterr()
        folder = finished_run / "planted/seed0" / FOLDER[script]
        assert said.out == f"{folder}: done already; --force redoes it\n" and said.err == ""
    assert contents(finished_run) == before


def test_settings_that_decide_nothing_leave_it_finished(argv, config_file, planted, tmp_path):
    moved = shutil.copytree(planted, tmp_path / "moved")
    cfg = load_config(str(config_file), (argv[2], f"data.root={moved}", "threads=1", "features.batch_size=7"))
    assert all(is_finished(cfg, name) for name in STAGES)


@pytest.mark.parametrize(
    ("script", "override", "difference"),
    [
        ("train_coarse", "coarse.lr=0.3", "coarse.lr was 0.1, now 0.3"),
        ("extract_features", "precision=bf16", "precision was 'fp32', now 'bf16'"),
        ("uncertainty_filter", "filter.views.hflip_p=0.5", "filter.views.hflip_p was 0.0, now 0.5"),
        ("cluster_fine", "cluster.noise=keep", "cluster.noise was 'soft', now 'keep'"),
        ("finetune", "finetune.freeze=true", "finetune.freeze was False, now True"),
        ("multihead", "multihead.epochs=4", "multihead.epochs was 3, now 4"),
    ],
)
def test_other_settings_stop_and_name_the_key(argv, copy_dir, capsys, script, override, difference):
    before = contents(copy_dir)
    assert error_of(capsys, script, *argv, override) == (
        f"{copy_dir / FOLDER[script]} is already there with other settings ({difference}); --force redoes it"
    )
    assert contents(copy_dir) == before


def test_force_redoes_a_stage(argv, copy_dir, config_file, capsys):
    run_stage("uncertainty_filter", *argv, "filter.n_views=2", "--force")
    assert np.load(copy_dir / "uncertainty/view_probs.npy").shape == (N, 2, K_C)
    assert read_json(copy_dir / "uncertainty/manifest.json")["settings"]["filter.n_views"] == 2
    cfg = load_config(str(config_file), (argv[2],))
    assert not is_finished(cfg, "uncertainty")
    assert is_finished(load_config(str(config_file), (argv[2], "filter.n_views=2")), "uncertainty")


def test_an_edited_output_is_noticed(argv, copy_dir, config_file, capsys):
    (copy_dir / "coarse/metrics.json").write_text("{}")
    assert not is_finished(load_config(str(config_file), (argv[2],)), "coarse")
    said = error_of(capsys, "train_coarse", *argv)
    assert said == f"{copy_dir}/coarse/metrics.json is missing, damaged or was edited; --force redoes it"
    (copy_dir / "coarse/metrics.json").unlink()
    assert error_of(capsys, "train_coarse", *argv) == said


@pytest.mark.parametrize("text", ['{"stage": ', "{}"])
def test_a_damaged_manifest_stops_its_stage_and_those_that_read_it(argv, copy_dir, capsys, text):
    (copy_dir / "features/coarse/manifest.json").write_text(text)
    for script in ("extract_features", "cluster_fine"):
        assert error_of(capsys, script, *argv).startswith(f"{copy_dir}/features/coarse/manifest.json: not ")
    run_stage("extract_features", *argv, "--force")
    run_stage("cluster_fine", *argv)


# Inputs


@pytest.mark.parametrize(
    ("script", "missing", "producer"),
    [
        ("extract_features", "coarse/model.pt", "train_coarse"),
        ("uncertainty_filter", "coarse/model.pt", "train_coarse"),
        ("cluster_fine", "features/coarse/train.npy", "extract_features"),
        ("finetune", "labels/umap_hdbscan/labels.npy", "cluster_fine"),
        ("multihead", "labels/umap_hdbscan/labels.npy", "cluster_fine"),
    ],
)
def test_a_missing_input_names_the_command(config_file, tmp_path, capsys, script, missing, producer):
    run = tmp_path / "planted/seed0"
    argv = ["--config", str(config_file), f"output_dir={tmp_path}"]
    said = error_of(capsys, script, *argv)
    assert said.startswith(f"{run / missing} is missing: run `") and said.endswith("` first")
    assert advised(said)[0] == producer and set(argv) <= set(advised(said)[1])
    assert not run.exists()
    (run / missing).parent.mkdir(parents=True)
    assert error_of(capsys, script, *argv) == said.replace("is missing", "is unfinished")


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("train_coarse", ["coarse.match=finetune/oracle"]),
        ("train_coarse", ["coarse.match=multihead/oracle-alpha0.25"]),
        ("finetune", ["finetune.labels=random", "finetune.init=coarse"]),
        ("extract_features", ["features.source=coarse_matched", "coarse.match=finetune/oracle"]),
    ],
)
def test_whoever_follows_the_advice_arrives(config_file, tmp_path, capsys, script, settings):
    """From nothing: the named commands, run in turn, lead to the stage that was asked for."""
    short = ["coarse.epochs=1", "finetune.fine_epochs=1", "finetune.coarse_epochs=1", "multihead.epochs=1"]
    wanted = script, ["--config", str(config_file), f"output_dir={tmp_path}", *short, *settings]
    todo = [wanted]
    for _ in range(20):
        name, argv = todo[-1]
        try:
            run_stage(name, *argv)
            todo.pop()
        except SystemExit:
            todo.append(advised(capsys.readouterr().err.splitlines()[-1]))
            assert todo.count(todo[-1]) == 1, todo
        if not todo:
            break
    assert not todo and "done already" not in capsys.readouterr().out


def test_a_lost_file_of_a_finished_stage_names_the_command(argv, copy_dir, capsys):
    (copy_dir / "features/coarse/test.npy").unlink()
    said = error_of(capsys, "cluster_fine", *argv)
    assert said.startswith(f"{copy_dir}/features/coarse/test.npy is missing although") and said.endswith("--force`")


def test_a_stale_input_is_named_along_the_whole_chain(argv, copy_dir, capsys):
    run_stage("train_coarse", *argv, "coarse.epochs=1", "--force")
    changed = "features/coarse is stale: coarse/model.pt changed since it was made"
    assert error_of(capsys, "extract_features", *argv) == f"{copy_dir}/{changed}; --force redoes it"
    for script in ("cluster_fine", "finetune", "multihead"):
        said = error_of(capsys, script, *argv)
        assert said.startswith(f"{copy_dir}/{changed}: run `{interpreter()} extract_features.py ") and said.endswith(
            " --force`"
        )
    run_stage("extract_features", *argv, "--force")
    assert "uncertainty is stale: coarse/model.pt changed" in error_of(capsys, "cluster_fine", *argv)
    run_stage("uncertainty_filter", *argv, "--force")
    said = error_of(capsys, "cluster_fine", *argv)
    inputs = ["features/coarse/train.npy", "features/coarse/test.npy", "uncertainty/kept.npy"]
    assert (
        said
        == f"{copy_dir}/labels/umap_hdbscan is stale: {', '.join(inputs)} changed since it was made; --force redoes it"
    )
    run_stage("cluster_fine", *argv, "--force")
    assert "finetune/umap_hdbscan is stale: labels/umap_hdbscan/" in error_of(capsys, "finetune", *argv)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_or_truncated_input_is_named(argv, copy_dir, capsys):
    for path, script, producer in [
        (copy_dir / "coarse/model.pt", "extract_features", "train_coarse.py"),
        (copy_dir / "features/coarse/train.npy", "cluster_fine", "extract_features.py"),
        (copy_dir / "labels/umap_hdbscan/labels.npy", "finetune", "cluster_fine.py"),
        (copy_dir / "labels/umap_hdbscan/parents.npy", "multihead", "cluster_fine.py"),
    ]:
        whole = path.read_bytes()
        for spoil in (damage, lambda path: path.write_bytes(path.read_bytes()[:-8])):
            spoil(path)
            said = error_of(capsys, script, *argv, "--force")
            assert said.startswith(
                f"{path} is damaged or was edited (its hash is not the manifest's): run `{interpreter()} {producer} "
            )
            path.write_bytes(whole)


FORGED = {  # what is put in place of an array, hash and all, and what is said
    "truncated": (lambda array, raw: raw[:-8], "not a readable .npy file ("),
    "empty": (lambda array, raw: b"", "not a readable .npy file ("),
    "pickled": (lambda array, raw: array.astype(object), "not a readable .npy file ("),
    "short": (lambda array, raw: array[:-1], "rows, but the data set has"),
    "scalar": (lambda array, raw: array.reshape(-1)[0], "no rows, but the data set has"),
}


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("features/coarse/train.npy", "cluster_fine"),
        ("features/coarse/test.npy", "cluster_fine"),
        ("uncertainty/kept.npy", "cluster_fine"),
        ("labels/umap_hdbscan/labels.npy", "finetune"),
        ("labels/umap_hdbscan/test_labels.npy", "multihead"),
    ],
)
def test_an_array_that_does_not_fit_is_named(argv, copy_dir, capsys, name, script, kind):
    path, (make, part) = copy_dir / name, FORGED[kind]
    forge(path, make(np.load(path), path.read_bytes()))
    said = error_of(capsys, script, *argv, "--force")
    assert said.startswith(f"{path}: ") and part in said


def test_a_network_that_does_not_fit_is_named(argv, copy_dir, capsys):
    forge(copy_dir / "coarse/model.pt", b"not a checkpoint")
    for script in ("extract_features", "uncertainty_filter"):
        said = error_of(capsys, script, *argv, "--force")
        assert said.startswith(f"{copy_dir}/coarse/model.pt: damaged, or not a plain checkpoint (")
    forge(copy_dir / "coarse/model.pt", (copy_dir / "multihead/umap_hdbscan-alpha0.5/model.pt").read_bytes())
    said = error_of(capsys, "uncertainty_filter", *argv, "--force")
    assert said.startswith(f"{copy_dir}/coarse/model.pt: does not fit the network of this configuration (")


def test_changed_data_files_make_every_stage_stale(argv, planted, tmp_path, copy_dir, capsys):
    changed = shutil.copytree(planted, tmp_path / "changed")
    damage(changed / "test_images.npy")
    argv = [*argv, f"data.root={changed}"]
    stale = f"{copy_dir}/coarse is stale: the data set's files changed since it was made"
    assert error_of(capsys, "train_coarse", *argv) == f"{stale}; --force redoes it"
    for script in STAGE_SCRIPTS[1:]:
        said = error_of(capsys, script, *argv)
        assert said.startswith(f"{stale}: run `{interpreter()} train_coarse.py ") and said.endswith(" --force`")


def test_data_and_model_settings_of_a_producer_must_be_the_consumers(argv, copy_dir, capsys):
    for override, difference, scripts in [
        ("model.width=8", "model.width was 4, now 8", STAGE_SCRIPTS[1:]),
        ("data.val_fraction=0.2", "data.val_fraction was 0.1, now 0.2", STAGE_SCRIPTS[1:]),
        ("data.limit=99", "data.limit was 0, now 99", ["cluster_fine"]),
    ]:
        for script in scripts:
            said = error_of(capsys, script, *argv, override)
            assert said.startswith(f"{copy_dir}/coarse was made with other settings ({difference}): run `")
            assert advised(said)[0] == "train_coarse" and {override, "--force"} <= set(advised(said)[1])


def test_missing_data_is_named_before_anything_is_made(config_file, tmp_path, capsys):
    argv = ["--config", str(config_file), f"output_dir={tmp_path / 'runs'}", f"data.root={tmp_path}"]
    said = error_of(capsys, "train_coarse", *argv)
    assert str(tmp_path) in said and not (tmp_path / "runs").exists()


# The folder


def test_two_processes_in_one_folder(argv, copy_dir, capsys):
    """Another process, in the middle of this stage, holds the folder; when it is gone the way is free."""
    program = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True), input()"
    command = [sys.executable, "-c", program, copy_dir / "features/coarse/.lock"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        before = contents(copy_dir)
        folder = copy_dir / "features/coarse"
        for extra in ([], ["--force"]):
            assert error_of(capsys, "extract_features", *argv, *extra) == (
                f"{folder} is in use by another process; wait for it or choose another name= or seed="
            )
        assert contents(copy_dir) == before
        run_stage("uncertainty_filter", *argv, "--force")  # another folder of the same run
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
    run_stage("extract_features", *argv, "--force")


def test_the_lock_is_released_when_a_stage_fails(config_file, argv):
    cfg = load_config(str(config_file), (argv[2],))
    with pytest.raises(RuntimeError), open_stage(cfg, "coarse"):
        raise RuntimeError("our bug")
    with open_stage(cfg, "coarse") as stage:
        assert stage.finished


def test_a_run_folder_that_cannot_be_made(config_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file/runs", Path("/proc/runs")):
        said = error_of(capsys, "train_coarse", "--config", config_file, f"output_dir={place}")
        assert said.startswith(str(place)) and said.endswith(("Not a directory", "No such file or directory"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder(argv, copy_dir, capsys):
    before = contents(copy_dir)
    for folder in (copy_dir, copy_dir / "uncertainty"):
        folder.chmod(0o555)
    try:
        assert error_of(capsys, "train_coarse", *argv, "coarse.match=finetune/umap_hdbscan").endswith(
            "Permission denied"
        )
        assert error_of(capsys, "uncertainty_filter", *argv, "--force").endswith("Permission denied")
    finally:
        for folder in (copy_dir, copy_dir / "uncertainty"):
            folder.chmod(0o755)
    assert contents(copy_dir) == before


def test_a_full_disk_is_one_line_and_the_old_result_stays(argv, copy_dir, capsys, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    (copy_dir / "labels/oracle").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "fsync", fsync)
        assert "No space left on device" in error_of(capsys, "cluster_fine", *argv, "cluster.method=oracle")
    assert [p.name for p in (copy_dir / "labels/oracle").iterdir()] == [".lock"]
    run_stage("cluster_fine", *argv, "cluster.method=oracle")


def test_leftovers_of_a_killed_process_are_cleared(argv, copy_dir):
    for name in (".train.npy.123.tmp", ".model.pt.9.tmp"):
        (copy_dir / "features/coarse" / name).write_bytes(b"half")
    run_stage("extract_features", *argv, "--force")
    assert {p.name for p in (copy_dir / "features/coarse").iterdir()} == {
        "train.npy",
        "test.npy",
        "manifest.json",
        ".lock",
    }


def test_a_stage_alone_in_a_shell_gives_the_same_result(argv, copy_dir):
    """In another folder, as the user's own process, with the command that the stage before names."""
    before = contents(copy_dir / "uncertainty")
    done = subprocess.run(
        [sys.executable, ROOT / "uncertainty_filter.py", *argv, "--force"], cwd=copy_dir, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after = contents(copy_dir / "uncertainty")
    assert {name for name in after if after[name] != before[name]} <= {"manifest.json"}
    *_, done_line, next_line = done.stdout.splitlines()
    assert done_line.startswith(f"{copy_dir}/uncertainty: done in ")
    assert next_line == f"next: python cluster_fine.py {' '.join(argv)}"


@pytest.mark.parametrize("script", STAGE_SCRIPTS)
def test_a_finished_stage_answers_without_its_libraries(finished_run, config_file, script):
    """What is slow about an answer is the import of torch and UMAP."""
    code = f"""
import sys, {script}
{script}.main(["--config", {str(config_file)!r}, {f"output_dir={finished_run}"!r}])
print([name for name in ("torch", "umap", "numba", "sklearn", "hdbscan") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *_, said, heavy = done.stdout.splitlines()
    assert "done already" in said and heavy == "[]", done.stderr
