"""Files appear whole or not at all, damaged ones are refused by name, and the manifest says how a folder was made."""

import dataclasses
import json
import pickle
import platform
import re
import subprocess

import numpy as np
import pytest
import torch

from utils import artifacts
from utils.config import UserError, load_config


def message(load, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        load(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Unpicklable:
    def __reduce__(self):
        raise OSError("disk full")


FAILING_WRITES = {
    "x.json": lambda path: artifacts.save_json(path, {"a": float("nan")}),
    "x.jsonl": lambda path: artifacts.save_jsonl(path, [{"a": 1}, {"a": float("inf")}]),
    "x.npy": lambda path: artifacts.save_array(path, np.array([{}], dtype=object)),
    "x.pt": lambda path: artifacts.save_torch(path, {"a": torch.zeros(10_000), "b": Unpicklable()}),
    "x.txt": lambda path: artifacts.save_text(path, "\udcff"),
}


@pytest.mark.parametrize("name", FAILING_WRITES)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises((ValueError, OSError)):
        FAILING_WRITES[name](path)
    assert names(tmp_path) == [name] and path.read_bytes() == b"old"


def test_a_disk_that_fails_on_flush_leaves_the_old_file(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    artifacts.save_text(tmp_path / "x", "old")
    monkeypatch.setattr(artifacts.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        artifacts.save_text(tmp_path / "x", "new")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_a_file_in_the_making_has_another_name(tmp_path):
    with artifacts.replacing(tmp_path / "deep/x") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "deep/x").exists() and re.fullmatch(r"\.x\.\d+\.tmp", temporary.name)
        temporary.write_text("whole")
    assert names(tmp_path / "deep") == ["x"] and (tmp_path / "deep/x").read_text() == "whole"


def test_a_streamed_array_appears_when_it_is_full(tmp_path):
    path = tmp_path / "x.npy"
    with artifacts.streamed_array(path, (3, 2), "float32") as array:
        array[:2] = 1
        assert not path.exists()
        array[2:] = 2
    assert artifacts.load_array(path, 3).tolist() == [[1, 1], [1, 1], [2, 2]] and names(tmp_path) == ["x.npy"]


def test_a_streamed_array_that_fails_midway_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), artifacts.streamed_array(tmp_path / "x.npy", (3, 2), "float32") as array:
        array[0] = 1
        raise RuntimeError("the network failed")
    assert names(tmp_path) == []


def test_json_writes_null_and_refuses_nan(tmp_path):
    artifacts.save_json(tmp_path / "x.json", {"a": None, "b": [1, 0.1]})
    assert artifacts.load_json(tmp_path / "x.json") == {"a": None, "b": [1, 0.1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.save_json(tmp_path / "y.json", {"a": np.nan})
    assert names(tmp_path) == ["x.json"]


def test_csv_quotes_what_needs_it(tmp_path):
    artifacts.save_csv(tmp_path / "x.csv", ["row", "image"], [[0, "a,b.png"], [1, "ü\n.png"]])
    assert (tmp_path / "x.csv").read_bytes() == 'row,image\n0,"a,b.png"\n1,"ü\n.png"\n'.encode()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("n_bytes", [0, 5, 60, 200, -1])
def test_a_truncated_array_is_named(tmp_path, n_bytes, mmap):
    path = tmp_path / "x.npy"
    artifacts.save_array(path, np.arange(100.0))
    path.write_bytes(path.read_bytes()[:n_bytes])
    assert message(artifacts.load_array, path, 100, mmap=mmap).startswith(f"{path}: not a readable .npy file (")


def test_a_pickled_array_is_never_opened(tmp_path):
    objects, bare, archive = (tmp_path / name for name in ("objects.npy", "bare.npy", "archive.npy"))
    np.save(objects, np.array([{"a": 1}], dtype=object))
    bare.write_bytes(pickle.dumps(np.arange(3)))
    with open(archive, "wb") as file:
        np.savez(file, np.arange(3))
    for path in (objects, bare, archive):
        assert message(artifacts.load_array, path).startswith(f"{path}: not a readable .npy file (")


def test_an_array_of_another_length_is_named(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(7))
    assert message(artifacts.load_array, path, 8) == (
        f"{path}: 7 rows, but the data set has 8; run the stage that wrote it again with --force"
    )
    np.save(path, np.array(7))
    assert f"{path}: no rows, but the data set has 8" in message(artifacts.load_array, path, 8)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    artifacts.save_torch(path, {"weights": torch.arange(1000.0), "epoch": 3})
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 2, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [
        b"no checkpoint at all",
        b"\x00" * 1000,
        b"PK\x03\x04" + b"x" * 100,
        whole[:60] + b"\xff" * 80 + whole[140:],
    ]
    for content in damaged:
        path.write_bytes(content)
        said = message(artifacts.load_torch, path)
        assert said.startswith(f"{path}: damaged, or not a plain checkpoint (") and "()" not in said


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"path": tmp_path}, path)  # a Path object: needs unpickling of a class
    assert message(artifacts.load_torch, path).startswith(f"{path}: damaged, or not a plain checkpoint (")


def test_the_same_weights_are_the_same_bytes_whichever_process_writes_them(tmp_path, monkeypatch):
    weights = {"w": torch.arange(10.0)}
    artifacts.save_torch(tmp_path / "a.pt", weights)
    monkeypatch.setattr(artifacts.os, "getpid", lambda: 7)
    artifacts.save_torch(tmp_path / "b.pt", weights)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN', "[]", "{}", '{"settings": {}}', "null"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    said = message(artifacts.load_manifest, tmp_path)
    assert said.startswith(f"{tmp_path}/manifest.json: not ") and "--force" in said


def test_the_hash_follows_the_content(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert artifacts.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"abcd")
    assert artifacts.sha256(path) != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_outputs_are_described_by_hash_shape_and_dtype(tmp_path):
    artifacts.save_array(tmp_path / "x.npy", np.zeros((4, 2), bool))
    artifacts.save_text(tmp_path / "x.csv", "a\n")
    assert artifacts.describe_output(tmp_path / "x.npy") == {
        "sha256": artifacts.sha256(tmp_path / "x.npy"), "shape": [4, 2], "dtype": "bool",
    }  # fmt: skip
    assert artifacts.describe_output(tmp_path / "x.csv") == {"sha256": artifacts.sha256(tmp_path / "x.csv")}


def test_the_manifest_holds_what_a_reader_needs_to_make_it_again():
    cfg = load_config("", ("seed=3", "coarse.epochs=2"))
    how = {"device": "cpu", "threads": 1, "precision": "fp32", "data_signature": "d", "seconds": 1.5}
    manifest = artifacts.make_manifest(
        cfg, "coarse", {"seed": 3}, {"a/b": "hash"}, {"model.pt": {"sha256": "h"}}, **how
    )
    assert json.loads(json.dumps(manifest)) == manifest
    assert (
        manifest.items() >= {"stage": "coarse", "settings": {"seed": 3}, "seed": 3, "inputs": {"a/b": "hash"}}.items()
    )
    assert manifest.items() >= how.items() and manifest["outputs"] == {"model.pt": {"sha256": "h"}}
    assert manifest["config"] == dataclasses.asdict(cfg) and manifest["config"]["coarse"]["epochs"] == 2
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["versions"]["python"] == platform.python_version()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest["finished"])


@pytest.fixture
def fresh_code_version():
    artifacts.code_version.cache_clear()
    yield artifacts.code_version
    artifacts.code_version.cache_clear()


def test_code_version_in_a_checkout(tmp_path, monkeypatch, fresh_code_version):
    monkeypatch.setattr(artifacts, "__file__", str(tmp_path / "utils/artifacts.py"))
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "x").write_text("1")
    for command in (["init", "-q"], ["add", "x"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    version = fresh_code_version()
    assert re.fullmatch(r"[0-9a-f]{40}", version["commit"]) and version["dirty"] is False
    (tmp_path / "x").write_text("2")
    fresh_code_version.cache_clear()
    assert fresh_code_version() == {"commit": version["commit"], "dirty": True}


def test_code_version_outside_git_is_unknown(tmp_path, monkeypatch, fresh_code_version):
    monkeypatch.setattr(artifacts, "__file__", str(tmp_path / "utils/artifacts.py"))
    assert fresh_code_version() == {"commit": None, "dirty": None}
    fresh_code_version.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert fresh_code_version() == {"commit": None, "dirty": None}
