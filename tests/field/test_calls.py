"""Other people's Python: public names called in odd places and with odd values, a situation a row."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2")

from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import BitMasks, Boxes, Instances  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2 import peft  # noqa: E402
from peft_d2.data.images import DatasetError  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.models.checks import ModelConfigError  # noqa: E402
from peft_d2.models.sam.prompt_encoder import PromptError  # noqa: E402
from peft_d2.storage import CheckpointError, StorageError  # noqa: E402
from peft_d2.storage.adapter_file import AdapterFileError  # noqa: E402

from .conftest import ROOT  # noqa: E402

LORA = [{"NAME": "lora", "RANK": 2, "TARGETS": ["0"]}]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of :func:`net`."""
    peft_d2.inject(model := net(), LORA, ["2"])
    for item in peft.trained_parameters(model):
        item.param.data.normal_()
    peft_d2.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


INFERENCE: dict[str, Callable[[nn.Module, Path], Any]] = {
    "inject": lambda model, _: peft_d2.inject(model, LORA, ["2"]),
    "load_adapter": lambda model, folder: peft_d2.load_adapter(model, folder),
    "load_adapters": lambda model, folder: peft_d2.load_adapters(model, {"a": folder, "b": folder}),
    "add_adapter": lambda model, _: (peft_d2.inject(model, LORA, ["2"]), peft.add_adapter(model, "a")),
    "remove": lambda model, folder: (peft_d2.load_adapter(model, folder), peft.remove(model)),
}


@pytest.mark.parametrize("name", INFERENCE)
def test_what_is_made_within_inference_mode_can_be_trained(name: str, folder: Path) -> None:
    model = net()
    with torch.inference_mode():
        INFERENCE[name](model, folder)
    injection = peft.get_injection(model)
    if injection is not None and "a" in injection.adapters:
        peft_d2.set_adapter(model, "a")
    if name == "remove":
        model.requires_grad_(True)
    model(torch.randn(2, 4)).sum().backward()
    trained = [value for value in model.parameters() if value.requires_grad]
    assert len(trained) == 4 and all(value.grad is not None for value in trained)


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_that_was_made_within_inference_mode_predicts(
    inside: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft_d2.load_adapter(expected := net(), folder)
    with torch.inference_mode():
        model = net()
    with torch.inference_mode(inside), torch.no_grad(), caplog.at_level(logging.WARNING):
        peft_d2.load_adapter(model, folder)
        assert torch.equal(model(torch.ones(1, 4)), expected(torch.ones(1, 4)))
    assert "it can predict, and never be trained" in caplog.text


def few(name: str, *opts: str) -> CfgNode:
    return load_config(str(ROOT / "tests" / "engine" / name), opts=["MODEL.DEVICE", "cpu", *opts]).cfg


BATCHES: list[tuple[Any, str]] = [
    ([], "the batch is empty"),
    ({"image": torch.zeros(3, 64, 64)}, r"a list of dicts with an 'image' .* got dict: model\(\["),
    (torch.zeros(1, 3, 64, 64), "got Tensor"),
    ([torch.zeros(3, 64, 64)], "got list of others"),
    (None, "got NoneType"),
]


PIXELS = {
    "NaN or infinite in part": torch.zeros(3, 64, 64).index_fill(2, torch.tensor([5]), float("nan")),
    "bool": torch.zeros(3, 64, 64, dtype=torch.bool),
    "empty": torch.zeros(3, 0, 64),
}


@pytest.mark.parametrize("said", PIXELS)
def test_pixels_that_no_image_has(said: str) -> None:
    peft_d2.register()
    model = build_model(few("tiny.yaml")).eval()
    with pytest.raises(DatasetError, match=f"b.png: the image .* is {said}"):
        model([{"image": PIXELS[said], "file_name": "b.png"}])


def labelled(label: int, **others: Any) -> dict[str, Any]:
    """A sample of one object, as any mapper gives it."""
    objects = Instances((64, 64))
    objects.gt_classes, objects.gt_boxes = torch.tensor([label]), Boxes(torch.tensor([[3.0, 4.0, 20.0, 30.0]]))
    objects.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    return {"image": torch.zeros(3, 64, 64), "instances": objects, "file_name": "b.png", **others}


LABELS: dict[str, Callable[[], dict[str, Any]]] = {
    r"gt_classes holds the class 7, but the model has 7, 0 to 6: set MODEL.SEM_SEG_HEAD": lambda: labelled(7),
    "gt_classes holds the class -1, but": lambda: labelled(-1),
    "sem_seg holds the class 99, but": lambda: {
        "image": torch.zeros(3, 64, 64),
        "sem_seg": torch.full((64, 64), 99).fill_diagonal_(255),
        "file_name": "b.png",
    },
    "gt_classes is on the meta device": lambda: labelled(0, instances=labelled(0)["instances"].to("meta")),
    "image is on the meta device": lambda: labelled(0, image=torch.zeros(3, 64, 64, device="meta")),
}


@pytest.mark.parametrize("said", LABELS)
def test_classes_and_values_that_the_model_does_not_have(said: str) -> None:
    peft_d2.register()
    model = build_model(few("tiny.yaml", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7")).train()
    assert all(loss.isfinite() for loss in model([labelled(6)]).values())
    with pytest.raises(DatasetError, match=rf"b\.png: (the )?{said}"):
        model([LABELS[said]()])


@pytest.mark.parametrize("name", ["mask2former", "sam"])
@pytest.mark.parametrize(("batch", "said"), BATCHES, ids=[said for _, said in BATCHES])
def test_what_is_no_batch(name: str, batch: Any, said: str) -> None:
    peft_d2.register()
    cfg = few("tiny.yaml")
    if name == "sam":
        tiny_sam(cfg)
    model = build_model(cfg)
    with pytest.raises(DatasetError, match=said):
        model.train()(batch)
    if batch == []:
        assert model.eval()(batch) == []
    else:
        with pytest.raises(DatasetError, match=said):
            model.eval()(batch)


def tiny_sam(cfg: CfgNode) -> None:
    sizes = "IMAGE_SIZE: 64, EMBED_DIM: 32, DEPTH: 1, NUM_HEADS: 2, GLOBAL_BLOCKS: [0], OUT_CHANNELS: 32"
    cfg.MODEL.META_ARCHITECTURE = "PD2SegmentAnything"
    cfg.MODEL.SAM.merge_from_other_cfg(CfgNode.load_cfg(f"{{{sizes}, DECODER_MLP_DIM: 32, IOU_HEAD_HIDDEN: 32}}"))


def boxes(**others: Any) -> dict[str, Any]:
    return {"image": torch.full((3, 37, 53), 90.0), "boxes": torch.tensor([[3.0, 4.0, 20.0, 30.0]]), **others}


PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({"box": torch.ones(1, 4)}, "'box' is no prompt here, 'boxes' is"),
    ({"box_scores": torch.ones(2)}, "box_scores are 2, and there are 1 prompts"),
    ({"box_classes": [1, 2]}, "box_classes are 2, and there are 1 prompts"),
    ({"image": torch.zeros(3, 37, 53).numpy()}, "the image is a ndarray, expected a tensor"),
    ({"boxes": "3 4 20 30"}, "boxes are no tensor, array or lists of equal lengths"),
    ({"boxes": [torch.ones(4)]}, "boxes are no tensor.*: stack tensors"),
    ({"boxes": torch.ones(1, 4).bool()}, "boxes are torch.bool, expected numbers in pixels"),
    (
        {"point_coords": [[[3, 4]], [[3, 4], [5, 6]]], "point_labels": [[1], [1, 0]]},
        "point_coords are no .*lists of equal lengths.*fill up .* points whose label is -1",
    ),
    ({"mask_inputs": torch.ones(1, 1, 16, 16).bool()}, "mask_inputs are torch.bool, and expected are logits"),
    ({"mask_inputs": torch.ones(1, 1, 16, 16).byte()}, "mask_inputs are torch.uint8, and expected are logits"),
    ({"boxes": torch.ones(1, 4, device="meta")}, "boxes are on the meta device and have no values"),
    ({"point_coords": torch.tensor([[[3, 4]]]), "point_labels": torch.tensor([[True]])}, ""),
]


@pytest.fixture(scope="module")
def sam() -> nn.Module:
    peft_d2.register()
    tiny_sam(cfg := few("tiny.yaml"))
    return build_model(cfg).eval()


@pytest.mark.parametrize(("prompts", "said"), PROMPTS, ids=[said for _, said in PROMPTS])
def test_prompts_that_are_taken_or_named(prompts: dict[str, Any], said: str, sam: nn.Module) -> None:
    if not said:
        wanted = {**prompts, "point_labels": prompts["point_labels"].long()}
        found, expected = (sam([boxes(**more)])[0]["instances"] for more in (prompts, wanted))
        assert torch.equal(found.pred_masks, expected.pred_masks)
        return
    with pytest.raises((PromptError, DatasetError), match=said):
        sam([boxes(**prompts)])


SHARES: list[tuple[dict[str, Any], str]] = [
    ({"boxes": torch.tensor([[0.1, 0.2, 0.5, 0.7]])}, r"c.png: all boxes lie in 0..1, as \[0.1, 0.2, 0.5, 0.7\],"),
    ({"boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]])}, "multiply x by 53 and y by 37"),
    ({"point_coords": torch.tensor([[[0.3, 0.4]]]), "point_labels": torch.ones(1, 1)}, "all point_coords lie in 0..1"),
    ({"boxes": torch.tensor([[0.1, 0.2, 0.5, 0.7], [3.0, 4.0, 20.0, 30.0]])}, ""),
    ({"point_coords": torch.tensor([[[0.0, 1.0]]]), "point_labels": torch.ones(1, 1)}, ""),
]


@pytest.mark.parametrize(("prompts", "said"), SHARES)
def test_prompts_that_are_shares_of_the_image(
    prompts: dict[str, Any],
    said: str,
    sam: nn.Module,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())
    for _ in range(2):  # said once
        sam([{"image": torch.zeros(3, 37, 53), "file_name": "c.png", **prompts}])
    assert len(caplog.messages) == bool(said) and re.search(said, caplog.text)


@pytest.mark.parametrize(("kind", "error"), [(torch.float64, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_a_whole_model_in_another_precision(kind: torch.dtype, error: float, sam: nn.Module) -> None:
    expected, found = (m([boxes()])[0]["instances"] for m in (sam, copy.deepcopy(sam).to(kind)))
    torch.testing.assert_close(found.scores.double(), expected.scores.double(), rtol=0, atol=error)
    former = build_model(few("tiny.yaml")).eval().to(kind)
    with pytest.raises(ModelConfigError, match=rf"computes in float32, .* {kind}: keep the model in float32"):
        former([boxes()])


def test_a_decoder_of_another_package_under_our_head() -> None:
    peft_d2.register()
    cfg = few("tiny.yaml", "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder")
    with pytest.raises(ModelConfigError, match=r"NAME: 'Standard.* TRANSFORMER_DECODER_REGISTRY.register\(the_class\)"):
        build_model(cfg)


NAMES: list[tuple[Any, str]] = [
    ("day/night", "expected letters, digits, _ and -, such as 'day_night'$"),
    ("a.b", "such as 'a_b'$"),
    ("", "letters, digits, _ and -$"),
    (None, "letters, digits, _ and -$"),
    ("train", "torch's modules have an attribute of that name; choose another, such as 'train_1'$"),
    ("base", "names the base itself, without an adapter: choose another name$"),
]


@pytest.mark.parametrize(("name", "said"), NAMES)
def test_names_that_no_adapter_can_have(name: Any, said: str, folder: Path) -> None:
    peft_d2.inject(model := net(), LORA, ["2"])
    for call in (
        lambda: peft_d2.inject(net(), LORA, name=name),
        lambda: peft.add_adapter(model, name),
        lambda: peft_d2.load_adapter(net(), folder, name=name),
        lambda: peft_d2.load_adapter(model, folder, name=name),
    ):
        with pytest.raises(peft.InjectionError, match=said) as error:
            call()
        assert "inject the model as" not in str(error.value)
    unknown = rf"there is no adapter {name!r}; this model has 'default'. load_adapter\(model, folder, name=...\)"
    with pytest.raises(peft.InjectionError, match=unknown):
        peft_d2.set_adapter(model, name)
    if name == "":
        with pytest.raises(peft.InjectionError, match=unknown):
            peft_d2.save_adapter(model, folder.parent / "other", name=name)


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sum()


EMPTY: dict[str, tuple[str, Callable[[nn.Module, Path], Any]]] = {
    "save_adapter": ("saving", lambda model, folder: peft_d2.save_adapter(model, folder)),
    "save_merged": ("merging", lambda model, folder: peft_d2.save_merged(model, folder / "merged.pth")),
    "merge": ("merging", lambda model, _: peft_d2.merge(model)),
    "prove_live": ("prove_live", lambda model, _: peft_d2.prove_live(model, torch.ones(1, 4))),
}


@pytest.mark.parametrize("part", ["0.weight", "0.peft.default.lora.lora_a", "2.weight"])
@pytest.mark.parametrize("name", EMPTY)
def test_a_model_part_of_which_has_no_values(name: str, part: str, tmp_path: Path) -> None:
    what, call = EMPTY[name]
    peft_d2.inject(model := net(), LORA, ["2"])
    owner, _, leaf = part.rpartition(".")
    value = model.get_parameter(part)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value.detach().to("meta"), value.requires_grad))
    with pytest.raises(peft.InjectionError, match=rf"the meta device \({part} has no values\), and {what} needs them"):
        call(model, tmp_path)
    assert not list(tmp_path.iterdir())


UNFIT: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "no parameters": (nn.ReLU, torch.ones(1, 4), "no parameter of the model is trained"),
    "nothing trained": (lambda: net().requires_grad_(False), torch.ones(1, 4), "no parameter of the model is trained"),
    "no values": (lambda: net().to("meta"), torch.ones(1, 4), r"on the meta device \(0.weight has no values\)"),
    "no model": (lambda: None, torch.ones(1, 4), "expected the model, an nn.Module, got NoneType"),
    "no batch": (net, [], "the batch is empty"),
}


@pytest.mark.parametrize("budget", [1, "auto", None])
@pytest.mark.parametrize("name", UNFIT)
def test_steps_that_cannot_be_measured(name: str, budget: Any) -> None:
    make, batch, said = UNFIT[name]
    with pytest.raises(peft.InjectionError, match=said):
        peft_d2.fit_memory(make(), batch, budget, forward=losses)


@pytest.mark.parametrize(("rank", "said"), [(4, ""), (64, "as 64 for 0, whose shorter side is 4: a smaller one")])
def test_ranks_that_no_change_of_the_weight_has(rank: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        peft_d2.inject(net(), [{**LORA[0], "RANK": rank}])
    assert said in caplog.text and bool(said) == bool(caplog.records)


def trained(classes: int, folder: Path) -> tuple[nn.Module, Tensor]:
    """A model of that many classes with an adapter that was moved and saved, and what it gives."""
    model = net()
    model[2] = nn.Linear(8, classes)
    peft_d2.inject(model, LORA, ["2"])
    for item in peft.trained_parameters(model):
        item.param.data.normal_()
    peft_d2.save_adapter(model, folder)
    return model, model(torch.ones(1, 4))


def test_an_adapter_of_another_class_count_is_saved_as_it_was_and_merged_alone(tmp_path: Path) -> None:
    expected = trained(5, tmp_path / "five")[1]
    trained(3, tmp_path / "three")
    served = net()
    peft_d2.load_adapters(served, {"five": tmp_path / "five", "three": tmp_path / "three"})
    peft_d2.set_adapter(served, "five")
    peft_d2.save_adapter(served, tmp_path / "again")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    peft_d2.load_adapter(model, tmp_path / "again")
    assert torch.equal(model(torch.ones(1, 4)), expected)
    peft_d2.save_merged(served, tmp_path / "merged.pth")
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    assert torch.load(tmp_path / "merged.pth")["model"].keys() == plain.state_dict().keys()
    peft_d2.load_base(plain, tmp_path / "merged.pth")
    torch.testing.assert_close(plain(torch.ones(1, 4)), expected)


RGB = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]")
OTHER_PIXELS: list[tuple[tuple[str, ...], list[str]]] = [
    (RGB, []),
    ((*RGB, "INPUT.FORMAT", "BGR"), ["with INPUT.FORMAT RGB, and this model takes images with BGR"]),
    ((*RGB, "MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"), [r"with MODEL.PIXEL_MEAN \[123.675, 116.28, 103.53\]"]),
    ((*RGB, "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"), [r"PIXEL_STD .*takes images with \[1.0, 1.0, 1.0\]"]),
]


@pytest.mark.parametrize(("pairs", "said"), OTHER_PIXELS, ids=["same", "format", "mean", "std"])
def test_an_adapter_of_other_pixels(
    pairs: tuple[str, ...], said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft_d2.register()
    trained, other = (build_model(few("tiny.yaml", *own)) for own in (RGB, pairs))
    peft_d2.inject(trained, [{"NAME": "lora", "RANK": 2, "TARGETS": ["backbone.*.qkv"]}])
    peft_d2.save_adapter(trained, tmp_path / "a")
    peft_d2.load_adapter(other if said else other.half(), tmp_path / "a", allow_other_base=True)
    found = [message for message in caplog.messages if "was trained with" in message]
    assert len(found) == len(said) and all(map(re.search, said, found))


def test_derivatives_in_forward_mode() -> None:
    """Also where there are many rows, which a CPU computes with the changed weight."""
    peft_d2.inject(model := net(), LORA)
    for item in peft.trained_parameters(model):
        item.param.data.normal_()
    x, along = torch.randn(64, 4), torch.randn(64, 4)
    _, found = torch.func.jvp(model, (x,), (along,))
    jacobian = torch.func.vmap(torch.func.jacrev(model))(x)
    torch.testing.assert_close(found, torch.einsum("noi,ni->no", jacobian, along), rtol=1e-4, atol=1e-5)


def test_what_is_no_table_of_weights() -> None:
    peft_d2.inject(model := net(), LORA)
    with pytest.raises(peft.InjectionError, match=r"cannot combine \['default'\].* expected \{name: weight, ...\}"):
        peft.combine_adapters(model, ["default"], "c")  # type: ignore[arg-type]


def nested(model: nn.Module, *keys: str) -> Any:
    content: Any = model.state_dict()
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(8, 4)}}}}
    return content


@pytest.mark.parametrize(
    "keys", [("net",), ("ema",), ("params",), ("ema", "module"), ("checkpoint", "model"), ("state_dict_ema",), ("any",)]
)
def test_state_dicts_within_other_dicts(keys: tuple[str, ...], tmp_path: Path) -> None:
    torch.save(nested(expected := net(1), *keys), tmp_path / "base.pth")
    peft_d2.load_base(model := net(), tmp_path / "base.pth")
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("key", "said"), [("model_ema", True), ("state_dict_ema", True), ("schema", False)])
def test_averaged_weights_beside_others_are_named(
    key: str, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": (expected := net(1)).state_dict(), key: net(2).state_dict()}, tmp_path / "base.pth")
    with caplog.at_level("WARNING"):
        peft_d2.load_base(model := net(), tmp_path / "base.pth")
    assert (f"also holds {key!r}, averaged weights, which are not taken" in caplog.text) == said
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


def test_files_that_hold_no_whole_state_dict(tmp_path: Path) -> None:
    for name in ("model.safetensors.index.json", "hub/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    torch.jit.save(torch.jit.script(net()), tmp_path / "script.pt")
    for name, said in (
        (
            "model.safetensors.index.json",
            "lists the parts of a checkpoint that was saved in several: put them into one",
        ),
        ("hub", "that of a model of the hub: give .*hub/model.safetensors"),
        ("script.pt", "it is a TorchScript program, not weights"),
    ):
        with pytest.raises(CheckpointError, match=said):
            peft_d2.load_base(net(), tmp_path / name)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model, expected = trained(3, tmp_path / "first")
    torch.save(net().state_dict(), tmp_path / "base.pth")
    peft_d2.save_adapter(model, "~/second")
    peft_d2.load_base(again := net(), "~/base.pth")
    again[2] = nn.Linear(8, 3)
    again[2].load_state_dict(peft.remove(copy.deepcopy(model))[2].state_dict())
    peft_d2.load_adapter(again, Path("~/second"))
    assert torch.equal(again(torch.ones(1, 4)), expected) and not (tmp_path / "~").exists()


def test_what_was_frozen_after_the_injection_is_not_live() -> None:
    peft_d2.inject(model := net(), LORA, ["2"])
    model.requires_grad_(False)
    with pytest.raises(peft.LivenessError, match=r"requires_grad_\(False\) or its like came after inject"):
        peft_d2.prove_live(model, torch.randn(2, 4))


def test_a_folder_that_is_none() -> None:
    with pytest.raises(AdapterFileError, match="None: it is no path"):
        peft_d2.load_adapter(net(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["s3://bucket/a", "hdfs:///a", "https://example.org/a"])
def test_files_are_not_written_to_addresses(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They went into a folder called "s3:" below the current one."""
    monkeypatch.chdir(tmp_path)
    peft_d2.inject(model := net(), LORA, ["2"])
    for call in (peft_d2.save_adapter, peft_d2.save_merged):
        with pytest.raises(StorageError, match=f"{address}.* is an address"):
            call(model, address + ("" if call is peft_d2.save_adapter else ".pth"))
    assert not list(tmp_path.iterdir())


class Sized(nn.Module):
    """The tensors of Detectron2's Keypoint R-CNN and of PointRend whose sizes follow the number of classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.keypoint_head, self.coarse_head, self.point_head = nn.Module(), nn.Module(), nn.Module()
        self.keypoint_head.score_lowres = nn.ConvTranspose2d(4, classes, 4)
        self.coarse_head.prediction = nn.Linear(4, 49 * classes)
        self.point_head.fc1 = nn.Conv1d(4 + classes, 4, 1)
        self.point_head.predictor = nn.Conv1d(4 + classes, classes, 1)


def test_heads_whose_sizes_follow_the_classes_start_anew(tmp_path: Path) -> None:
    torch.save(Sized(17).state_dict(), tmp_path / "base.pth")
    report = peft_d2.load_base(Sized(5), tmp_path / "base.pth")
    anew = {name.rpartition(".")[0] for name, *_ in report.reinitialised}
    assert anew == {"keypoint_head.score_lowres", "coarse_head.prediction", "point_head.fc1", "point_head.predictor"}
    assert {"backbone.weight", "point_head.fc1.bias"} <= set(report.loaded)


def test_figures_of_each_class_are_stored_with_the_adapter(tmp_path: Path) -> None:
    """As arrays, too, as evaluators keep them: a training of hours ended in an error about them."""
    peft_d2.inject(model := net(), LORA, ["2"])
    given = {"AP": torch.tensor(0.5), "of classes": np.array([0.25, np.nan]), "counts": torch.tensor([[1, 2]])}
    peft_d2.save_adapter(model, tmp_path / "a", metrics=given)
    found = peft_d2.load_adapter(net(), tmp_path / "a").metrics
    assert found == {"AP": 0.5, "of classes": [0.25, None], "counts": [[1, 2]]}
