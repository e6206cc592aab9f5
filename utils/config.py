"""Every setting of coarse2fine: its type, default, unit and meaning, and how it is read.

A stage calls `parse_config(__doc__, argv)`. Defaults are the dataclasses below; a YAML file (`--config`) holds only
what differs; `key=value` on the command line wins. Nothing heavy is imported here, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import functools
import math
import re
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

MEDMNIST = (
    "pathmnist dermamnist octmnist pneumoniamnist retinamnist breastmnist bloodmnist tissuemnist "
    "organamnist organcmnist organsmnist"
).split()
DATASETS = ["digits", "fashion_mnist", "cifar10", "cifar100", "stl10", "svhn", *MEDMNIST, "imagefolder", "arrays"]
SCORES = ["signed_max_prob", "entropy", "mutual_information", "variation_ratio", "margin"]
EXACT_METRICS = ["euclidean", "cosine", "correlation"]  # that utils/neighbours.py searches by matrix product
CLUSTER_METHODS = ["umap_hdbscan", "kmeans", "gmm", "random", "oracle"]


class UserError(Exception):
    """A mistake the user can mend: shown as one line on stderr, exit code 2, never a traceback."""


def check_choice(key: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean: '{near[0]}'?" if near else ""
        raise UserError(f"{key}: '{value}' is not one of {', '.join(choices)}.{hint}")


def check_range(key: str, value: float, low: float | None = None, high: float | None = None, open_low: bool = False):
    """Raise UserError unless value is finite, low <= value <= high (low < value with `open_low`); None = no bound."""
    above = low is None or (value > low if open_low else value >= low)
    if not (math.isfinite(value) and above and (high is None or value <= high)):
        bounds = [f"{'greater than' if open_low else 'at least'} {low}" if low is not None else "",
                  f"at most {high}" if high is not None else "finite" * (not math.isfinite(value))]  # fmt: skip
        raise UserError(f"{key}: {value} is out of range; it must be {' and '.join(b for b in bounds if b)}")


@dataclass
class DataConfig:
    name: str = "digits"  # which data set; see configs/ for one YAML each
    root: str = "data"  # folder with the data set's files
    limit: int = 0  # rows; use a coarse-stratified part of the training rows, the same for every seed; 0 = all
    val_fraction: float = 0.1  # share of the training rows held out for validation, drawn from the seed
    test_fraction: float = 0.2  # share held out as test where the source has no test split; the same for every seed
    coarse_map: dict[str, list[Any]] = field(default_factory=dict)  # coarse class: [its fine classes by name]
    image_size: int = 0  # pixels; image folders: resize the short side and crop the centre to this; 0 = as stored
    skip_unreadable: bool = False  # image folders: go on without the images that cannot be read
    download: bool = True  # let torchvision download a missing data set
    decode: str = "auto"  # image folders: once (into a file on disk) | always (on the fly) | auto (once if it fits)
    workers: int = 0  # image folders: threads that decode; 0 = one a core, at most 16

    def __post_init__(self):
        check_choice("data.name", self.name, DATASETS)
        check_range("data.limit", self.limit, 0)
        check_range("data.val_fraction", self.val_fraction, 0, 0.9, open_low=True)
        check_range("data.test_fraction", self.test_fraction, 0, 0.9, open_low=True)
        check_range("data.image_size", self.image_size, 0)
        check_choice("data.decode", self.decode, ["auto", "once", "always"])
        check_range("data.workers", self.workers, 0)


@dataclass
class ModelConfig:
    width: int = 64  # channels of ResNet18's first stage; all stages scale with it
    pretrained: bool = False  # start from torchvision's ImageNet weights (all but a replaced stem)
    mlp: list[int] = field(default_factory=lambda: [64, 64, 64, 64])  # hidden sizes of the network used on vectors

    def __post_init__(self):
        check_range("model.width", self.width, 1)
        for size in self.mlp or [0]:
            check_range("model.mlp", size, 1)
        if self.pretrained and self.width != 64:
            raise UserError(f"model.width: {self.width} does not go with model.pretrained=true, whose width is 64")


@dataclass
class LoaderConfig:
    """How images reach the network; changes no result."""

    placement: str = "auto"  # where images wait: auto (device if they fit) | device (as uint8) | host (copied by batch)
    prefetch: int = 2  # placement host: batches made ready ahead of the step

    def __post_init__(self):
        check_choice("loader.placement", self.placement, ["auto", "device", "host"])
        check_range("loader.prefetch", self.prefetch, 1)


@dataclass
class CropFlipConfig:
    key: ClassVar[str] = "crop_flip"
    crop_padding: int = 4  # pixels of black border before a random crop of the old size; 0 = no crop
    hflip_p: float = 0.5  # probability of a horizontal flip
    vflip_p: float = 0.0  # probability of a vertical flip
    cutout: int = 0  # pixels; side of a square blacked out at a random place, cut off at the border; 0 = none

    def __post_init__(self):
        check_range(f"{self.key}.crop_padding", self.crop_padding, 0)
        check_range(f"{self.key}.hflip_p", self.hflip_p, 0, 1)
        check_range(f"{self.key}.vflip_p", self.vflip_p, 0, 1)
        check_range(f"{self.key}.cutout", self.cutout, 0)


@dataclass
class StrongConfig(CropFlipConfig):
    """The augmentation of contrastive learning (SimCLR's for small images, its strength 0.5)."""

    key: ClassVar[str] = "strong"
    crop_padding: int = 0  # pixels, as crop_flip.crop_padding
    resized_crop_scale: float = 0.2  # least share of the area in a random resized crop, sides 3:4 to 4:3; 1 = none
    jitter_p: float = 0.8  # probability of the colour jitter
    brightness: float = 0.4  # colour jitter: factor from [1 - b, 1 + b]
    contrast: float = 0.4  # colour jitter: factor from [1 - c, 1 + c]
    saturation: float = 0.4  # colour jitter: factor from [1 - s, 1 + s]; grey images have none
    hue: float = 0.1  # colour jitter: shift from [-h, h] of the whole circle; grey images have none
    grey_p: float = 0.2  # probability of losing all colour
    blur_p: float = 0.0  # probability of a Gaussian blur, sigma from [0.1, 2] pixels
    rotation: float = 0.0  # degrees; angle from [-r, r], black outside

    def __post_init__(self):
        super().__post_init__()
        check_range(f"{self.key}.resized_crop_scale", self.resized_crop_scale, 0, 1, open_low=True)
        for name in ("jitter_p", "grey_p", "blur_p", "brightness", "contrast", "saturation"):
            check_range(f"{self.key}.{name}", getattr(self, name), 0, 1)
        check_range(f"{self.key}.hue", self.hue, 0, 0.5)
        check_range(f"{self.key}.rotation", self.rotation, 0, 180)


@dataclass
class TrainConfig:
    """Settings that every training stage shares; the optimiser is SGD with Nesterov momentum and a one-cycle rate."""

    batch_size: int = 256  # images a step
    momentum: float = 0.9  # Nesterov; 0 = plain SGD
    weight_decay: float = 5e-4  # L2 penalty on all parameters
    label_smoothing: float = 0.0  # share of the target spread over all classes
    warmup: float = 0.3  # share of the steps in which the one-cycle learning rate rises

    def __post_init__(self):
        check_range("train.batch_size", self.batch_size, 2)
        check_range("train.momentum", self.momentum, 0, 0.9999)
        check_range("train.weight_decay", self.weight_decay, 0)
        check_range("train.label_smoothing", self.label_smoothing, 0, 0.9999)
        check_range("train.warmup", self.warmup, 0, 0.9999, open_low=True)


@dataclass
class CoarseConfig:
    epochs: int = 60  # passes over the training rows
    lr: float = 0.1  # peak learning rate
    match: str = ""  # a learner's folder (finetune/umap_hdbscan): train for as many images as it saw -> coarse_matched/

    def __post_init__(self):
        check_range("coarse.epochs", self.epochs, 1)
        check_range("coarse.lr", self.lr, 0, open_low=True)
        if self.match and not re.match(r"(finetune|multihead)/", self.match):
            raise UserError(f"coarse.match: '{self.match}' is no learner's folder such as finetune/umap_hdbscan")
        if self.match:
            check_name("coarse.match", self.match)


@dataclass
class FeaturesConfig:
    source: str = "coarse"  # stage folder whose model.pt makes the features
    batch_size: int = 512  # images a forward pass; changes no result

    def __post_init__(self):
        check_name("features.source", self.source)
        check_range("features.batch_size", self.batch_size, 1)


@dataclass
class ViewsConfig(StrongConfig):
    """The original's views are flips; every other augmentation can be switched on."""

    key: ClassVar[str] = "filter.views"
    hflip_p: float = 0.8  # probability of a horizontal flip
    vflip_p: float = 0.3  # probability of a vertical flip
    resized_crop_scale: float = 1.0  # as strong.resized_crop_scale
    jitter_p: float = 0.0  # probability of the colour jitter, whose ranges are those of `strong`
    grey_p: float = 0.0  # probability of losing all colour


@dataclass
class FilterConfig:
    score: str = "signed_max_prob"  # signed_max_prob | entropy | mutual_information | variation_ratio | margin
    n_views: int = 5  # augmented views of each image
    views: ViewsConfig = field(default_factory=ViewsConfig)  # how a view is made
    keep_fraction: float = 0.9  # share of each coarse class's training rows that is kept, the most certain first
    suspect_min_prob: float = 0.5  # suspects.csv lists contradicted rows whose mean probability is at least this
    batch_size: int = 512  # views a forward pass; changes no result

    def __post_init__(self):
        check_choice("filter.score", self.score, SCORES)
        check_range("filter.n_views", self.n_views, 1)
        if self.n_views < 2 and self.score in ("mutual_information", "variation_ratio"):
            raise UserError(f"filter.n_views: {self.n_views} is too few for filter.score={self.score}; use 2 or more")
        check_range("filter.keep_fraction", self.keep_fraction, 0, 1, open_low=True)
        check_range("filter.suspect_min_prob", self.suspect_min_prob, 0, 1)
        check_range("filter.batch_size", self.batch_size, 1)


@dataclass
class ClusterConfig:
    method: str = "umap_hdbscan"  # umap_hdbscan | kmeans | gmm | random | oracle
    source: str = ""  # name of the folder under labels/; empty = the method's name
    random_of: str = "umap_hdbscan"  # method random: the labels whose rows and group sizes are shuffled
    normalize: bool = True  # divide each feature row by its L2 norm first
    n_neighbors: int = 30  # UMAP: rows in a neighbourhood
    min_dist: float = 0.0  # UMAP: least distance in the embedding
    n_components: int = 4  # UMAP: dimensions of the embedding
    metric: str = "euclidean"  # UMAP: distance between features
    n_epochs: int = 0  # UMAP: layout steps; 0 = umap-learn's choice by size
    min_cluster_size: int | float = 100  # HDBSCAN: rows (2 or more), or a fraction of the class's rows (below 1)
    min_samples: int = 0  # HDBSCAN: rows in a core neighbourhood; 0 = min_cluster_size
    cluster_selection_method: str = "eom"  # HDBSCAN: eom | leaf
    cluster_selection_epsilon: float = 0.0  # HDBSCAN: clusters nearer than this are merged
    allow_single_cluster: bool = False  # HDBSCAN: may answer with one cluster
    noise: str = "soft"  # HDBSCAN's noise rows: soft (most likely cluster) | keep (-1) | nearest (nearest labelled row)
    assign: str = "none"  # training rows outside the fit: none (-1) | nearest (k-NN vote inside the coarse class)
    assign_k: int = 10  # neighbours that vote where assign, noise or a test row needs a nearest label
    n_clusters: int = 0  # kmeans, gmm: clusters in each coarse class; 0 = the best silhouette from k_min to k_max
    k_min: int = 2  # kmeans, gmm: fewest clusters tried
    k_max: int = 10  # kmeans, gmm: most clusters tried
    knn: str = "auto"  # UMAP's neighbours: exact (euclidean, cosine, correlation) | umap (its own) | auto (the faster)
    knn_memory_mb: int = 512  # MB; bound of the block of distances that exact neighbours are found in
    n_jobs: int = 0  # coarse classes clustered at once, each in a process of its own; 0 = one a core (dask: a thread)
    joblib_backend: str = "loky"  # loky (processes of this machine) | dask (workers of dask_scheduler)
    dask_scheduler: str = ""  # joblib_backend dask: the scheduler's address, such as tcp://10.0.0.1:8786

    def __post_init__(self):
        check_choice("cluster.method", self.method, CLUSTER_METHODS)
        if self.source:  # load_config fills it in: here it would become the default's and outlive another method
            check_name("cluster.source", self.source)
        check_name("cluster.random_of", self.random_of)
        check_range("cluster.n_neighbors", self.n_neighbors, 2)
        check_range("cluster.min_dist", self.min_dist, 0, 0.99)
        check_range("cluster.n_components", self.n_components, 2)
        check_choice("cluster.metric", self.metric, ["euclidean", "cosine", "manhattan", "chebyshev", "correlation"])
        check_range("cluster.n_epochs", self.n_epochs, 0)
        if not (0 < self.min_cluster_size < 1 or (self.min_cluster_size >= 2 and self.min_cluster_size % 1 == 0)):
            size = self.min_cluster_size
            raise UserError(f"cluster.min_cluster_size: {size} is neither a count of 2 or more nor a fraction below 1")
        check_range("cluster.min_samples", self.min_samples, 0)
        check_choice("cluster.cluster_selection_method", self.cluster_selection_method, ["eom", "leaf"])
        check_range("cluster.cluster_selection_epsilon", self.cluster_selection_epsilon, 0)
        check_choice("cluster.noise", self.noise, ["soft", "keep", "nearest"])
        check_choice("cluster.assign", self.assign, ["none", "nearest"])
        check_range("cluster.assign_k", self.assign_k, 1)
        check_range("cluster.n_clusters", self.n_clusters, 0)
        check_range("cluster.k_min", self.k_min, 2)
        check_range("cluster.k_max", self.k_max, self.k_min)
        check_choice("cluster.knn", self.knn, ["auto", "exact", "umap"])
        if self.knn == "exact" and self.metric not in EXACT_METRICS:
            raise UserError(f"cluster.knn: exact does not know cluster.metric={self.metric}; use auto or umap")
        check_range("cluster.knn_memory_mb", self.knn_memory_mb, 1)
        check_range("cluster.n_jobs", self.n_jobs, 0)
        check_choice("cluster.joblib_backend", self.joblib_backend, ["loky", "dask"])
        if (self.joblib_backend == "dask") != bool(self.dask_scheduler):
            raise UserError("cluster.dask_scheduler: it and cluster.joblib_backend=dask need each other; set both")


@dataclass
class FinetuneConfig:
    labels: str = "umap_hdbscan"  # folder under labels/ to learn from
    init: str = "scratch"  # weights that the fine phase starts from: scratch | coarse (coarse/model.pt's backbone)
    head: str = "replace"  # coarse phase: replace the fine layer | stack a coarse layer on top of it
    freeze: bool = False  # coarse phase: train normalisation layers and head alone
    fine_epochs: int = 60  # passes over the rows with a pseudo label
    fine_lr: float = 0.1  # peak learning rate of the fine phase
    coarse_epochs: int = 60  # passes over all training rows
    coarse_lr: float = 0.1  # peak learning rate of the coarse phase

    def __post_init__(self):
        check_name("finetune.labels", self.labels)
        check_choice("finetune.init", self.init, ["scratch", "coarse"])
        check_choice("finetune.head", self.head, ["replace", "stack"])
        check_range("finetune.fine_epochs", self.fine_epochs, 1)
        check_range("finetune.fine_lr", self.fine_lr, 0, open_low=True)
        check_range("finetune.coarse_epochs", self.coarse_epochs, 1)
        check_range("finetune.coarse_lr", self.coarse_lr, 0, open_low=True)


@dataclass
class MultiheadConfig:
    labels: str = "umap_hdbscan"  # folder under labels/ to learn from
    init: str = "scratch"  # weights to start from: scratch | coarse (coarse/model.pt's backbone)
    alpha: float = 0.9  # weight of the coarse loss; the fine loss has 1 - alpha
    epochs: int = 60  # passes over all training rows
    lr: float = 0.1  # peak learning rate

    def __post_init__(self):
        check_name("multihead.labels", self.labels)
        check_choice("multihead.init", self.init, ["scratch", "coarse"])
        check_range("multihead.alpha", self.alpha, 0, 1)
        check_range("multihead.epochs", self.epochs, 1)
        check_range("multihead.lr", self.lr, 0, open_low=True)


@dataclass
class MetricsConfig:
    max_points: int = 5000  # rows of a coarse class that silhouette and DBCV are computed on, drawn from the seed

    def __post_init__(self):
        check_range("metrics.max_points", self.max_points, 10)


@dataclass
class ReproduceConfig:
    labels: list[str] = field(default_factory=lambda: ["umap_hdbscan", "random", "oracle"])  # FN and MH learn from each
    alphas: list[float] = field(default_factory=lambda: [0.1, 0.9])  # MH is trained with each of these
    processes: int = 1  # of this machine, one GPU each, that train and infer together (torchrun); 1 = without torchrun

    def __post_init__(self):
        for name in self.labels:
            check_name("reproduce.labels", name)
        for alpha in self.alphas:
            check_range("reproduce.alphas", alpha, 0, 1)
        check_range("reproduce.processes", self.processes, 1)


@dataclass
class Config:
    name: str = ""  # run name; empty = the config file's stem
    output_dir: str = "runs"  # results go to <output_dir>/<name>/seed<seed>/
    seed: int = 0  # fixes the validation rows, the weights, the order, every augmentation and UMAP
    seeds: list[int] = field(default_factory=lambda: [0])  # reproduce.py, report.py: one run each
    device: str = "auto"  # auto | cpu | cuda | cuda:<n>
    threads: int = 0  # CPU threads that torch uses in a stage; 0 = torch's choice, all cores
    precision: str = "auto"  # auto (bf16 where the hardware has it) | fp32 | bf16
    speed: str = "fast"  # fast | plain (every fast path off: the slow reference that benchmarks compare with)
    compile: str = "auto"  # torch.compile of the training step: auto (where it pays back in this run) | always | never
    augment: str = "crop_flip"  # training augmentation: none | crop_flip | strong
    crop_flip: CropFlipConfig = field(default_factory=CropFlipConfig)
    strong: StrongConfig = field(default_factory=StrongConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    coarse: CoarseConfig = field(default_factory=CoarseConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    multihead: MultiheadConfig = field(default_factory=MultiheadConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    reproduce: ReproduceConfig = field(default_factory=ReproduceConfig)

    # How this run was started, not settings: parse_config fills them in.
    config_path: ClassVar[str] = ""
    overrides: ClassVar[tuple[str, ...]] = ()
    force: ClassVar[bool] = False

    def __post_init__(self):
        check_range("seed", self.seed, 0, 2**31 - 1)
        for seed in self.seeds:
            check_range("seeds", seed, 0, 2**31 - 1)
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UserError(f"seeds: {self.seeds} must name at least one seed, each once")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device: '{self.device}' is not one of auto, cpu, cuda, cuda:<n>")
        check_range("threads", self.threads, 0)
        check_choice("precision", self.precision, ["auto", "fp32", "bf16"])
        check_choice("speed", self.speed, ["fast", "plain"])
        check_choice("compile", self.compile, ["auto", "always", "never"])
        check_choice("augment", self.augment, ["none", "crop_flip", "strong"])

    @property
    def run_dir(self) -> Path:
        return self.dataset_dir / f"seed{self.seed}"

    @property
    def dataset_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def arguments(self, script: str, **settings: str) -> list[str]:
        """What to give Python to run `script` with this configuration and `settings`.

        settings: {dotted key: value} in place of this configuration's; an empty value is the default.
        """
        config = ["--config", self.config_path] if self.config_path else []
        kept = [o for o in self.overrides if o.partition("=")[0] not in settings]
        flat = flatten(dataclasses.asdict(load_config(self.config_path, tuple(kept))))
        new = [f"{key}={value}" for key, value in settings.items() if value and str(flat[key]) != str(value)]
        return [script, *config, *kept, *new]

    def command(self, script: str, **settings: str) -> str:
        """The shell command of `arguments`, for messages that say what to do next: it can be pasted."""
        return shlex.join([interpreter(), *self.arguments(script, **settings)])


def interpreter() -> str:
    """What to type for this Python: `python`, or its path where it lies below this folder but is not on the PATH."""
    executable = Path(sys.executable)
    if executable.is_relative_to(Path.cwd()) and shutil.which("python") != str(executable):
        return str(executable.relative_to(Path.cwd()))
    return "python"


def add_setting(cfg: Config, **how) -> Config:
    """Set the how-it-was-started attributes on one instance."""
    for key, value in how.items():
        setattr(cfg, key, value)
    return cfg


def check_name(key: str, value: str) -> None:
    """Raise UserError unless `value` can be a folder name below the run folder (`finetune/umap_hdbscan` is one)."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+-]*)*", value):
        raise UserError(f"{key}: '{value}' is not a folder name of letters, digits and . _ + -")


def load_config(config_path: str = "", overrides: tuple[str, ...] = ()) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides.  Raises UserError naming the dotted key or the file."""
    tree = OmegaConf.structured(Config)
    if config_path:
        if not Path(config_path).is_file():
            raise UserError(f"{config_path}: no such config file; configs/ has one for each data set")
        try:
            from_file = OmegaConf.load(config_path)
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{config_path}: {_one_line(error)}") from None
        if not isinstance(from_file, DictConfig):
            raise UserError(f"{config_path}: must hold `key: value` lines")
        tree = _merge(tree, from_file)
    for item in overrides:
        if not re.match(r"[A-Za-z_][\w.]*=", item):
            raise UserError(f"{item}: expected key=value, for example coarse.epochs=30")
        try:
            from_shell = OmegaConf.from_dotlist([item])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{item}: {_one_line(error)}") from None
        tree = _merge(tree, from_shell)
    try:
        cfg = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UserError(_config_error(error)) from None
    cfg.cluster.source = cfg.cluster.source or cfg.cluster.method
    if cfg.speed == "plain":
        slow_down(cfg)
    cfg.name = cfg.name or (Path(config_path).stem if config_path else cfg.data.name)
    check_name("name", cfg.name)
    return add_setting(cfg, config_path=config_path, overrides=tuple(overrides))


def slow_down(cfg: Config) -> None:
    """What speed=plain means in terms of the other settings; utils/plain.py has the loops that go with it."""
    if cfg.precision == "bf16":
        raise UserError("precision: speed=plain computes in fp32; leave precision=bf16 out")
    cfg.precision, cfg.compile, cfg.loader.placement = "fp32", "never", "host"
    cfg.cluster.knn, cfg.cluster.n_jobs = "umap", 1


def _merge(tree: DictConfig, update: DictConfig) -> DictConfig:
    _check_shape(dataclasses.asdict(Config()), OmegaConf.to_container(update, resolve=False))
    # A map in the YAML replaces the one before it: merging two coarse maps key by key would mix two data sets.
    try:
        if OmegaConf.is_dict(update.get("data")) and "coarse_map" in update.data:
            tree.data.coarse_map = {}
        return OmegaConf.merge(tree, update)
    except OmegaConfBaseException as error:
        raise UserError(_config_error(error)) from None


def _check_shape(known: dict, given: dict, prefix: str = "") -> None:
    """Raise UserError where a list or a group of settings is given something else: OmegaConf's message names no key."""
    for key, value in given.items():
        default = known.get(key)
        if isinstance(default, list) and not isinstance(value, list):
            raise UserError(f"{prefix}{key}: expected a list such as {default}, not {value!r}")
        if isinstance(default, dict) and not isinstance(value, dict):
            raise UserError(f"{prefix}{key}: expected `name: value` entries, not {value!r}")
        if isinstance(default, dict):
            _check_shape(default, value, f"{prefix}{key}.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _config_error(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or "")
    first_line = (error.msg or str(error)).strip().splitlines()[0]
    if "not in" in first_line and key:
        known = [*flatten(dataclasses.asdict(Config())), *(f.name for f in dataclasses.fields(Config))]
        leaf = [k for k in known if k.rpartition(".")[2] == key]
        near = leaf[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        return f"{key}: no such setting." + (f" Did you mean: '{near[0]}'?" if near else "")
    return f"{key}: {first_line}" if key and key not in first_line else first_line


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}.  Empty dicts and coarse_map stay values: their keys are data, not settings."""
    flat = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value and key != "coarse_map":
            flat |= flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def settings_help() -> str:
    """One line a setting: dotted key, default."""
    flat = flatten(dataclasses.asdict(Config()))
    return "\n".join(f"  {key}={'' if value == '' else value}" for key, value in flat.items())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; --help shows what there is")


def parse_config(doc: str, argv: list[str] | None = None) -> Config:
    """Read the command line `--config FILE key=value ... [--force]`; `doc` is the script's docstring, for --help."""
    parser = _Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings and their defaults (utils/config.py says what each means):\n" + settings_help(),
    )
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file, for example configs/digits.yaml")
    parser.add_argument("--force", action="store_true", help="redo the stage although its results are there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args.config, tuple(args.overrides))
    return add_setting(cfg, force=args.force)


def command_line(main):
    """Decorate a script's `main(argv=None)`: a user's mistake is one line and exit 2, an interruption exit 130.

    Operating-system errors (full disk, read-only folder, missing file) count as the user's to mend; anything else is a
    bug of ours and keeps its traceback and exit code 1.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        try:
            return main(argv)
        except UserError as error:
            fail(f"error: {error}")
        except OSError as error:
            fail(f"error: {error.filename or 'file system'}: {error.strerror or error}")
        except KeyboardInterrupt as error:
            where = f": {error}" if str(error) else ""
            fail(f"interrupted{where}; run the same command to go on", 128 + signal.SIGINT)
        except RuntimeError as error:
            from utils import distributed

            if not distributed.lost_peer(error):
                raise
            fail("error: another process of this run has ended; the same command goes on from the last checkpoint", 1)

    return run


def fail(message: str, code: int = 2) -> None:
    """Print one line and exit; under torchrun one process of the run prints it."""
    from utils import distributed

    if distributed.speaks():
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(code) from None
