"""Lay the numbers of a report out as tables: cells are strings, a table is (header, rows), written as Markdown or TeX.

Numbers become cells here and nowhere else. A value that does not exist is the cell `MISSING`.
"""

MISSING = "—"
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": r"$-$", "α": r"$\alpha$", "—": "--",
    "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def with_spread(value: dict, scale: float = 1.0, decimals: int = 2) -> str:
    """`97.22 ± 0.31` from {"mean", "std", "n"}; without ± where one seed gives no std."""
    if value["mean"] is None:
        return MISSING
    mean = number(value["mean"] * scale, decimals)
    return mean if value["std"] is None else f"{mean} ± {number(value['std'] * scale, decimals)}"


def number(value: float | None, decimals: int = 2, sign: bool = False) -> str:
    """Fixed decimals with thousands separated and a true minus sign; never `-0.00`."""
    if value is None:
        return MISSING
    value = round(value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:{'+' if sign and value else ''},.{decimals}f}".replace("-", "−")


def interval(value: dict | None) -> str:
    """`+0.28 [−1.20, +1.75]` in percentage points from metrics.paired_interval; without brackets below two pairs."""
    if value is None:
        return MISSING
    mean = number(value["mean"] * 100, sign=True)
    if value["low"] is None:
        return mean
    return f"{mean} [{number(value['low'] * 100, sign=True)}, {number(value['high'] * 100, sign=True)}]"


def learner_table(learners: dict[str, dict], worst: str) -> tuple[list[str], list[list[str]]]:
    """The main table; `worst` is the metric of its worst-group column, `test_worst_{subclass,discovered}_accuracy`."""
    group = "fine class" if worst == "test_worst_subclass_accuracy" else "discovered class"
    header = ["learner", "test accuracy, %", "balanced accuracy, %", f"worst {group}, %",
              "difference from matched, points [95 %]", "gain recovered, %", "images seen", "n"]  # fmt: skip
    rows = []
    for entry in learners.values():
        gain = entry["gain_recovered"]
        rows.append([
            entry["name"],
            *(with_spread(entry[m], 100) for m in ("test_accuracy", "test_balanced_accuracy", worst)),
            interval(entry["difference"]),
            number(gain * 100 if gain is not None else None, 0),
            number(entry["images_seen"]["mean"], 0),
            str(entry["test_accuracy"]["n"]),
        ])  # fmt: skip
    return header, rows


def cluster_table(clusters: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Cluster quality, one row a labels source."""
    scores = {"ARI": "ari", "ARI in class": "ari_in_class", "NMI": "nmi", "AMI": "ami", "Hungarian": "hungarian",
              "purity": "purity", "ARI, all rows": "ari_all"}  # fmt: skip
    inner = {"silhouette": "silhouette", "DBCV": "dbcv", "stability": "stability"}
    header = ["labels", "fine classes", "labelled rows", *scores, "noise, %", *inner, "n"]
    rows = []
    for source, entry in clusters.items():
        rows.append([
            source,
            with_spread(entry["n_fine"], decimals=1),
            number(entry["n_labelled"]["mean"], 0),
            *(with_spread(entry[name], decimals=3) for name in scores.values()),
            with_spread(entry["noise_fraction"], 100, 1),
            *(with_spread(entry[name], decimals=3) for name in inner.values()),
            str(entry["n_fine"]["n"]),
        ])  # fmt: skip
    return header, rows


def seconds_table(seconds: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """Mean seconds of every stage and their sum."""
    rows = [[folder, number(mean, 1)] for folder, mean in seconds.items()]
    return ["stage", "seconds"], [*rows, ["all stages of one seed", number(sum(seconds.values()), 1)]]


def to_markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, columns padded so that it reads well as plain text too; the first column is left-aligned."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in escaped)) for i in range(len(header))]

    def line(row):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * w) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(escaped[0]), line(rule), *map(line, escaped[1:])]) + "\n"


def latex_escape(text: str) -> str:
    """Text with LaTeX's special characters made harmless."""
    return "".join(LATEX.get(character, character) for character in text)


def to_latex(header: list[str], rows: list[list[str]], caption: str, label: str) -> str:
    """A booktabs `table` environment; needs the packages booktabs and graphicx."""

    def line(row):
        return "    " + " & ".join(map(latex_escape, row)) + r" \\"

    return "\n".join([
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex_escape(caption)}}}",
        rf"  \label{{tab:{label}}}",
        r"  \resizebox{\linewidth}{!}{%",
        rf"  \begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"    \toprule",
        line(header),
        r"    \midrule",
        *map(line, rows),
        r"    \bottomrule",
        r"  \end{tabular}}",
        r"\end{table}",
        "",
    ])  # fmt: skip
