"""The one training loop of all learners, and prediction: resumable to the bit, honest about budget and choice of epoch.

Every random choice is a function of (seed, epoch, position) (see augment.py and loader.py), so a checkpoint needs no
generator state: weights, optimiser, schedule and position are all there is.
"""

import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from utils import artifacts, loader
from utils.config import Config, UserError
from utils.metrics import coarse_scores
from utils.splits import Dataset, validation_mask
from utils.stages import OpenStage, differences


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision to compute."""

    device: torch.device
    bf16: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, memory_format=torch.channels_last)

    def describe(self) -> dict:
        """For the manifest: device name, threads, precision."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else artifacts.cpu_name()
        precision = "bf16" if self.bf16 else "fp32"
        return {
            "device": name,
            "threads": torch.get_num_threads(),
            "precision": precision,
            "platform": platform.platform(),
        }


def pick_runtime(cfg: Config) -> Runtime:
    """Resolve device and precision `auto`.  Raises UserError where the wanted device is not there."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    wanted = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"device: {wanted} is not on this machine ({torch.cuda.device_count()} CUDA devices); use device=cpu"
        )
    if device.type == "cuda":
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.backends.cudnn.benchmark = True
    else:
        hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Runtime(device, bf16=cfg.precision == "bf16" or (cfg.precision == "auto" and hardware))


def train_rows(cfg: Config, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) of this seed, both (n,) int64 ascending and disjoint."""
    is_val = validation_mask(dataset.train.coarse_labels, cfg.data.val_fraction, cfg.seed)
    if not is_val.any():
        raise UserError("data.val_fraction: no coarse class has the two rows that a validation row needs")
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


class Checkpoint:
    """checkpoint.pt of an unfinished training stage: {fingerprint, seconds, phases: {name: state}}.

    Raises UserError on opening where it is damaged or belongs to other settings, inputs or another precision; with
    --force such a one is passed over, and one that fits is still gone on from: the bits are the same.
    """

    def __init__(self, stage: OpenStage, runtime: Runtime):
        self.stage = stage
        self.path: Path = stage.folder / "checkpoint.pt"
        self.fingerprint = {**stage.fingerprint, "precision": "bf16" if runtime.bf16 else "fp32"}
        self.phases: dict[str, dict] = {}
        if not self.path.exists():
            return
        try:
            saved = self.read()
        except UserError:
            if stage.cfg.force:
                return
            raise
        self.phases = saved["phases"]
        stage.started -= saved["seconds"]  # the manifest's seconds count what was spent before

    def read(self) -> dict:
        saved = artifacts.load_torch(self.path)
        if not isinstance(saved, dict) or saved.keys() != {"fingerprint", "seconds", "phases"}:
            raise UserError(f"{self.path}: not a checkpoint of this program; --force starts the stage anew")
        if saved["fingerprint"] != self.fingerprint:
            old, new = (
                {**f["settings"], **f["inputs"], "data": f["data_signature"], "precision in use": f["precision"]}
                for f in (saved["fingerprint"], self.fingerprint)
            )
            raise UserError(
                f"{self.path} is of an unfinished run made otherwise ({'; '.join(differences(old, new))}); "
                "go on with the old settings, or --force starts anew"
            )
        return saved

    def save(self, phase: str, state: dict) -> None:
        self.phases[phase] = state
        seconds = time.time() - self.stage.started
        artifacts.save_torch(self.path, {"fingerprint": self.fingerprint, "seconds": seconds, "phases": self.phases})
        self.save_history()

    def save_history(self) -> None:
        """Write history.jsonl; also at a stage's end, as a kill right after the last checkpoint would cost a line."""
        lines = [line for phase in self.phases.values() for line in phase["history"]]
        artifacts.save_jsonl(self.stage.path("history.jsonl"), lines)


class Interruption:
    """Turns SIGINT inside the block into a flag, so that the step in hand ends and its checkpoint is whole."""

    def __enter__(self):
        self.wanted = False
        self.is_main = threading.current_thread() is threading.main_thread()
        if self.is_main:
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_):
        self.wanted = True

    def __exit__(self, *_):
        if self.is_main:
            signal.signal(signal.SIGINT, self.previous)


@dataclass
class Phase:
    """One run of `fit`."""

    name: str  # coarse | fine | multihead
    rows: np.ndarray  # (n,) int64, training rows
    n_steps: int  # optimiser steps in all; the last epoch may be cut short
    lr: float  # peak learning rate
    lr_key: str  # its setting, for messages
    images_before: int = 0  # images that made the weights this phase starts from
    first_epoch: int = 0  # offset of the epoch number in the draws, so that two phases see other orders and crops


@dataclass
class Fit:
    """What a phase leaves."""

    state: dict[str, Tensor]  # weights of the best epoch
    best_epoch: int  # 1-based
    images_seen: int  # all images that went into these weights, earlier phases included


def epochs_to_steps(cfg: Config, n_rows: int, epochs: int) -> int:
    return epochs * loader.steps_in_epoch(n_rows, cfg.train.batch_size)


def seed_weights(cfg: Config, purpose: int) -> None:
    """Fix torch's global generator before a network is made; each purpose draws other weights."""
    torch.manual_seed(int(np.random.SeedSequence([cfg.seed, purpose]).generate_state(1)[0]))


def fit(
    cfg: Config,
    runtime: Runtime,
    network: nn.Module,
    inputs: loader.Inputs,
    phase: Phase,
    loss_of: Callable[[nn.Module, Tensor, np.ndarray], Tensor],
    validate: Callable[[nn.Module], dict],
    checkpoint: Checkpoint,
) -> Fit:
    """Train by SGD with Nesterov momentum and a one-cycle rate; keep the weights of the best validation accuracy.

    loss_of(network, batch, rows) -> scalar loss.  validate(network) -> {'accuracy', 'loss', ...}.  Among equal
    accuracies the latest epoch wins: its learning rate was lower.  Goes on from `checkpoint` where it holds this phase.
    Raises UserError on a non-finite loss, naming the step; KeyboardInterrupt after SIGINT, when all is saved.
    """
    runtime.place(network)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters,
        lr=phase.lr,
        momentum=cfg.train.momentum,
        nesterov=cfg.train.momentum > 0,
        weight_decay=cfg.train.weight_decay,
    )
    schedule = one_cycle(optimizer, phase.lr, phase.n_steps, cfg.train.warmup)
    per_epoch = loader.steps_in_epoch(len(phase.rows), cfg.train.batch_size)
    batch_size = min(cfg.train.batch_size, len(phase.rows))
    n_epochs = -(-phase.n_steps // per_epoch)
    state = checkpoint.phases.get(phase.name)
    if state is None:
        state = {"step": 0, "lr": 0.0, "losses": [], "best": None, "best_epoch": 0, "history": [], "done": False}
    elif not state["done"]:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        print(f"{phase.name}: going on at step {state['step']} of {phase.n_steps}", file=sys.stderr)

    def save(done: bool = False) -> None:
        live = {} if done else {
            "network": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()
        }  # fmt: skip
        kept = {key: state[key] for key in ("step", "lr", "losses", "best", "best_epoch", "history")}
        checkpoint.save(phase.name, {**kept, **live, "done": done})

    bar = tqdm(total=phase.n_steps, initial=state["step"], desc=phase.name, disable=None, leave=False)
    with Interruption() as interruption, bar:
        while state["step"] < phase.n_steps:
            epoch, first_step = divmod(state["step"], per_epoch)
            started = time.perf_counter()
            if first_step == 0:
                state["lr"] = schedule.get_last_lr()[0]
            losses = []
            network.train()
            for rows, batch in loader.training_batches(cfg, inputs, phase.rows, phase.first_epoch + epoch, first_step):
                with runtime.autocast():
                    loss = loss_of(network, batch, rows)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                state["step"] += 1
                bar.update()
                if interruption.wanted or state["step"] == phase.n_steps:
                    break
            state["losses"] = state["losses"] + torch.stack(losses).float().tolist()
            check_finite(state["losses"], epoch * per_epoch, phase, epoch + 1)
            if interruption.wanted and state["step"] % per_epoch and state["step"] < phase.n_steps:
                save()
                raise KeyboardInterrupt(f"step {state['step']} of {phase.n_steps} is saved in {checkpoint.path}")
            n_images, seconds = len(losses) * batch_size, time.perf_counter() - started
            scores = validate(network)
            check_finite([scores["loss"]], state["step"] - 1, phase, epoch + 1)
            line = {
                "phase": phase.name, "epoch": epoch + 1, "epochs": n_epochs, "loss": float(np.mean(state["losses"])),
                "val_accuracy": scores["accuracy"], "val_loss": scores["loss"], "lr": state["lr"],
                "images_seen": phase.images_before + state["step"] * batch_size,
                "seconds": round(seconds, 3), "images_per_s": round(n_images / seconds, 1),
            }  # fmt: skip
            state["history"].append(line)
            best_before = max((h["val_accuracy"] for h in state["history"][:-1]), default=-1.0)
            if scores["accuracy"] >= best_before:
                state["best"] = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
                state["best_epoch"] = epoch + 1
            state["losses"] = []
            report_epoch(line, bar)
            save(done=state["step"] == phase.n_steps)
            if interruption.wanted:
                raise KeyboardInterrupt(f"{phase.name} epoch {epoch + 1} of {n_epochs} is saved in {checkpoint.path}")
    return Fit(state["best"], state["best_epoch"], phase.images_before + phase.n_steps * batch_size)


def one_cycle(
    optimizer: torch.optim.Optimizer, lr: float, n_steps: int, warmup: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """From lr / 25 up to `lr` in the first `warmup` of the steps, then down to nearly 0, both along a cosine."""
    total = n_steps + 1  # the rate that ends the cycle is too small to spend a step on
    if warmup * total == 1:  # a rise of one step exactly: torch would divide by zero
        warmup *= 1 - 1e-9
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=warmup, cycle_momentum=False)


def check_finite(losses: list[float], steps_before: int, phase: Phase, epoch: int) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise UserError(
            f"{phase.name}: the loss is {losses[bad[0]]} at step {steps_before + int(bad[0]) + 1} (epoch {epoch}); "
            f"lower {phase.lr_key}, now {phase.lr:g}, or check the inputs"
        )


def report_epoch(line: dict, bar: tqdm) -> None:
    """One line an epoch on stderr; on a terminal the bar carries the numbers."""
    text = f"loss {line['loss']:.3f}  val acc {line['val_accuracy']:.4f}"
    if not bar.disable:
        bar.set_postfix_str(text)
        return
    left = (line["epochs"] - line["epoch"]) * line["seconds"]
    head = f"{line['phase']:<10}{line['epoch']:>4}/{line['epochs']}"
    print(f"{head}  {text}  {line['images_per_s']:,.0f} images/s  eta {left:.0f} s", file=sys.stderr, flush=True)


def predict(
    runtime: Runtime,
    network: nn.Module,
    inputs: loader.Inputs,
    rows: np.ndarray,
    output=lambda y: y,
    batch_size: int = 512,
) -> Iterator[Tensor]:
    """Yield output(network(batch)) as float32 on the device, in row order, eval mode, without augmentation."""
    network.eval()
    with torch.inference_mode():
        for _, batch in inputs.batches(loader.blocks(rows, batch_size)):
            with runtime.autocast():
                y = network(batch)
            yield output(y).float()


def predict_probs(
    runtime: Runtime, network: nn.Module, inputs: loader.Inputs, rows: np.ndarray, output=lambda y: y
) -> np.ndarray:
    """(n, K) float32 softmax of the logits that `output` picks from the network's answer."""
    probs = [p.softmax(1).cpu() for p in predict(runtime, network, inputs, rows, output)]
    return torch.cat(probs).numpy()


def probability_scores(probs: np.ndarray, labels: np.ndarray) -> dict:
    """coarse_scores of the most likely class, and the mean cross-entropy 'loss' (natural log)."""
    of_label = probs[np.arange(len(labels)), labels]
    return {**coarse_scores(labels, probs.argmax(1)), "loss": float(-np.log(np.maximum(of_label, 1e-12)).mean())}


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean over the rows whose label is not -1; 0 where there is none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def labels_on(runtime: Runtime, labels: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    """A look-up from rows (B,) to their labels (B,) int64 on the device."""
    resident = torch.from_numpy(labels).to(runtime.device)
    return lambda rows: resident[torch.from_numpy(rows).to(runtime.device)]
