"""Scoring augmented views: batches of images x views against one image at a time, as the original does."""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.setting import Setting, open_setting
from benchmarks.timing import compare
from utils.uncertainty import view_probs

N_VIEWS = 5
N_IMAGES = {"cpu": {True: 60, False: 306}, "cuda": {True: 1_000, False: 4_000}}  # in one timed call; True = --quick
REPEATS = {True: 3, False: 7}


def our_scoring(setting: Setting) -> Callable[[], np.ndarray]:
    """All views of all images a call, as uncertainty_filter.py predicts them: (N, V, K_C) float32."""
    network, inputs = setting.runtime.place(setting.network()), setting.inputs()
    how = setting.cfg, setting.runtime, network, inputs, np.arange(setting.split.n)
    return lambda: np.concatenate(list(view_probs(*how)))


def peer_scoring(setting: Setting) -> Callable[[], np.ndarray]:
    """The same a PIL image at a time: 5 transforms, one forward pass in fp32, the probabilities read."""
    from PIL import Image
    from torchvision import transforms

    views = setting.cfg.filter.views
    flips = [transforms.RandomHorizontalFlip(views.hflip_p), transforms.RandomVerticalFlip(views.vflip_p)]
    transform, device = transforms.Compose([*flips, transforms.ToTensor()]), setting.runtime.device
    network, images = setting.network().to(device).eval(), setting.split.inputs[..., 0]

    def score() -> np.ndarray:
        probs = []
        for image in images:
            image = Image.fromarray(image)
            batch = torch.stack([transform(image) for _ in range(N_VIEWS)]).to(device)
            with torch.no_grad():
                probs.append(network(batch).softmax(1).cpu().numpy())
        return np.stack(probs)

    return score


def uncertainty(quick: bool) -> dict:
    """Images a second, 5 views each."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    n_images = N_IMAGES[kind][quick]
    setting = open_setting(n_images, f"filter.n_views={N_VIEWS}")
    return compare(our_scoring(setting), peer_scoring(setting), n_images, "images/s", REPEATS[quick])
