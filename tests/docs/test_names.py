"""What the pages, configs and docstrings name is there: files of the project, and objects of the package."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

ROOT = Path(__file__).parents[2]
PAGES = [p for pattern in ("*.md", "docs/**/*.md", "projects/**/*.md") for p in sorted(ROOT.glob(pattern))]
SOURCES = [p for pattern in ("peft_d2/**/*.py", "configs/**/*.yaml", "tools/*.py") for p in sorted(ROOT.glob(pattern))]
FILE = re.compile(
    r"(?<![\w/.<{*-])((?:peft_d2|tools|projects|configs|docs|tests|examples|csrc)/[\w./-]*\w)(?![\w/]*[*{<])"
)
OBJECT = re.compile(r"(?<![\w./-])peft_d2(?:\.[A-Za-z_]\w*)+")
# Of Detectron2's own checkout, and of Mask2Former's.
OF_OTHERS = re.compile(r"projects/(PointRend|DeepLab|Panoptic-DeepLab|ViTDet)|tools/convert-")
EARLIER = {"CHANGELOG.md"}  # names what was


def missing_files(path: Path) -> list[str]:
    named = [name for name in FILE.findall(path.read_text()) if not OF_OTHERS.match(name)]
    return sorted({name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()})


def missing_objects(path: Path) -> list[str]:
    """Names of modules and what is in them that cannot be resolved; a file's name is none."""
    found = []
    for name in sorted(set(OBJECT.findall(path.read_text()))):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            found += [] if name.endswith((".json", ".so", ".egg")) else [name]
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages(path: Path) -> None:
    assert missing_files(path) == []
    assert path.name in EARLIER or missing_objects(path) == []


def test_sources() -> None:
    found = {path.relative_to(ROOT).as_posix(): missing_files(path) + missing_objects(path) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`tools/nothing.py`, [a](docs/none.md), `peft_d2.data.nothing`, `tools/train_net.py`, `peft_d2.inject`"
    )
    assert missing_files(page) == ["docs/none.md", "tools/nothing.py"]
    assert missing_objects(page) == ["peft_d2.data.nothing"]
