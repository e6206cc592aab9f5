"""Score every image's uncertainty from augmented views and keep the most certain of each coarse class.

reads   coarse/model.pt
writes  uncertainty/{scores.npy (N,), probs.npy (N, K_C), view_probs.npy (N, V, K_C), kept.npy (N,) bool,
        suspects.csv, metrics.json}
usage   python uncertainty_filter.py --config configs/digits.yaml filter.n_views=10 filter.score=entropy
"""

from utils.config import UserError, command_line, parse_config
from utils.stages import open_stage

ROWS_AT_ONCE = 16_384  # of view_probs.npy, so that memory does not grow with the number of images


def check_views_differ(cfg, split):
    """Raise UserError where the score measures disagreement of views that are all the same."""
    from utils import augment

    vary = not split.is_vector and augment.varies(cfg.filter.views, split.inputs.shape[-1])
    if cfg.filter.score in ("mutual_information", "variation_ratio") and not vary:
        why = "vectors have no augmented views" if split.is_vector else "filter.views changes nothing"
        raise UserError(f"filter.score: {cfg.filter.score} needs views that differ, and {why}; use entropy or margin")


def write_scores(cfg, stage, labels):
    """Write scores.npy and probs.npy from view_probs.npy, a block of rows at a time; return the scores (N,)."""
    import numpy as np

    from utils import artifacts, uncertainty

    view_probs = artifacts.load_array(stage.folder / "view_probs.npy", len(labels), mmap=True)
    scores = np.empty(len(labels), np.float32)

    def mean_probs():
        for start in range(0, len(labels), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            scores[part] = uncertainty.score_views(cfg.filter, view_probs[part], labels[part])
            yield view_probs[part].mean(1)

    stage.stream_array("probs.npy", (len(labels), view_probs.shape[2]), "float32", mean_probs())
    stage.save_array("scores.npy", scores)
    return scores


def suspect_rows(dataset, mean_probs, is_val, rows):
    """The lines of suspects.csv, one at a time."""
    names, given = dataset.coarse_names, dataset.train.coarse_labels
    for row in rows:
        split, predicted = "val" if is_val[row] else "train", mean_probs[row].argmax()
        probability = f"{mean_probs[row].max():.6f}"
        yield [row, dataset.train.row_name(row), split, names[given[row]], names[predicted], probability]


@command_line
def main(argv=None):
    cfg = parse_config(__doc__, argv)
    with open_stage(cfg, "uncertainty") as stage:
        if stage.finished:
            return
        import numpy as np

        from utils import artifacts, distributed, loader, models, training, uncertainty
        from utils.data import load_dataset

        runtime = training.pick_runtime(cfg)
        dataset = load_dataset(cfg.data, cfg.dataset_dir / "cache")
        path = stage.input("coarse/model.pt")
        check_views_differ(cfg, dataset.train)
        network = runtime.place(models.load_network(cfg.model, dataset.train, dataset.K_C, path))
        inputs = loader.Inputs(dataset.train, runtime.device, cfg.loader)
        n = dataset.train.n
        blocks = uncertainty.view_probs(cfg, runtime, network, inputs, np.arange(n))
        stage.stream_array("view_probs.npy", (n, cfg.filter.n_views, dataset.K_C), "float32", blocks)
        if not distributed.is_main():
            return

        labels = dataset.train.coarse_labels
        train_rows, val_rows = training.train_rows(cfg, dataset)
        scores = write_scores(cfg, stage, labels)
        mean_probs = artifacts.load_array(stage.folder / "probs.npy", n, mmap=True)
        kept = uncertainty.keep_most_certain(scores, labels, train_rows, cfg.filter.keep_fraction)
        is_val = np.isin(np.arange(n), val_rows)
        suspects = uncertainty.suspects(mean_probs, labels, cfg.filter.suspect_min_prob)
        kept_scores = {name: scores[kept & (labels == k)] for k, name in enumerate(dataset.coarse_names)}
        threshold = {name: float(of_class.max()) for name, of_class in kept_scores.items() if len(of_class)}
        accuracy = float((mean_probs.argmax(1) == labels)[train_rows].mean())
        stage.save_array("kept.npy", kept)
        header = ["row", "image", "split", "given", "predicted", "probability"]
        stage.save_csv("suspects.csv", header, suspect_rows(dataset, mean_probs, is_val, suspects))
        stage.save_json("metrics.json", {
            "score": cfg.filter.score, "n_kept": int(kept.sum()), "n_train": len(train_rows), "threshold": threshold,
            "n_suspects": len(suspects), "accuracy_of_views": accuracy,
        })  # fmt: skip
        print(f"{stage.folder}: kept {kept.sum():,} of {len(train_rows):,} training rows, {len(suspects)} suspects")
        stage.finish(cfg.command("cluster_fine.py"), **runtime.describe())


if __name__ == "__main__":
    main()
