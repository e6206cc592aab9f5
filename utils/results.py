"""Read every finished run of a data set from disk and put the numbers of its seeds together.

A run is `runs/<name>/seed<seed>/`; a stage folder in it counts as finished once it has its manifest.json. A learner is
any finished folder whose metrics.json has "stage" and "test", whatever its name, so that a new one needs no code here.
"""

import dataclasses
import json
from itertools import combinations
from pathlib import Path

import numpy as np

from utils.artifacts import load_array, load_json
from utils.config import Config, flatten

COARSE, MATCHED = "coarse", "coarse_matched"
CONTROLS = ("random", "oracle")  # cluster methods that discover nothing, in the order of the tables
# name in summary.json -> where it stands in a learner's metrics.json
LEARNER_METRICS = {
    "test_accuracy": ("test", "accuracy"),
    "test_balanced_accuracy": ("test", "balanced_accuracy"),
    "test_worst_subclass_accuracy": ("test", "worst_subclass_accuracy"),
    "test_worst_discovered_accuracy": ("test", "worst_discovered_accuracy"),
    "val_accuracy": ("val", "accuracy"),
    "images_seen": ("images_seen",),
}
CLUSTER_METRICS = ("ari", "nmi", "ami", "hungarian", "purity")
STAGE_ORDER = (COARSE, "features", "uncertainty", "labels", "finetune", "multihead", MATCHED)


def read_history(path: Path) -> list[dict]:
    """The lines of a history.jsonl, one an epoch; [] where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def collect_runs(dataset_dir: Path) -> list[dict]:
    """Every seed folder below `dataset_dir` with at least one finished stage, ordered by seed.

    Each run is {"seed": int, "dir": Path, "manifests": {folder: manifest}, "learners": {folder: metrics},
    "labels": {source: {"clusters": clusters.json, "metrics": metrics.json}}}; folders are relative (`finetune/oracle`).
    """
    seed_dirs = {int(d.name[4:]): d for d in Path(dataset_dir).glob("seed*") if d.name[4:].isdecimal()}
    runs = [collect_run(seed, seed_dirs[seed]) for seed in sorted(seed_dirs)]
    return [run for run in runs if run["manifests"]]


def collect_run(seed: int, run_dir: Path) -> dict:
    folders = {path.parent.relative_to(run_dir).as_posix(): path for path in sorted(run_dir.rglob("manifest.json"))}
    run = {"seed": seed, "dir": run_dir, "manifests": {f: load_json(path) for f, path in folders.items()}}
    metrics = {f: load_json(run_dir / f / "metrics.json") for f in folders if (run_dir / f / "metrics.json").is_file()}
    run["learners"] = {f: m for f, m in metrics.items() if "stage" in m and "test" in m}
    run["labels"] = {
        f.removeprefix("labels/"): {"clusters": load_json(run_dir / f / "clusters.json"), "metrics": metrics.get(f, {})}
        for f in folders
        if f.startswith("labels/") and (run_dir / f / "clusters.json").is_file()
    }
    return run


def source_methods(runs: list[dict]) -> dict[str, str]:
    """{labels source: the cluster.method that made it}; without its clusters.json a source's name is taken for it."""
    methods = {m["labels"]: m["labels"] for run in runs for m in run["learners"].values() if m.get("labels")}
    return methods | {s: entry["clusters"]["method"] for run in runs for s, entry in run["labels"].items()}


def order_sources(methods: dict[str, str], first: list[str] = ()) -> list[str]:
    """Discovered labels, then the random control, then the oracle; inside each as in `first`, then by name."""

    def rank(source):
        control = CONTROLS.index(methods[source]) + 1 if methods[source] in CONTROLS else 0
        return control, list(first).index(source) if source in first else len(first), source

    return sorted(methods, key=rank)


def learner_kind(key: str, labels: str | None) -> str:
    """The folder with `*` for its labels (`multihead/*-alpha0.9`): one learner has one kind, whatever its labels."""
    stage, _, tail = key.partition("/")
    return f"{stage}/*{tail[len(labels) :]}" if labels and tail.startswith(labels) else key


def learner_words(key: str, labels: str | None) -> str:
    """What tables call the learner, without its labels: `FN`, `MH alpha=0.9`, `coarse (matched budget)`."""
    if key == MATCHED:
        return "coarse (matched budget)"
    stage, starred, rest = learner_kind(key, labels).partition("/*")
    return (
        {"finetune": "FN", "multihead": "MH"}.get(stage, stage) + rest.replace("-alpha", " alpha=") if starred else key
    )


def by_seed(runs: list[dict], key: str, metric: str) -> dict[int, float]:
    """{seed: value} of one learner's metric, for the seeds that have one."""
    values = {}
    for run in runs:
        value = run["learners"].get(key)
        for part in LEARNER_METRICS[metric]:
            value = (value or {}).get(part)
        if value is not None:
            values[run["seed"]] = value
    return values


def spread(values) -> dict:
    """{"mean", "std", "n"} of the values that are not None; std is the sample's (n - 1) and None below two values."""
    values = np.array([v for v in values if v is not None], float)
    mean = float(values.mean()) if len(values) else None
    return {"mean": mean, "std": float(values.std(ddof=1)) if len(values) > 1 else None, "n": len(values)}


def difference(values: dict[int, float], baseline: dict[int, float]) -> dict | None:
    """metrics.paired_interval of values - baseline over the seeds in both, plus "by_seed"; None where no seed is.

    With a single pair std, low and high are None: one difference says nothing about its spread.
    """
    from utils.metrics import paired_interval

    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [values[s] - baseline[s] for s in seeds]
    pairs = {str(s): float(d) for s, d in zip(seeds, differences, strict=True)}
    return {**paired_interval(np.array(differences)), "by_seed": pairs}


def recovered(method: dict, matched: dict, oracle: dict) -> float | None:
    """metrics.gain_recovered of the means over the seeds that all three have; None where there is none."""
    from utils.metrics import gain_recovered

    seeds = sorted(method.keys() & matched.keys() & oracle.keys())
    if not seeds:
        return None
    return gain_recovered(*(float(np.mean([values[s] for s in seeds])) for values in (method, matched, oracle)))


def same_budget(images: dict, others: dict) -> bool:
    """Whether two spreads of images seen have means within 5 % of each other."""
    return bool(images["n"] and others["n"]) and abs(images["mean"] / others["mean"] - 1) <= 0.05


def summarize_learners(runs: list[dict], first: list[str] = ()) -> dict[str, dict]:
    """One entry a learner, in the order of the tables: coarse, matched, other unlabelled ones, then by labels source.

    An entry holds every metric's {"mean", "std", "n"} (fractions, not percent) and, on test accuracy, the paired
    `difference` from coarse_matched, `difference_from_coarse` (for learners that saw as many images as plain coarse
    training did, to 5 %), `difference_from_random` (the same learner on the random control's labels) and
    `gain_recovered` (the oracle is the same learner on the oracle's labels).
    """
    methods = source_methods(runs)
    sources = order_sources(methods, first)
    labels_of = {key: metrics.get("labels") for run in runs for key, metrics in run["learners"].items()}
    accuracy = {key: by_seed(runs, key, "test_accuracy") for key in labels_of}

    def rank(key):
        if labels_of[key]:
            return 3, sources.index(labels_of[key]), key
        return [COARSE, MATCHED, key].index(key), 0, key

    def same_on(key, control):
        # The same learner's accuracies on a control's labels; {} on the control itself.
        kind = learner_kind(key, labels_of[key])
        twins = [
            k
            for k in sorted(labels_of, key=rank)
            if methods.get(labels_of[k]) == control and learner_kind(k, labels_of[k]) == kind
        ]
        return accuracy[twins[0]] if twins and methods.get(labels_of[key]) != control and "*" in kind else {}

    learners = {}
    for key in sorted(labels_of, key=rank):
        labels, words = labels_of[key], learner_words(key, labels_of[key])
        entry = {"name": f"{words} ({labels})" if labels else words, "learner": words, "labels": labels}
        entry["method"] = methods.get(labels)
        entry["seeds"] = [run["seed"] for run in runs if key in run["learners"]]
        entry |= {metric: spread(by_seed(runs, key, metric).values()) for metric in LEARNER_METRICS}
        matched = {} if key == MATCHED else accuracy.get(MATCHED, {})
        entry["difference"] = difference(accuracy[key], matched)
        entry["difference_from_coarse"] = None
        if labels and same_budget(entry["images_seen"], spread(by_seed(runs, COARSE, "images_seen").values())):
            entry["difference_from_coarse"] = difference(accuracy[key], accuracy[COARSE])
        entry["difference_from_random"] = difference(accuracy[key], same_on(key, "random"))
        entry["gain_recovered"] = recovered(accuracy[key], matched, same_on(key, "oracle"))
        learners[key] = entry
    return learners


def summarize_clusters(runs: list[dict], first: list[str] = ()) -> dict[str, dict]:
    """One entry a labels source, ordered as the learners: {"mean", "std", "n"} over seeds of sizes and scores.

    `ari_all` is over all training rows, the other scores against truth over the kept ones; `ari_in_class` is the mean
    over coarse classes of the ARI inside each, silhouette and DBCV likewise; stability is over pairs of seeds.
    """
    methods = source_methods([{**run, "learners": {}} for run in runs])
    return {
        source: {"method": methods[source], **cluster_entry(runs, source)} for source in order_sources(methods, first)
    }


def cluster_entry(runs: list[dict], source: str) -> dict:
    entries = [run["labels"][source] for run in runs if source in run["labels"]]
    clusters, scores = [e["clusters"] for e in entries], [e["metrics"] for e in entries]
    summary = {name: spread(c.get(name) for c in clusters) for name in ("n_fine", "n_labelled", "noise_fraction")}
    for name in CLUSTER_METRICS:
        summary[name] = spread((s.get("kept") or {}).get(name) for s in scores)
    summary["ari_in_class"] = spread(mean_or_none(class_scores(s, "ari")) for s in scores)
    summary["ari_all"] = spread((s.get("all") or {}).get("ari") for s in scores)
    for name in ("silhouette", "dbcv"):
        summary[name] = spread(
            mean_or_none(c.get(name) for c in clusters_of["classes"].values()) for clusters_of in clusters
        )
    summary["stability"] = spread(seed_stability(runs, source))
    return summary


def class_scores(scores: dict, name: str) -> list:
    return [(quality or {}).get(name) for quality in scores.get("per_class", {}).values()]


def mean_or_none(values) -> float | None:
    return spread(values)["mean"]


def seed_stability(runs: list[dict], source: str) -> list[float | None]:
    """metrics.stability of the pseudo labels of every pair of seeds, over the rows that both label."""
    from utils.metrics import stability

    paths = [run["dir"] / "labels" / source / "labels.npy" for run in runs if source in run["labels"]]
    labels = [load_array(path) for path in paths if path.is_file()]
    return [stability(a, b) for a, b in combinations(labels, 2) if len(a) == len(b)]


def stage_seconds(runs: list[dict]) -> dict[str, float]:
    """{stage folder: mean seconds over the seeds that finished it}, in the order of the pipeline."""

    def rank(folder):
        stage = folder.split("/")[0]
        return STAGE_ORDER.index(stage) if stage in STAGE_ORDER else len(STAGE_ORDER), folder

    folders = sorted({folder for run in runs for folder in run["manifests"]}, key=rank)
    means = {f: mean_or_none(run["manifests"].get(f, {}).get("seconds") for run in runs) for f in folders}
    return {folder: mean for folder, mean in means.items() if mean is not None}


def provenance(runs: list[dict]) -> dict:
    """Which code, libraries, devices and seeds made the runs; each value once, sorted."""
    manifests = [m for run in runs for m in run["manifests"].values()]
    versions = {}
    for manifest in manifests:
        for library, version in (manifest.get("versions") or {}).items():
            versions.setdefault(library, set()).add(str(version))

    def distinct(*keys):
        values = [m.get(keys[0]) if len(keys) == 1 else (m.get(keys[0]) or {}).get(keys[1]) for m in manifests]
        return sorted({str(v) for v in values if v is not None})

    def of_learners(key):
        made = [m for run in runs for folder, m in run["manifests"].items() if folder in run["learners"]]
        return {str(m[key]) for m in made if m.get(key)}

    return {
        "commits": distinct("code", "commit"),
        "dirty": any((m.get("code") or {}).get("dirty") for m in manifests),
        "versions": {library: ", ".join(sorted(found)) for library, found in sorted(versions.items())},
        "device": ", ".join(distinct("device")),
        "precision": ", ".join(distinct("precision")),
        **{f"learners_{key}": sorted(of_learners(key)) for key in ("device", "precision")},
        "data_signatures": distinct("data_signature"),
        "seeds": [run["seed"] for run in runs],
    }


def setting_differences(runs: list[dict]) -> dict[str, list[str]]:
    """{stage folder: the dotted settings, other than the seed, in which its seeds' manifests differ}."""
    found = {}
    for folder in sorted({folder for run in runs for folder in run["manifests"]}):
        settings = [run["manifests"][folder].get("settings") or {} for run in runs if folder in run["manifests"]]
        keys = sorted({key for s in settings for key in s} - {"seed", "seeds"})
        differing = [key for key in keys if len({json.dumps(s.get(key), sort_keys=True) for s in settings}) > 1]
        if differing:
            found[folder] = differing
    return found


SET_BY_JOB = {  # a configuration has one value of these, the stages of a run have several
    "seed", "coarse.match", "features.source", "cluster.method", "cluster.source", "cluster.random_of",
    "finetune.labels", "multihead.labels", "multihead.alpha",
}  # fmt: skip


def other_settings(runs: list[dict], cfg: Config) -> dict[str, str]:
    """{dotted setting: values that stages on disk were made with}, where one is not this configuration's."""
    now = flatten(dataclasses.asdict(cfg))
    found = {}
    for manifest in (m for run in runs for m in run["manifests"].values()):
        for key, value in (manifest.get("settings") or {}).items():
            if key not in SET_BY_JOB and value != now.get(key):
                found.setdefault(key, set()).add(str(value))
    return {key: ", ".join(sorted(values)) for key, values in sorted(found.items())}


def stale_inputs(run: dict) -> list[tuple[str, str]]:
    """(stage folder, input file) wherever a stage read another version of the file than its producer has now."""
    outputs = {
        f"{folder}/{name}": info.get("sha256")
        for folder, manifest in run["manifests"].items()
        for name, info in (manifest.get("outputs") or {}).items()
    }
    return [
        (folder, path)
        for folder, manifest in run["manifests"].items()
        for path, sha256 in (manifest.get("inputs") or {}).items()
        if outputs.get(path, sha256) != sha256
    ]
