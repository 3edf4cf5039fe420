"""Every field of Hugging Face peft's LoraConfig: what it means there it means here, or it is refused by its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft as ours
from peft_d2.adapters import load_adapter, save_adapter
from peft_d2.storage import AdapterFileError, huggingface

hf = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x)[0]
        return x + self.fc2(self.fc1(x).relu())


class Model(nn.Module):
    """Words (N, 6) -> scores, through every kind of layer that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.plane = nn.Conv2d(8, 8, 3, padding="same")
        self.space = nn.Conv3d(8, 8, (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1))
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 4)
        self.mask_head = nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words).transpose(1, 2)
        x = x + self.line(x)
        x = x + self.plane(x.unflatten(2, (2, 3))).flatten(2)
        x = x + self.space(x.unflatten(2, (1, 2, 3))).flatten(2).repeat(1, 1, 2)
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return torch.cat([self.head(x), self.mask_head(x)], -1)


WORDS = torch.tensor([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 0]])
EVERYTHING = ["words", "line", "plane", "space", "fc1", "fc2"]


def base() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(WORDS)


def theirs(folder: Path, change: dict[str, Any] | None = None, **config: Any) -> Tensor:
    """Write an adapter with peft, every tensor of it moved, then change its config; returns what peft reads from it."""
    model = hf.get_peft_model(base(), hf.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    if change:
        edit(folder, change)
    return output(hf.PeftModel.from_pretrained(base(), str(folder)))


def edit(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


HONOURED: dict[str, dict[str, Any]] = {
    "all kinds of layers": {"target_modules": EVERYTHING},
    "dora on all kinds": {"target_modules": EVERYTHING, "use_dora": True},
    "rslora": {"target_modules": EVERYTHING, "use_rslora": True},
    "dropout is no matter in eval mode": {"target_modules": [*EVERYTHING, "attn"], "lora_dropout": 0.4},
    "attention": {"target_modules": ["attn"]},
    "attention with biases": {"target_modules": ["attn", "fc1"], "bias": "all"},
    "attention of its own rank": {
        "target_modules": ["attn", "fc1"], "rank_pattern": {"1.attn": 2}, "alpha_pattern": {"attn": 3}
    },
    "all-linear": {"target_modules": "all-linear"},
    "ALL-linear": {"target_modules": "all-linear", "exclude_modules": ["head"]},
    "bias all": {"target_modules": ["fc1", "line"], "bias": "all"},
    "bias lora_only": {"target_modules": ["fc1", "line"], "bias": "lora_only"},
    "biases of the factors": {"target_modules": ["fc1", "line"], "lora_bias": True},
    "biases of both": {"target_modules": ["fc1"], "lora_bias": True, "bias": "lora_only"},
    "regex": {"target_modules": r"layers\.[02]\.fc\d"},
    "exclude": {"target_modules": ["fc1", "fc2"], "exclude_modules": ["layers.1.fc1", "2.fc2"]},
    "exclude by regex": {"target_modules": ["fc1", "fc2"], "exclude_modules": r".*\.1\..*"},
    "layers": {"target_modules": ["fc1", "fc2"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"]},
    "one layer": {"target_modules": ["fc1"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "layers of a pattern": {"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "patterns": {
        "target_modules": ["fc1", "words", "plane"], "rank_pattern": {"0.fc1": 2, "words|plane": 3},
        "alpha_pattern": {r"^layers\.2\.fc1": 1}, "use_rslora": True,
    },
    "modules to save": {"target_modules": ["fc1"], "modules_to_save": ["mask_head"]},
    "modules to save by the end of a name": {"target_modules": ["fc1"], "modules_to_save": ["head"]},
    "tokens": {"target_modules": ["fc1"], "trainable_token_indices": {"words": [3, 9]}},
    **{f"start {name}": {"target_modules": ["fc1"], "init_lora_weights": name} for name in
       (True, False, "gaussian", "orthogonal", "mica", "pissa")},
    "pissa with everything": {
        "target_modules": ["fc1", "fc2", "words"], "init_lora_weights": "pissa", "use_rslora": True,
        "rank_pattern": {"fc2": 2}, "modules_to_save": ["mask_head"],
    },
    "pissa with dora": {"target_modules": ["fc1"], "init_lora_weights": "pissa", "use_dora": True},
    "fields of bookkeeping": {"target_modules": ["fc1"], "revision": "main"},
    "tied where nothing is": {"target_modules": ["fc1"], "ensure_weight_tying": True},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HONOURED)
def test_what_is_honoured_gives_what_peft_gives(tmp_path: Path, case: str) -> None:
    expected = theirs(tmp_path / "hf", **HONOURED[case])
    model = base()
    assert (output(model) - expected).abs().max() > 1e-3
    load_adapter(model, tmp_path / "hf")
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)
    ours.merge(model)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    ours.unmerge(model)
    save_adapter(model, tmp_path / "again")
    again = base()
    load_adapter(again, tmp_path / "again")
    torch.testing.assert_close(output(again), expected, rtol=1e-5, atol=1e-6)
    beside = base()
    peft_d2.inject(beside, [{"NAME": "adapter", "TARGETS": ["fc2"], "REDUCTION": 2}], train=["head", "words"])
    for item in ours.trained_parameters(beside):
        item.param.data.add_(0.1)
    load_adapter(beside, tmp_path / "hf", name="theirs")
    peft_d2.set_adapter(beside, "theirs")
    torch.testing.assert_close(output(beside), expected, rtol=1e-5, atol=1e-6)


SUBCONFIGS: dict[str, Any] = {
    "velora_config": {"num_groups": 4}, "monteclora_config": {"num_samples": 2}, "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1}, "kasa_config": {"beta": 1e-4}, "megatron_config": {"x": 1},
    "alora_invocation_tokens": [1], "layer_replication": [[0, 2], [1, 3]], "target_parameters": ["fc1.weight"],
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    **{key: {key: value} for key, value in SUBCONFIGS.items()},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "use_qalora": {"use_qalora": True},
    "a field of tomorrow": {"use_tomorrows_lora": True},
    "a number of tomorrow": {"tomorrow": 0.5},
    **{f"init_lora_weights {name}": {"init_lora_weights": name}
       for name in ("pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "tomorrow", 1, [])},
    "bias": {"bias": "lora"}, "bias of another type": {"bias": True},
    "lora_dropout": {"lora_dropout": 1.0}, "lora_dropout of another type": {"lora_dropout": "0.1"},
    "lora_alpha": {"lora_alpha": 0}, "lora_alpha below": {"lora_alpha": -1}, "lora_alpha flag": {"lora_alpha": True},
    "alpha_pattern": {"alpha_pattern": {"fc1": "8"}}, "rank_pattern": {"rank_pattern": {"fc1": 4.0}},
    "alpha_pattern list": {"alpha_pattern": ["fc1"]}, "rank_pattern regex": {"rank_pattern": {"[z-a]": 4}},
    "r": {"r": True}, "r of another rank": {"r": 3}, "r missing": {"r": None},
    "use_rslora": {"use_rslora": 1}, "use_dora": {"use_dora": True}, "use_dora of another type": {"use_dora": "no"},
    "modules_to_save": {"modules_to_save": "head"}, "modules_to_save numbers": {"modules_to_save": [1]},
    "modules_to_save covers": {"modules_to_save": ["layers"]},
    "target_modules": {"target_modules": ["fc2"]}, "target_modules none": {"target_modules": None},
    "target_modules numbers": {"target_modules": [3]}, "target_modules regex": {"target_modules": "(fc1"},
    "exclude_modules": {"exclude_modules": ["fc1"]}, "exclude_modules number": {"exclude_modules": 3},
    "layers_to_transform": {"layers_to_transform": [1]}, "layers_to_transform text": {"layers_to_transform": "1"},
    "layers_pattern": {"layers_to_transform": [0, 1, 2], "layers_pattern": ["h"]},
    "peft_type": {"peft_type": "ADALORA"},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "hf"
    theirs(folder, target_modules=["fc1"])
    return folder


def copy(folder: Path, destination: Path) -> Path:
    destination.mkdir()
    for path in folder.iterdir():
        (destination / path.name).write_bytes(path.read_bytes())
    return destination


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(tmp_path: Path, plain: Path, case: str) -> None:
    folder = copy(plain, tmp_path / "hf")
    edit(folder, REFUSED[case])
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    named = next(reversed(REFUSED[case])) if case != "target_modules none" else "target_modules"
    said = {"r": "r is|rank", "layers_pattern": "layers_to_transform"}.get(named, named)
    with pytest.raises(AdapterFileError, match=said):
        load_adapter(model, folder)
    assert ours.get_injection(model) is None and all(value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_field_of_the_installed_peft_is_unknown(tmp_path: Path, plain: Path) -> None:
    assert {field.name for field in dataclasses.fields(hf.LoraConfig)} <= huggingface.FIELDS.keys()
    folder = copy(plain, tmp_path / "hf")
    edit(folder, {"tomorrow": None, "use_tomorrow": False, "tomorrows": []})  # written, but not used
    load_adapter(base(), folder)


def changed_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, {"format": "pt"})


FACTOR = "base_model.model.layers.0.fc1.lora_A.weight"
TENSORS: dict[str, tuple[Any, str]] = {
    "bool": (lambda t: {**t, FACTOR: t[FACTOR] > 0}, "stored as torch.bool"),
    "int": (lambda t: {**t, FACTOR: t[FACTOR].int()}, "stored as torch.int32"),
    "float8": (lambda t: {**t, FACTOR: t[FACTOR].to(torch.float8_e4m3fn)}, "stored as torch.float8_e4m3fn"),
    "not finite": (lambda t: {**t, FACTOR: t[FACTOR] * float("nan")}, "not finite"),
    "one factor": (lambda t: {k: v for k, v in t.items() if k != FACTOR}, "only one of its two"),
    "another shape": (lambda t: {**t, FACTOR: t[FACTOR][:, :5]}, "shape of layers.0.fc1.lora_a"),
    "one dimension": (lambda t: {**t, FACTOR: t[FACTOR].flatten()}, "no common rank"),
    "no module": (lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}, r"layers\\\\.7\\\\.fc1"),
    "another kind": (lambda t: {**t, FACTOR.replace("lora_A", "lora_E"): t[FACTOR].clone()}, "not known"),
    "no factors": (lambda t: {"base_model.model.head.bias": torch.zeros(4)}, "no factors"),
    "kohya": (
        lambda t: {"lora_unet_fc1.lora_down.weight": t[FACTOR].clone()},
        "lora_unet_fc1.lora_down.weight' is not one .*lora_A.weight'; kohya's scripts, diffusers .* write others",
    ),
    "another prefix": (lambda t: {k.removeprefix("base_model."): v for k, v in t.items()}, "is not one of an adapter"),
    "a part of a head": (lambda t: {**t, "base_model.model.head.bias": torch.zeros(3)}, "shape of head.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, plain: Path, case: str) -> None:
    change, message = TENSORS[case]
    changed_tensors(copy(plain, tmp_path / "hf"), change)
    model = base()
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(model, tmp_path / "hf")
    assert ours.get_injection(model) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_factors_in_other_precisions_are_read_as_peft_reads_them(tmp_path: Path, plain: Path, dtype: Any) -> None:
    folder = copy(plain, tmp_path / "hf")
    changed_tensors(folder, lambda t: {k: v.to(dtype) for k, v in t.items()})
    model = base()
    load_adapter(model, folder)
    assert all(item.param.dtype == torch.float32 for item in ours.trained_parameters(model))
    expected = output(hf.PeftModel.from_pretrained(base(), str(folder)))
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)


def test_what_peft_computes_in_another_way_is_refused(tmp_path: Path) -> None:
    """A grouped convolution, a module under two names: the outputs would differ."""
    from peft_d2.storage.adapter_file import difference_to_peft

    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(2, 2))
    hf.get_peft_model(grouped, hf.LoraConfig(target_modules=["0"], r=4)).save_pretrained(tmp_path / "grouped")
    with pytest.raises(AdapterFileError, match="mixes all groups"):
        load_adapter(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(2, 2)), tmp_path / "grouped")
    layer = nn.Linear(2, 2)
    tied = nn.ModuleDict({"a": layer, "b": layer})
    assert "several names" in difference_to_peft("a", dict(tied.named_modules(remove_duplicate=False)))
    hf.get_peft_model(tied, hf.LoraConfig(target_modules=["a"], r=2)).save_pretrained(tmp_path / "tied")
    layer = nn.Linear(2, 2)
    with pytest.raises(AdapterFileError, match="several names"):
        load_adapter(nn.ModuleDict({"a": layer, "b": layer}), tmp_path / "tied")


def test_pissa_needs_the_same_start_in_a_model_that_is_injected_already(tmp_path: Path) -> None:
    expected = theirs(tmp_path / "hf", target_modules=["fc1"], init_lora_weights="pissa")
    entry = {"NAME": "lora", "TARGETS": ["fc1"], "RANK": 4, "ALPHA": 6.0}
    alike, other = base(), base()
    peft_d2.inject(alike, [{**entry, "INIT": "pissa"}])
    load_adapter(alike, tmp_path / "hf")
    torch.testing.assert_close(output(alike), expected, rtol=1e-5, atol=1e-6)
    peft_d2.inject(other, [entry])
    with pytest.raises(AdapterFileError, match="lora_a_start"):
        load_adapter(other, tmp_path / "hf")
    with pytest.raises(AdapterFileError, match="relative to the base's weights"):
        huggingface.read(tmp_path / "hf")
