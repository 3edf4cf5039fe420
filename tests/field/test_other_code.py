"""What other people's training loops, servers and compilers do with an injected model."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.fusion import fuse_conv_bn_eval

import peft_d2
from peft_d2 import peft

LORA = {"NAME": "lora", "TARGETS": ["fc"], "RANK": 2}


class Model(nn.Module):
    """Images (N, 3, 6, 6) -> (N, 5), or Detectron2's list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, batch: Any) -> Any:
        if isinstance(batch, list):
            return [{"scores": scores} for scores in self(torch.stack([sample["image"] for sample in batch]))]
        return self.head(self.fc(self.bn(self.conv(batch)).relu().mean((2, 3))).relu())


def change(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give what is trained other values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(torch.randn(item.param.shape, generator=generator))
    return model


def injected(methods: Any = (LORA,), train: Any = ("head",)) -> nn.Module:
    model = Model()
    peft_d2.inject(model, methods, train)
    return change(model)


def backward(model: nn.Module, images: Tensor) -> None:
    model.train()
    model(images).sum().backward()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 6, 6)


TAKEN_OUT = {
    "save_merged": lambda model, folder: peft_d2.save_merged(model, folder / "merged.pth"),
    "remove": lambda model, folder: peft.remove(model),
    "delete_adapter": lambda model, folder: (peft_d2.set_adapter(model, "b"), peft.delete_adapter(model, "default")),
}


@pytest.mark.parametrize("way", TAKEN_OUT)
@pytest.mark.parametrize("mode", [True, False], ids=["then train", "then eval"])
def test_norms_are_in_the_mode_that_was_asked_for(way: str, mode: bool, tmp_path: Path) -> None:
    """A norm that went back to the mode of before inject used the batch's statistics in predictions."""
    model = Model().train(not mode)
    peft_d2.inject(model, [LORA], ["head"])
    peft.add_adapter(model, "b", [LORA], ["bn", "head"])
    model.train(mode)
    TAKEN_OUT[way](model, tmp_path)
    assert {module.training for module in model.modules()} == {mode}


def test_a_norm_that_was_put_into_eval_mode_stays_there() -> None:
    model = injected([], ["bn"])
    peft.add_adapter(model, "b", [], ["bn"])
    model.bn.eval()  # type: ignore[operator, union-attr]
    peft_d2.set_adapter(model, "b")
    assert not model.bn.training  # type: ignore[union-attr]
    peft.remove(model)
    assert not model.bn.training  # type: ignore[union-attr]


def test_threads_share_a_model_that_serves_adapters(images: Tensor, tmp_path: Path) -> None:
    names = {name: tmp_path / name for name in "ab"}
    for seed, folder in enumerate(names.values()):
        peft_d2.save_adapter(change(injected(), seed + 5), folder)
    model = Model().eval()
    peft_d2.load_adapters(model, names)
    calls: dict[str, Callable[[], Tensor]] = {
        "a": lambda: model([{"image": images[0], "adapter": "a"}])[0]["scores"],
        "b": lambda: model.predict_with(images[0], ["b"])["b"]["scores"],  # type: ignore[operator]
        "a and b": lambda: model([{"image": images[0], "adapter": name} for name in "ab"])[1]["scores"],
        "base": lambda: model([{"image": images[0]}])[0]["scores"],
    }
    with torch.no_grad():
        expected = {name: call() for name, call in calls.items()}
    started = threading.Barrier(len(calls))

    def wrong(name: str) -> int:
        started.wait()
        with torch.no_grad():
            return sum(not torch.equal(calls[name](), expected[name]) for _ in range(40))

    with ThreadPoolExecutor(len(calls)) as threads:
        assert list(threads.map(wrong, calls)) == [0] * len(calls)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_waits_for_the_predictions_of_other_threads(images: Tensor, tmp_path: Path) -> None:
    """A child of then waited for ever, for a thread that it does not have."""
    peft_d2.save_adapter(injected(), tmp_path / "a")
    model = Model().eval()
    peft_d2.load_adapters(model, {"a": tmp_path / "a"})
    ended = threading.Event()

    def predict() -> None:
        with torch.no_grad():
            model([{"image": images[0], "adapter": "a"}])

    def predict_on() -> None:
        while not ended.is_set():
            predict()

    predict()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(predict_on)
        try:
            for _ in range(3):
                child = multiprocessing.get_context("fork").Process(target=predict)
                child.start()
                child.join(20)
                code = child.exitcode
                child.kill()
                assert code == 0
        finally:
            ended.set()


@pytest.mark.parametrize("merged", [False, True])
def test_merging_in_one_process_changes_no_other(merged: bool, images: Tensor) -> None:
    """torch shares the memory of a model that is sent to a process: merged there, it was in effect twice here."""
    model = injected([{**LORA, "TARGETS": ["conv", "fc"]}]).eval().share_memory()
    if merged:
        peft_d2.merge(model)
        model.share_memory()
    expected = model(images).detach()

    def in_a_child() -> None:
        (peft_d2.unmerge if merged else peft_d2.merge)(model)
        torch.testing.assert_close(model(images), expected)

    child = multiprocessing.get_context("fork").Process(target=in_a_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(model(images), expected)


def test_a_model_with_adapters_cannot_be_scripted() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.randn(3, 4)
    peft_d2.inject(model, [{**LORA, "TARGETS": ["0"]}])
    expected = change(model)(x)
    with pytest.raises(peft.InjectionError, match=r"torch.jit.script reads no model with adapters.*trace.*remove"):
        torch.jit.script(model)
    assert torch.equal(model(x), expected)
    plain = torch.jit.script(peft.remove(model, keep=True))
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("methods", [[LORA], []], ids=["layers", "in full"])
def test_an_optimizer_that_was_made_for_another_adapter(
    methods: Any, images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = injected(methods)
    peft.add_adapter(model, "b", methods, ["head"])
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.1)
    backward(model, images)
    optimizer.step()
    with pytest.warns(UserWarning, match="optimizer that was made for 'default' alone does not move it"):
        peft_d2.set_adapter(model, "b")
    optimizer.zero_grad()
    backward(model, images)
    optimizer.step()
    peft_d2.save_adapter(model, tmp_path / "b")
    assert "of 'b' has changed since it was made" in caplog.text and "after set_adapter" in caplog.text


@pytest.mark.parametrize("zeroed", [True, False])
def test_an_optimizer_of_before_inject_moves_nothing_that_is_frozen(zeroed: bool, images: Tensor) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    backward(model, images)
    peft_d2.inject(model, [LORA], ["head"])
    before, head = peft.frozen_hash(model), model.head.weight.clone()  # type: ignore[union-attr, operator]
    for _ in range(2):
        if zeroed:
            optimizer.zero_grad(set_to_none=False)
        backward(model, images)
        optimizer.step()
    assert peft.frozen_hash(model) == before and not torch.equal(model.head.weight, head)  # type: ignore[union-attr, arg-type]


def test_a_base_that_was_thawed_after_inject_is_said_before_training(
    images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = injected()
    peft_d2.prove_live(model, images)
    assert "in no adapter" not in caplog.text
    model.requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        peft_d2.prove_live(model, images)
    assert "6 parameters require gradients and are in no adapter, from conv.weight on" in caplog.text


def replaced(module: nn.Module) -> nn.Module:
    """As hooks of accelerate and patches do it: the instance has a forward of its own."""
    module.forward = module.forward  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("method", [LORA, {"NAME": "adapter", "TARGETS": ["fc"]}], ids=["lora", "adapter"])
def test_a_forward_of_the_instance_would_pass_over_the_layers(method: Any) -> None:
    model = Model()
    replaced(model.fc)
    with pytest.raises(peft.MethodError, match="cannot go on fc: the forward of this very Linear was replaced"):
        peft_d2.inject(model, [method])


def test_samples_cannot_name_adapters_past_a_patched_model(tmp_path: Path, images: Tensor) -> None:
    peft_d2.save_adapter(injected(), tmp_path / "a")
    model = replaced(Model())
    with pytest.raises(peft.InjectionError, match="samples cannot name their adapters: the forward of this very Model"):
        peft_d2.load_adapters(model, {"a": tmp_path / "a"})
    assert peft.get_injection(model) is None


def test_a_method_that_was_kept_outlives_the_adapters(images: Tensor) -> None:
    model = injected().eval()
    kept = model.fc.forward  # type: ignore[union-attr]
    peft.remove(model)
    x = torch.randn(2, 8)
    assert torch.equal(kept(x), Model().fc(x))  # type: ignore[operator]


class Lightning(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = model, nn.MSELoss()


HOLDERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save_adapter": lambda module, folder: peft_d2.save_adapter(module, folder / "a"),
    "save_merged": lambda module, folder: peft_d2.save_merged(module, folder / "merged.pth"),
    "prove_live": lambda module, folder: peft_d2.prove_live(module, torch.zeros(2, 3, 6, 6)),
    "merge": lambda module, folder: peft_d2.merge(module),
    "load_trained": lambda module, folder: peft_d2.load_trained(module, folder / "last.ckpt"),
}


@pytest.mark.parametrize("call", HOLDERS)
def test_what_holds_the_injected_model_is_told_from_it(call: str, tmp_path: Path) -> None:
    with pytest.raises(
        (peft.InjectionError, ValueError), match="Lightning only holds the injected model, as its 'net'"
    ):
        HOLDERS[call](Lightning(injected()), tmp_path)


def test_checkpoints_of_what_holds_the_model(images: Tensor, tmp_path: Path) -> None:
    trained = injected().eval()
    torch.save({"state_dict": Lightning(trained).state_dict(), "epoch": 3}, tmp_path / "last.ckpt")
    model = Model().eval()
    peft_d2.inject(model, [LORA], ["head"])
    peft_d2.load_trained(model, tmp_path / "last.ckpt")
    assert torch.equal(model(images), trained(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_trained_became_half_after_inject(dtype: torch.dtype, images: Tensor) -> None:
    model = injected().to(dtype)
    with pytest.raises(peft.LivenessError, match=rf"fc.lora_a is {dtype}, .*must be float32"):
        peft_d2.prove_live(model, images.to(dtype))


FREEZING: dict[str, tuple[Callable[[str], bool], str]] = {
    "mark_only_lora_as_trainable": (lambda name: "lora_" in name, "head.weight, head.bias"),
    "only the head": (lambda name: name.startswith("head"), "fc: lora"),
    "all of it": (lambda name: False, "fc: lora, head.weight, head.bias"),
    "A alone": (lambda name: "lora_b" not in name, ""),
}


@pytest.mark.parametrize("way", FREEZING)
def test_a_part_of_the_adapter_that_was_frozen_after_inject(way: str, images: Tensor) -> None:
    """loralib's and peft's helpers go by names, and know nothing of TRAIN."""
    keep, said = FREEZING[way]
    model = injected()
    for name, value in model.named_parameters():
        value.requires_grad_(value.requires_grad and keep(name))
    if not said:
        peft_d2.prove_live(model, images)
        return
    with pytest.raises(peft.LivenessError, match=rf"what is trained requires no gradients any more, {said}: "):
        peft_d2.prove_live(model, images)


class Centred(Model):
    """A running average that is no norm's, as self-distillation and losses have them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8), persistent=False)

    def forward(self, batch: Any) -> Any:
        features = self.fc(self.bn(self.conv(batch)).relu().mean((2, 3)))
        if self.training:
            self.last.copy_(features.detach().mean(0))  # type: ignore[operator]
            self.centre.mul_(0.9).add_(self.last)  # type: ignore[operator]
        return self.head(features - self.centre)


def normed() -> nn.Module:
    model = Model()
    nn.utils.parametrizations.spectral_norm(model.head)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [(Centred, "centre"), (normed, "head.parametrizations.weight.0._u, .*_v")],
    ids=["running average", "spectral norm"],
)
def test_buffers_that_training_moves_are_found_before_it(
    make: Callable[[], nn.Module], said: str, images: Tensor, tmp_path: Path
) -> None:
    """An adapter that was saved after it was refused on its own base."""
    model = make()
    peft_d2.inject(model, [LORA])
    with pytest.raises(peft.LivenessError, match=rf"buffers that are in no adapter, {said} .*name their modules in TR"):
        peft_d2.prove_live(model, images)
    peft.remove(model)
    if make is normed:
        peft_d2.inject(model, [LORA], ["head"])
        peft_d2.prove_live(model, images)
        backward(model, images)
        peft_d2.save_adapter(model, tmp_path / "a")
        peft_d2.load_adapter(other := make(), tmp_path / "a")
        assert torch.equal(other.eval()(images), model.eval()(images))


class Partial(Model):
    """Leaves out of its state dict what it gets from elsewhere, as models around CLIP do."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "conv" not in name}


def test_a_model_that_makes_its_state_dict_itself(images: Tensor, tmp_path: Path) -> None:
    model = Partial()
    peft_d2.inject(model, [LORA], ["head"])
    expected = change(model).eval()(images)
    peft_d2.save_adapter(model, tmp_path / "a")
    peft_d2.save_merged(model, tmp_path / "merged.pth")
    peft_d2.load_adapter(loaded := Partial().eval(), tmp_path / "a")
    peft_d2.load_base(merged := Partial().eval(), tmp_path / "merged.pth")
    assert torch.equal(loaded(images), expected)
    torch.testing.assert_close(merged(images), expected)


class Hiding(Model):
    """Keeps a part from its optimizers, as models with a teacher or a text encoder do."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return (item for item in super().named_parameters(*args, **kwargs) if not item[0].startswith(("conv", "fc")))


def test_what_a_model_hides_of_its_parameters_is_frozen_and_stored(
    images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stayed trainable, and adapters in it were said to be reached by no gradient."""
    model = Hiding()
    peft_d2.inject(model, [LORA], ["conv.bias", "head"])
    trained = {name for name, value in nn.Module.named_parameters(model) if value.requires_grad}
    assert trained == {"conv.bias", "head.weight", "head.bias", *(f"fc.peft.default.lora.lora_{end}" for end in "ab")}
    change(model)
    peft_d2.prove_live(model, images)
    assert "Hiding.parameters() leaves out 3 parameters of the adapter" in caplog.text
    expected = model.eval()(images)
    peft_d2.save_adapter(model, tmp_path / "adapter")
    other = Hiding().eval()
    peft_d2.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(images), expected)
    peft.remove(model)
    assert all(value.requires_grad for _, value in nn.Module.named_parameters(model))


def test_a_norm_that_was_fused_into_an_adapted_convolution(tmp_path: Path) -> None:
    """Merging afterwards was a KeyError; merged first, the fused model is right."""
    model = injected([{**LORA, "TARGETS": ["conv", "fc"]}]).eval()
    images = torch.randn(2, 3, 6, 6)
    expected = model(images)
    peft_d2.merge(model)
    whole = copy.deepcopy(model)
    peft.remove(whole, keep=True)
    whole.conv = fuse_conv_bn_eval(whole.conv, whole.bn)
    whole.bn = nn.Identity()
    torch.testing.assert_close(whole(images), expected)
    peft_d2.unmerge(model)
    model.conv = fuse_conv_bn_eval(model.conv, model.bn)
    with pytest.raises(peft.InjectionError, match=r"no longer in the model: conv \(adapted\).*fused"):
        peft_d2.merge(model)


SINCE: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "merge": ("fc", peft_d2.merge),
    "remove": ("head", peft.remove),
    "set_adapter": ("head", lambda model: peft_d2.set_adapter(model, "b")),
    "disabled": ("head", lambda model: peft_d2.disabled(model).__enter__()),
    "trained_parameters": ("head", lambda model: list(peft.trained_parameters(model))),
    "combine_adapters": ("head", lambda model: peft.combine_adapters(model, {"default": 1.0, "b": 1.0}, "c")),
}


@pytest.mark.parametrize("call", SINCE)
def test_a_weight_that_is_computed_from_others_since_inject(call: str, images: Tensor) -> None:
    """It was a KeyError of its last name, and ``disabled`` left the adapters off."""
    model = injected()
    peft.add_adapter(model, "b")
    name, function = SINCE[call]
    nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    expected = model.eval()(images)
    with pytest.raises(
        peft.InjectionError, match=rf"no longer in the model: {name}\.weight.*weight_norm.*then inject it"
    ):
        function(model)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("when", ["before inject", "after inject"])
def test_torchs_wrappers_for_activation_checkpointing_change_no_names(
    when: str, images: Tensor, tmp_path: Path
) -> None:
    """Adapters of such a model fitted no base, and merged checkpoints held the adapter's layers."""

    def wrapped(model: nn.Module) -> nn.Module:
        for name in ("conv", "bn", "fc", "head"):
            setattr(model, name, checkpoint_wrapper(getattr(model, name)))
        return model

    model = wrapped(Model()) if when == "before inject" else Model()
    peft_d2.inject(model, [{**LORA, "TARGETS": ["conv", "fc"]}], ["bn", "head"])
    model = model if when == "before inject" else wrapped(model)
    change(model)
    peft_d2.prove_live(model, images)
    backward(model, images)
    expected = model.eval()(images)
    with peft_d2.disabled(model):
        assert torch.equal(model(images), Model().eval()(images))
    peft_d2.save_adapter(model, tmp_path / "a")
    for other in (Model(), wrapped(Model())):
        peft_d2.load_adapter(other, tmp_path / "a")
        assert torch.equal(other.eval()(images), expected)
    peft_d2.save_merged(model, tmp_path / "merged.pth")
    plain = Model().eval()
    plain.load_state_dict(torch.load(tmp_path / "merged.pth")["model"])
    torch.testing.assert_close(plain(images), expected)


def test_a_model_that_renames_as_it_saves() -> None:
    """Its adapters could be saved, and loaded into no model."""
    model = Model()
    before = list(model.state_dict())

    def rename(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        state.update({f"linear{key[2:]}": state.pop(key) for key in list(state) if key.startswith("fc.")})

    hook = model._register_state_dict_hook(rename)
    with pytest.raises(peft.InjectionError, match=r"other names .* such as linear\.peft\.default\.lora\.lora_a "):
        peft_d2.inject(model, [LORA])
    hook.remove()
    assert list(model.state_dict()) == before
    peft_d2.inject(model, [LORA])


class Strided(nn.Module):
    """Images -> a dict of one map, as Detectron2's backbones give."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 8, 3, 2), nn.ReLU())
        self.backbone = Maps(self.stem, self.stage)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)["res2"].mean((2, 3)))


class Maps(nn.Module):
    def __init__(self, stem: nn.Module, stage: nn.Module) -> None:
        super().__init__()
        self.stem, self.stage = stem, stage

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"res2": self.stage(self.stem(images))}


def test_modules_that_no_layer_fits_are_called_what_they_are() -> None:
    """One was said not to be called, the other to need another DIM, which does not exist."""
    with pytest.raises(peft.MethodError, match=r"backbone returns dict; .*choose a module inside"):
        peft_d2.inject(Strided(), [{"NAME": "adapter", "TARGETS": ["backbone"]}])
    model = Strided()
    peft_d2.inject(model, [{"NAME": "adaptformer", "TARGETS": ["stage"]}])
    with pytest.raises(peft.MethodError, match="choose modules whose input and output have one shape"):
        model(torch.randn(1, 3, 8, 8))


class Refusing(Model):
    """Looks at its own values, as Detectron2's region proposals do."""

    def forward(self, batch: Any) -> Any:
        if not (out := super().forward(batch)).isfinite().all():
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        return out


def test_a_model_that_refuses_its_own_values_cannot_be_proved_live(images: Tensor) -> None:
    model = Refusing()
    peft_d2.inject(model, [LORA], ["head"])
    with torch.no_grad():
        model.conv.bias[0] = torch.nan
    with pytest.raises(peft.LivenessError, match=r"Inf/NaN.*conv\.bias hold values that are not finite"):
        peft_d2.prove_live(model, images)


def test_frozen_norms_of_detectron2_are_named_with_what_to_build_in_their_place() -> None:
    layers = pytest.importorskip("detectron2.layers")
    with pytest.raises(peft.MethodError, match=r"no norm has parameters \(a FrozenBatchNorm2d.*NORM BN\) in 0"):
        peft_d2.inject(nn.Sequential(layers.FrozenBatchNorm2d(3)), [{"NAME": "norm", "TARGETS": ["0"]}])
