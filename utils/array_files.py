"""Data sets that come as arrays: the user's own .npy files (data.name: arrays) and MedMNIST's .npz archives."""

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from utils.config import DataConfig, UserError
from utils.splits import Dataset, new_split

PATHMNIST = [
    "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
    "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
]  # fmt: skip


# The user's .npy files


def array_files(root: Path) -> list[Path]:
    """[train inputs, test inputs, train and test coarse labels, then fine labels and names.json where they exist]."""
    kinds = [kind for kind in ("images", "vectors") if (root / f"train_{kind}.npy").is_file()]
    if len(kinds) != 1:
        found = "both train_images.npy and train_vectors.npy" if kinds else "no train_images.npy or train_vectors.npy"
        raise UserError(f"data.root: {root} holds {found}; data.name=arrays needs one of the two")
    needed = [root / f"{part}_{what}.npy" for what in (kinds[0], "coarse_labels") for part in ("train", "test")]
    fine = [root / f"{part}_fine_labels.npy" for part in ("train", "test")]
    if any(path.is_file() for path in fine):
        needed += fine
    if missing := [path.name for path in needed if not path.is_file()]:
        raise UserError(f"data.root: {root} lacks {', '.join(missing)}; write each with np.save")
    names = root / "names.json"
    return [*needed, names] if names.is_file() else needed


def load_arrays(cfg: DataConfig) -> Dataset:
    files = array_files(Path(cfg.root))
    has_fine = len(files) >= 6
    names = _read_names(files[-1]) if files[-1].suffix == ".json" else {}
    splits = []
    for i in (0, 1):
        array = _load_npy(files[i], mmap_mode="r")
        inputs = (_as_images if files[i].stem.endswith("images") else _as_vectors)(array, files[i])
        coarse = _as_labels(_load_npy(files[2 + i]), len(inputs), files[2 + i])
        fine = _as_labels(_load_npy(files[4 + i]), len(inputs), files[4 + i]) if has_fine else None
        splits.append(new_split(inputs, coarse, fine))
    train, test = splits
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise UserError(f"{files[1]}: rows of shape {test.inputs.shape[1:]}, but {train.inputs.shape[1:]} in training")
    coarse = np.concatenate([split.coarse_labels for split in splits])
    coarse_names = names.get("coarse", _numbered("class", coarse))
    for split, path in zip(splits, files[2:4], strict=True):
        _check_range(split.coarse_labels, coarse_names, path)
    if not has_fine:
        return Dataset(train, test, coarse_names, None, None)
    fine = np.concatenate([split.fine_labels for split in splits])
    fine_names = names.get("fine", _numbered("fine", fine))
    for split, path in zip(splits, files[4:6], strict=True):
        _check_range(split.fine_labels, fine_names, path)
    if len(unused := np.setdiff1d(np.arange(len(fine_names)), fine)):
        raise UserError(f"{files[4]}: no row, in test neither, has label {unused[0]} ('{fine_names[unused[0]]}')")
    return Dataset(train, test, coarse_names, fine_names, _parents(fine, coarse, fine_names, coarse_names, files[4]))


def _parents(fine, coarse, fine_names, coarse_names, what: Path) -> np.ndarray:
    """(K_true,) int64: the one coarse class of each fine class.  Raises UserError where a fine class has two."""
    parents = np.zeros(len(fine_names), np.int64)
    parents[fine] = coarse
    if (mixed := parents[fine] != coarse).any():
        row = mixed.argmax()
        raise UserError(
            f"{what}: fine class {fine[row]} ('{fine_names[fine[row]]}') has rows in two coarse classes, "
            f"'{coarse_names[coarse[row]]}' and '{coarse_names[parents[fine[row]]]}'"
        )
    return parents


def _load_npy(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if "ickle" in str(error) or "Python objects" in str(error):
            error = "pickled objects are never loaded"
        raise UserError(f"{path}: no plain .npy array ({error}); write it again with np.save") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: no plain .npy array (an .npz archive); write it again with np.save")
    return array


def _as_images(array: np.ndarray, what: Path | str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise UserError(f"{what}: {array.dtype} of shape {array.shape}; images must be uint8 (N, H, W[, C]), C 1 or 3")
    if array.size == 0:
        raise UserError(f"{what}: holds no pixels, shape {array.shape}")
    return array[..., None] if array.ndim == 3 else array


def _as_vectors(array: np.ndarray, what: Path | str) -> np.ndarray:
    if array.dtype != np.float32 or array.ndim != 2 or array.size == 0:
        raise UserError(f"{what}: {array.dtype} of shape {array.shape}; vectors must be float32 (N, D), not empty")
    if not (finite := np.isfinite(array).all(axis=1)).all():
        raise UserError(f"{what}: row {finite.argmin()} holds NaN or infinity")
    return array


def _as_labels(array: np.ndarray, n: int, what: Path | str) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UserError(f"{what}: {array.dtype} of shape {array.shape}; labels must be integers of shape (N,)")
    if len(array) != n:
        raise UserError(f"{what}: {len(array)} labels for {n} rows")
    return array.astype(np.int64)


def _check_range(labels: np.ndarray, names: list[str], what: Path) -> None:
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(names):
        raise UserError(
            f"{what}: label {low if low < 0 else high} is out of range; "
            f"there are {len(names)} classes, so labels run from 0 to {len(names) - 1} without gaps"
        )


def _read_names(path: Path) -> dict[str, list[str]]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(names, dict) or names.keys() - {"coarse", "fine"}:
        raise UserError(f'{path}: must be {{"coarse": [...], "fine": [...]}}')
    for kind, entries in names.items():
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{path}: '{kind}' must be a list of names in the order of the labels")
        if len(set(entries)) != len(entries):
            raise UserError(f"{path}: '{kind}' has a name twice")
    return names


def _numbered(word: str, labels: np.ndarray) -> list[str]:
    return [f"{word} {c}" for c in range(len(np.unique(labels)))]


# MedMNIST: its classes are the coarse labels


def medmnist_path(cfg: DataConfig) -> Path:
    size = "" if cfg.image_size in (0, 28) else f"_{cfg.image_size}"
    return Path(cfg.root) / f"{cfg.name}{size}.npz"


def load_medmnist(cfg: DataConfig) -> Dataset:
    path = medmnist_path(cfg)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: no .npz file; get it again")
    splits = []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            # The official val split stays unused: validation rows come from the seed, as for every other data set.
            for part in ("train", "test"):
                images = _as_images(arrays[f"{part}_images"], f"{path}, {part}_images")
                labels = arrays[f"{part}_labels"]
                if labels.ndim == 2 and labels.shape[1] == 1:
                    labels = labels[:, 0]
                labels = _as_labels(labels, len(images), f"{path}, {part}_labels")
                splits.append(new_split(images, labels, None))
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; it must hold train_ and test_ images and labels") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged .npz file ({error}); get it again") from None
    labels = np.concatenate([split.coarse_labels for split in splits])
    names = PATHMNIST if cfg.name == "pathmnist" else _numbered("class", labels)
    _check_range(labels, names, path)
    return Dataset(*splits, names, None, None)
