"""Exported graphs in the runtime that they are for, against the models in torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2")
pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxruntime")

import evaluate_export
import export
import onnxruntime
import serve_onnx
import torch
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import peft_d2
from peft_d2 import peft
from peft_d2.engine.config import load_config
from peft_d2.models.sam.prompt_encoder import Prompts
from peft_d2.models.seem.vocabulary import ClassVectors

from ..models.conftest import SMALL_EOMT, make_config
from ..tiny_sam import SAM_TINY

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "tests" / "engine"
SIZE = (64, 96)
DINOV3 = "vit_small_patch16_dinov3_qkvb"
LORA = [{"NAME": "lora", "TARGETS": ["qkv", "self_attn.value_proj", "multihead_attn"], "RANK": 2}]


def build(family: str) -> tuple[Any, Any]:
    peft_d2.register()
    torch.manual_seed(0)
    if family == "sam":
        cfg = make_config(
            "", {**SAM_TINY, "MODEL.META_ARCHITECTURE": "PD2SegmentAnything", "MODEL.SAM.MULTIMASK": True}
        )
    elif family == "sam2":
        hiera = {"EMBED_DIM": 16, "DEPTHS": [1, 2, 3, 1], "WINDOW_SIZES": [8, 4, 6, 3], "GLOBAL_BLOCKS": [4, 5]}
        small = {f"MODEL.SAM2.{key}": value for key, value in hiera.items()}
        cfg = make_config("", {**SAM_TINY, **small, "MODEL.META_ARCHITECTURE": "PD2SAM2"})
    elif family == "eomt":
        pytest.importorskip("timm")
        cfg = make_config("eomt/coco/instance_dinov3_small_640.yaml", {**SMALL_EOMT, "MODEL.TIMM.NAME": DINOV3})
    else:
        cfg = load_config(str(ENGINE / f"{family}.yaml")).cfg
    model = build_model(cfg).eval()
    if family == "tiny_seem":
        names = ("cat", "dog", "cow")
        model.set_classes(ClassVectors(names, F.normalize(torch.randn(3, 4, 16), dim=-1), templates=("a", "b", "c")))
    return cfg, model


def run(path: Path, **inputs: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def assert_near(found: Any, expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["tiny", "tiny_mask_dino", "tiny_seem", "eomt"])
def test_mask_classifiers_in_onnxruntime(family: str, tmp_path: Path) -> None:
    cfg, model = build(family)
    export.write(model, cfg, tmp_path / "model.onnx", "onnx", SIZE, with_adapter=False)
    for count in (1, 3):
        image = 255 * torch.rand(count, 3, *SIZE)
        assert_near(run(tmp_path / "model.onnx", image=image), export.RawOutputs(model)(image))


@torch.no_grad()
@pytest.mark.parametrize("family", ["sam", "sam2"])
def test_segment_anything_in_onnxruntime(family: str, tmp_path: Path) -> None:
    cfg, model = build(family)
    files = export.write(model, cfg, tmp_path / "sam.onnx", "onnx", SIZE, with_adapter=False)
    image = 255 * torch.rand(3, 3, 128, 128)
    maps = export.SamImages(model)(image)
    assert_near(run(files[0], image=image), maps)
    first = dict(zip(export.MAPS, (item[:1] for item in maps), strict=False))
    boxes, points, labels = (
        torch.tensor([[10.0, 20, 90, 100]]),
        torch.tensor([[[50.0, 40], [9, 9]]]),
        torch.tensor([[1, 0]]),
    )
    corners, kinds = boxes.reshape(-1, 2, 2), torch.tensor([[2, 3]])
    cases = {  # prompts as the model takes them, and as the graph does
        "a box": (Prompts(boxes=boxes), corners, kinds),
        "points": (
            Prompts(points=(points, labels)),
            torch.cat([points, torch.zeros(1, 1, 2)], 1),
            torch.cat([labels, torch.tensor([[-1]])], 1),
        ),
        "both": (
            Prompts(boxes=boxes, points=(points, labels)),
            torch.cat([points, corners], 1),
            torch.cat([labels, kinds], 1),
        ),
    }
    for prompts, places, what in cases.values():
        if family == "sam2" and prompts.boxes is not None:  # after a box comes a point that is none
            places, what = F.pad(places, (0, 0, 0, 1)), F.pad(what, (0, 1), value=-1)
        expected = model.decode(model.encode(_normed(model, image))[0], prompts, model.multimask)
        assert_near(run(files[1], **first, points=places, labels=what), expected)


def _normed(model: Any, image: Tensor) -> Tensor:
    return (image - model.pixel_mean) / model.pixel_std


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "kind"),
    [("tiny", "torchscript"), ("tiny_mask_dino", "torchscript"), ("tiny", "pt2"), ("tiny_seem", "pt2")],
)
def test_torchs_own_formats(family: str, kind: str, tmp_path: Path) -> None:
    cfg, model = build(family)
    path = tmp_path / "model.pt"
    export.write(model, cfg, path, kind, SIZE, with_adapter=False)
    loaded = torch.jit.load(path) if kind == "torchscript" else torch.export.load(path).module()
    image = 255 * torch.rand(3, 3, *SIZE)
    assert_near(loaded(image), export.RawOutputs(model)(image))


def adapted(folder: Path, seed: int) -> nn.Module:
    model = build("tiny")[1]
    peft_d2.inject(model, LORA, train=["class_embed"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(0.1 * torch.randn(item.param.shape, generator=generator))
    peft_d2.save_adapter(model, folder)
    return model.eval()


def test_the_server_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    """A picture that is none, a graph without its record."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "m.onnx").write_bytes(b"")
    for picture, said in (
        ("a.png", "cannot identify"),
        ("none.png", "No such file"),
        ("b.png", "m.onnx.json beside it"),
    ):
        serve_onnx.Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            serve_onnx.main([str(tmp_path / "m.onnx"), str(tmp_path / picture), "--output", str(tmp_path / "c.png")])


@torch.no_grad()
def test_the_server_refuses_adapters_that_the_graph_is_not_of(tmp_path: Path) -> None:
    """Another alpha or base changes no shape: what was served was noise."""
    cfg = build("tiny")[0]
    export.write(adapted(tmp_path / "first", 1), cfg, tmp_path / "m.onnx", "onnx", (64, 64), with_adapter=True)
    other = adapted(tmp_path / "second", 2)
    for name, value in (("alpha", 3.0), ("base", None)):
        shutil.copytree(tmp_path / "second", tmp_path / name)
        record = json.loads((tmp_path / "second" / "peft_d2.json").read_text())
        if value:
            record["methods"][0]["ALPHA"] = value
        else:
            record["base"]["weights"] = "0" * 64
        (tmp_path / name / "peft_d2.json").write_text(json.dumps(record))
    (tmp_path / "empty").mkdir()
    for name, said in (("alpha", "other methods"), ("base", "another base"), ("empty", "it lacks adapter_model")):
        with pytest.raises(SystemExit, match=f"^error: --adapter .*{name}: .*{said}"):
            serve_onnx.Model(tmp_path / "m.onnx", tmp_path / name)
    export.write(other, cfg, tmp_path / "merged.onnx", "onnx", (64, 64), with_adapter=False)
    with pytest.raises(SystemExit, match="has its adapter merged in and takes no other"):
        serve_onnx.Model(tmp_path / "merged.onnx", tmp_path / "first")


def test_the_server_reads_pictures_as_the_model_does(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone that was held upright
    Image.new("RGB", (8, 4)).save(tmp_path / "phone.jpg", exif=exif)
    assert serve_onnx.read_picture(tmp_path / "phone.jpg").size == (4, 8)
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(SystemExit, match="error: .*deep.png: more than 8 bits a channel"):
        serve_onnx.read_picture(tmp_path / "deep.png")
    for output in ("out.txt", "nowhere/out.png"):
        with pytest.raises(SystemExit, match="error: --output .*expected a picture's name"):
            serve_onnx.main(["m.onnx", str(tmp_path / "phone.jpg"), "--output", str(tmp_path / output)])
    with pytest.raises(SystemExit, match="phone.jpg is the picture that is read"):
        serve_onnx.main(["m.onnx", *[str(tmp_path / "phone.jpg"), "--output"] * 2][:-1])


@torch.no_grad()
def test_adapters_are_swapped_and_served_without_torch(tmp_path: Path) -> None:
    """One graph takes either adapter; a process without torch serves it as Detectron2's predictor would."""
    cfg = build("tiny")[0]
    first, second = adapted(tmp_path / "first", 1), adapted(tmp_path / "second", 2)
    path = tmp_path / "model.onnx"
    export.write(first, cfg, path, "onnx", (64, 64), with_adapter=True)
    image = 255 * torch.rand(1, 3, 64, 64)
    for model, name in ((first, "first"), (second, "second")):
        served = serve_onnx.Model(path, tmp_path / name)
        assert_near(served.run(0, image=image.numpy()), export.RawOutputs(model)(image))
    merged = export.prepared(second)
    assert peft.get_injection(merged).merged  # type: ignore[union-attr]
    assert_near(export.RawOutputs(merged)(image), export.RawOutputs(second)(image))

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    picture.save(tmp_path / "photo.png")
    code = (
        "import sys; sys.path.insert(0, 'tools'); import serve_onnx; serve_onnx.main(sys.argv[1:]); "
        "assert not {'torch', 'detectron2', 'peft_d2'} & sys.modules.keys()"
    )
    arguments = [str(path), str(tmp_path / "photo.png"), "--output", str(tmp_path / "drawn.png")]
    arguments += ["--adapter", str(tmp_path / "second"), "--confidence-threshold", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == cfg.TEST.DETECTIONS_PER_IMAGE and Image.open(
        tmp_path / "drawn.png"
    ).size == (64, 48)

    scores, classes, masks = serve_onnx.Model(path, tmp_path / "second").predict(picture)
    tensor = torch.as_tensor(np.asarray(picture).transpose(2, 0, 1).copy(), dtype=torch.float32)
    (expected,) = second([{"image": F.pad(tensor, (0, 0, 0, 0)), "height": 48, "width": 64}])
    expected = expected["instances"]
    assert np.abs(scores - expected.scores.numpy()).max() < 1e-4
    assert (classes == expected.pred_classes.numpy()).all()
    assert (masks != expected.pred_masks.numpy()).mean() < 1e-3


def test_the_demos_base_has_the_same_ap_in_onnxruntime(tmp_path: Path) -> None:
    """On the demo's pictures, inverted and grey: nuclei are bright then, as the base knows them."""
    pytest.importorskip("timm")
    import run_demo

    from peft_d2.data.registration import register_from_config
    from peft_d2.engine.checkpointer import Checkpointer

    peft_d2.register()
    folder = run_demo.cut("val", 1, tmp_path)
    for file in (folder / "images").iterdir():
        grey = 255.0 - np.asarray(Image.open(file).convert("L"))
        Image.fromarray((1.2 * (grey - 60)).clip(0, 255).astype(np.uint8)).convert("RGB").save(file)
    cfg = load_config(str(ROOT / "configs" / "nuclei" / "efficientnet" / "model.yaml")).cfg
    cfg.DATASETS.REGISTER = [
        {"NAME": "exported", "JSON": str(folder / "annotations.json"), "IMAGES": str(folder / "images")}
    ]
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("exported",), str(tmp_path)
    register_from_config(cfg)
    cfg.MODEL.WEIGHTS = str(ROOT / "peft_d2" / "assets" / "nuclei_base.safetensors")
    model = build_model(cfg).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    side = cfg.INPUT.MIN_SIZE_TEST
    export.write(model, cfg, tmp_path / "model.onnx", "onnx", (side, side), with_adapter=False)
    own, graph = evaluate_export.compare(cfg, tmp_path / "model.onnx")
    assert own["segm"]["AP"] > 15 and abs(graph["segm"]["AP"] - own["segm"]["AP"]) < 0.1


def test_a_graph_that_takes_an_adapter_is_refused_before_a_model_is_built(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.json").write_text('{"adapter_inputs": {"a": "b"}}')
    with pytest.raises(export.ConfigError, match="export it without --adapter-inputs"):
        evaluate_export.compare(None, tmp_path / "model.onnx")


@pytest.mark.parametrize(("shape", "size"), [((8, 6), (32, 24)), ((9, 7), (5, 11)), ((4, 4), (4, 4))])
def test_resizing_is_torchs(shape: tuple[int, int], size: tuple[int, int]) -> None:
    maps = torch.randn(3, *shape)
    expected = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.as_tensor(serve_onnx.resize(maps.numpy(), *size)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["tiny", "tiny_mask_dino", "tiny_seem", "eomt", "sam", "sam2"])
def test_looking_at_a_model_never_raises(family: str) -> None:
    """Tracers ask modules for every attribute."""
    for module in build(family)[1].modules():
        for name in dir(type(module)):
            getattr(module, name, None)  # raises what is no AttributeError


def test_refusals(tmp_path: Path) -> None:
    cfg, model = build("tiny")
    with pytest.raises(export.ConfigError, match="the model has no adapter"):
        export.write(model, cfg, tmp_path / "model.onnx", "onnx", SIZE, with_adapter=True)
    with pytest.raises(export.ConfigError, match="is none of Mask2Former"):
        export.write(nn.Linear(2, 2), cfg, tmp_path / "model.onnx", "onnx", SIZE, with_adapter=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        export.main(["--config-file", str(ENGINE / "tiny.yaml"), "--size", "60", "96", "--output", str(tmp_path / "x")])


def test_what_is_beside_a_graph(tmp_path: Path) -> None:
    cfg, model = build("tiny")
    export.write(model, cfg, tmp_path / "model.pt", "torchscript", SIZE, with_adapter=False)
    record = json.loads((tmp_path / "model.pt.json").read_text())
    assert record["size"] == [64, 96] and record["pad"] == cfg.MODEL.PIXEL_MEAN and record["scores"] == "softmax"
    cfg, model = build("eomt")
    export.write(model, cfg, tmp_path / "model.pt", "torchscript", SIZE, with_adapter=False)
    assert json.loads((tmp_path / "model.pt.json").read_text())["pad"] == [0, 0, 0]  # black, as it was trained
