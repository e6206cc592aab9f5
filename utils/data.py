"""Data sets as arrays: images or vectors with coarse labels and, where the source knows them, fine labels.

Row i of a split is image i of the source, in the source's own order. Coarse labels alone decide every draw (test part,
`data.limit`, validation); fine labels are carried for metrics, reports and the oracle control.
"""

import gzip
import hashlib
import http.client
import importlib.metadata
import math
import os
import zlib
from pathlib import Path

import numpy as np

from utils.array_files import array_files, load_arrays, load_medmnist, medmnist_path
from utils.config import MEDMNIST, DataConfig, UserError
from utils.image_folder import list_parts, load_image_folder
from utils.splits import Dataset, limit_rows, new_split, read_coarse_map, take, test_mask

DIGITS = [str(digit) for digit in range(10)]
FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
STL10 = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # where dataset-fashion-mnist (Debian, Ubuntu) puts it
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
TORCHVISION_FILES = {  # below data.root; the unlabelled images of STL-10 are not used
    "cifar10": [f"cifar-10-batches-py/{f}" for f in
                [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]],
    "cifar100": [f"cifar-100-python/{f}" for f in ("train", "test", "meta")],
    "stl10": [f"stl10_binary/{f}" for f in ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
}  # fmt: skip
HOW_TO_GET = {
    "fashion_mnist": "put its four IDX .gz files there, install the package dataset-fashion-mnist (Debian, Ubuntu)",
    "cifar10": "unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there",
    "cifar100": "unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz there",
    "stl10": "unpack http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz there",
    "svhn": "put train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers there",
}


def load_dataset(cfg: DataConfig, cache_dir: Path | None = None) -> Dataset:
    """Load `data.name`; downloads it first where torchvision can and `data.download` allows.

    cache_dir: where an image folder's decoded pixels are kept as a memory-mapped file, so that RAM does not grow with N
    and the next stage does not decode again; None keeps them in memory.
    Raises UserError for missing, damaged or contradictory data, naming the file or the setting.
    """
    _check_settings(cfg)
    signature = data_signature(cfg)
    if cfg.name == "imagefolder":
        dataset = load_image_folder(cfg, Path(cache_dir) if cache_dir else None)
    else:
        load = {"arrays": load_arrays, **dict.fromkeys(MEDMNIST, load_medmnist)}.get(cfg.name, _load_mapped)
        dataset = load(cfg)
        dataset.train = take(dataset.train, limit_rows(dataset.train.coarse_labels, cfg.limit))
    dataset.signature = signature
    counts = np.bincount(dataset.train.coarse_labels, minlength=dataset.K_C)
    if not counts.all():
        raise UserError(f"data.root: coarse class '{dataset.coarse_names[counts.argmin()]}' has no training rows")
    return dataset


def _check_settings(cfg: DataConfig) -> None:
    has_own_coarse = cfg.name in MEDMNIST or cfg.name == "arrays"
    if has_own_coarse and cfg.coarse_map:
        raise UserError(f"data.coarse_map: does not apply to {cfg.name}, which brings its coarse labels; leave it out")
    if not has_own_coarse and cfg.name != "imagefolder" and not cfg.coarse_map:
        raise UserError(
            f"data.coarse_map: {cfg.name} needs one that lists each coarse class's fine classes; "
            f"configs/{cfg.name}.yaml has one to copy"
        )
    if cfg.image_size and cfg.name not in MEDMNIST and cfg.name != "imagefolder":
        raise UserError(f"data.image_size: does not apply to {cfg.name}, whose images keep their size; leave it at 0")
    if cfg.name in MEDMNIST and cfg.image_size not in (0, 28, 64, 128, 224):
        raise UserError(f"data.image_size: {cfg.name} comes in 28, 64, 128 and 224 pixels, not {cfg.image_size}")


# Changed data


def data_signature(cfg: DataConfig) -> str:
    """sha256 that changes when the source files do; nothing is decoded.  Raises UserError where they are missing.

    Over names, sizes and contents (first and last MB of files above 64 MB); of an image folder, names and sizes only;
    of digits, scikit-learn's version. Settings such as data.limit do not enter: stages compare those themselves.
    """
    digest = hashlib.sha256(cfg.name.encode())
    if cfg.name == "digits":
        digest.update(f"load_digits of scikit-learn {importlib.metadata.version('scikit-learn')}".encode())
    elif cfg.name == "imagefolder":
        for file in (file for part in list_parts(Path(cfg.root)) for file in part):
            digest.update(os.fsencode(f"{file.name}\0{file.size}\n"))
    else:
        for path in source_files(cfg):
            digest.update(f"{path.name}\0{path.stat().st_size}\n".encode())
            _hash_content(digest, path)
    return digest.hexdigest()


def _hash_content(digest, path: Path, whole: int = 64 << 20, end: int = 1 << 20) -> None:
    with open(path, "rb") as file:
        if path.stat().st_size > whole:
            digest.update(file.read(end))
            file.seek(-end, os.SEEK_END)
        while chunk := file.read(end):
            digest.update(chunk)


def source_files(cfg: DataConfig) -> list[Path]:
    """The files of a data set that comes in files, downloaded first where torchvision can and `data.download` allows.

    Raises UserError naming data.root and the ways to get them.
    """
    root = Path(cfg.root)
    if cfg.name == "arrays":
        return array_files(root)
    if cfg.name in MEDMNIST:
        path = medmnist_path(cfg)
        if not path.is_file():
            raise UserError(
                f"data.root: {path} is missing; get {path.name} from https://medmnist.com, "
                "or set data.root to the folder that has it"
            )
        return [path]
    failure = ""
    if not (files := _present_files(cfg)) and cfg.download:
        failure = _download(cfg)
        files = _present_files(cfg)
    if not files:
        raise UserError(
            f"data.root: {root} does not hold {cfg.name}{failure}; {HOW_TO_GET[cfg.name]}, set data.root to the folder "
            f"that has it, or {'go online' if cfg.download else 'set data.download=true'}"
        )
    return files


def _present_files(cfg: DataConfig) -> list[Path]:
    """All files of a fashion_mnist, cifar10, cifar100, stl10 or svhn found on this machine, or []."""
    root = Path(cfg.root)
    if cfg.name == "fashion_mnist":
        folders = [root, root / "FashionMNIST" / "raw", FASHION_PACKAGE]
        choices = [[folder / (name + suffix) for name in IDX_FILES] for folder in folders for suffix in (".gz", "")]
    else:
        choices = [[root / name for name in TORCHVISION_FILES[cfg.name]]]
    return next((files for files in choices if all(path.is_file() for path in files)), [])


def _download(cfg: DataConfig) -> str:
    """Let torchvision download the data set; returns '' or why it failed."""
    from filelock import FileLock

    try:
        Path(cfg.root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(cfg.root) / f".{cfg.name}.lock"):  # ranks of one job do not write over each other
            if not _present_files(cfg):
                _open_torchvision(cfg, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        return f" (the download failed: {' '.join(str(error).split())})"
    return ""


def _open_torchvision(cfg: DataConfig, download: bool = False) -> list:
    """torchvision's [train, test] objects, which check md5 sums and so raise RuntimeError on other or damaged files."""
    from torchvision import datasets

    class LabelledSTL10(datasets.STL10):
        train_list = datasets.STL10.train_list[:2]  # neither needs nor checks the 2.6 GB of unlabelled images

    if cfg.name in ("stl10", "svhn"):
        kind = LabelledSTL10 if cfg.name == "stl10" else datasets.SVHN
        return [kind(cfg.root, split=split, download=download) for split in ("train", "test")]
    kind = {"fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    return [kind[cfg.name](cfg.root, train=train, download=download) for train in (True, False)]


# Sets with fine labels and a coarse_map: digits, fashion_mnist, cifar10, cifar100, stl10, svhn


def _load_mapped(cfg: DataConfig) -> Dataset:
    read = {"digits": _read_digits, "fashion_mnist": _read_fashion_mnist}.get(cfg.name, _read_torchvision)
    parts, fine_names = read(cfg)
    coarse_names, fine_to_coarse = read_coarse_map(cfg.coarse_map, fine_names)
    for _, fine in parts:
        if len(fine) and not 0 <= fine.min() <= fine.max() < len(fine_names):
            raise UserError(f"data.root: {cfg.name} holds label {fine.max()}, beyond its {len(fine_names)} classes")
    splits = [new_split(images, fine_to_coarse[fine], fine) for images, fine in parts]
    if len(splits) == 1:
        is_test = test_mask(splits[0].coarse_labels, cfg.test_fraction)
        splits = [take(splits[0], np.flatnonzero(mask)) for mask in (~is_test, is_test)]
    return Dataset(*splits, coarse_names, fine_names, fine_to_coarse)


def _read_digits(cfg: DataConfig) -> tuple[list, list[str]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return [(images[..., None], digits.target.astype(np.int64))], DIGITS


def _read_fashion_mnist(cfg: DataConfig) -> tuple[list, list[str]]:
    parts, files = [], source_files(cfg)
    for images_path, labels_path in (files[:2], files[2:]):
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise UserError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
        parts.append((images[..., None], labels.astype(np.int64)))
    return parts, FASHION


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """A uint8 array of `ndim` dimensions from an IDX file (magic 00 00 08 ndim, sizes as big-endian uint32, data).

    Gzip where the name ends in .gz.  Raises UserError on another magic number or a length unlike the header's.
    Source: http://yann.lecun.com/exdb/mnist (file format).
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); get it again") from None
    magic, start = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if raw[:4] != magic or len(raw) < start:
        raise UserError(f"{path}: starts with {raw[:4].hex(' ')}, not {magic.hex(' ')}: no IDX file of {ndim}-d bytes")
    shape = [int(size) for size in np.frombuffer(raw, ">u4", ndim, offset=4)]
    if len(raw) - start != math.prod(shape):
        raise UserError(f"{path}: holds {len(raw) - start} bytes, its header promises {shape}: truncated; get it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _read_torchvision(cfg: DataConfig) -> tuple[list, list[str]]:
    folder = source_files(cfg)[0].parent
    try:
        train, test = _open_torchvision(cfg)
    except RuntimeError:
        raise UserError(
            f"{folder}: the files of {cfg.name} fail torchvision's md5 check; delete them and get them again"
        ) from None
    names = {"stl10": STL10, "svhn": DIGITS}.get(cfg.name) or train.classes
    return [_as_channels_last(part) for part in (train, test)], names


def _as_channels_last(part) -> tuple[np.ndarray, np.ndarray]:
    is_cifar = hasattr(part, "targets")  # CIFAR is (N, H, W, C) and calls its labels targets; STL-10, SVHN (N, C, H, W)
    images = part.data if is_cifar else part.data.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(part.targets if is_cifar else part.labels, np.int64)
