"""Reading a config file with its ``_BASE_`` files, without running any code that it may hold.

Detectron2's own reader falls back to one that executes ``!!python`` tags. Published files use a single such tag, to
write down a list of image sizes; that arithmetic is computed here, and every other tag is refused.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from peft_d2.engine.errors import ConfigError

BASE_KEY = "_BASE_"
_MAX_ITEMS = 10_000


def read_tree(path: str) -> dict[str, Any]:
    """The file's content merged over that of its base files.

    Raises:
        ConfigError: a file that does not exist, is no yaml mapping, holds code, or is its own base.
    """
    return _read_tree(path, ())


def read_top(path: str) -> dict[str, Any]:
    """The content of the file alone.

    Raises:
        ConfigError: see :func:`read_tree`.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"config file {path!r} does not exist. {_moved(path) or 'Give the path of a yaml file.'}")
    try:
        with open(path, encoding="utf-8") as stream:
            tree = yaml.load(stream, Loader=_ConfigLoader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config file holds KEY: VALUE pairs, this one a {type(tree).__name__}.")
    return tree or {}


def _moved(path: str) -> str:
    """Where a file is now that had its model in its name, as in ``peft/lora_mask_dino.yaml``; "" for others."""
    folder, words = Path(path).parent, set(re.split("[_.]", Path(path).name))
    candidates = []
    for file in folder.glob("*/**/*.yaml") if folder.name == "peft" else ():
        known = set(re.split("[_./]", file.relative_to(folder).as_posix()))
        if words <= known:
            candidates.append((len(known - words - {"ablations"}), str(file)))
    return f"It is {min(candidates)[1]} now: each model has a folder of its own." if candidates else ""


def _read_tree(path: str, above: tuple[str, ...]) -> dict[str, Any]:
    if os.path.realpath(path) in above:
        raise ConfigError(f"{path}: is its own {BASE_KEY}, directly or through others.")
    tree = read_top(path)
    bases = tree.pop(BASE_KEY, [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        beside = os.path.join(os.path.dirname(path), os.path.expanduser(str(base)))
        _merge(_read_tree(beside, (*above, os.path.realpath(path))), merged, path)
    _merge(tree, merged, path)
    return merged


def _merge(new: Mapping[str, Any], into: dict[str, Any], path: str) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and key in into:
            if not isinstance(into[key], dict):
                raise ConfigError(f"{path}: {key} is a group of keys here and a single value in the base file.")
            _merge(value, into[key], path)
        else:
            into[key] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _ConfigLoader(yaml.SafeLoader):
    """Plain yaml, and the one tag that published configs use."""


def _sizes(loader: yaml.SafeLoader, node: yaml.Node) -> list[int]:
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if len(items) != 1 or not isinstance(items[0], yaml.ScalarNode):
        raise _refused(node, "expected one expression")
    text = str(items[0].value)
    try:
        return _comprehension(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, ZeroDivisionError, OverflowError) as error:
        raise _refused(node, f"{text[:80]!r} is more than arithmetic over a range ({error})") from error


def _refused(node: yaml.Node, why: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, f"{why}; code in config files is not run", node.start_mark)


def _comprehension(node: ast.expr) -> list[int]:
    """``[<arithmetic of x> for x in range(...)]``, the form in which published files list sizes."""
    if not isinstance(node, ast.ListComp) or len(node.generators) != 1:
        raise ValueError("not a list comprehension")
    loop = node.generators[0]
    call = loop.iter
    if loop.ifs or loop.is_async or not isinstance(loop.target, ast.Name):
        raise ValueError("not a plain loop")
    if (
        not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range")
        or call.keywords
    ):
        raise ValueError("not a loop over range")
    numbers = range(*(int(_number(argument, {})) for argument in call.args))
    if len(numbers) > _MAX_ITEMS:
        raise ValueError(f"more than {_MAX_ITEMS} items")
    return [_number(node.elt, {loop.target.id: x}) for x in numbers]  # type: ignore[misc]


def _number(node: ast.expr, names: Mapping[str, int]) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, names)
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left, names), _number(node.right, names)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
    if _is_call(node, "int") and len(node.args) == 1:  # type: ignore[attr-defined]
        return int(_number(node.args[0], names))  # type: ignore[attr-defined]
    raise ValueError(f"{ast.unparse(node)[:40]!r} is not allowed")


def _is_call(node: ast.expr, name: str) -> bool:
    if not isinstance(node, ast.Call) or node.keywords:
        return False
    return isinstance(node.func, ast.Name) and node.func.id == name


_ConfigLoader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _sizes)
