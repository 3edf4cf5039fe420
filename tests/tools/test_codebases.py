"""Other people's code: the page has the tool's own diffs, and where checkouts are, their programs run with them.

``PEFT_D2_CHECKOUTS=~/code pytest tests/tools/test_codebases.py`` runs each codebase that is below that folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "projects" / "codebases"))

import matrix  # noqa: E402

ENTRIES = {name: entry for name, entry in matrix.codebases().items() if not entry["not_run"]}
CHECKOUTS = os.environ.get("PEFT_D2_CHECKOUTS", "")


@pytest.mark.parametrize("name", ENTRIES)
def test_the_page_has_the_lines_that_the_tool_tries(name: str) -> None:
    assert matrix.diff(name) in (ROOT / "docs" / "codebases.md").read_text()


def test_the_lines_go_where_the_page_says() -> None:
    script = "# theirs\nimport os\n\ndef setup(args):\n    cfg = get_cfg()\n    cfg.merge_from_file(args.config_file)\n"
    lines = matrix.patched(script, serve=True).splitlines()
    assert lines[1:6] == ["import peft_d2", *matrix.SERVE, "import os"]
    assert lines[-3:] == [*(f"    {line}" for line in matrix.ADD), "    cfg.merge_from_file(args.config_file)"]


def test_a_row_replaces_the_one_of_its_codebase_and_build(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A\n\n{matrix.HEADER}\n|---|\n| [B](u) `1` | 0.5 | no |\n| [B](u) `1` | main | no |\n\nEnd\n")
    matrix.write_row(page, ["[B](u) `2`", "0.5", "yes"])
    matrix.write_row(page, ["[A](u) `1`", "0.5", "yes"])
    rows = page.read_text().splitlines()[4:]
    assert rows == ["| [A](u) `1` | 0.5 | yes |", "| [B](u) `1` | main | no |", "| [B](u) `2` | 0.5 | yes |", "", "End"]


@pytest.mark.parametrize("name", ENTRIES)
def test_their_program_runs_with_the_lines(name: str, tmp_path: Path) -> None:
    if not CHECKOUTS or not (Path(CHECKOUTS) / ENTRIES[name]["folder"]).is_dir():
        pytest.skip(f"set PEFT_D2_CHECKOUTS to a folder that holds a clone of {ENTRIES[name]['url']}")
    row = matrix.Row(ENTRIES[name], Path(CHECKOUTS).resolve(), tmp_path, None)
    cells = dict(row.cells())
    if cells["imports"].startswith("no: ModuleNotFoundError"):
        pytest.skip(f"{name} needs packages that are not installed: {cells['imports']}")
    assert all(cells.get(column, "").startswith("yes") for column in matrix.COLUMNS), cells
