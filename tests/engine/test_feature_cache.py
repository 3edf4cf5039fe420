"""Each image is encoded once, up to what learns; nothing stale, damaged or foreign is ever used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

import peft_d2  # noqa: E402
from peft_d2.data.loader import build_train_loader  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402
from peft_d2.engine.trainer import Trainer  # noqa: E402
from peft_d2.models.feature_cache import FeatureCache  # noqa: E402

from .test_eomt import CONFIG as EOMT  # noqa: E402
from .test_eomt import SMALL  # noqa: E402
from .test_sam import _registered, loss, sam_cfg  # noqa: E402, F401


class Counting(nn.Module):
    """An encoder that knows how many images it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 8, 8)
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.layer(x)


@pytest.fixture
def encoder() -> Counting:
    return Counting().requires_grad_(False)


def test_an_image_is_encoded_once(encoder: Counting, tmp_path: Path) -> None:
    images = torch.rand(3, 3, 16, 16)
    expected = encoder.layer(images).detach()
    cache = FeatureCache(tmp_path, encoder, "a")
    torch.testing.assert_close(cache(images[:2]), expected[:2])
    torch.testing.assert_close(cache(images), expected)  # one is new
    again = FeatureCache(tmp_path, encoder, "a")(images.flip(0))
    assert torch.equal(again, cache(images).flip(0)) and not again.requires_grad
    assert encoder.seen == 3 and len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_everything_that_decides_the_result_is_in_the_key(encoder: Counting, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 16, 16)
    cache = FeatureCache(tmp_path, encoder, "a")
    cache(images)
    FeatureCache(tmp_path, encoder, "b")(images)
    assert encoder.seen == 2
    cache(images + 1e-6)
    assert encoder.seen == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert cache(images).dtype == torch.bfloat16
    assert encoder.seen == 4
    encoder.load_state_dict({name: value + 1 for name, value in encoder.state_dict().items()})
    torch.testing.assert_close(cache(images), encoder.layer(images))
    assert encoder.seen == 5
    encoder.layer.weight.data = encoder.layer.weight.data.clone() + 1
    torch.testing.assert_close(cache(images), encoder.layer(images))
    encoder.layer.weight.data.mul_(2)
    torch.testing.assert_close(cache(images), encoder.layer(images))
    assert encoder.seen == 7


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_features_of_each_precision(kind: torch.dtype, tmp_path: Path) -> None:
    """A batch norm counts its batches in a tensor without axes."""
    encoder = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4)).eval().requires_grad_(False)
    images = torch.rand(2, 3, 16, 16)
    FeatureCache(tmp_path, encoder, "a")(images)
    encoder, images = encoder.to(kind), images.to(kind)
    for _ in range(2):
        assert torch.equal(FeatureCache(tmp_path, encoder, "a")(images), encoder(images))
    assert len(list(tmp_path.rglob("*.safetensors"))) == (2 if kind == torch.float32 else 4)


def test_nothing_is_kept_of_what_learns_by_now(encoder: Counting, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 16, 16)
    cache = FeatureCache(tmp_path, encoder, "a")
    cache(images)
    encoder.requires_grad_(True)
    cache(images).sum().backward()
    assert encoder.seen == 2 and encoder.layer.weight.grad is not None


def test_an_adapter_that_comes_later_is_not_given_what_another_kept(
    frozen_cfg: Callable[..., Any], tmp_path: Path
) -> None:
    """One in the last block, as it is trained with kept features, then one in the first, and each in turn."""
    image = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]

    def with_lora(block: int, name: str, *opts: Any) -> nn.Module:
        targets = f"[{{'NAME': 'lora', 'TARGETS': ['net.blocks.{block}.attn.qkv'], 'RANK': 2}}]"
        cfg = frozen_cfg("eomt lora", "MODEL.PEFT.METHODS", targets, "SEED", 3, *opts)
        torch.manual_seed(3)
        model = Trainer.build_model(cfg).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(block)))
        peft_d2.save_adapter(model, tmp_path / name)
        return model

    expected = {"late": with_lora(3, "late"), "early": with_lora(0, "early")}
    model = with_lora(3, "default", "MODEL.FEATURE_CACHE", tmp_path / "cache")
    assert isinstance(model.backbone.forward, FeatureCache)
    for name in expected:
        peft_d2.load_adapter(model, tmp_path / name, name=name)
    with torch.no_grad():
        for name in ("late", "early", "late", "early"):
            peft_d2.set_adapter(model, name)
            found, other = (m(image)[0]["instances"].scores for m in (model, expected[name]))
            torch.testing.assert_close(found, other, rtol=0, atol=1e-6)
        scores = [m(image)[0]["instances"].scores for m in expected.values()]
    assert (scores[0] - scores[1]).abs().max() > 1e-3  # they differ


WRITER = """
import sys, torch
from torch import nn
from peft_d2.models.feature_cache import FeatureCache
torch.manual_seed(0)
encoder = nn.Conv2d(3, 4, 8, 8).requires_grad_(False)
images = torch.rand(40, 3, 64, 64)
cache = FeatureCache(sys.argv[1], encoder, "a")
for start in range(0, 40, 4):
    batch = images[start : start + 4]
    assert torch.equal(cache(batch), encoder._conv_forward(batch, encoder.weight, encoder.bias))
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=Path.cwd()) for _ in range(2)]
    assert [run.wait(timeout=240) for run in runs] == [0, 0]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 40 and {path.suffix for path in files} == {".safetensors"}


def test_a_damaged_file_is_computed_again(encoder: Counting, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 16, 16)
    cache = FeatureCache(tmp_path, encoder, "a")
    first = cache(images)
    (path,) = tmp_path.rglob("*.safetensors")
    for damage in (b"", b"nonsense", path.read_bytes()[:-3]):
        path.write_bytes(damage)
        assert torch.equal(cache(images), first)
    assert encoder.seen == 4 and torch.equal(cache(images), first)


def test_a_run_learns_the_same_with_it(sam_cfg: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    losses, calls = [], []
    for folder in ("", str(tmp_path / "cache")):
        cfg = sam_cfg("decoder", "MODEL.SAM.FEATURE_CACHE", folder, "SOLVER.MAX_ITER", 6, "INPUT.RANDOM_FLIP", "none")
        cfg.MODEL.PEFT.PROVE_LIVE = False
        trainer = Trainer(cfg)
        seen: list[int] = []
        trainer.model.image_encoder.patch_embed.register_forward_hook(lambda *a, s=seen: s.append(len(a[2])))
        trainer.resume_or_load(resume=False)
        batch = next(iter(build_train_loader(cfg)))
        before = loss(trainer.model, batch)
        trainer.train()
        calls.append(sum(seen))
        losses.append((before, loss(trainer.model, batch)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0][1] < 0.99 * losses[0][0]
    assert calls == [2 + 12 + 6, 6]  # six images; without it, two in each of seven steps and all in the evaluation


@pytest.mark.parametrize("recipe", ["lora", "adaptformer_cobot"])
def test_an_encoder_that_learns_is_refused(sam_cfg: Callable[..., Any], tmp_path: Path, recipe: str) -> None:  # noqa: F811
    cfg = sam_cfg(recipe, "MODEL.SAM.FEATURE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="FEATURE_CACHE .*frozen.*image_encoder.blocks.0.*sam/decoder"):
        Trainer.build_model(cfg)


EOMT_LAST = "[{'NAME': 'lora', 'TARGETS': ['net.blocks.{1,3}.attn.qkv'], 'RANK': 2}]"
# What is trained, the part that is run once for an image, and one that is run as often as without a cache.
RUNS: dict[str, tuple[tuple[str, str], str, str]] = {
    "eomt head": (("MODEL.PEFT.TRAIN", "['sem_seg_head']"), "backbone.net.blocks.1", "backbone.net.blocks.2"),
    "eomt lora": (("MODEL.PEFT.METHODS", EOMT_LAST), "backbone.net.blocks.0", "backbone.net.blocks.1"),
    "eomt dinov3": (("MODEL.PEFT.METHODS", EOMT_LAST), "backbone.net.blocks.0", "backbone.net.blocks.1"),
    "swin": (("MODEL.PEFT.TRAIN", "['sem_seg_head']"), "backbone.layers.3", "sem_seg_head"),
    "timm vit": (("MODEL.PEFT.TRAIN", "['sem_seg_head', 'pyramid']"), "backbone.net.blocks.3", "backbone.pyramid.res2"),
}


@pytest.fixture
def frozen_cfg(make_cfg: Callable[..., Any]) -> Callable[..., Any]:
    """``frozen_cfg(run, key, value, ...)``: a tiny model with a frozen encoder, whose every view is seen again."""

    def make(run: str, *opts: Any) -> Any:
        pytest.importorskip("timm", reason="needs timm, of the test extra")
        pairs = ["MODEL.META_ARCHITECTURE", "PEFTModel", "MODEL.PEFT.PROVE_LIVE", False, "INPUT.RANDOM_FLIP", "none"]
        plain = {"MODEL.BACKBONE.NAME": "PD2Timm", "INPUT.COLOR_AUG_SSD": False, "MODEL.SWIN.DROP_PATH_RATE": 0.5}
        if run.startswith("eomt"):
            plain = {**SMALL, "INPUT.DATASET_MAPPER_NAME": "mask_former_instance", "INPUT.MIN_SIZE_TRAIN": "(64,)"}
        elif run == "swin":
            del plain["MODEL.BACKBONE.NAME"]
        else:
            plain |= {key: value for key, value in SMALL.items() if "TIMM" in key}
        if "dinov3" in run:
            plain["MODEL.TIMM.NAME"] = "vit_small_patch16_dinov3_qkvb"
        pairs += [part for item in plain.items() for part in item]
        base = "PD2EoMT" if run.startswith("eomt") else "PD2MaskFormer"
        pairs += [
            "MODEL.PEFT.META_ARCHITECTURE",
            base,
            "SOLVER.MAX_ITER",
            6,
            "TEST.EVAL_PERIOD",
            0,
            *RUNS[run][0],
            *opts,
        ]
        return make_cfg(*pairs, **({"config": EOMT} if run.startswith("eomt") else {}))

    return make


@pytest.mark.parametrize("run", RUNS)
def test_any_encoder_is_run_up_to_what_learns(frozen_cfg: Callable[..., Any], tmp_path: Path, run: str) -> None:
    """Stochastic depth is no part of what is kept, so the losses with it are compared in eval mode's."""
    values, calls = [], []
    for folder in ("", str(tmp_path / "cache")):
        cfg = frozen_cfg(run, "MODEL.FEATURE_CACHE", folder, "MODEL.SWIN.DROP_PATH_RATE", 0.0)
        trainer = Trainer(cfg)
        seen: list[list[int]] = [[], []]
        for part, counts in zip(RUNS[run][1:], seen, strict=True):
            module = trainer.model.get_submodule(part)
            module.register_forward_pre_hook(lambda module, inputs, counts=counts: counts.append(1))
        trainer.resume_or_load(resume=False)
        trainer.train()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        values.append(torch.cat([p.detach().flatten() for p in trained]))
        calls.append([len(counts) for counts in seen])
    torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-5)
    assert calls[1][1] == calls[0][1] and calls[1][0] <= 6 < calls[0][0]


def test_what_is_kept_is_without_chance(frozen_cfg: Callable[..., Any], tmp_path: Path) -> None:
    cfg = frozen_cfg("swin", "MODEL.FEATURE_CACHE", str(tmp_path / "cache"))
    model = Trainer.build_model(cfg).train()
    images = torch.rand(2, 3, 64, 64)
    first = model.backbone(images)
    modes = [module.training for module in model.backbone.modules()]
    again = model.eval().backbone(images)
    assert all(modes) and first.keys() == again.keys() == {"res2", "res3", "res4", "res5"}
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("run", "what"), [("eomt lora", "'net.blocks.*.attn.qkv'"), ("swin", "'layers.3.blocks.0.attn.qkv'")]
)
def test_an_encoder_that_learns_early_is_refused(
    frozen_cfg: Callable[..., Any], tmp_path: Path, run: str, what: str
) -> None:
    cfg = frozen_cfg(run, "MODEL.FEATURE_CACHE", str(tmp_path / "cache"))
    cfg.MODEL.PEFT.METHODS = [{"NAME": "lora", "TARGETS": [what.strip("'")], "RANK": 2}]
    with pytest.raises(ConfigError, match="MODEL.FEATURE_CACHE .*frozen.*backbone.*Leave it empty"):
        Trainer.build_model(cfg)
