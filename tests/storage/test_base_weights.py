"""Reading checkpoints of every usual form, and loading them with every difference named."""

from __future__ import annotations

import argparse
import collections
import gzip
import logging
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft_d2 import adapters, peft
from peft_d2.storage import CheckpointError, load_base, read_checkpoint

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.half": torch.ones(2, dtype=torch.float16),
    "a.count": torch.tensor(7),
    "a.empty": torch.zeros(0, 3),
}


def arrays(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in state.items()}


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


PICKLED = {
    "zoo": {"model": arrays(STATE), "__author__": "third party", "matching_heuristics": True},
    "plain arrays": arrays(STATE),
    "tensors": {"model": collections.OrderedDict(STATE), "__author__": "x", "epoch": 3},
    "module prefix": {"model": prefixed("module.", arrays(STATE))},
    "fortran and big-endian": {
        "model": {n: np.array(v, dtype=v.dtype.newbyteorder(">"), order="F") for n, v in arrays(STATE).items()}
    },
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", PICKLED)
def test_pickles_are_read(tmp_path: Path, form: str, protocol: int) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(PICKLED[form], protocol=protocol))
    checkpoint = read_checkpoint(tmp_path / "x.pkl")
    assert_equal(checkpoint.state)
    if form == "zoo":
        assert checkpoint.metadata == {"__author__": "third party", "matching_heuristics": True}


def assert_equal(state: dict[str, torch.Tensor]) -> None:
    assert state.keys() == STATE.keys()
    for name, value in STATE.items():
        assert torch.equal(state[name], value) and state[name].dtype == value.dtype


def test_a_python_2_pickle_is_read(tmp_path: Path) -> None:
    """Caffe2's files come from Python 2: array bytes are text there, to be read as latin1."""
    raw = np.array([1.5, -2.25], dtype="<f4").tobytes().decode("latin1")
    text = pickle.dumps({"conv1_w": "RAW", "conv1_w_momentum": "RAW"}, protocol=2)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x02tcnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + raw.encode("latin1") + b"tb"
    )
    assert text.startswith(b"\x80\x02")
    body = b"\x80\x02}(U\x07conv1_w" + array + b"U\x10conv1_w_momentum" + array + b"u."
    (tmp_path / "x.pkl").write_bytes(body)
    checkpoint = read_checkpoint(tmp_path / "x.pkl")
    assert checkpoint.metadata["__author__"] == "Caffe2"
    assert {n: v.tolist() for n, v in checkpoint.state.items()} == {"conv1_w": [1.5, -2.25]}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nest", ["", "model", "state_dict"])
def test_torch_files_are_read(tmp_path: Path, nest: str, legacy: bool) -> None:
    content = {nest: STATE, "iteration": 5, "args": argparse.Namespace(lr=1e-4)} if nest else STATE
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert_equal(read_checkpoint(tmp_path / "x.pth").state)
    with torch.device("meta"):  # as a model is built of which the structure alone is asked
        assert_equal(read_checkpoint(tmp_path / "x.pth").state)


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert_equal(read_checkpoint(tmp_path / "x.safetensors").state)


def write(path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(STATE, path)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": arrays(STATE)}))
    else:
        torch.save({"model": STATE}, path)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(CheckpointError, match=f"there is no checkpoint .*weights{suffix}"):
        read_checkpoint(path)
    write(path)
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"cannot read the checkpoint .*weights{suffix}"):
            read_checkpoint(path)
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(CheckpointError, match=f"cannot read the checkpoint .*weights{suffix}"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{}, {"model": {}}, [1, 2], {"epoch": 3}, {"model": {"a": "text"}}])
def test_a_file_without_tensors_is_named(tmp_path: Path, content: Any) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"x\.pkl holds (no tensors|a list)"):
        read_checkpoint(tmp_path / "x.pkl")


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 4)
        self.norm0 = nn.LayerNorm(4)


class Predictor(nn.Module):
    def __init__(self, classes: int, queries: int) -> None:
        super().__init__()
        self.class_embed = nn.Linear(4, classes + 1)
        self.query_feat = nn.Embedding(queries, 4)


class Criterion(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("empty_weight", torch.ones(classes + 1))


class Model(nn.Module):
    """The names of a Mask2Former, a few of each kind."""

    def __init__(self, classes: int = 80, queries: int = 10) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.predictor = Predictor(classes, queries)
        self.again = self.predictor.class_embed  # one module under two names
        self.criterion = Criterion(classes)


def saved(tmp_path: Path, state: dict[str, Any]) -> str:
    torch.save({"model": state}, tmp_path / "base.pth")
    return str(tmp_path / "base.pth")


def test_a_whole_file_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, model = Model(), Model()
    with caplog.at_level(logging.INFO):
        report = load_base(model, saved(tmp_path, prefixed("module.", source.state_dict())))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    assert not report.unexpected and not report.initial and not report.reinitialised and not report.backbone
    assert "9 tensors loaded" not in caplog.text and f"{len(model.state_dict())} tensors loaded" in caplog.text


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "module.",
        "_orig_mod.",
        "student.",
        "ema.",
        "net.",
        "module.model.",
        "_orig_mod.module.",
        "segmentor.x.",
    ],
)
@pytest.mark.parametrize("part", ["whole", "backbone"])
def test_what_a_training_program_put_before_the_names_is_removed(tmp_path: Path, prefix: str, part: str) -> None:
    source, model = Model(), Model()
    inner = source.state_dict() if part == "whole" else source.backbone.state_dict()
    report = load_base(model, saved(tmp_path, prefixed(prefix, inner)))
    assert torch.equal(model.backbone.stem.weight, source.backbone.stem.weight)
    assert report.backbone == ("" if part == "whole" else "backbone.") and not report.unexpected
    others = prefix.removeprefix("_orig_mod.").removeprefix("module.")  # these two are torch's own
    assert not others or repr(others) in str(report)


def test_of_several_networks_in_a_file_the_students_is_taken(tmp_path: Path) -> None:
    student, teacher, model = Model(), Model(), Model()
    state = {**prefixed("teacher.", teacher.state_dict()), **prefixed("student.", student.state_dict())}
    report = load_base(model, saved(tmp_path, state))
    assert torch.equal(model.backbone.stem.weight, student.backbone.stem.weight) and report.removed == "student."
    load_base(model, saved(tmp_path, prefixed("teacher.", teacher.state_dict()) | {"student.x": torch.ones(1)}))
    assert torch.equal(model.backbone.stem.weight, teacher.backbone.stem.weight)


def test_a_models_own_child_of_such_a_name_is_none(tmp_path: Path) -> None:
    source, model = (nn.ModuleDict({"model": Backbone(), "stem": nn.Linear(2, 4)}) for _ in range(2))
    assert load_base(model, saved(tmp_path, source.state_dict())).removed == ""
    assert torch.equal(model["model"].stem.weight, source["model"].stem.weight)


def test_names_that_have_nothing_in_common_are_shown_of_both_sides(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)the model has: .*backbone.*the file has: decoder\.y, encoder\.x"):
        load_base(Model(), saved(tmp_path, {"encoder.x": torch.ones(1), "decoder.y": torch.ones(1)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float, kind: torch.dtype) -> None:
    model, state = Model(), {name: v.to(kind) for name, v in Model().state_dict().items()}
    state["backbone.stem.weight"][1, 1] = value
    before = model.backbone.stem.bias.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"base\.pth holds NaN or infinity: 1 of 8 values of backbone\.stem\.weight"
    ):
        load_base(model, saved(tmp_path, state))
    assert torch.equal(model.backbone.stem.bias, before)
    state = {**Model().state_dict(), "criterion.empty_weight": torch.full((81,), value)}
    if value == value:  # masks of attention hold infinity
        load_base(model, saved(tmp_path, state))
    else:
        with pytest.raises(CheckpointError, match=r"81 of 81 values of criterion\.empty_weight"):
            load_base(model, saved(tmp_path, state))


def test_an_adapter_or_a_folder_as_base_weights_is_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    base, run = saved(tmp_path, model.state_dict()), tmp_path / "run"
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["0"], "RANK": 1}])
    adapters.save_adapter(model, run / "adapter_final")
    told = r"adapter.*MODEL\.PEFT\.WEIGHTS"
    for path in (run / "adapter_final", run / "adapter_final" / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=told):
            load_base(model, path)
    with pytest.raises(CheckpointError, match=rf"that of a run: give {run}/adapter_final"):
        load_base(model, run)
    with pytest.raises(
        adapters.AdapterFileError, match=rf"folder of a run, not of an adapter.*give {run}/adapter_final"
    ):
        adapters.load_adapter(model, run)
    for wrong, message in ((base, "it is a file, not"), ("", "empty"), ("n" * 300, "File name too long")):
        with pytest.raises(adapters.AdapterFileError, match=message):
            adapters.load_adapter(model, wrong)
    with pytest.raises(CheckpointError, match="File name too long"):
        load_base(model, "n" * 300)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".bin"])
def test_every_flipped_bit_of_a_base_is_found_or_harmless(tmp_path: Path, suffix: str) -> None:
    """200 bits of a file of torch: each is refused by name, or nothing else is loaded."""
    state = {name: torch.randn(7, 5) for name in "abcd"}
    path, chance = tmp_path / f"x{suffix}", random.Random(0)
    torch.save({"model": state}, path)
    whole, harmless = path.read_bytes(), 0
    for _ in range(200):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            found = read_checkpoint(path).state
        except CheckpointError as error:
            assert path.name in str(error)
            continue
        harmless += 1
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert harmless < 150


def test_one_of_two_names_of_a_tensor_is_enough(tmp_path: Path) -> None:
    source, model = Model(), Model()
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("again")}
    load_base(model, saved(tmp_path, state))
    assert torch.equal(model.again.weight, source.again.weight)


def test_a_head_of_another_class_count_keeps_its_initial_values(tmp_path: Path) -> None:
    source, model = Model(classes=80), Model(classes=2)
    before = model.predictor.class_embed.weight.detach().clone()
    report = load_base(model, saved(tmp_path, source.state_dict()))
    assert torch.equal(model.predictor.class_embed.weight, before)
    assert torch.equal(model.backbone.stem.weight, source.backbone.stem.weight)
    assert ("predictor.class_embed.weight", (81, 4), (3, 4)) in report.reinitialised
    assert "criterion.empty_weight (81,) -> (3,)" in str(report)


QUERIES, CLASSES = "predictor.query_feat.weight", "predictor.class_embed.weight"


@pytest.mark.parametrize(
    ("leave", "add", "message"),
    [
        ([QUERIES], {}, r"1 tensors .* not in the file: predictor\.query_feat\.weight"),
        ([], {QUERIES: torch.ones(20, 4)}, r"query_feat\.weight \(20, 4\) -> \(10, 4\)"),
        ([], {CLASSES: torch.ones(81, 8)}, r"class_embed\.weight \(81, 8\) -> \(81, 4\)"),
        (list(Model().state_dict()), {"other": torch.ones(1)}, "no tensor of the model"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    tmp_path: Path, leave: list[str], add: dict[str, torch.Tensor], message: str
) -> None:
    model = Model()
    state = {name: value for name, value in Model().state_dict().items() if name not in leave} | add
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_base(model, saved(tmp_path, state))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_too_much_is_named(tmp_path: Path) -> None:
    state = {**Model().state_dict(), "extra.weight": torch.ones(1), "pixel_mean": torch.ones(3)}
    assert load_base(Model(), saved(tmp_path, state)).unexpected == ["extra.weight"]


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_backbone_file_is_accepted_with_one_line(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = Backbone(), Model()
    state = {name: value for name, value in source.state_dict().items() if "norm0" not in name}
    with caplog.at_level(logging.INFO):
        report = load_base(model, saved(tmp_path, prefixed(prefix, state)))
    assert report.backbone == "backbone." and torch.equal(model.backbone.stem.weight, source.stem.weight)
    assert caplog.text.count("\n") == 1 and "backbone alone" in caplog.text
    del state["stem.bias"]
    with pytest.raises(CheckpointError, match=r"backbone\.stem\.bias"):
        load_base(Model(), saved(tmp_path, prefixed(prefix, state)))


def test_a_caffe2_backbone_gets_detectron2s_names(tmp_path: Path) -> None:
    from peft_d2.storage.checkpoint import from_caffe2

    names = ("conv1_w", "res_conv1_bn_s", "res_conv1_bn_b", "res2_0_branch1_w", "res4_22_branch2c_bn_b", "fc1000_w")
    found = from_caffe2({name: torch.ones(2) for name in names})
    assert set(found) == {
        "stem.conv1.weight", "stem.conv1.norm.weight", "stem.conv1.norm.bias", "stem.conv1.norm.running_mean",
        "stem.conv1.norm.running_var", "res2.0.shortcut.weight", "res4.22.conv3.norm.bias", "fc1000_w",
    }  # fmt: skip
    assert found["stem.conv1.norm.running_mean"].tolist() == [0, 0]


def test_a_models_own_upgrade_comes_first(tmp_path: Path) -> None:
    class Upgraded(Model):
        def upgrade_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name.replace("old_query", "query_feat"): value for name, value in state.items()}

    source, model = Model(), Upgraded()
    state = {name.replace("query_feat", "old_query"): value for name, value in source.state_dict().items()}
    load_base(model, saved(tmp_path, state))
    assert torch.equal(model.predictor.query_feat.weight, source.predictor.query_feat.weight)


class Head(nn.Module):
    """Renames the tensors of its first version, as heads of PointRend and of the official Mask2Former do."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") is None or metadata["version"] < 2:
            for key in [key for key in state if key.startswith(prefix)]:
                state[key.replace(prefix, f"{prefix}inner.", 1)] = state.pop(key)
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Hooked(nn.Module):
    """The same by torch's hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_load_state_dict_pre_hook(self.rename)

    forward = Head.forward

    @staticmethod
    def rename(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        for leaf in ("weight", "bias"):
            if prefix + leaf in state:
                state[f"{prefix}inner.{leaf}"] = state.pop(prefix + leaf)


@pytest.mark.parametrize("head", [Head, Hooked])
def test_names_of_older_versions_of_modules(head: type[nn.Module], tmp_path: Path) -> None:
    """They were refused; loaded again by a checkpointer, they went over the head that an adapter had trained."""
    source, model = nn.Sequential(head(), nn.Linear(2, 2)), nn.Sequential(head(), nn.Linear(2, 2))
    older = {name.replace("inner.", ""): value for name, value in source.state_dict().items()}
    torch.save({"model": older}, tmp_path / "base.pth")
    report = load_base(model, tmp_path / "base.pth")
    assert not report.initial and not report.unexpected
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["1"], "RANK": 1}], ["0"])
    with torch.no_grad():
        for trained in peft.trained_parameters(model):
            trained.param.add_(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(older, strict=False)  # as Detectron2's checkpointer does it
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(peft.InjectionError, match="weights of another base"):
        model.load_state_dict({name: value + 1 for name, value in older.items()}, strict=False)


def test_names_that_no_version_of_a_module_has(tmp_path: Path) -> None:
    model = nn.Sequential(Head(), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"0.other.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)}, tmp_path / "base.pth")
    with pytest.raises(CheckpointError, match="3 tensors of the model are not in the file: 0.inner.bias, 0.inner.weig"):
        load_base(model, tmp_path / "base.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keeps_versions", [True, False])
def test_modules_that_rename_earlier_versions_leave_their_own_names_alone(tmp_path: Path, keeps_versions: bool) -> None:
    first, second = nn.Sequential(Head()), nn.Sequential(Head())
    state = first.state_dict()
    torch.save({"model": state if keeps_versions else dict(state)}, tmp_path / "base.pth")
    load_base(second, tmp_path / "base.pth")
    assert torch.equal(second[0].inner.weight, first[0].inner.weight)


FOREIGN = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "a web page": b"\n<!DOCTYPE html>\n<html lang=en><title>Sign in</title>",
    "a server's error message": b"404: Not Found",
    "a packed archive": gzip.compress(b"x" * 100),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "nothing but zeros": bytes(1000),
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("said", FOREIGN)
def test_what_was_saved_in_place_of_weights_is_called_what_it_is(tmp_path: Path, said: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(FOREIGN[said])
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: it is ") + f".*{said}"):
        read_checkpoint(path)


def test_an_onnx_graph_as_weights_is_called_that(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "model.pth"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(path))
    with pytest.raises(CheckpointError, match="it is an ONNX graph"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("names", "program"),
    {
        "Hugging Face's transformers": ["model.pixel_level_module.encoder.x.weight", "class_predictor.weight"],
        "ultralytics": ["model.0.conv.weight", "model.22.cv2.0.weight"],
        "mmdetection": ["backbone.conv1.weight", "bbox_head.fc.weight"],
    }.items(),
)
def test_another_programs_names_are_called_that(tmp_path: Path, names: str, program: list[str]) -> None:
    path = tmp_path / "model.pth"
    torch.save({name: torch.zeros(2) for name in program}, path)
    with pytest.raises(CheckpointError, match=f"its names are those of {names}"):
        load_base(nn.Linear(2, 2), path)
