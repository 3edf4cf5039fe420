"""Each image is encoded once; nothing stale, damaged or foreign is ever used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from peft_d2.data.loader import build_train_loader  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402
from peft_d2.engine.trainer import Trainer  # noqa: E402
from peft_d2.models.sam.feature_cache import FeatureCache  # noqa: E402

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
    return Counting()


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
        trainer.model.image_encoder.register_forward_hook(lambda *a, s=seen: s.append(len(a[2])))
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
