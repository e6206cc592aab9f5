"""Train a ResNet18 on the coarse labels; the epoch with the best validation accuracy is kept.

reads   the data set; with coarse.match=finetune/umap_hdbscan also that folder's metrics.json, for its budget
writes  coarse/{model.pt, metrics.json, history.jsonl, test_preds.npy}      (coarse_matched/ with coarse.match)
usage   python train_coarse.py --config configs/digits.yaml coarse.epochs=30 seed=1
"""

from utils.config import command_line, parse_config
from utils.stages import open_stage


@command_line
def main(argv=None):
    cfg = parse_config(__doc__, argv)
    with open_stage(cfg, "coarse") as stage:
        if stage.finished:
            return
        from utils import artifacts, learning, training
        from utils.models import Network

        task = learning.open_task(cfg, stage)
        backbone, _ = task.starting_backbone()
        training.seed_weights(cfg, learning.COARSE_HEAD)
        network = Network(backbone, task.dataset.K_C)
        n_steps = training.epochs_to_steps(cfg, len(task.train_rows), cfg.coarse.epochs)
        if cfg.coarse.match:
            budget = artifacts.load_json(stage.input(f"{cfg.coarse.match}/metrics.json"))["images_seen"]
            n_steps = task.steps_for(budget)
        phase = training.Phase("coarse", task.train_rows, n_steps, cfg.coarse.lr, "coarse.lr")
        fit = task.fit(network, phase, task.coarse_loss, task.coarse_validation)
        network.load_state_dict(fit.state)
        stage.save_torch("model.pt", fit.state)
        task.report(network, fit.images_seen, best_epoch={"coarse": fit.best_epoch})
        stage.finish(cfg.command("report.py" if cfg.coarse.match else "extract_features.py"), **task.runtime.describe())


if __name__ == "__main__":
    main()
