"""A benchmark run for people: the table (.md) and the plot (.png) beside its JSON.

usage   python -m benchmarks.report results/bench-*.json
"""

import io
import sys
from pathlib import Path

import numpy as np

from benchmarks.figures import FIGURES
from utils import artifacts
from utils.config import UserError, command_line
from utils.figures import GREY, PALETTE, new_figure, style

OURS, PEER = PALETTE[0], PALETTE[1]
BAR_NAMES = {"loader": "augmented\nbatches", "train": "training\nsteps", "uncertainty": "scoring\n5 views"}


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table_row(name: str, figure: dict) -> str:
    what = FIGURES[name].what
    if "error" in figure:
        return f"| {name} | {what} | | | | | | | failed: {figure['error'].replace('|', '/')} |"
    ratios, target = figure.get("ratios") or [figure["ratio"]], figure["target"]
    at_most = "at most " * FIGURES[name].at_most
    reached = {None: "-", True: "yes", False: "no"}[FIGURES[name].reached(figure["ratio"], target)]
    cells = [
        name, what, number(figure.get("ours")), number(figure.get("peer")), figure.get("unit", ""),
        f"**{number(figure['ratio'])}**", f"{number(min(ratios))} to {number(max(ratios))} ({len(ratios)})",
        "-" if target is None else f"{at_most}{target:g}", reached,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def details(name: str, figure: dict) -> list[str]:
    """Lines below the table: what one ratio cannot say."""
    lines = []
    if shares := figure.get("shares"):
        parts = ", ".join(f"{family} {share:.0%}" for family, share in shares.items())
        lines.append(
            f"Where a training step's time goes: {parts}; operators are {figure['busy']:.0%} of the wall clock."
        )
    if "filter_ratio" in figure:
        lines.append(
            f"Memory: {figure['measure']}; {figure['rows'][0]:,} and {figure['rows'][1]:,} images of "
            f"{figure['image_bytes']:,} bytes, `loader.placement=host`. extract_features.py {figure['peer']:.0f} -> "
            f"{figure['ours']:.0f} MB; uncertainty_filter.py ratio {figure['filter_ratio']:.3g}."
        )
        if "baseline" in figure["peaks_mb"]:
            lines[-1] += (
                f" The imports alone take {figure['peaks_mb']['baseline'][0]:.0f} MB. With the default placement the "
                f"ratio is {figure['default_ratio']:.3g}."
            )
    if stages := figure.get("stage_seconds"):
        parts = ", ".join(f"{s} {t['ours']:.1f} / {t['peer']:.1f}" for s, t in stages.items())
        accuracies = ", ".join(
            f"{s} {100 * ours:.2f} / {100 * figure['peer_accuracy'][s]:.2f}"
            for s, ours in figure["ours_accuracy"].items()
        )
        lines.append(
            f"Pipeline ({figure['data']}), seconds of speed=fast / speed=plain: {parts}. "
            f"Test accuracy, %: {accuracies}."
        )
    if "ari_to_peer" in figure:
        seeds = figure["ari_peer_seeds"]
        lines.append(
            f"Clustering of {figure['n_classes']} classes of {figure['n_rows']:,} rows: ARI of our labels with the "
            f"peer's {figure['ari_to_peer']:.3f}"
            + ("" if seeds is None else f", of the peer's with its own of another seed {seeds:.3f}")
            + f"; with the planted classes: ours {figure['ari_truth']:.3f}, the peer's {figure['ari_truth_peer']:.3f}."
        )
    if name == "cluster_scale":
        curve = zip(figure["rows"], figure["seconds"], figure["peak_mb"], strict=True)
        lines.append("Clustering: " + ", ".join(f"{n:,} rows {s:.1f} s {mb:,.0f} MB" for n, s, mb in curve) + ".")
    return lines


def other_commits(run: dict) -> dict[str, list[str]]:
    """{commit: its figures}, of the figures that `--only` left in the file from another commit."""
    found = {}
    for name, figure in run["figures"].items():
        if figure.get("commit", run["commit"]) != run["commit"]:
            found.setdefault(figure["commit"], []).append(name)
    return found


def markdown(run: dict, plot_name: str | None) -> str:
    """The table of one run, with where and with what it was measured; plot_name: the picture beside it, if any."""
    instructions = [n for n, has in (("AMX", run["amx"]), ("AVX512-BF16", run["avx512_bf16"])) if has]
    on_cpu = run["device_type"] == "cpu"
    versions = ", ".join(f"{library} {version}" for library, version in run["versions"].items())
    state = " with local changes" * bool(run["dirty"])
    lines = [
        f"# Speed and memory: {run['device']}",
        "",
        *(["Sizes of `--quick`: they show that everything runs and are not for quoting.", ""] if run["quick"] else []),
        "| figure | ours / peer | ours | peer | unit | ratio (median) | spread (runs) | target | reached |",
        "|---|---|--:|--:|---|--:|---|--:|---|",
        *(table_row(name, figure) for name, figure in run["figures"].items()),
        "",
        *(f"{line}\n" for name, figure in run["figures"].items() for line in details(name, figure)),
        *([f"![Throughput of both sides, clustering time and memory]({plot_name})", ""] if plot_name else []),
        f"{run['device']}, {run['threads']} threads, {run['precision']}; this CPU has "
        f"{' and '.join(instructions) or 'neither AMX nor AVX512-BF16'}."
        + (" The CPU targets were set for 2 cores with AMX." if on_cpu else ""),
        "",
        f"Made {run['date']} by `{run['command']}`, commit {run['commit']}{state}; {versions}. "
        "Both sides of a ratio run in turns in the same run.",
        *(f"Of commit {commit}: {', '.join(names)}." for commit, names in other_commits(run).items()),
    ]
    return "\n".join(lines) + "\n"


def plain_numbers(axis) -> None:
    """10,000 instead of 10^4, which the figures' style, without mathematics, could not set."""
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def throughput(ax, figures: dict) -> None:
    """Paired bars on a log axis, each pair's ratio below it."""
    places, width = np.arange(len(figures)), 0.4
    rates = {side: [figure[side] for figure in figures.values()] for side in ("ours", "peer")}
    for side, colour, shift in (("ours", OURS, -width / 2), ("peer", PEER, width / 2)):
        bars = ax.bar(places + shift, rates[side], width, color=colour, label=side)
        ax.bar_label(bars, map(number, rates[side]), padding=1, fontsize=6, color=GREY)
    everything = rates["ours"] + rates["peer"]
    ax.set_yscale("log")
    ax.set_ylim(min(everything) / 3, max(everything) * 8)  # room for the legend
    plain_numbers(ax.yaxis)
    ax.set_xticks(places, [f"{BAR_NAMES.get(n, n)}\n{number(f['ratio'])} times" for n, f in figures.items()])
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("images/s")
    ax.set_title("Throughput")
    ax.legend(loc="upper right", ncols=2)


def scaling(ax, figure: dict) -> None:
    """Seconds against rows, both log, with the fitted power and a line of slope 1."""
    rows, seconds = np.array(figure["rows"], float), np.array(figure["seconds"])
    slope, intercept = np.polyfit(np.log(rows), np.log(seconds), 1)
    middle = np.exp(np.log(seconds).mean() - np.log(rows).mean())
    ax.loglog(rows, middle * rows, color=GREY, linestyle=":", label="slope 1")
    ax.loglog(rows, np.exp(intercept) * rows**slope, color=OURS, label=f"fit, slope {slope:.2f}")
    ax.loglog(rows, seconds, "o", color=OURS, markersize=4, label="measured")
    ax.set_yticks(ticks_1_2_5(seconds))
    plain_numbers(ax.yaxis)
    label_rows(ax, rows)
    ax.set_ylabel("seconds")
    ax.set_title("Clustering time")
    ax.set_ylim(top=seconds.max() * 3)  # the upper left is free for the legend
    ax.legend(loc="upper left", handlelength=1.5)


def memory(ax, figure: dict) -> None:
    rows = np.array(figure["rows"], float)
    ax.semilogx(rows, figure["peak_mb"], "s-", color=PALETTE[2], markersize=4)
    ax.set_ylim(0, 1.15 * max(figure["peak_mb"]))
    label_rows(ax, rows)
    ax.set_ylabel("peak memory, MB")
    ax.set_title("Clustering memory")


def label_rows(ax, rows: np.ndarray) -> None:
    """The first row count and every later one that has room."""
    wide = [rows[0]]
    for n in rows[1:]:
        if n >= 2 * wide[-1]:
            wide.append(n)
    ax.set_xticks(wide, [f"{n / 1000:g}k" for n in wide])
    ax.minorticks_off()
    ax.set_xlim(rows[0] / 1.4, rows[-1] * 1.4)
    ax.set_xlabel("rows")


def ticks_1_2_5(values: np.ndarray) -> list[float]:
    """1, 2, 5, 10, ... from just below the least to the greatest of `values`."""
    powers = 10.0 ** np.arange(np.floor(np.log10(values.min())), np.ceil(np.log10(values.max())) + 1)
    ticks = np.outer(powers, [1, 2, 5]).ravel()
    low, high = ticks[ticks <= values.min()].max(), values.max()
    return [float(tick) for tick in ticks if low <= tick <= high]


def plot(run: dict):
    """A figure of the panels that this run has numbers for; None where it has none."""
    good = {name: figure for name, figure in run["figures"].items() if "error" not in figure}
    panels = []
    if images := {name: figure for name, figure in good.items() if figure.get("unit") == "images/s"}:
        panels.append((throughput, images))
    if "cluster_scale" in good:
        panels += [(scaling, good["cluster_scale"]), (memory, good["cluster_scale"])]
    if not panels:
        return None
    widths = [2.9 if draw is throughput else 2.2 for draw, _ in panels]
    fig, axes = new_figure(1, len(panels), sum(widths), 2.6, width_ratios=widths)
    for ax, (draw, content) in zip(axes[0], panels, strict=True):
        draw(ax, content)
    note = " (--quick sizes)" * run["quick"]
    fig.suptitle(f"{run['device']}, {run['precision']}{note}", fontsize=8, color=GREY)
    return fig


def write(path: Path) -> list[Path]:
    """Write the table and the plot of the run in JSON file `path` beside it."""
    run = artifacts.load_json(path)
    if not run.keys() >= {"figures", "device"}:
        raise UserError(f"{path}: not written by `python -m benchmarks`")
    table, picture = path.with_suffix(".md"), path.with_suffix(".png")
    with style():
        fig = plot(run)
        if fig is not None:
            buffer = io.BytesIO()
            fig.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
            artifacts.save_bytes(picture, buffer.getvalue())
    artifacts.save_text(table, markdown(run, picture.name if fig else None))
    return [table, *([picture] if fig else [])]


@command_line
def main(argv=None):
    paths = [Path(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    if not paths or any(path.suffix != ".json" for path in paths):
        raise UserError("usage: python -m benchmarks.report FILE.json...")
    for path in paths:
        print(*write(path))


if __name__ == "__main__":
    main()
