"""Batched, per-sample augmentation whose every draw is a pure function of integers.

A draw is a hash of (seed, purpose, epoch, position) or (seed, purpose, row, view), not the state of a generator. So
batch size, device, number of processes and a resumed run never change what happens to an image.

`apply` does, in this order and each image on its own: crop and flips, resized crop, rotation, colour jitter
(brightness, contrast, saturation, hue), loss of colour, blur, cutout. Definitions are torchvision's except that the
jitter's order is fixed, that a box of a resized crop too long for the image is cut instead of drawn again, and that
operations follow each other in float32 without rounding to 8 bits in between.
"""

import enum
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.config import CropFlipConfig, StrongConfig

TRAIN, VIEWS = 1, 2  # purposes: draws for training and for uncertainty views never coincide
LOG_RATIO = math.log(4 / 3)  # sides of a resized crop's box: 3:4 to 4:3, evenly on a logarithmic scale
SIGMA = (0.1, 2.0)  # pixels; range of the blur
BLUR_RADIUS = 6  # pixels; three of the largest sigma

# What each column of a draw decides.  Columns keep their place for ever: another order would change every run.
Draw = enum.IntEnum(
    "Draw",
    "CROP_ROW CROP_COLUMN HFLIP VFLIP CUTOUT_ROW CUTOUT_COLUMN BOX_AREA BOX_RATIO BOX_ROW BOX_COLUMN ANGLE "
    "JITTER BRIGHTNESS CONTRAST SATURATION HUE GREY BLUR SIGMA",
    start=0,
)


def _signed(value: int) -> int:
    """A 64-bit pattern as the Python int that torch stores in int64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's >> keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): int64 in, int64 out, arithmetic modulo 2^64."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    """`_mix` of one Python int in [0, 2^64), without the dozen tiny tensors that it would take."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
    return x ^ (x >> 31)


def uniform(*counters: int | Tensor, n_draws: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in [0, 1) that depend on `counters` alone.

    counters: ints or int64 tensors of one broadcast shape S.  Returns (*S, n_draws) float32 with 24 random bits each.
    """
    counters, start = list(counters), 0
    while counters and isinstance(counters[0], int):
        start = _mix_int((start ^ counters.pop(0)) + 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    state = torch.full((), _signed(start), device=device)
    for counter in (*counters, None):
        if counter is None:  # the last counter numbers the draws
            counter, state = torch.arange(n_draws, device=device), state.unsqueeze(-1)
        state = _mix((state ^ counter) + _signed(0x9E3779B97F4A7C15))
    return _shift_right(state, 40).to(torch.float32) / (1 << 24)


def n_draws(settings: CropFlipConfig) -> int:
    """Columns of draws that `apply` needs for `settings`."""
    is_plain = not settings.cutout and not _float_operations(settings, n_channels=3)
    return Draw.VFLIP + 1 if is_plain else len(Draw)


def varies(settings: CropFlipConfig, n_channels: int) -> bool:
    """False where `apply` makes the same of an image whatever the draws."""
    return 0 < settings.hflip_p < 1 or 0 < settings.vflip_p < 1 or not only_flips(settings, n_channels)


def only_flips(settings: CropFlipConfig, n_channels: int) -> bool:
    """True where `apply` flips and does nothing else, so that it makes at most four images of one."""
    return not (settings.crop_padding or settings.cutout or _float_operations(settings, n_channels))


def apply(images: Tensor, draws: Tensor, settings: CropFlipConfig) -> Tensor:
    """Everything that `settings` switches on, each image on its own, by its own row of draws.

    images: (B, C, H, W) uint8, C 1 or 3.  draws: (B, n_draws(settings)) uniform in [0, 1), columns as in `Draw`.
    Returns (B, C, H, W): uint8 where only crop, flips and cutout are on, otherwise float32 in [0, 1] in channels_last.
    An image comes out the same in any batch: integers to the bit, floats to rounding.
    """
    images = crop_flip(images, draws, settings)
    if operations := _float_operations(settings, images.shape[1]):
        images = images.float() / 255
        with torch.autocast(images.device.type, enabled=False):
            for operation in operations:
                images = operation(images, draws, settings)
        images = images.contiguous(memory_format=torch.channels_last).clamp_(0, 1)  # weights sum to 1 but for rounding
    return cutout(images, draws, settings.cutout) if settings.cutout else images


def _float_operations(settings: CropFlipConfig, n_channels: int) -> list:
    """The operations on floats that are on, in order.  Grey images have no saturation, no hue and no colour to lose."""
    if not isinstance(settings, StrongConfig):
        return []
    s, is_colour = settings, n_channels == 3
    has_range = s.brightness or s.contrast or (is_colour and (s.saturation or s.hue))
    is_on = {
        resized_crop: s.resized_crop_scale < 1,
        rotate: s.rotation,
        jitter: s.jitter_p and has_range,
        lose_colour: is_colour and s.grey_p,
        blur: s.blur_p,
    }
    return [operation for operation, on in is_on.items() if on]


def crop_flip(images: Tensor, draws: Tensor, settings: CropFlipConfig) -> Tensor:
    """Random crop after padding with black, then random flips, each image on its own.

    images: (B, C, H, W) of any dtype.  draws: (B, 4 or more) uniform in [0, 1): crop row, crop column, horizontal flip,
    vertical flip.
    Returns (B, C, H, W) of the same dtype.
    """
    padding = settings.crop_padding
    if not (len(images) and (padding or settings.hflip_p or settings.vflip_p)):
        return images
    # floor; a draw is below 1, so an offset is at most 2 * padding
    offsets = (draws[:, [Draw.CROP_ROW, Draw.CROP_COLUMN]] * (2 * padding + 1)).long()
    is_hflipped, is_vflipped = draws[:, Draw.HFLIP] < settings.hflip_p, draws[:, Draw.VFLIP] < settings.vflip_p
    line = torch.arange(images.shape[2], device=images.device)
    lines = offsets[:, :1] + torch.where(is_vflipped[:, None], line.flip(0), line)
    pixels = images.permute(0, 2, 3, 1).contiguous()  # no copy where images are channels_last
    gather = _gather_on_cpu if pixels.device.type == "cpu" else _gather
    return gather(pixels, padding, lines, offsets[:, 1], is_hflipped).permute(0, 3, 1, 2)


def _gather(pixels: Tensor, padding: int, lines: Tensor, lefts: Tensor, is_hflipped: Tensor) -> Tensor:
    """Cut one window out of each padded image: (B, H, W, C) -> (B, H, W, C), in one gather.

    lines: (B, H) int64, rows of the padded image.  lefts: (B,) int64, its first column.  is_hflipped: (B,) bool.
    """
    padded = F.pad(pixels, (0, 0, padding, padding, padding, padding))
    column = torch.arange(pixels.shape[2], device=pixels.device)
    columns = lefts[:, None] + torch.where(is_hflipped[:, None], column.flip(0), column)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded[image, lines[:, :, None], columns[:, None, :]]


def _gather_on_cpu(pixels: Tensor, padding: int, lines: Tensor, lefts: Tensor, is_hflipped: Tensor) -> Tensor:
    """`_gather` about twice as fast on the CPU: numpy copies a window's line as one item of that many bytes."""
    n, height, width, _ = pixels.shape
    size = pixels.shape[3] * pixels.element_size()  # bytes a pixel
    padded = np.zeros((n, height + 2 * padding, (width + 2 * padding) * size), np.uint8)
    in_bytes = pixels.flatten().view(torch.uint8).view(n, height, width * size).numpy()
    padded[:, padding : padding + height, padding * size : (padding + width) * size] = in_bytes
    all_lines = np.ndarray((padded.size - width * size + 1,), f"V{width * size}", padded, strides=(1,))
    first = np.arange(n)[:, None] * padded.shape[1] + lines.numpy()
    window = all_lines[first * padded.shape[2] + lefts.numpy()[:, None] * size]
    window = window.view(f"V{size}").reshape(n, height, width)
    flipped = np.flatnonzero(is_hflipped.numpy())
    window[flipped] = window[flipped][:, :, ::-1]
    return torch.from_numpy(window.view(np.uint8)).view(pixels.dtype).view(pixels.shape)


def cutout(images: Tensor, draws: Tensor, side: int) -> Tensor:
    """Black out a square whose centre lies anywhere in the image; what sticks out is cut off (DeVries, Taylor 2017)."""
    is_inside = []
    for draw, size in ((Draw.CUTOUT_ROW, images.shape[2]), (Draw.CUTOUT_COLUMN, images.shape[3])):
        first = (draws[:, draw, None] * size).long() - side // 2
        place = torch.arange(size, device=images.device)
        is_inside.append((place >= first) & (place < first + side))
    square = is_inside[0][:, None, :, None] & is_inside[1][:, None, None, :]
    return torch.where(square, 0, images)  # keeps channels_last, as masked_fill does not


# Operations on float32 images in [0, 1]; draws: (B, len(Draw)).


def _between(draws: Tensor, draw: Draw, low: float, high: float) -> Tensor:
    return low + draws[:, draw] * (high - low)


def _where(draws: Tensor, draw: Draw, probability: float, changed: Tensor, images: Tensor) -> Tensor:
    return torch.where((draws[:, draw] < probability)[:, None, None, None], changed, images)


def boxes(draws: Tensor, height: int, width: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(top, left, rows, columns) of the resized crops, each (B,) int64, as of torchvision's RandomResizedCrop.

    Area: a share of the image evenly from [scale, 1]; ratio of the sides: 3:4 to 4:3. A side longer than the image's is
    cut to it, where torchvision draws again up to ten times.
    """
    area = _between(draws, Draw.BOX_AREA, scale, 1) * height * width
    ratio = _between(draws, Draw.BOX_RATIO, -LOG_RATIO, LOG_RATIO).exp()
    columns = (area * ratio).sqrt().round().clamp(1, width)
    rows = (area / ratio).sqrt().round().clamp(1, height)
    top = (draws[:, Draw.BOX_ROW] * (height - rows + 1)).floor()
    left = (draws[:, Draw.BOX_COLUMN] * (width - columns + 1)).floor()
    return top.long(), left.long(), rows.long(), columns.long()


def resized_crop(images: Tensor, draws: Tensor, settings: StrongConfig) -> Tensor:
    """A random box enlarged to the image's size, bilinearly; nothing outside the box shines in at its border."""
    height, width = images.shape[2:]
    top, left, rows, columns = boxes(draws, height, width, settings.resized_crop_scale)
    grids = []  # where each output line and column is read, in grid_sample's units: -1 to 1 from edge to edge
    for start, length, size in ((left, columns, width), (top, rows, height)):
        centre = (torch.arange(size, device=images.device) + 0.5) * (length / size)[:, None] - 0.5
        place = start[:, None] + torch.minimum(centre.clamp(min=0), length[:, None] - 1)
        grids.append((2 * place + 1) / size - 1)
    x, y = torch.broadcast_tensors(grids[0][:, None, :], grids[1][:, :, None])
    return F.grid_sample(images, torch.stack([x, y], -1), "bilinear", "border", align_corners=False)


def rotate(images: Tensor, draws: Tensor, settings: StrongConfig) -> Tensor:
    """Turn about the centre by an angle evenly from [-rotation, rotation] degrees, bilinearly; black outside."""
    from kornia.geometry import transform

    angles = _between(draws, Draw.ANGLE, -settings.rotation, settings.rotation)
    return transform.rotate(images, angles)


def jitter(images: Tensor, draws: Tensor, settings: StrongConfig) -> Tensor:
    """Brightness, contrast, saturation, hue in this order, where torchvision's order is random.

    The three factors lie evenly in [1 - x, 1 + x], the shift of the hue in [-hue, hue] of the circle. Brightness blends
    with black, contrast with the image's mean grey, saturation with its grey image, each clipped to [0, 1].
    """
    from kornia import enhance

    steps = [
        (enhance.adjust_brightness_accumulative, Draw.BRIGHTNESS, settings.brightness),
        (enhance.adjust_contrast_with_mean_subtraction, Draw.CONTRAST, settings.contrast),
    ]
    if images.shape[1] == 3:
        steps.append((enhance.adjust_saturation_with_gray_subtraction, Draw.SATURATION, settings.saturation))
    changed = images
    for adjust, draw, reach in steps:
        if reach:
            changed = adjust(changed, _between(draws, draw, 1 - reach, 1 + reach))
    if settings.hue and images.shape[1] == 3:
        reach = 2 * math.pi * settings.hue
        changed = enhance.adjust_hue(changed, _between(draws, Draw.HUE, -reach, reach))
    return _where(draws, Draw.JITTER, settings.jitter_p, changed, images)


def lose_colour(images: Tensor, draws: Tensor, settings: StrongConfig) -> Tensor:
    """Grey by ITU-R 601 luma (0.299, 0.587, 0.114) in all three channels."""
    from kornia.color import rgb_to_grayscale

    return _where(draws, Draw.GREY, settings.grey_p, rgb_to_grayscale(images), images)


def blur(images: Tensor, draws: Tensor, settings: StrongConfig) -> Tensor:
    """Gaussian, sigma evenly from [0.1, 2] pixels; window of 13 x 13 or what the image holds; borders mirrored."""
    from kornia.filters import gaussian_blur2d

    size = [2 * min(BLUR_RADIUS, side - 1) + 1 for side in images.shape[2:]]
    sigmas = _between(draws, Draw.SIGMA, *SIGMA)[:, None].expand(-1, 2)
    return _where(draws, Draw.BLUR, settings.blur_p, gaussian_blur2d(images, tuple(size), sigmas), images)
