"""Write the features of every image: the backbone's pooled output, without augmentation.

reads   <source>/model.pt (features.source, default coarse)
writes  features/<source>/{train.npy (N, D) float32, test.npy (N_test, D) float32}, row i = image i
usage   python extract_features.py --config configs/digits.yaml
"""

import sys

from utils.config import command_line, parse_config
from utils.stages import open_stage


def write_features(stage, name, runtime, backbone, inputs, n, batch_size):
    """Stream the features of all n rows into `<name>.npy`, so that memory does not grow with n."""
    import numpy as np
    from tqdm import tqdm

    from utils import training

    blocks = training.predict(runtime, backbone, inputs, np.arange(n), batch_size=batch_size)
    steps = tqdm(blocks, desc=name, total=training.n_blocks(n, batch_size), disable=None, leave=False)
    stage.stream_array(f"{name}.npy", (n, backbone.n_features), "float32", steps)
    print(f"{name}: {n:,} x {backbone.n_features}", file=sys.stderr)


@command_line
def main(argv=None):
    cfg = parse_config(__doc__, argv)
    with open_stage(cfg, "features") as stage:
        if stage.finished:
            return
        from utils import loader, models, training
        from utils.data import load_dataset

        runtime = training.pick_runtime(cfg)
        dataset = load_dataset(cfg.data, cfg.dataset_dir / "cache")
        path = stage.input(f"{cfg.features.source}/model.pt")
        backbone = runtime.place(models.load_backbone(cfg.model, dataset.train, path))
        for name, split in (("train", dataset.train), ("test", dataset.test)):
            inputs = loader.Inputs(split, runtime.device)
            write_features(stage, name, runtime, backbone, inputs, split.n, cfg.features.batch_size)
        sizes = ", ".join(f"{split.n:,} x {backbone.n_features}" for split in (dataset.train, dataset.test))
        print(f"{stage.folder}: train, test {sizes}")
        stage.finish(cfg.command("uncertainty_filter.py"), **runtime.describe())


if __name__ == "__main__":
    main()
