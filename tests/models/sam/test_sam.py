"""Segment Anything is equal to the published implementation: names, shapes, outputs, resizing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn

import peft_d2
from peft_d2.data.augmentation import LongestSide
from peft_d2.memory import SavedTensors
from peft_d2.memory.meter import ProcessPeak
from peft_d2.models.layers.postprocess import Canvas
from peft_d2.models.sam.image_encoder import RelativePositionAttention, relative_rows
from peft_d2.models.sam.prompt_encoder import Prompts

from ..conftest import GOLDENS, ROOT

TOLERANCE = 1e-4
CASES: dict[str, Callable[[dict[str, Tensor]], Prompts]] = {
    "box1": lambda g: Prompts(boxes=g["box1"]),
    "box2": lambda g: Prompts(boxes=g["box2"]),
    "points": lambda g: Prompts(points=(g["point_coords"], g["point_labels"])),
    "points_batch2": lambda g: Prompts(points=(g["point_coords_batch2"], g["point_labels_batch2"])),
    "mask": lambda g: Prompts(masks=g["mask"]),
    "none": lambda g: Prompts(),
    "points_and_box": lambda g: Prompts(boxes=g["box1"], points=(g["point_coords"], g["point_labels"])),
    "box_and_mask": lambda g: Prompts(boxes=g["box1"], masks=g["mask"]),
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "sam_tiny.npz") as file:
        return dict(file)


@pytest.fixture
def prompts(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {k.removeprefix("prompt."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("prompt.")}


def close(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_state_dict_of_the_whole_model(golden: Any, name: str) -> None:
    expected = golden("sam_full_keys")["models"][name]
    cfg = get_cfg()
    peft_d2.add_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "sam" / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "meta"
    peft_d2.register()
    with torch.device("meta"):
        model = build_model(cfg)
    state = model.state_dict().items()
    rows = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state]
    assert rows == expected["state_dict"]
    parts = {"total": model, **dict(model.named_children()), "image_encoder.neck": model.image_encoder.neck}
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    assert counts == expected["parameter_counts"]
    assert {n for n, _ in model.named_buffers()} - model.state_dict().keys() == {"pixel_mean", "pixel_std"}


def test_outputs(sam: Any, golden: Any, filler: Any, arrays: dict[str, np.ndarray], prompts: dict[str, Tensor]) -> None:
    recipe = golden("sam_tiny")
    model = sam()
    assert filler.fill(model) == recipe["state_dict"]
    seen = {}
    model.image_encoder.blocks[0].register_forward_hook(lambda *a: seen.update(block=a[2]))
    with torch.no_grad():
        embedding = model.image_encoder(model.preprocess(filler.image(101, 100, 128))[None])
        close(seen["block"], arrays["enc.block0"])
        close(embedding, arrays["image_embeddings"])
        close(model.prompt_encoder.dense_positions(), arrays["dense_pe"])
        for name, make in CASES.items():
            prompt = make(prompts)
            tokens, dense = model.prompt_encoder(prompt.points, prompt.boxes, prompt.masks)
            close(tokens, arrays[f"sparse.{name}"])
            corner = arrays[f"dense.{name}"]
            close(dense[..., : corner.shape[2], : corner.shape[3]], corner)
            for mode in ("single", "multi"):
                logits, quality = model.decode((embedding,), prompt, multimask=mode == "multi")
                close(logits, arrays[f"low_res_masks.{name}.{mode}"])
                close(quality, arrays[f"iou.{name}.{mode}"])
    assert len(CASES) == len([key for key in arrays if key.startswith("low_res_masks")]) / 2


@pytest.mark.parametrize(("key", "size"), [("postprocessed", (150, 192)), ("postprocessed.down", (50, 64))])
def test_postprocessing(arrays: dict[str, np.ndarray], key: str, size: tuple[int, int]) -> None:
    logits = torch.from_numpy(arrays["low_res_masks.box1.single"][:, 0])
    close(Canvas((128, 128), (100, 128), size).upsample(logits)[:, None], arrays[f"{key}.box1.single"])


def test_forward(sam: Any, filler: Any, arrays: dict[str, np.ndarray], prompts: dict[str, Tensor]) -> None:
    item = {"image": filler.image(101, 100, 128), "boxes": prompts["box2"], "height": 150, "width": 192}
    with torch.no_grad():
        found = sam()([item])[0]["instances"]
        one_by_one = sam({"MODEL.SAM.PROMPTS_PER_CALL": 1})([item])[0]["instances"]
    close(found.scores, arrays["forward.box2.iou"][:, 0])
    assert (found.pred_masks.numpy() != arrays["forward.box2.masks"][:, 0]).sum() <= 3
    torch.testing.assert_close(one_by_one.scores, found.scores)
    assert (one_by_one.pred_masks != found.pred_masks).sum() <= 3
    ys, xs = np.nonzero(found.pred_masks[0].numpy())
    assert found.pred_boxes.tensor[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert found.pred_masks.any(0).sum() > 100 and found.image_size == (150, 192)


def test_as_the_published_predictor(sam: Any, filler: Any, arrays: dict[str, np.ndarray]) -> None:
    picture = filler.image(102, 150, 192).round().to(torch.uint8).permute(1, 2, 0).numpy()
    transform = LongestSide(128).get_transform(picture)
    resized = transform.apply_image(picture)
    np.testing.assert_array_equal(resized, arrays["resize.pil_u8"])
    box = transform.apply_box(np.array([[20.0, 31.0, 120.5, 99.0]]))
    np.testing.assert_allclose(box, arrays["predictor.box_transformed"])
    item = {"image": torch.from_numpy(resized.copy()).permute(2, 0, 1), "boxes": box, "height": 150, "width": 192}
    with torch.no_grad():
        found = sam({"MODEL.SAM.MULTIMASK": True})([item])[0]["instances"]
    best = int(arrays["predictor.iou"].argmax())
    close(found.scores, arrays["predictor.iou"][[best]])
    assert (found.pred_masks[0].numpy() != arrays["predictor.masks"][best]).sum() <= 3


def test_resized_shapes(golden: Any) -> None:
    for case, expected in golden("sam_tiny")["preprocessing"]["shapes"].items():
        source, size = case.split("->")
        height, width = map(int, source.split("x"))
        transform = LongestSide(int(size)).get_transform(np.zeros((height, width, 3), np.uint8))
        # The published code rounds extreme images down to nothing.
        assert [transform.new_h, transform.new_w] == [max(1, side) for side in expected], case


def test_relative_rows(arrays: dict[str, np.ndarray]) -> None:
    table = torch.from_numpy(arrays["relpos.table"])
    cases = [key for key in arrays if key.startswith("relpos.q")]
    assert len(cases) == 6
    for key in cases:
        queries, keys = (int(part[1:]) for part in key.removeprefix("relpos.").split("_"))
        np.testing.assert_allclose(relative_rows(table, queries, keys).numpy(), arrays[key], atol=1e-6)


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (14, 14)])
def test_attention_is_the_plain_form(size: tuple[int, int]) -> None:
    attention = RelativePositionAttention(24, 3, (7, 7))
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, size[0] * size[1], 24)
    q, k, v = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    logits = q @ k.transpose(2, 3) / 8**0.5
    tables = [
        F.interpolate(table.t()[None], 2 * side - 1, mode="linear")[0].t() if side != 7 else table
        for table, side in zip((attention.rel_pos_h, attention.rel_pos_w), size, strict=True)
    ]
    pixels = [(y, x) for y in range(size[0]) for x in range(size[1])]
    for i, (y, x_) in enumerate(pixels):
        for j, (y_key, x_key) in enumerate(pixels):
            term = tables[0][y - y_key + size[0] - 1] + tables[1][x_ - x_key + size[1] - 1]
            logits[:, :, i, j] = logits[:, :, i, j] + q[:, :, i] @ term
        if i >= 30:  # enough rows for a proof
            break
    expected = attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    found = attention(x, size)
    torch.testing.assert_close(found[:, : i + 1], expected[:, : i + 1], rtol=0, atol=TOLERANCE)
    without = attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert (found - without).abs().mean() > 100 * TOLERANCE


def test_attention_keeps_nothing_of_the_size_of_all_pairs() -> None:
    attention = RelativePositionAttention(24, 3, (32, 32))
    with SavedTensors(attention) as saved:
        attention(torch.randn(1, 1024, 24), (32, 32))
    assert saved.bytes < 3 * 1024 * 1024 * 4 / 2


def test_half_precision_is_close(sam: Any, filler: Any, prompts: dict[str, Tensor]) -> None:
    item = {"image": filler.image(101, 100, 128), "boxes": prompts["box2"]}
    model = sam()
    with torch.no_grad():
        full = model([item])[0]["instances"]
        with torch.autocast("cpu", torch.bfloat16):
            half = model([item])[0]["instances"]
    assert (full.pred_masks != half.pred_masks).float().mean() < 0.02
    assert half.scores.dtype == torch.float32


def test_checkpointing_changes_nothing(sam: Any, filler: Any) -> None:
    image = filler.image(101, 128, 128)[None] / 255
    gradients = []
    for use in (False, True):
        encoder = sam({"MODEL.SAM.USE_CHECKPOINT": use}).image_encoder
        encoder(image).square().mean().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
def test_large_patches_take_little_in_bfloat16(sam: Any) -> None:
    sizes = {"IMAGE_SIZE": 1024, "EMBED_DIM": 768, "DEPTH": 1, "GLOBAL_BLOCKS": [0], "PATCH_SIZE": 16}
    encoder = sam({f"MODEL.SAM.{key}": value for key, value in sizes.items()}).image_encoder
    image = torch.rand(1, 3, 1024, 1024)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), ProcessPeak() as process:
        output = encoder.first(image, 0)
    assert output.nbytes == 12 * 2**20 and process.bytes < 100 * 2**20
