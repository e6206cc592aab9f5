"""utils/loader.py: the order of rows and every augmentation follow from integers, not from batches or memory."""

import numpy as np
import pytest
import torch

from utils import augment, loader
from utils.config import Config, CropFlipConfig, FilterConfig, TrainConfig, ViewsConfig
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


def split_of(inputs: np.ndarray) -> Split:
    n = len(inputs)
    return Split(inputs, np.zeros(n, np.int64), None, None, np.arange(n))


def vector_split(n=40) -> Split:
    return split_of(np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32))


def config(**changes) -> Config:
    settings = {"seed": 3, "train": TrainConfig(batch_size=8), "crop_flip": CropFlipConfig(2, 0.5, 0.5)}
    return Config(**{**settings, **changes})


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


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
@pytest.mark.parametrize("first_step", [1, 3])
def test_training_batches_from_a_later_step_are_the_tail_of_the_epoch(augmentation, first_step):
    cfg, inputs = config(augment=augmentation), loader.Inputs(image_split(), CPU)
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["images", "grey", "vectors"])
def test_resident_and_memory_mapped_inputs_give_the_same_batches(kind, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.npy"
    np.save(
        path,
        vector_split().inputs if kind == "vectors" else image_split(shape=(7, 5, 1 if kind == "grey" else 3)).inputs,
    )
    split = split_of(np.load(path, mmap_mode="r"))
    resident = loader.Inputs(split, CPU)
    monkeypatch.setattr(loader, "RESIDENT_SHARE", 0)
    mapped = loader.Inputs(split, CPU)
    assert resident.resident is not None and mapped.resident is None
    assert "do not fit on cpu" in capsys.readouterr().err
    assert len(mapped) == len(resident) == 40
    for take in (lambda i: run_epoch(config(), i, ROWS)[1], lambda i: loader.view_batch(config(), i, ROWS)):
        assert torch.equal(take(resident), take(mapped))


def test_writing_into_a_batch_changes_no_image(tmp_path, monkeypatch):
    split = image_split(path=tmp_path / "x.npy")
    for share in (0.4, 0):
        monkeypatch.setattr(loader, "RESIDENT_SHARE", share)
        inputs = loader.Inputs(split, CPU)
        before = inputs.take(ROWS).clone()
        inputs.take(ROWS).zero_()
        assert torch.equal(inputs.take(ROWS), before)


def test_free_bytes_is_a_sensible_number():
    assert 1 << 20 < loader.free_bytes(CPU) < 1 << 50


# Views


def view_config(n_views=3, **changes) -> Config:
    return config(filter=FilterConfig(n_views=n_views, views=ViewsConfig(1, 0.8, 0.3)), **changes)


def views_of(cfg, split, rows) -> torch.Tensor:
    batch = loader.view_batch(cfg, loader.Inputs(split, CPU), np.asarray(rows))
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
