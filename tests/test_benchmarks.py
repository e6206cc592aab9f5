"""benchmarks/: what each figure returns at tiny sizes, that both sides do the same work, and its files; no times."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_stage

from benchmarks import __main__ as command
from benchmarks import memory, pipeline, report, setting, train, uncertainty
from benchmarks.figures import FIGURES, Figure
from benchmarks.timing import compare
from utils.config import load_config

KEYS = {"ratio", "ours", "peer", "unit", "ratios"}
RUN = {
    "device": "Some CPU, 2 cores", "device_type": "cpu", "cores": 2, "threads": 2, "amx": False, "avx512_bf16": True,
    "precision": "bf16", "quick": False, "versions": {"python": "3.11"}, "commit": "abc", "dirty": True,
    "date": "2026-01-01", "command": "python -m benchmarks",
}  # fmt: skip


def check_figure(figure: dict) -> None:
    assert figure.keys() >= KEYS
    assert all(math.isfinite(value) and value > 0 for value in (figure["ratio"], *figure["ratios"]))
    json.dumps(figure, allow_nan=False)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(setting, "WIDTH", 2)
    sizes = {"N_ROWS": 40, "BATCH_SIZE": 8, "PRODUCT_SIDE": 16, "PRODUCTS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(train, name, {"cpu": size, "cuda": size})
    monkeypatch.setattr(train, "STEPS", dict.fromkeys(("cpu", "cuda"), {True: 1, False: 2}))
    monkeypatch.setattr(uncertainty, "N_IMAGES", dict.fromkeys(("cpu", "cuda"), {True: 6, False: 6}))
    for module in (train, uncertainty):
        monkeypatch.setattr(module, "REPEATS", {True: 2, False: 2})


# Timing


def test_compare_runs_in_turns():
    calls = []
    figure = compare(lambda: calls.append("a"), lambda: calls.append("b"), 10, "images/s", repeats=3, warmup=1)
    assert "".join(calls) == "ab" * 4
    assert figure.keys() == KEYS and len(figure["ratios"]) == 3 and figure["unit"] == "images/s"


# Training


def test_train_figure(tiny):
    figure = train.train(quick=True)
    check_figure(figure)
    assert figure["unit"] == "images/s" and len(figure["ratios"]) == 2


def test_both_training_steps_change_every_parameter(tiny, monkeypatch):
    networks = []
    original = setting.Setting.network
    monkeypatch.setattr(setting.Setting, "network", lambda self: networks.append(original(self)) or networks[-1])
    opened = train.open_train()
    for make in (train.our_step, train.peer_step):
        make(opened)()
        fresh = original(opened).state_dict()
        moved = [not torch.equal(fresh[name], value.cpu()) for name, value in networks[-1].named_parameters()]
        assert all(moved), make


def test_train_limit_figure_has_shares_of_the_whole_time(tiny):
    figure = train.train_limit(quick=True)
    check_figure(figure)
    assert figure["shares"].keys() == {*(name for name, _ in train.FAMILIES), "other"}
    assert sum(figure["shares"].values()) == pytest.approx(1) and figure["busy"] > 0
    assert figure["shares"]["convolution backward"] > 0 and figure["shares"]["data"] > 0


def test_step_flops_is_three_forward_passes_but_for_the_gradient_of_the_images(tiny):
    opened = train.open_train()
    network, sizes = opened.network(), []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            hook = lambda m, _, out: sizes.append(m.weight[0].numel() * out[0].numel())  # noqa: E731
            module.register_forward_hook(hook)
    network(torch.zeros(2, 1, setting.SIDE, setting.SIDE))
    assert train.step_flops(opened) == 2 * (3 * sum(sizes) - sizes[0]) * opened.cfg.train.batch_size


@pytest.mark.parametrize(
    "names, family",
    [
        (["aten::copy_", "aten::pad", train.DATA], "data"),
        (["aten::fill_", "aten::convolution_backward"], "convolution backward"),
        (["aten::mkldnn_convolution", "aten::conv2d"], "convolution forward"),
        (["aten::native_batch_norm"], "batch norm"),
        (["aten::_fused_sgd_", "Optimizer.step#SGD.step"], "optimiser"),
        (["aten::threshold_backward"], "elementwise"),
        (["aten::mm"], "other"),
    ],
)
def test_family_of_an_operator_is_its_own_or_its_callers(names, family):
    event = None
    for name in reversed(names):
        event = types.SimpleNamespace(name=name, cpu_parent=event)
    assert train.family_of(event) == family


# Uncertainty


def test_uncertainty_figure(tiny):
    check_figure(uncertainty.uncertainty(quick=True))


def test_both_scorings_give_the_same_probabilities_where_views_are_certain(tiny):
    views = ("filter.views.hflip_p=1", "filter.views.vflip_p=0", "filter.batch_size=10", "precision=fp32")
    opened = setting.open_setting(5, f"filter.n_views={uncertainty.N_VIEWS}", *views)
    ours, peer = (make(opened)() for make in (uncertainty.our_scoring, uncertainty.peer_scoring))
    assert ours.shape == peer.shape == (5, uncertainty.N_VIEWS, setting.N_CLASSES)
    np.testing.assert_allclose(ours, peer, atol=1e-4)
    assert np.ptp(ours[:, 0], axis=0).max() > 1e-3  # images differ


# Memory


def test_peak_memory_counts_what_a_process_holds_and_not_the_file_it_maps(tmp_path):
    np.save(tmp_path / "big.npy", np.ones(150_000_000, np.uint8))
    wait = "import time; time.sleep(0.2)"
    mapped = f"import numpy as np; total = int(np.load(r'{tmp_path / 'big.npy'}', mmap_mode='r').sum()); {wait}"
    assert memory.peak_memory(["-c", mapped]) < 100
    assert memory.peak_memory(["-c", f"x = b'1' * 150_000_000; {wait}"]) > 150


def test_peak_memory_names_a_command_that_fails():
    with pytest.raises(RuntimeError, match="no such place"):
        memory.peak_memory(["-c", "raise SystemExit('no such place')"])


@pytest.mark.parametrize("quick", [True, False])
def test_extract_memory_figure_runs_both_stages_on_both_sizes(monkeypatch, quick):
    ran = []

    def run_here(argv: list[str]) -> float:
        script = Path(argv[0]).stem
        if argv[0] != "-c":
            run_stage(script, *argv[1:])
            ran.append((script, next(arg for arg in argv if arg.startswith("loader."))))
        return 100.0 + len(ran)

    monkeypatch.setattr(memory, "peak_memory", run_here)
    monkeypatch.setattr(memory, "N_ROWS", {quick: (8, 80)})
    figure = memory.extract_memory(quick)
    check_figure(figure)
    extract, host = "extract_features", "loader.placement=host"
    default = [] if quick else [(extract, "loader.placement=auto")]
    assert sorted(ran) == sorted(2 * [(extract, host), ("uncertainty_filter", host), *default])
    assert figure["peaks_mb"].keys() == {"extract", "filter"} | (set() if quick else {"default", "baseline"})
    assert figure["rows"] == [8, 80] and figure.keys() >= {"filter_ratio", "default_ratio", "peaks_mb"}


# Pipeline


def test_pipeline_figure_runs_every_stage_on_both_sides(monkeypatch):
    ran = []

    def pretend(stages: list[str], argv: list[str]) -> None:
        assert argv[0] == "--config"
        cfg = load_config(argv[1], tuple(argv[2:]))
        ran.extend((stage, cfg.speed) for stage in stages)
        for stage in pipeline.LEARNERS.keys() & stages:
            path = cfg.run_dir / pipeline.LEARNERS[stage].replace("*", "x") / "metrics.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"test": {"accuracy": 0.5 if cfg.speed == "fast" else 0.25}}))

    monkeypatch.setattr(pipeline, "run_stages", pretend)
    for quick in (True, False):
        figure = pipeline.pipeline(quick)
        check_figure(figure)
        assert sorted(ran) == sorted((stage, speed) for stage in pipeline.STAGES for speed in ("fast", "plain"))
        assert set(figure["ours_accuracy"].values()) == {0.5} and set(figure["peer_accuracy"].values()) == {0.25}
        assert figure["stage_seconds"].keys() == ({"all"} if quick else set(pipeline.STAGES))
        ran.clear()


def test_pipeline_says_which_stage_failed():
    with pytest.raises(RuntimeError, match="train_coarse .*missing.yaml"):
        pipeline.run_stages(["train_coarse"], ["--config", "missing.yaml"])


# The command


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    """Figures good (a rate), wrong (raises), stops (exits) and absent (no such module) in place of the real ones."""
    module = types.ModuleType("benchmarks.stub")
    module.good = lambda quick: compare(lambda: None, lambda: None, 1, "images/s", 2)
    module.wrong = lambda quick: 1 / 0
    module.stops = lambda quick: sys.exit(2)
    monkeypatch.setitem(sys.modules, "benchmarks.stub", module)
    figures = {name: Figure("stub", f"{name} / peer", 0.0, None) for name in ("wrong", "stops", "good")}
    figures["absent"] = Figure("no_such_module", "absent / peer", 1.0, None)
    for user in (command, report):
        monkeypatch.setattr(user, "FIGURES", figures)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")


def test_a_run_writes_json_table_and_plot(stubs, tmp_path, capsys):
    command.main(["--quick", "--only", "good", "--device", "cpu", "--out", str(tmp_path / "out.json")])
    run = json.loads((tmp_path / "out.json").read_text())
    assert run.keys() == RUN.keys() | {"figures"} and run["quick"] is True
    assert run["figures"]["good"].keys() == KEYS | {"target", "took_s", "commit"}
    assert capsys.readouterr().out.startswith("good ")
    assert "| good | good / peer |" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_failing_figures_are_reported_and_the_others_still_run(stubs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--out", "auto"])
    assert stop.value.code == 1
    [path] = (tmp_path / "results").glob("bench-*.json")
    figures = json.loads(path.read_text())["figures"]
    errors = {name: figure["error"] for name, figure in figures.items() if "error" in figure}
    assert errors["wrong"] == "ZeroDivisionError: division by zero" and errors["stops"] == "SystemExit: 2"
    assert "no_such_module" in errors["absent"] and "\n" not in errors["absent"]
    assert "ratio" in figures["good"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["wrong", "stops", "good", "absent"]
    assert "failed: ZeroDivisionError" in path.with_suffix(".md").read_text()


def test_unknown_figures_and_a_missing_gpu_are_the_users_to_mend(stubs, capsys, monkeypatch):
    for argv in (["--only", "speed"], ["--device", "cuda"]):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit) as stop:
            command.main(argv)
        assert stop.value.code == 2
    assert "there is no CUDA device" in capsys.readouterr().err


def test_slug_is_a_file_name():
    assert command.slug("AMD EPYC, 2 cores") == "amd-epyc-2-cores"
    assert command.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_targets_are_bounds_from_the_right_side():
    at_least, at_most = FIGURES["train"], FIGURES["extract_memory"]
    assert at_least.reached(3, 3) and not at_least.reached(2.9, 3)
    assert at_most.reached(1.2, 1.2) and not at_most.reached(1.3, 1.2)
    assert FIGURES["train_limit"].target("cpu") is None and at_least.reached(9, None) is None


# The table and the plot


def figure_of(ours: float, peer: float, unit: str, **more) -> dict:
    return {"ratio": ours / peer, "ours": ours, "peer": peer, "unit": unit, "ratios": [ours / peer], "target": 2.0,
            "took_s": 1.0, **more}  # fmt: skip


@pytest.fixture
def full_run() -> dict:
    scale = {"rows": [1000, 2000, 8000], "seconds": [1.0, 2.1, 9.9], "peak_mb": [500, 510, 550]}
    stages = {stage: {"ours": 1.0, "peer": 2.0} for stage in pipeline.STAGES}
    accuracy = {stage: 0.875 for stage in pipeline.LEARNERS}
    peaks = {"filter_ratio": 1.1, "default_ratio": 1.9, "peaks_mb": {"baseline": [200.0]}, "rows": [10, 100]}
    figures = {
        "train": figure_of(300, 100, "images/s"),
        "train_limit": figure_of(0.1, 0.4, "TFLOP/s", shares={"data": 0.25, "other": 0.75}, busy=0.5),
        "uncertainty": figure_of(123456, 100, "images/s"),
        "cluster_scale": {"ratio": 1.1, "unit": "log s / log rows", "target": 1.2, "took_s": 9.0, **scale},
        "extract_memory": figure_of(210, 200, "MB", **peaks, image_bytes=9, measure="peak anonymous memory"),
        "pipeline": figure_of(
            10, 20, "s", stage_seconds=stages, ours_accuracy=accuracy, peer_accuracy=accuracy, data="digits.yaml"
        ),
    }
    return {"figures": figures, **RUN}


def test_report_remakes_table_and_plot_from_a_json(full_run, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(full_run))
    report.main([str(path)])
    text = path.with_suffix(".md").read_text()
    for part in ("data 25%, other 75%", "8,000 rows 9.9 s 550 MB", "87.50 / 87.50", "123,456", "AVX512-BF16",
                 "with local changes", "default placement the ratio is 1.9", "](run.png)"):  # fmt: skip
        assert part in text
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert len(report.plot(full_run).axes) == 3


def test_without_a_figure_to_draw_there_is_no_plot(full_run, tmp_path):
    full_run["figures"] = {"pipeline": {"error": "RuntimeError: a | b", "target": 3, "took_s": 1.0}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(full_run))
    assert report.write(path) == [path.with_suffix(".md")]
    assert "RuntimeError: a / b" in path.with_suffix(".md").read_text() and not path.with_suffix(".png").exists()


def test_report_turns_away_what_is_no_run(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for argv in ([], ["run.md"], [str(tmp_path / "other.json")], [str(tmp_path / "missing.json")]):
        with pytest.raises(SystemExit) as stop:
            report.main(argv)
        assert stop.value.code == 2


@pytest.mark.skipif(not shutil.which("make"), reason="make is not on this machine")
def test_make_bench_measures_into_results():
    done = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "-m benchmarks --out auto" in done.stdout


def test_every_figure_is_described():
    assert list(FIGURES) == [
        "loader", "train", "train_limit", "uncertainty", "cluster", "cluster_scale", "extract_memory", "pipeline"
    ]  # fmt: skip
    assert all(dataclasses.astuple(figure)[1] for figure in FIGURES.values())


def test_only_leaves_the_other_figures_of_a_file(stubs, tmp_path):
    path = tmp_path / "bench.json"
    argv = ["--quick", "--only", "good", "--device", "cpu", "--out", str(path)]
    command.main(argv)
    run = json.loads(path.read_text())
    run["figures"]["absent"] = {**run["figures"]["good"], "commit": "older"}
    path.write_text(json.dumps(run))
    command.main(argv)
    assert list(json.loads(path.read_text())["figures"]) == ["good", "absent"]
    assert "Of commit older: absent." in path.with_suffix(".md").read_text()
    run["threads"] = 99  # measured otherwise
    path.write_text(json.dumps(run))
    command.main(argv)
    assert list(json.loads(path.read_text())["figures"]) == ["good"]
