"""The one training loop of all learners, and prediction: resumable to the bit, honest about budget and choice of epoch.

Every random choice is a function of (seed, epoch, position) (see augment.py and loader.py), so a checkpoint needs no
generator state: weights, optimiser, schedule and position are all there is.
"""

import copy
import platform
import signal
import statistics
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

from utils import artifacts, distributed, loader, models, plain
from utils.config import Config, UserError
from utils.metrics import coarse_scores
from utils.splits import Dataset, validation_mask
from utils.stages import OpenStage, differences


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision to compute."""

    device: torch.device
    bf16: bool
    is_plain: bool = False  # speed=plain: contiguous tensors, no fused optimiser, a synchronisation each step

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def place(self, module: nn.Module) -> nn.Module:
        memory_format = torch.contiguous_format if self.is_plain else torch.channels_last
        return module.to(self.device, memory_format=memory_format)

    def describe(self) -> dict:
        """For the manifest: device name, processes, threads, precision."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else artifacts.cpu_name()
        precision = "bf16" if self.bf16 else "fp32"
        return {
            "device": name,
            "processes": distributed.world_size(),
            "threads": torch.get_num_threads(),
            "precision": precision,
            "platform": platform.platform(),
        }


def pick_runtime(cfg: Config) -> Runtime:
    """Resolve device and precision `auto`.  Raises UserError where the wanted device is not there."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    wanted = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and distributed.world_size() > 1:
        wanted = f"cuda:{distributed.local_rank()}"  # each process of a machine has a GPU of its own
    device = torch.device(wanted)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"device: {wanted} is not on this machine ({torch.cuda.device_count()} CUDA devices); use device=cpu"
            + (" or fewer processes" if distributed.world_size() > 1 else "")
        )
    if cfg.speed == "plain" and distributed.world_size() > 1:
        raise UserError("speed: plain is one process; start it without torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.backends.cudnn.benchmark = cfg.speed == "fast"
    else:
        hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and hardware)
    return Runtime(device, bf16, is_plain=cfg.speed == "plain")


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
        if not distributed.is_main():
            return
        seconds = time.time() - self.stage.started
        artifacts.save_torch(self.path, {"fingerprint": self.fingerprint, "seconds": seconds, "phases": self.phases})
        self.save_history()

    def save_history(self) -> None:
        """Write history.jsonl; also at a stage's end, as a kill right after the last checkpoint would cost a line."""
        lines = [line for phase in self.phases.values() for line in phase["history"]]
        self.stage.save_jsonl("history.jsonl", lines)


class Interruption:
    """Turns SIGINT inside the block into a flag, so that the step in hand ends and its checkpoint is whole.

    Not under torchrun: its processes get the signal at different steps and could not agree on one to save.
    """

    def __enter__(self):
        self.wanted = False
        self.is_caught = threading.current_thread() is threading.main_thread() and distributed.world_size() == 1
        if self.is_caught:
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_):
        self.wanted = True

    def __exit__(self, *_):
        if self.is_caught:
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


COMPILED_AT_FIRST = {"auto": None, "always": True, "never": False}  # None: undecided until the first epoch is timed
COMPILE_TRIAL = 1200.0  # seconds left to train below which no trial is made: it takes one to two minutes itself


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
    optimizer = make_optimizer(cfg, network, phase.lr)
    schedule = one_cycle(optimizer, phase.lr, phase.n_steps, cfg.train.warmup)
    per_epoch = loader.steps_in_epoch(len(phase.rows), cfg.train.batch_size)
    batch_size = min(cfg.train.batch_size, len(phase.rows))
    n_epochs = -(-phase.n_steps // per_epoch)
    state = checkpoint.phases.get(phase.name)
    if state is None:
        state = {"step": 0, "lr": 0.0, "losses": [], "best": None, "best_epoch": 0, "history": [],
                 "compiled": COMPILED_AT_FIRST[cfg.compile], "done": False}  # fmt: skip
    elif not state["done"]:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        print(f"{phase.name}: going on at step {state['step']} of {phase.n_steps}", file=sys.stderr)

    trained = in_parallel(runtime, network)
    if state["compiled"]:
        trained = torch.compile(trained)

    def save(done: bool = False) -> None:
        live = {} if done else {
            "network": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()
        }  # fmt: skip
        kept = {key: state[key] for key in ("step", "lr", "losses", "best", "best_epoch", "history", "compiled")}
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
            batches = Timed(batches_of_epoch(cfg, inputs, phase, epoch, first_step))
            for rows, batch in batches:
                loss = train_step(runtime, trained, batch, rows, loss_of, optimizer)
                schedule.step()
                losses.append(torch.tensor(loss.item()) if runtime.is_plain else loss)
                state["step"] += 1
                bar.update()
                if interruption.wanted or state["step"] == phase.n_steps:
                    break
            state["losses"] = state["losses"] + mean_over_ranks(torch.stack(losses)).tolist()
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
                "waiting": round(batches.seconds / seconds, 4), "compiled": bool(state["compiled"]),
            }  # fmt: skip
            state["history"].append(line)
            best_before = max((h["val_accuracy"] for h in state["history"][:-1]), default=-1.0)
            if scores["accuracy"] >= best_before:
                state["best"] = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
                state["best_epoch"] = epoch + 1
            state["losses"] = []
            if state["compiled"] is None:  # the answer goes into the checkpoint: a resumed run uses the same kernels
                steps_left, faster = phase.n_steps - state["step"], None
                if distributed.exchange(steps_left * seconds / len(losses) > COMPILE_TRIAL)[0]:
                    example = rows, batch
                    faster = compiled_if_it_pays(runtime, network, trained, example, loss_of, phase.name, steps_left)
                state["compiled"], trained = faster is not None, faster or trained
            report_epoch(line, bar)
            save(done=state["step"] == phase.n_steps)
            if interruption.wanted:
                raise KeyboardInterrupt(f"{phase.name} epoch {epoch + 1} of {n_epochs} is saved in {checkpoint.path}")
    return Fit(state["best"], state["best_epoch"], phase.images_before + phase.n_steps * batch_size)


def make_optimizer(cfg: Config, network: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum over the parameters that learn."""
    return torch.optim.SGD(
        [p for p in network.parameters() if p.requires_grad],
        lr=lr,
        momentum=cfg.train.momentum,
        nesterov=cfg.train.momentum > 0,
        weight_decay=cfg.train.weight_decay,
        fused=cfg.speed == "fast",
    )


def train_step(runtime: Runtime, network: nn.Module, batch: Tensor, rows: np.ndarray, loss_of, optimizer) -> Tensor:
    """One step of the optimiser; returns the loss as a scalar on the device, which nothing here waits for."""
    with runtime.autocast():
        loss = loss_of(network, batch, rows)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach().float()


def batches_of_epoch(cfg: Config, inputs: loader.Inputs, phase: Phase, epoch: int, first_step: int) -> Iterator[tuple]:
    """(rows, batch) of this process in one epoch of a phase, by the loader or by its slow reference."""
    source = plain if cfg.speed == "plain" else loader
    return source.training_batches(cfg, inputs, phase.rows, phase.first_epoch + epoch, first_step)


class Timed:
    """An iterator that adds up the `seconds` its consumer waits for it."""

    def __init__(self, items: Iterator):
        self.items, self.seconds = iter(items), 0.0

    def __iter__(self):
        return self

    def __next__(self):
        started = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - started


def in_parallel(runtime: Runtime, network: nn.Module) -> nn.Module:
    """What to call in training instead of `network`: under torchrun gradients are averaged over the processes.

    `network`'s batch statistics become those of the whole batch, so that a step is that of one process on all of it.
    """
    if distributed.world_size() == 1:
        return network
    is_cuda = runtime.device.type == "cuda"
    models.share_statistics(network, is_cuda)
    device_ids = [runtime.device.index] if is_cuda else None
    return nn.parallel.DistributedDataParallel(network, device_ids=device_ids)


def mean_over_ranks(losses: Tensor) -> Tensor:
    """Each process's losses are its part of the global batch's, times the number of processes (see cross_entropy)."""
    return distributed.sum_over_ranks(losses) / distributed.world_size()


def compiled_if_it_pays(
    runtime: Runtime, network: nn.Module, trained: nn.Module, example: tuple, loss_of, name: str, steps_left: int
) -> nn.Module | None:
    """`trained` compiled, if a trial on one batch shows that steps get faster by more than noise; otherwise None.

    Weights, statistics and gradients are left as they were.  Under torchrun rank 0 decides.
    """
    before = copy.deepcopy(network.state_dict())
    network.train()
    compiled = torch.compile(trained)
    try:
        (cost,) = timed_steps(runtime, compiled, example, loss_of, repeats=1)
    except RuntimeError as error:  # no C++ compiler here, an operator that it does not know
        reason = str(error).strip().splitlines()[0]
        print(f"{name}: torch.compile failed ({reason}); going on without it", file=sys.stderr)
        restore(network, before)
        return None
    eager_s, compiled_s = (
        statistics.median(timed_steps(runtime, model, example, loss_of, repeats=5)) for model in (trained, compiled)
    )
    pays = distributed.exchange(compiled_s < 0.95 * eager_s)[0]
    print(
        f"{name}: torch.compile took {cost:.0f} s and makes a step {compiled_s * 1e3:.1f} ms instead of "
        f"{eager_s * 1e3:.1f}: {'on' if pays else 'off'} for the {steps_left:,} steps left",
        file=sys.stderr,
    )
    restore(network, before)
    return compiled if pays else None


def restore(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Undo what forward and backward passes without an optimiser step did."""
    network.load_state_dict(state)
    network.zero_grad(set_to_none=True)


def timed_steps(runtime: Runtime, network: nn.Module, example: tuple, loss_of, repeats: int) -> list[float]:
    """Seconds of forward and backward passes on the example (rows, batch)."""
    rows, batch = example
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        with runtime.autocast():
            loss = loss_of(network, batch, rows)
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds


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
    print(
        f"{head}  {text}  {line['images_per_s']:,.0f} images/s ({line['waiting']:.0%} waiting)  eta {left:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def predict(
    runtime: Runtime,
    network: nn.Module,
    inputs: loader.Inputs,
    rows: np.ndarray,
    output=lambda y: y,
    batch_size: int = 512,
) -> Iterator[np.ndarray]:
    """Yield output(network(batch)) as float32 arrays in row order, eval mode, without augmentation.

    batch_size: images in a forward pass of one process.  Every process gets all rows, each having computed its share.
    """
    network.eval()

    def forward(_, batch: Tensor) -> Tensor:
        with torch.inference_mode(), runtime.autocast():
            return output(network(batch)).float()

    yield from in_blocks(inputs, rows, batch_size, forward)


def in_blocks(
    inputs: loader.Inputs, rows: np.ndarray, size: int, forward: Callable[[np.ndarray, Tensor], Tensor]
) -> Iterator[np.ndarray]:
    """forward(rows (b,), their inputs) -> (b, ...) over all rows, `size` a process at once: arrays in row order.

    Every process gets all rows' results, each having computed its share.  A result is fetched from the device while
    the next one is being computed there.
    """
    blocks = list(loader.blocks(rows, size * distributed.world_size()))
    own = inputs.batches(block[distributed.share(len(block))] for block in blocks)
    pending = None
    for block, (part_rows, batch) in zip(blocks, own, strict=True):
        part = forward(part_rows, batch)
        if pending is not None:
            yield distributed.gather_rows(*pending).numpy()
        pending = part, len(block)
    if pending is not None:
        yield distributed.gather_rows(*pending).numpy()


def predict_probs(
    runtime: Runtime, network: nn.Module, inputs: loader.Inputs, rows: np.ndarray, output=lambda y: y
) -> np.ndarray:
    """(n, K) float32 softmax of the logits that `output` picks from the network's answer."""
    return np.concatenate(list(predict(runtime, network, inputs, rows, lambda y: output(y).float().softmax(1))))


def probability_scores(probs: np.ndarray, labels: np.ndarray) -> dict:
    """coarse_scores of the most likely class, and the mean cross-entropy 'loss' (natural log)."""
    of_label = probs[np.arange(len(labels)), labels]
    return {**coarse_scores(labels, probs.argmax(1)), "loss": float(-np.log(np.maximum(of_label, 1e-12)).mean())}


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean over the rows whose label is not -1; 0 where there is none.

    Of several processes each gets its rows' part of the whole batch's mean times their number: averaged over them, as
    DistributedDataParallel averages gradients, it is that mean.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    count = distributed.sum_over_ranks((labels >= 0).sum())
    return total * distributed.world_size() / count.clamp(min=1)


def labels_on(runtime: Runtime, labels: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    """A look-up from rows (B,) to their labels (B,) int64 on the device."""
    resident = torch.from_numpy(labels).to(runtime.device)
    return lambda rows: resident[torch.from_numpy(rows).to(runtime.device, non_blocking=True)]
