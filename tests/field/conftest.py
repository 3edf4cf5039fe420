"""Small sets in COCO's format, and the command-line tools in this process, which is quicker than in their own."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import toy  # noqa: E402

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "engine" / "tiny.yaml"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of checked data sets is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tool(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    forget_loggers: Callable[[], None],
) -> Callable[..., tuple[int, str]]:
    """``tool("train_net", ...)``: the exit status of a command line, and what it printed."""

    def call(name: str, *arguments: object) -> tuple[int, str]:
        forget_loggers()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            forget_loggers()
        return code, "".join(capsys.readouterr())

    return call


class Own:
    """A small set of one's own, whose json can be changed."""

    def __init__(self, folder: Path, images: int = 4, domain: str = "day", seed: int = 0) -> None:
        made = toy.generate(folder, domain, images, seed=seed, size=64)
        self.json, self.images = made.json, made.images
        self.data: dict[str, Any] = json.loads(made.json.read_text())

    def write(self) -> Own:
        """Write the json as it is now."""
        self.json.write_text(json.dumps(self.data))
        return self

    def change(self, how: Callable[[dict[str, Any]], Any] | None) -> Own:
        """Change the json."""
        if how is not None:
            how(self.data)
        return self.write()


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Own]:
    """``own("train")``: a new set."""
    return lambda name, **more: Own(tmp_path / name, **more)
