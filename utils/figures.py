"""The figures of a report: functions from arrays and dicts to matplotlib Figures, and `save_figure` (PNG and PDF).

No pyplot and no screen: Figures are made directly. Make and save them inside `with style():`. Same input, same bytes.
"""

import contextlib
import csv
import io
import math
import re
from pathlib import Path

import numpy as np

from utils.artifacts import load_array, save_bytes

# Okabe and Ito's colour-blind-safe colours (yellow left out: unreadable on white), then Paul Tol's muted set; after
# these the colours come again with another marker.
PALETTE = [
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000",
    "#882255", "#999933", "#332288", "#44AA99", "#CC6677", "#117733", "#AA4499", "#DDCC77",
]  # fmt: skip
MARKERS = "os^Dv"
GREY, FAINT, ACCENT = "#555555", "#BBBBBB", "#D55E00"
MAX_POINTS = 5000  # points of a coarse class in one scatter plot
CLASSES_A_PAGE = 4
MAX_LEGEND = 12
N_TYPICAL, N_UNCERTAIN, MAX_GALLERY_ROWS = 8, 4, 12
MAX_TILE = 96  # pixels; larger images are thinned for the gallery


@contextlib.contextmanager
def style():
    """Font sizes, thin axes and reproducible PDF output for everything made and saved inside."""
    import matplotlib

    settings = {
        "font.size": 8,
        "axes.titlesize": 9,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,  # a $ in a class name is a dollar
        "pdf.fonttype": 42,
        "savefig.dpi": 150,
    }
    with matplotlib.rc_context(settings):
        yield


def save_figure(fig, path: Path) -> list[Path]:
    """Write `path` + .png (150 dpi) and .pdf, each whole or not at all, without a date inside."""
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        fig.savefig(buffer, format=suffix[1:], metadata=metadata)
        written.append(path.with_name(path.name + suffix))
        save_bytes(written[-1], buffer.getvalue())
    return written


def new_figure(n_rows: int, n_columns: int, width: float, height: float, **how):
    """(Figure, (n_rows, n_columns) array of Axes); width and height in inches."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(n_rows, n_columns, squeeze=False, **how)


def file_name(*parts: str) -> str:
    """One file-name stem from parts that may hold spaces and slashes."""
    return "_".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts)


def shorten(text: str, n: int) -> str:
    """At most n characters, the last an ellipsis where any were left out."""
    return text if len(text) <= n else f"{text[: n - 1]}…"


# What one seed found


def load_found(run: dict, source: str, dataset=None) -> dict:
    """Everything the figures need of one seed's labels/<source>.

    Returns {"coarse": (N,) str, "classes": [coarse names], "labels": (N,) int64, "names": [name by id],
    "membership": (N,), "embedding": (N, d), "true": (N,) int64 or None, "true_names": [...]}.  Without `dataset` the
    coarse names come from labels.csv and there is no truth.
    """
    folder, clusters = run["dir"] / "labels" / source, run["labels"][source]["clusters"]
    n_rows = dataset.train.n if dataset else None
    arrays = {name: load_array(folder / f"{name}.npy", rows=n_rows) for name in ("labels", "membership", "embedding")}
    true = dataset.train.fine_labels if dataset else None
    return {
        **arrays,
        "coarse": row_classes(folder / "labels.csv", dataset),
        "classes": list(clusters["classes"]),
        "names": clusters["names"],
        "true": true,
        "true_names": list(dataset.fine_names or map(str, range(true.max() + 1))) if true is not None else [],
    }


def row_classes(csv_path: Path, dataset=None) -> np.ndarray:
    """(N,) str, the coarse name of every training row, from the data set or else from a labels.csv."""
    if dataset:
        return np.array([str(name) for name in dataset.coarse_names])[dataset.train.coarse_labels]
    with open(csv_path, newline="") as file:
        return np.array([line["coarse"] for line in csv.DictReader(file)])


def in_two_dimensions(points: np.ndarray) -> np.ndarray:
    """(n, 2): the embedding itself where it has two dimensions, else its first two principal components."""
    if points.shape[1] == 2:
        return points
    from sklearn.decomposition import PCA

    return PCA(2, svd_solver="full").fit_transform(points)


def match_colours(found: np.ndarray, true: np.ndarray) -> dict[int, int]:
    """{true class: index of its colour}: the discovered class it overlaps most, one to one; the rest get fresh colours.

    found: (n,) int >= 0, true: (n,) int.  Discovered class number k of the sorted ids has colour k.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    true_ids, n_found = np.unique(true), len(np.unique(found))
    pairs = linear_sum_assignment(contingency_matrix(true, found), maximize=True)
    matched = {int(true_ids[t]): int(k) for t, k in zip(*pairs, strict=True)}
    fresh = iter(range(n_found, n_found + len(true_ids)))
    return {t: matched[t] if t in matched else next(fresh) for t in map(int, true_ids)}


def colour(index: int) -> dict:
    return {"c": PALETTE[index % len(PALETTE)], "marker": MARKERS[index // len(PALETTE) % len(MARKERS)]}


def scatter_groups(ax, points, groups, names: dict[int, str], colours: dict[int, int], marks: dict[int, str]) -> None:
    """Points by group, a legend below (the first groups) and marks at the groups' middles; group -1 is grey, below."""
    import matplotlib.patheffects as effects

    size = float(np.clip(6000 / max(len(points), 1), 2, 12))
    for group in np.unique(groups):
        at = points[groups == group]
        look = {"c": FAINT, "marker": "x", "zorder": 1} if group < 0 else {**colour(colours[group]), "zorder": 2}
        edge = {} if group < 0 else {"linewidths": 0}
        ax.scatter(*at.T, s=size, alpha=0.75, label=shorten(names[group], 16), rasterized=True, **look, **edge)
        if group in marks:
            outline = [effects.withStroke(linewidth=2.5, foreground="white")]
            middle = at[np.argmin(((at - np.median(at, axis=0)) ** 2).sum(axis=1))]
            ax.text(*middle, marks[group], ha="center", va="center", weight="bold", path_effects=outline, zorder=3)
    ax.set(xticks=[], yticks=[])
    handles = ax.get_legend_handles_labels()[0][:MAX_LEGEND]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.07), "ncols": 2}
    legend = ax.legend(handles=handles, handletextpad=0.1, columnspacing=0.8, **place)
    for handle in legend.legend_handles:
        handle.set(sizes=[18], alpha=1)


def embedding_figures(found: dict) -> list:
    """Each coarse class's embedding, by discovered class and (where truth exists) below it by true class; 4 a page."""
    is_placed = np.isfinite(found["embedding"]).all(axis=1)
    classes = [name for name in found["classes"] if (is_placed & (found["coarse"] == name)).any()]
    pages = [classes[i : i + CLASSES_A_PAGE] for i in range(0, len(classes), CLASSES_A_PAGE)]
    n_rows = 1 if found["true"] is None else 2
    figures = []
    for page in pages:
        fig, axes = new_figure(n_rows, len(page), max(2.6 * len(page), 3.5), 3.1 * n_rows)
        for ax_column, name in zip(axes.T, page, strict=True):
            draw_embedding(ax_column, found, name, np.flatnonzero(is_placed & (found["coarse"] == name)))
        for ax in axes[:, 1:].flat:
            ax.set_ylabel("")
        figures.append(fig)
    return figures


def draw_embedding(axes, found: dict, coarse_name: str, rows: np.ndarray) -> None:
    """One coarse class: axes[0] by discovered class, axes[1] (where there) by true class in the matching colours."""
    axis_name = "UMAP" if found["embedding"].shape[1] == 2 else "UMAP, principal component"
    points = in_two_dimensions(found["embedding"][rows])
    if len(rows) > MAX_POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(len(rows), MAX_POINTS, replace=False))
        rows, points = rows[drawn], points[drawn]
    labels = found["labels"][rows]
    ids = [int(z) for z in np.unique(labels) if z >= 0]
    sizes = {z: int((found["labels"] == z).sum()) for z in ids}
    numbers = {z: found["names"][z].rpartition("/")[2] for z in ids}
    names = {z: f"{numbers[z]}: {sizes[z]:,} rows" for z in ids} | {-1: "no label"}
    scatter_groups(axes[0], points, labels, names, {z: k for k, z in enumerate(ids)}, numbers)
    axes[0].set_title(f"{shorten(coarse_name, 28)}\n{len(ids)} discovered")
    if len(axes) > 1:
        true, has_label = found["true"][rows], labels >= 0
        true_names = {int(t): str(found["true_names"][t]) for t in np.unique(true)}
        colours = match_colours(labels[has_label], true[has_label]) if has_label.any() else {}
        spare = max(colours.values(), default=-1) + 1
        colours |= {t: spare + i for i, t in enumerate(t for t in true_names if t not in colours)}
        is_brief = all(len(name) <= 3 for name in true_names.values())
        scatter_groups(axes[1], points, true, true_names, colours, true_names if is_brief else {})
        axes[1].set_title(f"{len(true_names)} true")
    for ax in axes:
        ax.set_xlabel(f"{axis_name} 1", labelpad=2)
        ax.set_ylabel(f"{axis_name} 2")


def gallery_figure(found: dict, coarse_name: str, images: np.ndarray):
    """A row of images for each discovered class of one coarse class: its surest members, then its least certain ones.

    images: (N, H, W, C) uint8.  A framed image has another true class than most of its row's.  None without members.
    """
    all_ids = [z for z in np.unique(found["labels"][found["coarse"] == coarse_name]) if z >= 0]
    ids = all_ids[:MAX_GALLERY_ROWS]
    if not ids:
        return None
    strips, captions = zip(*(gallery_row(found, z, images) for z in ids), strict=True)
    tile = strips[0].shape[0]
    fig, axes = new_figure(1, 1, 8.0, 0.4 + 0.52 * len(ids))
    ax = axes[0, 0]
    ax.imshow(np.concatenate(strips), interpolation="nearest", aspect="equal")
    ax.axis("off")
    for row, caption in enumerate(captions):
        ax.text(-0.15 * tile, (row + 0.5) * tile, caption, ha="right", va="center", fontsize=7, linespacing=1.1)
    left, right = N_TYPICAL / 2, N_TYPICAL + 0.5 + N_UNCERTAIN / 2
    for column, words in ((left, "highest membership"), (right, "lowest membership")):
        ax.text(column * tile, -0.12 * tile, words, ha="center", va="bottom")
    words = ["orange frame: not of the row's main true class"] if found["true"] is not None else []
    words += [f"the {len(ids)} largest of {len(all_ids)} classes"] if len(ids) < len(all_ids) else []
    ax.text(0, (len(ids) + 0.1) * tile, "; ".join(words), va="top", color=GREY)
    return fig


def gallery_row(found: dict, z: int, images: np.ndarray) -> tuple[np.ndarray, str]:
    """((tile, width, 3) uint8 strip, caption) of discovered class z; ties in membership go by row."""
    members = np.flatnonzero(found["labels"] == z)
    order = members[np.argsort(-found["membership"][members], kind="stable")]
    n_uncertain = min(N_UNCERTAIN, max(len(order) - N_TYPICAL, 0))
    typical, uncertain = order[:N_TYPICAL], order[len(order) - n_uncertain :]
    caption = f"{found['names'][z]}\n{len(members):,} rows"
    main = None
    if found["true"] is not None:
        ids, counts = np.unique(found["true"][members], return_counts=True)
        main = ids[counts.argmax()]
        caption += f"\n{counts.max() / len(members):.0%} {found['true_names'][main]}"

    def tiles(rows, n):
        drawn = [as_tile(images[r], main is not None and found["true"][r] != main) for r in rows]
        blank = [np.full_like(as_tile(images[0], False), 255)] * (n - len(rows))
        return drawn + blank

    typical_tiles, uncertain_tiles = tiles(typical, N_TYPICAL), tiles(uncertain, N_UNCERTAIN)
    gap = np.full((len(typical_tiles[0]), len(typical_tiles[0]) // 2, 3), 255, np.uint8)
    return np.concatenate([*typical_tiles, gap, *uncertain_tiles], axis=1), caption


def as_tile(image: np.ndarray, is_framed: bool) -> np.ndarray:
    """(H, W, C) uint8 -> a square RGB tile of at least 32 pixels with a border, accent-coloured where framed."""
    height, width = image.shape[:2]
    step, repeat = max(1, math.ceil(max(height, width) / MAX_TILE)), max(1, math.ceil(32 / max(height, width)))
    image = np.broadcast_to(image[::step, ::step], (*image[::step, ::step].shape[:2], 3))
    image = image.repeat(repeat, 0).repeat(repeat, 1)
    side = max(image.shape[:2])
    frame, margin = max(2, side // 14), max(1, side // 24)
    inner = np.empty((side + 2 * frame, side + 2 * frame, 3), np.uint8)
    inner[:] = [int(ACCENT[i : i + 2], 16) for i in (1, 3, 5)] if is_framed else 255
    top, left = frame + (side - image.shape[0]) // 2, frame + (side - image.shape[1]) // 2
    inner[top : top + image.shape[0], left : left + image.shape[1]] = image
    return np.pad(inner, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)


def uncertainty_figure(scores: np.ndarray, is_kept: np.ndarray, coarse: np.ndarray, cuts: dict[str, float], words: str):
    """Histogram of the scores of each coarse class's rows, dropped rows in the accent colour, on a logarithmic axis.

    scores: (n,) float >= 0, is_kept: (n,) bool, coarse: (n,) str, cuts: {coarse name: largest kept score},
    words: what the score is called.
    """
    n_columns = min(4, len(cuts))
    n_rows = math.ceil(len(cuts) / n_columns)
    fig, axes = new_figure(n_rows, n_columns, max(2.3 * n_columns, 3.5), 1.9 * n_rows, sharex=True)
    high = max(float(scores.max()), 1e-6)
    low = 1e-4 * high  # most rows are very certain: on a linear axis all of them would be one bar
    bins = np.geomspace(low, high, 41)
    for ax, (name, cut) in zip(axes.flat, cuts.items(), strict=False):
        kept, dropped = (np.clip(scores[(coarse == name) & rows], low, high) for rows in (is_kept, ~is_kept))
        ax.hist([kept, dropped], bins, stacked=True, color=[FAINT, ACCENT])
        ax.axvline(max(cut, low), color="black", lw=0.9, ls="--")
        share = len(dropped) / max(len(kept) + len(dropped), 1)
        ax.set_title(f"{shorten(name, 26)}\ncut {cut:.3g}, {share:.1%} dropped", fontsize=8)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")  # the default writes powers of ten as maths, which is switched off
    for ax in axes.flat[len(cuts) :]:
        ax.axis("off")
    fig.supxlabel(f"uncertainty ({words}); the first bar holds everything below", fontsize=8)
    fig.supylabel("training rows", fontsize=8)
    return fig


# All seeds


def mean_curve(histories: list[list[dict]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images seen, mean, std) of validation accuracy by epoch, each (E,), E epochs of the shortest history.

    Epochs without a validation accuracy are left out.  Std is 0 for a single seed.
    """
    points = [
        [(e["images_seen"], e["val_accuracy"]) for e in h if e.get("val_accuracy") is not None] for h in histories
    ]
    n_epochs = min(len(p) for p in points)
    seen, accuracy = (
        np.array([p[:n_epochs] for p in points], float).reshape(len(points), n_epochs, 2).transpose(2, 0, 1)
    )
    return seen.mean(0), accuracy.mean(0), accuracy.std(0, ddof=1) if len(points) > 1 else np.zeros(n_epochs)


def curves_figure(histories: dict[str, list[list[dict]]], learners: dict[str, dict]):
    """Validation accuracy against images seen, a panel for each labels source, the unlabelled learners in all of them.

    histories: {learner: [history of each seed]}.  The band is one std over seeds.  None without any history.
    """
    curves = {key: mean_curve(h) for key, h in histories.items() if h and all(h)}
    curves = {key: curve for key, curve in curves.items() if len(curve[0])}
    if not curves:
        return None
    sources = list(dict.fromkeys(learners[key]["labels"] for key in curves if learners[key]["labels"])) or [None]
    kinds = list(dict.fromkeys(learners[key]["learner"] for key in curves))
    fig, axes = new_figure(1, len(sources), max(2.7 * len(sources), 4.5), 3.1, sharey=True, sharex=True)
    plain = {"coarse": {"color": "black", "ls": ":"}, "coarse (matched budget)": {"color": "black", "ls": "--"}}
    lines = {}
    for ax, source in zip(axes.flat, sources, strict=True):
        for key, (seen, mean, std) in curves.items():
            if learners[key]["labels"] in (None, source):
                kind = learners[key]["learner"]
                look = plain.get(kind, {"color": PALETTE[(kinds.index(kind) - 2) % len(PALETTE)]})
                marker = "o" if len(seen) == 1 else None
                lines[kind] = ax.plot(seen / 1e3, 100 * mean, lw=1.3, marker=marker, **look)[0]
                ax.fill_between(
                    seen / 1e3, 100 * (mean - std), 100 * (mean + std), color=look["color"], alpha=0.15, lw=0
                )
        ax.set_title(f"labels: {source}" if source else "no labels used")
        ax.grid(axis="y", lw=0.3)
        ax.set_xlabel("images seen, thousands")
    axes[0, 0].set_ylabel("validation accuracy, %")
    lowest = min(100 * float(mean[len(mean) // 4 :].min()) for _, mean, _ in curves.values())
    axes[0, 0].set_ylim(
        max(0, lowest - 3), min(100.5, max(100 * float((m + s).max()) for _, m, s in curves.values()) + 1)
    )
    fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(5, len(lines)))
    return fig


def differences_figure(learners: dict[str, dict]):
    """Paired differences of test accuracy from the matched baseline: mean, 95 % interval, every seed; None without."""
    shown = [entry for entry in learners.values() if entry["difference"]]
    if not shown:
        return None
    fig, axes = new_figure(1, 1, 6.0, 0.7 + 0.26 * len(shown))
    ax = axes[0, 0]
    for y, entry in enumerate(shown):
        value = entry["difference"]
        if value["low"] is not None:
            ax.plot([100 * value["low"], 100 * value["high"]], [y, y], color="black", lw=1.2, zorder=2)
        ax.plot([100 * value["mean"]], [y], "D", color="black", ms=4.5, zorder=3)
        seeds = [100 * d for d in value["by_seed"].values()]
        ax.plot(seeds, [y] * len(seeds), "o", color=ACCENT, ms=3.5, alpha=0.8, lw=0, zorder=4)
    ax.axvline(0, color=GREY, lw=0.8, ls="--", zorder=1)
    ax.set(yticks=range(len(shown)), yticklabels=[entry["name"] for entry in shown], ylim=(len(shown) - 0.4, -0.6))
    ax.set_xlabel("test accuracy minus coarse (matched budget), points\nmean, 95 % interval; orange: single seeds")
    return fig
