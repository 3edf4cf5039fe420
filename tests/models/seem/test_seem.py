"""SEEM: equal to the published implementation; vocabularies and their errors; PEFT counts and methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from peft_d2 import peft
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_without_weights
from peft_d2.models import register
from peft_d2.models.backbones.sam_vit import SEEMViT
from peft_d2.models.checks import ModelConfigError
from peft_d2.models.seem.text_encoder import TokenizerError
from peft_d2.models.seem.vocabulary import ClassVectors, ClassVectorsError
from peft_d2.storage import checkpoint

from ..conftest import GOLDENS, ROOT, make_config
from ..mask2former.test_golden import TOLERANCE, assert_instances, recorded, rows
from ..test_training import sample, step
from .test_text_encoder import folder as tokenizer  # noqa: F401  a fixture

FOCAL_T, FOCAL_L = "seem/focal_t.yaml", "seem/focal_l.yaml"
WHOLE = {
    "focalt": FOCAL_T,
    "focall": FOCAL_L,
    "davitd3": "seem/davit_d3.yaml",
    "davitd5": "seem/davit_d5.yaml",
    "samvitb": "seem/sam_vit_b.yaml",
    "samvitl": "seem/sam_vit_l.yaml",
}
# The golden's cfg_overrides, in our keys.
REDUCED = {
    "MODEL.WEIGHTS": "",
    "MODEL.DIM_PROJ": 48,
    "MODEL.TEXT.VOCABULARY": 96,
    "MODEL.TEXT.CONTEXT_LENGTH": 8,
    "MODEL.TEXT.WIDTH": 32,
    "MODEL.TEXT.HEADS": 4,
    "MODEL.TEXT.LAYERS": 2,
    "MODEL.BACKBONE.FOCAL.EMBED_DIM": 24,
    "MODEL.BACKBONE.FOCAL.DEPTHS": [1, 1, 2, 1],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 64,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 64,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 2,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 64,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 128,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 20,
    "MODEL.MASK_FORMER.DEC_LAYERS": 4,
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": False,
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
    "TEST.DETECTIONS_PER_IMAGE": 30,
    "DATASETS.TRAIN": (),
    "DATASETS.TEST": (),
}
NAMES = ("cell", "photo", "cat", "dolphin")
SMALL = {
    **REDUCED,
    "MODEL.DIM_PROJ": 16,
    "MODEL.TEXT.VOCABULARY": 526,  # of the tokenizer in the tests
    "MODEL.TEXT.CONTEXT_LENGTH": 60,
    "MODEL.TEXT.WIDTH": 16,
    "MODEL.TEXT.LAYERS": 1,
    "MODEL.BACKBONE.FOCAL.EMBED_DIM": 8,
    "MODEL.BACKBONE.FOCAL.DEPTHS": [1, 1, 1, 1],
    "MODEL.BACKBONE.FOCAL.DROP_PATH_RATE": 0.0,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 6,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
}


def class_vectors(names: tuple[str, ...] = NAMES, channels: int = 16, templates: int = 3) -> ClassVectors:
    """Random ones, with different templates."""
    drawn = torch.randn(templates, len(names) + 1, channels, generator=torch.Generator().manual_seed(len(names)))
    return ClassVectors(
        names, nn.functional.normalize(drawn, dim=-1), tuple(f"{{}} number {i}" for i in range(templates))
    )


@pytest.fixture
def small_seem(build: Any, tmp_path: Path) -> Callable[..., nn.Module]:
    """``small_seem(overrides, vectors)``: the vectors are in a file."""

    def run(overrides: dict[str, Any] | None = None, vectors: ClassVectors | None = None) -> nn.Module:
        (class_vectors() if vectors is None else vectors).write(tmp_path / "vectors.safetensors")
        torch.manual_seed(0)
        return build(
            FOCAL_T, {**SMALL, "MODEL.SEEM.CLASS_VECTORS": str(tmp_path / "vectors.safetensors"), **(overrides or {})}
        )

    return run


@pytest.fixture
def reader(build: Any, tokenizer: Path) -> Callable[..., nn.Module]:  # noqa: F811
    """``reader(overrides)``: a small model that reads names with a text encoder that was "loaded"."""

    def run(overrides: dict[str, Any] | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = build(FOCAL_T, {**SMALL, "MODEL.TEXT.PRETRAINED_TOKENIZER": str(tokenizer), **(overrides or {})})
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        return model

    return run


@pytest.mark.parametrize("name", WHOLE)
def test_state_dict_of_the_whole_model(build: Any, golden: Any, name: str) -> None:
    expected = golden("seem_full_keys")[name]
    with torch.device("meta"):
        model = build(WHOLE[name], {"MODEL.DEVICE": "meta"})
    assert rows(model) == [[*row, "float32"] for row in expected["state_dict"]]
    assert model.size_divisibility == expected["size_divisibility"]
    assert model.sem_seg_head.predictor.query_feat.num_embeddings == expected["num_queries"] == 101
    counts, predictor = expected["counts"], model.sem_seg_head.predictor
    parked = counts["predictor_spatial_only_params"]  # buffers here: they are kept, and never trained
    size = {
        "total_params": parked + sum(p.numel() for p in model.parameters()),
        "backbone": sum(p.numel() for p in model.backbone.parameters()),
        "pixel_decoder": sum(p.numel() for p in model.sem_seg_head.pixel_decoder.parameters()),
        "lang_encoder": sum(p.numel() for p in predictor.lang_encoder.parameters()),
    }
    assert size == {key: counts[key] for key in size}
    weights = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    assert {key: model.criterion.weight_dict[key] for key in weights} == weights
    assert len(model.criterion.weight_dict) == 3 * 10 and model.criterion.empty_weight.shape == (134,)


def test_an_image_of_one_pixel(small_seem: Any) -> None:
    """Padded to 32 px its coarsest map has one, and at width 32 each group of a norm has a single value."""
    [result] = small_seem().eval()([{"image": torch.rand(3, 1, 1) * 255}])
    assert result["instances"].pred_masks.shape[1:] == (1, 1) and result["instances"].scores.isfinite().all()


@pytest.fixture
def outputs(build: Any, golden: Any, filler: Any, two_threads: None) -> dict[str, Any]:
    """What the reduced model gives, by the golden's names, and its instances."""
    recipe, arrays = golden("seem_tiny_instance"), np.load(GOLDENS / "seem_tiny_instance.npz")
    model = build(FOCAL_T, REDUCED).eval()
    assert filler.fill(model, skip=recipe["skip_fill"]) == recipe["state_dict"]
    state = model.state_dict()
    for key, factor in recipe["post_fill_scale"].items():
        state[key].mul_(factor)
    state[recipe["logit_scale_key"]].fill_(recipe["logit_scale_value"])
    model.set_classes(ClassVectors(tuple("abcde"), torch.from_numpy(arrays["text_embeddings"])[None], ("{}",)))
    return recorded(model, recipe, filler)


def test_outputs(outputs: dict[str, Any]) -> None:
    expected = np.load(GOLDENS / "seem_tiny_instance.npz")
    arrays = [name for name in expected.files if name in outputs]
    assert len(arrays) == 9
    for name in arrays:
        np.testing.assert_allclose(outputs[name].numpy(), expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    for i, instances in enumerate(outputs["instances"]):
        found = {key.removeprefix(f"image{i}."): expected[key] for key in expected.files if key.startswith(f"image{i}")}
        assert_instances(instances, found["scores"], found["pred_classes"], found["mask_bits"])


def test_segment_anythings_encoder_as_a_backbone(filler: Any) -> None:
    """Levels as published: each from the last map by itself, at its own stride and width."""
    sizes = {"IMAGE_SIZE": 64, "EMBED_DIM": 32, "DEPTH": 2, "NUM_HEADS": 2, "MLP_RATIO": 2.0, "WINDOW_SIZE": 3}
    keys = {f"MODEL.SAM.{key}": value for key, value in sizes.items()}
    cfg = make_config(overrides={**keys, "MODEL.SAM.GLOBAL_BLOCKS": [1], "MODEL.SAM.OUT_FEATURES": ["res3", "res5"]})
    backbone = SEEMViT(cfg)
    filler.fill(backbone)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    shapes = backbone.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {"res3": (256, 8), "res5": (1024, 32)}
    assert {name: value.shape for name, value in maps.items()} == {"res3": (1, 256, 8, 12), "res5": (1, 1024, 2, 3)}
    with pytest.raises(ValueError, match=r"OUT_FEATURES is \['res6'\]; it should be some of"):
        SEEMViT(make_config(overrides={**keys, "MODEL.SAM.GLOBAL_BLOCKS": [1], "MODEL.SAM.OUT_FEATURES": ["res6"]}))


def test_every_parameter_learns_but_the_text_encoder(small_seem: Any) -> None:
    model = small_seem()
    losses = step(model, [sample("bitmasks"), sample("bitmasks", 1, (48, 60)), sample("bitmasks", 0)])
    assert list(losses) == list(model.criterion.weight_dict)
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    text = {name for name, _ in model.named_parameters() if ".lang_encoder." in name and "logit_scale" not in name}
    assert idle == text == {name for name, p in model.named_parameters() if not p.requires_grad} and text


def test_training_draws_templates_and_inference_takes_their_mean(small_seem: Any) -> None:
    model, vectors = small_seem(), class_vectors()
    predictor = model.sem_seg_head.predictor
    hidden = torch.randn(1, 6, 32)

    def logits(classes: torch.Tensor) -> torch.Tensor:
        query = nn.functional.normalize(hidden @ predictor.class_embed, dim=-1)
        return predictor.lang_encoder.logit_scale.exp() * query @ classes.T

    torch.testing.assert_close(predictor.eval().classifier()(hidden), logits(vectors.evaluation()))
    predictor.train()
    possible = [logits(vectors.vectors[i]) for i in range(3)]
    drawn = [predictor.classifier()(hidden) for _ in range(20)]
    for found in drawn:
        assert all(
            any(torch.allclose(found[..., k], p[..., k], atol=1e-5) for p in possible) for k in range(len(NAMES) + 1)
        )
    assert len({round(found[0, 0, 0].item(), 4) for found in drawn}) == 3


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_refused(small_seem: Any, kind: torch.dtype) -> None:
    with pytest.raises(ModelConfigError, match=f"its weights are {kind}: keep the model in float32"):
        small_seem().to(kind)([sample("bitmasks")])


def test_bf16_autocast_scores_in_float32(small_seem: Any) -> None:
    model, inputs = small_seem(), [sample("bitmasks")]
    exact = sum(loss.item() for loss in step(model, inputs).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.sem_seg_head.predictor.classifier()(torch.randn(1, 6, 32)).dtype == torch.float32
        losses = step(model, inputs)
    assert sum(loss.item() for loss in losses.values()) == pytest.approx(exact, rel=0.1)


def test_results_of_all_three_tasks(small_seem: Any) -> None:
    from types import SimpleNamespace

    model = small_seem({f"MODEL.MASK_FORMER.TEST.{task}_ON": True for task in ("SEMANTIC", "PANOPTIC")}).eval()
    assert model.thing_classes == {0, 1, 2, 3}  # where no data set tells them from the stuff
    model.metadata = SimpleNamespace(thing_dataset_id_to_contiguous_id={1: 0, 7: 2}, stuff_classes=list(NAMES))
    with torch.no_grad():
        (result,) = model([{**sample("tensor"), "height": 100, "width": 120}])
    model.set_classes(["fish"])
    assert model.class_names == ("fish",) and model.thing_classes == {0}
    assert result["sem_seg"].shape == (4, 100, 120) and result["panoptic_seg"][0].shape == (100, 120)
    assert set(result["instances"].pred_classes.tolist()) <= {0, 2}
    assert (result["instances"].scores.diff() <= 0).all()


def test_two_vocabularies_from_a_file(small_seem: Any) -> None:
    """The config's list of names is all that changes; a class's logits do not depend on its number."""
    inputs = [sample("tensor")]
    first = small_seem().eval()
    second = small_seem({"MODEL.SEEM.CLASS_NAMES": ["dolphin", "cell"]}).eval()
    state = {name: value for name, value in first.state_dict().items() if name != "criterion.empty_weight"}
    assert second.load_state_dict(state, strict=False).missing_keys == ["criterion.empty_weight"]
    seen = []
    for model in (first, second):
        model.sem_seg_head.register_forward_hook(lambda module, arguments, result: seen.append(result["pred_logits"]))
        with torch.no_grad():
            model(inputs)
    assert seen[0].shape[-1] == 5 and seen[1].shape[-1] == 3
    torch.testing.assert_close(seen[1], seen[0][..., [3, 0, 4]])


def test_two_vocabularies_from_the_text_encoder(reader: Any) -> None:
    model = reader({"MODEL.SEEM.CLASS_NAMES": ["cell", "photo"]}).eval()
    predictor, hidden = model.sem_seg_head.predictor, torch.randn(1, 6, 32)
    first = predictor.classifier()(hidden)
    model.set_classes(["dolphin", "cell", "sea"])
    second = predictor.classifier()(hidden)
    assert first.shape[-1] == 3 and second.shape[-1] == 4
    torch.testing.assert_close(second[..., [1, 3]], first[..., [0, 2]])
    before = predictor.classifier()
    assert torch.equal(before.keywords["rows"], predictor.classifier().keywords["rows"])
    predictor.lang_encoder.load_state_dict({n: v + 0.1 for n, v in predictor.lang_encoder.state_dict().items()})
    assert not torch.equal(before.keywords["rows"], predictor.classifier().keywords["rows"])


def test_the_text_encoder_can_be_trained(reader: Any) -> None:
    model = reader({"MODEL.SEEM.CLASS_NAMES": list(NAMES)})
    encoder = model.sem_seg_head.predictor.lang_encoder
    peft.inject(model, [], ["sem_seg_head"])
    step(model, [sample("tensor")])
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.lang_encoder.token_embedding.weight.grad.any()


def test_the_data_sets_metadata_names_the_classes(reader: Any) -> None:
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get("seem_pond").thing_classes = ["frog", "newt", "carp", "duck"]
    MetadataCatalog.get("seem_sea").thing_classes = ["seal", "orca"]
    sets = {"DATASETS.TRAIN": ("seem_pond",), "DATASETS.TEST": ("seem_sea",)}
    predictor = reader(sets).sem_seg_head.predictor
    assert predictor.training_vocabulary.names == ("frog", "newt", "carp", "duck")
    assert predictor.train().classifier()(torch.zeros(1, 6, 32)).shape[-1] == 5
    assert predictor.vocabulary.names == ("seal", "orca")
    assert predictor.eval().classifier()(torch.zeros(1, 6, 32)).shape[-1] == 3
    with pytest.raises(ClassVectorsError, match="'seem_pond' and 'seem_sea' have different classes"):
        reader({"DATASETS.TEST": ("seem_pond", "seem_sea")})


def test_errors_name_the_remedy(build: Any, small_seem: Any, reader: Any) -> None:
    inputs = [sample("tensor")]
    with pytest.raises(ClassVectorsError, match="no vectors of the classes 'newt', only of cell, photo"):
        small_seem({"MODEL.SEEM.CLASS_NAMES": ["cell", "newt"]})
    with pytest.raises(ClassVectorsError, match="have 16 channels and MODEL.DIM_PROJ is 32"):
        small_seem({"MODEL.DIM_PROJ": 32})
    with pytest.raises(ClassVectorsError, match="no/file: No such file"):
        small_seem({"MODEL.SEEM.CLASS_VECTORS": "no/file"})
    names = {"MODEL.SEEM.CLASS_NAMES": list(NAMES)}
    with pytest.raises(ClassVectorsError, match="the classes have no names: .*MODEL.SEEM.CLASS_NAMES"):
        reader().eval()(inputs)
    with pytest.raises(ClassVectorsError, match="random initial weights: load a checkpoint .*MODEL.SEEM.CLASS_VECTORS"):
        build(FOCAL_T, {**SMALL, **names}).eval()(inputs)
    with pytest.raises(ClassVectorsError, match="no text encoder .*MODEL.SEEM.CLASS_VECTORS"):
        build(FOCAL_T, {**SMALL, **names, "MODEL.SEEM.TEXT_ENCODER": False}).eval()(inputs)
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        reader({**names, "MODEL.TEXT.PRETRAINED_TOKENIZER": str(ROOT)}).eval()(inputs)
    with pytest.raises(ClassVectorsError, match="names 4 classes and the training data are labelled with 3"):
        small_seem({"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3}).train()(inputs)
    model = small_seem()
    model.sem_seg_head.predictor.lang_encoder.requires_grad_(True)
    with pytest.raises(ClassVectorsError, match="come from a file, which they do not change"):
        model.train()(inputs)


def test_checkpoints_that_lack_what_is_not_computed(small_seem: Any, tmp_path: Path) -> None:
    """A file as published is a bare state dict; one of a SEEM without prompts lacks their tensors."""
    model = small_seem()
    whole = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    torch.save(whole, tmp_path / "seem.pt")
    assert checkpoint.load_base(model, tmp_path / "seem.pt").unexpected == []
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    words = ("sptial", "spatial", "pn_indicator")
    torch.save({n: v for n, v in whole.items() if not any(word in n for word in words)}, tmp_path / "fork.pt")
    other = small_seem()
    checkpoint.load_base(other, tmp_path / "fork.pt")
    assert not other.sem_seg_head.predictor.pn_indicator.weight.any()
    torch.save({n: v for n, v in whole.items() if "lang_encoder.lang_encoder" not in n}, tmp_path / "mute.pt")
    with pytest.raises(ClassVectorsError, match="no text encoder .*TEXT_ENCODER to False"):
        checkpoint.load_base(other, tmp_path / "mute.pt")


# Pixel statistics of the published code (RGB, 0 to 255), and images of an epoch, 3,000 where they are not known.
PAPER = {
    "cityscapes": ([73.18, 82.93, 72.41], [47.27, 48.10, 47.37], 2975),
    "ndd20": ([92.28, 154.55, 153.19], [67.14, 39.63, 41.33], 1500),
    "wixray": ([249.49, 248.82, 246.35], [18.63, 20.32, 28.58], 3000),
    "zerowaste": ([127.44, 122.56, 116.07], [60.49, 59.09, 63.04], 3002),
}


def check_paper_settings(data: str, cfg: Any) -> None:
    """Compare with the settings that arXiv 2606.01947's published code has for SEEM."""
    mean, std, images = PAPER[data]
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ("RGB", mean, std)
    assert (cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE) == (0.9, 2.0)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 5.0)
    assert cfg.SOLVER.IMS_PER_BATCH == 4 and cfg.SOLVER.MAX_ITER == math.ceil(50 * images / 4)
    assert [step / cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS] == pytest.approx([0.889, 0.963], abs=1e-4)


FILES = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs/seem").rglob("*.yaml"))


@pytest.mark.parametrize("file", [file for file in FILES if not Path(file).name.startswith("_")])
def test_every_config_builds(file: str) -> None:
    register()
    model = build_without_weights(load_config(str(ROOT / "configs" / file)).cfg)
    assert type(model).__name__ == "SEEM" and model.bicubic_results
    if "paper" in file:
        counts = {"cityscapes": 8, "ndd20": 1, "zerowaste": 4, "wixray": 12}
        assert model.sem_seg_head.num_classes == counts[Path(file).name.split("_")[0]]
        assert (sum(p.numel() for p in model.backbone.parameters()) > 1e8) == ("focal_l" in file)
        check_paper_settings(Path(file).name.split("_")[0], load_config(str(ROOT / "configs" / file)).cfg)
    assert len(model.sem_seg_head.predictor.training_vocabulary.names) in (0, model.sem_seg_head.num_classes)
