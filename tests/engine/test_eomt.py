"""EoMT through the same trainer, evaluation, adapter files and merging as every other model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

timm = pytest.importorskip("timm", reason="needs timm, of the test extra")

from detectron2.modeling import build_model  # noqa: E402

from peft_d2 import adapters, peft  # noqa: E402
from peft_d2.engine.trainer import Trainer  # noqa: E402

from ..models.conftest import SMALL_EOMT  # noqa: E402
from .test_mask_dino import methods_of  # noqa: E402
from .test_processes import BATCH, assert_two_equal_one, steps_of  # noqa: E402
from .test_training import StopAfter, assert_equal, train, trained  # noqa: E402

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "eomt" / "coco" / "instance_dinov2_small_640.yaml"
SMALL: dict[str, Any] = {
    **{key: value for key, value in SMALL_EOMT.items() if "NUM_CLASSES" not in key},
    **{"INPUT.IMAGE_SIZE": 64, "INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 64, "SOLVER.IMS_PER_BATCH": 2},
    **{"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 3, "SOLVER.WARMUP_ITERS": 1, "SOLVER.BASE_LR": 0.001},
    **{"SOLVER.AMP.ENABLED": False, "TEST.EVAL_PERIOD": 6, "DATALOADER.NUM_WORKERS": 0, "SEED": 3},
}


@pytest.fixture
def eomt_cfg(make_cfg: Callable[..., Any]) -> Callable[..., Any]:
    """``eomt_cfg(key, value, ...)``: a tiny EoMT on the toy set."""
    pairs = [part for item in SMALL.items() for part in item]
    return lambda *opts: make_cfg(*pairs, *opts, config=CONFIG)


@pytest.mark.parametrize("name", ["lora", "mona", "adaptformer_cobot"])
@pytest.mark.parametrize("encoder", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb"])
def test_train_evaluate_store_load_and_merge(
    eomt_cfg: Callable[..., Any], tmp_path: Path, name: str, encoder: str
) -> None:
    opts = ("MODEL.TIMM.NAME", encoder)
    cfg = eomt_cfg(*opts, *methods_of(f"eomt/{name}.yaml"))
    torch.manual_seed(3)
    torch.save({"model": build_model(eomt_cfg(*opts)).state_dict()}, tmp_path / "base.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "base.pth")
    trainer = train(cfg)  # proves before the first step that every part is live
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"segm/AP", "loss_mask_1", "loss_dice_0", "total_loss"} <= set().union(*rows)

    model = trainer.model.eval()
    # Of a sixth step of six, 5 / 6 of the training: the first block's masks are gone, the second's nearly.
    assert model.sem_seg_head.query_feat.attn_mask_probs.tolist() == pytest.approx([0, (0.2 / 0.9) ** 0.9], abs=1e-3)
    image = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    with torch.no_grad():
        expected = model([image])[0]["instances"]
    fresh = build_model(eomt_cfg(*opts, "MODEL.WEIGHTS", tmp_path / "base.pth")).eval()
    adapters.load_base(fresh, tmp_path / "base.pth")
    adapters.load_adapter(fresh, tmp_path / "adapter_final")
    assert_equal(trained(trainer), {name: p for name, p in fresh.named_parameters() if p.requires_grad})
    with torch.no_grad():
        assert torch.equal(fresh([image])[0]["instances"].scores, expected.scores)
        if name == "lora":
            peft.merge(fresh)
            merged = fresh([image])[0]["instances"]
            torch.testing.assert_close(merged.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_weights_of_the_encoder_alone_are_a_base(
    eomt_cfg: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The head is trained in full, so an adapter needs no more than the encoder's weights, whatever the SEED."""
    kwargs = yaml.safe_load(SMALL["MODEL.TIMM.KWARGS"])
    encoder = timm.create_model(SMALL["MODEL.TIMM.NAME"], num_classes=0, **kwargs)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    opts = ("MODEL.TIMM.WEIGHTS", tmp_path / "encoder.pth", *methods_of("eomt/lora.yaml"), "TEST.EVAL_PERIOD", 0)
    opts = ("MODEL.META_ARCHITECTURE", "PEFTModel", "MODEL.PEFT.META_ARCHITECTURE", "PD2EoMT", *opts)
    trainer = train(eomt_cfg(*opts))
    again = Trainer.build_model(eomt_cfg(*opts, "SEED", 77, "MODEL.PEFT.WEIGHTS", tmp_path / "adapter_final"))
    image = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    with torch.no_grad():
        expected, found = (model.eval()([image])[0]["instances"] for model in (trainer.model, again))
    assert torch.equal(found.scores, expected.scores)
    assert not [record for record in caplog.records if "the base is random" in record.getMessage()]


def test_each_adapter_has_its_own_share_of_masks(eomt_cfg: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"model": build_model(eomt_cfg()).state_dict()}, tmp_path / "base.pth")

    def base() -> Any:
        model = build_model(eomt_cfg()).eval()
        adapters.load_base(model, tmp_path / "base.pth")
        return model

    image, scores = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}, {}
    for name, share in (("masked", 1.0), ("free", 0.0)):
        model = base()
        peft.inject(model, [{"NAME": "mona", "TARGETS": ["blocks.*.mlp"], "BOTTLENECK": 8}], train=["sem_seg_head"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
            model.sem_seg_head.query_feat.attn_mask_probs.fill_(share)
            scores[name] = model([image])[0]["instances"].scores
        adapters.save_adapter(model, tmp_path / name)
    both = base()
    for name in scores:
        adapters.load_adapter(both, tmp_path / name, name=name)
    for name in ("masked", "free", "masked"):
        peft.set_adapter(both, name)
        with torch.no_grad():
            assert torch.equal(both([image])[0]["instances"].scores, scores[name])


WITHOUT_CHANCE = ("INPUT.DATASET_MAPPER_NAME", "mask_former_instance", "INPUT.MIN_SIZE_TRAIN", (64,))
WITHOUT_CHANCE += ("INPUT.RANDOM_FLIP", "none", "INPUT.COLOR_AUG_SSD", False, "TEST.EVAL_PERIOD", 0)


def test_two_processes_equal_one(eomt_cfg: Callable[..., Any], tmp_path: Path) -> None:
    """LoRA on a frozen DINOv3, its head in full. The second step is made NaN, on one rank."""
    encoder = "vit_small_patch16_dinov3_qkvb"
    torch.manual_seed(3)
    torch.save({"model": build_model(eomt_cfg("MODEL.TIMM.NAME", encoder)).state_dict()}, tmp_path / "base.pth")
    options = (*BATCH, *methods_of("eomt/lora.yaml"), *WITHOUT_CHANCE, "MODEL.TIMM.NAME", encoder)
    options = (*options, "MODEL.WEIGHTS", tmp_path / "base.pth")
    one = steps_of(eomt_cfg(*options, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "one"))
    cfg = eomt_cfg(*options, "OUTPUT_DIR", tmp_path / "two")
    assert_two_equal_one(one, cfg, tmp_path)


def test_a_stopped_run_continues_in_the_middle_of_the_annealing(eomt_cfg: Callable[..., Any], tmp_path: Path) -> None:
    """Which queries are masked is drawn anew in each step, in full training and with what is injected."""
    for name in ("lora", ""):
        methods = methods_of(f"eomt/{name}.yaml") if name else ()
        options = (*methods, "TEST.EVAL_PERIOD", 0, "MODEL.EOMT.ANNEALING_START", [0.0, 0.2])
        options = (*options, "SOLVER.BACKBONE_WARMUP_ITERS", 2)
        whole = train(eomt_cfg(*options, "OUTPUT_DIR", tmp_path / f"whole{name}"))
        stopped = eomt_cfg(*options, "OUTPUT_DIR", tmp_path / f"stopped{name}")
        with pytest.raises(KeyboardInterrupt):
            train(stopped, StopAfter(3))
        resumed = train(stopped, resume=True)
        assert resumed.start_iter == 3
        assert_equal(trained(whole), trained(resumed))
        shares = [trainer.model.sem_seg_head.query_feat.attn_mask_probs for trainer in (whole, resumed)]
        assert torch.equal(*shares) and 0 < shares[0][1] < 1
