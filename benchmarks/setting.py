"""What the image figures are measured on: a full-width ResNet18 and images of Fashion-MNIST's shape."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from utils import loader, models, training
from utils.config import Config, load_config
from utils.splits import Split, new_split

SIDE, N_CLASSES = 28, 4
WIDTH = 64


@dataclass
class Setting:
    cfg: Config
    runtime: training.Runtime
    split: Split  # (N, 28, 28, 1) uint8 noise with random coarse labels: speed does not depend on what they show

    @property
    def on_gpu(self) -> bool:
        return self.runtime.device.type == "cuda"

    def network(self) -> models.Network:
        """A new network on the CPU, the same weights each time."""
        training.seed_weights(self.cfg, 0)
        rows = np.arange(self.split.n)
        return models.Network(models.build_backbone(self.cfg.model, self.split, rows), N_CLASSES)

    def inputs(self) -> loader.Inputs:
        return loader.Inputs(self.split, self.runtime.device)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.runtime.device)


def open_setting(n_rows: int, *overrides: str) -> Setting:
    """overrides: `key=value` settings on top of the defaults."""
    cfg = load_config("", (f"model.width={WIDTH}", *overrides))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n_rows, SIDE, SIDE, 1), dtype=np.uint8)
    return Setting(cfg, training.pick_runtime(cfg), new_split(images, rng.integers(0, N_CLASSES, n_rows), None))


class PILImages(torch.utils.data.Dataset):
    """What torchvision's own data sets do for an image: an array into PIL, then the transform."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def endless(make_epoch) -> Iterator:
    """The batches of make_epoch(0), make_epoch(1), ... without end."""
    epoch = 0
    while True:
        yield from make_epoch(epoch)
        epoch += 1
