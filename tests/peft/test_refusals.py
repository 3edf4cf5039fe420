"""Whatever is refused leaves the model as it was: values, Parameter objects, flags, classes, modes, adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import peft_d2
from peft_d2 import peft
from peft_d2.adapters import load_adapter, save_adapter, save_merged
from peft_d2.peft.methods import METHODS
from peft_d2.storage import adapter_file, disk

LORA: dict[str, Any] = {"NAME": "lora", "TARGETS": ["proj"], "RANK": 2}
ADAPTER: dict[str, Any] = {"NAME": "adapter", "TARGETS": ["mlp"]}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refused call could have changed."""
    injection = peft.get_injection(model)
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "objects": {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: id(value) for name, value in model.named_buffers(remove_duplicate=False)},
        "flags": {name: value.requires_grad for name, value in model.named_parameters()},
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "hooks": [(len(m._state_dict_hooks), len(m._load_state_dict_pre_hooks)) for m in model.modules()],
        "injection": copy.deepcopy(injection),
    }


def require_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values, old = after.pop("state"), before["state"]
    assert values.keys() == old.keys()
    assert not [name for name, value in values.items() if not torch.equal(value, old[name])]
    for key, value in after.items():
        assert value == before[key], key


class RefusesItsClass(nn.Linear):
    """A module whose class cannot change."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError("no other class for me")
        super().__setattr__(name, value)


class RefusesToTrain(nn.Linear):
    def train(self, mode: bool = True) -> RefusesToTrain:
        raise OSError("not in this mode")


def in_body(kind: type[nn.Module]) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.blocks[1], "proj", kind(16, 16))  # type: ignore[index]


def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("there is no more memory")

    monkeypatch.setattr(sys.modules["peft_d2.peft.inject"], "start_hashes", refuse)


INJECTIONS: dict[str, tuple[Any, Any]] = {
    "unknown method": ([{"NAME": "lroa", "TARGETS": ["proj"]}], []),
    "no target": ([{**LORA, "TARGETS": ["porj"]}], ["head"]),
    "target that it cannot go on": ([LORA, {**LORA, "TARGETS": ["norm1"]}], ["head"]),
    "excluded nothing": ([{**LORA, "EXCLUDE": ["nowhere"]}], []),
    "not a regular expression": ([{**LORA, "TARGETS": ["re:[z-a]"]}], []),
    "not a class of characters": ([{**LORA, "TARGETS": ["[]"]}], []),
    "nested too deeply": ([{**LORA, "TARGETS": [f"re:{'(' * 4000}a{')' * 4000}"]}], []),
    "too many alternatives": ([{**LORA, "TARGETS": ["{a,b}" * 40]}], []),
    "no train": ([LORA], ["haed"]),
    "train without parameters": ([LORA], ["neck.1"]),
    "nothing": (None, None),
    "methods a number": (5, ["head"]),
    "methods a text": ("lora", ["head"]),
    "an entry None": ([None], ["head"]),
    "train a text": ([LORA], "head"),
    "train a number": ([LORA], 5),
    "train of None": ([LORA], [None]),
    "infinite alpha": ([{**LORA, "ALPHA": float("inf")}], []),
    "rank beyond memory": ([{**LORA, "RANK": 2**30}], ["head"]),
    "two changes of one weight": ([LORA, {"NAME": "hf", "TUNER": "ia3", "TARGETS": ["proj"]}], []),
    "width unknown": (
        [{"NAME": "adapter", "TARGETS": ["neck.1"], "DIM": None}, {**ADAPTER, "TARGETS": ["box_again"]}],
        [],
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", INJECTIONS)
def test_a_refused_injection(case: str, training: bool, toy: nn.Module) -> None:
    toy.requires_grad_(True).train(training)
    toy.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    toy.blocks[0].eval()  # type: ignore[index]
    before = snapshot(toy)
    with pytest.raises(peft.PeftError):
        peft_d2.inject(toy, *INJECTIONS[case])
    require_same(toy, before)
    peft.inject(toy, [{**LORA, "TARGETS": ["mlp.fc1"]}], ["head"], name="a")
    before = snapshot(toy)
    if case != "nothing":  # of another adapter they would be those of the first
        with pytest.raises(peft.PeftError):
            peft.add_adapter(toy, "b", *INJECTIONS[case])
        require_same(toy, before)
    peft.add_adapter(toy, "b", [LORA], ["box"])
    peft.set_adapter(toy, "b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (in_body(RefusesItsClass), "blocks.1.proj|no other class|none of nn.Linear"),
        (in_body(RefusesToTrain), "not in this mode|none of nn.Linear"),
        (None, "there is no more memory"),
    ],
    ids=["class", "train", "memory"],
)
@pytest.mark.parametrize("entry", [LORA, {**ADAPTER, "TARGETS": ["mlp", "proj"]}], ids=["lora", "adapter"])
def test_an_injection_that_fails_half_way(
    change: Callable[[nn.Module], None] | None,
    said: str,
    entry: dict[str, Any],
    toy: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if change is not None:
        change(toy)
    toy.requires_grad_(True)
    before = snapshot(toy)
    with monkeypatch.context() as patch:
        if change is None:
            out_of_memory(patch)
        try:
            peft.inject(toy, [entry], ["head"])
        except peft.PeftError as error:
            assert any(part in str(error) for part in said.split("|")), error
            require_same(toy, before)
        else:
            assert change is not None and entry is not LORA  # the class can be changed after all
            peft.remove(toy)
    require_same(toy, before)
    peft.inject(toy, [{**LORA, "TARGETS": ["mlp.fc1"]}], ["head"])
    peft.remove(toy)
    require_same(toy, before)


def bad_options() -> Iterator[tuple[str, str, Any]]:
    values = [
        None,
        True,
        -1,
        0,
        2**40,
        -(2**40),
        0.5,
        float("nan"),
        float("inf"),
        1e308,
        "",
        "x",
        b"x",
        [],
        [1],
        [None],
        {},
    ]
    values += [{"a": 1}, {1: 2}, {"a": "b"}, object(), (), {1}, [["a"]], "re:(", torch.zeros(1), lambda: 0]
    for name, method in METHODS.items():
        for field in dataclasses.fields(method.options_class):
            for value in values:
                yield name, field.name.upper(), value


def test_a_wrong_value_of_any_option_is_an_error_of_ours(toy: nn.Module) -> None:
    """Every option of every method with values of wrong type or size: refused in one line, or right."""
    start = snapshot(toy)
    for name, key, value in bad_options():
        entry = {"NAME": name, "TARGETS": ["mlp.fc1"], "TUNER": "ia3", key: value}
        if name != "hf":
            entry.pop("TUNER", None)
        try:
            peft.inject(toy, [entry], ["head"])
        except peft.PeftError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000, (name, key)
        else:
            peft.remove(toy)
        require_same(toy, start)


@pytest.mark.parametrize("train", [iter, set, tuple, lambda items: (item for item in items)], ids=lambda f: f.__name__)
def test_any_iterable_names_what_is_trained(train: Callable[[list[str]], Any], toy: nn.Module) -> None:
    with pytest.raises(peft.PatternError, match="expected a list"):
        peft.inject(toy, iter([LORA]), train={"head": None})
    peft.inject(toy, iter([LORA]), train=train(["head"]))
    assert peft.get_injection(toy).current.train == ["head"] and toy.head.weight.requires_grad  # type: ignore[union-attr]


def saved(tmp_path: Path, toy: nn.Module, disturb: Callable[..., None], methods: Any, train: Any) -> Path:
    other = copy.deepcopy(toy)
    peft.inject(other, methods, train)
    disturb(other)
    save_adapter(other, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another record with right checksums, as somebody's own program could write it."""
    path = folder / adapter_file.RECORD
    record = json.loads(path.read_bytes())
    change(record)
    record.pop("checksum")
    checksum = disk.sha256(disk.dump_json(record))
    path.write_bytes(disk.dump_json({**record, "checksum": checksum}))


FILES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "method": lambda record: record["methods"][0].update(NAME="adapter"),
    "rank": lambda record: record["methods"][0].update(RANK=3),
    "alpha": lambda record: record["methods"][0].update(ALPHA=7.0),
    "unknown key": lambda record: record["methods"][0].update(LEVEL=3),
    "value": lambda record: record["methods"][0].update(DROPOUT="high"),
    "targets": lambda record: record["methods"][0].update(TARGETS=["proj", "mlp.fc1"]),
    "fewer targets": lambda record: record["methods"][0].update(TARGETS=["blocks.0.proj"]),
    "train": lambda record: record.update(train=["head", "box"]),
    "less train": lambda record: record.update(train=[]),
    "everything": lambda record: record.update(train=["*"]),
    "pattern": lambda record: record.update(train=["re:["]),
}


@pytest.mark.parametrize("injected", ["plain", "same", "another name", "other methods"])
@pytest.mark.parametrize("case", FILES)
def test_a_refused_adapter(
    case: str, injected: str, toy: nn.Module, disturb: Callable[..., None], tmp_path: Path
) -> None:
    toy.requires_grad_(True).train()
    toy.stem.norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    folder = saved(tmp_path, toy, disturb, [LORA], ["head"])
    if injected == "same":
        peft.inject(toy, [LORA], ["head"])
    elif injected == "other methods":
        peft.inject(toy, [ADAPTER], ["box"])
    elif injected == "another name":
        peft.inject(toy, [LORA], ["head"], name="first")
    change_record(folder, FILES[case])
    if injected == "same" and case in (
        "value",
        "targets",
        "fewer targets",
        "train",
        "less train",
        "everything",
        "pattern",
    ):
        return  # the model says itself where its tensors are, and the file's fit
    before = snapshot(toy)
    with pytest.raises(adapter_file.AdapterFileError):
        load_adapter(toy, folder, name="b" if injected == "another name" else "default")
    require_same(toy, before)


REFUSED: dict[str, Callable[[nn.Module, Path], Any]] = {
    "inject again": lambda m, p: peft.inject(m, [LORA]),
    "a name taken": lambda m, p: peft.add_adapter(m, "a"),
    "a bad name": lambda m, p: peft.add_adapter(m, "a.b"),
    "unknown adapter": lambda m, p: peft.set_adapter(m, "z"),
    "delete the active one": lambda m, p: peft.delete_adapter(m, "a"),
    "delete an unknown one": lambda m, p: peft.delete_adapter(m, "z"),
    "merge for good": lambda m, p: peft.remove(m, keep=True),
    "a merged file": lambda m, p: save_merged(m, p / "merged.pth"),
    "combine unknown": lambda m, p: peft.combine_adapters(m, {"a": 1.0, "z": 1.0}, "c"),
    "combine what differs": lambda m, p: peft.combine_adapters(m, {"a": 1.0, "b": 1.0}, "c"),
    "no folder": lambda m, p: load_adapter(m, p / "nowhere", name="c"),
    "empty path": lambda m, p: load_adapter(m, "", name="c"),
    "another base": lambda m, p: m.load_state_dict({k: v + 1 for k, v in peft.base_values(m).items()}),
    "prove with nothing": lambda m, p: peft.prove_live(m),
    "prove NaN": lambda m, p: peft.prove_live(m, torch.full((2, 3, 8, 8), torch.nan)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call(case: str, toy: nn.Module, disturb: Callable[..., None], tmp_path: Path) -> None:
    peft.inject(toy, [LORA, ADAPTER], ["head"], name="a")
    peft.add_adapter(toy, "b", [LORA], ["box"])
    disturb(toy)
    before = snapshot(toy)
    with pytest.raises((peft.PeftError, ValueError, RuntimeError)):
        REFUSED[case](toy, tmp_path)
    require_same(toy, before)


def test_injection_and_removal_give_back_the_same_parameters(toy: nn.Module, disturb: Callable[..., None]) -> None:
    toy.requires_grad_(True)
    toy.blocks[1].eval()  # type: ignore[index]
    before = snapshot(toy)
    for methods, train in (([LORA], ["head", "stem.norm"]), ([{"NAME": "bitfit"}], []), ([ADAPTER], ["box_again.0"])):
        peft.inject(toy, methods, train, name="a")  # type: ignore[arg-type]
        peft.add_adapter(toy, "b", [], ["head", "neck"])
        disturb(toy)
        peft.set_adapter(toy, "b")
        disturb(toy)
        peft.delete_adapter(toy, "a")
        peft.remove(toy)
        require_same(toy, before)
    peft.inject(toy, [LORA], ["head"])
    disturb(toy)
    trained = toy.head.weight.detach().clone()  # type: ignore[union-attr, operator]
    peft.remove(toy, keep=True)
    assert {name: id(value) for name, value in toy.named_parameters(remove_duplicate=False)} == before["objects"]
    assert torch.equal(toy.head.weight, trained)  # type: ignore[union-attr, arg-type]


def convert_to_sync(model: nn.Module) -> None:
    model.stem = nn.SyncBatchNorm.convert_sync_batchnorm(model.stem)  # type: ignore[arg-type]


def fuse(model: nn.Module) -> None:
    model.eval()
    stem: Any = model.stem
    fused = nn.utils.fusion.fuse_conv_bn_eval(model.conv.eval(), nn.BatchNorm2d(16).eval())  # type: ignore[operator]
    model.conv, stem.extra = fused, None


REPLACED = {
    "a new head": (lambda m: setattr(m, "head", nn.Linear(16, 9)), "head.weight"),
    "an adapted layer": (lambda m: setattr(m.blocks[0], "proj", nn.Linear(16, 16)), "blocks.0.proj"),
    "a block": (lambda m: m.blocks.__setitem__(0, copy.deepcopy(m.blocks[0])), "blocks.0.proj"),
    "SyncBatchNorm": (convert_to_sync, "stem.norm"),
    "fused layers": (fuse, "conv"),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].qkv), r"blocks.0.qkv.weight \(of the"),
    "weight norm on what is adapted": (lambda m: nn.utils.parametrizations.weight_norm(m.conv), "conv.weight"),
    "pruned": (lambda m: prune.l1_unstructured(m.head, "weight", 0.5), "head.weight"),
    "tied": (lambda m: setattr(m.blocks[1].qkv, "weight", m.blocks[0].qkv.weight), "blocks.1.qkv.weight"),
    "a part compiled": (lambda m: m.blocks.__setitem__(0, torch.compile(m.blocks[0])), "blocks.0.proj"),
    "exchanged": (lambda m: m.blocks.__init__(list(m.blocks)[::-1]), "blocks.[01].proj"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_what_was_replaced_after_the_injection_is_named(case: str, toy: nn.Module, tmp_path: Path) -> None:
    change, name = REPLACED[case]
    peft.inject(toy, [LORA, {**LORA, "TARGETS": ["conv"]}], ["head"])
    change(toy)
    for refused in (lambda: save_adapter(toy, tmp_path / "x"), lambda: peft.frozen_hash(toy)):
        with pytest.raises(peft.InjectionError, match=rf"no longer in the model: {name}.*change the model first"):
            refused()
    with pytest.raises(peft.InjectionError, match="no longer in the model"):
        peft.prove_live(toy, torch.zeros(2, 3, 8, 8))
    assert not (tmp_path / "x").exists()


def test_a_compiled_part_is_compiled_in_place(toy: nn.Module, tmp_path: Path, disturb: Callable[..., None]) -> None:
    base, block = copy.deepcopy(toy), toy.blocks[0]  # type: ignore[index]
    toy.blocks[0] = torch.compile(block)  # type: ignore[index, operator]
    before = snapshot(toy)
    with pytest.raises(peft.InjectionError, match="blocks.0 was made by torch.compile.*in place"):
        peft.inject(toy, [LORA])
    require_same(toy, before)
    toy.blocks[0] = block  # type: ignore[index, operator]
    block.compile(backend="eager")
    disturb(toy)
    peft.inject(toy, [LORA])
    save_adapter(toy, tmp_path / "a")
    peft.remove(toy)
    base.load_state_dict(toy.state_dict())
    load_adapter(base, tmp_path / "a")


def test_a_model_without_values_takes_no_adapter(toy: nn.Module, disturb: Callable[..., None], tmp_path: Path) -> None:
    folder, empty = saved(tmp_path, toy, disturb, [LORA], ["head"]), copy.deepcopy(toy).to("meta")
    with pytest.raises(adapter_file.AdapterFileError, match="on the meta device .*load_base"):
        load_adapter(empty, folder)
    assert peft.get_injection(empty) is None
    empty.to_empty(device="cpu").load_state_dict(toy.state_dict())
    load_adapter(empty, folder)


def test_an_adapter_that_no_step_has_reached_is_said(
    toy: nn.Module, images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.requires_grad_(True).train()
    late = [torch.optim.SGD(toy.parameters(), 0.1)]
    peft.inject(toy, [LORA], ["head"])
    late.append(torch.optim.SGD([value for value in toy.parameters() if value.requires_grad], 0.1))
    for optimizer, said in zip(late, (True, False), strict=True):
        caplog.clear()
        toy(images).square().mean().backward()
        optimizer.step()
        save_adapter(toy, tmp_path / "a")
        assert ("make the optimizer after inject" in caplog.text) == said


def test_no_gradient_is_sought_where_none_is_recorded(toy: nn.Module, images: Tensor) -> None:
    peft.inject(toy, [LORA], ["head"])
    with torch.no_grad():
        peft.prove_live(toy, images)
    with torch.inference_mode(), pytest.raises(peft.LivenessError, match="outside"):
        peft.prove_live(toy, images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("train", [["head"], ["head.bias"], ["*"]])
def test_what_is_trained_is_not_half(dtype: torch.dtype, train: list[str], toy: nn.Module) -> None:
    toy.to(dtype).requires_grad_(True)
    with pytest.raises(peft.InjectionError, match=rf"is {dtype}, .* must be float32: call model.float"):
        peft.inject(toy, [], train)
    with pytest.raises(peft.InjectionError, match="must be float32"):
        peft.inject(toy, [{"NAME": "bitfit"}])
    peft.inject(toy, [LORA])
    assert all(item.param.dtype is torch.float32 for item in peft.trained_parameters(toy))


def test_a_base_in_half_precision_is_told_from_another(
    toy: nn.Module, disturb: Callable[..., None], tmp_path: Path
) -> None:
    folder = saved(tmp_path, toy, disturb, [LORA], ["head"])
    with pytest.raises(adapter_file.AdapterFileError, match="other dtype.*float16.*then convert both .model.half"):
        load_adapter(copy.deepcopy(toy).half(), folder)
    load_adapter(toy, folder)
    assert toy.half().head.weight.dtype is torch.float16  # type: ignore[union-attr]


def test_what_the_model_froze_is_said_when_it_is_trained(toy: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    toy.requires_grad_(False)
    peft.inject(toy, [], ["stem"])
    assert not caplog.records  # all of it was frozen: the usual way to begin
    peft.remove(toy)
    toy.requires_grad_(True)
    toy.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    peft.inject(toy, [], ["stem", "head"])
    assert "train 1 tensors that the model itself had frozen (as FREEZE_AT does), from stem.weight" in caplog.text
    caplog.clear()
    peft.add_adapter(toy, "b", [], ["box"])
    assert not caplog.records  # the injection froze it, not the model
    peft.add_adapter(toy, "c", [], ["stem"])
    assert "train 1 tensors" in caplog.text


@pytest.mark.parametrize(
    "counter", [torch.zeros(1), torch.tensor(0), torch.zeros([]), torch.zeros(1, dtype=torch.int32)]
)
def test_counters_are_no_property_of_the_base(
    counter: Tensor, toy: nn.Module, disturb: Callable[..., None], tmp_path: Path
) -> None:
    toy.head.register_buffer("_iter", counter.clone())  # type: ignore[union-attr, operator]
    base = copy.deepcopy(toy)
    peft.inject(toy, [LORA])
    disturb(toy)
    before = peft.frozen_hash(toy)
    toy.head._iter += 7  # type: ignore[union-attr]
    toy.stem.norm.num_batches_tracked += 7  # type: ignore[union-attr]
    assert peft.frozen_hash(toy) == before
    save_adapter(toy, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    toy.load_state_dict(copy.deepcopy(peft.base_state_dict(base)))
    assert toy.head._iter == 7  # type: ignore[union-attr]


def test_names_of_any_kind_can_be_stored(tmp_path: Path, disturb: Callable[..., None]) -> None:
    """VoVNet's layers are called OSA2_1/conv; classes of a detector are called as they are."""
    names = ["OSA2_1/conv", "traffic light", "layer:0", "größe", "a+b"]
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    base = copy.deepcopy(model)
    peft_d2.inject(model, [{"NAME": "lora", "TARGETS": ["OSA2_1/conv", "traffic light"], "RANK": 2}], ["größe", "a+b"])
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in base.state_dict().items())
    before = snapshot(odd := nn.ModuleDict({"a\nb": nn.Linear(4, 4)}))
    with pytest.raises(peft.InjectionError, match="cannot be stored"):
        peft_d2.inject(odd, [{"NAME": "lora", "TARGETS": [r"re:a\sb"], "RANK": 2}])
    require_same(odd, before)


def test_a_copy_made_within_disabled_is_a_whole_model(
    toy: nn.Module, images: Tensor, disturb: Callable[..., None]
) -> None:
    peft.inject(toy, [LORA], ["head", "stem.weight"])
    disturb(toy)
    with torch.no_grad():
        adapted = toy(images)
        with peft.disabled(toy):
            base, copied = toy(images), copy.deepcopy(toy)
            assert torch.equal(copied(images), adapted)
        assert torch.equal(toy(images), adapted) and torch.equal(copied(images), adapted)
        with peft.disabled(copied):
            assert torch.equal(copied(images), base) and torch.equal(toy(images), adapted)


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_state_dict_taken_within_disabled_holds_what_was_trained(
    adapters: int, toy: nn.Module, images: Tensor, disturb: Callable[..., None]
) -> None:
    other = copy.deepcopy(toy)
    for model in (toy, other):
        peft.inject(model, [LORA], ["head"], name="a")
        if adapters == 2:
            peft.add_adapter(model, "b", [LORA], ["box"])
    disturb(toy)
    with torch.no_grad():
        expected = toy(images)
        with peft.disabled(toy):
            state, base = copy.deepcopy(toy.state_dict()), toy(images)
        with peft.disabled(other), pytest.raises(peft.InjectionError, match="leave the disabled"):
            other.load_state_dict(copy.deepcopy(state))
        other.load_state_dict(state)
        assert torch.equal(other(images), expected)
        with peft.disabled(other):
            assert torch.equal(other(images), base)


def test_saving_switches_nothing(toy: nn.Module, images: Tensor, disturb: Callable[..., None], tmp_path: Path) -> None:
    """Another thread may run the model meanwhile."""
    peft.inject(toy, [LORA], ["head"])
    disturb(toy)
    expected, outputs, done = toy(images).detach(), [], threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not done.is_set():
                outputs.append(toy(images))

    thread = threading.Thread(target=run)
    thread.start()
    for number in range(20):
        save_adapter(toy, tmp_path / str(number))
    done.set()
    thread.join()
    assert len(outputs) > 3 and all(torch.allclose(out, expected, atol=1e-6) for out in outputs)


@pytest.mark.parametrize("other", ["tied", "sequential"])
def test_what_cannot_be_merged_is_named(other: str, toy: nn.Module) -> None:
    if other == "tied":
        toy.blocks[1].proj.weight = toy.blocks[0].proj.weight  # type: ignore[union-attr, index]
    peft.inject(toy, [LORA if other == "tied" else ADAPTER])
    said = {
        "tied": "blocks.0.proj.weight also belongs .* merging lora .*: blocks.1.proj.weight. EXCLUDE",
        "sequential": r"no weight can hold: .*blocks.0.mlp \(adapter\).*save_adapter",
    }
    before = snapshot(toy)
    with pytest.raises(peft.InjectionError, match=said[other]):
        peft.remove(toy, keep=True)
    require_same(toy, before)


class Osa(nn.Module):
    """VoVNet's block, by its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()) for _ in range(1)])
        self.concat = nn.Sequential(nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.se = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.concat(torch.cat([x, self.layers[0](x)], dim=1))


def test_widths_of_blocks_of_convolutions_are_found() -> None:
    timm = pytest.importorskip("timm")
    model = nn.ModuleDict({"osa": Osa(), "timm": timm.create_model("resnet18", num_classes=2)})
    peft.inject(model, [{"NAME": "adapter", "TARGETS": ["osa", "timm.layer2.0", "timm.layer1"], "REDUCTION": 4}])
    model["osa"](torch.zeros(1, 8, 6, 6))
    model["timm"](torch.zeros(1, 3, 32, 32))
