"""Models on a CUDA device give what the CPU gives, where the goldens hold; adapters and budgets there."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check_gpu import random_numbers_of_the_cpu
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import Tensor, nn

import peft_d2
from peft_d2.memory import MemoryBudgetError
from peft_d2.memory.blocks import Block
from peft_d2.memory.meter import StepPeak

from ..tiny_sam import SAM_TINY
from .conftest import CLASSIFIERS, ROOT
from .sam2.test_sam2 import TINY as SAM2_TINY
from .seem.test_seem import FOCAL_T, class_vectors
from .seem.test_seem import SMALL as SEEM_SMALL
from .test_training import BOXES, sample

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
HEAD = ["sem_seg_head.*.{linear1,linear2,self_attn,multihead_attn}"]
# A config below configs/, what makes it small, and what LoRA is on.
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mask2former": (*CLASSIFIERS["mask2former"][:2], ["backbone.*.conv2", *HEAD]),
    "mask_dino": (*CLASSIFIERS["mask_dino"][:2], ["sem_seg_head.*.{linear1,linear2,self_attn}"]),
    "eomt": (*CLASSIFIERS["eomt"][:2], ["backbone.*.{qkv,fc1,fc2}"]),
    "seem": (FOCAL_T, SEEM_SMALL, ["backbone.*.{fc1,fc2}", *HEAD]),
    "sam": ("sam/vit_b.yaml", SAM_TINY, ["image_encoder.*.{qkv,lin1,lin2}"]),
    "sam2": ("sam2/hiera_t.yaml", SAM2_TINY, ["image_encoder.*.qkv"]),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[[str], nn.Module]:
    """``adapted(kind)``: a small model on the CPU whose LoRA has learned something."""

    def run(kind: str) -> nn.Module:
        config, options, targets = KINDS[kind]
        if kind == "seem":
            class_vectors().write(tmp_path / "vectors.safetensors")
            options = {**options, "MODEL.SEEM.CLASS_VECTORS": str(tmp_path / "vectors.safetensors")}
        cfg = get_cfg()
        peft_d2.add_config(cfg)
        peft_d2.register()
        cfg.merge_from_file(str(ROOT / "configs" / config))
        cfg.merge_from_list([part for item in {**options, "MODEL.DEVICE": "cpu"}.items() for part in item])
        torch.manual_seed(0)
        model = build_model(cfg)
        peft_d2.inject(model, [{"NAME": "lora", "TARGETS": targets, "RANK": 4}])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.normal_(std=0.05)
        return model

    return run


def pictures(size: tuple[int, int] = (96, 128)) -> list[dict[str, Any]]:
    items = []
    for number in (3, 2):
        item = {**sample("bitmasks", number, size), "height": size[0], "width": size[1]}
        item["instances"].gt_boxes = Boxes(torch.tensor(BOXES[:number], dtype=torch.float32))
        item["boxes"] = item["instances"].gt_boxes.tensor
        items.append(item)
    return items


def step(
    model: nn.Module, dtype: torch.dtype = torch.float32, numbers: Any = random_numbers_of_the_cpu
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of what is trained, on the CPU, without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob"):
            module.eval()
    model.zero_grad()
    torch.manual_seed(1)
    device = next(model.parameters()).device.type
    with numbers(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        losses = model(copy.deepcopy(pictures()))
    sum(losses.values()).backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach().cpu() for name, loss in losses.items()}, gradients


def scores_and_masks(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        found = [result["instances"].to("cpu") for result in model.eval()(pictures())]
    return [(instances.scores, instances.pred_masks) for instances in found]


def assert_same_results(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    for (scores, masks), (other_scores, other_masks) in zip(found, expected, strict=True):
        torch.testing.assert_close(scores, other_scores, rtol=0, atol=1e-4)
        assert len(scores) and (masks != other_masks).sum() <= 1e-3 * masks.numel()


@every_kind
def test_results_losses_and_gradients_are_those_of_the_cpu(adapted: Any, kind: str) -> None:
    model = adapted(kind)
    moved = copy.deepcopy(model).to(DEVICE)
    with random_numbers_of_the_cpu():  # no TensorFloat-32 either
        assert_same_results(scores_and_masks(moved), scores_and_masks(model))
    losses, gradients = step(model)
    found, moved_gradients = step(moved)
    assert found.keys() == losses.keys() and moved_gradients.keys() == gradients.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-3, atol=1e-4, msg=name)
    whole = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    apart = sum((moved_gradients[n] - gradient).square().sum() for n, gradient in gradients.items()).sqrt()
    assert whole > 0 and apart <= 1e-2 * whole


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_is_near(adapted: Any, kind: str, dtype: torch.dtype) -> None:
    moved = adapted(kind).to(DEVICE)
    expected, found = step(moved)[0], step(moved, dtype)[0]
    total = sum(expected.values())
    assert all(loss.isfinite() for loss in found.values())
    assert abs(sum(found.values()) - total) <= 0.1 * total


@every_kind
def test_an_adapter_goes_between_devices_and_merges(adapted: Any, kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    base = copy.deepcopy(model)
    moved = copy.deepcopy(model).to(DEVICE)
    peft_d2.prove_live(moved, pictures())
    peft_d2.save_adapter(moved, tmp_path / "adapter")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("lora_b"):
                parameter.zero_()
    peft_d2.load_adapter(base, tmp_path / "adapter")
    with random_numbers_of_the_cpu():
        expected = scores_and_masks(model)
        assert_same_results(scores_and_masks(base), expected)
        peft_d2.merge(moved)
        assert_same_results(scores_and_masks(moved), expected)
        peft_d2.unmerge(moved)
        assert_same_results(scores_and_masks(moved), expected)


@every_kind
@pytest.mark.parametrize("mode", ["recompute", "offload"])
def test_blocks_that_keep_nothing_give_the_same_step(adapted: Any, kind: str, mode: str) -> None:
    moved = adapted(kind).to(DEVICE)
    own_numbers = {"numbers": contextlib.nullcontext}  # a block computes again in a thread of its own
    losses, gradients = step(moved, **own_numbers)
    peft_d2.fit_memory(moved, pictures(), None)
    blocks = [module for module in moved.modules() if isinstance(module, Block)]
    assert blocks
    for block in blocks:
        block.memory_block.mode = mode
    found, moved_gradients = step(moved, **own_numbers)
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(moved_gradients[name], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())


class Chain(nn.Module):
    """Layers whose activations are far larger than their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU()) for _ in range(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
def test_the_peak_is_as_planned(share: float) -> None:
    torch.manual_seed(0)
    model, batch = Chain().to(DEVICE), torch.randn(1, 200_000, 64, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    whole = peft_d2.fit_memory(model, batch, None).unplanned_peak / 2**30
    with pytest.raises(MemoryBudgetError) as error:
        peft_d2.fit_memory(model, batch, 1e-6)
    budget = max(share * whole * 1.01, error.value.smallest)
    plan = peft_d2.fit_memory(model, batch, budget)
    assert bool(plan.recomputed or "offload" in plan.modes.values()) == (share < 1)
    there = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())  # the batch, and other tests'
    for _ in range(2):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    peak = StepPeak(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    measured = peak.read() - there
    assert measured == pytest.approx(plan.peak, rel=0.1)
    assert measured <= 1.1 * budget * 2**30


def test_auto_is_what_the_device_has_free() -> None:
    model, batch = Chain().to(DEVICE), torch.randn(1, 1000, 64, device=DEVICE)
    plan = peft_d2.fit_memory(model, batch, "auto")
    free = torch.cuda.mem_get_info()[0]
    assert plan.budget is not None and 0.8 * free < plan.budget < free + 2**30
    assert not plan.recomputed
