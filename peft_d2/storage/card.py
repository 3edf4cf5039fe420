"""The model card of an adapter: what its folder says, and what the run that it lies in wrote beside it."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from peft_d2.storage.adapter_file import STARTED_FROM, WHY_NOT_PEFT

# What evaluation/report.py writes: a figure with a curve of each class, and one with two pictures of each image.
_CURVE = re.compile(r"<figure><svg[^>]*>(.*?)</svg><figcaption>(.*?)</figcaption></figure>", re.DOTALL)
_LINE = re.compile(r'<polyline points="([\d. ,]+)" fill="none" stroke="(#[0-9a-f]{6})"')
_IMAGES = re.compile(r"<figure><div>(.*?)</div>", re.DOTALL)
_JPEG = re.compile(r'src="data:image/jpeg;base64,([A-Za-z0-9+/=]+)"')
_CLASSES, _COLUMNS, _CELL = 12, 4, (160, 165)  # so many are drawn; px of a cell


def model_card(
    folder: str | os.PathLike[str], repo: str, picture: str = "", command: str = "", caption: str = "Predictions"
) -> str:
    """The card of an adapter: its base and fingerprint, data, methods, metrics, command, and how to load it."""
    record = json.loads(Path(folder, "peft_d2.json").read_bytes())
    hf = json.loads(Path(folder, "adapter_config.json").read_bytes()).get("peft_type") == "LORA"
    beside = Path(folder).parent / "config.yaml"
    run: dict[str, Any] = (yaml.safe_load(beside.read_bytes()) or {}) if beside.is_file() else {}
    base, data = run.get("MODEL", {}).get("WEIGHTS") or "not named by the run", run.get("DATASETS", {})
    header = {
        "library_name": "peft_d2",
        "tags": ["detectron2", "peft", "image-segmentation", *(["lora"] if hf else [])],
    }
    start = record.get(STARTED_FROM) or run.get("MODEL", {}).get("PEFT", {}).get("WEIGHTS")
    rows = [
        *([("started from", f"`{start}`")] if start else []),
        ("base", f"`{base}`, {record['base']['count']} tensors, fingerprint `{record['base']['weights'][:16]}`"),
        *(
            (f"data, {split.lower()}", ", ".join(map(str, data.get(split) or ())) or "not named")
            for split in ("TRAIN", "TEST")
        ),
        *(("method", _method(entry)) for entry in record["methods"]),
        ("trained in full", ", ".join(f"`{name}`" for name in record["train"]) or "nothing"),
        *(
            (key, f"{value:.4g}" if isinstance(value, float) else value)
            for key, value in sorted(record["metrics"].items())
        ),
        ("written by", f"peft_d2 {record['peft_d2_version']}"),
    ]
    lines = [f"---\n{yaml.safe_dump(header, sort_keys=False)}---", f"# {repo}", ""]
    lines += [*([f"![{caption}]({picture})", f"{caption}.", ""] if picture else []), "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |".replace("\n", " ") for key, value in rows]
    lines += ["", "```python", f'peft_d2.load_adapter(model, "{repo}@main")  # or a commit, which stays', "```", ""]
    command = command or _command(beside.with_name("log.txt"))
    lines += [f"Trained by `{command}`.", ""] if command else []
    reason = record.get(WHY_NOT_PEFT) or "see peft_type in adapter_config.json"
    lines.append(f"Hugging Face's `peft` {'opens it as it is' if hf else f'cannot open it: {reason}'}.")
    return "\n".join(lines) + "\n"


def _command(log: Path) -> str:
    """The command line that a run wrote into its log, the newest where it was resumed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return (re.findall(r"Command: (.+)", text) or [""])[-1].replace("`", "'")


def _method(entry: dict[str, Any]) -> str:
    shown = {
        key: value for key, value in entry.items() if key not in ("NAME", "TARGETS") and value not in ([], {}, None)
    }
    targets = ", ".join(f"`{name}`" for name in entry["TARGETS"])
    return f"{entry['NAME']} on {targets} ({', '.join(f'{key} {value}' for key, value in shown.items())})"


def add_picture(
    folder: str | os.PathLike[str], picture: str | os.PathLike[str] | None, target: str | os.PathLike[str]
) -> tuple[str, str]:
    """Put a card's picture into the folder ``target``: its name there and its caption, both "" where there is none.

    Args:
        folder: the adapter's.
        picture: as of :func:`peft_d2.push_to_hub`.
        target: where the card will be.
    """
    if picture is None:
        last = Path(folder).resolve()
        found = sorted(last.parent.glob("inference/*/report.html")) if last.name == "adapter_final" else []
        drawn, name = (_curves(found[0].read_text(encoding="utf-8")), found[0].parent.name) if found else (None, "")
        caption = f"Precision over recall on {name}, by class, at IoU 0.5 (blue), 0.75 (orange) and 0.9 (red)"
    elif picture and Path(picture).suffix == ".html":
        drawn = _best_and_worst(Path(picture).read_text(encoding="utf-8"))
        caption = "The best and the worst image of the evaluation: the truth on the left, what was found on the right"
    elif picture:
        shutil.copyfile(picture, Path(target, f"picture{Path(picture).suffix}"))
        return f"picture{Path(picture).suffix}", "Predictions"
    else:
        drawn, caption = None, ""
    if drawn is None:
        return "", ""
    drawn.save(Path(target, "picture.png"))
    return "picture.png", caption


def _curves(page: str) -> Any:
    """The report's curves as one picture; None where it has none."""
    from PIL import Image, ImageDraw

    found = _CURVE.findall(page)[:_CLASSES]
    if not found:
        return None
    corners = [(i % _COLUMNS * _CELL[0], i // _COLUMNS * _CELL[1]) for i in range(len(found))]
    size = max(x for x, _ in corners) + _CELL[0], corners[-1][1] + _CELL[1]
    image = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")  # twice as large: the lines get smooth
    draw = ImageDraw.Draw(image)
    for (svg, _), (left, top) in zip(found, corners, strict=True):
        for points, colour in [("20,10 20,140 150,140", "#999999"), *_LINE.findall(svg)]:
            pairs = (pair.split(",") for pair in points.split())
            draw.line([(2 * (left + float(x)), 2 * (top + float(y))) for x, y in pairs], colour, 3)
    image = image.resize(size, Image.Resampling.LANCZOS)
    for (_, name), (left, top) in zip(found, corners, strict=True):
        text = html.unescape(name)[:26].encode("latin-1", "replace").decode("latin-1")  # all that old fonts have
        ImageDraw.Draw(image).text((left + 20, top + 146), text, "black")
    return image


def _best_and_worst(page: str) -> Any:
    """The first of the report's best images above the first of its worst; None where it has none."""
    from PIL import Image

    from peft_d2.data.pictures import sheet

    firsts = [_IMAGES.search(part) for part in page.split('<div class="pairs">')[1:]]
    pictures = [data for first in firsts if first is not None for data in _JPEG.findall(first[1])]
    opened = [Image.open(io.BytesIO(base64.b64decode(data))) for data in pictures]
    return sheet(opened, columns=2) if opened else None
