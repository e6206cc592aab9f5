"""utils/loader.py: the order of rows and every augmentation follow from integers, not from batches or memory."""

import threading
import time

import numpy as np
import pytest
import torch
from conftest import run_stage

from utils import augment, loader
from utils.config import (
    Config,
    CropFlipConfig,
    FilterConfig,
    LoaderConfig,
    StrongConfig,
    TrainConfig,
    UserError,
    ViewsConfig,
)
from utils.splits import Split

CPU = torch.device("cpu")


def image_split(n=40, shape=(7, 5, 3), path=None) -> Split:
    """Images whose pixels name their row; with `path`, a read-only memory map of that file."""
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (n, *shape), dtype=np.uint8)
    if path is not None:
        np.save(path, images)
        images = np.load(path, mmap_mode="r")
    return split_of(images)


def split_of(inputs) -> Split:
    n = len(inputs)
    return Split(inputs, np.zeros(n, np.int64), None, None, np.arange(n))


def vector_split(n=40) -> Split:
    return split_of(np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32))


def config(**changes) -> Config:
    settings = {"seed": 3, "train": TrainConfig(batch_size=8), "crop_flip": CropFlipConfig(2, 0.5, 0.5)}
    return Config(**{**settings, **changes})


HOST, DEVICE = LoaderConfig(placement="host"), LoaderConfig(placement="device")
BLURRED = StrongConfig(blur_p=0.5, rotation=20, cutout=3)


def run_epoch(cfg, inputs, rows, epoch=0, first_step=0):
    """(rows of all batches, their inputs) as two arrays."""
    batches = list(loader.training_batches(cfg, inputs, rows, epoch, first_step))
    return np.concatenate([r for r, _ in batches]), torch.cat([x for _, x in batches])


ROWS = np.arange(1, 38)  # 37 rows: four batches of eight, five left over


# Order


def test_epoch_rows_are_whole_batches_of_distinct_rows():
    batches = loader.epoch_rows(ROWS, 0, 0, 8)
    assert batches.shape == (4, 8) and loader.steps_in_epoch(37, 8) == 4
    assert len(np.unique(batches)) == 32 and np.isin(batches, ROWS).all()


def test_epoch_rows_depend_on_seed_and_epoch_alone():
    first = loader.epoch_rows(ROWS, 0, 0, 8)
    np.random.seed(1)
    assert np.array_equal(first, loader.epoch_rows(ROWS, 0, 0, 8))
    assert not np.array_equal(first, loader.epoch_rows(ROWS, 1, 0, 8))
    assert not np.array_equal(first, loader.epoch_rows(ROWS, 0, 1, 8))


def test_epoch_rows_come_in_the_same_order_whatever_the_batch_size():
    small, large = loader.epoch_rows(ROWS, 0, 0, 4).ravel(), loader.epoch_rows(ROWS, 0, 0, 12).ravel()
    assert np.array_equal(small, large)


def test_every_row_is_seen_over_the_epochs():
    seen = np.concatenate([loader.epoch_rows(ROWS, 0, epoch, 8).ravel() for epoch in range(20)])
    assert np.array_equal(np.unique(seen), ROWS)
    counts = np.bincount(seen)[ROWS]  # 17.3 expected
    assert counts.min() >= 12


def test_a_set_smaller_than_a_batch_makes_one_step_of_all_its_rows():
    batches = loader.epoch_rows(ROWS, 0, 0, 256)
    assert batches.shape == (1, 37) and loader.steps_in_epoch(37, 256) == 1
    assert np.array_equal(np.sort(batches[0]), ROWS)


def test_a_set_of_one_batch_makes_one_step():
    assert loader.epoch_rows(np.arange(8), 0, 0, 8).shape == (1, 8)


# Training batches


def test_training_batches_without_augmentation_are_the_raw_images():
    split = image_split()
    rows, batch = run_epoch(config(augment="none"), loader.Inputs(split, CPU), ROWS)
    assert batch.dtype == torch.uint8 and batch.shape == (32, 3, 7, 5)
    np.testing.assert_array_equal(batch.numpy(), split.inputs[rows].transpose(0, 3, 1, 2))


def test_training_batches_are_augmented_by_position_in_the_epoch():
    cfg, split = config(), image_split()
    rows, batch = run_epoch(cfg, loader.Inputs(split, CPU), ROWS, epoch=5)
    raw = torch.from_numpy(split.inputs[rows]).permute(0, 3, 1, 2)
    draws = augment.uniform(3, augment.TRAIN, 5, torch.arange(32), n_draws=4)
    assert torch.equal(batch, augment.crop_flip(raw, draws, cfg.crop_flip))
    assert not torch.equal(batch, raw)


def test_strong_training_batches_follow_their_draws():
    cfg, split = config(augment="strong", strong=BLURRED), image_split()
    rows, batch = run_epoch(cfg, loader.Inputs(split, CPU), ROWS, epoch=5)
    raw = torch.from_numpy(split.inputs[rows]).permute(0, 3, 1, 2)
    draws = augment.uniform(3, augment.TRAIN, 5, torch.arange(32), n_draws=len(augment.Draw))
    torch.testing.assert_close(batch, augment.apply(raw, draws, BLURRED), atol=1e-6, rtol=0)
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)


def test_training_batches_depend_on_seed_and_epoch():
    inputs = loader.Inputs(image_split(), CPU)
    _, first = run_epoch(config(), inputs, ROWS)
    assert torch.equal(first, run_epoch(config(), inputs, ROWS)[1])
    assert not torch.equal(first, run_epoch(config(), inputs, ROWS, epoch=1)[1])
    assert not torch.equal(first, run_epoch(config(seed=4), inputs, ROWS)[1])


def test_batch_size_does_not_change_what_happens_to_an_image():
    inputs = loader.Inputs(image_split(), CPU)
    eight = run_epoch(config(), inputs, ROWS)
    four = run_epoch(config(train=TrainConfig(batch_size=4)), inputs, ROWS)
    assert np.array_equal(four[0][:32], eight[0]) and torch.equal(four[1][:32], eight[1])


@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "strong"])
@pytest.mark.parametrize("first_step", [1, 3])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_training_batches_from_a_later_step_are_the_tail_of_the_epoch(augmentation, first_step, placement):
    cfg = config(augment=augmentation, strong=BLURRED)
    inputs = loader.Inputs(image_split(), CPU, LoaderConfig(placement))
    rows, batch = run_epoch(cfg, inputs, ROWS, epoch=2)
    tail_rows, tail = run_epoch(cfg, inputs, ROWS, epoch=2, first_step=first_step)
    assert np.array_equal(tail_rows, rows[8 * first_step :]) and torch.equal(tail, batch[8 * first_step :])


def test_training_batches_of_a_small_set():
    rows, batch = run_epoch(config(train=TrainConfig(batch_size=256)), loader.Inputs(image_split(), CPU), ROWS)
    assert len(rows) == len(batch) == 37


def test_vectors_are_never_augmented():
    split = vector_split()
    rows, batch = run_epoch(config(), loader.Inputs(split, CPU), ROWS)
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), split.inputs[rows])


# Where the images live


def test_inputs_are_channels_last_in_memory():
    batch = loader.Inputs(image_split(), CPU).take(np.array([3, 1]))
    assert batch.shape == (2, 3, 7, 5) and batch.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(loader, "_announced", set())


def view_inputs(cfg, inputs, rows) -> torch.Tensor:
    return torch.cat([loader.view_batch(cfg, batch, r) for r, batch in inputs.batches(loader.blocks(rows, 5))])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["images", "grey", "vectors"])
@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "strong"])
def test_every_placement_gives_the_same_batches(kind, augmentation, tmp_path):
    shape = (7, 5, 1 if kind == "grey" else 3)
    np.save(tmp_path / "x.npy", vector_split().inputs if kind == "vectors" else image_split(shape=shape).inputs)
    split = split_of(np.load(tmp_path / "x.npy", mmap_mode="r"))
    device, host = loader.Inputs(split, CPU, DEVICE), loader.Inputs(split, CPU, HOST)
    assert device.resident is not None and host.resident is None and len(host) == len(device) == 40
    cfg = config(augment=augmentation, strong=BLURRED, filter=FilterConfig(n_views=2, views=ViewsConfig(blur_p=0.5)))
    for made in (lambda i: run_epoch(cfg, i, ROWS)[1], lambda i: view_inputs(cfg, i, ROWS), lambda i: i.take(ROWS)):
        assert torch.equal(made(device), made(host))
    assert host.take(ROWS).stride() == device.take(ROWS).stride()


@pytest.mark.parametrize(("share", "placement"), [(0.4, "device"), (0, "host")])
def test_auto_decides_by_free_memory_and_says_so_once(share, placement, monkeypatch, capsys):
    monkeypatch.setattr(loader, "RESIDENT_SHARE", share)
    monkeypatch.setattr(loader, "free_bytes", lambda device: 10**9)
    for _ in range(2):
        assert (loader.Inputs(image_split(), CPU).resident is not None) == (placement == "device")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"loader.placement: {placement} (0.00 GB of inputs, 1.00 GB free on cpu: ")
    loader.Inputs(image_split(8), CPU)
    assert len(capsys.readouterr().err.splitlines()) == 1  # another set


def test_one_process_of_several_says_what_auto_chose(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    loader.Inputs(image_split(), CPU)
    assert not capsys.readouterr().err


def test_a_wanted_placement_is_kept_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(loader, "RESIDENT_SHARE", 0)
    assert loader.Inputs(image_split(), CPU, DEVICE).resident is not None
    assert loader.Inputs(image_split(), CPU, HOST).resident is None
    assert not capsys.readouterr().err


def test_a_set_too_large_for_the_device_is_refused(monkeypatch):
    monkeypatch.setattr(loader, "free_bytes", lambda device: 4199)
    with pytest.raises(UserError, match=r"^loader.placement: device is too small \(0.00 GB .* use auto or host$"):
        loader.Inputs(image_split(), CPU, DEVICE)
    monkeypatch.setattr(loader, "free_bytes", lambda device: 4200)
    loader.Inputs(image_split(), CPU, DEVICE)


def test_a_set_is_copied_to_the_device_in_blocks(monkeypatch):
    monkeypatch.setattr(loader, "COPY_BYTES", 7 * 7 * 5 * 3)
    split = image_split()
    np.testing.assert_array_equal(loader.Inputs(split, CPU, DEVICE).take(ROWS).permute(0, 2, 3, 1), split.inputs[ROWS])


@pytest.mark.parametrize("settings", [HOST, DEVICE], ids=["host", "device"])
def test_writing_into_a_batch_changes_no_image(settings, tmp_path):
    inputs = loader.Inputs(image_split(path=tmp_path / "x.npy"), CPU, settings)
    before = inputs.take(ROWS).clone()
    inputs.take(ROWS).zero_()
    assert torch.equal(inputs.take(ROWS), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "strong"])
def test_on_cuda_the_placements_give_the_batches_of_the_cpu(augmentation):
    """Many epochs of large batches, each read late, so that a copy that is not waited for would show."""
    split, rows, cuda = image_split(4000, (32, 32, 3)), np.arange(4000), torch.device("cuda")
    cfg = config(augment=augmentation, strong=BLURRED, train=TrainConfig(batch_size=500))
    host, device = loader.Inputs(split, cuda, HOST), loader.Inputs(split, cuda, DEVICE)
    cpu = loader.Inputs(split, CPU, DEVICE)
    for epoch in range(5):
        sums = []
        for (_, a), (_, b) in zip(*(loader.training_batches(cfg, i, rows, epoch) for i in (host, device)), strict=True):
            torch.cuda._sleep(10**6)
            sums.append(((a.double() - b.double()).abs().max(), a.double().mean()))
        expected = [batch.double().mean() for _, batch in loader.training_batches(cfg, cpu, rows, epoch)]
        assert max(float(gap) for gap, _ in sums) == 0
        for (_, found), mean in zip(sums, expected, strict=True):
            assert float(found) == pytest.approx(float(mean), rel=1e-5)


# Ahead of the step


class SlowArray:
    """An array whose every gather is noted, may wait for leave, and fails at row `bad`."""

    def __init__(self, array, bad=None):
        self.array, self.bad, self.gathered = array, bad, []
        self.shape, self.nbytes, self.ndim = array.shape, array.nbytes, array.ndim
        self.leave = threading.Semaphore(10**6)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        self.leave.acquire()
        self.gathered.append(rows.tolist())
        if self.bad in rows:
            raise OSError("the disk is gone")
        return self.array[rows]


def slow_inputs(prefetch=2, bad=None) -> loader.Inputs:
    split = split_of(SlowArray(image_split().inputs, bad))
    return loader.Inputs(split, CPU, LoaderConfig(placement="host", prefetch=prefetch))


def gather_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gather")]


def wait_until(condition, seconds=20) -> None:
    for _ in range(seconds * 100):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_so_many_batches_are_gathered_ahead_and_no_more(prefetch):
    inputs = slow_inputs(prefetch)
    batches = inputs.batches(loader.blocks(np.arange(40), 4))
    for taken in range(1, 4):
        next(batches)
        wait_until(lambda taken=taken: len(inputs.array.gathered) == taken + prefetch)
        time.sleep(0.02)
        assert len(inputs.array.gathered) == taken + prefetch
    assert inputs.array.gathered == [list(range(start, start + 4)) for start in range(0, 4 * (3 + prefetch), 4)]
    batches.close()


def test_batches_come_in_order_and_the_thread_ends_with_them():
    inputs = slow_inputs()
    rows = np.random.default_rng(0).permutation(40)
    found = list(inputs.batches(loader.blocks(rows, 7)))
    assert np.array_equal(np.concatenate([r for r, _ in found]), rows) and len(found) == 6
    for r, batch in found:
        np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), inputs.array.array[r])
    assert not gather_threads()


def test_no_batches():
    assert list(slow_inputs().batches([])) == []


def test_an_error_of_the_thread_comes_at_its_batch():
    inputs = slow_inputs(bad=13)
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for rows, _ in inputs.batches(loader.blocks(np.arange(40), 4)):
            seen.append(rows[0])
    assert seen == [0, 4, 8] and not gather_threads()


@pytest.mark.parametrize("leave", ["break", "error"])
@pytest.mark.parametrize("taken", [1, 3])
def test_leaving_early_ends_the_thread_and_drops_what_was_ahead(leave, taken):
    inputs = slow_inputs(prefetch=4)
    inputs.array.leave = threading.Semaphore(taken)  # the gather after these hangs until it is let go
    try:
        for number, _ in enumerate(
            loader.training_batches(config(train=TrainConfig(batch_size=4)), inputs, ROWS, 0), 1
        ):
            if number == taken:
                threading.Timer(0.05, inputs.array.leave.release, (10,)).start()
                if leave == "break":
                    break
                raise KeyError("the step failed")
    except KeyError:
        assert leave == "error"
    assert not gather_threads() and len(inputs.array.gathered) <= taken + 1


# Several processes


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "strong"])
def test_the_shares_of_all_processes_are_the_batches_of_one(world_size, placement, augmentation, monkeypatch):
    cfg = config(augment=augmentation, strong=BLURRED)
    inputs = loader.Inputs(image_split(shape=(20, 16, 3)), CPU, LoaderConfig(placement))
    alone = list(loader.training_batches(cfg, inputs, ROWS, 4, 1))
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shares.append(list(loader.training_batches(cfg, inputs, ROWS, 4, 1)))
        assert [len(rows) for rows, _ in shares[-1]] == [8 * (rank + 1) // world_size - 8 * rank // world_size] * 3
    for (rows, batch), *parts in zip(alone, *shares, strict=True):
        assert np.array_equal(np.concatenate([r for r, _ in parts]), rows)
        together = torch.cat([x for _, x in parts])
        if augmentation == "strong":
            torch.testing.assert_close(together, batch, atol=1e-6, rtol=0)
        else:
            assert torch.equal(together, batch)


def test_free_bytes_is_a_sensible_number():
    assert 1 << 20 < loader.free_bytes(CPU) < 1 << 50


# Views


def view_config(n_views=3, **changes) -> Config:
    return config(filter=FilterConfig(n_views=n_views, views=ViewsConfig(1, 0.8, 0.3)), **changes)


def views_of(cfg, split, rows) -> torch.Tensor:
    rows = np.asarray(rows)
    batch = loader.view_batch(cfg, loader.Inputs(split, CPU).take(rows), rows)
    return batch.reshape(len(rows), cfg.filter.n_views, *batch.shape[1:])


def test_views_follow_their_draws():
    cfg, split = view_config(), image_split()
    views = views_of(cfg, split, [5])
    raw = torch.from_numpy(split.inputs[[5]]).permute(0, 3, 1, 2)
    for view in range(3):
        draws = augment.uniform(3, augment.VIEWS, 5, view, n_draws=4)
        assert torch.equal(views[0, view : view + 1], augment.crop_flip(raw, draws[None], cfg.filter.views))


def test_views_do_not_depend_on_the_batch_or_the_order_of_rows():
    cfg, split = view_config(), image_split()
    whole = views_of(cfg, split, np.arange(40))
    for size in (1, 7, 40):
        parts = [views_of(cfg, split, np.arange(start, min(start + size, 40))) for start in range(0, 40, size)]
        assert torch.equal(torch.cat(parts), whole)
    order = np.random.default_rng(0).permutation(40)
    assert torch.equal(views_of(cfg, split, order), whole[torch.from_numpy(order)])


def test_the_first_views_do_not_depend_on_how_many_there_are():
    split = image_split()
    assert torch.equal(views_of(view_config(3), split, ROWS), views_of(view_config(7), split, ROWS)[:, :3])


def test_views_depend_on_seed_row_and_view():
    same = split_of(np.repeat(image_split(1).inputs, 200, axis=0))  # one image in all rows
    views = views_of(view_config(3), same, np.arange(200))
    assert (views[:, 0] != views[:, 1]).flatten(1).any(1).float().mean() > 0.5
    assert (views[1:] != views[:-1]).flatten(2).any(2).float().mean() > 0.5
    assert not torch.equal(views, views_of(view_config(3, seed=4), same, np.arange(200)))


def test_training_augmentation_does_not_touch_views():
    split = image_split()
    assert torch.equal(views_of(view_config(augment="none"), split, ROWS), views_of(view_config(), split, ROWS))


def test_one_view():
    assert views_of(view_config(1), image_split(), ROWS).shape == (37, 1, 3, 7, 5)


def test_views_of_a_vector_are_the_vector():
    split = vector_split()
    views = views_of(view_config(3), split, [4, 2])
    np.testing.assert_array_equal(views.numpy(), split.inputs[[4, 2]][:, None].repeat(3, 1))


# Through the stages


def stage_files(output_dir, config_file, *settings) -> tuple[dict, np.ndarray, np.ndarray]:
    """(weights after an epoch of coarse training, features, view probabilities)."""
    for script in ("train_coarse", "extract_features", "uncertainty_filter"):
        run_stage(script, "--config", config_file, f"output_dir={output_dir}", "coarse.epochs=1", *settings)
    folder = output_dir / config_file.stem / "seed0"
    weights = torch.load(folder / "coarse/model.pt", weights_only=True)
    return weights, np.load(folder / "features/coarse/train.npy"), np.load(folder / "uncertainty/view_probs.npy")


def same_files(a, b) -> list[bool]:
    return [all(torch.equal(a[0][name], b[0][name]) for name in a[0]), *map(np.array_equal, a[1:], b[1:])]


def test_settings_of_the_loader_reach_the_stages_and_change_no_result(tmp_path, config_file, capsys):
    device = stage_files(tmp_path / "device", config_file)
    assert "loader.placement: device" in capsys.readouterr().err
    host = stage_files(tmp_path / "host", config_file, "loader.placement=host", "loader.prefetch=3")
    assert same_files(device, host) == [True] * 3
    stage_files(tmp_path / "host", config_file)  # done already: loader.* is no setting of a result
    assert capsys.readouterr().out.count("done already") == 3


def test_strong_augmentation_reaches_training_and_the_views(tmp_path, config_file):
    plain = stage_files(tmp_path / "plain", config_file)
    views = stage_files(tmp_path / "views", config_file, "filter.views.blur_p=0.5", "filter.views.cutout=3")
    assert same_files(plain, views) == [True, True, False]
    assert not any(same_files(plain, stage_files(tmp_path / "strong", config_file, "augment=strong")))


def test_views_that_only_blur_differ(tmp_path, config_file):
    off = [f"filter.views.{name}=0" for name in ("crop_padding", "hflip_p", "vflip_p")]
    settings = [*off, "filter.score=variation_ratio"]
    with pytest.raises(SystemExit):
        stage_files(tmp_path, config_file, *settings)
    stage_files(tmp_path, config_file, *settings, "filter.views.blur_p=0.5")
