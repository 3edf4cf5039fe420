"""``peft-d2``: every command's help, and the command line of an installed wheel, away from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

from peft_d2.__main__ import COMMANDS, main  # noqa: E402
from peft_d2.compat import bundled  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not bundled(f"tools/{COMMANDS[name][0]}").is_file():
        pytest.skip(f"tools/{COMMANDS[name][0]} is not there")
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert text.startswith(f"usage: peft-d2 {name} ")
    assert len(text.splitlines()) <= 55
    assert re.search(rf"^ +peft-d2 {name}\b", text, re.MULTILINE), text


def test_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: 'trian' is no command of peft-d2. Did you mean train?\n"
    assert main([]) == 0
    assert {"train", "setup-detectron2"} < set(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["train", "demo", "predict", "check-data"])
def test_without_detectron2_one_line_says_how_to_get_it(name: str) -> None:
    block = "import sys; sys.modules['detectron2'] = None; from peft_d2.__main__ import main"
    code = f"{block}; sys.exit(main([{name!r}, '--help']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if name == "check-data":  # works without
        assert done.returncode == 0 and done.stdout.startswith("usage: peft-d2 check-data")
        return
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert told[-1].startswith(f"error: Detectron2 is not installed, and {name} needs it. Run `peft-d2 setup")
    assert "Traceback" not in done.stderr


def test_the_docs_name_every_command() -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text()
    (words,) = re.findall(r'complete -o default -W "([^"]*)"', page)
    assert words.split() == list(COMMANDS)
    table = page.partition("## The command line")[2]
    assert all(f"`{name}`" in table for name in COMMANDS)


def test_an_installed_wheel_has_its_tools_and_configs(tmp_path: Path) -> None:
    """One wheel for every Python, which needs no checkout: neither on the path nor as the working directory."""
    source, work = tmp_path / "source", tmp_path / "work"
    for name in ("peft_d2", "configs", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    environment = {**os.environ, "CXX": "no-such-compiler", "PEFT_D2_CUDA": "0", "OMP_NUM_THREADS": "1"}
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=source, env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-\w+\.whl$", wheel.name)
    zipfile.ZipFile(wheel).extractall(work / "site")
    shutil.rmtree(source)

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "peft_d2", *arguments]
        environment["PYTHONPATH"] = str(work / "site")
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "5.02 %" in run("inspect", "--config-file", "configs/demo/lora.yaml")
    assert str(work / "site") in run("doctor")


@pytest.mark.parametrize("word", [["--opts"], []], ids=["with_the_word", "without"])
def test_config_pairs_end_a_command_line_with_the_word_opts_or_without(word: list[str]) -> None:
    from demo import demo_parser
    from export import export_parser
    from merge_adapter import merge_parser

    from peft_d2.engine.launch import training_parser

    for parser, flags in (
        (training_parser(), []),
        (demo_parser(), ["--input", "a.png", "b.png", "--output", "drawn"]),
        (export_parser(), ["--output", "m.onnx"]),
        (merge_parser(), ["--adapter", "a", "--output", "m.pth"]),
    ):
        args = parser.parse_args(["--config-file", "c.yaml", *flags, *word, "SEED", "-1"])
        assert args.opts == ["SEED", "-1"]
        assert parser.parse_args(["--config-file", "c.yaml", *flags]).opts == []
