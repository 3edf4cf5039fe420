"""Segment Anything through the trainer: boxes in, adapters trained, mIoU, Dice and mask AP out; the paper's counts."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2")

import inspect_targets as targets  # noqa: E402
import toy  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2 import peft  # noqa: E402
from peft_d2.data import registration  # noqa: E402
from peft_d2.data.loader import build_test_loader, build_train_loader  # noqa: E402
from peft_d2.data.registration import register_from_config  # noqa: E402
from peft_d2.data.segmentation import segmentation_to_mask  # noqa: E402
from peft_d2.engine.checks import check_run  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.engine.errors import (
    ConfigError,  # noqa: E402
    one_line_errors,  # noqa: E402
)
from peft_d2.engine.factory import build_without_weights  # noqa: E402
from peft_d2.engine.launch import prepare_config, training_parser  # noqa: E402
from peft_d2.engine.optimizer import build_optimizer  # noqa: E402
from peft_d2.engine.trainer import Trainer  # noqa: E402
from peft_d2.models.sam.prompt_encoder import read_prompts  # noqa: E402

from ..tiny_sam import SAM_TINY  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_SWIN = Path(__file__).with_name("tiny.yaml")
TINY = {
    **SAM_TINY,
    "MODEL.SAM.IMAGE_SIZE": 64,
    "MODEL.SAM.PATCH_SIZE": 8,
    "INPUT.PROMPTS.BOX_NOISE": 3.0,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.AMP.ENABLED": False,
    "SOLVER.BASE_LR": 0.003,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.MAX_ITER": 25,
    "SOLVER.CHECKPOINT_PERIOD": 25,
    "TEST.EVAL_PERIOD": 0,
    "SEED": 3,
}
# Trainable in the image encoder of the ViT-B, after Peng et al., CVPR 2024, table 1: 147.4, 148.3, 322.7, 324.0 K.
COUNTS = {"lora": 147_456, "lora_cobot": 148_320, "adaptformer": 322_752, "adaptformer_cobot": 324_048, "decoder": 0}
# Rows of SAM-COBOT's ablation on AdaptFormer: 12 places of width 16.
COUNTS |= {
    f"ablations/cobot_{row}": 322_752 + more
    for row, more in {
        "sets": 192 + 192,
        "layer": 768,
        "sets_layer": 192 + 192 + 768,
        "sets_relation": 192 + 144 + 192,
        "random_relation": 192 + 192 + 768,
        "linear_layer": 192 + 144 + 192 + 12 * 256,
    }.items()
}
# Conv-LoRA: q, k and v of 12 blocks; factors of rank 3, the gate's two matrices, 8 convolutions.
COUNTS["conv_lora"] = 36 * (3 * (768 + 768) + 2 * 3 * 8 + 8 * (9 * 3 * 3 + 3))


@pytest.fixture(autouse=True)
def _registered() -> None:
    peft_d2.register()


@pytest.fixture
def sam_cfg(make_cfg: Callable[..., Any]) -> Callable[..., Any]:
    """``sam_cfg("lora_cobot", key, value, ...)``: the tiny model with a file of configs/peft, on the toy set."""

    def make(recipe: str, *opts: Any) -> Any:
        pairs = [part for item in TINY.items() for part in item] + list(opts)
        cfg = make_cfg(*pairs, config=CONFIGS / "sam" / "vit_b.yaml")
        node = load_config(str(CONFIGS / "sam" / "vit_b.yaml"), str(CONFIGS / "peft/sam" / f"{recipe}.yaml")).cfg.MODEL
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT = node.META_ARCHITECTURE, node.PEFT
        return cfg

    return make


# The published models, by what the file names begin or end with; the backbone has a pyramid and another head instead.
MODELS = {"vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608}
# Of the nuclei study's encoder: 6 blocks of 96 channels; LoRA of rank 4 on q and v, AdaptFormer of 16; COBOT shares
# 12 places of 4, or 6 of 16.
NUCLEI = {
    "lora": 6 * 2 * 4 * (96 + 96),
    "lora_cobot": 6 * 2 * 4 * (96 + 96) + 4 * 12 + 12 * 12 + 12 * 4 + 12 * 4,
    "adaptformer": 6 * (2 * 96 + (96 + 1) * 16 + (16 + 1) * 96),
    "adaptformer_cobot": 6 * (2 * 96 + (96 + 1) * 16 + (16 + 1) * 96) + 16 * 6 + 6 * 6 + 6 * 16 + 6 * 64,
    "decoder": 0,
    "adapt": 0,
}


@pytest.mark.parametrize("file", sorted(str(p.relative_to(CONFIGS)) for p in (CONFIGS / "sam").rglob("*.yaml")))
def test_every_config_builds_and_sets_what_the_paper_says(file: str) -> None:
    recipe = "mask2former/lora_cobot_sam" if "mask2former" in file else "sam/lora_cobot"
    cfg = load_config(str(CONFIGS / file), str(CONFIGS / "peft" / f"{recipe}.yaml")).cfg
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert name in registration.NAMES or name.startswith("coco_2017_")
    model = build_without_weights(cfg)
    if "mask2former" in file:
        sizes = [p.numel() for p in model.backbone.net.parameters() if p.requires_grad]
        assert sum(sizes) == COUNTS["lora_cobot"]
        assert all(p.requires_grad for part in (model.backbone.pyramid, model.sem_seg_head) for p in part.parameters())
        return
    size = next((name for name in MODELS if name in file), "vit_b")
    blocks, width = cfg.MODEL.SAM.DEPTH, cfg.MODEL.SAM.EMBED_DIM
    injected = 2 * blocks * 8 * width + 4 * 2 * blocks + (2 * blocks) ** 2 + 2 * (4 * 2 * blocks)
    assert sum(p.numel() for p in model.parameters()) == MODELS[size] + injected
    rates: dict[float, int] = {}
    for group in build_optimizer(cfg, model).param_groups:
        rate = round(group["lr"], 9)
        rates[rate] = rates.get(rate, 0) + sum(p.numel() for p in group["params"])
    decoder = sum(p.numel() for p in model.mask_decoder.parameters())
    orchestration = injected - 2 * blocks * 8 * width
    if "medical" in file:
        high = orchestration if "cobot" in file else injected
        assert rates == {1.25e-4: high, 1.25e-6: injected + decoder - high}
        assert cfg.SOLVER.WEIGHT_DECAY == 5e-4
    else:
        assert rates == {1e-4: injected + decoder} and cfg.SOLVER.WEIGHT_DECAY == 5e-5
        assert cfg.SOLVER.MAX_ITER == 20 * cfg.TEST.EVAL_PERIOD  # epochs
    assert cfg.INPUT.PROMPTS.BOX_NOISE == 50 and cfg.SOLVER.IMS_PER_BATCH == 1 and cfg.MODEL.SAM.IMAGE_SIZE == 1024


@pytest.mark.parametrize("file", sorted(path.stem for path in (CONFIGS / "nuclei" / "sam").glob("*.yaml")))
def test_the_nuclei_study_trains_what_it_says(file: str) -> None:
    model = build_without_weights(load_config(str(CONFIGS / "nuclei" / "sam" / f"{file}.yaml")).cfg)
    encoder, decoder, prompts = (
        sum(p.numel() for p in part.parameters() if p.requires_grad)
        for part in (model.image_encoder, model.mask_decoder, model.prompt_encoder)
    )
    if file in NUCLEI:
        assert (encoder, prompts) == (NUCLEI[file], 0)
    else:
        assert file in ("model", "fluorescence", "full") and encoder > 700_000 and prompts > 0
    assert decoder == sum(p.numel() for p in model.mask_decoder.parameters())


@pytest.mark.parametrize("recipe", COUNTS)
def test_counts_of_the_paper(recipe: str) -> None:
    names = {"config_file": "sam/vit_b.yaml", "peft_config": f"peft/sam/{recipe}.yaml"}
    files = {key: str(CONFIGS / path) for key, path in names.items()}
    text = targets.describe(argparse.Namespace(**files, pattern=[], modules=False, opts=[]))
    cfg = load_config(files["config_file"], files["peft_config"]).cfg
    model = build_without_weights(cfg)
    encoder = sum(p.numel() for p in model.image_encoder.parameters() if p.requires_grad)
    decoder = sum(p.numel() for p in model.mask_decoder.parameters() if p.requires_grad)
    assert (encoder, decoder) == (COUNTS[recipe], 4_058_340)
    assert peft.make_report(model).trainable == encoder + decoder
    assert f"{decoder:,}" in text and (not encoder or f"{encoder:,}" in text)


@pytest.mark.parametrize("recipe", COUNTS)
def test_the_start_is_the_pretrained_model(sam_cfg: Callable[..., Any], recipe: str) -> None:
    model = Trainer.build_model(sam_cfg(recipe)).eval()
    item = {"image": torch.rand(3, 40, 64) * 255, "boxes": [[5.0, 5, 30, 30]]}
    with torch.no_grad():
        adapted = model([item])[0]["instances"]
        if recipe == "decoder":
            assert peft.get_injection(model).methods == []
            return
        with peft.disabled(model):
            plain = model([item])[0]["instances"]
    assert torch.equal(adapted.scores, plain.scores)
    assert torch.equal(adapted.pred_masks, plain.pred_masks)


@torch.no_grad()
def loss(model: Any, batch: Any) -> float:
    return sum(value.item() for value in model.train()(batch).values())


def mean_iou(cfg: Any, model: torch.nn.Module) -> float:
    """Of each class the mean over its objects, of these the mean, in per cent, by hand."""
    of_class = defaultdict(list)
    with torch.no_grad():
        for [record] in build_test_loader(cfg, cfg.DATASETS.TEST[0]):
            masks = model.eval()([record])[0]["instances"].pred_masks
            for thing, mask in zip(record["annotations"], masks, strict=True):
                truth = torch.from_numpy(segmentation_to_mask(thing["segmentation"], *mask.shape))
                of_class[thing["category_id"]].append(float((truth & mask).sum() / (truth | mask).sum()))
    model.train()
    return 100 * sum(sum(values) / len(values) for values in of_class.values()) / len(of_class)


@pytest.mark.parametrize("recipe", ["lora_cobot", "adaptformer_cobot", "conv_lora"])
def test_train_and_evaluate(sam_cfg: Callable[..., Any], tmp_path: Path, recipe: str) -> None:
    cfg = sam_cfg(recipe)
    if recipe == "conv_lora":
        cfg.MODEL.PEFT.METHODS = [
            {**cfg.MODEL.PEFT.METHODS[0], "EXPERTS": 2}
        ]  # the others enlarge more, and are slower
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    batch = next(iter(build_train_loader(cfg)))
    before = loss(trainer.model, batch)
    results = trainer.train()
    masks = results["masks"]
    assert {"mIoU", "mDice", "DSC"} <= masks.keys() and "segm" in results
    assert masks["mIoU"] == pytest.approx(mean_iou(cfg, trainer.model), abs=1e-6)
    assert loss(trainer.model, batch) < 0.8 * before
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"loss_dice", "loss_mask", "masks/mIoU", "segm/AP"} <= {key for row in rows for key in row}
    base = peft.base_state_dict(trainer.model)
    shifted = {key: value + 1 if key.startswith("mask_decoder") else value for key, value in base.items()}
    torch.save(shifted, tmp_path / "base.pth")  # the adapter brings its own mask decoder
    cfg.MODEL.WEIGHTS, cfg.MODEL.PEFT.WEIGHTS = str(tmp_path / "base.pth"), str(tmp_path / "adapter_final")
    again = Trainer.build_model(cfg)
    found, expected = again.state_dict(), trainer.model.state_dict()
    same = [key for key in found if not key.startswith("peft_base.")]
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in same)


def test_boxes_of_a_detector(sam_cfg: Callable[..., Any], toy_set: toy.ToySet, tmp_path: Path) -> None:
    truth = json.loads(Path(toy_set.json).read_text())
    rows = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in truth["annotations"][1:]
    ]
    path = tmp_path / "found.json"
    path.write_text(json.dumps(rows))
    cfg = sam_cfg("decoder", "INPUT.PROMPTS.DETECTIONS", path)
    results = Trainer.test(cfg, Trainer.build_model(cfg))
    assert "segm" in results and "masks" not in results
    path.write_text(json.dumps([{**rows[0], "category_id": 999}]))
    with pytest.raises(ValueError, match="row 0 is of category 999"):
        Trainer.test(cfg, Trainer.build_model(cfg))
    path.write_text("{}")
    with pytest.raises(ValueError, match="row 0 is no result"):
        Trainer.test(cfg, Trainer.build_model(cfg))


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (("INPUT.PROMPTS.DETECTIONS", "nowhere.json"), "DETECTIONS nowhere.json: cannot be read"),
        (("TEST.TILES.ENABLED", True), "TEST.TILES.ENABLED cuts images"),
    ],
)
def test_the_first_evaluation_cannot_fail_after_hours(sam_cfg: Callable[..., Any], opts: Any, said: str) -> None:
    cfg = sam_cfg("decoder", *opts)
    register_from_config(cfg)
    with pytest.raises(ConfigError, match=said):
        check_run(cfg, evaluate=False)


def test_a_config_with_detections_holds_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("found.json").write_text("[]")
    given = ["--config-file", str(CONFIGS / "sam" / "vit_b.yaml"), "--eval-only", "OUTPUT_DIR", "out"]
    cfg = prepare_config(training_parser().parse_args([*given, "INPUT.PROMPTS.DETECTIONS", "found.json"]))
    assert cfg.INPUT.PROMPTS.DETECTIONS == str(tmp_path / "found.json")


def test_a_prompt_that_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    item = {"boxes": [[5.0, 5, 1, 1]], "file_name": "a.png"}
    with pytest.raises(SystemExit):
        one_line_errors(lambda: read_prompts(item, (9, 9), 32, torch.device("cpu")))
    assert capsys.readouterr().err.startswith("error: a.png: box 0 [5.0, 5.0, 1.0, 1.0] is the wrong way round")


def test_automatic_mode(make_cfg: Callable[..., Any]) -> None:
    """The encoder through its pyramid under Mask2Former's head: trained with COBOT, evaluated by COCO's AP."""
    small = {key: value for key, value in TINY.items() if "DECODER" not in key and "IOU" not in key}
    head = load_config(str(TINY_SWIN)).cfg.MODEL
    cfg = make_cfg(*(part for item in small.items() for part in item), config=CONFIGS / "sam/vit_b_mask2former.yaml")
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER = head.SEM_SEG_HEAD, head.MASK_FORMER
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SAM.PYRAMID_CHANNELS = classes, 32
    cfg.INPUT.IMAGE_SIZE = cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = 12
    node = load_config(str(CONFIGS / "peft/mask2former/lora_cobot_sam.yaml")).cfg.MODEL.PEFT
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT = "PEFTModel", node
    cfg.MODEL.PEFT.META_ARCHITECTURE = "PD2MaskFormer"
    trainer = Trainer(cfg)
    encoder = {n: p.detach().clone() for n, p in trainer.model.backbone.net.named_parameters() if not p.requires_grad}
    batch = next(iter(build_train_loader(cfg)))
    before = loss(trainer.model, batch)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results is not None and {"AP", "AP50"} <= results["segm"].keys() and "masks" not in results
    assert loss(trainer.model, batch) < 0.9 * before
    after = dict(trainer.model.backbone.net.named_parameters())
    assert len(encoder) > 20 and all(torch.equal(after[name], value) for name, value in encoder.items())
    injected = [t.param for t in peft.trained_parameters(trainer.model) if t.kind == "injected"]
    assert injected and all(p.grad is not None and p.grad.abs().sum() > 0 for p in injected)


def swin_count(recipe: str) -> int:
    """COBOT's parameters on the tiny Swin: one block in each of four stages, 16 to 128 wide."""
    widths = [16, 32, 64, 128]
    places, rank = (2 * len(widths), 4) if recipe == "lora" else (len(widths), 16)
    if recipe == "lora":
        factors = sum(2 * rank * 2 * width for width in widths)
    else:
        factors = sum(2 * width + (width + 1) * rank + (rank + 1) * width for width in widths)
    own = places * (rank + 4 * (rank // 4) ** 2)  # gamma and quaternion
    return factors + rank * places + places**2 + own


@pytest.mark.parametrize("recipe", ["lora", "adaptformer"])
def test_cobot_on_another_stack_of_blocks(make_cfg: Callable[..., Any], recipe: str) -> None:
    """Swin under Mask2Former, whose stages differ in width: one space for all of them, which learns."""
    cfg = make_cfg("MODEL.SWIN.DROP_PATH_RATE", 0.0)
    node = load_config(str(TINY_SWIN), str(CONFIGS / "peft/mask2former" / f"{recipe}_cobot_swin.yaml")).cfg.MODEL
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT = node.META_ARCHITECTURE, node.PEFT
    model = Trainer.build_model(cfg)
    injected = {id(t.param): t.param for t in peft.trained_parameters(model) if t.kind == "injected"}
    assert sum(p.numel() for p in injected.values()) == swin_count(recipe)
    batch = next(iter(build_train_loader(cfg)))
    optimizer = torch.optim.AdamW(injected.values(), lr=1e-2)
    torch.manual_seed(4)  # the points where the losses are taken
    before = loss(model, batch)
    for _ in range(12):
        optimizer.zero_grad()
        sum(model.train()(batch).values()).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in injected.values())
    with torch.no_grad():
        image = {"image": batch[0]["image"]}
        adapted = model.eval()([image])[0]["instances"]
        with peft.disabled(model):
            plain = model([image])[0]["instances"]
    torch.manual_seed(4)
    assert loss(model, batch) < 0.98 * before and not torch.equal(adapted.scores, plain.scores)
