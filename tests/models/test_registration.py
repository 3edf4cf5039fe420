"""Own names, lent names, and the official package before or after."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import MethodType

import pytest
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from fvcore.common.registry import Registry

from peft_d2.models import register
from peft_d2.models.mask2former.model import MaskFormer, MSDeformAttnPixelDecoder
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY

OFFICIAL = [(META_ARCH_REGISTRY, "MaskFormer"), (SEM_SEG_HEADS_REGISTRY, "MaskFormerHead")]
OFFICIAL += [(BACKBONE_REGISTRY, "D2SwinTransformer")]
LENT = {"MaskFormer", "MaskFormerHead", "MSDeformAttnPixelDecoder", "D2SwinTransformer"}
LENT |= {"MultiScaleMaskedTransformerDecoder", "MaskDINO", "MaskDINOHead", "MaskDINOEncoder", "MaskDINODecoder"}


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries are global: here they start as Detectron2 makes them and end as they were."""
    for registry in (META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, BACKBONE_REGISTRY, TRANSFORMER_DECODER_REGISTRY):
        others = {n: o for n, o in registry._obj_map.items() if n not in LENT and not n.startswith("PD2")}
        monkeypatch.setattr(registry, "_obj_map", others)
        monkeypatch.setattr(registry, "_do_register", MethodType(Registry._do_register, registry))


class Official:
    """Stands for every class of the official package."""


def official() -> None:
    """What importing the official package does."""
    for registry, name in OFFICIAL:
        registry.register()(type(name, (Official,), {}))


def ours() -> None:
    register(upstream_names=True)


@pytest.mark.parametrize(
    ("calls", "official_serves"),
    [
        ([ours], False),
        ([ours, ours, register], False),
        ([official, ours, ours], True),
        ([ours, official, ours], True),
        ([register, official, ours], True),
    ],
)
def test_no_order_collides(calls: list[Callable[[], None]], official_serves: bool) -> None:
    for call in calls:
        call()
    for registry, name in OFFICIAL:
        assert issubclass(registry.get(name), Official) == official_serves
    assert META_ARCH_REGISTRY.get("PD2MaskFormer") is MaskFormer
    assert SEM_SEG_HEADS_REGISTRY.get("MSDeformAttnPixelDecoder") is MSDeformAttnPixelDecoder  # nobody else has it


def test_a_name_is_lent_once() -> None:
    """What was taken back can collide like any other name: two official packages are an error, as without us."""
    ours()
    official()
    with pytest.raises(AssertionError, match="'MaskFormer' was already registered"):
        official()


@pytest.mark.parametrize("calls", [[ours], [ours, official], [official, ours], [ours, official, ours]])
def test_lending_leaves_the_registries_as_detectron2_made_them(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
    for registry in (META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, BACKBONE_REGISTRY):
        assert type(registry) is Registry and type(registry._obj_map) is dict
        with pytest.raises(AssertionError, match="'PD2|'ResNet"):  # other names collide as ever
            registry._do_register(next(name for name, _ in registry if name.startswith("PD2")), Official)


def test_the_official_package_may_replace_a_part_alone() -> None:
    """Its pixel decoder beside our head: each name serves whoever registered it."""
    ours()
    SEM_SEG_HEADS_REGISTRY.register()(type("MSDeformAttnPixelDecoder", (Official,), {}))
    assert issubclass(SEM_SEG_HEADS_REGISTRY.get("MSDeformAttnPixelDecoder"), Official)
    assert SEM_SEG_HEADS_REGISTRY.get("MaskFormerHead") is SEM_SEG_HEADS_REGISTRY.get("PD2MaskFormerHead")


def test_every_name_is_there_in_a_new_process() -> None:
    """Whatever else is imported: our config files and the published ones name these."""
    code = """
import peft_d2
peft_d2.register(upstream_names=True)
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY
for registry in (BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, TRANSFORMER_DECODER_REGISTRY):
    print(*(name for name, model in registry if model.__module__.startswith("peft_d2")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    upstream = {
        "D2ViT",
        "GeneralizedSEEM",
        "SEEMDecoder",
        "TransformerEncoderPixelDecoder",
        "davit",
        "focal",
        "focal_dw",
    }
    own = {name for name in done.stdout.split() if name.startswith("PD2")}
    assert set(done.stdout.split()) - own == LENT | upstream | {"PEFTModel"}
    assert len(own) >= 19 and {"PD2FPN", "PD2SegmentAnything", "PD2SAMViT"} < own


def test_own_names_alone_leave_upstream_names_free() -> None:
    register()
    assert "MaskFormer" not in META_ARCH_REGISTRY and "PD2MaskFormer" in META_ARCH_REGISTRY
