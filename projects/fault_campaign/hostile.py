"""Files made to run code, to lie about sizes, or to take for ever; and options that no method can have."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import random
import struct
import tarfile
import time
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peft_d2 import peft
from peft_d2.peft.methods import METHODS
from peft_d2.storage import CheckpointError, read_checkpoint

from .world import Result, World

SECONDS = 5.0  # of processor time that a file may take


class _Call:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile_files(world: World, count: int, seed: int = 0) -> list[Result]:
    """``count`` files as base weights: each is refused by name, or holds weights; none runs code or takes long."""
    result, chance = Result("hostile files"), random.Random(seed)
    canary = world.root / "canary"
    for number in range(count):
        kind = list(_FILES)[number % len(_FILES)]
        path = world.root / f"evil{chance.choice(['.pth', '.pkl', '.bin', '.pt', '.safetensors'])}"
        path.write_bytes(_FILES[kind](chance, canary))
        start = time.process_time()
        try:
            read_checkpoint(path)
            outcome = "harmless"
        except CheckpointError as error:
            outcome = "refused" if path.name in str(error) else f"refused without its name: {error}"
        except Exception as error:
            outcome = f"crashed: {type(error).__name__}: {error}"[:300]
        if canary.exists():
            outcome = "executed"
            canary.unlink()
        if time.process_time() - start > SECONDS:
            outcome = f"slow: {time.process_time() - start:.0f} s"
        result.add("" if outcome in ("refused", "harmless") else f"{kind}: {outcome}", outcome.partition(":")[0])
    return [result]


def _pickled_call(chance: random.Random, canary: Path) -> bytes:
    call = chance.choice(
        [
            _Call(os.system, f"touch {canary}"),
            _Call(eval, f"open({str(canary)!r}, 'w').close()"),
            _Call(exec, f"open({str(canary)!r}, 'w').close()"),
            _Call(open, str(canary), "w"),
        ]
    )
    content = chance.choice([call, {"model": {"w": call}}, [call], {"model": {"w": np.ones(2)}, "x": call}])
    return pickle.dumps(content, protocol=chance.randrange(6))


def _torch_call(chance: random.Random, canary: Path) -> bytes:
    stream = io.BytesIO()
    content = {"model": {"w": torch.ones(2)}, "x": _Call(os.system, f"touch {canary}")}
    torch.save(content, stream, _use_new_zipfile_serialization=chance.random() < 0.5)
    return stream.getvalue()


def _archive(chance: random.Random, canary: Path) -> bytes:
    """An archive with compressed, doubled, oversized or foreign members."""
    stream = io.BytesIO()
    compression = chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for _ in range(chance.randrange(1, 4)):
            name = chance.choice(["a/data.pkl", "a/data/0", "../x", "a/constants.pkl", "b/data.pkl", "a/code/x.py"])
            data = chance.choice([bytes(2**22), _pickled_call(chance, canary), b"\x80\x02}."])
            if name not in archive.namelist():
                archive.writestr(name, data)
    return chance.choice([b"", bytes(512)]) + stream.getvalue()


def _polyglot(chance: random.Random, canary: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in (chance.choice(["pickle", "PK\x03\x04"]), "storages"):
            data = _pickled_call(chance, canary)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue() + _archive(chance, canary)


def _spliced(chance: random.Random, canary: Path) -> bytes:
    """A sound pickle or archive in which bytes were replaced, removed, doubled or exchanged."""
    stream = io.BytesIO()
    torch.save({"model": {"w": torch.randn(9), "v": torch.ones(2, 2)}, "iteration": 3}, stream)
    plain = pickle.dumps({"model": {"w": np.ones(3), "v": np.zeros((2, 2))}}, protocol=chance.randrange(6))
    data = bytearray(chance.choice([stream.getvalue(), plain, _torch_call(chance, canary)]))
    for _ in range(chance.randrange(1, 6)):
        here, there = (chance.randrange(len(data)) for _ in range(2))
        length = chance.choice((1, 1, 4, 30))
        part = chance.choice([bytes(length), chance.randbytes(length), data[there : there + length], b""])
        data[here : here + length] = part
        if not data:
            data = bytearray(b"x")
    return bytes(data)


def _shared(chance: random.Random, canary: Path) -> bytes:
    """Containers that hold the one before many times over."""
    level = chance.choice(
        [b"h\x00h\x00\x86", b"](" + b"h\x00" * 300 + b"e", b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00u"]
    )
    end = chance.choice([b"}h\x00K\x01s.", b"."])
    return b"\x80\x02)q\x00" + (level + b"q\x00") * chance.randrange(10, 3000) + end


def _liar(chance: random.Random, canary: Path) -> bytes:
    """Counts that the file does not have."""
    count = chance.choice([2**31 - 1, 2**32 - 1])
    wide = struct.pack("<Q", chance.choice([2**40, 2**62, 2**64 - 1]))
    return chance.choice(
        [
            b"\x80\x02X" + struct.pack("<I", count) + b"abc.",
            b"\x80\x04\x8e" + wide + b"abc.",
            b"\x80\x05\x96" + wide + b"abc.",
            b"\x80\x04\x95" + wide + b"}.",
            b"\x80\x02}r" + struct.pack("<I", count) + b".",
            wide + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + b"1234",
            struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}' + b"1234",
            struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
            b"\x80\x02" + b"(" * chance.randrange(1, 10**5) + b".",
        ]
    )


_FILES: dict[str, Callable[[random.Random, Path], bytes]] = {
    "a pickle with code": _pickled_call,
    "a torch file with code": _torch_call,
    "an odd archive": _archive,
    "a tar with an archive": _polyglot,
    "bytes exchanged": _spliced,
    "shared containers": _shared,
    "counts that lie": _liar,
}


class _Model(nn.Module):
    """A place for every method."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.norm = nn.Linear(4, 4), nn.Conv2d(4, 4, 3, padding=1), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)


def wrong_options(world: World, count: int, seed: int = 0) -> list[Result]:
    """``count`` entries of METHODS with wrong values: refused by the package's own error, nothing touched; or taken."""
    result, chance = Result("wrong options of methods"), random.Random(seed)
    options = [(name, field.name.upper()) for name in sorted(METHODS) for field in _fields(name)]
    for number in range(count):
        name, key = options[number % len(options)]
        entry: dict[str, Any] = {"NAME": name, "TARGETS": [chance.choice(["fc", "conv", "attention", "norm", "*"])]}
        entry[key] = copy.deepcopy(chance.choice(_VALUES))
        if chance.random() < 0.1:
            entry[chance.choice(["rank", "X" * 300, "", "TARGETS "])] = 1
        torch.manual_seed(0)
        model = _Model()
        before = _picture(model)
        try:
            peft.inject(model, [entry])
            outcome = "taken"
        except peft.PeftError as error:
            outcome = "refused" if _picture(model) == before else f"refused, and the model was changed: {error}"
        except Exception as error:
            outcome = f"crashed: {type(error).__name__}: {error}"[:200]
        good = outcome in ("refused", "taken")
        result.add("" if good else f"{name} {key}={str(entry[key])[:60]}: {outcome}", outcome.partition(":")[0])
    return [result]


def _fields(name: str) -> list[Any]:
    hints = typing.get_type_hints(METHODS[name].options_class)
    return [field for field in dataclasses.fields(METHODS[name].options_class) if field.name in hints]


def _picture(model: nn.Module) -> Any:
    """All that an injection may change."""
    parameters = [(n, id(p), p.requires_grad, p.detach().clone().tolist()) for n, p in model.named_parameters()]
    modules = [(n, type(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()]
    return parameters, modules, sorted(model.state_dict())


_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 1000, 10**30, 0.0, -0.5, 0.5, 1e-320, 1e308, float("nan"), float("inf"), "",
    "x", "re:[z-a]", "re:" + "(" * 500, "[]", "é" * 300, "gelu", "relu", [], [""], ["x"], ["re:["], [1], [None], [[]],
    {}, {"a": 1}, {1: 2}, (1, 2), (0, 0), [10**9], set(), object(), b"x", range(3), "1e400", "4" * 400, ["fc", "fc"],
    [float("nan")],
]  # fmt: skip
