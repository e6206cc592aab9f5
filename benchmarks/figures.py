"""The list of figures: where each is computed, what it compares and what it should reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    module: str  # of this package; has a function of the figure's name: (quick: bool) -> dict with at least 'ratio'
    what: str  # ours against the peer, for the table
    cpu: float | None  # target of 'ratio' on 2 CPU cores with AMX; None = reported only
    cuda: float | None  # target on one GPU
    at_most: bool = False  # the ratio must not exceed the target; otherwise it must reach it

    def target(self, device_type: str) -> float | None:
        return self.cuda if device_type == "cuda" else self.cpu

    def reached(self, ratio: float, target: float | None) -> bool | None:
        """None where there is no target."""
        if target is None:
            return None
        return ratio <= target if self.at_most else ratio >= target


FIGURES = {
    "loader": Figure("loader", "augmented batches on the device / DataLoader, 2 workers, PIL", 10, 20),
    "train": Figure("train", "training steps, ResNet18 of width 64, 28x28 / the plain loop in fp32", 3, 5),
    "train_limit": Figure("train", "FLOP/s of a training step / of a matrix product", None, 0.35),
    "uncertainty": Figure("uncertainty", "scoring 5 views, batches of images x views / an image at a time", 8, 50),
    "cluster": Figure("cluster", "all coarse classes of one seed / one after another with UMAP's own k-NN", 2.5, None),
    "cluster_scale": Figure("cluster", "slope of log(seconds) against log(rows)", 1.2, 1.2, at_most=True),
    "extract_memory": Figure("memory", "peak memory of ten times the images / of the images", 1.2, 1.2, at_most=True),
    "pipeline": Figure("pipeline", "seconds of the six stages, speed=plain / speed=fast", 3, 10),
}
