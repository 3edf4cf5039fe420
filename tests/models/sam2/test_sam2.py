"""Segment Anything 2 on images: equal to transformers' Sam2Model, prompts, published names, training, other heads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from safetensors.torch import save_file
from torch import Tensor, nn

import peft_d2
from peft_d2 import adapters, peft
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_without_weights
from peft_d2.models.checks import ModelConfigError
from peft_d2.models.sam.prompt_encoder import Prompts

from ..conftest import ROOT
from ..test_training import sample

SIDE = 128
TINY: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.SAM.IMAGE_SIZE": SIDE,
    "MODEL.SAM.OUT_CHANNELS": 32,
    "MODEL.SAM.DECODER_HEADS": 4,
    "MODEL.SAM.DECODER_MLP_DIM": 64,
    "MODEL.SAM.IOU_HEAD_HIDDEN": 32,
    "MODEL.SAM2.EMBED_DIM": 16,
    "MODEL.SAM2.DEPTHS": [1, 2, 3, 1],
    "MODEL.SAM2.WINDOW_SIZES": [8, 4, 6, 3],
    "MODEL.SAM2.GLOBAL_BLOCKS": [4, 5],
}
# Their names -> the published ones; applied one after the other.
RULES: list[tuple[str, Any]] = [
    (r"^vision_encoder\.backbone\.patch_embed\.projection", "image_encoder.trunk.patch_embed.proj"),
    (r"^vision_encoder\.backbone\.(.*)layer_norm", r"vision_encoder.backbone.\1norm"),
    (r"^vision_encoder\.backbone", "image_encoder.trunk"),
    (r"^vision_encoder\.neck\.convs\.(\d)", r"image_encoder.neck.convs.\1.conv"),
    (r"^no_memory_embedding", "no_mem_embed"),
    (r"shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"prompt_encoder\.mask_embed\.conv(\d)", lambda m: f"prompt_encoder.mask_downscaling.{3 * int(m[1]) - 3}"),
    (r"prompt_encoder\.mask_embed\.layer_norm(\d)", lambda m: f"prompt_encoder.mask_downscaling.{3 * int(m[1]) - 2}"),
    (r"mask_decoder\.transformer\.layer_norm_final_attn", "mask_decoder.transformer.norm_final_attn"),
    (r"(mask_decoder\.transformer\.layers\.\d+)\.layer_norm", r"\1.norm"),
    (r"mask_decoder\.upscale_conv(\d)", lambda m: f"mask_decoder.output_upscaling.{3 * int(m[1]) - 3}"),
    (r"mask_decoder\.upscale_layer_norm", "mask_decoder.output_upscaling.1"),
    (r"\.o_proj\.", ".out_proj."),
    (r"(\.mlp)\.proj_out\.", r"\1.layers.1."),
    (r"(mask_decoder\..*(?:mlps\.\d|head))\.layers\.0\.", r"\1.layers.1."),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
    (r"^(prompt_encoder|mask_decoder)", r"sam_\1"),
]


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict as Meta publishes it, with a part that is for videos."""
    renamed = {"maskmem_tpos_enc": torch.zeros(7, 1, 1, 8)}
    for key, value in state.items():
        if key == "prompt_encoder.shared_embedding.positional_embedding":
            continue  # the same tensor once more
        if key == "prompt_encoder.point_embed.weight":
            renamed |= {f"sam_prompt_encoder.point_embeddings.{i}.weight": row[None] for i, row in enumerate(value)}
            continue
        for pattern, replacement in RULES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


@pytest.fixture
def sam2() -> Callable[..., Any]:
    """``sam2(overrides)``: a tiny model."""

    def run(overrides: dict[str, Any] | None = None) -> Any:
        cfg = get_cfg()
        peft_d2.add_config(cfg)
        peft_d2.register()
        cfg.merge_from_file(str(ROOT / "configs" / "sam2" / "hiera_t.yaml"))
        cfg.merge_from_list([part for item in {**TINY, **(overrides or {})}.items() for part in item])
        torch.manual_seed(0)
        return build_model(cfg)

    return run


@pytest.fixture
def theirs(filler: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="SAM 2 of release 5")
    hiera = transformers.Sam2HieraDetConfig(
        **{"hidden_size": 16, "image_size": [SIDE, SIDE], "patch_kernel_size": [7, 7], "patch_stride": [4, 4]},
        **{"patch_padding": [3, 3], "query_stride": [2, 2], "window_positional_embedding_background_size": [7, 7]},
        **{"blocks_per_stage": [1, 2, 3, 1], "embed_dim_per_stage": [16, 32, 64, 128]},
        **{"num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 4, 6, 3]},
        global_attention_blocks=[4, 5],
    )
    vision = transformers.Sam2VisionConfig(
        **{"backbone_config": hiera, "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 32},
        **{"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]], "fpn_top_down_levels": [2, 3]},
    )
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config=transformers.Sam2PromptEncoderConfig(hidden_size=32, image_size=SIDE),
        mask_decoder_config=transformers.Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32
        ),
    )
    model = transformers.Sam2Model(config).eval()
    filler.fill(model)
    with torch.no_grad():
        twin = model.prompt_encoder.shared_embedding.positional_embedding
        twin.copy_(model.shared_image_embedding.positional_embedding)
    return model


@pytest.mark.parametrize(("form", "multimask"), [("meta", False), ("meta", True), ("transformers", False)])
def test_same_outputs_from_both_published_forms(
    sam2: Any, filler: Any, theirs: Any, tmp_path: Any, form: str, multimask: bool
) -> None:
    """Meta's .pt, and transformers' model.safetensors, which is of the model for videos."""
    if form == "meta":
        path = tmp_path / "sam2.pt"
        torch.save({"model": published(theirs.state_dict())}, path)
    else:
        path = tmp_path / "model.safetensors"
        video = {
            "memory_attention.layers.0.linear1.weight": torch.zeros(4, 4),
            "object_pointer_proj.proj_in.bias": torch.zeros(4),
        }
        save_file({**{n: v.clone() for n, v in theirs.state_dict().items()}, **video}, path)
    ours = sam2().eval()
    report = adapters.load_base(ours, path)
    assert not report.initial and not report.unexpected, report
    boxes = torch.tensor([[10.0, 20.0, 70.0, 60.0], [30.0, 5.0, 120.0, 88.0]])
    points = torch.tensor([[[40.0, 33.0]], [[64.0, 50.5]]]), torch.tensor([[1], [0]])
    mask = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        pixels = ours.preprocess(filler.image(5, SIDE, SIDE))[None]
        [(coarse, *fine)] = ours.encode(pixels)
        named = {"input_points": points[0][None], "input_labels": points[1][None]}
        cases: list[tuple[Prompts, dict[str, Any]]] = [
            (Prompts(boxes=boxes), {"input_boxes": boxes[None]}),
            (Prompts(points=points), named),
            (Prompts(boxes=boxes, points=points), {"input_boxes": boxes[None], **named}),
            (
                Prompts(points=(points[0][:1], points[1][:1]), masks=mask),
                {"input_points": points[0][None, :1], "input_labels": points[1][None, :1], "input_masks": mask},
            ),
        ]
        for given, theirs_given in cases:
            expected = theirs(pixel_values=pixels, multimask_output=multimask, **theirs_given)
            tokens, dense = ours.prompt_encoder(given.points, given.boxes, given.masks)
            positions = ours.prompt_encoder.dense_positions()
            logits, quality, there = ours.mask_decoder(coarse, positions, tokens, dense, multimask, fine)
            assert expected.pred_masks.std() > 0.1  # the comparison is not of constants
            torch.testing.assert_close(logits, expected.pred_masks[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(quality, expected.iou_scores[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(there, expected.object_score_logits[0], rtol=0, atol=1e-4)


def test_both_forms_are_the_same_tensors(sam2: Any, theirs: Any) -> None:
    """All that the model has, under its names."""
    one, other = (sam2().upgrade_state_dict(state) for state in (theirs.state_dict(), published(theirs.state_dict())))
    assert one.keys() == other.keys() == sam2().state_dict().keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("size", [(90, 128), (64, 40)])
def test_same_masks_for_an_image_of_any_proportions(sam2: Any, filler: Any, theirs: Any, size: tuple[int, int]) -> None:
    """Stretched to a square, with its prompts; masks in the size that is wanted."""
    ours = sam2().eval()
    ours.load_state_dict(ours.upgrade_state_dict(published(theirs.state_dict())))
    image, boxes = filler.image(5, *size), torch.tensor([[4.0, 8.0, 30.0, 40.0], [10.0, 2.0, 36.0, 60.0]])
    with torch.no_grad():
        [found] = ours([{"image": image, "boxes": boxes, "height": 70, "width": 50}])
        scale = torch.tensor([SIDE / size[1], SIDE / size[0]]).repeat(2)
        expected = theirs(
            pixel_values=ours.preprocess(image)[None], input_boxes=(boxes * scale)[None], multimask_output=False
        )
        masks = nn.functional.interpolate(expected.pred_masks[0], size=(70, 50), mode="bilinear")[:, 0] > 0
    assert masks.any() and not masks.all()
    assert torch.equal(found["instances"].pred_masks, masks)
    torch.testing.assert_close(found["instances"].scores, expected.iou_scores[0, :, 0], rtol=0, atol=1e-4)


def test_a_mask_that_is_not_stable_gives_way(sam2: Any) -> None:
    """In inference the best of three takes its place, in training the single mask learns."""
    model = sam2()
    decoder, [embedding] = model.mask_decoder, model.encode(torch.randn(1, 3, SIDE, SIDE))
    tokens, dense = model.prompt_encoder(None, torch.tensor([[10.0, 10.0, 60.0, 60.0]] * 3), None)
    coarse, *fine = embedding
    given = (coarse, model.prompt_encoder.dense_positions(), tokens, dense)
    with torch.no_grad():
        single = decoder.train()(*given, False, fine)
        three = decoder.eval()(*given, True, fine)
        found = decoder(*given, False, fine)
        inside, around = ((single[0][:, 0] > limit).sum((1, 2)) for limit in (0.05, -0.05))
        best = three[1].argmax(1)
        rows = torch.arange(3)
        expected = torch.where((inside < 0.98 * around)[:, None, None], three[0][rows, best], single[0][:, 0])
    assert single[0].shape == (3, 1, 32, 32) and three[0].shape == (3, 3, 32, 32)
    torch.testing.assert_close(found[0][:, 0], expected)
    decoder.dynamic_multimask = False
    with torch.no_grad():
        alone = decoder(*given, False, fine)
    assert not torch.equal(alone[0], found[0])  # one at least was not stable
    torch.testing.assert_close(alone[0], single[0])


RECIPES = sorted(path.stem for path in (ROOT / "configs" / "peft" / "sam2").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_starts_at_the_model_and_learns(sam2: Any, name: str) -> None:
    node = load_config(str(ROOT / "configs/sam2/hiera_t.yaml"), str(ROOT / f"configs/peft/sam2/{name}.yaml")).cfg
    model = sam2().eval()
    item = sample("tensor", 3, (96, SIDE))
    item["instances"].gt_boxes = Boxes(torch.tensor([[4.0, 6, 30, 40], [20, 10, 70, 50], [0, 0, 12, 12]]))
    prompted = {"image": item["image"], "boxes": item["instances"].gt_boxes.tensor}
    with torch.no_grad():
        before = model([prompted])[0]["instances"]
        peft_d2.inject(model, [dict(m) for m in node.MODEL.PEFT.METHODS], train=node.MODEL.PEFT.TRAIN)
        after = model([prompted])[0]["instances"]
    torch.testing.assert_close(before.scores, after.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(before.pred_masks, after.pred_masks)
    peft.prove_live(model, [item])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = sum(model.train()([item]).values())
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.95 * values[0]


HIERA = {"t": 26_849_472, "s": 33_947_328, "b_plus": 68_675_712, "l": 212_149_296}


@pytest.mark.parametrize("size", HIERA)
def test_configs_are_the_published_sizes(size: str) -> None:
    """Parameters of transformers' Sam2HieraDetModel with the published settings."""
    peft_d2.register()
    model = build_without_weights(load_config(str(ROOT / f"configs/sam2/hiera_{size}.yaml")).cfg)
    trunk = sum(p.numel() for p in model.image_encoder.trunk.parameters())
    assert trunk == HIERA[size]


def test_its_encoder_serves_mask2former(sam2: Any, theirs: Any, build: Any) -> None:
    """Hiera's weights come out of the published checkpoint."""
    small = {key: value for key, value in TINY.items() if "SAM2" in key or "DEVICE" in key or "WEIGHTS" in key}
    head = {"MODEL.MASK_FORMER.DEC_LAYERS": 2, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1}
    model = build("sam2/hiera_t_mask2former.yaml", {**small, **head}).eval()
    state = model.upgrade_state_dict(published(theirs.state_dict()))
    assert state.keys() == {name for name in model.state_dict() if name.startswith("backbone.")}
    ours = sam2().eval()
    ours.load_state_dict(ours.upgrade_state_dict(published(theirs.state_dict())))
    model.load_state_dict(state, strict=False)
    images = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        found, expected = model.backbone(images), ours.image_encoder.trunk(images)
        assert {name: shape.channels for name, shape in model.backbone.output_shape().items()} == {
            name: value.shape[1] for name, value in found.items()
        }
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        [result] = model([{"image": torch.zeros(3, 70, 100)}])
    assert result["instances"].image_size == (70, 100)


def test_features_are_kept_up_to_any_block(sam2: Any) -> None:
    encoder, images = sam2().eval().image_encoder, torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = encoder(images)
        for count in range(len(encoder.steps) + 1):
            found = encoder.rest(encoder.first(images, count), images, count)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), count


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"MODEL.SAM.PATCH_SIZE": 8}, "MODEL.SAM.PATCH_SIZE is 8.*16"),
        ({"MODEL.SAM.IMAGE_SIZE": 100}, "MODEL.SAM.IMAGE_SIZE is 100"),
        ({"MODEL.SAM2.DEPTHS": [1, 1, 1]}, "MODEL.SAM2.WINDOW_SIZES is .*3 entries"),
        ({"MODEL.SAM2.WINDOW_SIZES": [7, 4, 6, 3]}, "MODEL.SAM2.WINDOW_SIZES is .*even"),
        ({"MODEL.SAM2.GLOBAL_BLOCKS": [70]}, "MODEL.SAM2.GLOBAL_BLOCKS is .*7 blocks"),
    ],
)
def test_bad_values_are_named(sam2: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        sam2(keys)
