"""Every option of the stages does what it says, through the scripts' main, on the planted data or on vectors."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import STAGE_SCRIPTS, run_stage

from utils import clustering, learning, loader, metrics, models, training, uncertainty
from utils.config import SCORES, FilterConfig, load_config
from utils.data import load_dataset

SHORT_FN = ("finetune.fine_epochs=1", "finetune.coarse_epochs=1")
PLAIN_CLUSTERING = ("cluster.method=kmeans", "cluster.n_clusters=3", "cluster.n_epochs=20")


class Run:
    """Stages on one run folder, and what they leave there."""

    def __init__(self, output_dir, config_file):
        self.output_dir, self.config_file = output_dir, config_file
        self.folder = output_dir / config_file.stem / "seed0"

    def __call__(self, script, *overrides):
        run_stage(script, "--config", self.config_file, f"output_dir={self.output_dir}", *overrides)

    def config(self, *overrides):
        return load_config(str(self.config_file), (f"output_dir={self.output_dir}", *overrides))

    def array(self, path):
        return np.load(self.folder / path)

    def json(self, path):
        return json.loads((self.folder / path).read_text())

    def history(self, path):
        return [json.loads(line) for line in (self.folder / path / "history.jsonl").read_text().splitlines()]

    def weights(self, path):
        return torch.load(self.folder / path, weights_only=True)

    def csv(self, path):
        with open(self.folder / path) as file:
            return list(csv.DictReader(file))


@pytest.fixture
def run(run_copy, config_file) -> Run:
    """A private copy of the finished run."""
    return Run(run_copy, config_file)


@pytest.fixture(scope="module")
def finished(finished_run, config_file) -> Run:
    """The finished run itself, to read only."""
    return Run(finished_run, config_file)


@pytest.fixture(scope="module")
def rows(finished):
    """(coarse labels (N,), is a training row (N,), kept (N,))."""
    cfg = finished.config()
    dataset = load_dataset(cfg.data)
    is_train = np.zeros(dataset.train.n, bool)
    is_train[training.train_rows(cfg, dataset)[0]] = True
    return dataset.train.coarse_labels, is_train, finished.array("uncertainty/kept.npy")


def same(a, b, names=None):
    """Whether two state_dicts hold the same bits, in all or in the named tensors."""
    return all(torch.equal(a[name], b[name]) for name in names or a)


def is_learned(name):
    """True for weights, False for normalisation's running statistics and the inputs' mean and deviation."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked")) and "normalise" not in name


# What all training stages share, on train_coarse.py


@pytest.fixture
def train(tmp_path, config_file):
    """Train for one epoch in a fresh run folder; returns the Run."""

    def once(*overrides):
        fresh = Run(tmp_path / str(len(list(tmp_path.iterdir()))), config_file)
        fresh("train_coarse", "coarse.epochs=1", *overrides)
        return fresh

    return once


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, config_file):
    plain = Run(tmp_path_factory.mktemp("baseline"), config_file)
    plain("train_coarse", "coarse.epochs=1")
    return plain


@pytest.mark.parametrize(
    "override",
    [
        "train.label_smoothing=0.2", "train.momentum=0.5", "train.momentum=0.0", "train.weight_decay=0.05",
        "train.warmup=0.7", "train.batch_size=32", "coarse.lr=0.03", "augment=none", "crop_flip.crop_padding=2",
        "crop_flip.hflip_p=0.5", "crop_flip.vflip_p=0.5", "data.val_fraction=0.3", "precision=bf16",
    ],
)  # fmt: skip
def test_a_training_option_changes_the_weights(override, train, baseline):
    changed = train(override)
    assert not same(changed.weights("coarse/model.pt"), baseline.weights("coarse/model.pt"), ["backbone.conv1.weight"])
    key, _, value = override.partition("=")
    assert str(changed.json("coarse/manifest.json")["settings"][key]) == value


@pytest.mark.parametrize("override", ["coarse.epochs=1", "filter.n_views=9", "cluster.n_neighbors=3", "multihead.lr=3"])
def test_the_same_or_another_stages_option_does_not(override, train, baseline):
    again = train(override)
    assert same(again.weights("coarse/model.pt"), baseline.weights("coarse/model.pt"))


def test_without_augmentation_its_settings_do_not_matter(train):
    first, second = train("augment=none"), train("augment=none", "crop_flip.crop_padding=3", "crop_flip.hflip_p=1")
    assert same(first.weights("coarse/model.pt"), second.weights("coarse/model.pt"))


def test_width_scales_the_network(train):
    shapes = {name: tuple(w.shape) for name, w in train("model.width=6").weights("coarse/model.pt").items()}
    assert shapes["backbone.conv1.weight"] == (6, 1, 3, 3) and shapes["head.weight"] == (2, 48)


def test_batch_size_and_epochs_make_the_budget(train):
    """324 training rows: ten batches of 32 or five of 64."""
    small = train("train.batch_size=32", "coarse.epochs=2")
    assert small.json("coarse/metrics.json")["images_seen"] == 2 * 320
    assert [line["images_seen"] for line in small.history("coarse")] == [320, 640]
    assert train("train.batch_size=1000").json("coarse/metrics.json")["images_seen"] == 324


def test_precision_is_in_the_manifest(train):
    assert train("precision=bf16").json("coarse/manifest.json")["precision"] == "bf16"
    assert train().json("coarse/manifest.json")["precision"] == "fp32"


def test_pretrained_is_off_by_default(baseline):
    assert baseline.json("coarse/manifest.json")["settings"]["model.pretrained"] is False


def test_a_missing_gpu_is_one_line_and_exit_2(train, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        train("device=cuda")
    assert stopped.value.code == 2
    assert "error: device: cuda is not on this machine" in capsys.readouterr().err.splitlines()[-1]


def test_matched_budget_sees_as_many_images_as_fn(run):
    before = (run.folder / "coarse/model.pt").read_bytes()
    run("train_coarse", "coarse.match=finetune/umap_hdbscan")
    matched, fn = run.json("coarse_matched/metrics.json"), run.json("finetune/umap_hdbscan/metrics.json")
    assert abs(matched["images_seen"] - fn["images_seen"]) <= 32  # half a batch
    assert run.history("coarse_matched")[-1]["images_seen"] == matched["images_seen"]
    assert run.json("coarse_matched/manifest.json")["inputs"].keys() == {"finetune/umap_hdbscan/metrics.json"}
    assert (run.folder / "coarse/model.pt").read_bytes() == before


# extract_features.py


def test_features_are_the_backbones_output_whatever_the_batch_size(run):
    run("extract_features", "--force", "features.batch_size=7")
    cfg = run.config()
    dataset = load_dataset(cfg.data)
    backbone = models.load_backbone(cfg.model, dataset.train, run.folder / "coarse/model.pt")
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        inputs = loader.Inputs(split, torch.device("cpu"))
        runtime = training.Runtime(torch.device("cpu"), bf16=False)
        expected = np.concatenate(list(training.predict(runtime, backbone, inputs, np.arange(split.n))))
        features = run.array(f"features/coarse/{name}.npy")
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, atol=1e-5)


def test_features_of_another_model_have_their_own_folder(run):
    before = run.array("features/coarse/train.npy")
    run("extract_features", "features.source=finetune/umap_hdbscan")
    features = run.array("features/finetune/umap_hdbscan/train.npy")
    assert features.shape == before.shape and not np.array_equal(features, before)
    run("cluster_fine", *PLAIN_CLUSTERING, "features.source=finetune/umap_hdbscan", "cluster.source=second_round")
    inputs = run.json("labels/second_round/manifest.json")["inputs"]
    assert "features/finetune/umap_hdbscan/train.npy" in inputs and "features/coarse/train.npy" not in inputs


# uncertainty_filter.py


@pytest.mark.parametrize("score", SCORES)
def test_filter_score_is_computed_from_the_stored_views(score, run, rows):
    coarse_labels, is_train, _ = rows
    run("uncertainty_filter", "--force", f"filter.score={score}")
    views, scores, kept = (run.array(f"uncertainty/{name}.npy") for name in ("view_probs", "scores", "kept"))
    np.testing.assert_array_equal(scores, uncertainty.score_views(FilterConfig(score=score), views, coarse_labels))
    np.testing.assert_allclose(run.array("uncertainty/probs.npy"), views.mean(1))
    assert not kept[~is_train].any()
    facts = run.json("uncertainty/metrics.json")
    assert facts["score"] == score and facts["n_kept"] == kept.sum() and facts["n_train"] == is_train.sum()
    for label, name in enumerate(["class 0", "class 1"]):
        assert facts["threshold"][name] == scores[kept & (coarse_labels == label)].max()


@pytest.mark.parametrize("fraction, n_kept", [(1.0, 162), (0.5, 81), (0.001, 1)])
def test_keep_fraction_counts_by_class(fraction, n_kept, run, rows):
    coarse_labels, is_train, _ = rows
    run("uncertainty_filter", "--force", f"filter.keep_fraction={fraction}")
    kept = run.array("uncertainty/kept.npy")
    assert kept.dtype == bool and not kept[~is_train].any()
    assert np.bincount(coarse_labels[kept]).tolist() == [n_kept, n_kept]


def test_n_views_adds_views_and_keeps_the_first(run):
    first = run.array("uncertainty/view_probs.npy")
    run("uncertainty_filter", "--force", "filter.n_views=5")
    views = run.array("uncertainty/view_probs.npy")
    assert views.shape == (360, 5, 2)
    np.testing.assert_allclose(views[:, :3], first, atol=1e-6)


@pytest.mark.parametrize(
    "views, axes",
    [("{crop_padding: 0, hflip_p: 1, vflip_p: 0}", [3]), ("{crop_padding: 0, hflip_p: 1, vflip_p: 1}", [2, 3])],
)
def test_views_settings_say_how_a_view_is_made(views, axes, run):
    run("uncertainty_filter", "--force", f"filter.views={views}")
    cfg = run.config()
    train = load_dataset(cfg.data).train
    network = models.load_network(cfg.model, train, 2, run.folder / "coarse/model.pt").eval()
    images = torch.from_numpy(np.array(train.inputs)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = network(images.flip(axes)).softmax(1).numpy()
    for view in range(3):
        np.testing.assert_allclose(run.array("uncertainty/view_probs.npy")[:, view], expected, atol=1e-5)


def test_crop_padding_moves_the_views(run):
    run("uncertainty_filter", "--force", "filter.views.crop_padding=0")
    still = run.array("uncertainty/view_probs.npy")
    np.testing.assert_array_equal(still[:, 0], still[:, 1])
    run("uncertainty_filter", "--force", "filter.views.crop_padding=3")
    assert np.abs(np.ptp(run.array("uncertainty/view_probs.npy"), axis=1)).max() > 1e-3


def test_suspects_are_listed_from_the_least_probability_on(run, rows):
    coarse_labels, is_train, _ = rows
    run("train_coarse", "--force", "coarse.epochs=1", "coarse.lr=0.002")  # hardly trained: wrong about many rows
    counts = []
    for least in (0.0, 0.53, 1.0):
        run("uncertainty_filter", "--force", f"filter.suspect_min_prob={least}")
        probs, suspects = run.array("uncertainty/probs.npy"), run.csv("uncertainty/suspects.csv")
        wrong = (probs.argmax(1) != coarse_labels) & (probs.max(1) >= least)
        assert {int(s["row"]) for s in suspects} == set(np.flatnonzero(wrong))
        counts.append(len(suspects))
    assert counts[0] > counts[1] > counts[2] == 0
    assert run.json("uncertainty/metrics.json")["n_suspects"] == 0


def test_suspects_say_what_was_given_and_what_is_predicted(run, rows):
    coarse_labels, is_train, _ = rows
    run("train_coarse", "--force", "coarse.epochs=1", "coarse.lr=0.002")
    run("uncertainty_filter", "--force")
    suspects = run.csv("uncertainty/suspects.csv")
    shown = [float(s["probability"]) for s in suspects]
    assert shown == sorted(shown, reverse=True) and len(suspects) > 10
    assert {s["split"] for s in suspects} == {"train", "val"}
    for s in suspects:
        label = coarse_labels[int(s["row"])]
        assert s["given"] == f"class {label}" and s["predicted"] == f"class {1 - label}" and s["image"] == s["row"]
        assert s["split"] == ("train" if is_train[int(s["row"])] else "val")


# cluster_fine.py


@pytest.mark.parametrize("method", ["umap_hdbscan", "kmeans", "gmm", "random", "oracle"])
def test_each_method_writes_labels_of_one_form(method, run, rows):
    coarse_labels, is_train, kept = rows
    run("cluster_fine", "--force", f"cluster.method={method}", "cluster.n_epochs=20")
    folder = f"labels/{method}"
    names = ("labels", "membership", "parents", "embedding", "test_labels")
    labels, membership, parents, embedding, test_labels = (run.array(f"{folder}/{name}.npy") for name in names)
    assert labels.dtype == parents.dtype == test_labels.dtype == np.int64
    assert membership.dtype == embedding.dtype == np.float32
    assert np.array_equal(labels >= 0, kept)  # min_cluster_size leaves no noise with cluster.noise=soft
    assert np.array_equal(np.unique(labels[kept]), np.arange(len(parents)))
    assert np.array_equal(parents[labels[kept]], coarse_labels[kept])
    assert (membership[~kept] == 0).all() and membership.min() >= 0 and membership.max() <= 1
    assert embedding.shape == (360, 4) and np.isnan(embedding[~kept]).all() and test_labels.shape == (120,)
    summary, quality = run.json(f"{folder}/clusters.json"), run.json(f"{folder}/metrics.json")
    assert summary["method"] == method and summary["n_fine"] == len(parents) == len(summary["names"])
    assert sum(sum(entry["sizes"]) for entry in summary["classes"].values()) == summary["n_labelled"] == kept.sum()
    ari = quality["kept"]["ari"]
    assert abs(ari) < 0.45 if method == "random" else ari > 0.9
    table = run.csv(f"{folder}/labels.csv")
    assert [row["discovered"] for row in table] == ["" if z < 0 else summary["names"][z] for z in labels]


def test_random_keeps_the_rows_and_sizes_of_what_it_shuffles(run, rows):
    coarse_labels, _, _ = rows
    run("cluster_fine", *PLAIN_CLUSTERING, "cluster.source=first")
    run("cluster_fine", "cluster.method=random", "cluster.random_of=first", "cluster.source=shuffled")
    first, shuffled = run.array("labels/first/labels.npy"), run.array("labels/shuffled/labels.npy")
    assert np.array_equal(first >= 0, shuffled >= 0) and not np.array_equal(first, shuffled)
    for label in (0, 1):
        of_class = (coarse_labels == label) & (first >= 0)
        assert np.array_equal(*(np.sort(np.unique(z[of_class], return_counts=True)[1]) for z in (first, shuffled)))


def test_library_parameters_reach_the_libraries(run, monkeypatch):
    import hdbscan
    import umap

    seen = {}
    for module, name in ((umap, "UMAP"), (hdbscan, "HDBSCAN")):
        original = getattr(module, name)
        spy = lambda *a, original=original, name=name, **k: seen.update({name: k}) or original(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    of_umap = {"n_neighbors": 7, "min_dist": 0.25, "n_components": 3, "metric": "cosine", "n_epochs": 15}
    of_hdbscan = {
        "min_cluster_size": 9, "min_samples": 3, "cluster_selection_method": "leaf", "cluster_selection_epsilon": 0.125,
        "allow_single_cluster": True,
    }  # fmt: skip
    adapted = ["cluster.source=other", "cluster.normalize=false"]
    run("cluster_fine", *adapted, *(f"cluster.{key}={value}" for key, value in {**of_umap, **of_hdbscan}.items()))
    assert of_umap.items() <= seen["UMAP"].items()
    assert of_hdbscan.items() <= seen["HDBSCAN"].items()
    entry = run.json("labels/other/clusters.json")["classes"]["class 0"]
    assert entry["settings"] == {"n_neighbors": 7, "knn": "exact", "min_cluster_size": 9, "min_samples": 3}
    assert run.array("labels/other/embedding.npy").shape == (360, 3)


def test_normalisation_divides_by_the_norm(run, rows, monkeypatch):
    _, _, kept = rows
    norms = {}

    def spy(x, cluster, seed, found):
        norms.setdefault(cluster.source, []).append(np.linalg.norm(x, axis=1))
        return x[:, : cluster.n_components].astype(np.float32)

    monkeypatch.setattr(clustering, "_embed", spy)
    for source, value in (("unit", "true"), ("raw", "false")):
        run("cluster_fine", "cluster.method=kmeans", f"cluster.source={source}", f"cluster.normalize={value}")
    np.testing.assert_allclose(np.concatenate(norms["unit"]), 1, rtol=1e-5)
    features = np.linalg.norm(run.array("features/coarse/train.npy")[kept], axis=1)
    np.testing.assert_allclose(np.sort(np.concatenate(norms["raw"])), np.sort(features), rtol=1e-5)


def noisy_embedding(x, cluster, seed, found):
    """Instead of UMAP: two tight groups and, every eighth row, a stray one."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(len(x), cluster.n_components)) * 0.1
    points[len(x) // 2 :, 0] += 10
    points[::8] = rng.uniform(-30, 30, (len(points[::8]), cluster.n_components))
    return points.astype(np.float32)


@pytest.mark.parametrize("noise", ["keep", "soft", "nearest"])
def test_noise_rows_are_kept_or_given_a_cluster(noise, run, rows, monkeypatch):
    monkeypatch.setattr(clustering, "_embed", noisy_embedding)
    _, _, kept = rows
    run("cluster_fine", f"cluster.noise={noise}", "cluster.source=noisy", "cluster.min_cluster_size=20")
    classes = run.json("labels/noisy/clusters.json")["classes"].values()
    n_noise, labels = sum(entry["n_noise"] for entry in classes), run.array("labels/noisy/labels.npy")
    assert n_noise >= 20
    assert (labels[kept] < 0).sum() == (n_noise if noise == "keep" else 0)
    assert (labels[~kept] < 0).all()


def test_assign_nearest_gives_dropped_training_rows_a_label(run, rows):
    coarse_labels, is_train, kept = rows
    votes = {}
    for source, k in (("nearest1", 1), ("nearest4", 4)):
        run(
            "cluster_fine",
            *PLAIN_CLUSTERING,
            "cluster.assign=nearest",
            f"cluster.assign_k={k}",
            f"cluster.source={source}",
        )
        labels, parents = run.array(f"labels/{source}/labels.npy"), run.array(f"labels/{source}/parents.npy")
        assert np.array_equal(labels >= 0, is_train)
        assert np.array_equal(parents[labels[is_train]], coarse_labels[is_train])
        votes[source] = run.array(f"labels/{source}/membership.npy")[is_train & ~kept]
    assert (votes["nearest1"] == 1).all() and np.isin(votes["nearest4"], [0.25, 0.5, 0.75, 1]).all()


def test_number_of_clusters_is_given_or_chosen_by_silhouette(run):
    run("cluster_fine", "cluster.method=kmeans", "cluster.n_clusters=5", "cluster.source=five", "cluster.n_epochs=20")
    run(
        "cluster_fine",
        "cluster.method=kmeans",
        "cluster.k_min=4",
        "cluster.k_max=6",
        "cluster.source=some",
        "cluster.n_epochs=20",
    )
    given, chosen = (run.json(f"labels/{s}/clusters.json")["classes"].values() for s in ("five", "some"))
    assert [entry["n_clusters"] for entry in given] == [5, 5]
    assert all(4 <= entry["n_clusters"] <= 6 for entry in chosen)


def test_max_points_changes_the_silhouette_only(run):
    for source, n in (("all", 5000), ("few", 30)):
        run("cluster_fine", *PLAIN_CLUSTERING, f"metrics.max_points={n}", f"cluster.source={source}")
    assert np.array_equal(run.array("labels/all/labels.npy"), run.array("labels/few/labels.npy"))
    full, few = (run.json(f"labels/{s}/clusters.json")["classes"]["class 0"]["silhouette"] for s in ("all", "few"))
    assert full != few and abs(full - few) < 0.3


# finetune.py


@pytest.mark.parametrize(
    "head, shapes",
    [("replace", {"head.weight": (2, 32)}), ("stack", {"head.0.weight": (6, 32), "head.1.weight": (2, 6)})],
)
def test_the_coarse_head_replaces_or_stacks(head, shapes, run):
    run("finetune", "--force", *SHORT_FN, f"finetune.head={head}")
    fine, coarse = run.weights("finetune/umap_hdbscan/fine_model.pt"), run.weights("finetune/umap_hdbscan/model.pt")
    assert fine["head.weight"].shape == (6, 32)
    found = {name: tuple(w.shape) for name, w in coarse.items() if name.startswith("head") and name.endswith("weight")}
    assert found == shapes


def test_a_stacked_head_starts_from_the_fine_layer(run):
    run("finetune", "--force", *SHORT_FN, "finetune.head=stack", "finetune.coarse_lr=1e-9")
    fine, coarse = run.weights("finetune/umap_hdbscan/fine_model.pt"), run.weights("finetune/umap_hdbscan/model.pt")
    torch.testing.assert_close(coarse["head.0.weight"], fine["head.weight"])


def test_freezing_fixes_the_convolutions(run):
    run("finetune", "--force", *SHORT_FN, "finetune.freeze=true")
    fine, coarse = run.weights("finetune/umap_hdbscan/fine_model.pt"), run.weights("finetune/umap_hdbscan/model.pt")
    convolutions = [name for name, w in fine.items() if w.dim() == 4]
    assert len(convolutions) == 20 and same(fine, coarse, convolutions)
    assert not torch.equal(fine["backbone.bn1.weight"], coarse["backbone.bn1.weight"])
    assert not torch.equal(fine["backbone.bn1.running_mean"], coarse["backbone.bn1.running_mean"])
    run("finetune", "--force", *SHORT_FN)
    fine, coarse = run.weights("finetune/umap_hdbscan/fine_model.pt"), run.weights("finetune/umap_hdbscan/model.pt")
    assert not any(torch.equal(fine[name], coarse[name]) for name in convolutions)


def test_starting_from_the_coarse_network_counts_its_images(run, rows):
    n_labelled = int(rows[2].sum())
    run("finetune", "--force", *SHORT_FN, "finetune.init=coarse", "finetune.fine_lr=1e-9")
    before, fine = run.weights("coarse/model.pt"), run.weights("finetune/umap_hdbscan/fine_model.pt")
    for name in (name for name in before if name.startswith("backbone") and is_learned(name)):
        torch.testing.assert_close(fine[name], before[name], rtol=1e-5, atol=1e-7)
    own = n_labelled // 64 * 64 + 320
    images = run.json("coarse/metrics.json")["images_seen"] + own
    assert run.json("finetune/umap_hdbscan/metrics.json")["images_seen"] == images
    assert "coarse/model.pt" in run.json("finetune/umap_hdbscan/manifest.json")["inputs"]
    run("finetune", "--force", *SHORT_FN)
    assert run.json("finetune/umap_hdbscan/metrics.json")["images_seen"] == own
    assert "coarse/model.pt" not in run.json("finetune/umap_hdbscan/manifest.json")["inputs"]


def test_the_two_phases_have_their_own_epochs_and_rates(run, rows):
    n_labelled = int(rows[2].sum())
    settings = ("fine_epochs=1", "coarse_epochs=2", "fine_lr=0.05", "coarse_lr=0.01")
    run("finetune", "--force", *(f"finetune.{s}" for s in settings))
    history = run.history("finetune/umap_hdbscan")
    assert [(line["phase"], line["epoch"], line["epochs"]) for line in history] == [
        ("fine", 1, 1),
        ("coarse", 1, 2),
        ("coarse", 2, 2),
    ]
    assert [history[0]["lr"], history[1]["lr"]] == [pytest.approx(0.05 / 25), pytest.approx(0.01 / 25)]
    fine_images = n_labelled // 64 * 64
    assert [line["images_seen"] for line in history] == [fine_images, fine_images + 320, fine_images + 640]
    assert run.json("finetune/umap_hdbscan/metrics.json")["best_epoch"].keys() == {"fine", "coarse"}


def test_learners_read_the_labels_they_are_told_to(run):
    run("cluster_fine", *PLAIN_CLUSTERING[:1], "cluster.n_clusters=2", "cluster.n_epochs=20", "cluster.source=falcon")
    run("finetune", *SHORT_FN, "finetune.labels=falcon")
    run("multihead", "multihead.epochs=1", "multihead.labels=falcon")
    for folder in ("finetune/falcon", "multihead/falcon-alpha0.5"):
        facts = run.json(f"{folder}/metrics.json")
        assert facts["labels"] == "falcon" and facts["n_fine"] == 4
        assert {path.rpartition("/")[0] for path in run.json(f"{folder}/manifest.json")["inputs"]} == {"labels/falcon"}
    assert run.weights("finetune/falcon/fine_model.pt")["head.weight"].shape[0] == 4
    assert run.weights("multihead/falcon-alpha0.5/model.pt")["fine_head.weight"].shape[0] == 4


def test_the_fine_phase_is_validated_by_fine_probabilities_summed_by_parent(run):
    run("finetune", "--force", *SHORT_FN)
    cfg = run.config()
    dataset = load_dataset(cfg.data)
    val = training.train_rows(cfg, dataset)[1]
    network = models.load_network(
        cfg.model, dataset.train, 6, run.folder / "finetune/umap_hdbscan/fine_model.pt"
    ).eval()
    images = torch.from_numpy(dataset.train.inputs[val]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        fine = network(images).softmax(1).numpy()
    parents, truth = run.array("labels/umap_hdbscan/parents.npy"), dataset.train.coarse_labels[val]
    coarse = np.stack([fine[:, parents == label].sum(1) for label in (0, 1)], axis=1)
    np.testing.assert_allclose(learning.sum_by_parent(fine, parents, 2), coarse, atol=1e-6)
    line = run.history("finetune/umap_hdbscan")[0]
    assert line["val_accuracy"] == (coarse.argmax(1) == truth).mean()
    assert line["val_loss"] == pytest.approx(-np.log(coarse[np.arange(len(val)), truth]).mean(), rel=1e-4)


def test_reported_scores_are_those_of_the_stored_predictions(finished):
    test = load_dataset(finished.config().data).test
    for folder in ("coarse", "finetune/umap_hdbscan", "multihead/umap_hdbscan-alpha0.5"):
        preds, facts = finished.array(f"{folder}/test_preds.npy"), finished.json(f"{folder}/metrics.json")
        assert facts["test"].items() >= metrics.coarse_scores(test.coarse_labels, preds).items()
        by_fine = [(preds == test.coarse_labels)[test.fine_labels == k].mean() for k in range(6)]
        assert facts["test"]["worst_subclass_accuracy"] == pytest.approx(min(by_fine))


# multihead.py


def test_alpha_names_the_folder_and_weighs_the_losses(run):
    for alpha in ("0.1", "0.90"):
        run("multihead", "multihead.epochs=1", f"multihead.alpha={alpha}")
    low, high = (run.weights(f"multihead/umap_hdbscan-alpha{a}/model.pt") for a in ("0.1", "0.9"))
    assert not same(low, high, ["backbone.conv1.weight"])
    assert run.json("multihead/umap_hdbscan-alpha0.9/metrics.json")["alpha"] == 0.9


@pytest.mark.parametrize(
    "alpha, unlearned, learned", [(1, "fine_head", "coarse_head"), (0, "coarse_head", "fine_head")]
)
def test_a_head_without_weight_in_the_loss_learns_nothing(alpha, unlearned, learned, run):
    heads = []
    for lr in (0.1, 0.02):
        run(
            "multihead",
            "--force",
            f"multihead.alpha={alpha}",
            "multihead.epochs=1",
            "train.weight_decay=0",
            f"multihead.lr={lr}",
        )
        heads.append(run.weights(f"multihead/umap_hdbscan-alpha{alpha}/model.pt"))
    assert same(*heads, [f"{unlearned}.weight", f"{unlearned}.bias"])
    assert not same(*heads, [f"{learned}.weight"])


def test_the_coarse_loss_sees_every_row_and_the_fine_loss_the_labelled_ones(run, rows, monkeypatch):
    coarse_labels, is_train, kept = rows
    drawn, given = [], {2: [], 6: []}
    batches_of, loss_of = loader.training_batches, training.cross_entropy

    def spy_on_batches(*args):
        for batch in batches_of(*args):
            drawn.append(batch[0])
            yield batch

    def spy_on_loss(logits, labels, smoothing):
        given[logits.shape[1]].append(labels.numpy())
        return loss_of(logits, labels, smoothing)

    monkeypatch.setattr(loader, "training_batches", spy_on_batches)
    monkeypatch.setattr(training, "cross_entropy", spy_on_loss)
    run("multihead", "--force", "multihead.epochs=3", "train.batch_size=54")  # 324 rows: six whole batches
    drawn, coarse, fine = np.concatenate(drawn), np.concatenate(given[2]), np.concatenate(given[6])
    assert np.bincount(drawn, minlength=360).tolist() == (3 * is_train).tolist()
    assert np.array_equal(coarse, coarse_labels[drawn])
    assert np.array_equal(fine, run.array("labels/umap_hdbscan/labels.npy")[drawn])
    assert (fine >= 0).sum() == 3 * kept.sum() < 3 * is_train.sum()


def test_fn_learns_fine_classes_from_labelled_rows_and_coarse_ones_from_all(run, rows, monkeypatch):
    _, is_train, kept = rows
    drawn = {}
    batches_of = loader.training_batches

    def spy(cfg, inputs, rows, epoch, first_step):
        for batch in batches_of(cfg, inputs, rows, epoch, first_step):
            drawn.setdefault(len(rows), []).append(batch[0])
            yield batch

    monkeypatch.setattr(loader, "training_batches", spy)
    run("finetune", "--force", *SHORT_FN, "train.batch_size=4")  # 292 and 324 rows: whole batches
    fine, coarse = np.concatenate(drawn[kept.sum()]), np.concatenate(drawn[is_train.sum()])
    assert np.array_equal(np.sort(fine), np.flatnonzero(kept))
    assert np.array_equal(np.sort(coarse), np.flatnonzero(is_train))


def test_multihead_can_start_from_the_coarse_network(run):
    run("multihead", "--force", "multihead.epochs=1", "multihead.init=coarse", "multihead.lr=1e-9")
    before, after = run.weights("coarse/model.pt"), run.weights("multihead/umap_hdbscan-alpha0.5/model.pt")
    for name in (name for name in before if name.startswith("backbone") and is_learned(name)):
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-7)
    images = run.json("coarse/metrics.json")["images_seen"] + 320
    assert run.json("multihead/umap_hdbscan-alpha0.5/metrics.json")["images_seen"] == images


def test_multihead_has_its_own_epochs_and_rate(run):
    run("multihead", "--force", "multihead.epochs=2", "multihead.lr=0.05")
    history = run.history("multihead/umap_hdbscan-alpha0.5")
    assert [line["epoch"] for line in history] == [1, 2] and history[0]["lr"] == pytest.approx(0.05 / 25)


@pytest.mark.parametrize(
    "script, folder", [("finetune", "finetune/umap_hdbscan"), ("multihead", "multihead/umap_hdbscan-alpha0.5")]
)
@pytest.mark.parametrize("override", ["train.label_smoothing=0.2", "train.weight_decay=0.05", "augment=none"])
def test_shared_options_reach_the_other_learners(script, folder, override, run):
    short = (*SHORT_FN, "multihead.epochs=1")
    run(script, "--force", *short)
    plain = run.weights(f"{folder}/model.pt")
    run(script, "--force", *short, override)
    assert not same(run.weights(f"{folder}/model.pt"), plain, ["backbone.conv1.weight"])


def test_all_learners_start_from_the_same_backbone(run, tmp_path):
    """A seed's comparison is paired: with a rate of nearly 0 the three end in the weights they began with."""
    run("train_coarse", "--force", "coarse.epochs=1", "coarse.lr=1e-9")
    start = run.weights("coarse/model.pt")
    for script in ("extract_features", "uncertainty_filter"):
        run(script, "--force")
    run("cluster_fine", "--force", "cluster.method=oracle")
    run("finetune", *SHORT_FN, "finetune.fine_lr=1e-9", "finetune.labels=oracle")
    run("multihead", "multihead.epochs=1", "multihead.lr=1e-9", "multihead.labels=oracle")
    for path in ("finetune/oracle/fine_model.pt", "multihead/oracle-alpha0.5/model.pt"):
        weights = run.weights(path)
        for name in (name for name in start if name.startswith("backbone") and is_learned(name)):
            torch.testing.assert_close(weights[name], start[name], rtol=1e-5, atol=1e-7)


# Data


def test_data_limit_holds_in_every_stage(config_file, tmp_path):
    run = Run(tmp_path, config_file)
    for script in STAGE_SCRIPTS:
        run(
            script,
            "data.limit=120",
            "coarse.epochs=2",
            *SHORT_FN,
            "multihead.epochs=1",
            "cluster.n_epochs=20",
            "train.batch_size=16",
        )
    source = load_dataset(run.config("data.limit=120").data).train.source_rows
    assert len(source) == 120 and source.max() > 120
    for path in ("features/coarse/train", "uncertainty/scores", "labels/umap_hdbscan/labels"):
        assert len(run.array(f"{path}.npy")) == 120
    assert run.array("features/coarse/test.npy").shape[0] == 120  # the test part is never limited
    assert [int(line["image"]) for line in run.csv("labels/umap_hdbscan/labels.csv")] == source.tolist()
    assert run.json("coarse/metrics.json")["n_train"] == 108


def write_blobs(root, n_per_class=100):
    """Two coarse classes of three Gaussian blobs each, as vectors (n, 8)."""
    root.mkdir()
    centres = np.random.default_rng(0).normal(size=(6, 8)) * 3
    for part, n, seed in (("train", n_per_class, 1), ("test", 10, 2)):
        fine = np.repeat(np.arange(6), n)
        vectors = centres[fine] + np.random.default_rng(seed).normal(size=(len(fine), 8)) * 0.3
        np.save(root / f"{part}_vectors.npy", (100 + 10 * vectors).astype(np.float32))
        np.save(root / f"{part}_coarse_labels.npy", fine // 3)
        np.save(root / f"{part}_fine_labels.npy", fine)


def test_vectors_run_through_all_stages_with_the_mlp(tmp_path, config_file):
    write_blobs(tmp_path / "blobs")
    run = Run(tmp_path / "runs", config_file)
    settings = [f"data.root={tmp_path / 'blobs'}", "model.mlp=[16,12]", "multihead.epochs=8", "finetune.fine_epochs=8"]
    for script in STAGE_SCRIPTS:
        run(script, *settings)
    weights = run.weights("coarse/model.pt")
    assert weights["backbone.layers.0.weight"].shape == (16, 8) and weights["head.weight"].shape == (2, 12)
    assert run.array("features/coarse/train.npy").shape == (600, 12)
    views = run.array("uncertainty/view_probs.npy")
    assert views.shape == (600, 3, 2) and (np.ptp(views, axis=1) == 0).all()  # a vector has one view
    assert run.json("labels/umap_hdbscan/metrics.json")["kept"]["ari"] > 0.9
    for folder in ("coarse", "finetune/umap_hdbscan", "multihead/umap_hdbscan-alpha0.5"):
        assert run.json(f"{folder}/metrics.json")["test"]["accuracy"] > 0.95, folder
