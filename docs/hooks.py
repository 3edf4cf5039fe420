"""Writes the config reference from the package's source while the site is built.

Each part of the package that has config keys lists them, as YAML with comments, in a text ``KEYS`` at its top. The
page is made of these, so it cannot lag behind the code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DETECTRON2 = "https://detectron2.readthedocs.io/en/latest/modules/config.html#config-references"
TITLE = f"""# Config reference

Made from the code. Keys of Detectron2 itself are described in [its own reference]({DETECTRON2}). Every key can be
set in a yaml file or behind a command: `tools/train_net.py ... KEY VALUE`. A key that does not exist is an error that
names the nearest one. A published model's own keys have no description here: they are what its authors' files set.
"""


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this with the site's files; the reference is added to them."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "config-reference.md", content=reference()))
    return files


def reference() -> str:
    """The page, in Markdown."""
    parts = [TITLE]
    for path in sorted((ROOT / "peft_d2").rglob("*.py")):
        rows = list(config_keys(path))
        if rows:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            parts.append(f"\n## {section(path)}\n\nFrom `{module}`.\n\n| key | default | what |\n|---|---|---|")
            parts += [f"| `{key}` | `{default}` | {text} |" for key, default, text in rows]
    return "\n".join(parts) + "\n"


def section(path: Path) -> str:
    """A title for the keys of a file: the first sentence of what the file says of itself."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or path.stem
    return re.split(r"(?<=[a-z)])[.:](?:\s|$)", docstring)[0].replace("\n", " ").replace("``", "`")


def config_keys(path: Path) -> Iterator[tuple[str, str, str]]:
    """(key, default, what it does) of each key in the texts named ``*KEYS`` of a source file, which are YAML.

    A comment serves the keys on the line below it.
    """
    for node in ast.parse(path.read_text()).body:
        named = (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id.endswith("KEYS")
        )
        if named and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from keys_of_yaml(node.value.value)


def keys_of_yaml(text: str) -> Iterator[tuple[str, str, str]]:
    """See :func:`config_keys`."""
    import yaml

    lines = text.splitlines()

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            comment = comment_above(lines, key.start_mark.line)
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, f"{prefix}{key.value}.")
            else:
                default = text[value.start_mark.index : value.end_mark.index].strip() or '""'
                yield f"{prefix}{key.value}", escape(default), escape(comment)

    yield from walk(yaml.compose(text), "")


def comment_above(lines: list[str], index: int) -> str:
    """The comment right above a line."""
    comment: list[str] = []
    while index and lines[index - 1].lstrip().startswith("#"):
        index -= 1
        comment.insert(0, lines[index].strip("# "))
    return " ".join(comment)


def escape(text: str) -> str:
    """Fit for a cell of a table."""
    return text.replace("|", "\\|").replace("``", "`")
