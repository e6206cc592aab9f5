"""utils/augment.py: draws that are pure functions of integers, and crop_flip against a plain loop over images."""

import numpy as np
import pytest
import torch

from utils import augment
from utils.config import CropFlipConfig

MASK = (1 << 64) - 1
N = 100_000


def splitmix64(x: int) -> int:
    """The published finaliser on Python integers, which never overflow."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_uniform(*counters: int, n_draws: int) -> list[float]:
    """What `uniform` promises, one number at a time."""
    draws = []
    for draw in range(n_draws):
        state = 0
        for counter in (*counters, draw):
            state = splitmix64(((state ^ counter) + 0x9E3779B97F4A7C15) & MASK)
        draws.append((state >> 40) / 2**24)
    return draws


def numpy_uniform(seed: int, rows: np.ndarray, n_draws: int) -> np.ndarray:
    """`uniform(seed, rows)` in numpy's unsigned arithmetic."""
    state = np.zeros(1, np.uint64)
    for counter in (np.uint64(seed), rows.astype(np.uint64)[:, None], np.arange(n_draws, dtype=np.uint64)):
        x = (state ^ counter) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = x ^ (x >> np.uint64(31))
    return ((state >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)


# uniform


def test_splitmix64_has_its_published_first_outputs():
    """Its first outputs for seed 0, as other libraries' tests have them: the slow reference is SplitMix64."""
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix64(k * golden & MASK) for k in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniform_has_the_values_of_the_slow_reference():
    for counters in [(0,), (0, 1, 0, 0), (7, 2, 3, 59_999), (2**31 - 1, 1, 10**6, 2**40)]:
        assert augment.uniform(*counters, n_draws=4).tolist() == slow_uniform(*counters, n_draws=4)


def test_uniform_values_never_change():
    """A release that changed these would change every run's augmentation."""
    assert augment.uniform(0, augment.TRAIN, 0, 0, n_draws=2).mul(1 << 24).tolist() == [16362606, 50142]
    assert augment.uniform(3, augment.VIEWS, 17, 4, n_draws=2).mul(1 << 24).tolist() == [6446723, 11667175]


def test_uniform_of_many_rows_has_the_values_of_numpy_uint64():
    rows = torch.arange(1000)
    np.testing.assert_array_equal(augment.uniform(5, rows, n_draws=4).numpy(), numpy_uniform(5, rows.numpy(), 4))


def test_uniform_broadcasts_its_counters():
    row, view = torch.arange(3)[:, None], torch.arange(5)[None, :]
    table = augment.uniform(1, augment.VIEWS, row, view, n_draws=2)
    assert table.shape == (3, 5, 2) and table.dtype == torch.float32
    assert torch.equal(table[2, 4], augment.uniform(1, augment.VIEWS, 2, 4, n_draws=2))


def test_uniform_draws_do_not_depend_on_how_many_are_asked_for():
    assert torch.equal(augment.uniform(1, 2, n_draws=3), augment.uniform(1, 2, n_draws=9)[:3])


def test_uniform_ignores_and_keeps_the_global_generator():
    torch.manual_seed(0)
    first = augment.uniform(1, 2, n_draws=3)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(augment.uniform(1, 2, n_draws=3), first)


@pytest.mark.parametrize("changed", range(4))
def test_uniform_depends_on_each_counter(changed):
    counters = [3, augment.TRAIN, 7, 11]
    before = augment.uniform(*counters, n_draws=4)
    counters[changed] += 1
    assert (augment.uniform(*counters, n_draws=4) != before).all()


def test_uniform_depends_on_the_order_of_counters():
    assert (augment.uniform(3, 4, n_draws=4) != augment.uniform(4, 3, n_draws=4)).all()


# Sums of N independent uniforms: five standard errors off happens once in a million such tests.


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return augment.uniform(0, augment.TRAIN, 0, torch.arange(N), n_draws=4).numpy().astype(np.float64)


def test_uniform_fills_the_unit_interval_evenly(table):
    assert table.min() >= 0 and table.max() < 1
    assert np.abs(table.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / N)
    assert np.abs(table.var(0) - 1 / 12).max() < 5 * np.sqrt(1 / 180 / N)
    counts = np.stack([np.histogram(column, 64, (0, 1))[0] for column in table.T])
    chi_square = ((counts - N / 64) ** 2 / (N / 64)).sum(1)
    assert chi_square.max() < 63 + 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 256])
def test_uniform_of_neighbouring_rows_is_uncorrelated(table, lag):
    for a in range(4):
        for b in range(4):
            assert abs(np.corrcoef(table[:-lag, a], table[lag:, b])[0, 1]) < 5 / np.sqrt(N)


def test_uniform_draws_of_one_row_are_uncorrelated(table):
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 5 / np.sqrt(N)


def test_uniform_of_neighbouring_seeds_epochs_and_purposes_is_uncorrelated(table):
    for counters in [(1, augment.TRAIN, 0), (0, augment.TRAIN, 1), (0, augment.VIEWS, 0)]:
        other = augment.uniform(*counters, torch.arange(N), n_draws=1).numpy()[:, 0]
        assert abs(np.corrcoef(table[:, 0], other)[0, 1]) < 5 / np.sqrt(N)


def test_uniform_never_repeats_a_row(table):
    assert len(np.unique(table, axis=0)) == N


def test_uniform_repeats_single_values_as_often_as_chance_does(table):
    expected = N**2 / 2 / 2**24  # pairs of equal 24-bit numbers
    repeats = N - len(np.unique(table[:, 0]))
    assert abs(repeats - expected) < 5 * np.sqrt(expected)


# crop_flip


def plain_crop_flip(image: np.ndarray, draws: np.ndarray, settings: CropFlipConfig) -> np.ndarray:
    """One image (C, H, W), as one would write it down: pad, slice, flip."""
    padding, (_, height, width) = settings.crop_padding, image.shape
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    top, left = int(draws[0] * (2 * padding + 1)), int(draws[1] * (2 * padding + 1))
    image = padded[:, top : top + height, left : left + width]
    if draws[2] < settings.hflip_p:
        image = image[:, :, ::-1]
    if draws[3] < settings.vflip_p:
        image = image[:, ::-1, :]
    return image


def some_images(n=64, shape=(3, 9, 6), dtype=torch.uint8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (n, *shape), generator=generator).to(dtype)


@pytest.mark.parametrize("shape", [(3, 9, 6), (1, 5, 11), (1, 1, 1), (3, 8, 8)])
@pytest.mark.parametrize("padding", [0, 1, 4, 12])
@pytest.mark.parametrize("hflip_p, vflip_p", [(0, 0), (0.5, 0), (0, 0.3), (0.8, 0.3), (1, 1)])
def test_crop_flip_is_pad_slice_flip(shape, padding, hflip_p, vflip_p):
    settings = CropFlipConfig(padding, hflip_p, vflip_p)
    images, draws = some_images(48, shape), augment.uniform(1, torch.arange(48), n_draws=4)
    expected = [plain_crop_flip(i, d, settings) for i, d in zip(images.numpy(), draws.numpy(), strict=True)]
    np.testing.assert_array_equal(augment.crop_flip(images, draws, settings).numpy(), np.stack(expected))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_crop_flip_keeps_the_dtype_and_the_input(dtype):
    images = some_images(dtype=dtype)
    before = images.clone()
    result = augment.crop_flip(images, torch.full((64, 4), 0.01), CropFlipConfig(2, 0.5, 0.5))
    assert result.dtype == dtype and result.shape == images.shape
    assert torch.equal(images, before)


def test_crop_flip_takes_channels_last_images():
    images = some_images()
    draws = augment.uniform(2, torch.arange(64), n_draws=4)
    settings = CropFlipConfig(2, 0.5, 0.5)
    last = images.to(memory_format=torch.channels_last)
    assert torch.equal(augment.crop_flip(last, draws, settings), augment.crop_flip(images, draws, settings))


def test_crop_flip_pads_with_black():
    corner = augment.crop_flip(torch.full((1, 1, 4, 4), 9), torch.zeros(1, 4), CropFlipConfig(2, 0, 0))[0, 0]
    assert corner.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 9, 9], [0, 0, 9, 9]]


def test_crop_flip_reaches_all_offsets_and_none_beyond():
    largest = 1 - 2**-24  # the greatest draw
    images = torch.arange(9).reshape(1, 1, 3, 3)
    last = augment.crop_flip(images, torch.tensor([[largest] * 4]), CropFlipConfig(1, 0, 0))[0, 0]
    assert last.tolist() == [[4, 5, 0], [7, 8, 0], [0, 0, 0]]
    draws = augment.uniform(0, torch.arange(1000), n_draws=4)
    crops = augment.crop_flip(images.expand(1000, 1, 3, 3), draws, CropFlipConfig(1, 0, 0))
    assert len(torch.unique(crops.reshape(1000, 9), dim=0)) == 9


def test_crop_flip_with_probability_zero_changes_nothing():
    images = some_images()
    assert torch.equal(augment.crop_flip(images, torch.zeros(64, 4), CropFlipConfig(0, 0, 0)), images)


def test_crop_flip_with_probability_one_flips_every_image():
    images, draws = some_images(), torch.full((64, 4), 1 - 2**-24)
    assert torch.equal(augment.crop_flip(images, draws, CropFlipConfig(0, 1, 0)), images.flip(-1))
    assert torch.equal(augment.crop_flip(images, draws, CropFlipConfig(0, 0, 1)), images.flip(-2))


def test_crop_flip_flips_as_often_as_asked():
    images = torch.arange(2).reshape(1, 1, 1, 2).expand(N, 1, 1, 2)
    draws = augment.uniform(0, augment.VIEWS, torch.arange(N), n_draws=4)
    flipped = augment.crop_flip(images, draws, CropFlipConfig(0, 0.8, 0))[:, 0, 0, 0].float().mean()
    assert abs(flipped - 0.8) < 5 * np.sqrt(0.16 / N)
