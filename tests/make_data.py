"""Write small data sets in the real file formats. Every writer returns what a correct reader must give back."""

import gzip
import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def random_images(n: int, size: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 (n, size, size, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), np.uint8)


def cycling_labels(n: int, n_classes: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64) % n_classes


def write_idx(path: Path, array: np.ndarray) -> None:
    """uint8 array -> IDX; gzip where the name ends in .gz."""
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_fashion_mnist(folder: Path, n_train: int = 40, n_test: int = 20, suffix: str = ".gz") -> dict:
    made = {}
    for part, n, seed in (("train", n_train, 0), ("t10k", n_test, 1)):
        images, labels = random_images(n, 28, 1, seed), cycling_labels(n, 10)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[..., 0])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels.astype(np.uint8))
        made["train" if part == "train" else "test"] = images, labels
    return made


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, n_classes: int, monkeypatch, n_batch: int = 20) -> dict:
    """CIFAR-10 (n_classes 10) or CIFAR-100 pickles; torchvision's md5 list is set to theirs."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if n_classes == 10 else datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for part, files in (("train", kind.train_list), ("test", kind.test_list)):
        parts = []
        for i, (name, _) in enumerate(files):
            images = random_images(n_batch if n_classes == 10 else 2 * n_classes, seed=i + 7 * (part == "test"))
            labels = (cycling_labels(len(images), n_classes) + i) % n_classes
            key = "labels" if n_classes == 10 else "fine_labels"
            flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
            (folder / name).write_bytes(pickle.dumps({"data": flat, key: labels.tolist()}))
            parts.append((images, labels))
        made[part] = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        monkeypatch.setattr(kind, f"{part}_list", [[name, md5(folder / name)] for name, _ in files])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: cifar_names(n_classes)}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    return made


def cifar_names(n_classes: int) -> list[str]:
    """CIFAR's fine names in the order of its labels: CIFAR-100's are sorted."""
    if n_classes == 10:
        return "airplane automobile bird cat deer dog frog horse ship truck".split()
    import yaml

    config = yaml.safe_load((Path(__file__).parents[1] / "configs" / "cifar100.yaml").read_text())
    return sorted(name for members in config["data"]["coarse_map"].values() for name in members)


def write_stl10(root: Path, monkeypatch, n_train: int = 20, n_test: int = 10) -> dict:
    """STL-10's labelled files (images stored channel, column, row; labels from 1), without the unlabelled ones."""
    from torchvision import datasets

    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for part, n in (("train", n_train), ("test", n_test)):
        images, labels = random_images(n, 96, seed=n), cycling_labels(n, 10)
        (folder / f"{part}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        (folder / f"{part}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        made[part] = images, labels
    for entries in ("train_list", "test_list"):
        real = getattr(datasets.STL10, entries)
        ours = [[name, md5(folder / name) if (folder / name).exists() else sum_] for name, sum_ in real]
        monkeypatch.setattr(datasets.STL10, entries, ours)
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    (folder / "class_names.txt").write_text("\n".join(names))
    (folder / "fold_indices.txt").write_text("\n".join([" ".join(map(str, range(10)))] * 10))
    return made


def write_svhn(root: Path, monkeypatch, n_train: int = 30, n_test: int = 20) -> dict:
    """SVHN's .mat files: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    from scipy.io import savemat
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    made, sums = {}, dict(datasets.SVHN.split_list)
    for part, n in (("train", n_train), ("test", n_test)):
        images, labels = random_images(n, seed=n), cycling_labels(n, 10)
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        sums[part] = [sums[part][0], path.name, md5(path)]
        made[part] = images, labels
    monkeypatch.setattr(datasets.SVHN, "split_list", sums)
    return made


def write_medmnist(path: Path, n_classes: int, size: int = 28, channels: int = 3, n: int = 40) -> dict:
    """A MedMNIST .npz with train, val and test; grey images have no channel axis, labels are (N, 1)."""
    arrays, made = {}, {}
    for seed, part in enumerate(("train", "val", "test")):
        images, labels = random_images(n, size, channels, seed), cycling_labels(n, n_classes)
        arrays[f"{part}_images"] = images[..., 0] if channels == 1 else images
        arrays[f"{part}_labels"] = labels[:, None].astype(np.uint8)
        made[part] = images, labels
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return made


def write_images(root: Path, names: list[str], size: tuple[int, int] = (8, 6), seed: int = 0) -> dict[str, np.ndarray]:
    """RGB images of `size` (width, height) at root/name, lossless for .png; returns name -> (H, W, 3)."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in names:
        made[name] = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made[name]).save(root / name)
    return made


def folder_names(classes: list[str], n: int, part: str = "") -> list[str]:
    """n .png names in each class folder, sorted: ['cat/0.png', ...]."""
    return sorted(f"{part}{name}/{i}.png" for name in classes for i in range(n))


def write_arrays(
    root: Path, n_train: int = 60, n_test: int = 30, kind: str = "images", fine: bool = True, names: bool = True
) -> dict:
    """data.name=arrays: 2 coarse classes (a, b) of 2 fine classes each; `kind` images (8x8x3) or vectors (5)."""
    root.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, (part, n) in enumerate((("train", n_train), ("test", n_test))):
        rng = np.random.default_rng(seed)
        fine_labels = cycling_labels(n, 4)
        inputs = random_images(n, 8, 3, seed) if kind == "images" else rng.normal(size=(n, 5)).astype(np.float32)
        made[part] = inputs, fine_labels // 2, fine_labels
        np.save(root / f"{part}_{kind}.npy", inputs)
        np.save(root / f"{part}_coarse_labels.npy", fine_labels // 2)
        if fine:
            np.save(root / f"{part}_fine_labels.npy", fine_labels)
    if names:
        entries = {"coarse": ["a", "b"]} | ({"fine": ["a0", "a1", "b0", "b1"]} if fine else {})
        (root / "names.json").write_text(json.dumps(entries))
    return made
