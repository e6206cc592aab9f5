"""Several processes under torchrun: the same numbers as one process, rank 0 alone writes, and failures end the run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_stage
from shell import contents, error_of, history, read_json
from torch import nn

import reproduce
from utils import distributed, models, training

# Low rates: training amplifies the last bits of a reduction tenfold a step at rates as high as the planted set's.
GENTLE = ["precision=fp32", "threads=1", "coarse.lr=3e-4", "finetune.fine_lr=3e-4", "finetune.coarse_lr=3e-4"]
GENTLE += ["multihead.lr=3e-4", "train.batch_size=33", "coarse.epochs=2"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(n_processes: int, script: str, *argv: str, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n_processes}"]
    command += [f"--master-port={free_port()}", "--master-addr=127.0.0.1", str(ROOT / script), *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **popen)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_two(*stages: list) -> str:
    code, out, err = finish(torchrun(2, "tests/run_stages.py", json.dumps([[str(a) for a in s] for s in stages])))
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config_file):
    """{processes: run folder} of all stages that torchrun spreads; from coarse/model.pt on the weights are one's."""
    outputs = {n: tmp_path_factory.mktemp(f"processes{n}") for n in (1, 2)}
    coarse_of_two = tmp_path_factory.mktemp("coarse_of_two")
    config = ["--config", config_file, *GENTLE]
    oracle = ["cluster_fine", *config, "cluster.method=oracle"]
    stages = [
        ["extract_features"],
        ["uncertainty_filter"],
        ["finetune", "finetune.labels=oracle", "finetune.fine_epochs=1", "finetune.coarse_epochs=1"],
        ["multihead", "multihead.labels=oracle", "multihead.epochs=1"],
    ]
    stages = [[script, *config, *settings] for script, *settings in stages]
    one = f"output_dir={outputs[1]}"
    run_stage("train_coarse", *config, one)
    shutil.copytree(outputs[1], outputs[2], dirs_exist_ok=True)
    for script, *argv in stages:
        if script == "finetune":  # the labels are ready when two processes need them
            run_stage(*oracle, one)
            for folder in ("uncertainty", "labels"):
                shutil.copytree(outputs[1] / "planted/seed0" / folder, outputs[2] / "planted/seed0" / folder)
        run_stage(script, *argv, one)
    two = f"output_dir={outputs[2]}"
    forced = [[*stage, two, *(["--force"] if stage[0] == "uncertainty_filter" else [])] for stage in stages[1::-1]]
    run_two(["train_coarse", *config, f"output_dir={coarse_of_two}"], *[[*stage, two] for stage in stages[2:]], *forced)
    return {n: outputs[n] / "planted/seed0" for n in (1, 2)} | {"coarse": coarse_of_two / "planted/seed0/coarse"}


def arrays(runs, name):
    return [np.load(runs[n] / name) for n in (1, 2)]


@pytest.mark.parametrize("name", ["features/coarse/train.npy", "features/coarse/test.npy"])
def test_two_processes_extract_the_features_of_one(runs, name):
    one, two = arrays(runs, name)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["view_probs", "probs", "scores"])
def test_two_processes_give_the_scores_of_one(runs, name):
    one, two = arrays(runs, f"uncertainty/{name}.npy")
    np.testing.assert_allclose(two, one, atol=1e-5)


def same_curve(one: list[dict], two: list[dict]) -> None:
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["images_seen"] == b["images_seen"] and a["lr"] == b["lr"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=5e-3)


def test_two_processes_train_the_coarse_network_of_one(runs):
    same_curve(history(runs[1] / "coarse"), history(runs["coarse"]))
    seen = [read_json(folder / "metrics.json")["images_seen"] for folder in (runs[1] / "coarse", runs["coarse"])]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("folder", ["finetune/oracle", "multihead/oracle-alpha0.5"])
def test_two_processes_train_the_learners_of_one(runs, folder):
    same_curve(*(history(runs[n] / folder) for n in (1, 2)))
    assert contents(runs[1] / folder).keys() == contents(runs[2] / folder).keys()


def test_the_manifest_says_how_many_processes_there_were(runs):
    assert [read_json(runs[n] / "uncertainty/manifest.json")["processes"] for n in (1, 2)] == [1, 2]


def test_a_finished_stage_says_so_once(runs, config_file):
    out = run_two(["extract_features", "--config", config_file, f"output_dir={runs[2].parents[1]}", *GENTLE])
    assert out.count("done already") == 1


def test_a_mistake_is_one_line(config_file, tmp_path):
    for extra, said in (["coarse.lr=x"], "error: coarse.lr"), (["data.root=/nowhere"], "error: data.root"):
        code, _, err = finish(torchrun(2, "train_coarse.py", "--config", config_file, f"output_dir={tmp_path}", *extra))
        assert code != 0 and err.count("error: ") == 1 and said in err, err


def test_a_diverging_loss_is_one_line(config_file, tmp_path):
    argv = ["--config", config_file, f"output_dir={tmp_path}", "coarse.lr=1e30"]
    code, _, err = finish(torchrun(2, "train_coarse.py", *argv))
    assert code != 0 and err.count("error: ") == 1 and "error: coarse: the loss is" in err
    assert err.count("Traceback") == 1 and "ChildFailedError" in err  # torchrun's own, which names the process


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(p) for p in listed.split()]


def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(config_file, tmp_path):
    argv = ["--config", config_file, f"output_dir={tmp_path}", *GENTLE, "coarse.epochs=3"]
    run = torchrun(2, "train_coarse.py", *argv)
    checkpoint = tmp_path / "planted/seed0/coarse/checkpoint.pt"
    for _ in range(600):
        if checkpoint.exists() or run.poll() is not None:
            break
        time.sleep(0.1)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    code, _, err = finish(run)
    assert code != 0 and err.count("error: another process of this run has ended") <= 1
    assert checkpoint.exists() and not (checkpoint.parent / "manifest.json").exists()
    code, out, err = finish(torchrun(2, "train_coarse.py", *argv))
    assert code == 0 and "going on at step" in err and "done in" in out
    assert len(history(checkpoint.parent)) == 3


# Pieces


def test_shares_are_in_order_disjoint_and_even(monkeypatch):
    for world in (1, 2, 3, 7):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for n in (0, 1, 6, 7, 100):
            parts = []
            for rank in range(world):
                monkeypatch.setenv("RANK", str(rank))
                parts.append(list(range(n))[distributed.share(n)])
            assert sum(parts, []) == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_needs_no_group():
    with distributed.group(), distributed.together():
        x = torch.arange(3.0)
        assert distributed.is_main() and distributed.exchange("a") == ["a"]
        assert distributed.sum_over_ranks(x) is x and torch.equal(distributed.gather_rows(x, 3), x)


def test_shared_batch_norm_of_one_process_is_batch_norm():
    torch.manual_seed(0)
    plain, shared = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))
    models.share_statistics(shared, is_cuda=False)
    for _ in range(2):
        x = torch.randn(5, 3, 4, 2) * 3 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out_a, out_b = plain(a), shared(b)
        (out_a**3).sum().backward(), (out_b**3).sum().backward()
        torch.testing.assert_close(out_b, out_a)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-3)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[f"0.{name}"], tensor)
    torch.testing.assert_close(shared.eval()(x), plain.eval()(x))


def test_the_share_of_a_loss_is_of_the_whole_batch(monkeypatch):
    """Two processes with 3 and 1 labelled rows: averaged, their losses are the mean over the four."""
    logits, labels = torch.randn(4, 5), torch.tensor([1, 2, 0, 4])
    whole = training.cross_entropy(logits, labels, 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda count: torch.tensor(4))
    parts = [training.cross_entropy(logits[part], labels[part], 0.1) for part in (slice(0, 3), slice(3, 4))]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_lost_peers_are_told_from_our_own_errors(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.lost_peer(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711"))
    assert not distributed.lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not distributed.lost_peer(RuntimeError("Connection closed by peer"))
    assert json.dumps(distributed.exchange(1)) == "[1]"


@pytest.mark.parametrize("script", ["reproduce", "report", "cluster_fine"])
def test_scripts_that_torchrun_cannot_spread_say_so(script, config_file, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert f"{script}.py: start it without torchrun; " in error_of(capsys, script, "--config", config_file)


def test_reproduce_spreads_its_stages(config_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(reproduce, "jobs_of_seed", lambda cfg, seed, sources: [reproduce.Job("coarse", ("seed=0",))])
    argv = ["--config", config_file, f"output_dir={tmp_path}", "reproduce.processes=2", *GENTLE, "coarse.epochs=1"]
    with pytest.raises(SystemExit) as stop:
        run_stage("reproduce", *argv)
    assert stop.value.code == 0, capfd.readouterr().err
    assert read_json(tmp_path / "planted/seed0/coarse/manifest.json")["processes"] == 2
    assert "coarse " in (tmp_path / "planted/logs/seed0-coarse.log").read_text()


def test_a_process_with_nothing_to_say_leaves_time_to_the_one_that_has(monkeypatch):
    """Symptom: torchrun ended rank 0 before it had printed, as rank 1 had left in silence."""
    waited, counts = [], iter([2, 1])
    monkeypatch.setattr(distributed.time, "sleep", waited.append)
    assert distributed.speaks() and not waited
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.speaks() and waited == [distributed.GRACE_S]
    monkeypatch.setattr(distributed, "_store", SimpleNamespace(add=lambda key, n: next(counts)))
    assert not distributed.speaks() and len(waited) == 2
    assert distributed.speaks() and len(waited) == 2
