"""FN: train on the pseudo-fine labels first, then, from those weights, on the coarse labels.

reads   labels/<finetune.labels>/{labels,parents,test_labels}.npy (and coarse/model.pt with finetune.init=coarse)
writes  finetune/<labels>/{fine_model.pt, model.pt, metrics.json, history.jsonl, test_preds.npy}
usage   python finetune.py --config configs/digits.yaml finetune.labels=umap_hdbscan finetune.head=stack
"""

import copy

from utils.config import command_line, parse_config
from utils.stages import open_stage


def fine_phase(cfg, task, pseudo):
    """Train on the rows with a label.  Validated by coarse accuracy with fine probabilities summed by parent."""
    from utils import learning, training
    from utils.models import Network

    backbone, images_before = task.starting_backbone(cfg.finetune.init)
    training.seed_weights(cfg, learning.FINE_HEAD)
    network = Network(backbone, len(pseudo.parents))
    fine_labels = training.labels_on(task.runtime, pseudo.labels)

    def loss_of(network, batch, rows):
        return task.cross_entropy(network(batch), fine_labels(rows))

    def validate(network):
        probs = training.predict_probs(task.runtime, network, task.inputs, task.val_rows)
        coarse = learning.sum_by_parent(probs, pseudo.parents, task.dataset.K_C)
        return training.probability_scores(coarse, task.dataset.train.coarse_labels[task.val_rows])

    n_steps = training.epochs_to_steps(cfg, len(pseudo.rows), cfg.finetune.fine_epochs)
    phase = training.Phase("fine", pseudo.rows, n_steps, cfg.finetune.fine_lr, "finetune.fine_lr", images_before)
    fit = task.fit(network, phase, loss_of, validate)
    network.load_state_dict(fit.state)
    return network, fit


def coarse_phase(cfg, task, network, images_before):
    """Give the fine network a coarse head (a new layer, or one stacked on the fine layer) and train it on all rows."""
    from torch import nn

    from utils import learning, models, training

    training.seed_weights(cfg, learning.COARSE_HEAD)
    if cfg.finetune.head == "stack":
        network.head = nn.Sequential(network.head, nn.Linear(network.head.out_features, task.dataset.K_C))
    else:
        network.head = nn.Linear(network.backbone.n_features, task.dataset.K_C)
    if cfg.finetune.freeze:
        models.freeze_all_but_norm_and_head(network)
    n_steps = training.epochs_to_steps(cfg, len(task.train_rows), cfg.finetune.coarse_epochs)
    phase = training.Phase(
        "coarse", task.train_rows, n_steps, cfg.finetune.coarse_lr, "finetune.coarse_lr", images_before,
        first_epoch=cfg.finetune.fine_epochs,
    )  # fmt: skip
    fit = task.fit(network, phase, task.coarse_loss, task.coarse_validation)
    network.load_state_dict(fit.state)
    return network, fit


@command_line
def main(argv=None):
    cfg = parse_config(__doc__, argv)
    with open_stage(cfg, "finetune") as stage:
        if stage.finished:
            return
        from utils import learning

        task = learning.open_task(cfg, stage)
        pseudo = task.load_labels(cfg.finetune.labels)
        network, fine = fine_phase(cfg, task, pseudo)
        stage.save_torch("fine_model.pt", fine.state)
        fine_network = copy.deepcopy(network)  # scored on the test set at the end, with the coarse one
        network, coarse = coarse_phase(cfg, task, network, fine.images_seen)
        stage.save_torch("model.pt", coarse.state)
        task.report(
            network, coarse.images_seen, {"fine": fine.best_epoch, "coarse": coarse.best_epoch}, pseudo=pseudo,
            test_fine=task.score_fine(fine_network), labels=cfg.finetune.labels,
        )  # fmt: skip
        stage.finish(
            cfg.command("multihead.py", **{"multihead.labels": cfg.finetune.labels}), **task.runtime.describe()
        )


if __name__ == "__main__":
    main()
