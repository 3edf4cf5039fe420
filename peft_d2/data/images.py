"""Image files: their sizes, which of them would not be read right, and errors that name the file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from peft_d2.storage import foreign

# Modes that Pillow converts to RGB.
_TO_RGB = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_ORIENTATION, _BITS, _SAMPLES = 0x0112, 258, 277  # tags of EXIF and of TIFF
_STACKS, _SUBFILE = {"TIFF", "GIF", "WEBP", "PNG"}, 254
_CHANNELS = {"BGR": 3, "RGB": 3, "L": 1}
_TOO_LARGE = (
    "If the file is to be trusted, set INPUT.MAX_PIXELS to its number of pixels (TEST.TILES evaluates large images "
    "part by part, tools/tile_dataset.py cuts them for training)."
)


class DatasetError(ValueError):
    """A data set that cannot be trained on."""


def check_input(cfg: Any) -> None:
    """Apply ``INPUT.MAX_PIXELS`` and refuse an ``INPUT.FORMAT`` that cannot be trained and evaluated with.

    Raises:
        DatasetError: another format than BGR, RGB and L; ``MODEL.PIXEL_MEAN`` or ``PIXEL_STD`` of another length.
    """
    set_pixel_limit(cfg.INPUT.get("MAX_PIXELS", 0))
    name = cfg.INPUT.FORMAT
    if name not in _CHANNELS:
        raise DatasetError(f"INPUT.FORMAT {name!r} is not supported. Expected one of {list(_CHANNELS)}.")
    if cfg.INPUT.get("COLOR_AUG_SSD", False) and _CHANNELS[name] != 3:
        raise DatasetError(f"INPUT.COLOR_AUG_SSD works on INPUT.FORMAT BGR or RGB, not {name!r}.")
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != _CHANNELS[name]:
            raise DatasetError(
                f"MODEL.{key} has {len(cfg.MODEL[key])} value(s), but INPUT.FORMAT {name!r} has {_CHANNELS[name]} "
                "channel(s): one value a channel is expected."
            )


def set_pixel_limit(pixels: int) -> None:
    """Let Pillow open images of up to so many pixels; 0 changes nothing. Pillow has no other place than its global."""
    if pixels:
        Image.MAX_IMAGE_PIXELS = (pixels + 1) // 2  # Pillow warns from here on, and refuses from twice as many
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in px by the file's header, turned as its EXIF says, as Detectron2 turns it.

    Raises:
        DatasetError: the file is no image, or one that would not be read right.
    """
    size, defect, remedy = read_header(path)
    if defect:
        raise DatasetError(f"{path}: {defect}. {remedy}")
    return size


def read_header(path: str | Path) -> tuple[tuple[int, int], str, str]:
    """(width, height) of an image file, turned as its EXIF says; what is wrong with it ("" if nothing); the remedy."""
    try:
        with Image.open(path) as opened:
            defect, remedy = _misread(opened)
            has_exif = opened.format == "JPEG" or "exif" in opened.info
            turned = has_exif and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = opened.size
            return ((height, width) if turned else (width, height)), defect, remedy
    except FileNotFoundError:
        raise
    except PermissionError as error:
        return (0, 0), f"cannot be read ({error.strerror})", "Let it be read."
    except Image.DecompressionBombError as error:
        return (0, 0), f"is larger than Pillow's limit against decompression bombs ({error})", _TOO_LARGE
    except (OSError, SyntaxError, ValueError) as error:
        kind = foreign.kind_of_file(path)
        return (0, 0), f"cannot be opened as an image ({f'it is {kind}' if kind else error})", "Replace the file."


def _misread(opened: Any) -> tuple[str, str]:
    """What Pillow would silently leave out of an image when it reads it, and the remedy; "" if nothing."""
    mode, bands = opened.mode, len(opened.getbands())
    tags: Any = getattr(opened, "tag_v2", {})
    deep = mode in ("I", "F") or mode.startswith("I;") or max(tags.get(_BITS, (8,))) > 8
    if opened.format == "PNG":
        opened.fp.seek(24)  # the depth's place in a PNG's first chunk
        deep = deep or opened.fp.read(1) == b"\x10"
    elif opened.format == "PPM":
        deep = deep or any(isinstance(tile[3], tuple) and tile[3][-1] == 65535 for tile in opened.tile)
    if deep:
        what = f"has values of more than 8 bits (mode {mode}), of which training would see only a part"
        return what, "Write it again with 8 bits a channel."
    if tags.get(_SAMPLES, bands) > bands:
        what = f"has {tags[_SAMPLES]} bands, of which training would see the first {bands}"
        return what, "Write the three bands to be used as an RGB image."
    if (frames := _frames(opened)) > 1:
        return f"has {frames} frames, of which training would see the first", "Write each frame as an image of its own."
    if mode not in _TO_RGB:
        return f"has the mode {mode}, which is not read as colours", "Write it again as RGB."
    return "", ""


def _frames(opened: Any) -> int:
    """How many pictures a stack or an animation holds, without the smaller copies and masks that large TIFFs have."""
    if opened.format not in _STACKS or (frames := getattr(opened, "n_frames", 1)) == 1:
        return 1
    if opened.format == "TIFF":
        kinds = []
        for number in range(frames):
            opened.seek(number)
            kinds.append(opened.tag_v2.get(_SUBFILE, 0))
        opened.seek(0)
        return max(1, sum(not kind & 5 for kind in kinds))  # 1: of reduced size; 4: a mask
    return frames


def read_image(path: str, image_format: str) -> np.ndarray:
    """(H, W, C) uint8 image in ``INPUT.FORMAT``, read by Detectron2.

    Raises:
        DatasetError: the file would not be read right.
    """
    from detectron2.data import detection_utils

    if os.path.isfile(path):  # others are for Detectron2's PathManager
        image_size(path)
    return detection_utils.read_image(path, format=image_format)


def read_rgb(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 image, turned as its EXIF says, read without Detectron2.

    Raises:
        DatasetError: the file is no image, or would not be read right.
    """
    image_size(path)
    with Image.open(path) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


def output_size(item: Mapping[str, Any], image: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that results are wanted in: the input's ``height`` and ``width``, else those of ``image``.

    Raises:
        DatasetError: one of them is below 1.
    """
    size = int(item.get("height", image[0])), int(item.get("width", image[1]))
    if min(size) < 1:
        name = item.get("file_name", "an image")
        raise DatasetError(
            f"{name}: results of {size[0]} x {size[1]} px are asked for ('height', 'width'); 1 is the least"
        )
    return size


def seems_cut_off(path: str | Path) -> bool:
    """Whether a JPEG or PNG lacks its end mark, as files do that were copied in part."""
    with open(path, "rb") as file:
        mark = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(file.read(2), b"")
        file.seek(max(0, os.path.getsize(path) - 4096))  # cameras write something after the end mark, too
        return mark not in file.read()


def path_inside(root: str | Path, file_name: str, outside: bool = False) -> str:
    """The path of a data set's file. It has to lie in the set's folder, links followed, unless ``outside``.

    Raises:
        DatasetError: it lies elsewhere.
    """
    path = os.path.join(root, file_name)
    if not outside and not lies_inside(root, path):
        raise DatasetError(
            f"{file_name!r} lies outside the data set's folder {str(root)!r}: files of others could end up in reports. "
            "If that is meant, set DATASETS.ALLOW_FILES_OUTSIDE True."
        )
    return path


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Files and folders below a folder at any depth, sorted, without hidden ones (macOS adds ``._a.json`` to each)."""
    found = sorted(folder.rglob(pattern))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def lies_inside(root: str | Path, path: str) -> bool:
    """Whether a path is in a folder, both by its name and after links are followed."""
    if os.path.relpath(path, root).split(os.sep)[0] == "..":
        return False
    folder, base = os.path.split(os.path.normpath(path))
    real = os.path.join(_real_folder(folder), base)
    real = os.path.realpath(real) if os.path.islink(real) else real
    return os.path.join(real, "").startswith(os.path.join(_real_folder(str(root)), ""))


_real_folder = lru_cache(maxsize=4096)(os.path.realpath)


@contextmanager
def reading(record: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, turn the errors of files that cannot be read into one that names the record's image.

    Raises:
        DatasetError: the image or a label image is missing, broken, or not of the size that the data set gives.
    """
    from detectron2.data.detection_utils import SizeMismatchError

    name = str(record.get("file_name"))
    try:
        yield
    except DatasetError as error:
        if name in str(error):
            raise
        raise DatasetError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{name}: {error} {_TOO_LARGE}") from error
    except (OSError, SyntaxError, SizeMismatchError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise DatasetError(
            f"{name}: the image or its labels cannot be read ({type(error).__name__}: {text}). "
            "Replace the file or take it out of the data set."
        ) from error
