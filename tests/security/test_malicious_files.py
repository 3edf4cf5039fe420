"""Files made to run code, to write elsewhere, or to eat all memory: each is refused by name, and none leaves a trace.

Every attack that runs code would create the canary file. That the attacks work at all is tested too, on naive readers.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from peft_d2.adapters import load_adapter
from peft_d2.storage import AdapterFileError, CheckpointError, adapter_file, disk, fingerprint, read_checkpoint

WEIGHTS = {"a.weight": torch.ones(2, 2)}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the file was executed"


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """No reader may ask for more than 2 GiB beyond what the process has already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touch(canary: Path) -> str:
    return f"touch {canary}"


def opcodes(*parts: Any) -> bytes:
    return b"\x80\x02" + b"".join(part if isinstance(part, bytes) else str(part).encode() for part in parts) + b"."


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def python(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


# Pickles that run code when unpickled freely.
EXECUTING: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda c: pickle.dumps({"model": {}, "x": Call(os.system, touch(c))}),
    "builtins.eval": lambda c: pickle.dumps(Call(eval, python(c))),
    "builtins.exec inside the weights": lambda c: pickle.dumps({"model": {"w": Call(exec, python(c))}}),
    "subprocess": lambda c: pickle.dumps([Call(subprocess.check_call, ["touch", str(c)])]),
    "getattr chain": lambda c: opcodes(
        global_("builtins", "getattr"), b"(", global_("os", "path"), text("os"), b"tR0",
        global_("builtins", "getattr"), b"(", global_("builtins", "__import__"), b"(", text("os"), b"tR",
        text("system"), b"tR(", text(touch(c)), b"tR",
    ),
    "dotted name": lambda c: b"\x80\x04" + text("os") + text("system") + b"\x93(" + text(touch(c)) + b"tR.",
    "protocol 0 INST": lambda c: f"(S'{touch(c)}'\nios\nsystem\n.".encode(),
    "OBJ": lambda c: b"(" + global_("os", "system") + text(touch(c)) + b"o.",
    "numpy's own loader": lambda c: pickle.dumps(
        Call(np.load, npy_with_code(c), None, True)
    ),
    "torch.load of a file": lambda c: pickle.dumps(Call(partial(torch.load, weights_only=False), code_file(c))),
    "torch storage with code": lambda c: opcodes(
        global_("torch.storage", "_load_from_bytes"), b"(B", struct.pack("<I", len(torch_bytes(c))), torch_bytes(c),
        b"tR",
    ),
    "a class of its own": lambda c: pickle.dumps([Call(type, "X", (object,), {}), Call(exec, python(c))]),
}  # fmt: skip


def npy_with_code(canary: Path) -> str:
    path = canary.with_name("code.npy")
    np.save(path, np.array([Call(os.system, touch(canary))], dtype=object), allow_pickle=True)
    return str(path)


def code_file(canary: Path) -> str:
    path = canary.with_name("code.bin")
    path.write_bytes(torch_bytes(canary))
    return str(path)


def torch_bytes(canary: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": WEIGHTS, "x": Call(os.system, touch(canary))}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("attack", EXECUTING)
def test_pickles_with_code_are_refused(attack: str, canary: Path, tmp_path: Path) -> None:
    data = EXECUTING[attack](canary)
    for suffix in (".pkl", ".pth", ".pt", ".bin"):
        path = tmp_path / f"evil{suffix}"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"evil\{suffix}"):
            read_checkpoint(path)


@pytest.mark.parametrize("attack", ["os.system", "builtins.eval", "getattr chain", "dotted name", "protocol 0 INST"])
def test_these_attacks_work_on_a_naive_reader(attack: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "x").write_bytes(EXECUTING[attack](canary))
    program = f"import pickle; pickle.load(open({str(tmp_path / 'x')!r}, 'rb'), encoding='latin1')"
    subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert canary.exists()


def array(shape: bytes, raw: bytes, dtype: bytes = b"f4") -> bytes:
    """Opcodes of a NumPy array of one dimension, as protocol 2 has them."""
    kind = global_("numpy", "dtype") + b"(U" + bytes([len(dtype)]) + dtype + b"K\x00K\x01tR"
    order = b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    start = global_("numpy.core.multiarray", "_reconstruct") + b"(" + global_("numpy", "ndarray") + b"(K\x00tU\x01btR"
    return start + b"(K\x01(" + shape + b"t" + kind + order + b"\x89U" + bytes([len(raw)]) + raw + b"tb"


# Pickles that run no code but lie about sizes, or tamper with the reader itself.
HOSTILE: dict[str, bytes] = {
    "array larger than its bytes": b"\x80\x02}U\x01w" + array(b"J\xff\xff\xff\x7f", b"1234") + b"s.",
    "array of negative size": b"\x80\x02}U\x01w" + array(b"J\xff\xff\xff\xff", b"1234") + b"s.",
    "array of objects": b"\x80\x02}U\x01w" + array(b"K\x01", b"1234", b"O8") + b"s.",
    "text that claims 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "bytes that claim 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "bytearray that claims 2**40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "frame of 2**60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "memo at 2**31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "integer of a million digits": b"L" + b"9" * 10**6 + b"L\n.",
    "attributes of the reader's functions": opcodes(
        global_("_codecs", "encode"), b"}", text("__defaults__"), b")s", b"b"
    ),
    "attributes of the reader's classes": opcodes(global_("numpy", "ndarray"), b"N}", text("build"), b"Ns\x86b"),
    "a call of data": opcodes(b"}", b"(tR"),
    "new object": opcodes(global_("collections", "OrderedDict"), b")\x81"),
    "persistent id": opcodes(b"K\x01Q"),
    "stack underflow": b"\x80\x02tR0000.",
    "extension registry": opcodes(b"\x82\x01"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_pickles_are_refused(attack: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(HOSTILE[attack])
    with pytest.raises(CheckpointError, match=r"evil\.pkl"):
        read_checkpoint(path)


def test_the_reader_is_as_it_was(tmp_path: Path) -> None:
    """After all attacks a sound file is read rightly, and the builtins are whole."""
    for data in HOSTILE.values():
        (tmp_path / "evil.pkl").write_bytes(data)
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "evil.pkl")
    (tmp_path / "good.pkl").write_bytes(pickle.dumps({"model": {"w": np.ones(3)}}, protocol=2))
    assert read_checkpoint(tmp_path / "good.pkl").state["w"].tolist() == [1, 1, 1]
    assert builtins.len is len


def torch_archive(path: Path, canary: Path, *, compress: bool = False, extra: dict[str, bytes] | None = None) -> None:
    compression = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", compression) as archive:
        code = {"model": WEIGHTS["a.weight"].tolist(), "x": Call(os.system, touch(canary))}
        archive.writestr("archive/data.pkl", pickle.dumps({} if compress or extra else code, protocol=2))
        archive.writestr("archive/version", b"3\n")
        for name, data in (extra or {}).items():
            archive.writestr(name, data)


def test_torch_files_with_code_are_refused(canary: Path, tmp_path: Path) -> None:
    torch_archive(tmp_path / "evil.pth", canary)
    torch.save({"model": WEIGHTS, "x": Call(os.system, touch(canary))}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(CheckpointError, match=rf"{name}: it asks for (posix|os)\.system, which no weights need"):
            read_checkpoint(tmp_path / name)


def test_zip_tricks_are_refused(canary: Path, tmp_path: Path) -> None:
    torch_archive(tmp_path / "bomb.pth", canary, compress=True, extra={"archive/data/0": bytes(50 * 2**20)})
    torch_archive(tmp_path / "script.pth", canary, extra={"archive/constants.pkl": b"x", "archive/code/a.py": b"x"})
    torch_archive(tmp_path / "path.pth", canary, extra={"../../canary": b"x"})
    for name, message in (
        ("bomb", "compressed"),
        ("script", "TorchScript"),
        ("path", "not in a subdirectory|no tensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / f"{name}.pth")


def zipped(program: bytes, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in members.items():
            archive.writestr(f"archive/data/{name[1:]}", data)
    return stream.getvalue()


def tensor(count: int, stored: int, stride: int = 1, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """A pickle of one tensor, as torch writes it."""
    storage = b"(" + text("storage") + global_("torch", kind) + text(key) + text("cpu") + integer(stored) + b"tQ"
    size, step = b"(" + integer(count) + b"t", b"(" + integer(stride) + b"t"
    rest = b"\x89" + global_("collections", "OrderedDict") + b")R"
    call = global_("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x00" + size + step + rest + b"tR"
    return b"\x80\x02}" + text("w") + call + b"s."


def integer(value: int) -> bytes:
    data = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data


ONE = struct.pack("<f", 1.0)
ARCHIVES: dict[str, bytes] = {
    "2**35 numbers on one": zipped(tensor(2**35, 1, stride=0), _0=ONE),
    "2**35 numbers of one that are not there": zipped(tensor(2**35, 2**35), _0=ONE),
    "numbers beyond the end": zipped(tensor(2, 2, stride=7), _0=ONE * 2),
    "storage larger than its member": zipped(tensor(2, 2), _0=ONE),
    "storage of another type": zipped(tensor(1, 1, kind="DoubleStorage"), _0=ONE),
    "no such member": zipped(tensor(1, 1, key="1"), _0=ONE),
    "member elsewhere": zipped(tensor(1, 1, key="../../x"), _0=ONE),
    "an archive behind a tar": bytes(512) + zipped(tensor(1, 1), _0=ONE),
    "an archive behind another": zipped(tensor(1, 1), _0=ONE) + zipped(tensor(1, 1), _0=ONE * 2),
    "an archive behind the signature of one": b"PK\x03\x04" + bytes(508) + zipped(tensor(1, 1), _0=ONE),
    "no archive of torch's": zipped(b"\x80\x02}.").replace(b"data.pkl", b"data.txt"),
    "a program in the archive": zipped(opcodes(global_("os", "system"), b"(", text("true"), b"tR")),
}  # fmt: skip


def test_the_archive_that_the_attacks_are_made_from_is_read(tmp_path: Path) -> None:
    (tmp_path / "good.pth").write_bytes(zipped(tensor(2, 2), _0=ONE * 2))
    assert read_checkpoint(tmp_path / "good.pth").state["w"].tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("attack", ARCHIVES)
def test_hostile_archives_are_refused(attack: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(ARCHIVES[attack])
    with pytest.raises(CheckpointError, match=rf"evil\{suffix}") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_a_tar_with_an_archive_appended_is_refused(canary: Path, tmp_path: Path) -> None:
    """Torch before 2.6 unpickled it; the first member's name may even be the signature of an archive."""
    for name in ("pickle", "PK\x03\x04"):
        with tarfile.open(tmp_path / "evil.pth", "w") as archive:
            data = EXECUTING["os.system"](canary)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        with (tmp_path / "evil.pth").open("ab") as stream:
            stream.write(zipped(tensor(1, 1), _0=ONE))
        with pytest.raises(CheckpointError, match=r"evil\.pth"):
            read_checkpoint(tmp_path / "evil.pth")


def shared(kind: str) -> bytes:
    """Containers that hold the one before many times over: small in a file, vast when they are walked or hashed."""
    level = {
        "dicts": b"}" + b"".join(b"X\x01\x00\x00\x00%ch\x00" % (97 + i) for i in range(2)).join([b"(", b"u"]),
        "tuples as keys": b"h\x00h\x00\x86",
        "wide dicts": b"}(" + b"".join(integer(i) + b"h\x00" for i in range(300)) + b"u",
    }[kind]
    start = {"dicts": b"}q\x00", "tuples as keys": b")q\x00", "wide dicts": b"}q\x00"}[kind]
    end = b"}h\x00K\x01s" if kind == "tuples as keys" else b""
    return b"\x80\x02" + start + (level + b"q\x00") * 60 + end + b"."


@pytest.mark.parametrize("kind", ["dicts", "tuples as keys", "wide dicts"])
@pytest.mark.parametrize("form", ["pickle", "archive"])
def test_shared_containers_take_no_time(kind: str, form: str, tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(shared(kind) if form == "pickle" else zipped(shared(kind)))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"evil\.pkl"):
        read_checkpoint(tmp_path / "evil.pkl")
    assert time.process_time() - start < 2


def test_arrays_that_share_their_bytes_take_no_memory(tmp_path: Path) -> None:
    raw = b"B" + struct.pack("<I", 2**20) + bytes(2**20) + b"q\x01"
    kind = global_("numpy", "dtype") + text("u1").join([b"(", b"tR"]) + b"q\x02"
    one = global_("numpy.core.numeric", "_frombuffer") + b"(h\x01h\x02" + integer(2**20) + b"\x85" + text("C") + b"tR"
    text_ = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"q\x03"
    encoded = global_("_codecs", "encode") + b"(h\x03" + text("latin1") + b"tR"
    size = global_("torch", "Size") + b"(h\x03tR"
    for part in (one, encoded, size):
        many = b"".join(integer(number) + part for number in range(5000))
        (tmp_path / "evil.pkl").write_bytes(b"\x80\x02" + raw + text_ + kind + b"}(" + many + b"u.")
        with pytest.raises(CheckpointError, match="claim more bytes than the file has"):
            read_checkpoint(tmp_path / "evil.pkl")


def test_a_scripted_model_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="TorchScript|compressed"):
        read_checkpoint(tmp_path / "script.pt")


def test_a_tar_archive_is_refused(canary: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.pth", "w") as archive:
        for name in ("pickle", "storages", "tensors", "../canary"):
            data = EXECUTING["os.system"](canary)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(CheckpointError, match="a packed archive"):
        read_checkpoint(tmp_path / "evil.pth")


def test_a_tensor_larger_than_its_data_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1).expand(2**33)}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="larger than its data"):
        read_checkpoint(tmp_path / "evil.pth")


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS: dict[str, bytes] = {
    "header of 2**63 bytes": safetensors({}, length=2**63),
    "header longer than the file": safetensors({"a": entry([1], [0, 4])}, b"1234", length=10**6),
    "deeply nested header": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "offsets outside": safetensors({"a": entry([1], [0, 2**60])}, b"1234"),
    "offsets reversed": safetensors({"a": entry([1], [4, 0])}, b"1234"),
    "negative offsets": safetensors({"a": entry([1], [-4, 0])}, b""),
    "overlapping tensors": safetensors({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, b"1234"),
    "shape larger than the data": safetensors({"a": entry([2**40, 2**40], [0, 4])}, b"1234"),
    "hole between tensors": safetensors({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, b"123412341234"),
    "unknown dtype": safetensors({"a": entry([1], [0, 4], "PYOBJECT")}, b"1234"),
    "control characters in a name": safetensors({"a\x1b[2J\x00": entry([1], [0, 4])}, b"1234"),
    "entry that is a list": safetensors({"a": [1, 2]}, b"1234"),
    "metadata that are objects": safetensors({"__metadata__": {"a": {}}}),
    "header that is a number": safetensors(b"12345678"),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_hostile_safetensors_are_refused(attack: str, tmp_path: Path) -> None:
    (tmp_path / "evil.safetensors").write_bytes(SAFETENSORS[attack])
    with pytest.raises(CheckpointError, match=r"evil\.safetensors"):
        read_checkpoint(tmp_path / "evil.safetensors")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "adapter"
    adapter_file.write(
        folder,
        {"fc.lora_a": torch.ones(1, 2), "fc.lora_b": torch.ones(2, 1)},
        methods=[],
        train=[],
        base=fingerprint({}),
    )
    return folder


def signed(record: dict[str, Any]) -> bytes:
    record.pop("checksum", None)
    return disk.dump_json({**record, "checksum": disk.sha256(disk.dump_json(record))})


def moved(name: str) -> Callable[[dict[str, Any]], bytes]:
    def change(record: dict[str, Any]) -> bytes:
        files = record["files"]
        files[name] = files.pop("adapter_model.safetensors")
        return signed(record)

    return change


def sized(size: int) -> Callable[[dict[str, Any]], bytes]:
    return lambda record: signed({**record, "files": {name: {"bytes": size, "sha256": ""} for name in record["files"]}})


RECORDS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "path upwards": moved("../secret.safetensors"),
    "absolute path": moved("/etc/passwd"),
    "path with a null": moved("a\x00.safetensors"),
    "deep nesting": lambda record: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "integer of a million digits": lambda record: b'{"format_version": ' + b"9" * 10**6 + b"}",
    "number beyond all bounds": lambda record: b'{"format_version": 1e999}',
    "not a number": lambda record: b'{"format_version": NaN}',
    "key that occurs twice": lambda record: b'{"format": "a", "format": "b"}',
    "size that is negative": sized(-1),
    "size that is huge": sized(10**19),
    "hundred megabytes of spaces": lambda record: b" " * (100 * 2**20),
    "compressed": lambda record: zlib.compress(b" " * 10**6),
    "not utf-8": lambda record: b'{"a": "\xff\xfe"}',
    "not signed": lambda record: disk.dump_json({**record, "checksum": "0" * 64}),
}  # fmt: skip


@pytest.mark.parametrize("attack", RECORDS)
def test_hostile_records_are_refused(attack: str, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "secret.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    record = adapter / "peft_d2.json"
    record.write_bytes(RECORDS[attack](json.loads(record.read_text())))
    with pytest.raises(AdapterFileError):
        load_adapter(nn.Sequential(), adapter)


def test_special_files_are_not_read(adapter: Path) -> None:
    for name in ("peft_d2.json", "adapter_config.json", "adapter_model.safetensors"):
        data = (adapter / name).read_bytes()
        (adapter / name).unlink()
        os.mkfifo(adapter / name)  # a reader that opens it waits for ever
        with pytest.raises(AdapterFileError, match="no regular file"):
            load_adapter(nn.Sequential(), adapter)
        (adapter / name).unlink()
        (adapter / name).symlink_to("/dev/zero")  # and this one never ends
        with pytest.raises(AdapterFileError, match="is a link"):
            load_adapter(nn.Sequential(), adapter)
        (adapter / name).unlink()
        (adapter / name).write_bytes(data)
