"""Images a second from memory to normalised batches, against torchvision's transforms in a torch DataLoader."""

import numpy as np
import torch

from benchmarks.setting import PILImages
from benchmarks.timing import compare
from utils.config import Config, TrainConfig
from utils.loader import Inputs, training_batches
from utils.models import Normalise
from utils.splits import Split
from utils.training import pick_runtime

BATCH_SIZE = 512
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10


def peer_loader(images: np.ndarray, labels: np.ndarray, on_cuda: bool) -> torch.utils.data.DataLoader:
    """Padded crop, flip, tensor, normalise in two worker processes that stay alive."""
    from torchvision import transforms

    transform = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    return torch.utils.data.DataLoader(
        PILImages(images, labels, transform), BATCH_SIZE, shuffle=True, num_workers=2, drop_last=True,
        persistent_workers=True, pin_memory=on_cuda,
    )  # fmt: skip


def loader(quick: bool) -> dict:
    """One epoch of crop, flip and normalisation of random 32 x 32 colour images, ours against the peer's.

    Both end with the batch on the device in the precision that training computes in.
    """
    n_images, repeats = (20 * BATCH_SIZE, 5) if quick else (97 * BATCH_SIZE, 7)
    cfg = Config(train=TrainConfig(batch_size=BATCH_SIZE))
    runtime = pick_runtime(cfg)
    device, on_cuda = runtime.device, runtime.device.type == "cuda"
    dtype = torch.bfloat16 if runtime.bf16 else torch.float32
    images = np.random.default_rng(0).integers(0, 256, (n_images, 32, 32, 3), dtype=np.uint8)
    rows, labels = np.arange(n_images), np.zeros(n_images, np.int64)
    inputs = Inputs(Split(images, labels, None, None, rows), device)
    normalise = Normalise(MEAN, STD).to(device)
    theirs = peer_loader(images, labels, on_cuda)

    def finish():
        if on_cuda:
            torch.cuda.synchronize(device)

    def ours():
        with torch.inference_mode():
            for _, batch in training_batches(cfg, inputs, rows, epoch=0):
                normalise(batch).to(dtype)
        finish()

    def peer():
        for batch, _ in theirs:
            batch.to(device, dtype, memory_format=torch.channels_last, non_blocking=True)
        finish()

    result = compare(ours, peer, n_images // BATCH_SIZE * BATCH_SIZE, "images/s", repeats)
    return {**result, "device": runtime.describe()["device"], "dtype": str(dtype).removeprefix("torch.")}
