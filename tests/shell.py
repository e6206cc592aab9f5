"""What the fault tests share: run a stage script as a user would and read what it says and what it leaves."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import run_stage

from utils import artifacts
from utils.config import interpreter


def error_of(capsys, script: str, *argv) -> str:
    """The one line that `script` ends with on stderr, without its `error: `; it must exit with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_stage(script, *argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and lines[-1].startswith("error: "), lines
    return lines[-1].removeprefix("error: ")


def advised(said: str) -> tuple[str, list[str]]:
    """The command that an error names between backticks, as a script's name and its arguments."""
    python, script, *argv = shlex.split(re.search("`(.*)`", said)[1])
    assert python == interpreter() and script.endswith(".py")
    return script.removesuffix(".py"), argv


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, {relative path: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_json(path: Path):
    return json.loads(path.read_text())


def forge(path: Path, content: np.ndarray | bytes) -> None:
    """Replace a stage's output and its hash in the manifest, as if the stage had written it."""
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    manifest = read_json(path.with_name("manifest.json"))
    manifest["outputs"][path.name]["sha256"] = artifacts.sha256(path)
    path.with_name("manifest.json").write_text(json.dumps(manifest))


def history(folder: Path) -> list[dict]:
    """The lines of history.jsonl without what measures time."""
    timed = ("seconds", "images_per_s", "waiting")
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]
