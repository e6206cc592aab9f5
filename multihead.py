"""MH: one backbone, a coarse and a fine head, L = alpha * CE(coarse) + (1 - alpha) * CE(fine).

The coarse term sees every training row, the fine term those that have a pseudo label.

reads   labels/<multihead.labels>/{labels,parents,test_labels}.npy (and coarse/model.pt with multihead.init=coarse)
writes  multihead/<labels>-alpha<alpha>/{model.pt, metrics.json, history.jsonl, test_preds.npy}
usage   python multihead.py --config configs/digits.yaml multihead.alpha=0.1
"""

from utils.config import command_line, parse_config
from utils.stages import open_stage


@command_line
def main(argv=None):
    cfg = parse_config(__doc__, argv)
    with open_stage(cfg, "multihead") as stage:
        if stage.finished:
            return
        from utils import learning, training
        from utils.models import TwoHeads

        task = learning.open_task(cfg, stage)
        pseudo = task.load_labels(cfg.multihead.labels)
        fine_labels = training.labels_on(task.runtime, pseudo.labels)
        alpha = cfg.multihead.alpha
        backbone, images_before = task.starting_backbone(cfg.multihead.init)
        training.seed_weights(cfg, learning.FINE_HEAD)
        network = TwoHeads(backbone, task.dataset.K_C, len(pseudo.parents))

        def loss_of(network, batch, rows):
            coarse, fine = network(batch)
            coarse_loss = task.cross_entropy(coarse, task.coarse_labels(rows))
            return alpha * coarse_loss + (1 - alpha) * task.cross_entropy(fine, fine_labels(rows))

        def coarse_head(answer):
            return answer[0]

        n_steps = training.epochs_to_steps(cfg, len(task.train_rows), cfg.multihead.epochs)
        phase = training.Phase("multihead", task.train_rows, n_steps, cfg.multihead.lr, "multihead.lr", images_before)
        fit = task.fit(network, phase, loss_of, lambda network: task.coarse_validation(network, coarse_head))
        network.load_state_dict(fit.state)
        stage.save_torch("model.pt", fit.state)
        task.report(
            network, fit.images_seen, {"multihead": fit.best_epoch}, output=coarse_head, pseudo=pseudo,
            test_fine=task.score_fine(network, lambda answer: answer[1]), labels=cfg.multihead.labels, alpha=alpha,
        )  # fmt: skip
        stage.finish(cfg.command("report.py"), **task.runtime.describe())


if __name__ == "__main__":
    main()
