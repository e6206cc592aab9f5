"""Guards against results that would be wrong without looking wrong."""

import re

import pytest
from conftest import run_stage
from shell import contents, error_of, read_json

from utils.config import UserError, load_config


@pytest.mark.parametrize("score", ["mutual_information", "variation_ratio"])
def test_disagreement_of_equal_views_is_refused(run_copy, config_file, capsys, score):
    views = ["filter.views.crop_padding=0", "filter.views.hflip_p=1", "filter.views.vflip_p=0"]  # always flipped alike
    argv = ["--config", config_file, f"output_dir={run_copy}", f"filter.score={score}", "--force"]
    before = contents(run_copy / "planted/seed0/uncertainty")
    said = error_of(capsys, "uncertainty_filter", *argv, *views)
    assert (
        said
        == f"filter.score: {score} needs views that differ, and filter.views changes nothing; use entropy or margin"
    )
    assert contents(run_copy / "planted/seed0/uncertainty") == before
    run_stage("uncertainty_filter", *argv, *views[:1], "filter.views.hflip_p=0.5")


def test_a_producer_made_otherwise_is_noted_once_and_used_as_it_is(run_copy, config_file, capsys):
    argv = ["--config", config_file, f"output_dir={run_copy}", "filter.keep_fraction=0.5"]
    capsys.readouterr()
    run_stage("cluster_fine", *argv, "cluster.method=oracle")
    said = capsys.readouterr().err
    note = f"note: {run_copy}/planted/seed0/uncertainty was made with other settings"
    assert said.count(note) == 1 and "filter.keep_fraction was 0.9, now 0.5" in said


def test_no_note_about_labels_of_another_method(run_copy, config_file, capsys):
    argv = ["--config", config_file, f"output_dir={run_copy}"]
    run_stage("cluster_fine", *argv, "cluster.method=oracle")
    run_stage("finetune", *argv, "finetune.labels=oracle", "finetune.fine_epochs=1", "finetune.coarse_epochs=1")
    assert "note:" not in capsys.readouterr().err
    assert read_json(run_copy / "planted/seed0/finetune/oracle/metrics.json")["labels"] == "oracle"


def test_labels_that_nobody_makes_are_not_offered_as_clusters(run_copy, config_file, capsys):
    said = error_of(capsys, "finetune", "--config", config_file, f"output_dir={run_copy}", "finetune.labels=falcon")
    assert said.startswith(
        f"{run_copy}/planted/seed0/labels/falcon is missing; there are: umap_hdbscan; cluster_fine.py"
    )
    assert "`" not in said


@pytest.mark.parametrize("match", ["uncertainty", "labels/umap_hdbscan", "finetune/../x", "finetune/"])
def test_only_a_learner_has_a_budget_to_match(match):
    with pytest.raises(UserError, match="coarse.match: "):
        load_config("", (f"coarse.match={match}",))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("coarse.match=finetune/umap_hdbscan", "coarse.match: reproduce.py sets it where it is due"),
        ("reproduce.labels=[]", "reproduce.labels: nothing is left to learn from"),
        ("reproduce.labels=[random]", "reproduce.labels: random shuffles what a discoverer found"),
        ("reproduce.labels=[falcon]", "reproduce.labels: falcon is no cluster.method"),
    ],
)
def test_reproduce_refuses_what_cannot_work(config_file, tmp_path, capsys, override, message):
    said = error_of(capsys, "reproduce", "--config", config_file, f"output_dir={tmp_path}", override)
    assert said.startswith(message) and not list(tmp_path.iterdir())


def test_commands_survive_the_shell_and_replace_settings(config_file):
    import shlex

    cfg = load_config(str(config_file), ("seeds=[0, 1]", "output_dir=my runs", "finetune.labels=random"))
    words = shlex.split(cfg.command("finetune.py", **{"finetune.labels": "oracle"}))
    assert words[1:] == [
        "finetune.py",
        "--config",
        str(config_file),
        "seeds=[0, 1]",
        "output_dir=my runs",
        "finetune.labels=oracle",
    ]
    assert not re.search("finetune.labels", cfg.command("finetune.py", **{"finetune.labels": ""}))
