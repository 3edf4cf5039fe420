"""Encoders of pixel decoders that compute their activations again: the same gradients, less kept for them."""

from __future__ import annotations

from pathlib import Path

import analyze_peft as analysis
import pytest
import torch
from torch import Tensor, nn

import peft_d2
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_model
from peft_d2.memory import SavedTensors
from peft_d2.models.layers.transformer import TransformerEncoder

HERE = Path(__file__).parent
INJECTED = """[
    {'NAME': 'lora', 'RANK': 2, 'TARGETS': ['pixel_decoder.*.{value_proj,linear1,linear2}'], 'DROPOUT': 0.2},
    {'NAME': 'adapter', 'NUM': 2, 'TARGETS': ['pixel_decoder.*.self_attn']}]"""
PARTS = {"full": ["MODEL.PEFT.TRAIN", "['*']"], "injected": ["MODEL.PEFT.METHODS", INJECTED]}


def step(config: str, opts: list[str], again: bool) -> tuple[dict[str, Tensor], SavedTensors]:
    """Gradients of one training step by name, and what autograd kept for them."""
    peft_d2.register()
    opts = [*opts, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "3", "MODEL.SEM_SEG_HEAD.USE_CHECKPOINT", str(again)]
    torch.manual_seed(0)
    model = build_model(load_config(str(HERE / config), opts=opts).cfg).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) * parameter.requires_grad)
    sample = analysis.random_sample(64, 7)
    with SavedTensors(model) as saved:
        losses = model([sample])
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, saved


@pytest.mark.parametrize("trained", PARTS)
@pytest.mark.parametrize("config", ["tiny.yaml", "tiny_mask_dino.yaml"])
def test_one_key_saves_memory_and_keeps_gradients(config: str, trained: str) -> None:
    expected, kept = step(config, PARTS[trained], again=False)
    found, less = step(config, PARTS[trained], again=True)
    assert found.keys() == expected.keys() and any("pixel_decoder" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert less.count < kept.count - 40 and less.bytes < 0.9 * kept.bytes


def test_the_encoder_over_one_map() -> None:
    torch.manual_seed(0)
    model = TransformerEncoder(4, 16, 2, 64, dropout=0.1).train()
    x = torch.randn(9, 2, 16)
    runs = []
    for again in (False, True):
        model.use_checkpoint = again
        torch.manual_seed(1)
        with SavedTensors(model) as saved:
            out = model(x)
        out.square().sum().backward()
        runs.append(([p.grad.clone() for p in model.parameters()], saved.bytes))  # type: ignore[union-attr]
        nn.Module.zero_grad(model)
    torch.testing.assert_close(runs[1][0], runs[0][0])
    assert runs[1][1] < 0.3 * runs[0][1]
