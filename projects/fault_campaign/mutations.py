"""Adapter folders that were damaged, edited, mixed up, or belong to another model."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_d2 import adapters, peft
from peft_d2.storage import AdapterFileError

from .world import Result, World

FILES = ("adapter_model.safetensors", "adapter_config.json", "peft_d2.json")


def mutations(world: World, count: int, seed: int = 0) -> list[Result]:
    """``count`` mutations; each must be refused with the folder's name, or be harmless: load exactly what was saved."""
    result, chance = Result("changed or foreign adapter files"), random.Random(seed)
    root = world.root / "mutations"
    trained, other = _adapted(world, 1), _adapted(world, 2)
    adapters.save_adapter(trained, root / "good", metrics={"segm/AP": 12.5})
    adapters.save_adapter(other, root / "other", metrics={"segm/AP": 7.0})
    expected = peft.adapter_state_dict(trained)
    reader = _adapted(world, 3)
    kinds = [*_OF_FILES, "wrong base", "wrong rank"]
    for number in range(count):
        kind, name = kinds[number % len(kinds)], FILES[number // len(kinds) % len(FILES)]
        folder = root / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "good", folder)
        model = reader
        if kind == "wrong base":
            model = _adapted(world, 3)
            _nudge_base(model, chance)
        elif kind == "wrong rank":
            model = world.model(peft=True, rank=chance.choice((1, 3, 4, 8)))
        else:
            _OF_FILES[kind](folder, name, chance)
        outcome = _load(model, folder, expected)
        # A file of equal bytes loads, and must: it is then counted as harmless.
        result.add("" if outcome in ("refused", "harmless") else f"{kind} of {name}: {outcome}", outcome)
    return [result]


def _adapted(world: World, seed: int) -> nn.Module:
    """An injected model whose trained tensors are random, on the same base."""
    model = world.model(peft=True)
    base = torch.load(world.base, weights_only=True)["model"]
    model.load_state_dict(base, strict=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in peft.adapter_state_dict(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def _load(model: nn.Module, folder: Path, expected: dict[str, torch.Tensor]) -> str:
    try:
        adapters.load_adapter(model, folder)
    except (AdapterFileError, peft.PeftError) as error:
        return "refused" if str(folder) in str(error) else f"refused without the folder's name: {error}"
    except Exception as error:  # whatever it is, it is no refusal
        return f"crashed: {type(error).__name__}: {error}"
    found = peft.adapter_state_dict(model)
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    return "harmless" if same else "silent"


def _nudge_base(model: nn.Module, chance: random.Random) -> None:
    """Another base: one value of one frozen weight is different."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with torch.no_grad():
        values = chance.choice(frozen).view(-1)
        values[chance.randrange(len(values))] += 0.01


def _truncate(folder: Path, name: str, chance: random.Random) -> None:
    path = folder / name
    os.truncate(path, chance.randrange(path.stat().st_size))


def _flip_a_bit(folder: Path, name: str, chance: random.Random) -> None:
    data = bytearray((folder / name).read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    (folder / name).write_bytes(data)


def _overwrite(folder: Path, name: str, chance: random.Random) -> None:
    """A block of zeros, as a file system may leave after a crash."""
    data = bytearray((folder / name).read_bytes())
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice((1, 64, 512, 4096)))
    data[start:end] = bytes(end - start)
    (folder / name).write_bytes(data)


def _append(folder: Path, name: str, chance: random.Random) -> None:
    with (folder / name).open("ab") as stream:
        stream.write(chance.randbytes(chance.randrange(1, 100)))


def _delete(folder: Path, name: str, chance: random.Random) -> None:
    (folder / name).unlink()


def _swap(folder: Path, name: str, chance: random.Random) -> None:
    """One file is that of another adapter of the same shape."""
    shutil.copyfile(folder.parent / "other" / name, folder / name)


def _edit_json(folder: Path, name: str, chance: random.Random) -> None:
    path = folder / (name if name.endswith(".json") else chance.choice(FILES[1:]))
    tree = json.loads(path.read_text())
    node, key = chance.choice(list(_leaves(tree)))
    value = node[key]
    node[key] = value + 1 if isinstance(value, (int, float)) else f"{value}x"
    path.write_text(json.dumps(tree, indent=2))


def _leaves(node: Any) -> Any:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)) and value:
            yield from _leaves(value)
        else:
            yield node, key


_OF_FILES: dict[str, Callable[[Path, str, random.Random], None]] = {
    "truncated": _truncate,
    "bit flipped": _flip_a_bit,
    "block of zeros": _overwrite,
    "bytes appended": _append,
    "deleted": _delete,
    "swapped": _swap,
    "json edited": _edit_json,
}
