"""The stages: which files each reads, which settings decide its result, and when its folder counts as done.

A script opens its stage, stops if it is finished, writes its files and closes with `finish`:

    with open_stage(cfg, "uncertainty") as stage:
        if stage.finished:
            return
        stage.save_array("scores.npy", scores)
        stage.finish(next_command=cfg.command("cluster_fine.py"))
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import artifacts, distributed
from utils.config import CLUSTER_METHODS, Config, UserError, flatten
from utils.data import data_signature

# A producer and its consumer must agree on these; how a producer was trained is its own affair.
SHARED_SETTINGS = ("seed", "data.", "model.")
# Where the data lies and how fast it is read changes no result; the data's signature is compared instead.
NEVER_COMPARED = ("data.root", "data.download", "data.decode", "features.batch_size", "filter.batch_size")
TRAINING = ("seed", "data.", "model.", "augment", "crop_flip.", "strong.", "train.", "precision")
EMBEDDING = "normalize n_neighbors min_dist n_components metric n_epochs knn assign assign_k".split()
HDBSCAN = """min_cluster_size min_samples cluster_selection_method cluster_selection_epsilon allow_single_cluster
noise""".split()
CHOOSE_K = "n_clusters k_min k_max".split()
CLUSTER_SETTINGS = {
    "umap_hdbscan": [*EMBEDDING, *HDBSCAN],
    "kmeans": [*EMBEDDING, *CHOOSE_K],
    "gmm": [*EMBEDDING, *CHOOSE_K],
    "random": ["random_of"],
    "oracle": ["assign"],
}


@dataclass(frozen=True)
class StageSpec:
    """What one stage is, given a configuration; paths are relative to the run folder."""

    name: str
    script: str
    folder: Callable[[Config], str]
    inputs: Callable[[Config], list[str]]
    settings: Callable[[Config], tuple[str, ...]]


def _label_files(source: str, init: str) -> list[str]:
    files = [f"labels/{source}/{name}.npy" for name in ("labels", "parents", "test_labels")]
    return files + (["coarse/model.pt"] if init == "coarse" else [])


def _coarse_inputs(cfg: Config) -> list[str]:
    return [f"{cfg.coarse.match}/metrics.json"] if cfg.coarse.match else []


def _cluster_inputs(cfg: Config) -> list[str]:
    if cfg.cluster.method == "random":
        return [*_label_files(cfg.cluster.random_of, "scratch"), "uncertainty/kept.npy"]
    if cfg.cluster.method == "oracle":
        return ["uncertainty/kept.npy"]
    features = f"features/{cfg.features.source}"
    return [f"{features}/train.npy", f"{features}/test.npy", "uncertainty/kept.npy"]


def _cluster_settings(cfg: Config) -> tuple[str, ...]:
    own = [f"cluster.{key}" for key in ("method", "source", *CLUSTER_SETTINGS[cfg.cluster.method])]
    from_features = ("features.source", "metrics.") if cfg.cluster.method in ("umap_hdbscan", "kmeans", "gmm") else ()
    return ("seed", "data.", *own, *from_features)


STAGES = {
    spec.name: spec
    for spec in [
        StageSpec(
            "coarse", "train_coarse.py",
            folder=lambda cfg: "coarse_matched" if cfg.coarse.match else "coarse",
            inputs=_coarse_inputs,
            settings=lambda cfg: (*TRAINING, "coarse.lr", "coarse.match" if cfg.coarse.match else "coarse.epochs"),
        ),
        StageSpec(
            "features", "extract_features.py",
            folder=lambda cfg: f"features/{cfg.features.source}",
            inputs=lambda cfg: [f"{cfg.features.source}/model.pt"],
            settings=lambda cfg: ("seed", "data.", "model.", "features.", "precision"),
        ),
        StageSpec(
            "uncertainty", "uncertainty_filter.py",
            folder=lambda cfg: "uncertainty",
            inputs=lambda cfg: ["coarse/model.pt"],
            settings=lambda cfg: ("seed", "data.", "model.", "filter.", "precision"),
        ),
        StageSpec(
            "labels", "cluster_fine.py",
            folder=lambda cfg: f"labels/{cfg.cluster.source}",
            inputs=_cluster_inputs,
            settings=_cluster_settings,
        ),
        StageSpec(
            "finetune", "finetune.py",
            folder=lambda cfg: f"finetune/{cfg.finetune.labels}",
            inputs=lambda cfg: _label_files(cfg.finetune.labels, cfg.finetune.init),
            settings=lambda cfg: (*TRAINING, "finetune."),
        ),
        StageSpec(
            "multihead", "multihead.py",
            folder=lambda cfg: f"multihead/{cfg.multihead.labels}-alpha{cfg.multihead.alpha:g}",
            inputs=lambda cfg: _label_files(cfg.multihead.labels, cfg.multihead.init),
            settings=lambda cfg: (*TRAINING, "multihead."),
        ),
    ]
}  # fmt: skip


def stage_settings(cfg: Config, spec: StageSpec) -> dict[str, Any]:
    """The settings that decide this stage's result, {dotted key: value}."""
    wanted = spec.settings(cfg)
    flat = flatten(dataclasses.asdict(cfg))
    return {
        key: value
        for key, value in flat.items()
        if key not in NEVER_COMPARED and any(key == w or (w.endswith(".") and key.startswith(w)) for w in wanted)
    }


def producer_command(cfg: Config, folder: str) -> str:
    """The command that writes the stage folder `folder`."""
    kind, _, source = folder.partition("/")
    labels, _, alpha = source.rpartition("-alpha")
    method = source if source in CLUSTER_METHODS else cfg.cluster.method
    commands = {
        "coarse": ("train_coarse.py", {"coarse.match": ""}),
        "coarse_matched": ("train_coarse.py", {"coarse.match": cfg.coarse.match or f"finetune/{cfg.finetune.labels}"}),
        "features": ("extract_features.py", {"features.source": source}),
        "uncertainty": ("uncertainty_filter.py", {}),
        "labels": ("cluster_fine.py", {"cluster.source": source, "cluster.method": method}),
        "finetune": ("finetune.py", {"finetune.labels": source}),
        "multihead": ("multihead.py", {"multihead.labels": labels, "multihead.alpha": alpha}),
    }
    if kind not in commands:
        return f"the program that writes {folder}"
    script, settings = commands[kind]
    return cfg.command(script, **{"coarse.match": "", **settings})


def differences(old: dict, new: dict) -> list[str]:
    """In words, every key on which two flat dicts differ."""
    keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys]


def check_input(cfg: Config, relative: str, signature: str) -> str:
    """Make sure that run file `relative` is there, undamaged and made from what lies on disk now; return its sha256.

    Raises UserError that names the file or setting and the command to run.
    """
    path = cfg.run_dir / relative
    folder = str(Path(relative).parent)
    manifest_path = path.with_name("manifest.json")

    def again() -> str:  # building it takes as long as all the checks
        return producer_command(cfg, folder)

    if not manifest_path.is_file() and folder.startswith("labels/"):
        check_labels_exist(cfg, folder.removeprefix("labels/"))
    if not manifest_path.is_file():
        state = "unfinished" if path.parent.is_dir() else "missing"
        raise UserError(f"{path} is {state}: run `{again()}` first")
    manifest = artifacts.load_manifest(path.parent)
    if not path.is_file():
        raise UserError(f"{path} is missing although {manifest_path} lists it: run `{again()} --force`")
    digest = artifacts.sha256(path)
    if manifest["outputs"].get(path.name, {}).get("sha256") != digest:
        raise UserError(f"{path} is damaged or was edited (its hash is not the manifest's): run `{again()} --force`")
    for upstream, recorded in manifest["inputs"].items():  # first: the earliest stage at fault is the one to run again
        if check_input(cfg, upstream, signature) != recorded:
            raise UserError(f"{path.parent} is stale: {upstream} changed since it was made: run `{again()} --force`")
    known = {key: value for key, value in manifest["settings"].items() if key.startswith(SHARED_SETTINGS)}
    now = flatten(dataclasses.asdict(cfg))
    differing = differences(known, {key: now.get(key) for key in known})
    if differing:
        raise UserError(f"{path.parent} was made with other settings ({'; '.join(differing)}): run `{again()} --force`")
    if manifest["data_signature"] != signature:
        raise UserError(
            f"{path.parent} is stale: the data set's files changed since it was made: run `{again()} --force`"
        )
    note_other_settings(path.parent, manifest["settings"], now)
    return digest


def check_labels_exist(cfg: Config, source: str) -> None:
    """Raise UserError for labels that cluster_fine.py would not write: another name, another discoverer's."""
    if source in (*CLUSTER_METHODS, cfg.cluster.source):
        return
    found = sorted(path.parent.name for path in (cfg.run_dir / "labels").glob("*/manifest.json"))
    there = f"there are: {', '.join(found)}" if found else "there are none yet"
    raise UserError(
        f"{cfg.run_dir}/labels/{source} is missing; {there}; cluster_fine.py makes {', '.join(CLUSTER_METHODS)}"
    )


@functools.cache
def _note_once(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def note_other_settings(folder: Path, settings: dict, now: dict) -> None:
    """Say once which of a producer's own settings differ from this configuration's; its results are used as they are.

    Labels of another method or name than the configuration's are another thing, not the same thing made otherwise.
    """
    is_other = any(settings.get(key, now[key]) != now[key] for key in ("cluster.method", "cluster.source"))
    compared = {key: value for key, value in settings.items() if key != "features.source"}
    if is_other or settings.get("coarse.match"):
        return
    if differing := differences(compared, {key: now.get(key) for key in compared}):
        _note_once(f"{folder} was made with other settings ({'; '.join(differing)}) and is used as it is")


@dataclass
class OpenStage:
    """One stage folder that this process holds the lock of."""

    cfg: Config
    spec: StageSpec
    folder: Path  # the stage's folder
    settings: dict[str, Any]
    inputs: dict[str, str]  # {path relative to the run folder: sha256}
    signature: str  # of the data set's files
    finished: bool = False
    started: float = field(default_factory=time.time)
    outputs: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> dict:
        """What a checkpoint must share with this stage to be resumed."""
        return {"settings": self.settings, "inputs": self.inputs, "data_signature": self.signature}

    def why_not_done(self) -> str | None:
        """None where the folder's manifest fits this stage; otherwise the one-line reason."""
        manifest = artifacts.load_manifest(self.folder)
        differing = differences(manifest["settings"], self.settings)
        if differing:
            return f"{self.folder} is already there with other settings ({'; '.join(differing)})"
        changed = [path for path, digest in self.inputs.items() if manifest["inputs"].get(path) != digest]
        if changed:
            return f"{self.folder} is stale: {', '.join(changed)} changed since it was made"
        if manifest["data_signature"] != self.signature:
            return f"{self.folder} is stale: the data set's files changed since it was made"
        for name, output in manifest["outputs"].items():
            path = self.folder / name
            if not path.is_file() or artifacts.sha256(path) != output["sha256"]:
                return f"{path} is missing, damaged or was edited"
        return None

    def path(self, name: str) -> Path:
        """Where output `name` is about to be written; it will be listed in the manifest.

        From the first such call on an older result that --force redoes does not count as done any more.
        """
        (self.folder / "manifest.json").unlink(missing_ok=True)
        if name not in self.outputs:
            self.outputs.append(name)
        return self.folder / name

    # Of several processes (torchrun) rank 0 alone writes; the others may call all of these.

    def save_array(self, name: str, array: Any) -> None:
        if distributed.is_main():
            artifacts.save_array(self.path(name), array)

    def save_json(self, name: str, content: Any) -> None:
        if distributed.is_main():
            artifacts.save_json(self.path(name), content)

    def save_jsonl(self, name: str, lines: list[dict]) -> None:
        if distributed.is_main():
            artifacts.save_jsonl(self.path(name), lines)

    def save_csv(self, name: str, header: list[str], rows: Iterable[list]) -> None:
        if distributed.is_main():
            artifacts.save_csv(self.path(name), header, rows)

    def save_torch(self, name: str, content: Any) -> None:
        if distributed.is_main():
            artifacts.save_torch(self.path(name), content)

    def stream_array(self, name: str, shape: tuple[int, ...], dtype: Any, blocks: Iterable[Any]) -> None:
        """Write an array whose consecutive rows come in `blocks`, so that memory does not grow with it.

        Every rank must go through the blocks, as making one may take all of them.
        """
        if not distributed.is_main():
            for _ in blocks:
                pass
            return
        with artifacts.streamed_array(self.path(name), shape, dtype) as array:
            start = 0
            for block in blocks:
                array[start : start + len(block)] = block
                start += len(block)
            assert start == len(array), f"{name}: {start} of {len(array)} rows came"

    def input(self, relative: str) -> Path:
        """The path of a checked input."""
        assert relative in self.inputs, f"{relative} is not an input of {self.spec.name}"
        return self.cfg.run_dir / relative

    def finish(self, next_command: str, **how: Any) -> None:
        """Write the manifest, which makes the stage done, and name the next command."""
        if not distributed.is_main():
            return
        seconds = round(time.time() - self.started, 2)
        manifest = artifacts.make_manifest(
            self.cfg, self.spec.name, self.settings, self.inputs,
            {name: artifacts.describe_output(self.folder / name) for name in self.outputs},
            data_signature=self.signature, seconds=seconds, **how,
        )  # fmt: skip
        artifacts.save_json(self.folder / "manifest.json", manifest)
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        print(f"{self.folder}: done in {seconds:.1f} s")
        print(f"next: {next_command}")


def is_finished(cfg: Config, name: str) -> bool:
    """True where the stage's folder is done with these very settings and inputs; reads hashes, locks nothing."""
    if not (cfg.run_dir / STAGES[name].folder(cfg) / "manifest.json").is_file():
        return False
    try:
        return _survey(cfg, name).why_not_done() is None
    except UserError:
        return False


def _survey(cfg: Config, name: str) -> OpenStage:
    """The stage with its inputs checked and nothing locked or written.  Raises UserError as `check_input` does."""
    spec = STAGES[name]
    signature = data_signature(cfg.data)
    inputs = {path: check_input(cfg, path, signature) for path in spec.inputs(cfg)}
    return OpenStage(cfg, spec, cfg.run_dir / spec.folder(cfg), stage_settings(cfg, spec), inputs, signature)


@contextlib.contextmanager
def open_stage(cfg: Config, name: str) -> Iterator[OpenStage]:
    """Check the inputs, take the folder's lock and say whether there is anything to do.

    Raises UserError for a missing, damaged or stale input, for results made with other settings (unless cfg.force), and
    where another process works in the folder.
    """
    with distributed.group(), contextlib.ExitStack() as held:
        with distributed.together():
            stage = _survey(cfg, name)
            if distributed.is_main():
                held.enter_context(_lock(stage.folder))
                stage.finished = _is_done(stage)
                if not stage.finished:
                    for leftover in stage.folder.glob(".*.tmp"):  # of a killed run; nobody else is writing here
                        leftover.unlink()
                    print(f"{stage.spec.script}: {cfg.name}, seed {cfg.seed} -> {stage.folder}", file=sys.stderr)
        stage.finished = distributed.exchange(stage.finished)[0]
        yield stage


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is in use by another process; wait for it or choose another name= or seed="
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_done(stage: OpenStage) -> bool:
    """Raises UserError where there is a result that does not fit, unless --force redoes it."""
    if stage.cfg.force or not (stage.folder / "manifest.json").is_file():
        return False
    if reason := stage.why_not_done():
        raise UserError(f"{reason}; --force redoes it")
    print(f"{stage.folder}: done already; --force redoes it")
    return True
