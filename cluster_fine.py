"""Find pseudo-fine labels inside each coarse class: UMAP and HDBSCAN, other methods, or one of the two controls.

reads   features/<features.source>/{train,test}.npy, uncertainty/kept.npy
        (cluster.method=random: labels/<cluster.random_of>/ and kept.npy; oracle: kept.npy and the true fine labels)
writes  labels/<cluster.source>/{labels,membership,parents,embedding,test_labels}.npy, clusters.json, labels.csv,
        metrics.json
usage   python cluster_fine.py --config configs/digits.yaml cluster.n_neighbors=20 cluster.noise=keep
"""

import platform
import sys

from utils import distributed
from utils.config import UserError, command_line, parse_config
from utils.stages import open_stage


def find_labels(cfg, stage, dataset, is_train):
    """The discovery that cluster.method makes."""
    from utils import artifacts, clustering

    train, test, names = dataset.train, dataset.test, dataset.coarse_names
    if cfg.cluster.method == "random":
        labels = artifacts.load_array(stage.input(f"labels/{cfg.cluster.random_of}/labels.npy"), train.n)
        return clustering.discover_random(
            labels, train.coarse_labels, is_train, test.coarse_labels, names, cfg.cluster.n_components, cfg.seed
        )
    kept = artifacts.load_array(stage.input("uncertainty/kept.npy"), train.n)
    if cfg.cluster.method == "oracle":
        if train.fine_labels is None:
            raise UserError(f"cluster.method: the oracle needs true fine labels, and {cfg.data.name} has none")
        rows = is_train if cfg.cluster.assign == "nearest" else kept  # those that a discoverer would label
        return clustering.discover_oracle(
            train.fine_labels, train.coarse_labels, rows, is_train, test.fine_labels, test.coarse_labels,
            names, dataset.fine_names, cfg.cluster.n_components,
        )  # fmt: skip
    from utils.training import pick_runtime

    features = f"features/{cfg.features.source}"
    return clustering.discover(
        artifacts.load_array(stage.input(f"{features}/train.npy"), train.n, mmap=True),
        train.coarse_labels, is_train, kept,
        artifacts.load_array(stage.input(f"{features}/test.npy"), test.n, mmap=True),
        test.coarse_labels, names, cfg.cluster, cfg.seed, cfg.metrics.max_points, progress=report_class,
        device=str(pick_runtime(cfg).device),
    )  # fmt: skip


def report_class(name, entry):
    """One line a coarse class on stderr."""
    sizes = ", ".join(str(size) for size in entry["sizes"][:8]) + (" ..." if len(entry["sizes"]) > 8 else "")
    print(f"{name}: {entry['n_fit']} rows -> {entry['n_clusters']} fine classes ({sizes})", file=sys.stderr, flush=True)


def label_rows(train, discovery, coarse_names):
    """The lines of labels.csv, for people, one at a time."""
    for row, (y, z) in enumerate(zip(train.coarse_labels, discovery.labels, strict=True)):
        found = "" if z < 0 else discovery.names[z]
        yield [row, train.row_name(row), coarse_names[y], found, f"{discovery.membership[row]:.4f}"]


@command_line
def main(argv=None):
    distributed.refuse("cluster_fine.py", "its classes spread by cluster.n_jobs and cluster.joblib_backend")
    cfg = parse_config(__doc__, argv)
    with open_stage(cfg, "labels") as stage:
        if stage.finished:
            return
        import numpy as np

        from utils import artifacts, clustering, metrics
        from utils.data import load_dataset
        from utils.splits import validation_mask

        dataset = load_dataset(cfg.data, cfg.dataset_dir / "cache")
        train = dataset.train
        is_train = ~validation_mask(train.coarse_labels, cfg.data.val_fraction, cfg.seed)
        discovery = find_labels(cfg, stage, dataset, is_train)
        for warning in discovery.warnings:
            print(f"warning: {warning}", file=sys.stderr)

        kept = artifacts.load_array(stage.input("uncertainty/kept.npy"), train.n)
        quality = metrics.quality_report(
            train.fine_labels, discovery.labels, train.coarse_labels, dataset.coarse_names, kept, is_train
        )
        for name in ("labels", "membership", "parents", "embedding", "test_labels"):
            stage.save_array(f"{name}.npy", np.asarray(getattr(discovery, name)))
        stage.save_json("clusters.json", clustering.summary(discovery, cfg.cluster.method))
        stage.save_json("metrics.json", quality)
        header = ["row", "image", "coarse", "discovered", "membership"]
        stage.save_csv("labels.csv", header, label_rows(train, discovery, dataset.coarse_names))
        truth = f", ARI {quality['kept']['ari']:.3f} over kept rows" if quality["kept"] else ""
        rows = f"{(discovery.labels >= 0).sum():,} of {is_train.sum():,} training rows"
        print(f"{stage.folder}: {len(discovery.parents)} fine classes on {rows}{truth}")
        learn = cfg.command("finetune.py", **{"finetune.labels": cfg.cluster.source})
        stage.finish(learn, device=artifacts.cpu_name(), platform=platform.platform())


if __name__ == "__main__":
    main()
