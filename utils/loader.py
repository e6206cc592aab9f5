"""Images on their way from disk to the network.

`loader.placement` says where a set lives. On the `device`, as uint8, a batch is an index and a gather there. On the
`host`, in memory or in its memory map, a thread gathers batches ahead of the step and copies them over.
"""

import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from utils import augment, distributed
from utils.config import Config, CropFlipConfig, LoaderConfig, UserError
from utils.splits import Split

RESIDENT_SHARE = 0.4  # of the free memory that a set may take to live on the device
COPY_BYTES = 64 << 20  # of a set copied to the device at once
_announced: set[tuple] = set()  # what placement=auto chose has been said for these


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return 4 << 30


def choose_placement(settings: LoaderConfig, n_bytes: int, device: torch.device) -> str:
    """`settings.placement`, with `auto` resolved to device or host by free memory and announced once on stderr.

    Raises UserError where placement=device and the set is larger than the device's free memory.
    """
    free = free_bytes(device)
    sizes = f"{n_bytes / 1e9:.2f} GB of inputs, {free / 1e9:.2f} GB free on {device}"
    if settings.placement == "device" and n_bytes > free:
        raise UserError(f"loader.placement: device is too small ({sizes}); use auto or host")
    if settings.placement != "auto":
        return settings.placement
    placement = "device" if n_bytes <= RESIDENT_SHARE * free else "host"
    if (placement, n_bytes, device) not in _announced and distributed.is_main():
        _announced.add((placement, n_bytes, device))
        reason = "at most" if placement == "device" else "more than"
        print(f"loader.placement: {placement} ({sizes}: {reason} {RESIDENT_SHARE:.0%})", file=sys.stderr)
    return placement


class Inputs:
    """Rows of one split as network inputs: (B, C, H, W) uint8 images in channels_last, or (B, D) float32 vectors."""

    def __init__(self, split: Split, device: torch.device, settings: LoaderConfig | None = None):
        self.device = device
        self.is_vector = split.is_vector
        self.array = split.inputs
        self.settings = settings or LoaderConfig()
        self.resident = None
        if choose_placement(self.settings, self.array.nbytes, device) == "device":
            self.resident = self._copy_all()
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" and self.resident is None else None

    def __len__(self) -> int:
        return len(self.array)

    def _copy_all(self) -> Tensor:
        """(N, H * W * C) or (N, D) on the device; a block at a time, so that host memory holds no second set."""
        shape = (len(self.array), math.prod(self.array.shape[1:]))
        resident = torch.empty(shape, dtype=torch.float32 if self.is_vector else torch.uint8, device=self.device)
        step = max(1, COPY_BYTES * len(self.array) // max(1, self.array.nbytes))
        for start in range(0, len(self.array), step):
            block = np.array(self.array[start : start + step])  # a copy: torch warns of read-only memory
            resident[start : start + step] = torch.from_numpy(block).flatten(1)
        return resident

    def _gather(self, rows: np.ndarray) -> tuple[Tensor, torch.cuda.Event | None]:
        """The rows on the device, and on CUDA the event after which their copy is whole."""
        batch = torch.from_numpy(np.ascontiguousarray(self.array[rows]))
        if self.copies is None:
            return batch, None
        # Pinned blocks come from torch's cache, which takes a block back only when the copy from it is done.
        with torch.cuda.stream(self.copies):
            batch = batch.pin_memory().to(self.device, non_blocking=True)
            return batch, self.copies.record_event()

    def _arrived(self, batch: Tensor, event: torch.cuda.Event | None) -> Tensor:
        """A gathered batch for use on the current stream: (B, C, H, W) or (B, D)."""
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            batch.record_stream(stream)  # its memory is not given away while this stream still reads it
        return batch if self.is_vector else batch.permute(0, 3, 1, 2)  # (B, H, W, C) in memory is channels_last

    def _next(self, ahead: deque) -> tuple[np.ndarray, Tensor]:
        rows, gathered = ahead.popleft()
        return rows, self._arrived(*gathered.result())

    def take(self, rows: np.ndarray) -> Tensor:
        """rows: (B,) int64 in any order."""
        if self.resident is None:
            return self._arrived(*self._gather(rows))
        batch = self.resident.index_select(0, torch.from_numpy(rows).to(self.device))
        return self._arrived(batch.view(len(rows), *self.array.shape[1:]), None)

    def batches(self, rows_of_batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (rows (B,), take(rows)) for each array of rows, in order.

        On the host a thread gathers up to loader.prefetch batches ahead. Its error is raised here, at the batch that
        failed; leaving the loop early waits for the batch in hand and drops the others.
        """
        if self.resident is not None:
            yield from ((rows, self.take(rows)) for rows in rows_of_batches)
            return
        ahead = deque()
        with ThreadPoolExecutor(1, "gather") as thread:
            try:
                for rows in rows_of_batches:
                    ahead.append((rows, thread.submit(self._gather, rows)))
                    if len(ahead) > self.settings.prefetch:
                        yield self._next(ahead)
                while ahead:
                    yield self._next(ahead)
            finally:
                thread.shutdown(wait=False, cancel_futures=True)


def blocks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`rows` in order, `size` at a time; the last block may be smaller."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


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


def training_augmentation(cfg: Config) -> CropFlipConfig | None:
    """The settings that cfg.augment names."""
    return {"none": None, "crop_flip": cfg.crop_flip, "strong": cfg.strong}[cfg.augment]


def training_batches(
    cfg: Config, inputs: Inputs, rows: np.ndarray, epoch: int, first_step: int = 0
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield (rows (b,) int64, inputs (b, ...)) of one epoch from `first_step` on, augmented as `cfg.augment` says.

    b rows are this process's share of a batch of B; all processes' shares, in order of rank, are the batch that one
    process alone would see, as an augmentation follows from the place in the whole batch.
    """
    batches = epoch_rows(rows, cfg.seed, epoch, cfg.train.batch_size)
    settings = training_augmentation(cfg)
    mine = distributed.share(batches.shape[1])
    positions = torch.arange(batches.shape[1], device=inputs.device)[mine]
    for step, (mine_rows, batch) in enumerate(inputs.batches(batches[first_step:, mine]), first_step):
        if settings and not inputs.is_vector:
            place = step * batches.shape[1] + positions
            draws = augment.uniform(
                cfg.seed, augment.TRAIN, epoch, place, n_draws=augment.n_draws(settings), device=inputs.device
            )
            batch = augment.apply(batch, draws, settings)
        yield mine_rows, batch


def view_batch(cfg: Config, batch: Tensor, rows: np.ndarray) -> Tensor:
    """All views of some images: (B, C, H, W) -> (B * V, C, H, W), view v of image i at position i * V + v.

    batch: the inputs of `rows` (B,).  The draws depend on (seed, row, view) only.  A vector has no flips or crops: its
    views are the vector itself.
    """
    n_views = cfg.filter.n_views
    views = batch.movedim(1, -1).repeat_interleave(n_views, dim=0).movedim(-1, 1)  # channels_last stays so
    return views if batch.dim() == 2 else augment.apply(views, view_draws(cfg, batch, rows), cfg.filter.views)


def view_draws(cfg: Config, batch: Tensor, rows: np.ndarray) -> Tensor:
    """The uniform draws of all views of `rows` (B,): (B * V, n) on the device of `batch`."""
    row = torch.from_numpy(rows).to(batch.device)[:, None]
    view = torch.arange(cfg.filter.n_views, device=batch.device)[None, :]
    n_draws = augment.n_draws(cfg.filter.views)
    return augment.uniform(cfg.seed, augment.VIEWS, row, view, n_draws=n_draws, device=batch.device).flatten(0, 1)


def distinct_views(cfg: Config, batch: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """The views of `view_batch` without repetitions: images (U, C, H, W), and which of them each view is (B * V,).

    Views by flips alone are at most four different images a row, and a vector's are one. On CUDA U is rounded up to a
    multiple of 64 by repeating the first, as cuDNN tunes itself anew for every batch size.
    """
    n_views, settings = cfg.filter.n_views, cfg.filter.views
    row = torch.arange(len(rows), device=batch.device).repeat_interleave(n_views)
    if batch.dim() == 2:
        return batch, row
    if not augment.only_flips(settings, batch.shape[1]):
        return view_batch(cfg, batch, rows), torch.arange(len(row), device=batch.device)
    draws = view_draws(cfg, batch, rows)
    flips = 2 * (draws[:, augment.Draw.HFLIP] < settings.hflip_p) + (draws[:, augment.Draw.VFLIP] < settings.vflip_p)
    found, index = torch.unique(4 * row + flips, return_inverse=True)
    chosen = torch.empty_like(found).scatter_(0, index, torch.arange(len(row), device=batch.device))  # any of equals
    if batch.device.type == "cuda":
        chosen = torch.cat([chosen, chosen[:1].expand(-len(chosen) % 64)])
    images = batch.movedim(1, -1)[row[chosen]].movedim(-1, 1)  # channels_last stays so
    return augment.apply(images, draws[chosen], settings), index
