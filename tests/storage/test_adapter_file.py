"""The adapter's folder: what is written is read, and no change of a byte goes unnoticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_d2.storage import (
    AdapterFileError,
    Fingerprint,
    StorageError,
    adapter_file,
    disk,
    fingerprint,
)

FILES = ("adapter_model.safetensors", "adapter_config.json", "peft_d2.json")
BASE = {
    "enc.fc.weight": torch.arange(12.0).reshape(4, 3),
    "enc.fc.bias": torch.zeros(4),
    "head.weight": torch.ones(2, 4),
}
TENSORS = {
    "enc.fc.lora_a": torch.arange(6.0).reshape(2, 3),
    "enc.fc.lora_b": torch.ones(4, 2),
    "head.weight": torch.full((2, 4), 3.0),
}
METHODS = [{"NAME": "lora", "TARGETS": ["fc"], "RANK": 2, "ALPHA": 4.0, "DROPOUT": 0.0}]


def save(folder: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "methods": METHODS,
        "train": ["head"],
        "base": fingerprint(BASE, trained=["head.weight"]),
        "metrics": {"segm": {"AP": 39.25, "AP-absent": float("nan")}, "steps": 600},
        "scales": {"enc.fc": 2.0},
    }
    tensors = changes.pop("tensors", TENSORS)
    adapter_file.write(folder, tensors, **{**arguments, **changes})
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = adapter_file.read(save(tmp_path / "adapter"))
    assert content.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(content.tensors[name], value) for name, value in TENSORS.items())
    assert content.methods == METHODS and content.train == ("head",) and content.scales == {"enc.fc": 2.0}
    assert content.base == fingerprint(BASE, trained=["head.weight"])
    assert content.metrics == {"segm": {"AP": 39.25, "AP-absent": None}, "steps": 600}


def test_the_folder_is_hugging_faces_pair_and_our_record(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["enc.fc"], "modules_to_save": ["head"]}
    assert {key: config[key] for key in expected} == expected
    from safetensors.torch import load_file

    assert set(load_file(folder / "adapter_model.safetensors")) == {
        "base_model.model.enc.fc.lora_A.weight",
        "base_model.model.enc.fc.lora_B.weight",
        "base_model.model.head.weight",
    }


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(number)) for number in range(8)]
    for name in FILES:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def test_any_dtype_and_layout_is_kept(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    tensors = {
        "a.x": shared.view(3, 4).t(), "a.y": shared[2:5], "a.z": torch.ones(2, dtype=torch.bfloat16),
        "a.n": torch.tensor(3), "a.e": torch.zeros(0, 2), "a.b": torch.tensor([True, False]),
    }  # fmt: skip
    found = adapter_file.read(save(tmp_path / "adapter", tensors=tensors)).tensors
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


@pytest.mark.parametrize("name", ["../x", "a\x00b", "", "a..b", ".a", "a\nb", "a.lora_A.weight", "x" * 5 + "\n"])
def test_a_name_that_cannot_be_stored_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        save(tmp_path / "adapter", tensors={name: torch.ones(1)})
    assert not (tmp_path / "adapter").exists()


def test_a_value_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metrics hold a object"):
        save(tmp_path / "adapter", metrics={"x": object()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("whole") / "adapter")


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_and_every_cut_is_refused_by_name(whole: Path, tmp_path: Path, name: str) -> None:
    """500 mutations of each file, spread evenly over its bits, and each kind of cut; none may pass."""
    folder = tmp_path / "adapter"
    shutil.copytree(whole, folder)
    data = (folder / name).read_bytes()
    step = max(1, len(data) * 8 // 500)
    for bit in range(0, len(data) * 8, step):
        mutated = bytearray(data)
        mutated[bit // 8] ^= 1 << bit % 8
        assert_refused(folder, name, bytes(mutated))
    for size in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1):
        assert_refused(folder, name, data[:size])
    for extra in (b"\0", b" ", b"\n", data):
        assert_refused(folder, name, data + extra)
    (folder / name).unlink()
    with pytest.raises(AdapterFileError, match=rf"{name}: the file is missing.*Remedy"):
        adapter_file.read(folder)


def assert_refused(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(AdapterFileError) as caught:
        adapter_file.read(folder)
    assert Path(caught.value.path).name == name and caught.value.defect and caught.value.remedy


mutation = st.tuples(
    st.sampled_from(FILES), st.integers(0, 10**6), st.binary(min_size=0, max_size=9), st.integers(0, 40)
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(mutation, min_size=1, max_size=3))
def test_any_change_of_bytes_is_refused(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[str, int, bytes, int]]
) -> None:
    """Some bytes are replaced by others, in one file or in several: refused unless the bytes are the same again."""
    folder = tmp_path_factory.getbasetemp() / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for name, where, new, removed in mutations:
        data = (folder / name).read_bytes()
        where %= len(data) + 1
        (folder / name).write_bytes(data[:where] + new + data[where + removed :])
    if all((folder / name).read_bytes() == (whole / name).read_bytes() for name in FILES):
        adapter_file.read(folder)
        return
    with pytest.raises(AdapterFileError):
        adapter_file.read(folder)


def test_files_of_two_adapters_are_not_mixed(tmp_path: Path) -> None:
    first = save(tmp_path / "1")
    second = save(tmp_path / "2", tensors={**TENSORS, "enc.fc.lora_b": torch.zeros(4, 2)}, metrics={"AP": 1})
    for name in ("adapter_model.safetensors", "peft_d2.json"):
        shutil.copytree(first, tmp_path / name)
        shutil.copy(second / name, tmp_path / name / name)
        with pytest.raises(AdapterFileError, match="sha256"):
            adapter_file.read(tmp_path / name)


def resigned(folder: Path, change: Any) -> Path:
    """Change the record and sign it again, as a program with other ideas would write it."""
    record = json.loads((folder / "peft_d2.json").read_text())
    del record["checksum"]
    change(record)
    record["checksum"] = disk.sha256(disk.dump_json(record))
    (folder / "peft_d2.json").write_bytes(disk.dump_json(record))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format_version=2), "format version 2, and this peft_d2 reads 1"),
        (lambda r: r.update(format="other"), "not the record of a peft_d2 adapter"),
        (lambda r: r.pop("methods"), "not the record"),
        (lambda r: r.update(more=1), "not the record"),
        (lambda r: r.update(methods=[1]), "not the record"),
        (lambda r: r["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}}), "not the record"),
        (lambda r: r["files"]["adapter_config.json"].update(bytes=-1), "bytes instead of -1"),
        (lambda r: r["files"]["adapter_model.safetensors"].update(bytes=10**18), "cut short"),
        (lambda r: r["base"].update(structure="0" * 64), "contradicts itself"),
        (lambda r: r["base"]["tensors"].update(x="1x1:zz"), "another form"),
    ],
)
def test_a_record_with_other_content_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        adapter_file.read(resigned(save(tmp_path / "adapter"), change))


def test_a_rank_that_is_not_the_described_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = adapter_file.describe
    monkeypatch.setattr(adapter_file, "describe", lambda *a: ({**describe(*a)[0], "r": 4}, ""))
    with pytest.raises(AdapterFileError, match=r"LoRA of enc\.fc has rank 2, and adapter_config\.json says 4"):
        adapter_file.read(save(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"enc.fc.lora_a": torch.ones(2, 3)}, "only one of its two factors"),
        ({"enc.fc.lora_a": torch.ones(2, 3), "enc.fc.lora_b": torch.ones(4, 3)}, "no common rank"),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "adapter", tensors=tensors)


def test_no_folder_and_links_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="there is no such adapter folder"):
        adapter_file.read(tmp_path / "nothing")
    folder = save(tmp_path / "adapter")
    (folder / FILES[0]).rename(tmp_path / "elsewhere")
    (folder / FILES[0]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterFileError, match="it is a link"):
        adapter_file.read(folder)


def test_no_space_keeps_the_old_adapter(tmp_path: Path) -> None:
    import resource

    folder = save(tmp_path / "adapter")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(StorageError, match="is kept"):
            save(folder, tensors={"a.b": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(adapter_file.read(folder).tensors["head.weight"], TENSORS["head.weight"])


def test_fingerprints_round_trip() -> None:
    base = fingerprint({**BASE, "n": torch.tensor(3)}, trained=["head.weight"])
    assert Fingerprint.from_json(json.loads(json.dumps(base.to_json()))) == base


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("adapter.zip", "unpack an archive, and give its folder; the file of a whole model goes into MODEL.WEIGHTS"),
     (FILES[0], "give the folder that holds it"), ],
)  # fmt: skip
def test_what_is_given_in_place_of_a_folder(
    name: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"PK")
    with pytest.raises(AdapterFileError, match=f"Remedy: .*{remedy}"):
        adapter_file.read(name)
