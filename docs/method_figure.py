"""Draw the figure of the method: docs/method.png and docs/method.pdf.

usage   python docs/method_figure.py      (seconds; the digits in it are scikit-learn's, the points are drawn at random)
"""

from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 9.0, 5.3  # inches, which are also the units of every position below
INK, GREY, PALE, ACCENT = "#1a1a1a", "#707070", "#f2f2f2", "#0072B2"
ROUND, STRAIGHT = (0, 6, 8), (1, 4, 7)


def main():
    import matplotlib
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = {d: typical(digits.images[digits.target == d]) for d in ROUND + STRAIGHT}
    with matplotlib.rc_context({"font.size": 8.5, "pdf.fonttype": 42, "font.family": "DejaVu Sans"}):
        fig = Figure(figsize=(WIDTH, HEIGHT))
        ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
        ax.axis("off")
        draw_images(ax, images)
        draw_network(ax)
        draw_filter(ax, images[6][1])
        draw_clustering(ax)
        draw_controls(ax)
        draw_hand_over(ax, images)
        draw_learners(ax)
        draw_comparison(ax)
        folder = Path(__file__).parent
        fig.savefig(folder / "method.png", dpi=200, metadata={"Software": None})
        fig.savefig(folder / "method.pdf", metadata={"CreationDate": None})


def typical(images):
    """The images nearest to the mean of all, nearest first."""
    return images[np.argsort(((images - images.mean(axis=0)) ** 2).sum(axis=(1, 2)))]


# Pieces


def box(ax, x, y, width, height, face="white", edge=INK, **style):
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.06"
    ax.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=face, ec=edge, lw=style.pop("lw", 0.9), **style))


def arrow(ax, start, end, colour=INK, **style):
    from matplotlib.patches import FancyArrowPatch

    look = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, **style}
    ax.add_patch(FancyArrowPatch(start, end, color=colour, **look))


def text(ax, x, y, words, **style):
    return ax.text(x, y, words, **{"ha": "center", "va": "center", "color": INK, **style})


def title(ax, x, words, script, y=5.08):
    text(ax, x, y, words, weight="bold", fontsize=9)
    text(ax, x, y - 0.19, script, family="DejaVu Sans Mono", fontsize=6.8, color=GREY)


def thumbnail(ax, image, x, y, size, edge=GREY):
    from matplotlib.patches import Rectangle

    ax.imshow(image, cmap="gray_r", extent=(x, x + size, y, y + size), interpolation="nearest", zorder=3, aspect="auto")
    ax.add_patch(Rectangle((x, y), size, size, fill=False, ec=edge, lw=0.6, zorder=4))


def blobs(centres, n, spread, seed):
    """(n, 2) points around each centre, drawn from `seed`."""
    rng = np.random.default_rng(seed)
    return [np.asarray(centre) + rng.normal(0, spread, (n, 2)) for centre in centres]


# Discover


def draw_images(ax, images):
    title(ax, 0.85, "images, labels y", "configs/*.yaml")
    for y, name, digits in ((4.08, "round", ROUND), (3.34, "straight", STRAIGHT)):
        for i, digit in enumerate((*digits, digits[0])):
            thumbnail(ax, images[digit][4 * i], 0.16 + 0.35 * i, y, 0.33)
        text(ax, 0.85, y + 0.45, f"“{name}”")
    arrow(ax, (1.66, 3.95), (1.98, 3.95))


def draw_network(ax):
    from matplotlib.patches import Polygon

    title(ax, 2.45, "coarse network", "train_coarse.py")
    ax.add_patch(Polygon([(2.05, 3.4), (2.05, 4.5), (2.85, 4.25), (2.85, 3.65)], fc=PALE, ec=INK, lw=0.9))
    text(ax, 2.45, 3.95, "ResNet18")
    text(ax, 2.45, 3.26, "features, (N, 512)", fontsize=7.5, color=GREY)
    arrow(ax, (2.9, 3.95), (3.22, 3.95))


def draw_filter(ax, image):
    title(ax, 4.02, "uncertainty filter", "uncertainty_filter.py")
    for i, view in enumerate((image, np.roll(image[:, ::-1], 1, 0), np.roll(image, 1, 1), image[::-1])):
        thumbnail(ax, view, 3.32 + 0.36 * i, 4.2, 0.33)
    text(ax, 4.02, 4.66, "V augmented views", fontsize=7.5, color=GREY)
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.gamma(1.6, 0.15, 4000), rng.normal(1.55, 0.15, 180)])
    counts, edges = np.histogram(scores, 26, (0, 2))
    left, bottom, width = 3.32, 3.52, 1.4
    for count, edge in zip(np.sqrt(counts / counts.max()), edges[:-1], strict=True):
        colour = INK if edge < 0.6 else "#c4c4c4"
        ax.bar(left + edge / 2 * width, 0.5 * count, width / 26 * 0.85, bottom, align="edge", color=colour)
    ax.plot([left, left + width], [bottom, bottom], color=INK, lw=0.8)
    cut = left + 8 / 26 * width
    ax.plot([cut, cut], [bottom, bottom + 0.55], color=ACCENT, lw=1.3)
    text(ax, left + 0.2, 3.4, "keep", fontsize=7.5)
    text(ax, left + 0.95, 3.4, "drop", fontsize=7.5, color=GREY)
    text(ax, 4.02, 3.22, "uncertainty, by coarse class", fontsize=7.5, color=GREY)
    arrow(ax, (4.82, 3.95), (5.14, 3.95))


def draw_clustering(ax):
    title(ax, 6.2, "UMAP + HDBSCAN by class", "extract_features.py  cluster_fine.py")
    looks = [{"fc": ACCENT, "marker": "o"}, {"fc": INK, "marker": "^"}, {"fc": "white", "marker": "s"}]
    panels = ((5.22, "round", 1, [(0.27, 0.78), (0.7, 0.62), (0.33, 0.27)]),
              (6.25, "straight", 2, [(0.7, 0.8), (0.25, 0.58), (0.68, 0.27)]))  # fmt: skip
    for x, name, seed, centres in panels:
        box(ax, x, 3.4, 0.95, 1.1, face=PALE, edge="none")
        for points, look in zip(blobs(centres, 18, 0.07, seed), looks, strict=True):
            at = points * (0.95, 1.1) + (x, 3.4)
            ax.scatter(*at.T, s=9, ec=INK, lw=0.5, zorder=3, **look)
        text(ax, x + 0.475, 4.6, f"“{name}”")
        text(ax, x + 0.475, 3.26, "3 found", fontsize=7.5, color=GREY)
    arrow(ax, (6.2, 3.14), (6.2, 2.78), ACCENT)


def draw_controls(ax):
    title(ax, 8.12, "controls", "cluster_fine.py")
    words = (
        (4.02, "oracle", "the true fine classes:\nupper bound"),
        (3.3, "random", "same groups, rows\nshuffled: chance"),
    )
    for y, name, meaning in words:
        box(ax, 7.4, y, 1.44, 0.58)
        text(ax, 8.12, y + 0.46, name, weight="bold", fontsize=8)
        text(ax, 8.12, y + 0.2, meaning, fontsize=7, color=GREY, linespacing=1.05)
    arrow(ax, (8.12, 3.24), (8.12, 2.78), GREY)


def draw_hand_over(ax, images):
    """The bar in the middle: what discoverers write and learners read."""
    box(ax, 0.16, 2.16, 8.68, 0.58, face="#e8f1f8", edge=ACCENT, lw=1.1)
    text(ax, 0.98, 2.53, "pseudo labels z", weight="bold", fontsize=9)
    text(ax, 0.98, 2.32, "labels/<source>/", family="DejaVu Sans Mono", fontsize=6.8, color=GREY)
    names = [*(f"round/{k}" for k in (1, 2, 3)), *(f"straight/{k}" for k in (1, 2, 3))]
    for i, (digit, name) in enumerate(zip(ROUND + STRAIGHT, names, strict=True)):
        left = 2.02 + 1.13 * i
        for j in range(3):
            thumbnail(ax, images[digit][4 * j], left + 0.29 * j, 2.4, 0.27)
        text(ax, left + 0.425, 2.28, name, fontsize=7)


# Use


def network(ax, x, y, height=0.54):
    """A backbone: a trapezoid whose left side's middle is at (x, y), 0.42 wide."""
    from matplotlib.patches import Polygon

    tall, low = height / 2, height / 3.6
    ax.add_patch(
        Polygon([(x, y - tall), (x, y + tall), (x + 0.42, y + low), (x + 0.42, y - low)], fc=PALE, ec=INK, lw=0.9)
    )


def head(ax, x, y, words, colour):
    box(ax, x, y - 0.12, 0.52, 0.24, edge=colour)
    text(ax, x + 0.26, y, words, fontsize=7.5, color=colour)


def draw_learners(ax):
    box(ax, 0.16, 0.14, 6.04, 1.72, face="none")
    for x in (1.92, 4.2):
        ax.plot([x, x], [0.28, 1.72], color="#bbbbbb", lw=0.7)
    draw_baseline(ax, 1.04)
    draw_finetune(ax, 3.06)
    draw_multihead(ax, 5.2)
    for x in (3.06, 5.2):
        arrow(ax, (x, 2.13), (x, 1.88), ACCENT)
    arrow(ax, (6.24, 0.98), (6.58, 0.98))


def draw_baseline(ax, x):
    title(ax, x, "matched baseline", "train_coarse.py", y=1.7)
    network(ax, x - 0.62, 0.98)
    arrow(ax, (x - 0.17, 0.98), (x + 0.08, 0.98))
    head(ax, x + 0.1, 0.98, "coarse", INK)
    text(ax, x, 0.36, "coarse labels alone, for as\nmany images as FN sees", fontsize=7.5, color=GREY)


def draw_finetune(ax, x):
    title(ax, x, "FN: fine, then coarse", "finetune.py", y=1.7)
    for step, y, words, colour in (("1", 1.2, "fine", ACCENT), ("2", 0.76, "coarse", INK)):
        network(ax, x - 0.62, y, 0.34)
        text(ax, x - 0.44, y, step, fontsize=7.5)
        arrow(ax, (x - 0.17, y), (x + 0.08, y), colour)
        head(ax, x + 0.1, y, words, colour)
    arrow(ax, (x - 0.44, 1.05), (x - 0.44, 0.9), mutation_scale=7)
    text(ax, x - 0.62, 0.98, "weights", fontsize=6.5, color=GREY, ha="right")
    text(ax, x, 0.36, "train on z, keep the weights,\nthen train on y", fontsize=7.5, color=GREY)


def draw_multihead(ax, x):
    title(ax, x, "MH: both at once", "multihead.py", y=1.7)
    network(ax, x - 0.68, 0.98)
    arrow(ax, (x - 0.23, 1.03), (x + 0.1, 1.17))
    arrow(ax, (x - 0.23, 0.93), (x + 0.1, 0.79), ACCENT)
    head(ax, x + 0.13, 1.18, "coarse", INK)
    head(ax, x + 0.13, 0.78, "fine", ACCENT)
    text(ax, x, 0.36, "α CE(coarse)\n+ (1 − α) CE(fine)", fontsize=7.5, color=GREY)


def draw_comparison(ax):
    title(ax, 7.73, "fair comparison", "reproduce.py  report.py", y=1.7)
    box(ax, 6.62, 0.14, 2.22, 1.72, face="none", edge=INK)
    line = 1.0
    ax.plot([6.82, 8.64], [line, line], color=INK, lw=0.9)
    for x, name in ((7.1, "matched"), (8.4, "oracle")):
        ax.plot([x, x], [line - 0.07, line + 0.07], color=INK, lw=1.1)
        text(ax, x, line - 0.18, name, fontsize=7.5)
    ax.plot([7.5, 8.05], [line, line], color=ACCENT, lw=2.6, solid_capstyle="round")
    ax.plot([7.78], [line], "D", color=ACCENT, ms=5)
    text(ax, 7.78, line + 0.2, "FN or MH", fontsize=7.5, color=ACCENT)
    ax.plot([7.02], [line], "D", color=GREY, mfc="white", ms=5)
    text(ax, 7.02, line + 0.2, "random", fontsize=7.5, color=GREY)
    text(ax, 7.73, 0.36, "paired by seed, 95 % interval;\nshare of the oracle's gain", fontsize=7.5, color=GREY)


if __name__ == "__main__":
    main()
