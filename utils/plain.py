"""The slow way (speed=plain): what the fast paths are compared with, by tests for equality, by benchmarks for time.

Images go through torchvision's transforms one at a time in a DataLoader with two workers; a step of the filter scores
one image. Draws are those of the fast paths, so results are the same but for rounding.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils import augment, loader
from utils.config import Config, CropFlipConfig

N_WORKERS = 2


def transform(image: np.ndarray, draws: Tensor, settings: CropFlipConfig) -> Tensor:
    """One augmented image, by torchvision where it has the operation: (H, W, C) uint8 -> (C, H, W).

    draws: (n,) uniform in [0, 1), used as augment.apply uses them.
    """
    from torchvision.transforms import functional

    if augment.needs_floats(settings) or settings.cutout:
        return augment.apply(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], draws[None], settings)[0]
    picture = functional.to_pil_image(np.array(image))
    height, width, padding = *image.shape[:2], settings.crop_padding
    if padding:
        top, left = (draws[:2] * (2 * padding + 1)).long().tolist()
        picture = functional.crop(functional.pad(picture, padding), top, left, height, width)
    if draws[2] < settings.hflip_p:
        picture = functional.hflip(picture)
    if draws[3] < settings.vflip_p:
        picture = functional.vflip(picture)
    return functional.pil_to_tensor(picture)


class AugmentedRows(Dataset):
    """Item i is image rows[i] as it is at position i of an epoch."""

    def __init__(self, cfg: Config, inputs: "loader.Inputs", rows: np.ndarray, epoch: int):
        self.cfg, self.array, self.is_vector, self.rows, self.epoch = cfg, inputs.array, inputs.is_vector, rows, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Tensor:
        item = np.array(self.array[self.rows[position]])
        settings = loader.training_augmentation(self.cfg)
        if self.is_vector or settings is None:
            return torch.from_numpy(item) if self.is_vector else torch.from_numpy(item).permute(2, 0, 1)
        n_draws = augment.n_draws(settings)
        return transform(
            item, augment.uniform(self.cfg.seed, augment.TRAIN, self.epoch, position, n_draws=n_draws), settings
        )


def training_batches(
    cfg: Config, inputs: "loader.Inputs", rows: np.ndarray, epoch: int, first_step: int = 0
) -> Iterator:
    """As loader.training_batches, by a DataLoader."""
    batches = loader.epoch_rows(rows, cfg.seed, epoch, cfg.train.batch_size)
    items = AugmentedRows(cfg, inputs, batches.ravel(), epoch)
    order = range(first_step * batches.shape[1], batches.size)
    source = DataLoader(items, batch_size=batches.shape[1], sampler=order, num_workers=N_WORKERS)
    for step, batch in enumerate(source, start=first_step):
        yield batches[step], batch.to(inputs.device)


def view_probs(cfg: Config, runtime, network: torch.nn.Module, inputs: "loader.Inputs", rows: np.ndarray) -> Iterator:
    """As uncertainty.view_probs, one image a step: yields (1, V, K) float32 arrays."""
    settings = cfg.filter.views
    network.eval()
    for row in rows:
        item = np.array(inputs.array[row])
        views = [
            torch.from_numpy(item) if inputs.is_vector else transform(
                item,
                augment.uniform(cfg.seed, augment.VIEWS, int(row), view, n_draws=augment.n_draws(settings)), settings,
            )
            for view in range(cfg.filter.n_views)
        ]  # fmt: skip
        with torch.no_grad(), runtime.autocast():
            logits = network(torch.stack(views).to(inputs.device))
        yield logits.float().softmax(1)[None].cpu().numpy()
