"""A folder of ours says peft_type LORA where Hugging Face peft gives our output from it, and PEFT_D2 elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft as ours
from peft_d2.adapters import load_adapter, save_adapter

hf = pytest.importorskip("peft")


class NormedConv(nn.Conv2d):
    """Shaped as Detectron2's Conv2d."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


NormedConv.__name__ = "Conv2d"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv = nn.Linear(8, 24)
        self.fc = nn.Linear(8, 8)
        self.own = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x)[0] + sum(self.qkv(x).chunk(3, -1)) / 3
        return self.fc(x) * self.own


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.stem = NormedConv(3, 8, 3, padding=1, norm=nn.BatchNorm2d(8), activation=torch.relu)
        self.bare = NormedConv(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.line, self.up = nn.Conv1d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.layer = nn.Linear(8, 8)  # the end of base_layer, peft's own name
        self.fc = nn.Linear(8, 8)  # the end of blocks.0.fc
        self.default = nn.Linear(8, 8)  # peft's name of an adapter
        self.a_b = nn.Linear(8, 8)  # what the expression "a.b" of modules_to_save matches, too
        self.a = nn.ModuleDict({"b": nn.Linear(8, 8)})
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head, self.mask_head = nn.Linear(8, 4), nn.Linear(8, 4)
        self.box = nn.Linear(8, 8)
        self.boxes = nn.ModuleList([self.box, self.box])
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.weight = self.left.weight
        self.queries = nn.ParameterList([nn.Parameter(torch.zeros(8))])

    def forward(self, images: Tensor) -> Tensor:
        x = self.bare(self.stem(images))
        x = self.grouped(x) + self.dilated(x) + self.mirror(x) + self.up(x)
        x = self.line(x.flatten(2)).transpose(1, 2) + self.words(torch.arange(6)) + self.queries[0]
        for block in self.blocks:
            x = block(x)
        x = self.encoder(self.a["b"](self.a_b(self.default(self.fc(self.layer(x))))))
        x = self.right(self.left(self.box(self.boxes[1](x))))
        return torch.cat([self.head(x), self.mask_head(x)], -1)


IMAGES = torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(1))


def base() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def lora(*targets: str, **keys: Any) -> list[dict[str, Any]]:
    return [{"NAME": "lora", "TARGETS": list(targets), "RANK": 3, "ALPHA": 6.0, **keys}]


FC = "re:blocks.0.fc"
SAYS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...], str]] = {
    "one module": (lora("layer"), (), "LORA"),
    "a name that others end with": (lora("re:fc"), (), "LORA"),
    "names that end with each other": (lora("fc", "layer"), (), "LORA"),
    "one of two": (lora(FC), (), "LORA"),
    "rank pattern": (lora("fc", "layer", RANK_PATTERN={"re:fc": 2}, ALPHA_PATTERN={"1.fc": 1.0}), (), "LORA"),
    "A frozen": (lora("fc", "line", FREEZE_A=True), (), "LORA"),
    "rslora": (lora("fc", RSLORA=True), (), "LORA"),
    "dora": (lora("fc", "bare", "words", "line", DORA=True), (), "LORA"),
    "a module called as peft's adapter": (lora("default"), (), "LORA"),
    "an embedding": (lora("words", "fc"), (), "LORA"),
    "xavier": (lora("fc", INIT="xavier"), (), "LORA"),
    "a head": (lora(FC), ("mask_head",), "LORA"),
    "two heads": (lora(FC), ("mask_head", "head"), "LORA"),
    "an attention in full": (lora(FC), ("blocks.1.attn",), "LORA"),
    "a norm in full": (lora(FC), ("stem.norm",), "LORA"),
    "two entries": ([*lora("blocks.*.fc"), *lora("layer", RANK=2)], (), "LORA"),
    "parameters tied elsewhere": (lora("left"), (), "LORA"),
    "a head that another ends with": (lora(FC), ("re:head",), "PEFT_D2"),
    "a module that peft's names end with": (lora(FC), ("layer",), "PEFT_D2"),
    "a module called as peft's adapter in full": (lora(FC), ("default",), "PEFT_D2"),
    "an expression that takes a target out": (lora("a_b"), ("a.b",), "PEFT_D2"),
    "one parameter": (lora(FC), ("blocks.0.own",), "PEFT_D2"),
    "one parameter of a module": (lora(FC), ("mask_head.weight",), "PEFT_D2"),
    "a parameter list": (lora(FC), ("queries",), "PEFT_D2"),
    "a bias": (lora(FC), ("mask_head.bias",), "PEFT_D2"),
    "bitfit": ([{"NAME": "bitfit", "TARGETS": ["blocks"]}], (), "PEFT_D2"),
    "bitfit and lora": ([*lora(FC), {"NAME": "bitfit", "TARGETS": ["blocks"]}], (), "PEFT_D2"),
    "heads alone": ([], ("mask_head",), "PEFT_D2"),
    "everything": ([], ("*",), "PEFT_D2"),
    "trained in full as well": (lora("mask_head", "fc"), ("mask_head",), "PEFT_D2"),
    "dora and none": ([*lora("layer", DORA=True), *lora(FC)], (), "PEFT_D2"),
    "grouped": (lora("grouped"), (), "PEFT_D2"),
    "dilated": (lora("dilated"), (), "PEFT_D2"),
    "padded by reflection": (lora("mirror"), (), "PEFT_D2"),
    "transposed": (lora("up"), (), "PEFT_D2"),
    "Detectron2's convolution with a norm": (lora("stem"), (), "PEFT_D2"),
    "Detectron2's convolution alone": (lora("bare"), (), "LORA"),
    "parts of a fused weight": (lora("qkv", PARTS=["q", "v"]), (), "PEFT_D2"),
    "parts of an attention": (lora("attn"), (), "PEFT_D2"),
    "out_proj": (lora("blocks.*.attn.out_proj"), (), "PEFT_D2"),
    "pissa": (lora("fc", INIT="pissa"), (), "PEFT_D2"),
    "cobot": (lora("fc", RANK=4, COBOT=True), (), "PEFT_D2"),
    "torch's encoder layer": (lora("linear1"), (), "PEFT_D2"),
    "a tied module": (lora("box"), (), "PEFT_D2"),
    "a tied module in full": (lora(FC), ("box",), "PEFT_D2"),
    "a tied parameter in full": (lora(FC), ("left",), "PEFT_D2"),
    "an adapter beside": ([*lora(FC), {"NAME": "adapter", "TARGETS": ["layer"]}], (), "PEFT_D2"),
}  # fmt: skip


REASONS = {
    "a bias": "trained in full is shared, no whole module",
    "heads alone": "it has no LoRA",
    "trained in full as well": "an adapted module lies in one that is trained in full",
    "dora and none": "some modules have DoRA and some have not",
    "grouped": "grouped: peft's branch of a grouped convolution mixes all groups",
    "an adapter beside": "belongs to a method that peft does not have",
    "torch's encoder layer": "passes peft's layer by in eval mode",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SAYS)
def test_says_lora_where_peft_gives_our_output(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    methods, train, kind = SAYS[case]
    model = base()
    peft_d2.inject(model, methods, train=train)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for item in ours.trained_parameters(model):
            item.param.add_(0.1 * torch.randn(item.param.shape, generator=generator))
    with caplog.at_level("INFO", "peft_d2"):
        save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == kind
    reason = json.loads((tmp_path / "ours" / "peft_d2.json").read_text()).get("why_not_peft", "")
    assert bool(reason) == (kind == "PEFT_D2") == ("peft cannot open" in caplog.text) and reason in caplog.text
    assert REASONS.get(case, "") in reason
    back = base()
    load_adapter(back, tmp_path / "ours")
    assert torch.equal(output(back), output(model))
    if kind == "PEFT_D2":
        with pytest.raises(Exception, match="PEFT_D2"):
            hf.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))
        return
    loaded = hf.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)
    loaded.save_pretrained(tmp_path / "hf")
    back = base()
    load_adapter(back, tmp_path / "hf")
    torch.testing.assert_close(output(back), output(model), rtol=1e-5, atol=1e-6)


def test_each_of_several_adapters_says_what_it_is(tmp_path: Path) -> None:
    model = base()
    peft_d2.inject(model, lora("fc"), train=["mask_head"], name="day")
    ours.add_adapter(model, "night", lora("grouped", FC))
    for name, kind in (("day", "LORA"), ("night", "PEFT_D2")):
        peft_d2.set_adapter(model, name)
        with torch.no_grad():
            for item in ours.trained_parameters(model):
                item.param.add_(0.1 * torch.randn_like(item.param))
        save_adapter(model, tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["peft_type"] == kind
    peft_d2.set_adapter(model, "day")
    loaded = hf.PeftModel.from_pretrained(base(), str(tmp_path / "day"))
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)
