"""Files that stages exchange: whole or not at all, with a manifest that says how they were made.

A file is written under a temporary name in its own folder, flushed, then moved over the old one. `manifest.json` comes
last, so "the manifest is there and its hashes match" means "the stage is done".
"""

import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.config import Config, UserError

LIBRARIES = ["torch", "torchvision", "numpy", "scipy", "scikit-learn", "umap-learn", "hdbscan", "omegaconf"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, flush it to disk and move it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def save_text(path: Path, text: str) -> None:
    save_bytes(path, text.encode())


def save_json(path: Path, content: Any) -> None:
    """Raises ValueError on NaN: null is the word for an undefined number."""
    save_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def save_jsonl(path: Path, lines: list[dict]) -> None:
    save_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def save_csv(path: Path, header: list[str], rows: Iterable[list]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def save_array(path: Path, array: np.ndarray) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


@contextlib.contextmanager
def streamed_array(path: Path, shape: tuple[int, ...], dtype: Any) -> Iterator[np.ndarray]:
    """A memory-mapped array to fill piece by piece, so that memory does not grow with it; it is at `path` when full."""
    with replacing(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(dtype), shape=shape)
        yield array
        array.flush()
        del array


def save_torch(path: Path, content: Any) -> None:
    import torch

    # A file object, as the archive would hold the temporary path's name: other bytes in each process.
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def load_torch(path: Path) -> Any:
    """A state_dict or checkpoint onto the CPU.  Raises UserError where the file is damaged or holds pickled objects."""
    import pickle

    import torch

    of_content = (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
    content = io.BytesIO(path.read_bytes())  # from here on OSError too is about what the file holds
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except (*of_content, EOFError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: damaged, or not a plain checkpoint ({reason}); --force starts its stage anew"
        ) from None


def load_array(path: Path, rows: int | None = None, mmap: bool = False) -> np.ndarray:
    """Read a .npy of `rows` rows.  Raises UserError where it is truncated, pickled or of another length."""
    try:
        if mmap:
            array = np.lib.format.open_memmap(path, mode="r")
        else:
            with open(path, "rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npy file ({error}); run the stage that wrote it again") from None
    if rows is not None and (array.ndim == 0 or len(array) != rows):
        found = len(array) if array.ndim else "no"
        raise UserError(
            f"{path}: {found} rows, but the data set has {rows}; run the stage that wrote it again with --force"
        )
    return array


def load_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the stage that wrote it again with --force") from None


def load_manifest(folder: Path) -> dict:
    """Raises UserError where the folder's manifest.json is damaged."""
    path = folder / "manifest.json"
    manifest = load_json(path)
    if not isinstance(manifest, dict) or not {"settings", "inputs", "outputs", "data_signature"} <= manifest.keys():
        raise UserError(f"{path}: not a stage's manifest; run the stage that wrote it again with --force")
    return manifest


def sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_output(path: Path) -> dict:
    """{sha256, and for .npy files shape and dtype} of one written file."""
    described: dict[str, Any] = {"sha256": sha256(path)}
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        described |= {"shape": list(array.shape), "dtype": str(array.dtype)}
    return described


@functools.cache
def code_version() -> dict:
    """{commit, dirty} of the folder this file lies in; commit None outside a git checkout."""
    root = Path(__file__).parents[1]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {len(os.sched_getaffinity(0))} cores"
    return platform.processor() or platform.machine()


def make_manifest(cfg: Config, stage: str, settings: dict, inputs: dict, outputs: dict, **how: Any) -> dict:
    """How a stage folder was made; `how` adds device, threads, precision, data_signature and seconds."""
    return {
        "stage": stage,
        "settings": settings,
        "config": dataclasses.asdict(cfg),
        "code": code_version(),
        "versions": library_versions(),
        "seed": cfg.seed,
        "inputs": inputs,
        "outputs": outputs,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **how,
    }
