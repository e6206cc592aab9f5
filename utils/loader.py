"""Images on their way from disk to the network.

A set that fits lives on the compute device as uint8 and a batch is an index and a gather there, with no worker
processes; a larger one stays in its memory map and rows are copied over as they are needed.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from utils import augment, distributed
from utils.config import Config
from utils.splits import Split

RESIDENT_SHARE = 0.4  # of the free memory that a set may take to live on the device


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return 4 << 30


class Inputs:
    """Rows of one split as network inputs: (B, C, H, W) uint8 images in channels_last, or (B, D) float32 vectors."""

    def __init__(self, split: Split, device: torch.device):
        self.device = device
        self.is_vector = split.is_vector
        self.array = split.inputs
        self.resident = None
        if self.array.nbytes <= RESIDENT_SHARE * free_bytes(device):
            self.resident = torch.from_numpy(np.array(self.array)).to(device)
        else:
            gigabytes = self.array.nbytes / 1e9
            print(
                f"loader: {gigabytes:.1f} GB of images do not fit on {device}; rows are copied a batch at a time",
                file=sys.stderr,
            )

    def __len__(self) -> int:
        return len(self.array)

    def take(self, rows: np.ndarray) -> Tensor:
        """rows: (B,) int64 in any order."""
        if self.resident is not None:
            batch = self.resident[torch.from_numpy(rows).to(self.device)]
        else:
            batch = torch.from_numpy(self.array[rows]).to(self.device, non_blocking=True)
        return batch if self.is_vector else batch.permute(0, 3, 1, 2)  # (B, H, W, C) in memory is channels_last


def steps_in_epoch(n_rows: int, batch_size: int) -> int:
    """Whole batches in one pass; a set smaller than a batch makes one step of all its rows."""
    return max(1, n_rows // batch_size)


def epoch_rows(rows: np.ndarray, seed: int, epoch: int, batch_size: int) -> np.ndarray:
    """The epoch's batches as (n_steps, B) rows in an order that depends on (seed, epoch) alone.

    The remainder that does not fill a batch is left out; each epoch's order is new, so in time all rows are seen.
    """
    order = np.random.default_rng([seed, augment.TRAIN, epoch]).permutation(len(rows))
    size = min(batch_size, len(rows))
    n_steps = steps_in_epoch(len(rows), batch_size)
    return rows[order[: n_steps * size]].reshape(n_steps, size)


def training_batches(cfg: Config, inputs: Inputs, rows: np.ndarray, epoch: int, first_step: int = 0) -> Iterator[tuple]:
    """Yield (rows (B,) int64, inputs (B, ...)) of one epoch from `first_step` on, augmented as `cfg.augment` says."""
    batches = epoch_rows(rows, cfg.seed, epoch, cfg.train.batch_size)
    for step in range(first_step, len(batches)):
        own = distributed.share(batches.shape[1])
        batch = inputs.take(batches[step][own])
        if cfg.augment == "crop_flip" and not inputs.is_vector:
            positions = (step * batches.shape[1] + torch.arange(batches.shape[1], device=inputs.device))[own]
            draws = augment.uniform(cfg.seed, augment.TRAIN, epoch, positions, n_draws=4, device=inputs.device)
            batch = augment.crop_flip(batch, draws, cfg.crop_flip)
        yield batches[step][own], batch


def view_batch(cfg: Config, inputs: Inputs, rows: np.ndarray) -> Tensor:
    """All views of some images: (B * V, C, H, W), view v of row i at position i * V + v.

    The draws depend on (seed, row, view) only.  A vector has no flips or crops: its views are the vector itself.
    """
    batch = inputs.take(rows).repeat_interleave(cfg.filter.n_views, dim=0)
    if inputs.is_vector:
        return batch
    return augment.crop_flip(batch, view_draws(cfg, inputs, rows), cfg.filter.views)


def view_draws(cfg: Config, inputs: Inputs, rows: np.ndarray) -> Tensor:
    """The uniform draws of all views of some rows: (B * V, n), by (seed, row, view) only."""
    row = torch.from_numpy(rows).to(inputs.device)[:, None]
    view = torch.arange(cfg.filter.n_views, device=inputs.device)[None, :]
    return augment.uniform(cfg.seed, augment.VIEWS, row, view, n_draws=4, device=inputs.device).reshape(-1, 4)


def distinct_views(cfg: Config, inputs: Inputs, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """The views of `view_batch` without repetitions: images (U, C, H, W), and which of them each view is (B * V,).

    Views by flips alone are at most four different images a row, and a vector's are one. On CUDA U is rounded up to a
    multiple of 64 by repeating the first, as cuDNN tunes itself anew for every batch size.
    """
    views, n_views = cfg.filter.views, cfg.filter.n_views
    batch = inputs.take(rows)
    if inputs.is_vector:
        return batch, torch.arange(len(rows), device=inputs.device).repeat_interleave(n_views)
    if not augment.only_flips(views):
        return view_batch(cfg, inputs, rows), torch.arange(len(rows) * n_views, device=inputs.device)
    draws = view_draws(cfg, inputs, rows)
    flips = 2 * (draws[:, 2] < views.hflip_p) + (draws[:, 3] < views.vflip_p).long()
    position = torch.arange(len(rows), device=inputs.device).repeat_interleave(n_views)
    found, index = torch.unique(4 * position + flips, return_inverse=True)
    if inputs.device.type == "cuda":
        found = torch.cat([found, found[:1].expand(-len(found) % 64)])
    images = batch[found // 4]
    images = torch.where((found // 2 % 2 == 1)[:, None, None, None], images.flip(-1), images)
    images = torch.where((found % 2 == 1)[:, None, None, None], images.flip(-2), images)
    return images.contiguous(memory_format=torch.channels_last), index
