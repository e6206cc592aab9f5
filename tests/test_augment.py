"""utils/augment.py: draws that are pure functions of integers; each operation against torchvision, image by image."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional

from utils import augment
from utils.config import CropFlipConfig, StrongConfig, ViewsConfig

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


def as_before(images, draws, settings: CropFlipConfig) -> torch.Tensor:
    """The first version of crop_flip, whose results every committed run was made with."""
    padding = settings.crop_padding
    if padding:
        height, width = images.shape[-2:]
        offsets = (draws[:, :2] * (2 * padding + 1)).long()
        windows = torch.nn.functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(len(images)), :, offsets[:, 0], offsets[:, 1]]
    for draw, probability, axis in ((2, settings.hflip_p, -1), (3, settings.vflip_p, -2)):
        if probability:
            images = torch.where((draws[:, draw] < probability)[:, None, None, None], images.flip(axis), images)
    return images


GATHERS = [augment._gather, augment._gather_on_cpu]


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 5, 9), (1, 1, 1)])
def test_crop_flip_has_the_bits_of_its_first_version(gather, dtype, shape, monkeypatch):
    monkeypatch.setattr(augment, "_gather_on_cpu", gather)
    images = some_images(200, shape, dtype).to(memory_format=torch.channels_last)
    draws = augment.uniform(3, augment.TRAIN, 1, torch.arange(200), n_draws=len(augment.Draw))
    for settings in (CropFlipConfig(4, 0.5, 0), CropFlipConfig(0, 0.8, 0.3), CropFlipConfig(7, 0.5, 0.5)):
        expected = as_before(images, draws, settings)
        assert torch.equal(augment.crop_flip(images, draws[:, :4], settings), expected)
        assert torch.equal(augment.apply(images, draws, settings), expected)
        assert torch.equal(augment.apply(images, draws, strong(**dataclasses.asdict(settings))), expected)


def test_crop_flip_of_no_images():
    assert augment.crop_flip(some_images(0), torch.zeros(0, 4), CropFlipConfig()).shape == (0, 3, 9, 6)


# apply


OFF = {"hflip_p": 0, "resized_crop_scale": 1, "jitter_p": 0, "grey_p": 0}


def strong(**changes) -> StrongConfig:
    """Everything off but `changes`."""
    return StrongConfig(**{**OFF, **changes})


def draws_of(n: int, seed: int = 0) -> torch.Tensor:
    return augment.uniform(seed, augment.TRAIN, 0, torch.arange(n), n_draws=len(augment.Draw))


def colour_images(n=32, side=(32, 24), channels=3) -> torch.Tensor:
    """Smooth colour gradients with noise, so that hue, sharp edges and flat parts all occur; uint8 channels_last."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((n, channels, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, side, mode="bilinear", align_corners=False)
    noise = 0.1 * torch.rand((n, channels, *side), generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8).to(memory_format=torch.channels_last)


def one_at_a_time(images, draws, reference) -> torch.Tensor:
    """reference(image (C, H, W) float in [0, 1], its draws {name: float}) for each image."""
    rows = [dict(zip(augment.Draw.__members__, row, strict=True)) for row in draws.tolist()]
    return torch.stack([reference(image.float() / 255, row) for image, row in zip(images, rows, strict=True)])


def assert_as_torchvision(settings, reference, atol=1e-5, images=None):
    images = colour_images() if images is None else images
    draws = draws_of(len(images))
    found = augment.apply(images, draws, settings)
    assert found.dtype == torch.float32 and found.shape == images.shape and 0 <= found.min() <= found.max() <= 1
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, one_at_a_time(images, draws, reference), atol=atol, rtol=0)
    assert not torch.allclose(found, images / 255, atol=0.01)


def factor(draw, reach):
    return 1 - reach + 2 * reach * draw


@pytest.mark.parametrize(
    ("name", "reach", "adjust", "channels", "atol"),
    [
        ("brightness", 0.7, functional.adjust_brightness, 1, 1e-5),
        ("brightness", 0.7, functional.adjust_brightness, 3, 1e-5),
        # torchvision weighs red with 0.2989 where ITU-R 601 and kornia have 0.299
        ("contrast", 0.7, functional.adjust_contrast, 1, 1e-4),
        ("contrast", 0.7, functional.adjust_contrast, 3, 1e-4),
        ("saturation", 0.9, functional.adjust_saturation, 3, 2e-4),
        ("hue", 0.5, lambda image, hue: functional.adjust_hue(image, hue - 1), 3, 1e-5),  # a shift, not a factor
    ],
)
def test_each_part_of_the_jitter_is_torchvisions(name, reach, adjust, channels, atol):
    others_off = dict.fromkeys(["brightness", "contrast", "saturation", "hue"], 0)
    assert_as_torchvision(
        strong(jitter_p=1, **others_off | {name: reach}),
        lambda image, d: adjust(image, factor(d[name.upper()], reach)),
        images=colour_images(channels=channels),
        atol=atol,
    )


def test_jitter_is_brightness_contrast_saturation_hue_with_its_probability():
    def reference(image, d):
        if d["JITTER"] >= 0.6:
            return image
        image = functional.adjust_brightness(image, factor(d["BRIGHTNESS"], 0.4))
        image = functional.adjust_contrast(image, factor(d["CONTRAST"], 0.3))
        image = functional.adjust_saturation(image, factor(d["SATURATION"], 0.2))
        return functional.adjust_hue(image, 0.2 * d["HUE"] - 0.1)

    settings = strong(jitter_p=0.6, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    assert_as_torchvision(settings, reference, atol=1e-3)  # hue turns the grey weights' 1e-4 into a little more


def test_loss_of_colour_is_torchvisions():
    def reference(image, d):
        return functional.rgb_to_grayscale(image, 3) if d["GREY"] < 0.5 else image

    assert_as_torchvision(strong(grey_p=0.5), reference, atol=2e-4)


@pytest.mark.parametrize("side", [(32, 24), (5, 3), (1, 1)])
def test_blur_is_torchvisions(side):
    size = [min(13, 2 * side[1] - 1), min(13, 2 * side[0] - 1)]  # torchvision's order is width, height

    def reference(image, d):
        return functional.gaussian_blur(image, size, [0.1 + 1.9 * d["SIGMA"]] * 2) if d["BLUR"] < 0.7 else image

    if side == (1, 1):
        image = colour_images(side=side)
        torch.testing.assert_close(augment.apply(image, draws_of(32), strong(blur_p=1)), image / 255)
    else:
        assert_as_torchvision(strong(blur_p=0.7), reference, images=colour_images(side=side))


@pytest.mark.parametrize("degrees", [15, 180])
@pytest.mark.parametrize("side", [(32, 24), (7, 7)])
def test_rotation_is_torchvisions(degrees, side):
    def reference(image, d):
        bilinear = transforms.InterpolationMode.BILINEAR
        return functional.rotate(image, degrees * (2 * d["ANGLE"] - 1), bilinear)

    assert_as_torchvision(strong(rotation=degrees), reference, images=colour_images(side=side), atol=1e-3)


@pytest.mark.parametrize("side", [(32, 24), (7, 7)])
def test_a_resized_crop_is_torchvisions_of_the_same_box(side):
    images = colour_images(64, side)
    top, left, rows, columns = augment.boxes(draws_of(64), *side, 0.2)
    boxes = iter(torch.stack([top, left, rows, columns], 1).tolist())

    def reference(image, d):
        return functional.resized_crop(image, *next(boxes), list(side), antialias=False)

    assert_as_torchvision(strong(resized_crop_scale=0.2), reference, images=images)


def test_boxes_lie_in_the_image_and_are_drawn_as_torchvision_draws_them():
    side, scale = 200, 0.3
    top, left, rows, columns = augment.boxes(draws_of(20_000), side, side, scale)
    for start, length in ((top, rows), (left, columns)):
        assert 0 <= start.min() and (start + length).max() <= side and length.min() >= 1
        room = (side - length + 1).double()
        shares = (start / room)[room > 20].numpy()
        assert abs(shares.mean() - 0.5) < 0.03 and shares.min() < 0.03 and shares.max() > 0.9
    area, ratio = (rows * columns / side**2).numpy(), (columns / rows).numpy()
    inside = np.maximum(rows, columns).numpy() < side  # boxes that no side was cut of
    assert area.min() > scale - 0.01 and 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.36
    assert abs(np.log(ratio[inside]).mean()) < 0.01
    torch.manual_seed(0)
    image = torch.zeros(1, side, side)
    theirs = [transforms.RandomResizedCrop.get_params(image, (scale, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    their_area = np.array([h * w for _, _, h, w in theirs]) / side**2
    quantiles = np.linspace(0.05, 0.95, 12)  # of the boxes that both draw alike: those that fit at once
    assert np.abs(np.quantile(area[inside], quantiles) - np.quantile(their_area, quantiles)).max() < 0.03


@pytest.mark.parametrize("side", [1, 4, 5, 40])
def test_cutout_is_a_black_square_cut_off_at_the_border(side):
    images = some_images(64, (3, 9, 6))
    draws = draws_of(64)
    expected = images.clone()
    for image, draw in zip(expected, draws, strict=True):
        top = int(draw[augment.Draw.CUTOUT_ROW] * 9) - side // 2
        left = int(draw[augment.Draw.CUTOUT_COLUMN] * 6) - side // 2
        image[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
    found = augment.apply(images, draws, CropFlipConfig(0, 0, 0, cutout=side))
    assert found.dtype == torch.uint8 and torch.equal(found, expected)
    last = augment.apply(images.to(memory_format=torch.channels_last), draws, CropFlipConfig(4, 0.5, 0, cutout=side))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_cutout_reaches_every_place_equally_often():
    images = torch.ones((N // 10, 1, 5, 5), dtype=torch.uint8)
    dark = (augment.apply(images, draws_of(N // 10), CropFlipConfig(0, 0, 0, cutout=1)) == 0).float().mean((0, 1))
    assert (dark - 1 / 25).abs().max() < 5 * np.sqrt(1 / 25 / (N // 10))


@pytest.mark.parametrize(
    "changes",
    [{"crop_padding": 2}, {"hflip_p": 0.5}, {"vflip_p": 0.5}, {"cutout": 5}, {"resized_crop_scale": 0.5},
     {"jitter_p": 0.5}, {"grey_p": 0.5}, {"blur_p": 0.5}, {"rotation": 20}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_each_setting_changes_something_and_is_seen_to_vary(changes):
    images, draws, on = colour_images(), draws_of(32), strong(**changes)
    assert augment.varies(on, 3) and not augment.varies(strong(), 3)
    assert torch.equal(augment.apply(images, draws, strong()), images)
    found = augment.apply(images, draws, on)
    as_integers = next(iter(changes)) in ("crop_padding", "hflip_p", "vflip_p", "cutout")
    assert found.dtype == (torch.uint8 if as_integers else torch.float32)
    assert not torch.allclose(found.float() / (255 if as_integers else 1), images / 255, atol=0.01)


@pytest.mark.parametrize("name, draw", [("jitter_p", "JITTER"), ("grey_p", "GREY"), ("blur_p", "BLUR")])
def test_operations_happen_as_often_as_asked(name, draw):
    images, draws = colour_images(1, (4, 4)).expand(2000, -1, -1, -1), draws_of(2000)
    found = augment.apply(images, draws, strong(**{name: 0.3}))
    is_changed = (found - images / 255).abs().flatten(1).amax(1) > 1e-6
    assert abs(is_changed.float().mean() - 0.3) < 5 * np.sqrt(0.21 / 2000)
    assert not is_changed[draws[:, augment.Draw[draw]] >= 0.3].any()


def test_grey_images_skip_what_needs_colour():
    images, draws = colour_images(channels=1), draws_of(32)
    colour_only = strong(jitter_p=1, brightness=0, contrast=0, grey_p=1)
    assert torch.equal(augment.apply(images, draws, colour_only), images) and not augment.varies(colour_only, 1)
    both = strong(jitter_p=1, grey_p=1)
    assert torch.equal(
        augment.apply(images, draws, both), augment.apply(images, draws, strong(jitter_p=1, saturation=0, hue=0))
    )


ALL_ON = StrongConfig(
    crop_padding=2, vflip_p=0.3, cutout=6, resized_crop_scale=0.3, blur_p=0.5, rotation=30, jitter_p=0.8, grey_p=0.2
)


@pytest.mark.parametrize("settings", [CropFlipConfig(4, 0.5, 0.3, cutout=8), ALL_ON], ids=["integers", "floats"])
def test_an_image_comes_out_the_same_in_any_batch(settings):
    images, draws = colour_images(64), draws_of(64)
    whole = augment.apply(images, draws, settings)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for size in (1, 7, 64):
        for part in order.split(size):
            found = augment.apply(images[part], draws[part], settings)
            torch.testing.assert_close(found, whole[part], atol=1e-6 if whole.is_floating_point() else 0, rtol=0)


def test_operations_follow_each_other_in_the_stated_order():
    images, draws = colour_images(), draws_of(32)
    expected = augment.crop_flip(images, draws, ALL_ON).float() / 255
    for operation in (augment.resized_crop, augment.rotate, augment.jitter, augment.lose_colour, augment.blur):
        expected = operation(expected, draws, ALL_ON)
    assert torch.equal(augment.apply(images, draws, ALL_ON), augment.cutout(expected, draws, 6))


def test_augmentation_keeps_float32_under_autocast():
    images, draws = colour_images(), draws_of(32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment.apply(images, draws, ALL_ON)
    assert torch.equal(inside, augment.apply(images, draws, ALL_ON))


def test_augmentation_ignores_and_keeps_the_global_generator():
    images, draws = colour_images(), draws_of(32)
    torch.manual_seed(0)
    first, after = augment.apply(images, draws, ALL_ON), torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(augment.apply(images, draws, ALL_ON), first)


def test_n_draws_are_no_more_than_needed():
    assert augment.n_draws(CropFlipConfig()) == augment.n_draws(ViewsConfig()) == augment.n_draws(strong()) == 4
    assert augment.n_draws(CropFlipConfig(cutout=3)) == augment.n_draws(ALL_ON) == len(augment.Draw)
