"""speed=plain is the slow reference: the fast paths give the same batches, probabilities and weights."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import planted_images, run_stage
from shell import error_of, history, read_json

from utils import augment, loader, models, plain, training, uncertainty
from utils.config import (
    Config,
    CropFlipConfig,
    FilterConfig,
    LoaderConfig,
    ModelConfig,
    StrongConfig,
    TrainConfig,
    ViewsConfig,
    load_config,
)
from utils.splits import Split

CPU = torch.device("cpu")
FAST, PLAIN = training.Runtime(CPU, bf16=False), training.Runtime(CPU, bf16=False, is_plain=True)
NO_COLOUR = StrongConfig(resized_crop_scale=0.5, jitter_p=0, grey_p=0, blur_p=0.5)


def a_split(channels: int = 3, n: int = 24) -> Split:
    grey = planted_images(n // 6, 0)[0][..., None]
    images = np.concatenate([grey // (c + 1) for c in range(channels)], axis=3)
    return Split(images, np.zeros(n, np.int64), None, None, np.arange(n))


def config(**changes) -> Config:
    return Config(seed=3, train=TrainConfig(batch_size=8), **changes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"augment": "none"},
        {"crop_flip": CropFlipConfig(2, 0.5, 0.5)},
        {"crop_flip": CropFlipConfig(0, 0.5, 0, cutout=3)},
        {"augment": "strong", "strong": NO_COLOUR},
    ],
    ids=["none", "crop_flip", "cutout", "strong"],
)
def test_a_data_loader_makes_the_same_batches(channels, settings):
    cfg, inputs, rows = config(**settings), loader.Inputs(a_split(channels), CPU), np.arange(1, 22)
    fast = list(loader.training_batches(cfg, inputs, rows, 4, first_step=1))
    slow = list(plain.training_batches(cfg, inputs, rows, 4, first_step=1))
    assert len(fast) == len(slow) == 1
    for (rows_a, a), (rows_b, b) in zip(fast, slow, strict=True):
        assert np.array_equal(rows_a, rows_b)
        torch.testing.assert_close(a, b, rtol=0, atol=0 if a.dtype == torch.uint8 else 1e-6)


def test_a_data_loader_gives_vectors_as_they_are():
    split = Split(
        np.random.default_rng(0).random((20, 3), np.float32), np.zeros(20, np.int64), None, None, np.arange(20)
    )
    inputs = loader.Inputs(split, CPU)
    for rows, batch in plain.training_batches(config(), inputs, np.arange(20), 0):
        np.testing.assert_array_equal(batch.numpy(), split.inputs[rows])


@pytest.mark.parametrize(
    "views",
    [ViewsConfig(), ViewsConfig(1, 0.5, 0), ViewsConfig(0, 0, 1), ViewsConfig(0, 0.5, 0.5, cutout=4)],
    ids=["flips", "crops", "fixed", "cutout"],
)
def test_probabilities_of_views_are_those_of_one_image_at_a_time(views):
    split = a_split()
    cfg = config(filter=FilterConfig(n_views=5, views=views, batch_size=35))
    torch.manual_seed(0)
    network = models.Network(models.build_backbone(ModelConfig(width=4), split, np.arange(24)), 3)
    inputs, rows = loader.Inputs(split, CPU), np.arange(24)
    fast = np.concatenate(list(uncertainty.view_probs(cfg, FAST, network, inputs, rows)))
    slow = np.concatenate(list(uncertainty.view_probs(cfg, PLAIN, network, inputs, rows)))
    assert fast.shape == (24, 5, 3)
    np.testing.assert_allclose(fast, slow, atol=1e-4)


@pytest.mark.parametrize("views", [ViewsConfig(), ViewsConfig(0, 0, 0), ViewsConfig(1, 0.5, 0), ViewsConfig(0, 1, 0.5)])
def test_no_view_is_lost_by_leaving_out_repetitions(views):
    cfg, split, rows = config(filter=FilterConfig(n_views=6, views=views)), a_split(), np.arange(3, 24)
    batch = loader.Inputs(split, CPU).take(rows)
    images, index = loader.distinct_views(cfg, batch, rows)
    assert torch.equal(images[index], loader.view_batch(cfg, batch, rows))
    most = 4 if augment.only_flips(views, 3) else 6
    assert len(images) <= most * len(rows)
    if views.hflip_p in (0, 1):  # only the vertical flip is left to draw
        assert len(images) <= 2 * len(rows)


def test_the_views_of_a_vector_are_predicted_once():
    cfg, batch = config(filter=FilterConfig(n_views=4)), torch.randn(3, 2)
    vectors, index = loader.distinct_views(cfg, batch, np.arange(3))
    assert torch.equal(vectors, batch) and index.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_plain_is_fp32_contiguous_unfused_and_one_class_at_a_time():
    cfg = load_config("", ("speed=plain",))
    assert (cfg.precision, cfg.compile, cfg.loader.placement) == ("fp32", "never", "host")
    assert (cfg.cluster.knn, cfg.cluster.n_jobs) == ("umap", 1)
    runtime = training.pick_runtime(load_config("", ("speed=plain", "device=cpu")))
    conv = runtime.place(torch.nn.Conv2d(2, 2, 3))
    assert runtime.is_plain and conv.weight.is_contiguous()
    assert training.make_optimizer(cfg, conv, 0.1).defaults["fused"] is False
    assert training.make_optimizer(Config(), conv, 0.1).defaults["fused"] is True


def test_plain_has_one_precision(capsys, config_file):
    said = error_of(capsys, "train_coarse", "--config", config_file, "speed=plain", "precision=bf16")
    assert said == "precision: speed=plain computes in fp32; leave precision=bf16 out"


def test_plain_trains_and_filters_as_fast_does(run_copy, config_file, tmp_path):
    """Low rate: the two differ in rounding, which training amplifies."""
    gentle = ["coarse.lr=1e-3", "coarse.epochs=2", "train.batch_size=66"]
    folders = []
    for speed in ("fast", "plain"):
        argv = ["--config", config_file, f"output_dir={tmp_path / speed}", f"speed={speed}", *gentle]
        run_stage("train_coarse", *argv)
        folders.append(tmp_path / speed / "planted/seed0")
    fast, slow = (history(folder / "coarse") for folder in folders)
    for a, b in zip(fast, slow, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    run_stage("uncertainty_filter", "--config", config_file, f"output_dir={tmp_path / 'plain'}", *gentle, "speed=plain")
    scores = np.load(folders[1] / "uncertainty/scores.npy")
    run_stage("uncertainty_filter", "--config", config_file, f"output_dir={tmp_path / 'plain'}", *gentle, "--force")
    np.testing.assert_allclose(np.load(folders[1] / "uncertainty/scores.npy"), scores, atol=1e-4)
    assert read_json(folders[1] / "uncertainty/manifest.json")["config"]["speed"] == "fast"


def test_where_the_images_wait_changes_no_bit(config_file, tmp_path):
    for placement in ("device", "host"):
        argv = ["--config", config_file, f"output_dir={tmp_path / placement}", "coarse.epochs=2"]
        run_stage("train_coarse", *argv, f"loader.placement={placement}", "loader.prefetch=3")
    states = [(tmp_path / p / "planted/seed0/coarse/model.pt").read_bytes() for p in ("device", "host")]
    assert states[0] == states[1]
    assert dataclasses.asdict(LoaderConfig())["placement"] == "auto"


# torch.compile


@pytest.fixture
def compiled(monkeypatch):
    """The models that torch.compile was asked for; it hands back the model itself."""
    models_seen = []
    monkeypatch.setattr(torch, "compile", lambda model: models_seen.append(model) or model)
    return models_seen


def train(config_file, output_dir, *settings):
    run_stage("train_coarse", "--config", config_file, f"output_dir={output_dir}", "coarse.epochs=3", *settings)
    return [line["compiled"] for line in history(output_dir / "planted/seed0/coarse")]


def test_compile_always_and_never(config_file, tmp_path, compiled):
    assert train(config_file, tmp_path / "a", "compile=never") == [False] * 3 and not compiled
    assert train(config_file, tmp_path / "b", "compile=always") == [True] * 3 and len(compiled) == 1


def test_a_short_run_is_not_worth_a_trial(config_file, tmp_path, compiled):
    assert train(config_file, tmp_path) == [False] * 3 and not compiled


@pytest.mark.parametrize("speedup", [1.5, 0.5])
def test_a_long_run_is_compiled_if_its_trial_pays(config_file, tmp_path, compiled, monkeypatch, capsys, speedup):
    """With steps that are said to take 1 / speedup as long when compiled."""
    monkeypatch.setattr(training, "COMPILE_TRIAL", 0)
    reference = train(config_file, tmp_path / "reference", "compile=never")
    steps = iter([30.0, *[1.0] * 5, *[1.0 / speedup] * 5])
    monkeypatch.setattr(training, "timed_steps", lambda *args, repeats: [next(steps) for _ in range(repeats)])
    assert train(config_file, tmp_path / "auto") == [False, speedup > 1, speedup > 1] and len(compiled) == 1
    said = capsys.readouterr().err
    assert "torch.compile took 30 s" in said and ("on for" if speedup > 1 else "off for") in said
    states = [(tmp_path / name / "planted/seed0/coarse/model.pt").read_bytes() for name in ("reference", "auto")]
    assert states[0] == states[1] and len(reference) == 3


def test_a_trial_that_fails_leaves_training_as_it_was(config_file, tmp_path, compiled, monkeypatch, capsys):
    def fail(*args, repeats):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    monkeypatch.setattr(training, "COMPILE_TRIAL", 0)
    monkeypatch.setattr(training, "timed_steps", fail)
    assert train(config_file, tmp_path) == [False] * 3
    said = capsys.readouterr().err
    assert "coarse: torch.compile failed (InvalidCxxCompiler: No working C++ compiler found); going on without" in said
