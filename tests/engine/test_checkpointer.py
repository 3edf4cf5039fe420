"""Which checkpoint a run goes on from, and what is passed over or refused on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("detectron2")

import peft_d2  # noqa: E402
from peft_d2 import adapters, peft  # noqa: E402
from peft_d2.engine.checkpointer import Checkpointer, trained_classes  # noqa: E402
from peft_d2.storage import (  # noqa: E402
    AdapterFileError,
    CheckpointError,
    StorageError,
    adapter_file,
    read_checkpoint,
)

STORED = Path(__file__).with_name("stored_by_0_1")  # a run of version 0.1, which wrote no record of its states


class Steps:
    """A trainer as far as checkpoints know it."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        self.iteration, self.seed = -1, 7

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "seed": self.seed, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.seed = state["iteration"], state["seed"]
        self.optimizer.load_state_dict(state["optimizer"])


class Run:
    """A tiny model in training: `step(n)` changes it and saves iteration n."""

    def __init__(self, folder: Path, is_peft: bool = True, keep: int = 0, rank: int = 2) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.base = folder.parent / "base.pth"
        if not self.base.exists():
            torch.save({"model": self.model.state_dict()}, self.base)
        if is_peft:
            peft.inject(self.model, [{"NAME": "lora", "TARGETS": ["0"], "RANK": rank}], train=["2"])
        self.trainer = Steps(self.model)
        self.checkpointer = Checkpointer(self.model, str(folder), keep=keep, trainer=self.trainer)

    def step(self, *iterations: int, final: bool = False) -> None:
        for iteration in iterations:
            torch.manual_seed(iteration)
            self.trainer.optimizer.zero_grad()
            self.model(torch.randn(5, 3)).square().sum().backward()
            self.trainer.optimizer.step()
            self.trainer.iteration = iteration
            name = "final" if final else f"{iteration:07d}"
            self.checkpointer.save(f"{self.checkpointer.prefix}_{name}", iteration=iteration)

    def values(self) -> list[torch.Tensor]:
        moments = [v.clone() for state in self.trainer.optimizer.state_dict()["state"].values() for v in state.values()]
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad] + moments

    def resume(self) -> int:
        self.checkpointer.resume_or_load(str(self.base), resume=True)
        return self.trainer.iteration if self.checkpointer.has_checkpoint() else -1

    def path(self, iteration: int) -> Path:
        prefix = self.checkpointer.prefix
        return self.folder / f"{prefix}_{iteration:07d}{'' if prefix == 'adapter' else '.pth'}"

    def state(self, iteration: int) -> Path:
        path = self.path(iteration)
        return path / "training_state.pth" if path.is_dir() else path


KINDS = pytest.mark.parametrize("is_peft", [True, False], ids=["peft", "full"])


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Run]:
    def make(is_peft: bool = True, **options: Any) -> Run:
        return Run(tmp_path / "out", is_peft, **options)

    return make


@KINDS
def test_what_was_saved_is_resumed(start: Callable[..., Run], is_peft: bool) -> None:
    run = start(is_peft)
    run.step(3, 7, 11)
    fresh = start(is_peft)
    assert fresh.resume() == 11
    assert all(torch.equal(a, b) for a, b in zip(fresh.values(), run.values(), strict=True))


def test_versions_of_modules_are_resumed(start: Callable[..., Run]) -> None:
    """Models rename the tensors of checkpoints that earlier versions of their modules wrote."""
    nn_version, seen = nn.Linear._version, []
    run, fresh = start(False), start(False)
    run.model[2]._version = 5
    run.step(3)
    fresh.model[2]._register_load_state_dict_pre_hook(lambda state, prefix, metadata, *_: seen.append(metadata))
    fresh.resume()
    assert [entry.get("version") for entry in seen] == [5] != [nn_version]


@KINDS
def test_file_times_do_not_decide(start: Callable[..., Run], is_peft: bool) -> None:
    run = start(is_peft)
    run.step(3, 7, 11)
    for iteration in (3, 7):
        os.utime(run.state(iteration), (2**33, 2**33))
    assert start(is_peft).resume() == 11
    os.remove(run.folder / "last_checkpoint")
    assert start(is_peft).resume() == 11


@KINDS
def test_a_checkpoint_completed_after_the_pointer_counts(start: Callable[..., Run], is_peft: bool) -> None:
    run = start(is_peft)
    run.step(3, 7)
    pointer = run.folder / "last_checkpoint"
    before, time = pointer.read_text(), pointer.stat().st_mtime_ns
    run.step(11)
    pointer.write_text(before)
    os.utime(pointer, ns=(time, time))
    assert start(is_peft).resume() == 11
    os.utime(pointer, ns=(time + 10**12, time + 10**12))  # set back by hand
    assert start(is_peft).resume() == 7


@KINDS
def test_what_an_older_run_left_is_not_taken(start: Callable[..., Run], is_peft: bool) -> None:
    start(is_peft).step(3, 7, 11, 99)
    start(is_peft).step(999, final=True)
    older = start(is_peft)
    pointer, time = older.folder / "last_checkpoint", (older.folder / "last_checkpoint").stat().st_mtime_ns
    new = start(is_peft, keep=2)
    new.step(3)
    pointer.write_text(f"{new.checkpointer.prefix}_final{'' if is_peft else '.pth'}")  # killed before it was renewed
    os.utime(pointer, ns=(time, time))
    assert start(is_peft).resume() == 3
    new.step(7, 9)
    assert not new.path(3).exists() and new.path(11).exists(), "only the run's own are thinned out"
    resumed = start(is_peft, keep=2)
    assert resumed.resume() == 9
    resumed.step(12)
    assert not new.path(7).exists() and start(is_peft).resume() == 12
    os.remove(pointer)
    assert start(is_peft).resume() == 12
    new.state(12).write_bytes(b"PK")
    assert start(is_peft).resume() == 9


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x9f" * 50, b"", b"adapter_0000099", b"x" * 5000])
def test_a_pointer_to_nothing_is_no_obstacle(start: Callable[..., Run], content: bytes) -> None:
    run = start()
    run.step(3, 7)
    (run.folder / "last_checkpoint").write_bytes(content)
    assert start().resume() == 7


def flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


@KINDS
def test_a_damaged_state_is_passed_over_or_harmless(
    start: Callable[..., Run], is_peft: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Flipped bits anywhere: the state is refused with one line and the next older one taken, or is the same."""
    run, chance = start(is_peft), random.Random(0)
    run.step(3)
    older = run.values()
    run.step(7)
    newer, path = run.values(), run.state(7)
    whole = path.read_bytes()
    counts = {3: 0, 7: 0}
    for number in range(150):
        path.write_bytes(flipped(whole, chance) if number else whole[: len(whole) // 2])
        fresh = start(is_peft)
        caplog.clear()
        found = fresh.resume()
        counts[found] += 1
        assert all(torch.equal(a, b) for a, b in zip(fresh.values(), {3: older, 7: newer}[found], strict=True))
        assert (
            found == 7 or len([r for r in caplog.records if "0000007" in r.message and "passed over" in r.message]) == 1
        )
    assert counts[3] > 50 and (counts[7] == 0) == is_peft


def test_every_file_of_a_checkpoint_is_tied_to_the_others(start: Callable[..., Run]) -> None:
    run = start()
    run.step(3, 7)
    for name in [path.name for path in run.path(7).iterdir()]:
        keep = (run.path(7) / name).read_bytes()
        shutil.copy(run.path(3) / name, run.path(7) / name)
        if keep != (run.path(7) / name).read_bytes():  # both describe the adapter in the same words
            assert start().resume() == 3, name
        (run.path(7) / name).unlink()
        assert start().resume() == 3, name
        (run.path(7) / name).write_bytes(keep)
    for name in ("training_state.pth", "training_state.json"):
        shutil.copy(run.path(3) / name, run.path(7) / name)
    assert start().resume() == 3
    shutil.rmtree(run.path(3))
    shutil.copytree(run.path(7), run.path(3))
    assert start().resume() == -1


@pytest.mark.parametrize(
    "change",
    [{"iteration": 10**9}, {"iteration": -5}, {"iteration": "x"}, {"iteration": None}, {"iteration": True},
     {"seed": None}, {"seed": -1}, {"optimizer": None}, {"optimizer": {"param_groups": 1}}],
    ids=str,
)  # fmt: skip
@KINDS
def test_odd_contents_are_passed_over(start: Callable[..., Run], is_peft: bool, change: dict[str, Any]) -> None:
    run = start(is_peft)
    run.step(3)
    state = run.trainer.state_dict
    run.trainer.state_dict = lambda: {**state(), **change}  # type: ignore[method-assign]
    run.step(7)
    assert start(is_peft).resume() == 3


@pytest.mark.parametrize("content", [[1, 2], {"trainer": [1]}, {"trainer": {}}, {}, 5], ids=str)
def test_states_of_another_form_are_passed_over(start: Callable[..., Run], content: Any) -> None:
    run = start()
    run.step(3, 7)
    torch.save(content, run.state(7))
    (run.path(7) / "training_state.json").unlink()
    if content in ({"trainer": {}}, {}):  # nothing contradicts it, and what is asked for is not in it
        with pytest.raises(CheckpointError, match="0000007"):
            start().resume()
    else:
        assert start().resume() == 3


def test_a_state_of_another_size_is_one_error(start: Callable[..., Run]) -> None:
    run = start()
    run.step(3)
    fresh = start()
    fresh.trainer.optimizer = torch.optim.AdamW(list(fresh.model.parameters())[:1])
    with pytest.raises(CheckpointError, match="0000003 does not fit this run.*parameter group"):
        fresh.resume()
    (run.folder / "x").mkdir()
    with pytest.raises(ValueError, match="adapter_0000003"):
        start(rank=4).resume()


@KINDS
def test_a_run_of_the_other_kind_is_refused(start: Callable[..., Run], is_peft: bool) -> None:
    start(is_peft).step(3)
    with pytest.raises(CheckpointError, match="another kind of run"):
        start(not is_peft).resume()


@KINDS
def test_what_this_process_cannot_read_is_not_called_damaged(
    start: Callable[..., Run], is_peft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(is_peft)
    run.step(3, 7)
    opened = open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name == run.state(7).name and "0000007" in str(path):
            raise OSError(24, "Too many open files", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match="Too many open files") as caught:
        start(is_peft).resume()
    assert "damaged" not in str(caught.value) and "0000007" in str(caught.value)


@pytest.fixture
def nobody() -> Iterator[Callable[[Path], None]]:
    """`nobody(folder)`: from now on that folder cannot be entered, not even by root."""
    closed: list[Path] = []

    def close(folder: Path) -> None:
        closed.append(folder)
        folder.chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)

    yield close
    os.seteuid(os.getuid())
    for folder in closed:
        folder.chmod(0o700)


@pytest.mark.parametrize("inside", [False, True])
@KINDS
def test_folders_that_cannot_be_entered_are_one_error(
    start: Callable[..., Run], nobody: Callable[[Path], None], is_peft: bool, inside: bool
) -> None:
    run = start(is_peft)
    run.step(3)
    fresh, base, state = start(is_peft), str(run.base), run.state(3)
    nobody(run.path(3) if inside and is_peft else run.folder)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        fresh.checkpointer.resume_or_load(base, resume=True)
    assert "damaged" not in str(caught.value)
    with pytest.raises(CheckpointError, match="Permission denied"):
        read_checkpoint(state)
    with pytest.raises(StorageError, match=r"(?s)cannot store .*Permission denied"):
        run.checkpointer.save(f"{run.checkpointer.prefix}_0000003", iteration=3)
    if is_peft:
        with pytest.raises(AdapterFileError, match="Permission denied.*the files themselves may be whole"):
            adapters.load_adapter(fresh.model, run.path(3))


def test_an_adapter_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [Run(tmp_path / str(seed)).model for seed in range(2)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        for value in peft.adapter_state_dict(model).values():
            value.normal_()
        adapters.save_adapter(model, tmp_path / f"adapter_{seed}")
    original, replaced = adapter_file._read_record, []

    def read_record(path: Path) -> Any:
        record = original(path)
        if not replaced:
            replaced.append(adapters.save_adapter(models[1], tmp_path / "adapter_0"))
        return record

    monkeypatch.setattr(adapter_file, "_read_record", read_record)
    found = adapter_file.read(tmp_path / "adapter_0").tensors
    assert replaced and all(torch.equal(found[n], v) for n, v in peft.adapter_state_dict(models[1]).items())


def test_detectron2s_own_checkpointer_reads_safetensors(tmp_path: Path) -> None:
    """As DefaultPredictor does with MODEL.WEIGHTS; an adapter's file is refused by name."""
    from detectron2.checkpoint import DetectionCheckpointer

    for _ in range(2):
        peft_d2.register()
    source, model = (nn.Sequential(nn.Linear(3, 4)) for _ in range(2))
    save_file(source.state_dict(), tmp_path / "base.safetensors")
    DetectionCheckpointer(model).load(str(tmp_path / "base.safetensors"))
    assert torch.equal(model[0].weight, source[0].weight)
    save_file({"base_model.model.0.lora_A.weight": torch.ones(1, 3)}, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter.*MODEL\.PEFT\.WEIGHTS"):
        DetectionCheckpointer(model).load(str(tmp_path / "adapter.safetensors"))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"model": {}, "classes": ["car", "bus"]}, ["car", "bus"]),
        ({"model": {}, "trainer": {"classes": ["car", "bus"]}}, ["car", "bus"]),
        ({"model": {}, "trainer": None}, []),
        ({"model": {}, "classes": 3}, []),
        ({"model": {}, "classes": [3]}, []),
        ([1, 2], []),
        (torch.zeros(2), []),
    ],
)
def test_classes_of_whole_models(content: Any, names: list[str], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pth")
    assert trained_classes(str(tmp_path / "model.pth")) == names


def test_files_that_hold_no_classes(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    for name in ("model.safetensors", "damaged.pth", "missing.pth", ""):
        assert trained_classes(str(tmp_path / name)) == []
    for elsewhere in ("", "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "https://example.org/model.pth"):
        assert trained_classes(elsewhere) == []


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    """Of 0.1: adapter folders without a record of the training state, and states without a mark of their run."""
    for kind in ("peft", "full"):
        shutil.copytree(STORED / kind, tmp_path / kind / "out")
        shutil.copy(STORED / "base.pth", tmp_path / kind / "base.pth")
        run = Run(tmp_path / kind / "out", kind == "peft")
        assert run.resume() == 7
        expected = json.loads((STORED / f"{kind}.json").read_text())
        assert [round(float(v.double().sum()), 6) for v in run.values()] == expected
        run.step(11)
        assert Run(tmp_path / kind / "out", kind == "peft").resume() == 11
        run.state(11).write_bytes(b"")
        assert Run(tmp_path / kind / "out", kind == "peft").resume() == 7
