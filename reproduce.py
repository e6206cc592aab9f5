"""Run all stages for every seed, with the budget-matched baseline and the controls, then report.

Per seed: coarse, features, uncertainty, the labels of each source in reproduce.labels, FN and MH (each of
reproduce.alphas) on each, and coarse training for as many images as FN saw. What is done is skipped; an interrupted run
goes on where it was. --force redoes the stages whose settings or inputs have changed.

reads   the data set
writes  runs/<name>/seed<seed>/..., runs/<name>/report/
usage   python reproduce.py --config configs/digits.yaml seeds=[0,1,2]
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from utils import distributed
from utils.config import CLUSTER_METHODS, Config, UserError, command_line, load_config, parse_config
from utils.data import load_dataset
from utils.stages import STAGES, is_finished

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """One stage to run with some settings."""

    stage: str
    overrides: tuple[str, ...]

    def config(self, cfg: Config) -> Config:
        """The configuration that the stage's own process will see."""
        return load_config(cfg.config_path, (*shared_overrides(cfg), *self.overrides))


def shared_overrides(cfg: Config) -> tuple[str, ...]:
    """The command line's settings for every stage; seed and labels are set job by job."""
    return tuple(o for o in cfg.overrides if not o.startswith(("seed=", "seeds=")))


def jobs_of_seed(cfg: Config, seed: int, sources: list[str]) -> list[Job]:
    """The stages of one seed, each after what it reads.  sources: the labels to learn from."""

    def job(stage: str, *overrides: str) -> Job:
        return Job(stage, (f"seed={seed}", *overrides))

    found = [source for source in sources if source not in ("random", "oracle")] or sources
    jobs = [job("coarse"), job("features"), job("uncertainty")]
    for source in sorted(sources, key=lambda source: source == "random"):  # random shuffles another source's labels
        if source in CLUSTER_METHODS:
            extra = [f"cluster.random_of={found[0]}"] if source == "random" else []
            jobs.append(job("labels", f"cluster.method={source}", f"cluster.source={source}", *extra))
    jobs.append(job("finetune", f"finetune.labels={found[0]}"))
    jobs.append(job("coarse", f"coarse.match=finetune/{found[0]}"))
    jobs += [job("finetune", f"finetune.labels={source}") for source in sources if source != found[0]]
    jobs += [
        job("multihead", f"multihead.labels={source}", f"multihead.alpha={alpha:g}")
        for source in sources
        for alpha in cfg.reproduce.alphas
    ]
    return jobs


def usable_sources(cfg: Config) -> list[str]:
    """reproduce.labels without `oracle` where no truth is known.  Raises UserError for labels that nobody can make."""
    sources = list(dict.fromkeys(cfg.reproduce.labels))
    for source in sources:
        manifest = f"labels/{source}/manifest.json"
        missing = [seed for seed in cfg.seeds if not (cfg.dataset_dir / f"seed{seed}" / manifest).is_file()]
        if source not in CLUSTER_METHODS and missing:
            key = "reproduce.labels"
            raise UserError(f"{key}: {source} is no cluster.method and seeds {missing} have no labels/{source} yet")
    if "random" in sources and not set(sources) - {"random", "oracle"}:
        raise UserError("reproduce.labels: random shuffles what a discoverer found; name one beside it (umap_hdbscan)")
    if "oracle" in sources and load_dataset(cfg.data, cfg.dataset_dir / "cache").train.fine_labels is None:
        print(f"{cfg.data.name} has no true fine labels: the oracle control is left out", file=sys.stderr)
        sources.remove("oracle")
    if not sources:
        raise UserError("reproduce.labels: nothing is left to learn from; name a discoverer such as umap_hdbscan")
    return sources


def run_script(script: str, argv: list[str], log: Path, n_processes: int) -> None:
    """What a job's process does: run the script as the shell or torchrun would, its output going to `log`."""
    threading.Thread(target=stop_with_parent, daemon=True).start()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if n_processes > 1:
        from torch.distributed.run import main as torchrun

        torchrun(["--standalone", f"--nproc-per-node={n_processes}", script, *argv])
        return
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


def stop_with_parent() -> None:
    """Interrupt this process, so that it saves, when reproduce.py is killed: nobody would wait for it."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)


def processes() -> multiprocessing.context.BaseContext:
    """Where the system can fork: processes that start with the slow imports done, one process a stage all the same."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    slow = ["torch._dynamo", "torchvision.models.resnet", "sklearn.metrics", "sklearn.datasets"]
    context.set_forkserver_preload(slow)
    return context


def run_job(context: multiprocessing.context.BaseContext, cfg: Config, job: Job, folder: Path, log: Path) -> str:
    """Run one stage in a process of its own; return its result line.  Exits with its code where it fails."""
    config = ["--config", cfg.config_path] if cfg.config_path else []
    argv = [*config, *shared_overrides(cfg), *job.overrides, *(["--force"] if cfg.force else [])]
    script = str(ROOT / STAGES[job.stage].script)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    n_processes = 1 if job.stage == "labels" else cfg.reproduce.processes  # clustering spreads by cluster.n_jobs
    process = context.Process(target=run_script, args=(script, argv, log, n_processes))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        with contextlib.suppress(ProcessLookupError):  # Ctrl-C in a terminal reaches the stage too; it may be gone
            os.kill(process.pid, signal.SIGINT)
        process.join()
        raise KeyboardInterrupt("the stage in hand has saved what it had") from None
    lines = log.read_text().splitlines()
    if process.exitcode:
        how = "failed" if process.exitcode > 0 else f"was killed by signal {-process.exitcode}"
        print(f"\n{Path(script).name} {' '.join(argv)} {how}; the end of {log}:", file=sys.stderr)
        print("\n".join(lines[-30:]), file=sys.stderr)
        raise SystemExit(process.exitcode if process.exitcode > 0 else 1)
    return next((line.partition(": ")[2] for line in lines if line.startswith(f"{folder}: ")), "")


@command_line
def main(argv=None):
    distributed.refuse("reproduce.py", "set reproduce.processes")
    cfg = parse_config(__doc__, argv)
    if cfg.coarse.match:
        raise UserError("coarse.match: reproduce.py sets it where it is due; leave it out")
    sources = usable_sources(cfg)
    jobs = [job for seed in cfg.seeds for job in jobs_of_seed(cfg, seed, sources)]
    print(f"{len(jobs)} stages; progress inside a stage: {cfg.dataset_dir}/logs/", file=sys.stderr)
    context, spent, n_run = processes(), 0.0, 0
    for number, job in enumerate(jobs, start=1):
        job_cfg = job.config(cfg)
        folder = STAGES[job.stage].folder(job_cfg)
        head = f"[{number:>{len(str(len(jobs)))}}/{len(jobs)}] seed {job_cfg.seed}  {folder:<32}"
        print(head, end=" ", file=sys.stderr, flush=True)
        if is_finished(job_cfg, job.stage):
            print("done before", file=sys.stderr, flush=True)
            continue
        started = time.perf_counter()
        log = cfg.dataset_dir / "logs" / f"seed{job_cfg.seed}-{folder.replace('/', '-')}.log"
        result = run_job(context, cfg, job, job_cfg.run_dir / folder, log)
        seconds = time.perf_counter() - started
        n_run, spent = n_run + 1, spent + seconds
        left = (len(jobs) - number) * spent / n_run / 60
        print(f"{seconds:6.1f} s, about {left:.0f} min left  {result}", file=sys.stderr, flush=True)
    config = ["--config", cfg.config_path] if cfg.config_path else []
    raise SystemExit(subprocess.run([sys.executable, str(ROOT / "report.py"), *config, *cfg.overrides]).returncode)


if __name__ == "__main__":
    main()
