"""What the three learners (coarse, FN, MH) have in common: the rows, the losses on labels, the scores they report."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from utils import artifacts, loader, metrics, models, training
from utils.config import Config, UserError
from utils.data import load_dataset
from utils.splits import Dataset
from utils.stages import OpenStage

BACKBONE, COARSE_HEAD, FINE_HEAD = 0, 1, 2  # purposes of weight draws: all learners start from one backbone a seed


@dataclass
class PseudoLabels:
    """One discoverer's labels on the training rows."""

    labels: np.ndarray  # (N,) int64, -1 = none
    parents: np.ndarray  # (K_F,) int64
    test_labels: np.ndarray  # (N_test,) int64, for grouping test rows in metrics
    rows: np.ndarray  # (n,) int64, training rows that have a label


@dataclass
class Task:
    """A data set with its split on a device, for one training stage."""

    cfg: Config
    stage: OpenStage
    runtime: training.Runtime
    dataset: Dataset
    inputs: loader.Inputs
    train_rows: np.ndarray
    val_rows: np.ndarray
    coarse_labels: Callable[[np.ndarray], Tensor]
    checkpoint: training.Checkpoint

    def starting_backbone(self, init: str = "scratch") -> tuple[nn.Module, int]:
        """(backbone, images that made its weights) for init = scratch | coarse; the same draws for every learner."""
        if init == "coarse":
            path = self.stage.input("coarse/model.pt")
            images_seen = artifacts.load_json(path.with_name("metrics.json"))["images_seen"]
            return models.load_backbone(self.cfg.model, self.dataset.train, path), images_seen
        training.seed_weights(self.cfg, BACKBONE)
        return models.build_backbone(self.cfg.model, self.dataset.train, self.train_rows), 0

    def steps_for(self, images: int) -> int:
        """Optimiser steps over all training rows that see `images` images, to the nearest step."""
        return max(1, round(images / min(self.cfg.train.batch_size, len(self.train_rows))))

    def fit(self, network: nn.Module, phase: training.Phase, loss_of, validate) -> training.Fit:
        return training.fit(self.cfg, self.runtime, network, self.inputs, phase, loss_of, validate, self.checkpoint)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return training.cross_entropy(logits, labels, self.cfg.train.label_smoothing)

    def coarse_loss(self, network: nn.Module, batch: Tensor, rows: np.ndarray) -> Tensor:
        return self.cross_entropy(network(batch), self.coarse_labels(rows))

    def coarse_validation(self, network: nn.Module, output=lambda y: y) -> dict:
        """Scores on the validation rows; `output` picks the coarse logits from the network's answer."""
        probs = training.predict_probs(self.runtime, network, self.inputs, self.val_rows, output)
        return training.probability_scores(probs, self.dataset.train.coarse_labels[self.val_rows])

    def score_fine(self, network: nn.Module, output=lambda y: y) -> dict | None:
        """Quality of the network's fine classes on the test rows against truth; None where there is no truth."""
        test = self.dataset.test
        if test.fine_labels is None:
            return None
        probs = training.predict_probs(self.runtime, network, self.test_inputs, np.arange(test.n), output)
        return metrics.cluster_quality(test.fine_labels, probs.argmax(1))

    @functools.cached_property
    def test_inputs(self) -> loader.Inputs:
        return loader.Inputs(self.dataset.test, self.runtime.device, self.cfg.loader)

    def load_labels(self, source: str) -> PseudoLabels:
        """Raises UserError where the arrays do not fit the data set or no training row has a label."""
        read = {
            name: artifacts.load_array(self.stage.input(f"labels/{source}/{name}.npy"), rows)
            for name, rows in (
                ("labels", self.dataset.train.n),
                ("test_labels", self.dataset.test.n),
                ("parents", None),
            )
        }
        folder = self.stage.cfg.run_dir / "labels" / source
        for name, array in read.items():
            if array.dtype != np.int64 or array.ndim != 1:
                raise UserError(
                    f"{folder}/{name}.npy: {array.dtype} of shape {array.shape}; it must be int64 of one dimension"
                )
        labels, parents = read["labels"], read["parents"]
        if labels.min() < -1 or labels.max() >= len(parents):
            raise UserError(f"{folder}/labels.npy: ids must lie in [-1, {len(parents)}), the length of parents.npy")
        if len(parents) and (parents.min() < 0 or parents.max() >= self.dataset.K_C):
            raise UserError(
                f"{folder}/parents.npy: coarse ids must lie in [0, {self.dataset.K_C}), the number of coarse classes"
            )
        labelled = labels >= 0
        if (parents[labels[labelled]] != self.dataset.train.coarse_labels[labelled]).any():
            raise UserError(f"{folder}: some rows' pseudo label has a parent other than their coarse label")
        rows = self.train_rows[labels[self.train_rows] >= 0]
        if not len(rows):
            raise UserError(
                f"{folder}/labels.npy: no training row has a label (all are -1); cluster with other settings"
            )
        if len(rows) < 2:
            raise UserError(f"{folder}/labels.npy: one training row has a label; batch normalisation needs two")
        return PseudoLabels(labels, parents, read["test_labels"], rows)

    def report(
        self,
        network: nn.Module,
        images_seen: int,
        best_epoch: dict[str, int],
        output=lambda y: y,
        pseudo: PseudoLabels | None = None,
        test_fine: dict | None = None,
        **facts,
    ) -> None:
        """Read the test set once; write metrics.json and test_preds.npy and print the result."""
        test_labels = self.dataset.test.coarse_labels
        probs = training.predict_probs(self.runtime, network, self.test_inputs, np.arange(self.dataset.test.n), output)
        preds = probs.argmax(1).astype(np.int64)
        test = metrics.coarse_scores(test_labels, preds)
        groups = {
            "worst_subclass_accuracy": self.dataset.test.fine_labels,
            "worst_discovered_accuracy": pseudo and pseudo.test_labels,
        }
        for key, group in groups.items():
            test[key] = None if group is None else metrics.worst_group_accuracy(test_labels, preds, group)
        content = {
            "stage": self.stage.folder.relative_to(self.cfg.run_dir).parts[0],
            "labels": None,
            **facts,
            "seed": self.cfg.seed,
            "images_seen": images_seen,
            "best_epoch": best_epoch,
            "n_train": len(self.train_rows),
            "n_labelled": len(pseudo.rows) if pseudo else None,
            "n_fine": len(pseudo.parents) if pseudo else None,
            "val": self.coarse_validation(network, output),
            "test": test,
            "test_fine": test_fine,
        }
        self.checkpoint.save_history()
        self.stage.save_array("test_preds.npy", preds)
        self.stage.save_json("metrics.json", content)
        print(
            f"{self.stage.folder}: test accuracy {test['accuracy']:.4f}, balanced {test['balanced_accuracy']:.4f}, "
            f"val {content['val']['accuracy']:.4f} at epoch {best_epoch}, {images_seen:,} images seen"
        )


def open_task(cfg: Config, stage: OpenStage) -> Task:
    """Load data, split and checkpoint for a training stage and say what was found."""
    runtime = training.pick_runtime(cfg)
    checkpoint = training.Checkpoint(stage, runtime)
    dataset = load_dataset(cfg.data, cfg.dataset_dir / "cache")
    train_rows, val_rows = training.train_rows(cfg, dataset)
    if len(train_rows) < 2:
        raise UserError(f"data: {len(train_rows)} training rows are too few to train on")
    inputs = loader.Inputs(dataset.train, runtime.device, cfg.loader)
    labels = training.labels_on(runtime, dataset.train.coarse_labels)
    where = runtime.describe()
    print(
        f"{where['device']}, {where['precision']}: {len(train_rows):,} training, {len(val_rows):,} validation, "
        f"{dataset.test.n:,} test rows, {dataset.K_C} coarse classes",
        file=sys.stderr,
    )
    return Task(cfg, stage, runtime, dataset, inputs, train_rows, val_rows, labels, checkpoint)


def sum_by_parent(probs: Tensor | np.ndarray, parents: np.ndarray, n_coarse: int):
    """Coarse probabilities as sums of fine ones: (n, K_F) -> (n, K_C)."""
    membership = np.zeros((len(parents), n_coarse), dtype=np.float32)
    membership[np.arange(len(parents)), parents] = 1
    return probs @ (torch.from_numpy(membership) if isinstance(probs, Tensor) else membership)
