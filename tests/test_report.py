"""report.py on fabricated run folders: numbers worked by hand, partial runs, files that are whole and repeatable."""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest

import report
from utils import results, tables

N, N_TEST = 120, 24
COARSE_NAMES, FINE_NAMES = ["round 50%", "flat_ones"], ["a", "b", "c", "d"]
COARSE, FINE = np.arange(N) % 4 // 2, np.arange(N) % 4
T_95 = {1: 12.706204736432095, 2: 4.302652729911275}  # Student's t, 97.5 % quantile, by degrees of freedom


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_manifest(folder, seed, **changes):
    manifest = {
        "stage": folder.name, "settings": {"seed": seed, "train.batch_size": 8}, "config": {"seed": seed},
        "code": {"commit": "c" * 40, "dirty": False}, "versions": {"torch": "2.15.0"}, "device": "CPU, 2 cores",
        "precision": "fp32", "seed": seed, "inputs": {}, "outputs": {}, "seconds": 2.0 + seed,
    }  # fmt: skip
    write_json(folder / "manifest.json", manifest | changes)


def write_learner(run_dir, key, seed, accuracy, truth=True, images_seen=1000, **changes):
    stage = key.split("/")[0]
    labels = re.sub(r"-alpha.*", "", key.split("/")[1]) if "/" in key else None
    test = {
        "accuracy": accuracy, "balanced_accuracy": accuracy - 0.01,
        "worst_subclass_accuracy": accuracy - 0.1 if truth else None, "worst_discovered_accuracy": accuracy - 0.2,
    }  # fmt: skip
    metrics = {
        "stage": stage,
        "labels": labels,
        "seed": seed,
        "images_seen": images_seen,
        "val": {"accuracy": accuracy},
    }
    write_json(run_dir / key / "metrics.json", metrics | {"test": test} | changes)
    epochs = [{"epoch": e, "images_seen": 500 * e, "val_accuracy": accuracy - 0.1 / e} for e in (1, 2, 3)]
    (run_dir / key / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs))
    np.save(run_dir / key / "test_preds.npy", np.arange(N_TEST) % 4 // 2)
    write_manifest(run_dir / key, seed)


def write_labels(run_dir, source, seed, method=None, truth=True, dims=3):
    """Discovered classes that equal the true ones but for 4 unlabelled rows, at other ids."""
    folder, rng = run_dir / "labels" / source, np.random.default_rng(seed)
    folder.mkdir(parents=True)
    labels = FINE.copy()
    labels[seed * 4 : seed * 4 + 4] = -1
    embedding = (FINE[:, None] + rng.normal(0, 0.1, (N, dims))).astype(np.float32)
    embedding[:2] = np.nan
    names = [f"{COARSE_NAMES[z // 2]}/{z % 2 + 1}" for z in range(4)]
    arrays = {"labels": labels, "membership": rng.random(N).astype(np.float32), "embedding": embedding,
              "parents": np.array([0, 0, 1, 1]), "test_labels": np.arange(N_TEST) % 4}  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    classes = {
        c: {"n_rows": 60, "n_clusters": 2, "silhouette": 0.2 + 0.2 * i, "dbcv": None}
        for i, c in enumerate(COARSE_NAMES)
    }
    write_json(folder / "clusters.json", {"method": method or source, "n_fine": 4, "n_labelled": 116, "names": names,
               "noise_fraction": 0.1, "classes": classes, "warnings": []})  # fmt: skip
    kept = {name: 0.5 + 0.1 * seed for name in results.CLUSTER_METRICS}
    per_class = {name: {"ari": 0.3 + 0.2 * i} for i, name in enumerate(COARSE_NAMES)}
    scores = {"kept": kept, "all": {"ari": 0.4}, "per_class": per_class}
    write_json(folder / "metrics.json", scores if truth else {"kept": None, "all": None, "per_class": {}})
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["row", "coarse"], *([i, COARSE_NAMES[c]] for i, c in enumerate(COARSE))])
    write_manifest(folder, seed)


def write_uncertainty(run_dir, seed):
    folder = run_dir / "uncertainty"
    thresholds = dict.fromkeys(COARSE_NAMES, 0.9)
    write_json(folder / "metrics.json", {"score": "signed_max_prob", "threshold": thresholds})
    np.save(folder / "scores.npy", np.linspace(0, 1, N, dtype=np.float32))
    np.save(folder / "kept.npy", np.linspace(0, 1, N) <= 0.9)
    write_manifest(folder, seed)


def write_images(root, truth=True):
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", N), ("test", N_TEST)):
        rows = np.arange(n)
        np.save(root / f"{split}_images.npy", rng.integers(0, 256, (n, 8, 8), dtype=np.uint8))
        np.save(root / f"{split}_coarse_labels.npy", rows % 4 // 2)
        if truth:
            np.save(root / f"{split}_fine_labels.npy", rows % 4)
    write_json(root / "names.json", {"coarse": COARSE_NAMES} | ({"fine": FINE_NAMES} if truth else {}))


ACCURACY = {  # by seed
    "coarse": [0.80, 0.82, 0.84],
    "coarse_matched": [0.81, 0.83, 0.85],
    "finetune/umap_hdbscan": [0.83, 0.84, 0.88],
    "finetune/random": [0.80, 0.83, 0.83],
    "finetune/oracle": [0.85, 0.87, 0.89],
    "multihead/umap_hdbscan-alpha0.9": [0.71, 0.74, 0.75],
}


def write_runs(
    tmp_path, seeds=(0, 1, 2), keys=tuple(ACCURACY), sources=("umap_hdbscan", "random", "oracle"), truth=True
):
    write_images(tmp_path / "data", truth)
    for seed in seeds:
        run_dir = tmp_path / "runs" / "toy" / f"seed{seed}"
        for key in keys:
            write_learner(run_dir, key, seed, ACCURACY[key][seed], truth)
        for source in sources:
            write_labels(run_dir, source, seed, truth=truth)
        write_uncertainty(run_dir, seed)
    return tmp_path / "runs" / "toy"


def make_report(tmp_path, capsys, *overrides):
    """(summary.json, printed text)."""
    settings = ["name=toy", f"output_dir={tmp_path}/runs", "data.name=arrays", f"data.root={tmp_path}/data", *overrides]
    report.main(settings)
    return json.loads((tmp_path / "runs/toy/report/summary.json").read_text()), capsys.readouterr().out


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "write_figures", lambda *_: ([], []))


def test_numbers_match_hand_computed_ones(tmp_path, capsys, no_figures):
    write_runs(tmp_path)
    summary, _ = make_report(tmp_path, capsys)
    fn = summary["learners"]["finetune/umap_hdbscan"]
    assert fn["test_accuracy"] == pytest.approx({"mean": 0.85, "std": math.sqrt(0.0007), "n": 3})
    # Differences 0.02, 0.01, 0.03: mean 0.02, std 0.01.
    half = T_95[2] * 0.01 / math.sqrt(3)
    by_seed = fn["difference"].pop("by_seed")
    assert by_seed == pytest.approx({"0": 0.02, "1": 0.01, "2": 0.03})
    assert fn["difference"] == pytest.approx(
        {"mean": 0.02, "std": 0.01, "n": 3, "low": 0.02 - half, "high": 0.02 + half}
    )
    assert fn["gain_recovered"] == pytest.approx(0.5)  # (0.85 - 0.83) / (0.87 - 0.83)
    assert fn["difference_from_random"]["mean"] == pytest.approx((0.03 + 0.01 + 0.05) / 3)
    assert summary["learners"]["finetune/oracle"]["gain_recovered"] is None
    assert summary["learners"]["coarse_matched"]["difference"] is None
    mh = summary["learners"]["multihead/umap_hdbscan-alpha0.9"]
    assert mh["gain_recovered"] is None and mh["difference_from_random"] is None  # no MH on the controls' labels
    assert summary["seconds"]["coarse"] == pytest.approx(3.0)


def test_learners_of_the_same_budget_are_compared_with_plain_coarse_training(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path)
    for seed in (0, 1, 2):
        run_dir = runs_dir / f"seed{seed}"
        write_learner(run_dir, "finetune/umap_hdbscan", seed, ACCURACY["finetune/umap_hdbscan"][seed], images_seen=1060)
    summary, printed = make_report(tmp_path, capsys)
    mh = summary["learners"]["multihead/umap_hdbscan-alpha0.9"]  # 0.71, 0.74, 0.75 against coarse 0.80, 0.82, 0.84
    assert mh["difference_from_coarse"]["mean"] == pytest.approx(-0.26 / 3)
    assert summary["learners"]["finetune/umap_hdbscan"]["difference_from_coarse"] is None  # 6 % more images
    assert summary["learners"]["coarse_matched"]["difference_from_coarse"] is None  # the baseline's own control
    assert (
        "coarse training with as many images seen (95 % interval of accuracy): MH alpha=0.9 (umap_hdbscan)" in printed
    )


def test_cluster_numbers_match_hand_computed_ones(tmp_path, capsys, no_figures):
    write_runs(tmp_path)
    clusters = make_report(tmp_path, capsys)[0]["clusters"]
    assert list(clusters) == ["umap_hdbscan", "random", "oracle"]
    found = clusters["umap_hdbscan"]
    assert found["ari"] == pytest.approx({"mean": 0.6, "std": 0.1, "n": 3})
    assert found["ari_in_class"]["mean"] == pytest.approx(0.4)
    assert found["silhouette"]["mean"] == pytest.approx(0.3)
    assert found["dbcv"] == {"mean": None, "std": None, "n": 0}
    assert found["stability"] == pytest.approx({"mean": 1.0, "std": 0.0, "n": 3})  # equal wherever both seeds label


def test_rows_come_in_the_stated_order_whatever_folders_exist(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path, seeds=(0, 1))
    for seed in (0, 1):
        write_learner(runs_dir / f"seed{seed}", "refinery/falcon", seed, 0.9)
        write_learner(runs_dir / f"seed{seed}", "simclr_probe", seed, 0.7)
        write_labels(runs_dir / f"seed{seed}", "falcon", seed)
    summary, printed = make_report(tmp_path, capsys)
    names = [entry["name"] for entry in summary["learners"].values()]
    assert names == ["coarse", "coarse (matched budget)", "simclr_probe", "FN (umap_hdbscan)",
                     "MH alpha=0.9 (umap_hdbscan)", "refinery (falcon)", "FN (random)", "FN (oracle)"]  # fmt: skip
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:10] == names


def test_differences_pair_only_the_seeds_that_both_have(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path)
    (runs_dir / "seed0/coarse_matched/manifest.json").unlink()  # an unfinished stage does not count
    (runs_dir / "seed2/finetune/umap_hdbscan/manifest.json").unlink()
    summary, printed = make_report(tmp_path, capsys)
    fn = summary["learners"]["finetune/umap_hdbscan"]
    assert fn["seeds"] == [0, 1] and fn["difference"]["by_seed"] == pytest.approx({"1": 0.01})
    assert fn["difference"]["low"] is None
    assert fn["gain_recovered"] == pytest.approx(0.25)  # seed 1 alone: (0.84 - 0.83) / (0.87 - 0.83)
    assert "coarse_matched (seeds 1, 2), finetune/umap_hdbscan (seeds 0, 1)" in " ".join(printed.split())


def test_verdicts_say_a_loss_as_plainly_as_a_gain(tmp_path, capsys, no_figures):
    write_runs(tmp_path)
    _, printed = make_report(tmp_path, capsys)
    assert "- Above the matched baseline (95 % interval of accuracy): FN (oracle)." in printed
    assert "- Below the matched baseline (95 % interval of accuracy): MH alpha=0.9 (umap_hdbscan)." in printed
    assert "- Not distinguishable from the matched baseline (95 % interval of accuracy): FN (umap_hdbscan)," in printed
    assert "FN (umap_hdbscan) +3.00 [−1.97, +7.97]" in printed  # against FN (random)
    assert "not corrected for multiple comparisons" in printed


def test_two_seeds_use_the_t_value_of_one_degree_of_freedom():
    value = results.difference({0: 0.83, 1: 0.85}, {0: 0.82, 1: 0.82})
    half = T_95[1] * math.sqrt(0.0002) / math.sqrt(2)
    assert (value["low"], value["high"]) == pytest.approx((0.02 - half, 0.02 + half))


def test_one_seed_has_no_spread_and_says_so(tmp_path, capsys, no_figures):
    write_runs(tmp_path, seeds=(1,))
    summary, printed = make_report(tmp_path, capsys)
    fn = summary["learners"]["finetune/umap_hdbscan"]
    assert fn["test_accuracy"] == {"mean": 0.84, "std": None, "n": 1}
    assert fn["difference"]["std"] is None and fn["difference"]["mean"] == pytest.approx(0.01)
    assert "One seed only" in printed and "±" not in printed and "interval of accuracy" not in printed
    assert "No finished stage of seed 0." in printed
    assert summary["clusters"]["umap_hdbscan"]["stability"]["n"] == 0


def test_only_coarse_is_reported_with_what_is_missing(tmp_path, capsys):
    runs_dir = write_runs(tmp_path, seeds=(0,), keys=("coarse",), sources=())
    shutil.rmtree(runs_dir / "seed0/uncertainty")
    summary, printed = make_report(tmp_path, capsys)
    assert list(summary["learners"]) == ["coarse"] and summary["clusters"] == {}
    assert "Not finished in any seed: coarse_matched, finetune/umap_hdbscan, multihead/umap_hdbscan-alpha0.1" in printed
    assert "python reproduce.py" in printed and "no budget-matched baseline" in printed
    assert sorted(p.name for p in (runs_dir / "report/figures").iterdir()) == ["curves.pdf", "curves.png"]


def test_labels_without_any_learner_are_reported(tmp_path, capsys, no_figures):
    write_runs(tmp_path, seeds=(0,), keys=(), sources=("umap_hdbscan",))
    summary, printed = make_report(tmp_path, capsys)
    assert summary["learners"] == {} and "No learner has finished yet." in printed and "| umap_hdbscan" in printed


def test_without_truth_the_worst_discovered_group_is_shown(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path, seeds=(0, 1), keys=tuple(ACCURACY)[:4], sources=("umap_hdbscan",), truth=False)
    preds = np.arange(N_TEST) % 4 // 2
    preds[:8:4] = 1  # two of the six test rows of discovered class 0 wrong
    for seed in (0, 1):
        np.save(runs_dir / f"seed{seed}/coarse/test_preds.npy", preds)
    summary, printed = make_report(tmp_path, capsys)
    assert "worst discovered class, %" in printed and "No true fine classes are known" in printed
    assert "finetune/oracle" not in printed
    # Every learner is scored on the same groups, coarse too, whatever its metrics.json says.
    worst = {k: entry["test_worst_discovered_accuracy"]["mean"] for k, entry in summary["learners"].items()}
    assert worst == pytest.approx(
        {"coarse": 4 / 6, "coarse_matched": 1, "finetune/umap_hdbscan": 1, "finetune/random": 1}
    )
    assert summary["clusters"]["umap_hdbscan"]["ari"]["mean"] is None


def test_a_missing_data_set_costs_the_galleries_only(tmp_path, capsys):
    runs_dir = write_runs(tmp_path, seeds=(0,))
    shutil.rmtree(tmp_path / "data")
    _, printed = make_report(tmp_path, capsys)
    names = {p.name for p in (runs_dir / "report/figures/seed0").iterdir()}
    assert {"embedding_umap_hdbscan.png", "uncertainty.png"} <= names and not any("gallery" in n for n in names)
    assert "The data set could not be loaded" in printed


def test_changed_data_make_no_gallery(tmp_path, capsys):
    runs_dir = write_runs(tmp_path, seeds=(0,))
    write_manifest(runs_dir / "seed0/coarse", 0, data_signature="of other files")
    _, printed = make_report(tmp_path, capsys)
    assert "files have changed since the runs were made" in printed
    assert not list((runs_dir / "report/figures/seed0").glob("gallery*"))


def test_all_files_exist_and_repeat_byte_for_byte(tmp_path, capsys):
    runs_dir = write_runs(tmp_path, seeds=(0, 1))
    make_report(tmp_path, capsys)
    first = {p: p.read_bytes() for p in sorted((runs_dir / "report").rglob("*")) if p.is_file()}
    stems = ["curves", "differences", "seed0/embedding_umap_hdbscan", "seed0/gallery_umap_hdbscan_flat_ones",
             "seed0/gallery_umap_hdbscan_round_50_", "seed0/uncertainty"]  # fmt: skip
    figures = {f"figures/{stem}{suffix}" for stem in stems for suffix in (".png", ".pdf")}
    tables_and_numbers = {"table.md", "table.tex", "table.csv", "runs.csv", "summary.json"}
    assert {p.relative_to(runs_dir / "report").as_posix() for p in first} == figures | tables_and_numbers
    assert all(len(content) > (1000 if p.suffix in (".png", ".pdf") else 100) for p, content in first.items())
    assert all(content[:8] == b"\x89PNG\r\n\x1a\n" for p, content in first.items() if p.suffix == ".png")
    make_report(tmp_path, capsys)
    assert {p: p.read_bytes() for p in first} == first


def test_no_number_is_nan_and_csv_has_a_row_a_learner_and_seed(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path, seeds=(0, 1))
    make_report(tmp_path, capsys)
    for name in ("summary.json", "table.csv", "runs.csv", "table.md", "table.tex"):
        assert not re.search(r"\b(nan|NaN|inf|None)\b", (runs_dir / "report" / name).read_text()), name
    with open(runs_dir / "report/runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(ACCURACY)
    assert {"0": "0.83", "1": "0.84"} == {
        r["seed"]: r["test_accuracy"] for r in rows if r["learner"] == "finetune/umap_hdbscan"
    }
    with open(runs_dir / "report/table.csv", newline="") as file:
        assert [row["learner"] for row in csv.DictReader(file)][:2] == ["coarse", "coarse_matched"]


def test_unequal_runs_are_warned_about(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path, seeds=(0, 1))
    write_manifest(runs_dir / "seed1/coarse", 1, settings={"seed": 1, "train.batch_size": 16},
                   code={"commit": "e" * 40, "dirty": True}, outputs={"model.pt": {"sha256": "new"}})  # fmt: skip
    write_manifest(runs_dir / "seed1/uncertainty", 1, inputs={"coarse/model.pt": "old"})
    _, printed = make_report(tmp_path, capsys)
    assert "WARNING: the runs were made by different commits: cccccccccc, eeeeeeeeee." in printed
    assert "uncommitted changes" in printed
    assert "WARNING: coarse was made with differing settings between seeds: train.batch_size." in printed
    assert "WARNING: seed 1: uncertainty was made from another coarse/model.pt than is there now; redo it." in printed


def test_two_seeds_that_agree_are_no_verdict(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path, seeds=(0, 1))
    for seed in (0, 1):  # one test image better in both seeds: an interval of no width
        write_learner(
            runs_dir / f"seed{seed}", "finetune/umap_hdbscan", seed, ACCURACY["coarse_matched"][seed] + 0.0028
        )
    _, printed = make_report(tmp_path, capsys)
    assert "Under 3 seeds there is no verdict on any difference" in printed
    assert "Above" not in printed and "Below" not in printed and "Not distinguishable" not in printed


def test_runs_made_otherwise_than_configured_are_warned_about(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path, seeds=(0, 1))
    settings = {"seed": 1, "train.batch_size": 16, "multihead.alpha": 0.5}  # alpha differs from stage to stage anyway
    for seed in (0, 1):
        write_manifest(runs_dir / f"seed{seed}/coarse", seed, settings=settings, precision="bf16")
    _, printed = make_report(tmp_path, capsys)
    assert "WARNING: made with train.batch_size = 16, 8, not as this command's configuration says" in printed
    assert "made with multihead.alpha" not in printed
    assert "WARNING: the learners were trained with differing precision: bf16; fp32" in printed
    assert "differing device" not in printed


def test_no_runs_names_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(["name=toy", f"output_dir={tmp_path}"])
    assert stop.value.code == 2
    assert "python reproduce.py name=toy" in capsys.readouterr().err


def test_latex_is_balanced_and_escaped(tmp_path, capsys, no_figures):
    runs_dir = write_runs(tmp_path, seeds=(0, 1))
    make_report(tmp_path, capsys)
    tex = (runs_dir / "report/table.tex").read_text()
    begun, ended = re.findall(r"\\begin\{(\w+)\}", tex), re.findall(r"\\end\{(\w+)\}", tex)
    assert sorted(begun) == sorted(ended) and begun.count("tabular") == 3
    assert len(re.findall(r"(?<!\\)\{", tex)) == len(re.findall(r"(?<!\\)\}", tex))
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert not [line for line in body if re.search(r"(?<!\\)[%_#]", line)] and tex.isascii()
    assert r"FN (umap\_hdbscan)" in tex and r"test accuracy, \%" in tex and r"$\pm$" in tex
    columns = [len(spec) for spec in re.findall(r"\\begin\{tabular\}\{(\w+)\}", tex)]
    cells = {len(re.findall(r"(?<!\\)&", line)) + 1 for line in body}
    assert cells == set(columns)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (-0.001, "0.00"), (1234.5, "1,234.50"), (-1.5, "−1.50"), (None, "—")]
)
def test_number_cells(value, text):
    assert tables.number(value) == text


def test_latex_escapes_every_special_character():
    assert tables.latex_escape("a_b 5% & #1 {x} ~^ \\ $") == (
        r"a\_b 5\% \& \#1 \{x\} \textasciitilde{}\textasciicircum{} \textbackslash{} \$"
    )


def test_matched_colours_agree_between_discovered_and_true_classes():
    from utils.figures import match_colours

    found, true = np.array([7, 7, 7, 3, 3, 3]), np.array([0, 0, 1, 2, 2, 2])
    assert match_colours(found, true) == {
        0: 1,
        1: 2,
        2: 0,
    }  # class 3 has colour 0, class 7 colour 1; true 1 is left over


def test_gallery_keeps_tiles_apart_when_a_class_is_tiny():
    from utils import figures

    found = {
        "labels": np.array([0, 0, 0, -1]), "membership": np.array([0.5, 1, 1, 0], np.float32), "names": ["c/1"],
        "coarse": np.array(["c"] * 4), "true": None,
    }  # fmt: skip
    strip, caption = figures.gallery_row(found, 0, np.zeros((4, 5, 7, 1), np.uint8))
    tile = strip.shape[0]
    assert caption == "c/1\n3 rows" and strip.shape == (tile, 12 * tile + tile // 2, 3)
    assert (strip[:, 3 * tile :] == 255).all() and (strip[:, : 3 * tile] == 0).any()


def test_curves_average_over_seeds_up_to_the_shortest_history():
    from utils.figures import mean_curve

    long = [{"images_seen": 100 * e, "val_accuracy": 0.5 + 0.1 * e} for e in (1, 2, 3)]
    short = [{"images_seen": 120 * e, "val_accuracy": 0.7 + 0.1 * e} for e in (1, 2)]
    seen, mean, std = mean_curve([long, short])
    assert seen == pytest.approx([110, 220]) and mean == pytest.approx([0.7, 0.8])
    assert std == pytest.approx([math.sqrt(0.02)] * 2)
