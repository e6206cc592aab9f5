"""Batched, per-sample augmentation whose every draw is a pure function of integers.

A draw is a hash of (seed, purpose, epoch, position) or (seed, purpose, row, view), not the state of a generator. So
batch size, device, number of processes and a resumed run never change what happens to an image.
"""

import torch
from torch import Tensor

from utils.config import CropFlipConfig

TRAIN, VIEWS = 1, 2  # purposes: draws for training and for uncertainty views never coincide


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


def uniform(*counters: int | Tensor, n_draws: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in [0, 1) that depend on `counters` alone.

    counters: ints or int64 tensors of one broadcast shape S.  Returns (*S, n_draws) float32 with 24 random bits each.
    """
    state = torch.zeros((), dtype=torch.int64, device=device)
    for counter in (*counters, None):
        if counter is None:  # the last counter numbers the draws
            counter, state = torch.arange(n_draws, device=device), state.unsqueeze(-1)
        state = _mix((state ^ counter) + _signed(0x9E3779B97F4A7C15))
    return _shift_right(state, 40).to(torch.float32) / (1 << 24)


def crop_flip(images: Tensor, draws: Tensor, settings: CropFlipConfig) -> Tensor:
    """Random crop after padding with black, then random flips, each image on its own.

    images: (B, C, H, W) of any dtype.  draws: (B, 4) uniform in [0, 1): crop row, crop column, horizontal flip,
    vertical flip.
    Returns (B, C, H, W) of the same dtype.
    """
    padding = settings.crop_padding
    if padding:
        height, width = images.shape[-2:]
        offsets = (draws[:, :2] * (2 * padding + 1)).long()  # floor; a draw is below 1, so at most 2 * padding
        padded = torch.nn.functional.pad(images, (padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
        batch = torch.arange(len(images), device=images.device)
        images = windows[batch, :, offsets[:, 0], offsets[:, 1]]
    if settings.hflip_p:
        images = torch.where((draws[:, 2] < settings.hflip_p)[:, None, None, None], images.flip(-1), images)
    if settings.vflip_p:
        images = torch.where((draws[:, 3] < settings.vflip_p)[:, None, None, None], images.flip(-2), images)
    return images


def only_flips(settings: CropFlipConfig) -> bool:
    return not settings.crop_padding
