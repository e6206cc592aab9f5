"""Folders of images in any format Pillow opens (data.name: imagefolder).

They are decoded once into a memory-mapped file where the disk has room for it, else whenever they are read.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.config import DataConfig, UserError
from utils.splits import Dataset, Split, limit_rows, read_coarse_map, test_mask

# Suffixes of the pixel formats Pillow opens. Not its whole list: .eps would start Ghostscript, .mpg, .h5 are no images.
IMAGE_SUFFIXES = set(
    ".apng .avif .bmp .dds .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pgm .png .pnm .ppm .qoi .sgi "
    ".tga .tif .tiff .webp .xbm .xpm".split()
)

DISK_SHARE = 0.8  # of the free disk that decoded pixels may take
CHUNK = 8  # images that a thread decodes at a time; handing over one at a time slows small ones


class ImageFile(NamedTuple):
    name: str  # path relative to data.root, with /
    size: int  # bytes
    mtime_ns: int
    folders: tuple[str, ...]  # below data.root or its train/ or test/: the coarse class, then what lies below it


def load_image_folder(cfg: DataConfig, cache_dir: Path | None) -> Dataset:
    """Test part and limit are drawn from the file names, so that only images in use are decoded.

    Unreadable images that data.skip_unreadable drops are missing from either part; none is drawn in their place.
    """
    parts = list_parts(Path(cfg.root))
    coarse_names, fine_names, fine_to_coarse, labels_of = _folder_classes(parts, cfg.coarse_map)
    files = [file for part in parts for file in part]
    coarse, fine = (np.array(column, np.int64) for column in zip(*map(labels_of, files), strict=True))
    if len(parts) == 2:
        is_test = np.arange(len(files)) >= len(parts[0])
    else:
        is_test = test_mask(coarse, cfg.test_fraction)
    train_rows, test_rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    train_rows = train_rows[limit_rows(coarse[train_rows], cfg.limit)]
    rows = np.concatenate([train_rows, test_rows])
    images, is_readable = _load_images(cfg, [files[row] for row in rows], cache_dir)
    n_train, rows = np.count_nonzero(is_readable[: len(train_rows)]), rows[is_readable]
    source_row = np.concatenate([np.arange(len(part)) for part in parts])
    splits = []
    for part in (slice(None, n_train), slice(n_train, None)):
        names = [files[row].name for row in rows[part]]
        known_fine = fine[rows[part]] if fine_names else None
        inputs = images.part(part) if isinstance(images, ImagesOnDemand) else images[part]
        splits.append(Split(inputs, coarse[rows[part]], known_fine, names, source_row[rows[part]]))
    if not splits[1].n:
        raise UserError(f"data.root: {cfg.root} has no readable test image")
    return Dataset(*splits, coarse_names, fine_names, fine_to_coarse)


def list_parts(root: Path) -> list[list[ImageFile]]:
    """[train, test] image files where root has both folders, else [all of them].  Raises UserError on other layouts."""
    if not root.is_dir():
        raise UserError(
            f"data.root: {root} is no folder; make <data.root>/<coarse class>/ folders of images or set data.root"
        )
    folders = _folders(root)
    if len(present := [part for part in ("train", "test") if part in folders]) != 2:
        if present and set(folders) <= {"train", "test", "val", "valid", "validation"}:  # else: a class of that name
            raise UserError(f"data.root: {root} has {present[0]}/ but not both train/ and test/; add or rename one")
        present = [""]
    parts = [_list_images(root, part) for part in present]
    for part, files in zip(present, parts, strict=True):
        if not files:
            raise UserError(f"data.root: no images found below {root / part}; need <coarse class>/*.png or the like")
        if loose := [file.name for file in files if not file.folders]:
            raise UserError(f"data.root: {root / loose[0]} lies in no class folder; move it into one")
        if empty := sorted(set(_folders(root / part)) - {file.folders[0] for file in files}):
            raise UserError(f"data.root: class folder {root / part / empty[0]} holds no images; fill or remove it")
    return parts


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name)]


def _list_images(root: Path, part: str) -> list[ImageFile]:
    """Every image file below root/part, hidden ones left out, sorted by path; links are followed."""

    def stop(error: OSError):
        raise error  # os.walk would pass over a folder that it may not read

    files = []
    for folder, subfolders, names in os.walk(root / part, onerror=stop, followlinks=True):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        folders = Path(folder).relative_to(root / part).parts
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not _is_hidden(name):
                path = os.path.join(folder, name)
                stat = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a dead link: found when decoding
                files.append(ImageFile("/".join([*filter(None, [part]), *folders, name]),
                                       stat.st_size, stat.st_mtime_ns, folders))  # fmt: skip
    return sorted(files)


def _folder_classes(parts: list[list[ImageFile]], coarse_map: dict[str, list]):
    """(coarse names, fine names or None, fine_to_coarse or None, function: ImageFile -> (coarse id, fine id or -1)).

    Top folders are coarse classes and, where every image lies exactly one folder deeper, those sub-folders fine classes
    named <coarse>/<fine>. With a coarse_map the top folders are the fine classes that it groups.
    """
    files = [file for part in parts for file in part]
    tops = sorted({file.folders[0] for file in files})
    if not coarse_map and not all(len(file.folders) == 2 for file in files):
        return tops, None, None, lambda file: (tops.index(file.folders[0]), -1)
    depth = 1 if coarse_map else 2
    fine_names = sorted({"/".join(file.folders[:depth]) for file in files})
    if coarse_map:
        coarse_names, fine_to_coarse = read_coarse_map(coarse_map, fine_names)
    else:
        coarse_names, fine_to_coarse = tops, np.array([tops.index(name.split("/")[0]) for name in fine_names], np.int64)
    fine_id = {name: f for f, name in enumerate(fine_names)}

    def labels_of(file: ImageFile) -> tuple[int, int]:
        fine = fine_id["/".join(file.folders[:depth])]
        return fine_to_coarse[fine], fine

    return coarse_names, fine_names, fine_to_coarse, labels_of


class ImagesOnDemand:
    """Image files as an array (N, H, W, 3) uint8 whose rows are decoded whenever they are read.

    Offers what this program uses of an array: shape, ndim, dtype, nbytes, len() and [int | slice | index array], which
    give ndarrays.  Raises UserError where a file has been changed or removed since it was found readable.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, paths: Sequence[Path], size: tuple[int, int, int], cfg: DataConfig, pool: ThreadPoolExecutor):
        self.paths, self.size, self.cfg, self.pool = np.array(paths, dtype=object), tuple(size), cfg, pool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self), *self.size)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, rows: slice) -> "ImagesOnDemand":
        """These rows, still to be decoded."""
        return ImagesOnDemand(self.paths[rows], self.size, self.cfg, self.pool)

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self[[rows]][0]
        paths = self.paths[rows]
        pixels = np.empty((len(paths), *self.size), np.uint8)
        for place, image in enumerate(_decode_in_order(self.pool, paths, self.cfg)):
            if isinstance(image, str) or image.shape != self.size:
                why = image if isinstance(image, str) else f"it is {_size(image.shape)} pixels now"
                raise UserError(f"data.root: {paths[place]} cannot be read any more ({why}); start again")
            pixels[place] = image
        return pixels


def _load_images(
    cfg: DataConfig, files: list[ImageFile], cache_dir: Path | None
) -> tuple[np.ndarray | ImagesOnDemand, np.ndarray]:
    """The readable images of `files`, uint8 (M, H, W, 3), and is_readable (len(files),) bool.

    Pixels are decoded here, or mapped from the cache that an earlier process left, or left to be decoded on demand; in
    that case one pass over all files has found them readable, here or in an earlier process.
    """
    if cache_dir is not None:
        pixels_path, info = _cached_pixels(cfg, files, cache_dir)
        pixels = np.memmap(pixels_path, np.uint8, "r") if pixels_path else None
    else:
        sink = None if cfg.decode == "always" else io.BytesIO()
        info = _decode_all(cfg, files, sink)
        pixels = np.frombuffer(sink.getbuffer(), np.uint8) if sink else None
    is_readable = np.ones(len(files), bool)
    is_readable[info["unreadable"]] = False
    if info["unreadable"]:
        print(f"data.skip_unreadable: {len(info['unreadable'])} of {len(files)} images left out", file=sys.stderr)
    if pixels is not None:
        return pixels.reshape(-1, *info["shape"]), is_readable
    paths = [Path(cfg.root, files[row].name) for row in np.flatnonzero(is_readable)]
    return ImagesOnDemand(paths, info["shape"], cfg, _pool(cfg)), is_readable


def _cached_pixels(cfg: DataConfig, files: list[ImageFile], cache_dir: Path) -> tuple[Path | None, dict]:
    """The file of decoded pixels for exactly these image files and settings, made where it does not exist yet.

    None in its place where images are to be decoded on demand; what is known of them is kept all the same.
    """
    from filelock import FileLock

    cache_dir.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{cfg.image_size} {cfg.skip_unreadable}\n".encode())
    for file in files:
        key.update(os.fsencode(f"{file.name}\0{file.size} {file.mtime_ns}\n"))
    stem = f"images-{key.hexdigest()[:24]}"
    pixels_path, info_path, temporary = (cache_dir / f"{stem}.{kind}" for kind in ("u8", "json", "tmp"))
    with FileLock(cache_dir / f"{stem}.lock"):  # processes that start together decode once
        on_disk = cfg.decode != "always" and (pixels_path.is_file() or _fits_on_disk(cfg, files, cache_dir))
        if not (info_path.is_file() and (pixels_path.is_file() or not on_disk)):
            try:
                if on_disk:
                    with open(temporary, "wb") as sink:
                        info = _decode_all(cfg, files, sink)
                    os.replace(temporary, pixels_path)
                else:
                    info = _decode_all(cfg, files, None)
                temporary.write_text(json.dumps(info))
                os.replace(temporary, info_path)  # last: its presence says that the files were all looked at
            finally:
                temporary.unlink(missing_ok=True)
    return pixels_path if on_disk else None, json.loads(info_path.read_text())


def _fits_on_disk(cfg: DataConfig, files: list[ImageFile], cache_dir: Path) -> bool:
    """Whether all pixels may be kept below `cache_dir`; says so where they may not.

    Raises UserError for data.decode=once on a disk without room for them.
    """
    needed, free = len(files) * _bytes_an_image(cfg, files), shutil.disk_usage(cache_dir).free
    sizes = f"{needed / 1e9:.2f} GB of pixels, {free / 1e9:.2f} GB free in {cache_dir}"
    if cfg.decode == "once":
        if needed > free:
            raise UserError(f"data.decode: once does not fit on the disk ({sizes}); make room or use auto")
        return True
    if needed <= DISK_SHARE * free:
        return True
    print(f"data.decode: always ({sizes}: more than {DISK_SHARE:.0%})", file=sys.stderr)
    return False


def _bytes_an_image(cfg: DataConfig, files: list[ImageFile]) -> int:
    if cfg.image_size:
        return 3 * cfg.image_size**2
    images = (decode_image(Path(cfg.root, file.name), 0) for file in files)
    return next((image.nbytes for image in images if not isinstance(image, str)), 0)


def _decode_all(cfg: DataConfig, files: list[ImageFile], sink) -> dict:
    """Write the readable images' pixels to `sink` in order, or only decode them where it is None.

    Returns {"shape": [H, W, 3], "unreadable": [rows]}.

    Raises UserError naming every image that cannot be read unless data.skip_unreadable, and the first one whose size
    differs from the first image's.
    """
    from tqdm import tqdm

    unreadable, first, odd = {}, None, ""
    with _pool(cfg) as pool:
        decoded = _decode_in_order(pool, [Path(cfg.root, file.name) for file in files], cfg)
        for row, image in enumerate(tqdm(decoded, "decode", len(files), unit="image", disable=None)):
            if isinstance(image, str):
                unreadable[row] = f"{files[row].name} ({image})"
                continue
            first = first or (files[row].name, image.shape)
            if image.shape != first[1]:
                odd = odd or f"{files[row].name} is {_size(image.shape)} pixels but {first[0]} {_size(first[1])}"
            elif sink:
                sink.write(image)
    if unreadable and (not cfg.skip_unreadable or first is None):
        listed = "; ".join(list(unreadable.values())[:20])
        more = f"; ... and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
        raise UserError(
            f"data.root: {len(unreadable)} of {len(files)} images in {cfg.root} cannot be read: {listed}{more}: "
            "mend or remove them, or set data.skip_unreadable=true"
        )
    if odd:
        raise UserError(f"data.root: in {cfg.root}, {odd}: set data.image_size to bring all images to one size")
    return {"shape": first[1], "unreadable": list(unreadable)}


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _n_workers(cfg: DataConfig) -> int:
    return cfg.workers or min(16, os.cpu_count() or 1)


def _pool(cfg: DataConfig) -> ThreadPoolExecutor:
    """Threads, as Pillow decodes outside the interpreter's lock.

    Two processes were faster than two threads on 64 px PNG alone and slower on other sizes and on JPEG; they take
    seconds to start and send every pixel.
    """
    return ThreadPoolExecutor(_n_workers(cfg), "decode")


def _decode_in_order(pool: ThreadPoolExecutor, paths: Sequence[Path], cfg: DataConfig) -> Iterator[np.ndarray | str]:
    """What `decode_image` gives for each path, some chunks ahead of the reader and no further: RAM stays bounded."""
    ahead = deque()
    for start in range(0, len(paths), CHUNK):
        ahead.append(pool.submit(_decode_chunk, list(paths[start : start + CHUNK]), cfg.image_size))
        if len(ahead) > 4 * _n_workers(cfg):
            yield from ahead.popleft().result()
    while ahead:
        yield from ahead.popleft().result()


def _decode_chunk(paths: list[Path], image_size: int) -> list[np.ndarray | str]:
    return [decode_image(path, image_size) for path in paths]


def decode_image(path: Path, image_size: int) -> np.ndarray | str:
    """uint8 (H, W, 3) of any format Pillow reads, upright by its EXIF tag; a short reason where it cannot be read.

    image_size: the short side is brought to it (bilinear, antialiased) and the centre cut out, square; 0 = as stored.
    Alpha is dropped, 16-bit grey divided by 257.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        return "not an image" if path.stat().st_size else "empty file"
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        return re.sub(r"\s+", " ", getattr(error, "strerror", None) or str(error) or type(error).__name__)
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):  # I;16 and its byte orders; I where the format has no 16-bit mode. RGB would clip.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels beyond 16 bits")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
