"""Put every finished run of a data set into tables and figures.

reads   runs/<name>/seed*/      whatever stages have finished there, of all seeds found
writes  runs/<name>/report/     table.md .tex .csv, runs.csv, summary.json, figures/ (PNG and PDF)
usage   python report.py --config configs/digits.yaml      (seconds; the tables need no data set, the galleries do)
"""

import shlex
import sys
from pathlib import Path

import numpy as np

from utils import distributed, results, tables
from utils.artifacts import load_array, load_json, save_csv, save_json, save_text
from utils.config import Config, UserError, command_line, parse_config

MIN_SEEDS = 3  # for a verdict: two differences may agree by chance, and their interval is then of no width
WORST_TRUE, WORST_FOUND = "test_worst_subclass_accuracy", "test_worst_discovered_accuracy"


@command_line
def main(argv=None):
    distributed.refuse("report.py", "it is one process's work")
    cfg = parse_config(__doc__, argv)
    runs = results.collect_runs(cfg.dataset_dir)
    if not runs:
        raise UserError(f"{cfg.dataset_dir}: no finished stage of any seed; run `{cfg.command('reproduce.py')}` first")
    dataset, problem = try_load_dataset(cfg, results.provenance(runs)["data_signatures"])
    has_truth = knows_truth(runs, dataset)
    if not has_truth:
        score_discovered_groups(runs, dataset, cfg.reproduce.labels)
    summary = summarize(cfg, runs)
    notes = [*missing_notes(cfg, runs, summary, has_truth), *reading_notes(summary), *warning_notes(cfg, runs, summary)]

    report_dir = cfg.dataset_dir / "report"
    figures, figure_notes = write_figures(report_dir / "figures", cfg, runs, summary, dataset)
    notes += (
        [f"{problem} So there is no image gallery and no figure by true class."] if problem else []
    ) + figure_notes
    markdown = write_tables(report_dir, cfg, runs, summary, notes, WORST_TRUE if has_truth else WORST_FOUND)
    print(markdown)
    print(
        f"{report_dir}: table.md, table.tex, table.csv, runs.csv, summary.json, {len(figures)} figures as PNG and PDF"
    )


def try_load_dataset(cfg: Config, signatures: list[str]):
    """(data set, "") or (None, why it cannot be used): the report does without its images if it must.

    signatures: of the data that the runs read; other data would put the wrong images into the galleries.
    """
    from utils.data import load_dataset

    try:
        dataset = load_dataset(cfg.data, cache_dir=cfg.dataset_dir / "cache")
        if signatures and dataset.signature not in signatures:
            return None, "The data set's files have changed since the runs were made."
        return dataset, ""
    except (UserError, OSError) as error:
        print(f"report.py: going on without the data set: {error}", file=sys.stderr)
        return None, f"The data set could not be loaded ({error})."


def knows_truth(runs: list[dict], dataset) -> bool:
    """True where true fine classes are known: to the data set, or to any score on disk."""
    scores = [learner["test"].get("worst_subclass_accuracy") for run in runs for learner in run["learners"].values()]
    scores += [entry["metrics"].get("kept") for run in runs for entry in run["labels"].values()]
    return any(s is not None for s in scores) or (dataset is not None and dataset.train.fine_labels is not None)


def score_discovered_groups(runs: list[dict], dataset, first: list[str]) -> None:
    """Score every learner's worst group on the same discovered classes, in place: those of the seed's first source.

    metrics.json has the worst group of the labels that the learner itself used, which compares with no other learner's.
    Without the data set's test labels those numbers stay.
    """
    from utils.metrics import worst_group_accuracy

    methods = results.source_methods(runs)
    found = [s for s in results.order_sources(methods, first) if methods[s] not in results.CONTROLS]
    for run in runs if dataset is not None and found else []:
        groups_path = run["dir"] / "labels" / found[0] / "test_labels.npy"
        for key, metrics in run["learners"].items():
            preds_path = run["dir"] / key / "test_preds.npy"
            if groups_path.is_file() and preds_path.is_file():
                preds, groups = (load_array(path, rows=dataset.test.n) for path in (preds_path, groups_path))
                worst = worst_group_accuracy(dataset.test.coarse_labels, preds, groups)
                metrics["test"]["worst_discovered_accuracy"] = worst


def summarize(cfg: Config, runs: list[dict]) -> dict:
    """The content of summary.json."""
    return {
        "name": cfg.name,
        "learners": results.summarize_learners(runs, cfg.reproduce.labels),
        "clusters": results.summarize_clusters(runs, cfg.reproduce.labels),
        "seconds": results.stage_seconds(runs),
        "provenance": results.provenance(runs),
        "command": shlex.join(["python", *cfg.arguments("reproduce.py")]),
    }


# Words


def missing_notes(cfg: Config, runs: list[dict], summary: dict, has_truth: bool) -> list[str]:
    """What the tables lack and how to get it."""
    learners, seeds = summary["learners"], summary["provenance"]["seeds"]
    sources = [s for s in cfg.reproduce.labels if has_truth or s != "oracle"]
    expected = [results.COARSE, results.MATCHED]
    for source in sources:
        expected += [f"finetune/{source}", *(f"multihead/{source}-alpha{alpha:g}" for alpha in cfg.reproduce.alphas)]
    nowhere = [key for key in expected if key not in learners]
    partly = [f"{key} (seeds {join(entry['seeds'])})" for key, entry in learners.items() if entry["seeds"] != seeds]
    absent = [seed for seed in cfg.seeds if seed not in seeds]
    notes = []
    if nowhere:
        notes.append(f"Not finished in any seed: {join(nowhere)}.")
    if partly:
        notes.append(f"Not finished in every seed: {join(partly)}; their rows are over fewer seeds.")
    if absent:
        notes.append(f"No finished stage of seed {join(absent)}.")
    if notes:
        notes.append(f"`{summary['command']}` runs what is missing.")
    if results.MATCHED not in learners:
        notes.append("Without coarse_matched there is no budget-matched baseline: no differences, no gain recovered.")
    if not has_truth:
        notes.append(
            "No true fine classes are known: no oracle control, no gain recovered, no cluster scores against truth."
        )
    elif not any(entry["method"] == "oracle" for entry in learners.values()):
        notes.append("No learner on the oracle's labels yet: no gain recovered.")
    return notes


def reading_notes(summary: dict) -> list[str]:
    """How the main table is to be read: spread, verdicts against the baseline and the random control, budgets."""
    learners, n_seeds = summary["learners"], len(summary["provenance"]["seeds"])
    notes = verdicts(learners)
    if n_seeds == 1:
        notes.append("One seed only: it says nothing about spread, so there is no std and no interval.")
    else:
        notes.append("± is the sample standard deviation over n seeds; differences are paired by seed.")
    matched = learners.get(results.MATCHED, {}).get("images_seen", {"n": 0})
    unequal = dict.fromkeys(
        e["learner"]
        for e in learners.values()
        if matched["n"] and e["images_seen"]["n"] and not results.same_budget(e["images_seen"], matched)
    )
    if unequal:
        notes.append(f"Over 5 % more or fewer images seen than by the matched baseline: {join(unequal)}.")
    oracles = [e for e in learners.values() if e["method"] == "oracle" and e["difference"]]
    no_gain = [e["name"] for e in oracles if e["difference"]["mean"] <= 0]
    if no_gain:
        notes.append(f"{join(no_gain)}: no better than the matched baseline, so there is no gain to recover.")
    unsure = [e["name"] for e in oracles if e["difference"]["mean"] > 0 and (e["difference"]["low"] or 0) < 0]
    if unsure:
        notes.append(
            f"{join(unsure)}: the gain is not distinguishable from zero, so shares of it recovered mean little."
        )
    return notes


def verdicts(learners: dict[str, dict]) -> list[str]:
    """One sentence for each side on which the learners' 95 % intervals lie; a loss is said as plainly as a gain."""
    compared = {e["name"]: e["difference"] for e in learners.values() if e["difference"] and e["labels"]}
    notes = side_notes(compared, "the matched baseline")
    discovered = {
        e["name"]: e["difference_from_random"]
        for e in learners.values()
        if e["difference_from_random"] and e["method"] != "oracle"
    }
    notes += side_notes(discovered, "the same learner on random labels", show=True)
    same_budget = {e["name"]: e["difference_from_coarse"] for e in learners.values() if e["difference_from_coarse"]}
    notes += side_notes(same_budget, "coarse training with as many images seen", show=True)
    shown = [*compared.values(), *discovered.values(), *same_budget.values()]
    n_intervals = sum(d["n"] >= MIN_SEEDS for d in shown)
    if shown and not n_intervals:
        notes.append(f"Under {MIN_SEEDS} seeds there is no verdict on any difference, whatever its interval says.")
    if n_intervals > 1:
        notes.append(f"The {n_intervals} intervals are 95 % each and not corrected for multiple comparisons.")
    return notes


def side_notes(differences: dict[str, dict], baseline: str, show: bool = False) -> list[str]:
    sides = {"Above": [], "Below": [], "Not distinguishable from": []}
    for name, value in differences.items():
        if value["n"] >= MIN_SEEDS:
            side = "Above" if value["low"] > 0 else "Below" if value["high"] < 0 else "Not distinguishable from"
            sides[side].append(f"{name} {tables.interval(value)}" if show else name)
    return [f"{side} {baseline} (95 % interval of accuracy): {join(names)}." for side, names in sides.items() if names]


def warning_notes(cfg: Config, runs: list[dict], summary: dict) -> list[str]:
    """Whatever makes the seeds of one table unequal, and what the clustering complained about."""
    origin = summary["provenance"]
    notes = []
    if len(origin["commits"]) > 1:
        notes.append(f"WARNING: the runs were made by different commits: {join(c[:10] for c in origin['commits'])}.")
    if origin["dirty"]:
        notes.append("WARNING: some runs were made from a working tree with uncommitted changes.")
    if len(origin["data_signatures"]) > 1:
        notes.append("WARNING: the runs read differing data files.")
    for what in ("device", "precision"):
        if len(found := origin[f"learners_{what}"]) > 1:
            notes.append(f"WARNING: the learners were trained with differing {what}: {'; '.join(found)}.")
    for folder, keys in results.setting_differences(runs).items():
        notes.append(f"WARNING: {folder} was made with differing settings between seeds: {join(keys)}.")
    for key, values in results.other_settings(runs, cfg).items():
        notes.append(
            f"WARNING: made with {key} = {values}, not as this command's configuration says; give it that too."
        )
    for run in runs:
        for folder, path in results.stale_inputs(run):
            notes.append(
                f"WARNING: seed {run['seed']}: {folder} was made from another {path} than is there now; redo it."
            )
    for source in summary["clusters"]:
        counts = [
            len(run["labels"][source]["clusters"].get("warnings") or []) for run in runs if source in run["labels"]
        ]
        if any(counts):
            notes.append(f"Clustering warnings for {source}, all seeds: {sum(counts)}; its clusters.json has them.")
    return notes


def join(words) -> str:
    return ", ".join(map(str, words))


# Tables


def write_tables(report_dir: Path, cfg: Config, runs, summary: dict, notes: list[str], worst: str) -> str:
    """Write table.md, table.tex, table.csv, runs.csv and summary.json; returns the Markdown."""
    main_table = tables.learner_table(summary["learners"], worst)
    cluster_table = tables.cluster_table(summary["clusters"])
    seconds_table = tables.seconds_table(summary["seconds"])
    sections = [f"# {cfg.name}: coarse2fine results\n"]
    sections.append(tables.to_markdown(*main_table) if main_table[1] else "No learner has finished yet.\n")
    sections.append("".join(f"- {note}\n" for note in notes))
    if cluster_table[1]:
        sections += ["## Discovered classes\n", tables.to_markdown(*cluster_table), CLUSTER_WORDS]
    sections += ["## Seconds\n", tables.to_markdown(*seconds_table), "Mean over seeds.\n"]
    sections += ["## Provenance\n", "".join(f"- {line}\n" for line in provenance_lines(summary))]
    markdown = "\n".join(sections)
    floats = [
        (
            main_table,
            "test scores, mean ± std over n seeds; paired difference from budget-matched coarse training.",
            "main",
        ),
        (cluster_table, "discovered fine classes against the true ones, mean ± std over n seeds.", "clusters"),
        (seconds_table, "seconds by stage, mean over seeds.", "seconds"),
    ]
    tex = [tables.to_latex(*t, f"{cfg.name}: {words}", f"{cfg.name}-{kind}") for t, words, kind in floats if t[1]]
    save_text(report_dir / "table.md", markdown)
    save_text(report_dir / "table.tex", "\n".join(tex))
    save_csv(report_dir / "table.csv", *learner_csv(summary["learners"]))
    save_csv(report_dir / "runs.csv", *runs_csv(runs, summary["learners"]))
    save_json(report_dir / "summary.json", summary)
    return markdown


CLUSTER_WORDS = """\
Scores are over kept rows, rows without a label as a class of their own; `ARI, all rows` is over all training rows.
ARI, NMI, AMI, Hungarian, purity and stability take all coarse classes together, so the given coarse classes already
earn part of them: the random control's row is the floor. `ARI in class`, silhouette and DBCV are means over coarse
classes; stability is the mean ARI between two seeds over the rows that both label.
"""


def provenance_lines(summary: dict) -> list[str]:
    origin = summary["provenance"]
    commits = join(origin["commits"]) or "none recorded"
    return [
        f"seeds: {join(origin['seeds'])}",
        f"commit: {commits}{' with uncommitted changes' if origin['dirty'] else ''}",
        f"device: {origin['device'] or 'not recorded'}; precision: {origin['precision'] or 'not recorded'}",
        f"versions: {join(f'{library} {v}' for library, v in origin['versions'].items()) or 'not recorded'}",
        f"command: `{summary['command']}`",
    ]


def learner_csv(learners: dict[str, dict]) -> tuple[list[str], list[list]]:
    """One row a learner, fractions (not percent) at full precision; an empty cell where there is no value."""
    header = ["learner", "name", "labels"]
    header += [f"{metric}_{part}" for metric in results.LEARNER_METRICS for part in ("mean", "std", "n")]
    header += [f"difference_{part}" for part in ("mean", "std", "n", "low", "high")] + ["gain_recovered"]
    rows = []
    for key, entry in learners.items():
        values = [entry[metric][part] for metric in results.LEARNER_METRICS for part in ("mean", "std", "n")]
        values += [(entry["difference"] or {}).get(part) for part in ("mean", "std", "n", "low", "high")]
        rows.append([key, entry["name"], entry["labels"], *values, entry["gain_recovered"]])
    return header, rows


def runs_csv(runs: list[dict], learners: dict[str, dict]) -> tuple[list[str], list[list]]:
    """One row a learner and seed."""
    values = {
        metric: {key: results.by_seed(runs, key, metric) for key in learners} for metric in results.LEARNER_METRICS
    }
    rows = [
        [key, entry["labels"], seed, *(values[metric][key].get(seed) for metric in values)]
        for key, entry in learners.items()
        for seed in entry["seeds"]
    ]
    return ["learner", "labels", "seed", *values], rows


# Figures


def write_figures(figures_dir: Path, cfg: Config, runs, summary: dict, dataset) -> tuple[list[Path], list[str]]:
    """Curves and differences over all seeds, the rest for the first seed that has it.

    Returns (paths without suffix, notes).
    """
    from utils import figures

    histories = {
        key: [results.read_history(run["dir"] / key / "history.jsonl") for run in runs if key in run["learners"]]
        for key in summary["learners"]
    }
    with figures.style():
        made = {
            figures_dir / "curves": figures.curves_figure(histories, summary["learners"]),
            figures_dir / "differences": figures.differences_figure(summary["learners"]),
        }
        run = next((run for run in runs if run["labels"] or "uncertainty" in run["manifests"]), runs[0])
        seed_dir = figures_dir / f"seed{run['seed']}"
        notes = []
        if "uncertainty" in run["manifests"]:
            made[seed_dir / "uncertainty"] = uncertainty_figure(cfg, run, dataset)
        for source, entry in run["labels"].items():
            if entry["clusters"]["method"] not in results.CONTROLS:
                found = figures.load_found(run, source, dataset)
                made |= found_figures(seed_dir, source, found, dataset)
        if dataset is not None and dataset.train.is_vector and run["labels"]:
            notes.append("The data are vectors: no image gallery.")
        made = {path: fig for path, fig in made.items() if fig is not None}
        for path, fig in made.items():
            figures.save_figure(fig, path)
    return list(made), notes


def found_figures(seed_dir: Path, source: str, found: dict, dataset) -> dict:
    """{path: Figure} of one source: the embeddings, a page for four coarse classes, and a gallery a coarse class."""
    from utils import figures

    pages = figures.embedding_figures(found)
    names = ["embedding"] if len(pages) == 1 else [f"embedding_{i}" for i in range(1, len(pages) + 1)]
    made = {seed_dir / figures.file_name(name, source): page for name, page in zip(names, pages, strict=True)}
    if dataset is not None and not dataset.train.is_vector:
        for coarse_name in found["classes"]:
            path = seed_dir / figures.file_name("gallery", source, coarse_name)
            made[path] = figures.gallery_figure(found, coarse_name, dataset.train.inputs)
    return made


def uncertainty_figure(cfg: Config, run: dict, dataset):
    """The histogram over training rows; None where no file tells the rows' coarse classes."""
    from utils import figures
    from utils.splits import validation_mask

    source = next(iter(run["labels"]), None)
    if dataset is None and source is None:
        return None
    folder = run["dir"] / "uncertainty"
    metrics = load_json(folder / "metrics.json")
    n_rows = dataset.train.n if dataset else None
    scores, kept = (load_array(folder / name, rows=n_rows) for name in ("scores.npy", "kept.npy"))
    coarse = figures.row_classes(run["dir"] / f"labels/{source}/labels.csv", dataset)
    names = dataset.coarse_names if dataset else run["labels"][source]["clusters"]["classes"]
    # Validation rows are scored too, but never kept: they would all look dropped.
    index = {name: c for c, name in enumerate(names)}
    coarse_labels = np.array([index[name] for name in coarse.tolist()])
    is_train = ~validation_mask(coarse_labels, cfg.data.val_fraction, run["seed"])
    rows = [array[is_train] for array in (scores, kept, coarse)]
    return figures.uncertainty_figure(*rows, metrics["threshold"], metrics["score"])


if __name__ == "__main__":
    main()
