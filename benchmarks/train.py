"""Training steps: against the plain loop that most scripts have, and against what the device can do at best."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.setting import SIDE, PILImages, Setting, endless, open_setting
from benchmarks.timing import compare
from utils import loader, training

LEARNING_RATE = 0.01
N_ROWS = {"cpu": 5_000, "cuda": 60_000}
BATCH_SIZE = {"cpu": 128, "cuda": 256}
STEPS = {"cpu": {True: 1, False: 4}, "cuda": {True: 50, False: 200}}  # in one timed call; True = --quick
REPEATS = {True: 3, False: 7}
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the limit
PRODUCTS = {"cpu": 8, "cuda": 40}  # in one timed call
DATA = "data of a step"  # a range in the profile
# The first family that the operator or one of its callers has a part of its name in.
FAMILIES = [
    ("data", (DATA,)),
    ("optimiser", ("sgd", "Optimizer", "_foreach")),
    ("convolution backward", ("convolution_backward", "ConvolutionBackward")),
    ("convolution forward", ("convolution",)),
    ("batch norm", ("batch_norm", "BatchNorm")),
    ("elementwise", ("relu", "threshold", "add", "mul", "div", "sub", "copy_", "to_copy", "fill_", "zero_", "triton")),
]


def open_train() -> Setting:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return open_setting(N_ROWS[kind], f"train.batch_size={BATCH_SIZE[kind]}")


def our_step(setting: Setting) -> Callable[[], None]:
    """One training step a call, as `training.fit` takes them."""
    cfg, runtime = setting.cfg, setting.runtime
    network, inputs = runtime.place(setting.network()).train(), setting.inputs()
    labels, rows = training.labels_on(runtime, setting.split.coarse_labels), np.arange(setting.split.n)
    batches = endless(lambda epoch: loader.training_batches(cfg, inputs, rows, epoch))
    optimizer = training.make_optimizer(cfg, network, LEARNING_RATE)
    schedule = training.one_cycle(optimizer, LEARNING_RATE, 10**6, cfg.train.warmup)

    def loss_of(network: nn.Module, batch: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        return training.cross_entropy(network(batch), labels(rows), cfg.train.label_smoothing)

    def step() -> None:
        with torch.profiler.record_function(DATA):
            batch_rows, batch = next(batches)
        training.train_step(runtime, network, batch, batch_rows, loss_of, optimizer)
        schedule.step()

    return step


def peer_step(setting: Setting) -> Callable[[], None]:
    """One step of the plain loop: DataLoader with 2 workers, PIL, fp32, contiguous, the loss read at every step."""
    from torchvision import transforms

    augment = [transforms.RandomCrop(SIDE, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = PILImages(setting.split.inputs[..., 0], setting.split.coarse_labels, transforms.Compose(augment))
    data = DataLoader(
        images, setting.cfg.train.batch_size, True, num_workers=2, drop_last=True, persistent_workers=True
    )
    batches, device = endless(lambda epoch: data), setting.runtime.device
    network = setting.network().to(device).train()
    train = setting.cfg.train
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, train.momentum, nesterov=True, weight_decay=train.weight_decay
    )

    def step() -> None:
        batch, labels = next(batches)
        loss = F.cross_entropy(network(batch.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def repeated(setting: Setting, call: Callable[[], object], times: int) -> Callable[[], None]:
    """`times` calls in one, which ends when the device has."""

    def run() -> None:
        for _ in range(times):
            call()
        setting.wait()

    return run


def train(quick: bool) -> dict:
    """Images a second of training.  The peer's workers may fill their queue while ours runs, which favours the peer."""
    setting = open_train()
    n_steps = STEPS[setting.runtime.device.type][quick]
    ours, peer = (repeated(setting, make(setting), n_steps) for make in (our_step, peer_step))
    return compare(ours, peer, n_steps * setting.cfg.train.batch_size, "images/s", REPEATS[quick])


def step_flops(setting: Setting) -> int:
    """Floating-point operations of one training step, forward and backward, as PyTorch's counter has them."""
    from torch.utils.flop_counter import FlopCounterMode

    network, n = setting.network(), 2
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(n, 1, SIDE, SIDE)).sum().backward()
    return counter.get_total_flops() * setting.cfg.train.batch_size // n


def matrix_product(setting: Setting, side: int) -> Callable[[], object]:
    """One product of two square matrices a call, in bf16 where the training step computes in bf16."""
    dtype = torch.bfloat16 if setting.runtime.bf16 else torch.float32
    a, b = (torch.randn(side, side, device=setting.runtime.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def train_limit(quick: bool) -> dict:
    """FLOP/s of our training step over FLOP/s of a large matrix product on the same device, and where the rest goes."""
    setting = open_train()
    kind = setting.runtime.device.type
    n_steps, side, n_products = STEPS[kind][quick], PRODUCT_SIDE[kind], PRODUCTS[kind]
    step = our_step(setting)
    calls = repeated(setting, step, n_steps), repeated(setting, matrix_product(setting, side), n_products)
    figure = compare(*calls, 1, "TFLOP/s", REPEATS[quick])
    flops = n_steps * step_flops(setting), n_products * 2 * side**3  # of one call
    scale = flops[0] / flops[1]
    return {
        "ratio": figure["ratio"] * scale,
        "ours": figure["ours"] * flops[0] / 1e12,
        "peer": figure["peer"] * flops[1] / 1e12,
        "unit": "TFLOP/s",
        "ratios": [ratio * scale for ratio in figure["ratios"]],
        **shares(setting, step, min(n_steps, 5)),
    }


def shares(setting: Setting, step: Callable[[], None], n_steps: int) -> dict:
    """{'shares': {family of operators: share of the operators' time}, 'busy': the operators' share of the wall clock}.

    Time is the device's on a GPU and the calling thread's on a CPU.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as profiled:
        started = time.perf_counter()
        repeated(setting, step, n_steps)()
        wall = time.perf_counter() - started
    spent = dict.fromkeys([*(name for name, _ in FAMILIES), "other"], 0.0)
    # A kernel's time is its operator's already: the events of the device itself would count it twice.
    for event in (event for event in profiled.events() if event.device_type == DeviceType.CPU):
        microseconds = event.self_device_time_total if setting.on_gpu else event.self_cpu_time_total
        spent[family_of(event)] += microseconds
    total = sum(spent.values())
    return {"shares": {name: time / total for name, time in spent.items()}, "busy": total / 1e6 / wall}


def family_of(event) -> str:
    """event: a profiler's FunctionEvent."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next(
        (family for family, parts in FAMILIES if any(part in name for part in parts for name in names)), "other"
    )
