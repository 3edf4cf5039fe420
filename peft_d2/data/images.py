"""Image files as Detectron2 sees them: their size, and errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

_ORIENTATION = 0x0112
_TAIL = 4096  # bytes: cameras write something after the end mark, too
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


class DatasetError(ValueError):
    """A data set that cannot be trained on."""


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in px by the file's header, turned as its EXIF says, as Detectron2 turns it.

    Raises:
        DatasetError: the file is no image, or one whose values do not fit into 8 bits.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode in _DEEP:
                raise DatasetError(
                    f"{path}: the image has values of more than 8 bits (mode {opened.mode}), which would be cut off at "
                    "255. Write it again with 8 bits a channel."
                )
            width, height = opened.size
            has_exif = opened.format == "JPEG" or "exif" in opened.info
            turned = has_exif and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: cannot be opened as an image ({error}). Replace the file.") from error
    return (height, width) if turned else (width, height)


def seems_cut_off(path: str | Path) -> bool:
    """Whether a JPEG or PNG lacks its end mark, as files do that were copied in part."""
    with open(path, "rb") as file:
        begin = file.read(4)
        mark = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(begin[:2])
        if mark is None:
            return False
        file.seek(0, os.SEEK_END)
        file.seek(-min(_TAIL, file.tell()), os.SEEK_END)
        return mark not in file.read()


@contextmanager
def reading(record: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a file that cannot be read is an error that names the record's image.

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
    except (OSError, SyntaxError, Image.DecompressionBombError, SizeMismatchError) as error:
        text = " ".join(str(error).split())
        raise DatasetError(
            f"{name}: the image or its labels cannot be read ({type(error).__name__}: {text}). "
            "Replace the file or take it out of the data set."
        ) from error
