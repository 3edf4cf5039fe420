"""Saving and loading the adapters of real injected models."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft
from peft_d2.adapters import load_adapter, save_adapter, save_merged
from peft_d2.storage import AdapterFileError, StorageError, adapter_file, load_base


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x + self.attention(x, x, x)[0]))


class Model(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, classes)
        self.head_again = self.head
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IMAGES = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
LORA = {"NAME": "lora", "TARGETS": ["fc"], "RANK": 2, "ALPHA": 6.0}
RECIPES: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "lora": ([LORA], ("head",)),
    "lora on everything": (
        [{**LORA, "TARGETS": ["fc", "stem"], "RANK_PATTERN": {"1.fc": 3}, "ALPHA_PATTERN": {"stem": 1.0}}],
        (),
    ),
    "dora": ([{**LORA, "TARGETS": ["fc", "stem"], "DORA": True}], ("head",)),
    "attention": ([{**LORA, "TARGETS": ["attention"], "PARTS": ["q", "v", "out"]}], ("norm",)),
    "pissa and adapters": (
        [{**LORA, "INIT": "pissa"}, {"NAME": "adapter", "TARGETS": ["norm"], "NUM": 2, "REDUCTION": 4}],
        ("head.bias",),
    ),
    "heads": ([], ("head",)),
    "everything": ([], ("*",)),
}


def base(seed: int = 0, classes: int = 3) -> Model:
    torch.manual_seed(seed)
    return Model(classes).eval()


def trained(recipe: str, seed: int = 7) -> Model:
    """A base with an adapter whose every tensor has moved."""
    model = base()
    methods, train = RECIPES[recipe]
    peft.inject(model, methods, train=train)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(0.3 * torch.randn(item.param.shape, generator=generator))
    return model.eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("injected", [False, True])
def test_a_loaded_adapter_gives_the_same_outputs(tmp_path: Path, recipe: str, injected: bool) -> None:
    model = trained(recipe)
    save_adapter(model, tmp_path / "adapter", metrics={"AP": 12.5})
    fresh = base()
    if injected:
        peft.inject(fresh, RECIPES[recipe][0], train=RECIPES[recipe][1])
    assert not torch.equal(output(fresh), output(model))
    content = load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(output(fresh), output(model)) and content.metrics == {"AP": 12.5}


def test_the_public_names_are_these(tmp_path: Path) -> None:
    peft_d2.save_adapter(trained("lora"), tmp_path / "adapter")
    assert peft_d2.load_adapter(base(), tmp_path / "adapter").train == ("head",)


def test_the_file_is_small(tmp_path: Path) -> None:
    """It holds the adapter and the head, and nothing of the base."""
    model = trained("lora")
    save_adapter(model, tmp_path / "adapter")
    content = adapter_file.read(tmp_path / "adapter")
    count = sum(value.numel() for value in content.tensors.values())
    assert count == sum(item.param.numel() for item in peft.trained_parameters(model))


def test_several_adapters_in_one_model(tmp_path: Path) -> None:
    expected = {}
    for recipe in ("lora", "pissa and adapters", "heads"):
        model = trained(recipe, seed=len(recipe))
        save_adapter(model, tmp_path / recipe)
        expected[recipe.split()[0]] = (tmp_path / recipe, output(model))
    together = base()
    for name, (folder, _) in expected.items():
        load_adapter(together, folder, name=name)
    for name, (folder, out) in expected.items():
        peft.set_adapter(together, name)
        assert torch.equal(output(together), out)
        save_adapter(together, folder, name=name)  # whichever is active or not, each describes the same base
    for name, (folder, out) in expected.items():
        fresh = base()
        load_adapter(fresh, folder, name=name)
        assert torch.equal(output(fresh), out)


@pytest.mark.parametrize("active", ["first", "second"])
def test_an_adapter_that_is_not_active_can_be_saved(tmp_path: Path, active: str) -> None:
    model = trained("lora")
    save_adapter(model, tmp_path / "x")
    both = base()
    load_adapter(both, tmp_path / "x", name="first")
    peft.add_adapter(both, "second", [LORA], [])
    peft.set_adapter(both, active)
    save_adapter(both, tmp_path / "second", name="second")
    load_adapter(base(), tmp_path / "second")


def test_a_merged_model_saves_its_adapter(tmp_path: Path) -> None:
    model = trained("lora")
    expected = output(model)
    peft.merge(model)
    save_adapter(model, tmp_path / "adapter")
    assert peft.get_injection(model).merged  # type: ignore[union-attr]
    with pytest.raises(peft.InjectionError, match=r"merged.*unmerge.model. first$"):
        load_adapter(model, tmp_path / "adapter", name="second")
    fresh = base()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(output(fresh), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_a_wrapped_model_is_the_model(tmp_path: Path, wrap: Any) -> None:
    """Names in the files are the model's own, and what is trained in full is no property of its base."""
    model, other = trained("lora"), base()
    wrapped = wrap(model)
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrapped, tmp_path / "wrapped")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "wrapped" / path.name).read_bytes(), path.name
    load_adapter(wrapped, tmp_path / "plain")
    with pytest.raises(peft.InjectionError, match="inject the model itself"):
        load_adapter(wrap(other), tmp_path / "plain")
    save_merged(wrapped, tmp_path / "merged.pth")
    assert list(torch.load(tmp_path / "merged.pth")["model"]) == list(other.state_dict())


def test_a_merged_model_stores_what_was_trained_and_not_what_is_merged_into_it(tmp_path: Path) -> None:
    """LoRA on a layer that is trained in full besides: merged, its weight holds both."""
    model, fresh = base(), base()
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["head"], "RANK": 2}], train=["head"])
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(0.1 * torch.randn_like(item.param))
    expected = {name: value.clone() for name, value in peft.adapter_state_dict(model).items()}
    peft.merge(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    for name, value in peft.adapter_state_dict(fresh).items():
        assert torch.equal(value, expected[name]), name


def test_parameters_that_no_adapter_holds_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained("lora")
    save_adapter(model, tmp_path / "adapter")
    assert "require gradients" not in caplog.text
    model.requires_grad_(True)
    save_adapter(model, tmp_path / "adapter")
    assert "require gradients and are in no adapter" in caplog.text


def test_a_model_without_adapter_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no adapter: call inject"):
        save_adapter(base(), tmp_path / "adapter")


def other_weights() -> Model:
    model = base()
    with torch.no_grad():
        model.blocks[1].norm.weight[3] += 1e-5
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_weights, r"same structure, other weights: 1 of \d+ tensors differ: blocks\.1\.norm\.weight"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"\d+ tensors missing"),
    ],
)
def test_another_base_is_refused_and_left_as_it_was(
    tmp_path: Path, make: Callable[[], nn.Module], message: str
) -> None:
    save_adapter(trained("lora"), tmp_path / "adapter")
    model = make()
    with pytest.raises(AdapterFileError, match=rf"adapter: it was made for another base .*{message}.*ALLOW_OTHER_BASE"):
        load_adapter(model, tmp_path / "adapter")
    assert peft.get_injection(model) is None


def test_another_class_count_is_called_so(tmp_path: Path) -> None:
    save_adapter(trained("lora"), tmp_path / "adapter")
    model = base(classes=5)
    with pytest.raises(AdapterFileError, match=r"heads are of another size .*head\.bias \(3 -> 5\).*as many classes"):
        load_adapter(model, tmp_path / "adapter")
    assert peft.get_injection(model) is None


def test_another_base_can_be_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_adapter(trained("lora"), tmp_path / "adapter")
    load_adapter(other_weights(), tmp_path / "adapter", allow_other_base=True)
    assert "another base" in caplog.text
    with pytest.raises(AdapterFileError, match=r"shape of head\.weight"):
        load_adapter(base(classes=5), tmp_path / "adapter", allow_other_base=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": 4}, "RANK is 4 in the model and 2 in the file|scaled by"),
        ({"ALPHA": 2.0}, "scaled by 1 in the model and by 3 in the file"),
        ({"TARGETS": ["0.fc"]}, r"unexpected: blocks\.1\.fc\.lora_a"),
        ({"RSLORA": True}, "scaled by"),
        ({"DORA": True}, "DORA is True in the model and False in the file"),
    ],
)
def test_another_method_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_adapter(trained("lora"), tmp_path / "adapter")
    model = base()
    peft.inject(model, [{**LORA, **change}], train=("head",))
    with pytest.raises(AdapterFileError, match=rf"(?s)it does not fit the model: .*({message})"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("recipe", RECIPES)
def test_base_weights_that_are_loaded_again_leave_the_adapter_alone(tmp_path: Path, recipe: str) -> None:
    """As in a predictor: the model is built with its base and its adapter, then the base is loaded once more."""
    expected = output(trained(recipe))
    save_adapter(trained(recipe), tmp_path / "adapter")
    torch.save(base().state_dict(), tmp_path / "base.pth")
    for load in (lambda m: m.load_state_dict(base().state_dict()), lambda m: load_base(m, tmp_path / "base.pth")):
        model = base()
        load_adapter(model, tmp_path / "adapter")
        for _ in range(2):
            load(model)
            assert torch.equal(output(model), expected)


@pytest.mark.parametrize("recipe", ["lora", "heads"])
def test_another_base_that_comes_later_is_refused(tmp_path: Path, recipe: str) -> None:
    save_adapter(trained(recipe), tmp_path / "adapter")
    model = base()
    load_adapter(model, tmp_path / "adapter")
    model = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    with pytest.raises(peft.InjectionError, match="another base.*load_base"):
        model.load_state_dict(other_weights().state_dict())
    assert torch.equal(output(model), output(trained(recipe)))


def test_loading_base_weights_into_an_injected_model_misses_nothing(tmp_path: Path, caplog: Any) -> None:
    torch.save(base(seed=3).state_dict(), tmp_path / "base.pth")
    model = base()
    peft.inject(model, RECIPES["pissa and adapters"][0], train=("head",))
    with caplog.at_level(logging.INFO):
        report = load_base(model, tmp_path / "base.pth")
    assert not report.initial and not report.unexpected
    with peft.disabled(model):
        assert torch.equal(output(model), output(base(seed=3)))


@pytest.mark.parametrize("folder", ["", ".", "run", "run/adapter_0000009"])
def test_nobodys_folder_is_deleted_by_a_save(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "adapter_0000009").mkdir(parents=True)
    for name in ("notes.txt", "run/config.yaml", "run/adapter_0000009/training_state.pth"):
        (tmp_path / name).write_text("mine")
    model = base()
    peft.inject(model, [LORA])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="empty" if not folder else "notes.txt|adapter_0000009|training_state.pth"):
        save_adapter(model, folder)
    assert sorted(tmp_path.rglob("*")) == before
    for _ in range(2):  # a new folder, then the same again
        save_adapter(model, "run/mine")
        assert sorted(path.name for path in Path("run/mine").iterdir()) == sorted(adapter_file.FILES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.1.fc.lora_b", "head.bias"])
def test_an_adapter_that_diverged_is_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    model, fresh = trained("lora"), base()
    peft.adapter_state_dict(model)[name].view(-1)[1] = value
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match=rf"adapter: it holds NaN or infinity: 1 of \d+ values of {name}"):
        load_adapter(fresh, tmp_path / "adapter")
    assert peft.get_injection(fresh) is None and torch.equal(output(fresh), output(base()))


def test_infinity_in_a_buffer_is_no_damage(tmp_path: Path) -> None:
    """As in masks of attention; all of this model is trained, its buffers are in the file."""
    model, fresh = base(), base()
    for one in (model, fresh):
        one.register_buffer("mask", torch.full((2, 2), -float("inf")))
    peft.inject(model, [], train=("*",))
    save_adapter(model, tmp_path / "adapter")
    assert "mask" in load_adapter(fresh, tmp_path / "adapter").tensors


def test_a_merged_file_has_the_versions_of_the_bases_modules(tmp_path: Path) -> None:
    model = trained("attention")
    save_merged(model, tmp_path / "merged.pth")
    assert torch.load(tmp_path / "merged.pth")["model"]._metadata == base().state_dict()._metadata


def test_names_of_classes_go_with_an_adapter(tmp_path: Path) -> None:
    """So that whoever gets the folder alone can tell what its head's rows stand for."""
    model, fresh = trained("heads"), base()
    save_adapter(model, tmp_path / "unknown")
    save_adapter(model, tmp_path / "known", classes=(name for name in ("car", "bus", "tram")))  # type: ignore[arg-type]
    assert load_adapter(fresh, tmp_path / "unknown").classes == ()
    assert load_adapter(fresh, tmp_path / "known").classes == ("car", "bus", "tram")
    save_adapter(fresh, tmp_path / "again")
    assert adapter_file.classes_of(tmp_path / "again") == ["car", "bus", "tram"]
    assert adapter_file.classes_of(tmp_path / "unknown") == adapter_file.classes_of(tmp_path) == []
    for wrong in ("car", [1, 2, 3]):
        with pytest.raises(ValueError, match="classes are .*; expected a list of names"):
            save_adapter(model, tmp_path / "wrong", classes=wrong)  # type: ignore[arg-type]


def test_heads_of_classes_in_another_order_are_not_combined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {"a": ["car", "bus", "tram"], "b": ["bus", "car", "tram"], "c": ["cat", "dog", "cow"]}
    model = base()
    for seed, (name, classes) in enumerate(names.items()):
        save_adapter(trained("heads", seed), tmp_path / name, classes=classes)
        load_adapter(model, tmp_path / name, name)
    with pytest.raises(
        peft.InjectionError, match="another order cannot be combined: car, bus, tram and bus, car, tram"
    ):
        peft.combine_adapters(model, {"a": 0.5, "b": 0.5}, "mix")
    peft.combine_adapters(model, {"a": 0.5, "c": 0.5}, "mix")
    assert "Adapters of other classes are combined" in caplog.text
    save_adapter(model, tmp_path / "mix", name="mix")
    assert adapter_file.classes_of(tmp_path / "mix") == names["a"]
