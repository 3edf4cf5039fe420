"""E3VA: starts as the base, trains, and no gradient enters the backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_d2 import memory, peft
from peft_d2.memory import saved_by_module
from peft_d2.memory.blocks import Block

pytest.importorskip("detectron2")


def swin() -> nn.Module:
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec

    import peft_d2
    from peft_d2.models.backbones.swin import SwinTransformer

    cfg = get_cfg()
    peft_d2.add_config(cfg)
    node = cfg.MODEL.SWIN
    node.EMBED_DIM, node.DEPTHS, node.NUM_HEADS, node.WINDOW_SIZE = 16, [2, 2, 2, 1], [1, 2, 4, 8], 4
    node.DROP_PATH_RATE = 0.0
    torch.manual_seed(0)
    return SwinTransformer(cfg, ShapeSpec(channels=3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = swin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([value.square().mean() for value in self.backbone(x).values()]).sum()


@torch.no_grad()
def maps(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.backbone(x).items()}  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_starts_as_the_base_and_changes_every_map_when_trained(size: tuple[int, int]) -> None:
    model, x = Model().eval(), torch.randn(2, 3, *size)
    before = maps(model, x)
    peft.inject(model, [{"NAME": "e3va", "TARGETS": ["backbone"]}])
    assert all(torch.equal(value, before[name]) for name, value in maps(model, x).items())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    model.eval()
    after = maps(model, x)
    assert all(not torch.allclose(value, before[name], atol=1e-6) for name, value in after.items())
    with peft.disabled(model):
        assert all(torch.equal(value, before[name]) for name, value in maps(model, x).items())


def test_every_adapter_gets_a_gradient_and_the_backbone_keeps_nothing() -> None:
    model, x = Model().train(), torch.randn(1, 3, 64, 64)
    peft.inject(model, [{"NAME": "e3va", "TARGETS": ["backbone"], "RANK": 2, "BOTTLENECK": 4}])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up2" in name:
                parameter.normal_(std=0.1)
    kept = saved_by_module(model, lambda: model(x))
    assert not [name for name in kept if ".blocks." in name and ".peft." not in name and kept[name]]
    model(x).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    # 7 blocks, two adapters each, six tensors each.
    assert len(trained) == 7 * 2 * 6
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)


def test_gradients_are_the_same_where_blocks_recompute() -> None:
    model, x = Model().train(), torch.randn(1, 3, 64, 64)
    peft.inject(model, [{"NAME": "e3va", "TARGETS": ["backbone"]}], train=["backbone.norm2", "backbone.layers.3"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up2" in name:
                parameter.normal_(std=0.1)
    runs = []
    for _ in range(2):
        model.zero_grad()
        model(x).backward()
        runs.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        memory.fit_memory(model, x, None)
        for module in model.modules():
            if isinstance(module, Block):
                module.memory_block.mode = "recompute"
    assert runs[0].keys() == runs[1].keys() and len(runs[0]) > 7 * 2 * 6
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_where_it_cannot_go() -> None:
    with pytest.raises(peft.PeftError, match="whole backbone with stages"):
        peft.inject(Model(), [{"NAME": "e3va", "TARGETS": ["backbone.layers.0.blocks.0.mlp"]}])
