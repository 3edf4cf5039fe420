"""Adapters to and from the real Hugging Face peft package, on the same torch model: outputs equal."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft as ours
from peft_d2.adapters import load_adapter, save_adapter
from peft_d2.storage import AdapterFileError, huggingface

hf = pytest.importorskip("peft")


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.q_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.ModuleList(Stage() for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).mean((2, 3))
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x))


IMAGES = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
EVERYWHERE = ["q_proj", "mlp.0", "mlp.2"]


def base() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def move(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


HF_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": EVERYWHERE, "r": 4, "lora_alpha": 6},
    "patterns": {
        "target_modules": ["q_proj", "stem"], "r": 4, "lora_alpha": 8, "lora_dropout": 0.1,
        "rank_pattern": {"stages.1.q_proj": 2, "^stem": 3}, "alpha_pattern": {".*2.q_proj": 1},
    },
    "rslora": {"target_modules": EVERYWHERE, "r": 4, "lora_alpha": 6, "use_rslora": True},
    "regex": {"target_modules": r"stages\.[01]\.mlp\.[02]", "r": 2, "lora_alpha": 2},
    "with modules": {"target_modules": EVERYWHERE, "r": 2, "lora_alpha": 2, "modules_to_save": ["head", "norm"]},
    "dora": {"target_modules": [*EVERYWHERE, "stem"], "r": 4, "lora_alpha": 6, "use_dora": True},
    "dora with rslora": {"target_modules": EVERYWHERE, "r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True},
}  # fmt: skip


def theirs(folder: Path, **config: Any) -> Tensor:
    """Write an adapter with peft, every tensor of it moved; returns its output."""
    model = hf.get_peft_model(base(), hf.LoraConfig(**config))
    move(parameter for parameter in model.parameters() if parameter.requires_grad)
    for name, buffer in model.named_buffers():
        if "modules_to_save" in name and name.endswith("running_mean"):
            buffer += 0.5
    model.save_pretrained(folder)
    return output(model)


@pytest.mark.parametrize("form", HF_CONFIGS)
def test_theirs_gives_the_same_outputs_in_ours(tmp_path: Path, form: str) -> None:
    expected = theirs(tmp_path / "hf", **HF_CONFIGS[form])
    model = base()
    before = output(model)
    content = load_adapter(model, tmp_path / "hf")
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)
    assert content.base is None


OURS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "plain": ([{"NAME": "lora", "TARGETS": EVERYWHERE, "RANK": 4, "ALPHA": 6.0}], ()),
    "patterns": (
        [
            {
                "NAME": "lora", "TARGETS": [*EVERYWHERE, "stem"], "RANK": 4, "ALPHA": 6.0,
                "RANK_PATTERN": {"mlp.0": 2, "stem": 3}, "ALPHA_PATTERN": {"stages.2.*": 1.0},
            }
        ],
        ("head",),
    ),
    "two methods": (
        [
            {"NAME": "lora", "TARGETS": ["0.q_proj"], "RANK": 2, "ALPHA": 1.0},
            {"NAME": "lora", "TARGETS": ["{1,2}.q_proj"], "RANK": 4, "ALPHA": 6.0, "RSLORA": True},
        ],
        ("head", "norm"),
    ),
    "dora": ([{"NAME": "lora", "TARGETS": [*EVERYWHERE, "stem"], "RANK": 4, "ALPHA": 6.0, "DORA": True}], ("head",)),
}  # fmt: skip


def injected(form: str) -> Model:
    model = base()
    peft_d2.inject(model, OURS[form][0], train=OURS[form][1])
    move(item.param for item in ours.trained_parameters(model))
    return model


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("form", OURS)
def test_ours_gives_the_same_outputs_in_theirs(tmp_path: Path, form: str, bare: bool) -> None:
    """peft reads our folder as it is, and without our record, and does not warn of missing or unknown keys."""
    model = injected(form)
    save_adapter(model, tmp_path / "ours")
    folder = tmp_path / "ours"
    if bare:
        folder = tmp_path / "hf"
        folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(tmp_path / "ours" / name, folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = hf.PeftModel.from_pretrained(base(), str(folder))
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(output(merged), output(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", OURS)
def test_there_and_back_again(tmp_path: Path, form: str) -> None:
    model = injected(form)
    save_adapter(model, tmp_path / "ours")
    hf.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).save_pretrained(tmp_path / "hf")
    back = base()
    load_adapter(back, tmp_path / "hf")
    for (name, value), (other, same) in zip(
        sorted(ours.adapter_state_dict(model).items()), sorted(ours.adapter_state_dict(back).items()), strict=True
    ):
        assert name == other and torch.equal(value, same)
    torch.testing.assert_close(output(back), output(model), rtol=1e-6, atol=1e-6)


def test_theirs_loads_into_a_model_injected_alike_and_no_other(tmp_path: Path) -> None:
    expected = theirs(tmp_path / "hf", **HF_CONFIGS["plain"])
    alike, other = base(), base()
    peft_d2.inject(alike, OURS["plain"][0])
    load_adapter(alike, tmp_path / "hf")
    torch.testing.assert_close(output(alike), expected, rtol=1e-5, atol=1e-6)
    peft_d2.inject(other, [{**OURS["plain"][0][0], "ALPHA": 4.0}])
    with pytest.raises(AdapterFileError, match=r"scaled by 1 in the model and by 1\.5 in the file"):
        load_adapter(other, tmp_path / "hf")


WRAPPED: dict[str, dict[str, Any]] = {
    "module": {"target_modules": EVERYWHERE, "modules_to_save": ["head"]},
    "_orig_mod": {"target_modules": EVERYWHERE, "use_dora": True},
    "module._orig_mod": {"target_modules": r"module\..*q_proj", "rank_pattern": {"^module.*q_proj": 3}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", WRAPPED)
def test_an_adapter_of_a_wrapped_model_is_the_models(tmp_path: Path, names: str) -> None:
    wrapped: nn.Module = base()
    for name in reversed(names.split(".")):  # as below DistributedDataParallel, or torch.compile's
        wrapped = nn.ModuleDict({name: wrapped})
    adapted = hf.get_peft_model(wrapped, hf.LoraConfig(**WRAPPED[names]))
    move(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(tmp_path / "hf")
    expected = output(wrapped.get_submodule(names))
    assert not torch.allclose(expected, output(base()), rtol=1e-3)
    for model in (bare := base(), again := base()):
        load_adapter(model, tmp_path / "hf" if model is bare else tmp_path / "ours")
        torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)
        save_adapter(bare, tmp_path / "ours")
    assert peft_d2.peft.get_injection(again) is not None


def test_what_peft_cannot_express_is_refused_by_both(tmp_path: Path) -> None:
    model = base()
    peft_d2.inject(model, [{"NAME": "adapter", "TARGETS": ["q_proj"], "REDUCTION": 2}])
    save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "PEFT_D2"
    with pytest.raises(Exception, match="PEFT_D2"):
        hf.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))


def test_a_model_under_their_adapters_is_called_what_it_is() -> None:
    model = hf.get_peft_model(base(), hf.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ours.MethodError, match=r"q_proj.* is a layer of Hugging Face's peft: merge_and_unload\(\)"):
        peft_d2.inject(model, [{"NAME": "lora", "TARGETS": ["q_proj"]}])


def test_ours_without_its_record_is_not_taken_for_theirs(tmp_path: Path) -> None:
    save_adapter(injected("plain"), tmp_path / "ours")
    (tmp_path / "ours" / "peft_d2.json").unlink()
    with pytest.raises(AdapterFileError, match=r"peft_d2\.json: the file is missing"):
        load_adapter(base(), tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"lora_alpha": "8"}, "lora_alpha of stages.0.q_proj is '8'"),
        ({"r": 8}, "has rank 4, and adapter_config.json says 8"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"rank_pattern": [4]}, "not an object"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    theirs(tmp_path / "hf", **{**HF_CONFIGS["plain"], "target_modules": ["q_proj"]})
    path = tmp_path / "hf" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(base(), tmp_path / "hf")


FOLDERS: dict[str, tuple[Any, str]] = {
    "a folder of folders": (lambda f: [p.rename(f / "night" / p.name) for p in f.glob("a*")], "give .*hf/night$"),
    "no file of it": (lambda f: [p.unlink() for p in f.glob("adapter_*")], "holds no file of an adapter"),
    "diffusers": (lambda f: [(f / "adapter_config.json").unlink(),
                             (f / "adapter_model.safetensors").rename(f / "pytorch_lora_weights.safetensors")],
                  "holds no file of an adapter, but pytorch_lora_weights.safetensors.*adapter_model.safetensors b"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "safetensors: the file is missing beside"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: the file is missing beside"),
    "a pointer": (lambda f: (f / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
                  "safetensors: it is a pointer of Git LFS.*git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_adapter_is_called_what_it_is(tmp_path: Path, case: str) -> None:
    theirs(tmp_path / "hf", **HF_CONFIGS["plain"])
    (tmp_path / "hf" / "night").mkdir()
    FOLDERS[case][0](tmp_path / "hf")
    with pytest.raises(AdapterFileError, match=FOLDERS[case][1]):
        load_adapter(base(), tmp_path / "hf")


def test_damaged_and_pickled_folders_are_named(tmp_path: Path) -> None:
    theirs(tmp_path / "hf", **HF_CONFIGS["plain"])
    tensors = tmp_path / "hf" / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    with pytest.raises(AdapterFileError, match="adapter_model.safetensors: .*cut short"):
        huggingface.read(tmp_path / "hf")
    tensors.unlink()
    shutil.copy(__file__, tmp_path / "hf" / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="adapter_model.bin is a pickle and is not read"):
        load_adapter(base(), tmp_path / "hf")
    with pytest.raises(AdapterFileError, match="IA3"):
        model = hf.get_peft_model(base(), hf.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        model.save_pretrained(tmp_path / "ia3")
        load_adapter(base(), tmp_path / "ia3")
