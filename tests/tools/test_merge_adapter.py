"""Merging an adapter into a checkpoint that needs nothing of ours to be loaded."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from merge_adapter import merge_adapter, merge_parser  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2 import peft  # noqa: E402
from peft_d2.engine import convert, factory  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.engine.errors import ConfigError, one_line_errors  # noqa: E402

ENGINE = Path(__file__).parents[1] / "engine"
TINY, DINO = ENGINE / "tiny.yaml", ENGINE / "tiny_mask_dino.yaml"
LORA = {
    "NAME": "lora",
    "RANK": 2,
    "ALPHA": 4.0,
    "TARGETS": ["qkv", "self_attn.{value_proj,sampling_offsets}", "multihead_attn"],
}
OF_DINO = {
    **LORA,
    "TARGETS": ["qkv", "{self_attn,cross_attn}.{value_proj,sampling_offsets}", "decoder.layers.*.self_attn"],
}
HEADS = ("class_embed", "mask_embed")


def build(seed: int = 0, config: Path = TINY) -> torch.nn.Module:
    from detectron2.modeling import build_model

    peft_d2.register()
    torch.manual_seed(seed)
    return build_model(load_config(str(config)).cfg).eval()


def adapted(methods: list[dict], folder: Path, config: Path = TINY) -> torch.nn.Module:
    model = build(config=config)
    torch.save({"model": model.state_dict()}, folder / "base.pth")
    peft_d2.inject(model, methods, train=HEADS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(0.05 * torch.randn(item.param.shape, generator=generator))
    peft_d2.save_adapter(model, folder / "adapter")
    return model.eval()


def run(folder: Path, *opts: str, config: Path = TINY) -> str:
    arguments = [
        "--config-file",
        str(config),
        "--adapter",
        str(folder / "adapter"),
        "--output",
        str(folder / "merged.pth"),
    ]
    args = merge_parser().parse_args([*arguments, *opts])
    return one_line_errors(lambda: merge_adapter(args))


def predictions(model: torch.nn.Module) -> torch.Tensor:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2)) * 255
    with torch.no_grad():
        found = model([{"image": image, "height": 64, "width": 64}])[0]["instances"]
    return torch.cat([found.scores, found.pred_masks.flatten().float()])


@pytest.mark.parametrize(("config", "method"), [(TINY, LORA), (DINO, OF_DINO)], ids=["mask2former", "mask_dino"])
def test_a_plain_model_with_the_merged_file_gives_the_adapters_outputs(
    tmp_path: Path, config: Path, method: dict
) -> None:
    model = adapted([method], tmp_path, config)
    line = run(tmp_path, "MODEL.WEIGHTS", str(tmp_path / "base.pth"), config=config)
    assert "merged.pth" in line
    plain = build(seed=5, config=config)
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)["model"]
    base = torch.load(tmp_path / "base.pth", weights_only=True)["model"]
    assert list(merged) == list(base) and merged._metadata == base._metadata
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert changed and all(any(part in name for part in ("qkv", "attn", *HEADS)) for name in changed)
    plain.load_state_dict(merged)
    torch.testing.assert_close(predictions(plain), predictions(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predictions(plain), predictions(build(config=config)), atol=1e-3)


def test_the_published_code_takes_the_keys_as_they_are(tmp_path: Path) -> None:
    """It renames keys of modules whose metadata say a version below 2."""
    metadata = build().state_dict()._metadata
    assert metadata["sem_seg_head"]["version"] == metadata["sem_seg_head.predictor"]["version"] == 2


@pytest.mark.parametrize(
    ("methods", "opts", "message"),
    [
        ([{"NAME": "adapter", "TARGETS": ["multihead_attn"], "REDUCTION": 4}], True, "no weight can hold"),
        ([LORA], False, "MODEL.WEIGHTS is empty"),
    ],
)
def test_what_cannot_be_merged_is_one_line(tmp_path: Path, methods: list[dict], opts: bool, message: str) -> None:
    adapted(methods, tmp_path)
    errors = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(errors):
        run(tmp_path, *(("MODEL.WEIGHTS", str(tmp_path / "base.pth")) if opts else ()))
    assert message in errors.getvalue() and errors.getvalue().count("\n") == 1
    assert not (tmp_path / "merged.pth").exists()


def test_a_base_that_was_never_a_file_is_built_again_from_its_seed(tmp_path: Path) -> None:
    """As one of MODEL.TIMM.WEIGHTS and new heads is; the adapter's file tells whether it is the same."""
    peft_d2.register()
    model = factory.build_model(load_config(str(TINY), opts=["SEED", "3"]).cfg)
    peft_d2.inject(model, [LORA], train=HEADS)
    peft_d2.save_adapter(model, tmp_path / "adapter")
    assert "the base of SEED 3" in run(tmp_path, "SEED", "3")
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)["model"]
    plain = build(seed=5)
    plain.load_state_dict(merged)
    torch.testing.assert_close(predictions(plain), predictions(model.eval()), rtol=1e-4, atol=1e-5)
    (tmp_path / "merged.pth").unlink()
    for seed in ("4", "-1"):
        errors = io.StringIO()
        with pytest.raises(SystemExit), contextlib.redirect_stderr(errors):
            run(tmp_path, "SEED", seed)
        assert "MODEL.WEIGHTS is empty" in errors.getvalue() and not (tmp_path / "merged.pth").exists()


def test_merged_again_into_a_folder_whose_name_yaml_writes_otherwise(tmp_path: Path) -> None:
    """A long one with spaces is folded, letters beyond ASCII are escaped: the config there was not known again."""
    merged, base = tmp_path / "m\u00fcnchen " / ("of november " * 9) / "merged.pth", str(tmp_path / "base.pth")
    cfg = load_config(str(TINY), opts=["MODEL.WEIGHTS", base]).cfg
    for _ in range(2):
        beside = convert.merged_place(merged, base, with_config=True)
        written = convert.write_merged(adapted([LORA], tmp_path), cfg, merged, beside)
    assert written == [str(merged), str(merged.with_suffix(".yaml"))]
    merged.with_suffix(".yaml").write_text("MODEL: {WEIGHTS: other.pth}")
    with pytest.raises(ConfigError, match="is of something else and would be written over"):
        convert.merged_place(merged, base, with_config=True)
