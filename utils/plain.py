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
    """One augmented image, by torchvision as far as crop and flips go: (H, W, C) uint8 -> (C, H, W).

    draws: (n_draws(settings),) uniform in [0, 1), used as augment.apply uses them.
    """
    from torchvision.transforms import functional

    if augment.n_draws(settings) > augment.Draw.VFLIP + 1:
        return augment.apply(torch.from_numpy(image).permute(2, 0, 1)[None], draws[None], settings)[0]
    picture = functional.to_pil_image(image)
    if settings.crop_padding:
        top, left = (draws[:2] * (2 * settings.crop_padding + 1)).long().tolist()
        padded = functional.pad(picture, settings.crop_padding)
        picture = functional.crop(padded, top, left, *image.shape[:2])
    if draws[augment.Draw.HFLIP] < settings.hflip_p:
        picture = functional.hflip(picture)
    if draws[augment.Draw.VFLIP] < settings.vflip_p:
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
