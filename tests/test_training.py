"""utils/training.py: losses, scores, the schedule and the training loop, by hand and against torch."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import planted_images
from torch import nn
from torch.nn import functional as F

from utils import artifacts, learning, loader, models, training
from utils.config import Config, ModelConfig, TrainConfig, UserError
from utils.splits import Dataset, Split

FP32 = training.Runtime(torch.device("cpu"), bf16=False)
BF16 = training.Runtime(torch.device("cpu"), bf16=True)


# Losses and scores


def test_cross_entropy_leaves_out_rows_without_a_label():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, -1, 0, 1, -1, 2])
    expected = F.cross_entropy(logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(training.cross_entropy(logits, labels, 0.0), expected)


def test_cross_entropy_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.1, 0.9]]))
    labels = torch.tensor([0, 0, -1])
    assert training.cross_entropy(logits, labels, 0.0).item() == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)


def test_cross_entropy_without_labels_is_zero_with_zero_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = training.cross_entropy(logits, torch.full((3,), -1), 0.1)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_torchs(smoothing):
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(training.cross_entropy(logits, labels, smoothing), expected)
    labels[:3] = -1
    expected = F.cross_entropy(logits[3:], labels[3:], label_smoothing=smoothing)
    torch.testing.assert_close(training.cross_entropy(logits, labels, smoothing), expected)


def test_cross_entropy_of_bf16_logits_is_computed_in_float32():
    logits = torch.tensor([[10.0, 0.0]], dtype=torch.bfloat16)
    loss = training.cross_entropy(logits, torch.tensor([0]), 0.0)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-3)


def test_probability_scores_by_hand():
    probs = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], np.float32)
    scores = training.probability_scores(probs, np.array([0, 1, 1, 0]))
    assert scores["accuracy"] == 0.75 and scores["balanced_accuracy"] == 0.75
    assert scores["loss"] == pytest.approx(-np.log([0.75, 0.5, 0.75, 1]).mean())


def test_probability_scores_of_an_impossible_label_are_finite():
    assert training.probability_scores(np.array([[1.0, 0.0]]), np.array([1]))["loss"] == pytest.approx(-np.log(1e-12))


# Device and precision


def test_pick_runtime_on_the_cpu():
    runtime = training.pick_runtime(Config(device="cpu", precision="fp32"))
    assert runtime == FP32 and runtime.describe()["precision"] == "fp32"
    assert training.pick_runtime(Config(device="cpu", precision="bf16")) == BF16
    assert BF16.describe()["precision"] == "bf16" and BF16.describe()["threads"] >= 1


@pytest.mark.parametrize("avx512, amx", [(True, False), (False, True), (False, False)])
def test_automatic_precision_is_bf16_where_the_cpu_has_it(avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert training.pick_runtime(Config(device="cpu")).bf16 == (avx512 or amx)
    assert not training.pick_runtime(Config(device="cpu", precision="fp32")).bf16


def test_automatic_device_is_the_cpu_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.pick_runtime(Config()).device.type == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_a_users_mistake(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device: {device} is not on this machine .*; use device=cpu"):
        training.pick_runtime(Config(device=device))


def test_a_gpu_number_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"device: cuda:2 is not on this machine \(2 CUDA devices\)"):
        training.pick_runtime(Config(device="cuda:2"))


def test_autocast_computes_in_the_precision_it_says():
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    with BF16.autocast():
        assert layer(x).dtype == torch.bfloat16
    with FP32.autocast():
        assert layer(x).dtype == torch.float32


def test_threads_are_torchs_threads():
    before = torch.get_num_threads()
    try:
        training.pick_runtime(Config(device="cpu", threads=2))
        assert torch.get_num_threads() == 2
        training.pick_runtime(Config(device="cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Rows and budgets


def test_training_and_validation_rows_are_disjoint_and_complete():
    coarse = np.repeat([0, 1], [30, 50])
    split = Split(np.zeros((80, 2, 2, 1), np.uint8), coarse, None, None, np.arange(80))
    train, val = training.train_rows(Config(), Dataset(split, split, ["a", "b"], None, None))
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(80))
    assert np.bincount(coarse[val]).tolist() == [3, 5] and (np.diff(train) > 0).all()


def test_classes_of_one_row_each_leave_no_validation_rows():
    split = Split(np.zeros((2, 2, 2, 1), np.uint8), np.arange(2), None, None, np.arange(2))
    with pytest.raises(UserError, match="data.val_fraction: no coarse class has the two rows"):
        training.train_rows(Config(), Dataset(split, split, ["a", "b"], None, None))


@pytest.mark.parametrize("n_rows, epochs, n_steps", [(100, 3, 9), (32, 2, 2), (31, 2, 2), (5, 4, 4)])
def test_epochs_to_steps_counts_whole_batches(n_rows, epochs, n_steps):
    assert training.epochs_to_steps(Config(train=TrainConfig(batch_size=32)), n_rows, epochs) == n_steps


# One-cycle schedule


def one_cycle_rates(n_steps, warmup, lr=0.2):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    schedule, rates = training.one_cycle(optimizer, lr, n_steps, warmup), []
    for _ in range(n_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.array(rates)


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.7])
def test_one_cycle_rises_for_the_warmup_and_peaks_at_lr(warmup):
    rates = one_cycle_rates(100, warmup)
    assert rates.max() == pytest.approx(0.2, rel=0.01) and rates.max() <= 0.2
    assert abs(rates.argmax() - (100 * warmup - 1)) <= 1
    assert (np.diff(rates[: rates.argmax()]) > 0).all() and (np.diff(rates[rates.argmax() :]) < 0).all()
    assert rates[0] == pytest.approx(0.2 / 25) and 0 < rates[-1] < 0.2 / 300


@pytest.mark.parametrize("n_steps, warmup", [(1, 0.5), (3, 0.25), (4, 0.2), (9, 0.1)])
def test_a_warmup_of_one_step_exactly_divides_by_zero_no_more(n_steps, warmup):
    rates = one_cycle_rates(n_steps, warmup)
    assert rates[0] == pytest.approx(0.2) and (np.diff(rates) < 0).all()
    near = one_cycle_rates(n_steps, warmup * 0.999)
    np.testing.assert_allclose(rates, near, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("warmup", [0.0001, 0.3, 0.5, 0.9999])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_one_cycle_of_very_few_steps_is_positive(n_steps, warmup):
    rates = one_cycle_rates(n_steps, warmup)
    assert (rates > 0).all() and (rates <= 0.2).all()


# The loop


class StubStage:
    """As much of an open stage as a checkpoint needs."""

    def __init__(self, folder):
        self.folder, self.fingerprint = folder, {"settings": {"seed": 0}, "inputs": {}, "data_signature": ""}
        self.cfg, self.started = Config(), 0.0

    def path(self, name):
        return self.folder / name

    def save_jsonl(self, name, lines):
        artifacts.save_jsonl(self.folder / name, lines)


N, D = 40, 3


@pytest.fixture
def problem(tmp_path):
    """Forty vectors in two classes, a linear network, and how to fit it: fit(n_steps, ..., **train settings)."""
    rng = np.random.default_rng(0)
    labels = np.arange(N) % 2
    vectors = (rng.normal(size=(N, D)) + 2 * labels[:, None]).astype(np.float32)
    split = Split(vectors, labels, None, None, np.arange(N))
    inputs = loader.Inputs(split, FP32.device)
    label_of = training.labels_on(FP32, labels)

    def network():
        torch.manual_seed(1)
        return nn.Linear(D, 2)

    def loss_of(net, batch, rows):
        return training.cross_entropy(net(batch), label_of(rows), 0.0)

    def fit(
        n_steps, validate=None, rows=None, lr=0.1, net=None, images_before=0, first_epoch=0, loss_of=loss_of, **train
    ):
        cfg = Config(train=TrainConfig(**{"batch_size": N, **train}))
        folder = tmp_path / f"stage{len(list(tmp_path.iterdir()))}"
        rows = np.arange(N) if rows is None else rows
        phase = training.Phase("coarse", rows, n_steps, lr, "coarse.lr", images_before, first_epoch)
        checkpoint = training.Checkpoint(StubStage(folder), FP32)
        validate = validate or (lambda _: {"accuracy": 0.5, "loss": 1.0})
        result = training.fit(cfg, FP32, net or network(), inputs, phase, loss_of, validate, checkpoint)
        return result, [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]

    def gradient(net):
        net.zero_grad()
        loss_of(net, torch.from_numpy(vectors), np.arange(N)).backward()
        return net.weight.grad.clone()

    return SimpleNamespace(fit=fit, network=network, gradient=gradient, inputs=inputs, loss_of=loss_of)


def scripted(accuracies, seen=None):
    """A validation that answers the next of `accuracies` and notes the weights it was shown."""
    answers = iter(accuracies)

    def validate(network):
        if seen is not None:
            seen.append(network.weight.detach().clone())
        return {"accuracy": next(answers), "loss": 1.0}

    return validate


@pytest.mark.parametrize(
    "accuracies, best",
    [([0.2, 0.9, 0.4], 2), ([0.2, 0.9, 0.9, 0.1], 3), ([0.5, 0.5, 0.5], 3), ([0.9, 0.1], 1), ([0.0], 1)],
)
def test_fit_keeps_the_best_epoch_and_the_latest_of_equals(problem, accuracies, best):
    seen = []
    result, history = problem.fit(len(accuracies), scripted(accuracies, seen))
    assert result.best_epoch == best
    assert torch.equal(result.state["weight"], seen[best - 1])
    assert [line["val_accuracy"] for line in history] == accuracies


@pytest.mark.parametrize("momentum, weight_decay", [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.5, 0.1)])
def test_one_step_by_hand(problem, momentum, weight_decay):
    """Nesterov's first step is (1 + momentum) times the gradient, weight decay added to the gradient (L2)."""
    start = problem.network()
    result, history = problem.fit(1, momentum=momentum, weight_decay=weight_decay)
    gradient = problem.gradient(start) + weight_decay * start.weight.detach()
    expected = start.weight.detach() - history[0]["lr"] * (1 + momentum) * gradient
    torch.testing.assert_close(result.state["weight"], expected)


def test_fit_follows_the_schedule(problem):
    _, history = problem.fit(20, lr=0.3, warmup=0.25)
    np.testing.assert_allclose([line["lr"] for line in history], one_cycle_rates(20, 0.25, 0.3))


def test_fit_learns(problem):
    _, history = problem.fit(60)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_history_lines_have_the_promised_keys(problem):
    _, history = problem.fit(4, batch_size=20, images_before=1000)
    assert [line["epoch"] for line in history] == [1, 2] and {line["epochs"] for line in history} == {2}
    assert [line["images_seen"] for line in history] == [1040, 1080]
    keys = "phase epoch epochs loss val_accuracy val_loss lr images_seen seconds images_per_s waiting compiled"
    assert all(list(line) == keys.split() for line in history)


def test_a_cut_last_epoch_makes_exactly_the_steps_asked_for(problem):
    """The matched budget: five batches an epoch, eight steps: one epoch and three batches of the next."""
    batches = []

    def spy(net, batch, rows):
        batches.append(rows)
        return problem.loss_of(net, batch, rows)

    result, history = problem.fit(8, batch_size=8, loss_of=spy)
    assert [len(rows) for rows in batches] == [8] * 8
    assert np.array_equal(np.sort(np.concatenate(batches[:5])), np.arange(N))
    assert np.array_equal(np.concatenate(batches[5:]), loader.epoch_rows(np.arange(N), 0, 1, 8)[:3].ravel())
    assert result.images_seen == 64 and [line["images_seen"] for line in history] == [40, 64]
    assert [line["epochs"] for line in history] == [2, 2]


def test_images_before_count_into_images_seen(problem):
    assert problem.fit(3, batch_size=16, images_before=100)[0].images_seen == 148


def test_rows_fewer_than_a_batch(problem):
    result, _ = problem.fit(3, rows=np.arange(10), batch_size=256)
    assert result.images_seen == 30


def test_two_phases_see_other_orders(problem):
    first, second = problem.fit(5, batch_size=8)[0], problem.fit(5, batch_size=8, first_epoch=1)[0]
    assert not torch.equal(first.state["weight"], second.state["weight"])
    assert torch.equal(first.state["weight"], problem.fit(5, batch_size=8)[0].state["weight"])


def test_fixed_parameters_stay(problem):
    net = problem.network()
    net.bias.requires_grad = False
    bias = net.bias.clone()
    result, _ = problem.fit(3, net=net)
    assert torch.equal(result.state["bias"], bias) and not torch.equal(result.state["weight"], problem.network().weight)


def test_a_loss_that_is_not_finite_stops_at_its_step(problem):
    net = problem.network()
    nn.init.constant_(net.weight, float("inf"))
    with pytest.raises(UserError, match=r"coarse: the loss is nan at step 1 \(epoch 1\); lower coarse.lr, now 0.1"):
        problem.fit(4, net=net, batch_size=8)


def test_check_finite_names_the_first_bad_step():
    phase = training.Phase("fine", np.arange(2), 9, 0.25, "finetune.fine_lr")
    training.check_finite([0.1, 2.0], 0, phase, 1)
    with pytest.raises(
        UserError, match=r"fine: the loss is inf at step 12 \(epoch 3\); lower finetune.fine_lr, now 0.25"
    ):
        training.check_finite([0.1, math.inf, math.nan], 10, phase, 3)


# Prediction


def test_predict_is_in_row_order_in_eval_mode_and_without_augmentation():
    images = planted_images(4, 0)[0][..., None]
    split = Split(images, np.zeros(24, np.int64), None, None, np.arange(24))
    torch.manual_seed(0)
    network = models.Network(models.build_backbone(ModelConfig(width=2), split, np.arange(24)), 3)
    before = {name: w.clone() for name, w in network.state_dict().items()}
    inputs, rows = loader.Inputs(split, FP32.device), np.array([5, 3, 3, 20])
    batches = list(training.predict(FP32, network, inputs, rows, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 1]
    expected = network.eval()(torch.from_numpy(images[rows]).permute(0, 3, 1, 2))
    torch.testing.assert_close(torch.from_numpy(np.concatenate(batches)), expected)
    assert all(torch.equal(w, before[name]) for name, w in network.state_dict().items())
    probs = training.predict_probs(FP32, network, inputs, rows, output=lambda logits: logits[:, :2])
    np.testing.assert_allclose(probs, expected[:, :2].softmax(1).detach().numpy(), atol=1e-6)


# Precision


@pytest.mark.parametrize("runtime", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_resnet_learns_in_either_precision(runtime, tmp_path):
    images, coarse, _ = planted_images(20, 0)
    split = Split(images[..., None], coarse, None, None, np.arange(120))
    cfg = Config(augment="none", train=TrainConfig(batch_size=40))
    torch.manual_seed(0)
    network = models.Network(models.build_backbone(ModelConfig(width=4), split, np.arange(120)), 2)
    inputs, label_of = loader.Inputs(split, runtime.device), training.labels_on(runtime, coarse)
    phase = training.Phase("coarse", np.arange(120), 12, 0.05, "coarse.lr")

    def validate(net):
        return training.probability_scores(training.predict_probs(runtime, net, inputs, np.arange(120)), coarse)

    def loss_of(net, batch, rows):
        return training.cross_entropy(net(batch), label_of(rows), 0.0)

    checkpoint = training.Checkpoint(StubStage(tmp_path), runtime)
    result = training.fit(cfg, runtime, network, inputs, phase, loss_of, validate, checkpoint)
    assert {w.dtype for w in result.state.values()} == {torch.float32, torch.int64}  # int64: batches that BN has seen
    network.load_state_dict(result.state)
    assert validate(network)["accuracy"] > 0.9


# Pseudo labels that a discoverer left


LABELS = {"labels": [0, 0, 1, -1, 2, 2], "parents": [0, 0, 1], "test_labels": [0, 2]}


def load_labels(folder, train_rows=range(6), **changes):
    """What a learner makes of label files, in a data set of two coarse classes: 0 0 0 0 1 1."""
    source = folder / "labels/found"
    source.mkdir(parents=True)
    for name, values in {**LABELS, **changes}.items():
        np.save(source / f"{name}.npy", np.asarray(values))
    stage = SimpleNamespace(input=lambda relative: folder / relative, cfg=SimpleNamespace(run_dir=folder))
    train = SimpleNamespace(n=6, coarse_labels=np.array([0, 0, 0, 0, 1, 1]))
    dataset = SimpleNamespace(train=train, test=SimpleNamespace(n=2), K_C=2)
    task = SimpleNamespace(stage=stage, dataset=dataset, train_rows=np.array(train_rows))
    return learning.Task.load_labels(task, "found")


def test_labelled_rows_are_training_rows_with_a_label(tmp_path):
    assert load_labels(tmp_path, train_rows=[0, 2, 3, 5]).rows.tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": [-1] * 6}, "no training row has a label"),
        ({"labels": [-1, -1, 0, -1, -1, -1]}, "one training row has a label"),
        ({"labels": [0, 0, 3, 1, 2, 2]}, r"labels.npy: ids must lie in \[-1, 3\)"),
        ({"labels": [0, 0, -2, 1, 2, 2]}, r"labels.npy: ids must lie in \[-1, 3\)"),
        ({"labels": [0, 0, 1, 2, 2, 2]}, "a parent other than their coarse label"),
        ({"labels": [0, 0, 1]}, "labels.npy: 3 rows, but the data set has 6"),
        ({"labels": [0.0, 0, 1, 1, 2, 2]}, r"labels.npy: float64 of shape \(6,\); it must be int64"),
        ({"labels": np.zeros((6, 1), np.int64)}, r"labels.npy: int64 of shape \(6, 1\)"),
        ({"parents": [0, 0, 1, 2]}, r"parents.npy: coarse ids must lie in \[0, 2\)"),
        ({"parents": [0, 0, 1, -1]}, r"parents.npy: coarse ids must lie in \[0, 2\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_labels(tmp_path, **changes)


def test_coarse_probabilities_are_sums_over_the_parents_fine_classes():
    probs, parents = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), np.array([1, 0, 1, 1])
    np.testing.assert_allclose(learning.sum_by_parent(probs, parents, 3), [[0.2, 0.8, 0]], atol=1e-6)
    torch.testing.assert_close(
        learning.sum_by_parent(torch.from_numpy(probs), parents, 3), torch.tensor([[0.2, 0.8, 0]])
    )
