"""What the converters (prepare_*.py) share: json, command line, splits, processes, and errors that name the file."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from peft_d2.data.formats.export import CocoJson  # noqa: F401  the converters take all from here
from peft_d2.data.registration import data_root, read_json
from peft_d2.storage import disk


def split_names(
    names: Iterable[str], share: float, splits: str | Path | None = None, first: str = "train", second: str = "test"
) -> dict[str, list[str]]:
    """Two splits of file names, by the names' checksums: the same wherever and whenever it is done.

    Args:
        names: of all images.
        share: of them that goes to the ``second`` split.
        splits: a json of ``{split: [name, ...]}`` to follow instead.

    Raises:
        ValueError: the json lists names that there are not, or none at all.
    """
    ordered = sorted(set(names))
    if splits is None:
        drawn = sorted(ordered, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        chosen = set(drawn[: round(share * len(drawn))])
        return {first: [n for n in ordered if n not in chosen], second: [n for n in ordered if n in chosen]}
    found = read_json(splits)
    if not isinstance(found, Mapping) or not all(isinstance(v, list) for v in found.values()):
        raise ValueError(f"{splits}: expected a json of the form {{{first!r}: [file name, ...], {second!r}: [...]}}.")
    missing = sorted({name for listed in found.values() for name in listed} - set(ordered))
    if missing:
        raise ValueError(f"{splits}: lists {len(missing)} images that are not there, {missing[0]!r} for one.")
    return {split: list(listed) for split, listed in found.items()}


def write_coco(path: str | Path, data: Mapping[str, Any]) -> int:
    """Write a json in one step and return the number of its annotations."""
    disk.write_bytes(path, json.dumps(data).encode())
    return len(data["annotations"])


def require_folder(path: str | Path, holds: str) -> Path:
    """The folder, or an error that says what it has to hold.

    Raises:
        FileNotFoundError: no such folder; an archive of that name, or the one beside it, is named.
    """
    path = Path(path)
    if path.is_dir():
        return path
    beside = [path.with_name(path.name + ending) for ending in (".zip", ".tar", ".tar.gz", ".tgz", ".rar", ".7z")]
    packed = next((p for p in (path, *beside) if p.is_file()), None)
    found = f"{packed} is an archive: unpack it there" if packed else "it does not exist"
    raise FileNotFoundError(f"{path}: expected a folder with {holds}; {found}.")


def converter_main(
    description: str, folder: str, convert: Callable[..., Mapping[str, int]], **options: tuple[str, int]
) -> int:
    """Run a converter on the command line's arguments.

    Args:
        description: for ``--help``.
        folder: of the published files, below the folder of all data sets; ``--source`` names another.
        convert: takes the source and the options, and returns how many entries each written file has.
        options: help and default of each; one whose default is 0 is passed on as None where it is not given.

    Returns:
        The exit code: 0, or 1 after a line that says what is wrong with the source.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", default=str(data_root() / folder), help="the unpacked folder, which gets the new files"
    )
    for name, (text, default) in options.items():
        kind = int if default else str
        parser.add_argument(f"--{name}", help=text, type=kind, default=default or None)
    arguments = vars(parser.parse_args())
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        counts = convert(arguments.pop("source"), **arguments)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, count in counts.items():
        print(f"{path}: {count}")
    return 0


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    """The function's results for all items, in order; in several processes where ``workers`` says so."""
    items = list(items)
    if workers <= 1:
        return [function(item) for item in items]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, items, chunksize=16))


def read_label_image(path: Path, channels: int = 1) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 label image.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it has another number of channels or bits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Unpack the published archive again.")
    with Image.open(path) as opened:
        labels = np.asarray(opened)
    if labels.dtype != np.uint8 or labels.ndim != (2 if channels == 1 else 3):
        raise ValueError(
            f"{path}: a label image of {labels.dtype} {labels.shape}, expected 8 bits, {channels} channel(s)."
        )
    return labels[..., :3] if channels == 3 else labels
