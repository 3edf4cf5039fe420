"""The Swin backbone: windows, shifts, padding, checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from peft_d2.memory import SavedTensors
from peft_d2.models.backbones.stages import from_windows, to_windows
from peft_d2.models.backbones.swin import SwinTransformer, shift_mask

from ..conftest import make_config


def swin(**keys: Any) -> SwinTransformer:
    """A tiny one, with these keys of ``MODEL.SWIN``."""
    tiny = {"EMBED_DIM": 12, "DEPTHS": [2, 2, 2, 2], "NUM_HEADS": [2, 2, 3, 4], "WINDOW_SIZE": 4, "MLP_RATIO": 2.0}
    keys = {**tiny, "DROP_PATH_RATE": 0.0, **keys}
    return SwinTransformer(make_config(overrides={f"MODEL.SWIN.{key}": value for key, value in keys.items()}))


@pytest.mark.parametrize("size", [(64, 64), (50, 71), (4, 4), (33, 200)])
def test_any_image_size(size: tuple[int, int]) -> None:
    outputs = swin()(torch.randn(1, 3, *size))
    height, width = (-(-length // 4) for length in size)
    assert list(outputs) == ["res2", "res3", "res4", "res5"]
    for i, feature in enumerate(outputs.values()):
        assert feature.shape == (1, 12 * 2**i, height, width)
        height, width = -(-height // 2), -(-width // 2)


def test_output_shape_says_what_comes_out() -> None:
    model = swin(OUT_FEATURES=["res3", "res5"])
    outputs = model(torch.randn(1, 3, 64, 64))
    shapes = model.output_shape()
    assert list(outputs) == list(shapes) == ["res3", "res5"]
    for name, feature in outputs.items():
        assert feature.shape[1:] == (shapes[name].channels, 64 // shapes[name].stride, 64 // shapes[name].stride)


def test_windows_come_back() -> None:
    x = torch.randn(2, 8, 12, 3)
    windows = to_windows(x, 4)
    assert windows.shape == (2 * 2 * 3, 16, 3)
    assert torch.equal(windows[4].view(4, 4, 3), x[0, 4:8, 4:8])  # second row, second column of the first image
    assert torch.equal(from_windows(windows, 4, 8, 12), x)


@pytest.mark.parametrize(("height", "width", "window"), [(8, 12, 4), (6, 6, 3), (14, 21, 7)])
def test_shift_mask_allows_true_neighbours_only(height: int, width: int, window: int) -> None:
    """Two pixels of a shifted window may attend if they were not moved apart by the wrap-around."""
    shift = window // 2
    place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)[None]
    moved = to_windows(place.roll((-shift, -shift), dims=(1, 2)), window)
    near = ((moved[:, None] - moved[:, :, None]).abs() < window).all(-1)
    assert torch.equal(shift_mask(height, width, window, shift, place.device) == 0, near)


def test_a_shifted_block_sees_across_window_borders_but_not_across_the_image() -> None:
    block = swin().layers[0].blocks[1].eval()
    assert block.shift == 2
    x = torch.randn(1, 8, 8, 12, requires_grad=True)
    block(x)[0, 3, 3].sum().backward()
    assert x.grad is not None
    reached = x.grad[0].abs().sum(-1) > 1e-12
    assert reached[2:6, 2:6].all() and reached.sum() == 16
    x.grad = None
    block(x)[0, 0, 0].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 1e-12
    assert reached[:2, :2].all() and reached.sum() == 4


@pytest.mark.parametrize("shifted", [False, True])
def test_attention_and_its_gradients_are_the_papers(shifted: bool) -> None:
    """Equation 4 written out in double precision, its bias trained, beside the fused attention."""
    attention = swin().double().layers[0].blocks[0].attn
    mask = shift_mask(8, 8, 4, 2, torch.device("cpu")).double() if shifted else None
    x = torch.randn(8, 16, 12, dtype=torch.float64)

    def written_out(x: torch.Tensor) -> torch.Tensor:
        q, k, v = attention.qkv(x).view(8, 16, 3, 2, 6).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) / 6**0.5
        logits = logits + attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            logits = logits + mask.repeat(2, 1, 1)[:, None]  # two images of four windows
        return attention.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(8, 16, 12))

    weights, results = list(attention.parameters()), []
    for forward in (lambda x: attention(x, mask), written_out):
        out = forward(x)
        results.append([out, *torch.autograd.grad(out.pow(3).sum(), weights)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", [True, False], ids=["bias trained", "bias frozen"])
def test_bfloat16_gradients_are_as_near_as_the_forward_pass(trained: bool) -> None:
    """Beside double precision, with the same q, k, v in bfloat16; the mask is kept once, not by head."""
    attention = swin().layers[0].blocks[0].attn
    attention.relative_position_bias_table.requires_grad_(trained)
    mask, x = shift_mask(8, 8, 4, 2, torch.device("cpu")), torch.randn(8, 16, 12, requires_grad=True)
    wanted = [x, *(p for p in attention.parameters() if p.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16), SavedTensors(attention) as saved:
        out = attention(x, mask)
    found = torch.autograd.grad(out.float().pow(2).sum(), wanted)
    with torch.autocast("cpu", torch.bfloat16), SavedTensors(attention) as saved_without_mask:
        attention(x)
    assert saved.bytes - saved_without_mask.bytes == mask.nbytes
    exact = copy.deepcopy(attention).double()
    y = x.detach().double().requires_grad_()
    doubles = [y, *(p for p in exact.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(exact(y, mask.double()).pow(2).sum(), doubles)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_frozen_bias_changes_no_bit() -> None:
    """What an injected model computes at its first step in training mode is what the base computes."""
    model, image = swin().train(), torch.randn(1, 3, 50, 71)
    before = model(image)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("qkv" in name)
    assert all(torch.equal(value, before[name]) for name, value in model(image).items())


def test_checkpointing_changes_memory_alone() -> None:
    plain = swin(DROP_PATH_RATE=0.2)
    saving = swin(DROP_PATH_RATE=0.2, USE_CHECKPOINT=True)
    saving.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, saving):
        model.train()
        torch.manual_seed(1)
        model(image := torch.ones(2, 3, 32, 32, requires_grad=True).mul(1.0))["res5"].square().sum().backward()
        assert image.shape == (2, 3, 32, 32)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_absolute_position_is_stretched_to_the_image() -> None:
    model = swin(APE=True, PRETRAIN_IMG_SIZE=32)
    assert model.absolute_pos_embed.shape == (1, 12, 8, 8)
    image = torch.zeros(1, 3, 64, 48)
    before = model(image)["res2"]
    with torch.no_grad():
        model.absolute_pos_embed += torch.randn_like(model.absolute_pos_embed)
    assert (model(image)["res2"] - before).abs().max() > 1e-3
