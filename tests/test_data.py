import os
import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import make_data
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils import data, image_folder, splits
from utils.config import DataConfig, UserError, load_config
from utils.data import data_signature, load_dataset, read_idx
from utils.splits import limit_rows, read_coarse_map, validation_mask

CONFIGS = Path(__file__).parents[1] / "configs"
DIGIT_MAP = {"round": [0, 6, 8, 9], "straight": [1, 4, 7], "curved": [2, 3, 5]}
FASHION_MAP = {
    "tops": ["t-shirt", "pullover", "coat", "shirt"],
    "legs": ["trouser", "dress"],
    "shoes": ["sandal", "sneaker", "ankle boot"],
    "bags": ["bag"],
}
CIFAR10_MAP = {
    "vehicle": ["airplane", "automobile", "ship", "truck"],
    "animal": ["bird", "cat", "deer", "dog", "frog", "horse"],
}


def config(name: str, root, **settings_) -> DataConfig:
    return DataConfig(name=name, root=str(root), download=False, **settings_)


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_split(split: splits.Split, images: np.ndarray, fine: np.ndarray, fine_to_coarse: np.ndarray) -> None:
    assert split.inputs.dtype == np.uint8 and split.inputs.flags.c_contiguous
    np.testing.assert_array_equal(split.inputs, images)
    np.testing.assert_array_equal(split.fine_labels, fine)
    np.testing.assert_array_equal(split.coarse_labels, fine_to_coarse[fine])
    assert split.coarse_labels.dtype == split.fine_labels.dtype == split.source_rows.dtype == np.int64
    np.testing.assert_array_equal(split.source_rows, np.arange(len(images)))
    assert split.names is None and split.n == len(images) and not split.is_vector
    assert split.row_name(3) == "3"


# Digits and the draws of test part and limit


def digits(**settings_) -> data.Dataset:
    return load_dataset(DataConfig(name="digits", coarse_map=settings_.pop("coarse_map", DIGIT_MAP), **settings_))


def test_digits_are_scaled_and_split_once_for_all_seeds():
    from sklearn.datasets import load_digits

    source, dataset = load_digits(), digits()
    train, test = dataset.train, dataset.test
    assert dataset.coarse_names == ["round", "straight", "curved"] and dataset.K_C == 3
    assert dataset.fine_names == [str(d) for d in range(10)]
    np.testing.assert_array_equal(dataset.fine_to_coarse, [0, 1, 2, 2, 1, 2, 0, 1, 0, 0])
    assert train.inputs.shape[1:] == (8, 8, 1) and train.inputs.dtype == np.uint8 and train.inputs.max() == 255
    assert sorted([*train.source_rows, *test.source_rows]) == list(range(1797))
    for split in (train, test):
        assert (np.diff(split.source_rows) > 0).all()
        expected = np.floor(source.images[split.source_rows] * 255 / 16 + 0.5)
        np.testing.assert_array_equal(split.inputs[..., 0], expected)
        np.testing.assert_array_equal(split.fine_labels, source.target[split.source_rows])
        np.testing.assert_array_equal(split.coarse_labels, dataset.fine_to_coarse[split.fine_labels])
    per_class = np.bincount(np.r_[train.coarse_labels, test.coarse_labels])
    np.testing.assert_array_equal(np.bincount(test.coarse_labels), np.rint(0.2 * per_class))
    np.testing.assert_array_equal(digits().test.source_rows, test.source_rows)
    assert abs(digits(test_fraction=0.5).test.n - 1797 / 2) <= 2


def test_limit_keeps_source_order_and_the_test_part():
    whole, part = digits(), digits(limit=200)
    assert part.train.n == 200 and (np.diff(part.train.source_rows) > 0).all()
    assert set(part.train.source_rows) <= set(whole.train.source_rows)
    np.testing.assert_array_equal(part.test.source_rows, whole.test.source_rows)
    assert digits(limit=5000).train.n == whole.train.n
    assert part.train.row_name(0) == str(part.train.source_rows[0])
    message = error_of(digits, limit=2)
    assert "data.limit: 2 is less than" in message and "3 coarse classes" in message


def test_fine_labels_decide_no_draw(monkeypatch):
    """Shuffling the fine labels inside each coarse class moves no row between training, test, limit and validation."""
    real, read = digits(limit=300), data._read_digits

    def read_shuffled(cfg):
        [(images, fine)], names = read(cfg)
        fine, coarse = fine.copy(), real.fine_to_coarse[fine]
        for c in range(3):
            fine[coarse == c] = np.random.default_rng(c).permutation(fine[coarse == c])
        return [(images, fine)], names

    monkeypatch.setattr(data, "_read_digits", read_shuffled)
    shuffled = digits(limit=300)
    assert (shuffled.train.fine_labels != real.train.fine_labels).any()
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(shuffled, part).source_rows, getattr(real, part).source_rows)


def test_a_single_coarse_class_is_allowed():
    assert digits(coarse_map={"all": list(range(10))}).K_C == 1


class_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def shuffled_labels(sizes: list[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@settings(max_examples=60, deadline=None)
@given(class_sizes, st.floats(0.01, 0.9), st.integers(0, 2**31 - 1))
def test_validation_is_stratified(sizes, fraction, seed):
    labels = shuffled_labels(sizes, 0)
    mask = validation_mask(labels, fraction, seed)
    assert mask.dtype == bool and mask.shape == labels.shape
    np.testing.assert_array_equal(mask, validation_mask(labels, fraction, seed))
    for c, n in enumerate(sizes):
        expected = 0 if n == 1 else min(max(round(fraction * n), 1), n - 1)
        assert mask[labels == c].sum() == expected


def test_validation_depends_on_the_seed():
    labels = np.zeros(200, np.int64)
    assert (validation_mask(labels, 0.1, 0) != validation_mask(labels, 0.1, 1)).any()


@settings(max_examples=60, deadline=None)
@given(class_sizes, st.integers(1, 500))
def test_limit_is_stratified_by_largest_remainder(sizes, limit):
    labels, n = shuffled_labels(sizes, 1), sum(sizes)
    if limit < min(len(sizes), n):
        assert "data.limit" in error_of(limit_rows, labels, limit)
        return
    rows = limit_rows(labels, limit)
    assert len(rows) == min(limit, n) and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, limit_rows(labels, limit))
    counts, shares = np.bincount(labels[rows], minlength=len(sizes)), np.array(sizes) * min(limit, n) / n
    assert (counts >= 1).all() and (counts <= sizes).all()
    if (shares >= 1).all():
        assert (np.abs(counts - shares) < 1).all()


@pytest.mark.parametrize("sizes, limit, counts", [([990, 10], 50, [49, 1]), ([500, 300, 200], 5, [3, 1, 1])])
def test_limit_by_hand(sizes, limit, counts):
    labels = shuffled_labels(sizes, 2)
    np.testing.assert_array_equal(np.bincount(labels[limit_rows(labels, limit)]), counts)


# coarse_map


def test_coarse_ids_follow_the_map():
    names, parents = read_coarse_map({"b": ["y", 3], "a": ["x"]}, ["x", "y", "3"])
    assert names == ["b", "a"] and parents.tolist() == [1, 0, 0] and parents.dtype == np.int64


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"tops": ["t-shirt", "pullovr", "coat", "shirt"]}, ["'pullovr' in 'tops'", "Did you mean: 'pullover'"]),
        ({"bags": ["zzz"]}, ["'zzz' in 'bags'", "Known: t-shirt, trouser"]),
        ({"tops": ["t-shirt", "coat", "shirt"]}, ["'pullover' missing"]),
        ({"bags": ["bag", "shirt"]}, ["'shirt' stands in 'tops' and again in 'bags'"]),
        ({"bags": ["bag", "bag"]}, ["'bag' stands in 'bags' and again in 'bags'"]),
        ({"hats": []}, ["coarse class 'hats' has no fine classes"]),
        ({"hats": None}, ["coarse class 'hats' has no fine classes"]),
    ],
)
def test_errors_in_a_coarse_map(change, parts):
    message = error_of(read_coarse_map, FASHION_MAP | change, data.FASHION)
    assert message.startswith("data.coarse_map: ") and all(part in message for part in parts)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "cifar100", "stl10", "svhn"])
def test_a_coarse_map_is_required(name, tmp_path):
    message = error_of(load_dataset, config(name, tmp_path))
    assert message.startswith(f"data.coarse_map: {name} needs one") and f"configs/{name}.yaml" in message
    assert (CONFIGS / f"{name}.yaml").is_file()


@pytest.mark.parametrize("name", ["pathmnist", "arrays"])
def test_a_coarse_map_that_does_not_apply(name, tmp_path):
    message = error_of(load_dataset, config(name, tmp_path, coarse_map={"a": ["b"]}))
    assert f"data.coarse_map: does not apply to {name}" in message


@pytest.mark.parametrize("name, size, part", [("digits", 32, "does not apply"), ("pathmnist", 32, "comes in 28, 64")])
def test_an_image_size_that_does_not_apply(name, size, part, tmp_path):
    coarse_map = DIGIT_MAP if name == "digits" else {}
    message = error_of(load_dataset, config(name, tmp_path, image_size=size, coarse_map=coarse_map))
    assert message.startswith("data.image_size: ") and part in message


# Fashion-MNIST


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist_files(tmp_path, suffix, folder):
    made = make_data.write_fashion_mnist(tmp_path / folder, suffix=suffix)
    dataset = load_dataset(config("fashion_mnist", tmp_path, coarse_map=FASHION_MAP))
    assert dataset.coarse_names == list(FASHION_MAP) and dataset.fine_names == data.FASHION
    assert dataset.fine_to_coarse.tolist() == [0, 1, 0, 1, 0, 2, 0, 2, 3, 2]
    for part in ("train", "test"):
        check_split(getattr(dataset, part), *made[part], dataset.fine_to_coarse)


@pytest.mark.skipif(not data.FASHION_PACKAGE.is_dir(), reason="package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_the_debian_package(tmp_path):
    dataset = load_dataset(config("fashion_mnist", tmp_path, coarse_map=FASHION_MAP))
    assert dataset.train.inputs.shape == (60000, 28, 28, 1) and dataset.test.inputs.shape == (10000, 28, 28, 1)
    assert dataset.train.fine_labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert dataset.test.fine_labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert (np.bincount(dataset.train.fine_labels) == 6000).all()


def test_damaged_idx_files(tmp_path):
    path = tmp_path / "x.gz"
    make_data.write_idx(path, np.zeros((3, 4, 5), np.uint8))
    assert read_idx(path, 3).shape == (3, 4, 5)
    assert "starts with 00 00 08 03, not 00 00 08 01" in error_of(read_idx, path, 1)
    path.write_bytes(path.read_bytes()[:-12])
    assert f"{path}: damaged gzip file" in error_of(read_idx, path, 3)
    path.write_bytes(b"<html>not found</html>")
    assert "damaged gzip file" in error_of(read_idx, path, 3)
    raw = tmp_path / "raw"
    make_data.write_idx(raw, np.zeros((3, 4, 5), np.uint8))
    raw.write_bytes(raw.read_bytes()[:-1])
    message = error_of(read_idx, raw, 3)
    assert "holds 59 bytes, its header promises [3, 4, 5]: truncated" in message
    raw.write_bytes(b"\0\0")
    assert "starts with 00 00, not" in error_of(read_idx, raw, 3)


def test_fashion_mnist_parts_that_do_not_fit(tmp_path):
    make_data.write_fashion_mnist(tmp_path)
    cfg = config("fashion_mnist", tmp_path, coarse_map=FASHION_MAP)
    make_data.write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(7, np.uint8))
    assert "7 labels for the 40 images of train-images-idx3-ubyte.gz" in error_of(load_dataset, cfg)
    make_data.write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.full(40, 37, np.uint8))
    assert "label 37, beyond its 10 classes" in error_of(load_dataset, cfg)


# torchvision's sets


@pytest.mark.parametrize("name, n_classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar(tmp_path, monkeypatch, name, n_classes):
    made = make_data.write_cifar(tmp_path, n_classes, monkeypatch)
    coarse_map = load_config(str(CONFIGS / f"{name}.yaml")).data.coarse_map
    dataset = load_dataset(config(name, tmp_path, coarse_map=coarse_map))
    assert dataset.fine_names == make_data.cifar_names(n_classes) and dataset.K_C == {10: 2, 100: 20}[n_classes]
    for part in ("train", "test"):
        check_split(getattr(dataset, part), *made[part], dataset.fine_to_coarse)
    if name == "cifar100":  # apple is fruit, aquarium_fish fish, baby people: the official superclasses 4, 1, 14
        assert dataset.fine_to_coarse[:3].tolist() == [4, 1, 14]
        assert (np.bincount(dataset.fine_to_coarse) == 5).all()


def test_stl10_without_its_unlabelled_images(tmp_path, monkeypatch):
    made = make_data.write_stl10(tmp_path, monkeypatch)
    coarse_map = load_config(str(CONFIGS / "stl10.yaml")).data.coarse_map
    dataset = load_dataset(config("stl10", tmp_path, coarse_map=coarse_map))
    assert dataset.fine_to_coarse.tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    for part in ("train", "test"):
        check_split(getattr(dataset, part), *made[part], dataset.fine_to_coarse)


def test_svhn(tmp_path, monkeypatch):
    made = make_data.write_svhn(tmp_path, monkeypatch)
    dataset = load_dataset(config("svhn", tmp_path, coarse_map=DIGIT_MAP))
    for part in ("train", "test"):
        check_split(getattr(dataset, part), *made[part], dataset.fine_to_coarse)


def test_a_damaged_torchvision_file(tmp_path, monkeypatch):
    make_data.write_cifar(tmp_path, 10, monkeypatch)
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_3", "ab") as file:
        file.write(b"x")
    message = error_of(load_dataset, config("cifar10", tmp_path, coarse_map=CIFAR10_MAP))
    assert "cifar-10-batches-py: the files of cifar10 fail torchvision's md5 check" in message


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "stl10", "svhn"])
def test_missing_files_name_the_ways_to_get_them(tmp_path, monkeypatch, name):
    monkeypatch.setattr(data, "FASHION_PACKAGE", tmp_path / "none")
    cfg = config(name, tmp_path / "absent", coarse_map={"a": ["b"]})
    message = error_of(load_dataset, cfg)
    assert f"data.root: {cfg.root} does not hold {name}; {data.HOW_TO_GET[name]}" in message
    assert message.endswith("set data.root to the folder that has it, or set data.download=true")
    assert error_of(data_signature, cfg) == message
    assert not Path(cfg.root).exists()


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "stl10", "svhn"])
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, name):
    from torchvision.datasets import utils

    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(utils, "_urlretrieve", no_network)
    monkeypatch.setattr(utils, "_get_redirect_url", no_network)
    monkeypatch.setattr(data, "FASHION_PACKAGE", tmp_path / "none")
    message = error_of(load_dataset, DataConfig(name=name, root=str(tmp_path), coarse_map={"a": ["b"]}))
    assert f"does not hold {name} (the download failed: " in message and message.endswith("or go online")


def test_a_missing_set_is_downloaded(tmp_path, monkeypatch):
    def download(cfg, download=False):
        if download:
            make_data.write_cifar(tmp_path, 10, monkeypatch)
        return real(cfg)

    real = data._open_torchvision
    monkeypatch.setattr(data, "_open_torchvision", download)
    dataset = load_dataset(DataConfig(name="cifar10", root=str(tmp_path), coarse_map=CIFAR10_MAP))
    assert dataset.train.n == 100


# MedMNIST


def test_pathmnist(tmp_path):
    made = make_data.write_medmnist(tmp_path / "pathmnist.npz", 9)
    dataset = load_dataset(config("pathmnist", tmp_path))
    assert dataset.K_C == 9 and dataset.coarse_names[0] == "adipose" and dataset.fine_names is None
    assert dataset.fine_to_coarse is None and dataset.train.fine_labels is None
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(dataset, part).inputs, made[part][0])
        np.testing.assert_array_equal(getattr(dataset, part).coarse_labels, made[part][1])


def test_a_grey_medmnist_set_of_another_size(tmp_path):
    made = make_data.write_medmnist(tmp_path / "organamnist_64.npz", 11, size=64, channels=1)
    dataset = load_dataset(config("organamnist", tmp_path, image_size=64, limit=20))
    assert dataset.coarse_names == [f"class {c}" for c in range(11)]
    assert dataset.train.n == 20 and dataset.test.inputs.shape == (40, 64, 64, 1)
    np.testing.assert_array_equal(dataset.train.inputs, made["train"][0][dataset.train.source_rows])


def test_errors_in_medmnist(tmp_path):
    cfg, path = config("breastmnist", tmp_path), tmp_path / "breastmnist.npz"
    message = error_of(load_dataset, cfg)
    assert f"data.root: {path} is missing; get breastmnist.npz from https://medmnist.com" in message
    path.write_bytes(b"<html>")
    assert f"{path}: no .npz file" in error_of(load_dataset, cfg)
    make_data.write_medmnist(path, 2)
    damaged = bytearray(path.read_bytes())
    damaged[400:500] = bytes(100)
    path.write_bytes(damaged)
    assert f"{path}: damaged .npz file" in error_of(load_dataset, cfg)
    np.savez(path, train_images=make_data.random_images(4))
    assert "train_labels" in error_of(load_dataset, cfg) and "must hold" in error_of(load_dataset, cfg)
    images, labels = make_data.random_images(4), np.array([[0, 1], [1, 0], [0, 0], [1, 1]])
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    assert "train_labels: int64 of shape (4, 2); labels must be integers" in error_of(load_dataset, cfg)
    labels = np.array([{}, {}, {}, {}], dtype=object)
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    assert f"{path}: damaged .npz file (Object arrays" in error_of(load_dataset, cfg)
    make_data.write_medmnist(tmp_path / "pathmnist.npz", 10)
    assert "label 9 is out of range; there are 9 classes" in error_of(load_dataset, config("pathmnist", tmp_path))


# Image folders


def test_coarse_folders_with_images_at_any_depth(tmp_path):
    names = make_data.folder_names(["cat", "dog/small"], 10) + ["dog/a.png", "dog/x/y/z.png"]
    made = make_data.write_images(tmp_path, names)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._0.png").write_bytes(b"macOS")
    dataset = load_dataset(config("imagefolder", tmp_path))
    assert dataset.coarse_names == ["cat", "dog"] and dataset.fine_names is None
    assert dataset.train.fine_labels is None and dataset.test.n == 2 + 2
    assert sorted(dataset.train.names + dataset.test.names) == sorted(names)
    for split in (dataset.train, dataset.test):
        assert split.names == sorted(split.names) == [sorted(names)[row] for row in split.source_rows]
        assert [dataset.coarse_names[c] for c in split.coarse_labels] == [name[:3] for name in split.names]
        np.testing.assert_array_equal(split.inputs, [made[name] for name in split.names])
    assert dataset.train.row_name(0) == dataset.train.names[0]


def test_sub_folders_are_fine_classes(tmp_path):
    names = make_data.folder_names(["cat/old", "cat/young", "dog/old"], 6)
    make_data.write_images(tmp_path, names)
    dataset = load_dataset(config("imagefolder", tmp_path))
    assert dataset.fine_names == ["cat/old", "cat/young", "dog/old"]
    assert dataset.fine_to_coarse.tolist() == [0, 0, 1]
    for split in (dataset.train, dataset.test):
        assert [dataset.fine_names[f] for f in split.fine_labels] == [name.rpartition("/")[0] for name in split.names]
        np.testing.assert_array_equal(split.coarse_labels, dataset.fine_to_coarse[split.fine_labels])


def test_train_and_test_folders(tmp_path):
    train = make_data.folder_names(["cat/a", "dog/b"], 5, "train/")
    test = make_data.folder_names(["cat/a", "dog/c"], 3, "test/")
    made = make_data.write_images(tmp_path, train + test)
    dataset = load_dataset(config("imagefolder", tmp_path))
    assert dataset.train.names == train and dataset.test.names == test
    assert dataset.fine_names == ["cat/a", "dog/b", "dog/c"] and dataset.test.source_rows.tolist() == list(range(6))
    np.testing.assert_array_equal(dataset.test.inputs, [made[name] for name in test])


def test_a_coarse_map_groups_flat_fine_folders(tmp_path):
    make_data.write_images(tmp_path, make_data.folder_names(["oak", "pine", "rose"], 5))
    dataset = load_dataset(config("imagefolder", tmp_path, coarse_map={"tree": ["pine", "oak"], "flower": ["rose"]}))
    assert dataset.coarse_names == ["tree", "flower"] and dataset.fine_names == ["oak", "pine", "rose"]
    assert dataset.fine_to_coarse.tolist() == [0, 0, 1]
    assert "'pine, rose' missing" in error_of(
        load_dataset, config("imagefolder", tmp_path, coarse_map={"tree": ["oak"]})
    )


def test_fine_folders_decide_no_draw(tmp_path):
    """Test part and limit are the same rows whether or not the sub-folders are read as fine classes."""
    make_data.write_images(tmp_path, make_data.folder_names(["cat/a", "cat/b", "dog/c"], 8))
    with_fine = load_dataset(config("imagefolder", tmp_path, limit=10))
    make_data.write_images(tmp_path, ["dog/c/x/deep.png"])
    os.rename(tmp_path / "dog/c/x/deep.png", tmp_path / "dog/c/7.png")  # depth 3 gone again, folder x stays empty
    (tmp_path / "dog/c/8").mkdir()
    os.rename(tmp_path / "dog/c/7.png", tmp_path / "dog/c/8/7.png")  # same order of paths, no fine classes now
    without = load_dataset(config("imagefolder", tmp_path, limit=10))
    assert with_fine.fine_names and without.fine_names is None and with_fine.train.n == 10
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(with_fine, part).source_rows, getattr(without, part).source_rows)


def save(path: Path, array: np.ndarray, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)
    return path


RGB = make_data.random_images(1, 8)[0]
GREY = RGB[..., 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm", "gif", "tga"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    array = np.stack([GREY] * 3, -1) if suffix == "gif" else RGB
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(GREY if suffix == "gif" else RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(image_folder.decode_image(path, 0), array)


@pytest.mark.filterwarnings("error")
def test_every_pixel_kind_becomes_rgb(tmp_path):
    three = np.stack([GREY] * 3, -1)
    np.testing.assert_array_equal(image_folder.decode_image(save(tmp_path / "grey.png", GREY), 0), three)
    rgba = np.dstack([RGB, GREY])
    np.testing.assert_array_equal(image_folder.decode_image(save(tmp_path / "rgba.png", rgba), 0), RGB)
    grey_alpha = np.dstack([GREY, GREY])
    np.testing.assert_array_equal(image_folder.decode_image(save(tmp_path / "la.png", grey_alpha), 0), three)
    palette = Image.fromarray(RGB).quantize(256)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(64)))
    np.testing.assert_array_equal(
        image_folder.decode_image(tmp_path / "palette.png", 0), np.asarray(palette.convert("RGB"))
    )
    Image.fromarray(GREY > 127).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(image_folder.decode_image(tmp_path / "bits.png", 0), np.where(three > 127, 255, 0))
    cmyk = Image.fromarray(RGB).convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(image_folder.decode_image(tmp_path / "cmyk.tif", 0), np.asarray(cmyk.convert("RGB")))
    cmyk.save(tmp_path / "cmyk.jpg")
    assert image_folder.decode_image(tmp_path / "cmyk.jpg", 0).shape == RGB.shape
    flat = np.full((8, 8, 3), [200, 100, 50], np.uint8)
    assert np.abs(image_folder.decode_image(save(tmp_path / "x.jpg", flat), 0).astype(int) - flat).max() < 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    deep = np.array([[0, 128, 129, 257], [32768, 65535, 65406, 65407]], np.uint16)
    found = image_folder.decode_image(save(tmp_path / f"deep.{suffix}", deep), 0)
    np.testing.assert_array_equal(found[..., 0], [[0, 0, 1, 1], [128, 255, 254, 255]])
    eight = save(tmp_path / f"eight.{suffix}", GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(image_folder.decode_image(eight, 0)[..., 2], GREY)
    np.testing.assert_array_equal(
        image_folder.decode_image(save(tmp_path / "i.tif", GREY.astype(np.int32) * 257), 0)[..., 1], GREY
    )


def test_pixels_of_unknown_range_are_refused(tmp_path):
    assert "floating-point" in image_folder.decode_image(save(tmp_path / "f.tif", GREY.astype(np.float32)), 0)
    assert "beyond 16 bits" in image_folder.decode_image(save(tmp_path / "i.tif", np.array([[70000]], np.int32)), 0)


def test_exif_orientation_is_respected(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    wide = RGB[:4]
    path = save(tmp_path / "x.png", wide, exif=exif)
    np.testing.assert_array_equal(image_folder.decode_image(path, 0), np.rot90(wide, -1))


def test_image_size_resizes_the_short_side_and_cuts_the_centre(tmp_path):
    for shape, box in (((16, 48, 3), (8, 0, 16, 8)), ((48, 16, 3), (0, 8, 8, 16))):
        array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        resized = Image.fromarray(array).resize((shape[1] // 2, shape[0] // 2), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image_folder.decode_image(save(tmp_path / "x.png", array), 8), resized.crop(box))
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[::2] = 255  # antialiasing averages what plain bilinear sampling at stride 4 would miss
    inner = image_folder.decode_image(save(tmp_path / "y.png", stripes), 8)[1:-1]
    assert np.abs(inner.astype(int) - 127).max() < 12
    assert image_folder.decode_image(save(tmp_path / "z.png", RGB), 20).shape == (20, 20, 3)
    np.testing.assert_array_equal(image_folder.decode_image(save(tmp_path / "w.png", RGB), 8), RGB)


def test_images_of_different_sizes(tmp_path):
    make_data.write_images(tmp_path, make_data.folder_names(["train/cat", "test/cat"], 4))
    make_data.write_images(tmp_path, ["train/cat/2.png", "train/cat/3.png"], size=(9, 5))
    message = error_of(load_dataset, config("imagefolder", tmp_path))
    assert "train/cat/2.png is 9x5 pixels but train/cat/0.png 8x6: set data.image_size" in message
    assert load_dataset(config("imagefolder", tmp_path, image_size=4)).train.inputs.shape == (4, 4, 4, 3)


@pytest.fixture
def damaged_folder(tmp_path):
    make_data.write_images(tmp_path / "d", make_data.folder_names(["train/cat", "train/dog", "test/cat"], 4))
    whole = (tmp_path / "d/train/cat/1.png").read_bytes()
    (tmp_path / "d/train/cat/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d/train/dog/0.png").write_bytes(b"")
    (tmp_path / "d/test/cat/3.png").write_text("a web page")
    os.symlink("gone.png", tmp_path / "d/train/dog/dead.png")
    return tmp_path / "d"


def test_every_unreadable_image_is_named(damaged_folder):
    message = error_of(load_dataset, config("imagefolder", damaged_folder))
    assert "4 of 13 images" in message and "data.skip_unreadable=true" in message
    assert "; train/dog/0.png (empty file); train/dog/dead.png (No such file or directory); " in message
    assert "train/cat/1.png (" in message and "test/cat/3.png (not an image)" in message
    for i in range(25):
        (damaged_folder / f"train/cat/bad{i:02}.png").write_bytes(b"x")
    message = error_of(load_dataset, config("imagefolder", damaged_folder))
    assert "29 of 38 images" in message and "; ... and 9 more" in message and message.count(" (") == 20


@pytest.mark.parametrize("cached", [False, True])
def test_skip_unreadable_goes_on_and_says_so(damaged_folder, tmp_path, capsys, cached):
    cfg = config("imagefolder", damaged_folder, skip_unreadable=True)
    for _ in range(2):
        dataset = load_dataset(cfg, tmp_path / "cache" if cached else None)
        assert dataset.train.names == [f"train/{x}.png" for x in "cat/0 cat/2 cat/3 dog/1 dog/2 dog/3".split()]
        assert dataset.train.source_rows.tolist() == [0, 2, 3, 5, 6, 7] and dataset.test.n == 3
        for split in (dataset.train, dataset.test):
            expected = [np.asarray(Image.open(damaged_folder / name)) for name in split.names]
            np.testing.assert_array_equal(split.inputs, expected)
        assert "4 of 13 images left out" in capsys.readouterr().err
    for i in range(4):
        (damaged_folder / f"train/cat/{i}.png").write_bytes(b"x")
    assert "coarse class 'cat' has no training rows" in error_of(load_dataset, cfg)


def test_nothing_readable(tmp_path):
    for name in ("train/a/x.png", "test/a/y.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    assert "2 of 2 images" in error_of(load_dataset, config("imagefolder", tmp_path, skip_unreadable=True))
    make_data.write_images(tmp_path, ["train/a/x.png"])
    message = error_of(load_dataset, config("imagefolder", tmp_path, skip_unreadable=True))
    assert "no readable test image" in message


def test_decoded_images_are_cached_and_memory_mapped(tmp_path, monkeypatch):
    root, cache = tmp_path / "d", tmp_path / "runs" / "cache"
    make_data.write_images(root, make_data.folder_names(["cat", "dog"], 10))
    cfg = config("imagefolder", root)
    in_memory, first = load_dataset(cfg), load_dataset(cfg, cache)
    monkeypatch.setattr(image_folder, "decode_image", None)  # a second decode would fail
    again = load_dataset(cfg, cache)
    for part in ("train", "test"):
        found = getattr(again, part).inputs
        assert isinstance(found, np.memmap) and not found.flags.writeable
        np.testing.assert_array_equal(found, getattr(in_memory, part).inputs)
        np.testing.assert_array_equal(found, getattr(first, part).inputs)
    assert not list(cache.glob("*.tmp")) and len(list(cache.glob("*.u8"))) == 1
    monkeypatch.undo()
    changed = make_data.write_images(root, ["cat/3.png"], seed=9)["cat/3.png"]
    os.utime(root / "cat/3.png", ns=(time.time_ns() + 10**9,) * 2)
    dataset = load_dataset(cfg, cache)
    [found] = [s.inputs[s.names.index("cat/3.png")] for s in (dataset.train, dataset.test) if "cat/3.png" in s.names]
    np.testing.assert_array_equal(found, changed)
    load_dataset(config("imagefolder", root, image_size=4), cache)
    assert len(list(cache.glob("*.u8"))) == 3


def test_a_killed_decode_leaves_no_cache(tmp_path, monkeypatch):
    root, cache = tmp_path / "d", tmp_path / "cache"
    make_data.write_images(root, make_data.folder_names(["cat"], 10))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_folder, "decode_image", killed)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(config("imagefolder", root), cache)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    monkeypatch.undo()
    assert load_dataset(config("imagefolder", root), cache).train.n == 8


def no_space(monkeypatch, free: int = 0) -> None:
    monkeypatch.setattr(image_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


@pytest.fixture
def folder(tmp_path):
    make_data.write_images(tmp_path / "d", make_data.folder_names(["cat", "dog"], 30))
    return tmp_path / "d"


@pytest.mark.parametrize("image_size", [0, 4])
@pytest.mark.parametrize("how", ["disk is full", "always", "always, no cache"])
def test_images_decoded_on_demand_are_those_of_the_cache(folder, tmp_path, image_size, how, monkeypatch, capsys):
    cached = load_dataset(config("imagefolder", folder, image_size=image_size), tmp_path / "one")
    decode = "auto" if how == "disk is full" else "always"
    no_space(monkeypatch)
    cfg = config("imagefolder", folder, image_size=image_size, decode=decode)
    capsys.readouterr()
    dataset = load_dataset(cfg, None if "no cache" in how else tmp_path / "two")
    said = capsys.readouterr().err
    assert ("data.decode: always (0.00 GB of pixels, 0.00 GB free in " in said) == (decode == "auto")
    assert not list(tmp_path.glob("two/*.u8")) and not list(tmp_path.glob("two/*.tmp"))
    for part in ("train", "test"):
        found, expected = getattr(dataset, part), getattr(cached, part)
        lazy, array = found.inputs, expected.inputs
        assert isinstance(lazy, image_folder.ImagesOnDemand) and found.names == expected.names
        assert (lazy.shape, lazy.dtype, lazy.nbytes, lazy.ndim) == (array.shape, array.dtype, array.nbytes, 4)
        assert len(lazy) == len(array) == found.n and not found.is_vector
        for rows in (
            slice(None),
            slice(3, 9, 2),
            np.array([5, 0, 5, -1]),
            np.arange(len(array)) % 3 == 0,
            np.arange(0),
        ):
            assert lazy[rows].dtype == np.uint8
            np.testing.assert_array_equal(lazy[rows], array[rows])
        for row in (3, -1, np.int64(2)):
            np.testing.assert_array_equal(lazy[row], array[row])
        with pytest.raises(IndexError):
            lazy[len(array)]


def test_decoding_on_demand_looks_at_every_file_once_for_all_stages(folder, tmp_path, monkeypatch):
    looked_at = []
    decode = image_folder.decode_image
    monkeypatch.setattr(image_folder, "decode_image", lambda path, size: looked_at.append(path) or decode(path, size))
    cfg, cache = config("imagefolder", folder, decode="always"), tmp_path / "cache"
    load_dataset(cfg, cache)
    assert sorted(looked_at) == sorted(folder.rglob("*.png"))
    dataset = load_dataset(cfg, cache)
    assert len(looked_at) == 60
    dataset.train.inputs[np.arange(5)]
    assert len(looked_at) == 65


def test_what_is_on_disk_already_is_read_from_there(folder, tmp_path, monkeypatch):
    load_dataset(config("imagefolder", folder), tmp_path)
    no_space(monkeypatch)
    monkeypatch.setattr(image_folder, "decode_image", None)
    for decode in ("auto", "once"):
        dataset = load_dataset(config("imagefolder", folder, decode=decode), tmp_path)
        assert isinstance(dataset.train.inputs, np.memmap)
    dataset = load_dataset(config("imagefolder", folder, decode="always"), tmp_path)
    assert isinstance(dataset.train.inputs, image_folder.ImagesOnDemand)


def test_once_and_auto_look_at_the_free_disk(folder, tmp_path, monkeypatch):
    size = 60 * 8 * 6 * 3
    no_space(monkeypatch, size - 1)
    message = error_of(load_dataset, config("imagefolder", folder, decode="once"), tmp_path)
    assert message.startswith("data.decode: once does not fit on the disk (0.00 GB of pixels, ")
    no_space(monkeypatch, size)
    assert isinstance(load_dataset(config("imagefolder", folder), tmp_path).test.inputs, image_folder.ImagesOnDemand)
    assert isinstance(load_dataset(config("imagefolder", folder, decode="once"), tmp_path).test.inputs, np.memmap)
    no_space(monkeypatch, size * 5 // 4)
    assert isinstance(load_dataset(config("imagefolder", folder), tmp_path / "more").test.inputs, np.memmap)


def test_on_demand_unreadable_images_are_found_at_the_start(damaged_folder, tmp_path):
    message = error_of(load_dataset, config("imagefolder", damaged_folder, decode="always"), tmp_path)
    assert "4 of 13 images" in message and "test/cat/3.png (not an image)" in message
    cfg = config("imagefolder", damaged_folder, decode="always", skip_unreadable=True)
    expected = load_dataset(config("imagefolder", damaged_folder, skip_unreadable=True))
    for _ in range(2):
        found = load_dataset(cfg, tmp_path)
        for part in ("train", "test"):
            np.testing.assert_array_equal(getattr(found, part).inputs[:], getattr(expected, part).inputs)


def test_on_demand_images_of_different_sizes(folder, tmp_path):
    make_data.write_images(folder, ["dog/3.png"], size=(9, 5))
    message = error_of(load_dataset, config("imagefolder", folder, decode="always"), tmp_path)
    assert "dog/3.png is 9x5 pixels but" in message and "set data.image_size" in message


def test_an_image_that_goes_bad_after_the_start_stops_the_run(folder):
    images = load_dataset(config("imagefolder", folder, decode="always")).train.inputs
    path = images.paths[4]
    path.unlink()
    message = error_of(images.__getitem__, np.arange(8))
    assert message == f"data.root: {path} cannot be read any more (No such file or directory); start again"
    make_data.write_images(path.parent, [path.name], size=(9, 5))
    assert f"{path} cannot be read any more (it is 9x5 pixels now)" in error_of(images.__getitem__, 4)


@pytest.mark.parametrize("workers", [1, 3])
def test_so_many_workers_decode(folder, workers, monkeypatch):
    """All of them at once: each image waits until as many are in hand; more never are."""
    monkeypatch.setattr(image_folder, "CHUNK", 2)
    decode, together, in_hand, most = image_folder.decode_image, threading.Barrier(workers), [], []

    def counted(path, size):
        in_hand.append(path)
        most.append(len(in_hand))
        together.wait(20)
        in_hand.remove(path)
        return decode(path, size)

    monkeypatch.setattr(image_folder, "decode_image", counted)
    load_dataset(config("imagefolder", folder, workers=workers))  # 60 images: a whole number of rounds
    assert max(most) == workers


def test_statistics_and_batches_on_demand_are_those_of_the_cache(folder, tmp_path):
    import torch

    from utils import loader, models
    from utils.config import LoaderConfig

    cached = load_dataset(config("imagefolder", folder), tmp_path).train
    lazy = load_dataset(config("imagefolder", folder, decode="always"), tmp_path).train
    rows = np.arange(1, 40, 2)
    for found, expected in zip(*(models.input_statistics(split, rows) for split in (lazy, cached)), strict=True):
        np.testing.assert_array_equal(found, expected)
    for placement in ("host", "device"):
        both = [loader.Inputs(split, torch.device("cpu"), LoaderConfig(placement)) for split in (lazy, cached)]
        for (_, a), (_, b) in zip(*(inputs.batches(loader.blocks(rows, 7)) for inputs in both), strict=True):
            assert torch.equal(a, b)


def test_errors_in_the_layout_of_folders(tmp_path):
    def message(root):
        return error_of(load_dataset, config("imagefolder", tmp_path / root))

    assert f"data.root: {tmp_path / 'none'} is no folder" in message("none")
    (tmp_path / "empty").mkdir()
    assert "no images found below" in message("empty")
    make_data.write_images(tmp_path, ["loose/a/0.png", "loose/1.png"])
    assert f"{tmp_path / 'loose/1.png'} lies in no class folder" in message("loose")
    make_data.write_images(tmp_path, ["half/train/a/0.png", "half/val/a/0.png"])
    assert "has train/ but not both train/ and test/" in message("half")
    make_data.write_images(tmp_path, ["hole/a/0.png", "hole/a/1.png"])
    (tmp_path / "hole" / "b").mkdir()
    assert f"class folder {tmp_path / 'hole/b'} holds no images" in message("hole")
    make_data.write_images(tmp_path, ["single/a/0.png", "single/b/0.png"])
    assert "no coarse class has two images" in message("single")
    make_data.write_images(tmp_path, ["extra/train/a/0.png", "extra/test/a/0.png", "extra/test/b/0.png"])
    assert "coarse class 'b' has no training rows" in message("extra")


def test_a_class_may_be_called_train(tmp_path):
    make_data.write_images(tmp_path, make_data.folder_names(["bus", "train"], 4))
    assert load_dataset(config("imagefolder", tmp_path)).coarse_names == ["bus", "train"]


def test_linked_class_folders_are_followed(tmp_path):
    make_data.write_images(tmp_path / "store", make_data.folder_names(["cat"], 4))
    make_data.write_images(tmp_path / "d", make_data.folder_names(["dog"], 4))
    os.symlink(tmp_path / "store" / "cat", tmp_path / "d" / "cat")
    assert load_dataset(config("imagefolder", tmp_path / "d")).coarse_names == ["cat", "dog"]


# Arrays


@pytest.mark.parametrize("kind", ["images", "vectors"])
@pytest.mark.parametrize("fine", [True, False])
def test_arrays(tmp_path, kind, fine):
    made = make_data.write_arrays(tmp_path, kind=kind, fine=fine)
    dataset = load_dataset(config("arrays", tmp_path))
    assert dataset.coarse_names == ["a", "b"] and dataset.fine_names == (["a0", "a1", "b0", "b1"] if fine else None)
    for part in ("train", "test"):
        split = getattr(dataset, part)
        assert split.is_vector == (kind == "vectors") and isinstance(split.inputs, np.memmap)
        np.testing.assert_array_equal(split.inputs, made[part][0])
        np.testing.assert_array_equal(split.coarse_labels, made[part][1])
        if fine:
            np.testing.assert_array_equal(split.fine_labels, made[part][2])
    if fine:
        assert dataset.fine_to_coarse.tolist() == [0, 0, 1, 1]
    else:
        assert dataset.fine_to_coarse is dataset.train.fine_labels is None


def test_grey_arrays_without_names(tmp_path):
    made = make_data.write_arrays(tmp_path, names=False)
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_images.npy", made[part][0][..., 0])
    dataset = load_dataset(config("arrays", tmp_path, limit=9))
    assert dataset.train.inputs.shape == (9, 8, 8, 1) and dataset.coarse_names == ["class 0", "class 1"]
    assert dataset.fine_names == ["fine 0", "fine 1", "fine 2", "fine 3"]
    np.testing.assert_array_equal(dataset.train.inputs[..., 0], made["train"][0][dataset.train.source_rows, ..., 0])


LABELS = np.arange(60) % 4
NAN_VECTORS = np.ones((60, 5), np.float32)
NAN_VECTORS[7, 2] = np.nan


@pytest.mark.parametrize(
    "name, array, parts",
    [
        ("train_images", np.zeros((60, 8, 8, 3), np.float32), ["float32 of shape (60, 8, 8, 3)", "must be uint8"]),
        ("train_images", np.zeros((60, 8, 8, 4), np.uint8), ["(60, 8, 8, 4)", "must be uint8 (N, H, W[, C])"]),
        ("train_images", np.zeros((60, 8), np.uint8), ["uint8 of shape (60, 8)"]),
        ("train_images", np.zeros((0, 8, 8), np.uint8), ["holds no pixels"]),
        ("test_images", np.zeros((30, 9, 8, 3), np.uint8), ["rows of shape (9, 8, 3), but (8, 8, 3) in training"]),
        ("train_coarse_labels", LABELS[:50] // 2, ["50 labels for 60 rows"]),
        ("train_coarse_labels", LABELS / 2, ["float64 of shape (60,)", "must be integers"]),
        ("train_coarse_labels", LABELS[:, None] // 2, ["int64 of shape (60, 1)"]),
        ("train_coarse_labels", LABELS // 2 - 1, ["label -1 is out of range"]),
        ("test_coarse_labels", LABELS[:30], ["label 3 is out of range; there are 2 classes"]),
        ("train_fine_labels", LABELS + 1, ["label 4 is out of range; there are 4 classes"]),
        ("test_fine_labels", LABELS[:30] - 1, ["label -1 is out of range"]),
        ("train_fine_labels", (LABELS + 2) % 4, ["fine class", "rows in two coarse classes, '", "'a'", "'b'"]),
    ],
)
def test_errors_in_arrays(tmp_path, name, array, parts):
    make_data.write_arrays(tmp_path)
    np.save(tmp_path / f"{name}.npy", array)
    message = error_of(load_dataset, config("arrays", tmp_path))
    assert f"{name}.npy: " in message and all(part in message for part in parts), message


@pytest.mark.parametrize(
    "array, part",
    [
        (NAN_VECTORS, "row 7 holds NaN or infinity"),
        (np.ones((60, 5)), "float64 of shape (60, 5); vectors must be float32"),
        (np.ones((60, 5, 1), np.float32), "float32 of shape (60, 5, 1)"),
        (np.ones((60, 0), np.float32), "not empty"),
    ],
)
def test_errors_in_vectors(tmp_path, array, part):
    make_data.write_arrays(tmp_path, kind="vectors")
    np.save(tmp_path / "train_vectors.npy", array)
    assert part in error_of(load_dataset, config("arrays", tmp_path))


def test_labels_with_gaps(tmp_path):
    make_data.write_arrays(tmp_path, names=False)
    np.save(tmp_path / "train_fine_labels.npy", np.where(LABELS == 1, 10**12, LABELS))
    assert "label 1000000000000 is out of range; there are 5 classes" in error_of(
        load_dataset, config("arrays", tmp_path)
    )
    make_data.write_arrays(tmp_path)
    (tmp_path / "names.json").write_text('{"coarse": ["a", "b", "c"], "fine": ["a0", "a1", "b0", "b1"]}')
    assert "coarse class 'c' has no training rows" in error_of(load_dataset, config("arrays", tmp_path))
    (tmp_path / "names.json").write_text('{"coarse": ["a", "b"], "fine": ["a0", "a1", "b0", "b1", "b2"]}')
    assert "no row, in test neither, has label 4 ('b2')" in error_of(load_dataset, config("arrays", tmp_path))


def test_array_files_that_are_not_plain_arrays(tmp_path):
    make_data.write_arrays(tmp_path)
    cfg, path = config("arrays", tmp_path), tmp_path / "train_images.npy"
    np.save(path, np.array([{"a": 1}, None], dtype=object))
    assert f"{path}: no plain .npy array (pickled objects are never loaded)" in error_of(load_dataset, cfg)
    path.write_bytes(pickle.dumps([1, 2]))
    assert "pickled objects are never loaded" in error_of(load_dataset, cfg)
    path.write_bytes(b"")
    assert f"{path}: no plain .npy array (" in error_of(load_dataset, cfg)
    make_data.write_arrays(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: no plain .npy array (" in error_of(load_dataset, cfg)
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    os.replace(tmp_path / "x.npz", path)
    assert "an .npz archive" in error_of(load_dataset, cfg)


def test_array_files_that_are_missing(tmp_path):
    cfg = config("arrays", tmp_path)
    assert "no train_images.npy or train_vectors.npy" in error_of(load_dataset, cfg)
    make_data.write_arrays(tmp_path)
    os.remove(tmp_path / "test_images.npy")
    os.remove(tmp_path / "test_fine_labels.npy")
    assert f"{tmp_path} lacks test_images.npy, test_fine_labels.npy" in error_of(load_dataset, cfg)
    make_data.write_arrays(tmp_path, kind="vectors")
    assert "both train_images.npy and train_vectors.npy" in error_of(load_dataset, cfg)


@pytest.mark.parametrize(
    "text, part",
    [
        ("{", "no valid JSON"),
        ("[]", "must be {"),
        ('{"coarse": ["a", "b"], "Fine": []}', "must be {"),
        ('{"coarse": "ab"}', "'coarse' must be a list of names"),
        ('{"coarse": [0, 1]}', "'coarse' must be a list of names"),
        ('{"coarse": ["a", "a"]}', "'coarse' has a name twice"),
        ('{"coarse": []}', "label 1 is out of range; there are 0 classes"),
    ],
)
def test_errors_in_names(tmp_path, text, part):
    make_data.write_arrays(tmp_path)
    (tmp_path / "names.json").write_text(text)
    assert part in error_of(load_dataset, config("arrays", tmp_path))


# Signature


def test_the_signature_changes_with_the_data_alone(tmp_path):
    make_data.write_arrays(tmp_path)
    cfg = config("arrays", tmp_path)
    before = data_signature(cfg)
    assert load_dataset(cfg).signature == before == data_signature(config("arrays", tmp_path, limit=5))
    labels = np.load(tmp_path / "train_fine_labels.npy")
    np.save(tmp_path / "train_fine_labels.npy", labels[::-1])
    assert data_signature(cfg) != before
    assert len({data_signature(DataConfig(name="digits")), before}) == 2


def test_the_signature_of_a_folder_sees_names_and_sizes(tmp_path):
    make_data.write_images(tmp_path, make_data.folder_names(["cat"], 3))
    cfg, seen = config("imagefolder", tmp_path), set()
    seen.add(data_signature(cfg))
    os.utime(tmp_path / "cat/0.png", ns=(1, 1))
    seen.add(data_signature(cfg))
    assert len(seen) == 1
    os.rename(tmp_path / "cat/0.png", tmp_path / "cat/9.png")
    seen.add(data_signature(cfg))
    (tmp_path / "cat/1.png").write_bytes(b"x")
    seen.add(data_signature(cfg))
    assert len(seen) == 3


def test_the_signature_reads_the_ends_of_a_large_file(tmp_path):
    import hashlib

    path = tmp_path / "large"
    content = np.random.default_rng(0).bytes(1000)

    def signature(changed: int | None = None) -> str:
        damaged = bytearray(content)
        if changed is not None:
            damaged[changed] ^= 1
        path.write_bytes(damaged)
        digest = hashlib.sha256()
        data._hash_content(digest, path, whole=500, end=100)
        return digest.hexdigest()

    assert signature(5) != signature() != signature(950) and signature(500) == signature()


# Configurations


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_loads(path):
    cfg = load_config(str(path))
    assert cfg.name == path.stem
    if cfg.data.coarse_map:
        known = {"digits": data.DIGITS, "svhn": data.DIGITS, "fashion_mnist": data.FASHION, "stl10": data.STL10}
        for n_classes in (10, 100):
            known[f"cifar{n_classes}"] = make_data.cifar_names(n_classes)
        coarse_names, parents = read_coarse_map(cfg.data.coarse_map, known[cfg.data.name])
        assert len(np.unique(parents)) == len(coarse_names)
    data._check_settings(cfg.data)


def test_the_cifar100_map_is_the_official_one():
    """fine_to_coarse of the data set's own coarse_labels, in the order of its fine labels (sorted names)."""
    official = [
        4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7,
        6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
        16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
        12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
    ]  # fmt: skip
    coarse_map = load_config(str(CONFIGS / "cifar100.yaml")).data.coarse_map
    assert read_coarse_map(coarse_map, make_data.cifar_names(100))[1].tolist() == official
