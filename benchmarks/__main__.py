"""Measure speed and memory, each figure a ratio against a plain peer in the same run.

writes  with --out FILE: FILE (JSON), and beside it the table (.md) and the plot (.png)
usage   python -m benchmarks --quick                                           (2 CPU cores: 3 minutes)
        python -m benchmarks --only train uncertainty --out results/mine.json  (other figures in the file stay)
        python -m benchmarks --out auto                                        results/bench-<device>.json
"""

import argparse
import datetime
import importlib
import os
import re
import shlex
import sys
import time
import traceback
from pathlib import Path

from benchmarks.figures import FIGURES
from utils.config import UserError, command_line

RESULTS = Path(__file__).parents[1] / "results"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run; not for quoting")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write, or auto: results/bench-<device>.json")
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser.parse_args(argv)


def choose_device(wanted: str) -> None:
    """Make `auto` mean `wanted` here and in every process started from here.  Raises UserError without a GPU."""
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first import of torch
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device on this machine")


def describe(quick: bool) -> dict:
    """Where and with what this run measures."""
    import torch

    from utils import artifacts, training
    from utils.config import Config

    runtime = training.pick_runtime(Config())
    how = runtime.describe()
    return {
        "device": how["device"],
        "device_type": runtime.device.type,
        "cores": len(os.sched_getaffinity(0)),
        "threads": how["threads"],
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "precision": how["precision"],
        "quick": quick,
        "versions": artifacts.library_versions(),
        **artifacts.code_version(),
        "date": datetime.date.today().isoformat(),
    }


def measure(name: str, quick: bool, device_type: str) -> dict:
    """The figure's own dict with its target and the seconds it took; {'error': one line} where it failed."""
    figure, started = FIGURES[name], time.perf_counter()
    try:
        module = importlib.import_module(f"benchmarks.{figure.module}")
        result = getattr(module, name)(quick)
    except (Exception, SystemExit) as error:  # whatever one figure does, the others are still wanted
        traceback.print_exc()
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    return {**result, "target": figure.target(device_type), "took_s": round(time.perf_counter() - started, 1)}


def earlier_figures(earlier: dict, run: dict) -> dict:
    """The figures of a file that --only adds to; none where it was measured on another device or at other sizes."""
    alike = all(earlier.get(key) == run[key] for key in ("device", "threads", "precision", "quick"))
    return earlier["figures"] if alike else {}


def line_of(name: str, figure: dict) -> str:
    if "error" in figure:
        return f"{name:<15} {figure['error']}"
    target = "none" if figure["target"] is None else f"{figure['target']:g}"
    sides = "  ".join(f"{side} {figure[side]:,.4g}" for side in ("ours", "peer") if side in figure)
    unit = figure.get("unit", "")
    return f"{name:<15} {figure['ratio']:8.3g}  target {target:<5} {sides} {unit}  ({figure['took_s']} s)"


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@command_line
def main(argv=None):
    args = parse_arguments(argv)
    choose_device(args.device)
    from benchmarks import report
    from utils import artifacts

    command = shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)])
    run = {"figures": {}, **describe(args.quick), "command": command}
    path = args.out and (RESULTS / f"bench-{slug(run['device'])}.json" if args.out == "auto" else Path(args.out))
    if args.only and path and path.is_file():
        run["figures"] = earlier_figures(artifacts.load_json(path), run)
    print(f"{run['device']}, {run['precision']}, {run['threads']} threads", file=sys.stderr)
    for name in [name for name in FIGURES if name in (args.only or FIGURES)]:
        run["figures"][name] = {**measure(name, args.quick, run["device_type"]), "commit": run["commit"]}
        print(line_of(name, run["figures"][name]), flush=True)
        if path:
            run["figures"] = {name: run["figures"][name] for name in FIGURES if name in run["figures"]}
            artifacts.save_json(path, run)
    if path:
        report.write(path)
    if any("error" in figure for figure in run["figures"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
