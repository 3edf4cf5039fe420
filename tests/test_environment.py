"""The environment: the maker of the Detectron2 wheel, what is imported when, the doctor, the Makefile, the pins."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import doctor
import numpy as np
import pytest
import torch

from peft_d2 import compat

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "build_detectron2.py"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_detectron2", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


maker = _load_script()


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


# ---------------------------------------------------------------- modernisations

ZOO, COCO = "detectron2/model_zoo/model_zoo.py", "detectron2/evaluation/coco_evaluation.py"
EXPORT, ANCHORS = "detectron2/export/__init__.py", "detectron2/modeling/anchor_generator.py"
DEEPLAB = "detectron2/projects/panoptic_deeplab/post_processing.py"

# one row of TABLE each: the file, a piece of the source as it was, and as it has to be
SAMPLES = [
    ("detectron2/a.py", "m.astype(np.bool); n.astype(np.bool_)", "m.astype(bool); n.astype(np.bool_)"),
    ("detectron2/a.py", "np.int, np.int64, np.integer, np.intp", "int, np.int64, np.integer, np.intp"),
    ("detectron2/a.py", "np.float, np.float32, np.float_power", "float, np.float32, np.float_power"),
    ("detectron2/a.py", "dtype=np.str) np.str_ np.strings", "dtype=str) np.str_ np.strings"),
    ("detectron2/a.py", "Image.LINEAR, Image.BILINEAR", "Image.BILINEAR, Image.BILINEAR"),
    (ZOO, "import os\nimport pkg_resources\n", "import os\nfrom importlib import resources\n"),
    (
        ZOO,
        'f = pkg_resources.resource_filename(\n    "detectron2.model_zoo", os.path.join("configs", config_path)\n)',
        'f = str(resources.files("detectron2.model_zoo").joinpath("configs", config_path))',
    ),
    (COCO, "from detectron2.evaluation.fast_eval_api import COCOeval_opt", "COCOeval_opt = COCOeval"),
    (EXPORT, "from .api import *\nfrom .flatten import TracingAdapter", "from .flatten import TracingAdapter"),
    (ANCHORS, "torch.meshgrid(shifts_y, shifts_x)", 'torch.meshgrid(shifts_y, shifts_x, indexing="ij")'),
    (
        DEEPLAB,
        "torch.meshgrid(\n    torch.arange(h),\n    torch.arange(w, device=offsets.device),\n)",
        'torch.meshgrid(\n    torch.arange(h),\n    torch.arange(w, device=offsets.device),\n        indexing="ij",\n)',
    ),
    (
        "detectron2/layers/deform_conv.py",
        "deform_conv = _DeformConv.apply\nmodulated_deform_conv = _ModulatedDeformConv.apply\n",
        maker.DEFORM_CONV,
    ),
    (
        "detectron2/layers/nms.py",
        "def nms_rotated(b, s, t):\n    return torch.ops.detectron2.nms_rotated(b, s, t)\n",
        "def nms_rotated(b, s, t):\n    from detectron2 import _C\n\n    return _C.nms_rotated(b, s, t)\n",
    ),
]


def test_every_modernisation_has_a_sample() -> None:
    assert len(SAMPLES) == len(maker.TABLE)


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_modernisation(index: int) -> None:
    path, before, after = SAMPLES[index]
    row = replace(maker.TABLE[index], hits=1)
    untouched = {"detectron2/notes.txt": before.encode(), "detectron2/b.py": b"np.array([1.0])"}
    result = maker.modernise({path: before.encode(), **untouched}, (row,))
    assert result == {path: after.encode(), **untouched}


def test_deformable_convolution_without_its_compiled_code() -> None:
    """Whole offsets shift the input, y before x; a mask weighs it; groups and offset groups are told by the shapes."""
    torchvision = pytest.importorskip("torchvision")
    names: dict[str, Any] = {"deform_conv2d": torchvision.ops.deform_conv2d}
    exec(maker.DEFORM_CONV, names)
    image = torch.randn(1, 4, 6, 7, dtype=torch.float64)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    offsets = _offsets(rows=(1, 0), columns=(0, -2)).requires_grad_()
    found = names["deform_conv"](image, offsets, weight, 1, 1, 1, 2, 2)
    shifted = torch.nn.functional.pad(image, (3, 3, 3, 3))
    shifted = torch.cat([shifted[:, :2, 3:11, 2:11], shifted[:, 2:, 2:10, 0:9]], dim=1)
    expected = torch.nn.functional.conv2d(shifted, weight, groups=2)
    torch.testing.assert_close(found, expected)
    half = names["modulated_deform_conv"](image, offsets, 0.5 * torch.ones(1, 18, 6, 7).double(), weight, None, 1, 1)
    torch.testing.assert_close(half, 0.5 * expected)
    half.square().sum().backward()
    assert weight.grad.abs().min() > 0 and offsets.grad.abs().sum() > 0


def _offsets(rows: tuple[float, float], columns: tuple[float, float]) -> torch.Tensor:
    """(1, 2 groups x 9 points x (y, x), 6, 7): the same offset everywhere in each group."""
    pairs = torch.tensor([rows, columns], dtype=torch.float64).T  # a group a row
    return pairs[:, None].expand(2, 9, 2).reshape(1, 36, 1, 1).repeat(1, 1, 6, 7)


@pytest.mark.parametrize("source", [b"nothing to do", b"np.bool np.bool np.bool"], ids=["too few", "too many"])
def test_modernisation_that_does_not_hit_as_expected_is_an_error(source: bytes) -> None:
    row = replace(maker.TABLE[0], hits=2)
    with pytest.raises(maker.BuildError, match=r"np.*bool.*matched [03] times.*expected 2"):
        maker.modernise({"detectron2/a.py": source}, (row,))


# ---------------------------------------------------------------- the wheel

SOURCES = {
    "detectron2/__init__.py": b'__version__ = "0.5"\n',
    "detectron2/masks.py": b"def truth(x):\n    return x.astype(np.bool)\n",
    "detectron2/model_zoo/configs/Base.yaml": b"VERSION: 2\n",
    "projects/DeepLab/deeplab/__init__.py": b"NAME = 'deeplab'\n",
    "tools/__init__.py": b"raise SystemError\n",
    "setup.py": b"raise SystemError\n",
    "LICENSE": b"Apache\n",
}


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source archive laid out as the real one, which the maker takes for the pinned one."""
    archive = tmp_path / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path, content in SOURCES.items():
            member = tarfile.TarInfo(f"detectron2_cdo-0.5/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(maker, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(maker.modernise, "__defaults__", ((replace(maker.TABLE[0], hits=1),),))
    return archive


def test_wheel_holds_the_package_and_a_true_record(tmp_path: Path, sdist: Path) -> None:
    wheel = maker.build(tmp_path / "cache", sdist)
    info = f"detectron2-{maker.VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    package = {name for name in files if not name.startswith(info)}
    assert package == {
        "detectron2/__init__.py",
        "detectron2/_C.py",
        "detectron2/masks.py",
        "detectron2/model_zoo/configs/Base.yaml",
        "detectron2/projects/deeplab/__init__.py",
    }
    assert files["detectron2/masks.py"] == b"def truth(x):\n    return x.astype(bool)\n"
    assert f"Version: {maker.VERSION}\n" in files[f"{info}/METADATA"].decode()
    record = {row[0]: row[1:] for row in csv.reader(files[f"{info}/RECORD"].decode().splitlines())}
    assert record.keys() == files.keys()
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        expected = ["", ""] if name.endswith("RECORD") else [f"sha256={digest}", str(len(content))]
        assert record[name] == expected


def test_wheel_is_kept_and_reproducible(tmp_path: Path, sdist: Path) -> None:
    first = maker.build(tmp_path / "first", sdist)
    again = maker.build(tmp_path / "second", sdist)
    assert first.read_bytes() == again.read_bytes()
    sdist.unlink()  # a second build of the same wheel must not need it
    assert maker.build(tmp_path / "first", sdist) == first
    assert sorted(first.parent.iterdir()) == [first]


def test_wheel_installs_and_its_compiled_part_says_that_it_is_absent(tmp_path: Path, sdist: Path) -> None:
    wheel = maker.build(tmp_path / "cache", sdist)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(tmp_path / "site"), str(wheel)], check=True, stderr=subprocess.DEVNULL)
    code = "from detectron2 import _C; print(_C.__file__, _C.has_cuda(), hasattr(_C, '__wrapped__')); _C.nms_rotated(1)"
    result = _python(code, PYTHONPATH=str(tmp_path / "site"))
    assert result.stdout.split()[1:] == ["False", "False"]
    assert str(tmp_path / "site") in result.stdout
    assert "RuntimeError: detectron2._C.nms_rotated is compiled code" in result.stderr
    assert "installed from its own sources" in result.stderr


def test_another_archive_is_refused(tmp_path: Path, sdist: Path) -> None:
    sdist.write_bytes(sdist.read_bytes()[:-1])
    with pytest.raises(maker.BuildError, match=r"has sha256 .*, expected .*delete it"):
        maker.build(tmp_path / "cache", sdist)
    with pytest.raises(maker.BuildError, match="no source archive at .*absent"):
        maker.build(tmp_path / "cache", tmp_path / "absent.tar.gz")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.6", 0), ("0.6+cu111", 0), (maker.VERSION, 0), ("0.5+peftd2.r00000000", 1)],
    ids=["release", "release for CUDA", "this wheel", "wheel of another recipe"],
)
def test_a_detectron2_that_is_there_is_left_alone(tmp_path: Path, version: str, status: int) -> None:
    """Only a wheel of this script's own making is replaced: that is seen from its asking for the archive."""
    info = tmp_path / "site" / f"detectron2-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\n")
    (tmp_path / "site" / "detectron2").mkdir()
    (tmp_path / "site" / "detectron2" / "__init__.py").write_text("")
    command = [sys.executable, str(SCRIPT), "--install", "--cache", str(tmp_path / "cache"), "--sdist", "absent.tar.gz"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == status
    expected = "no source archive at absent.tar.gz" if status else f"Detectron2 {version} is installed; left alone"
    assert expected in (result.stderr if status else result.stdout)
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- Detectron2 as it is installed


def test_model_zoo_configs_are_found() -> None:
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="Detectron2 is not installed")
    path = Path(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    assert path.is_file()
    with pytest.raises(RuntimeError, match="not available in Model Zoo"):
        model_zoo.get_config_file("absent.yaml")


def test_what_detectron2_does_not_import_by_itself_can_be_imported() -> None:
    """The parts whose own imports have aged: export (caffe2), analysis, projects, evaluation, pictures."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    names = ["export", "utils.analysis", "evaluation", "utils.visualizer", "projects.point_rend", "projects.deeplab"]
    for name in names:
        importlib.import_module(f"detectron2.{name}")


def test_mask_rcnn_takes_a_training_step() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import torch
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    model = build_model(cfg)
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    target = Instances((96, 128), gt_boxes=Boxes(torch.tensor([[10.0, 20.0, 70.0, 80.0]])))
    target.gt_classes = torch.tensor([3])
    target.gt_masks = PolygonMasks([[np.array([10.0, 20, 70, 20, 70, 80, 10, 80])]])
    with EventStorage():
        losses = model([{"image": image, "instances": target}])
    assert {"loss_cls", "loss_mask", "loss_rpn_cls"} <= losses.keys()
    sum(losses.values()).backward()
    assert model.roi_heads.mask_head.predictor.weight.grad.abs().sum() > 0
    with torch.no_grad():
        (output,) = model.eval()([{"image": image, "height": 96, "width": 128}])
    assert output["instances"].image_size == (96, 128)


def test_version_is_told_without_an_import() -> None:
    detectron2 = pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    assert doctor.detectron2_version() == detectron2.__version__


def test_an_instance_without_polygons_becomes_an_empty_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    structures = pytest.importorskip("detectron2.structures", reason="Detectron2 is not installed")
    from detectron2.data import detection_utils
    from detectron2.structures import masks

    square = [np.array([1.0, 1, 3, 1, 3, 3, 1, 3])]
    before = masks.polygons_to_bitmask(square, 5, 6)
    for module in (structures, masks, detection_utils):  # so that the originals come back after this test
        monkeypatch.setattr(module, "polygons_to_bitmask", module.polygons_to_bitmask)
    for _ in range(2):
        compat.accept_empty_polygons()
    for module in (structures, masks, detection_utils):
        empty = module.polygons_to_bitmask([], 5, 6)
        assert empty.shape == (5, 6) and empty.dtype == bool and not empty.any()
        assert np.array_equal(module.polygons_to_bitmask(square, 5, 6), before) and before.any()


# ---------------------------------------------------------------- without Detectron2

HIDE = "import sys; sys.modules.update({name: None for name in %r.split()}); "


def test_importing_the_package_imports_no_detectron2() -> None:
    names = ["peft_d2", "peft_d2.ops", "peft_d2.peft", "peft_d2.storage", "peft_d2.adapters", "peft_d2.compat"]
    imports = "; ".join(f"import {name}" for name in names)
    result = _python(f"{imports}; import sys; print([m for m in sys.modules if m.split('.')[0] == 'detectron2'])")
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr


def test_what_needs_detectron2_says_how_to_get_it() -> None:
    code = HIDE % "detectron2" + "import peft_d2; peft_d2.add_config(None)"
    error = _python(code).stderr.strip().splitlines()[-1]
    assert error.startswith("peft_d2.compat.Detectron2Missing: Detectron2 is not installed")
    assert "peft-d2 setup-detectron2" in error


def test_a_broken_detectron2_is_told_from_an_absent_one(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("import a_module_that_nobody_has\n")
    code = "from peft_d2.compat import require_detectron2; require_detectron2()"
    error = _python(code, PYTHONPATH=str(tmp_path)).stderr.strip().splitlines()[-1]
    assert "Detectron2 is installed but cannot be imported (No module named 'a_module_that_nobody_has')" in error


@pytest.mark.parametrize(
    ("hidden", "missing"),
    [
        ("", {}),
        ("detectron2", {"detectron2": "peft-d2 setup-detectron2"}),
        ("scipy faster_coco_eval", {"scipy": "pip install", "faster-coco-eval": "pip install"}),
        ("torch", {"torch": "pip install torch", "torchvision": "pip install torch", "peft_d2.ops": "above"}),
    ],
    ids=["nothing", "detectron2", "scipy", "torch"],
)
def test_doctor_names_what_is_missing_with_its_remedy(hidden: str, missing: dict[str, str]) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    run = "import runpy; runpy.run_module('peft_d2.doctor', run_name='__main__')"
    result = _python(HIDE % hidden + run)
    lines = result.stdout.splitlines()
    state = {line[8:26].strip(): line[:8].strip() for line in lines if line[:1].isalpha()}
    remedy = {line[8:26].strip(): following for line, following in zip(lines, lines[1:], strict=False)}
    assert result.returncode == (1 if missing else 0), result.stdout + result.stderr
    assert {"peft_d2", "python", "numpy", "C++ compiler", "nvcc", "GPU"} <= state.keys()
    for name, text in missing.items():
        assert state[name] == "missing" and text in remedy[name], result.stdout
    if not hidden:
        assert state["torch"] == state["detectron2"] == "ok" and any(name.startswith("operator") for name in state)
        assert "missing" not in state.values()


# ---------------------------------------------------------------- the Makefile's first checks


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("interpreter", "message"),
    [
        ("", "No interpreter"),
        (
            '#!/bin/sh\nif [ "$1" = -V ]; then echo Python 3.9.1; else exit 1; fi\n',
            "is Python 3.9.1, and 3.10 or newer",
        ),
        ('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n', "lacks venv or pip"),
    ],
    ids=["absent", "too old", "without venv"],
)
def test_make_refuses_an_interpreter_that_will_not_do(tmp_path: Path, interpreter: str, message: str) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / "python"
    if interpreter:
        python.write_text(interpreter)
        python.chmod(0o755)
    result = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert message in result.stdout and str(python) in result.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_that_the_environment_is_of_another_python(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    made, chosen = tmp_path / ".venv" / "bin" / "python", tmp_path / "python"
    made.parent.mkdir(parents=True)
    for python, version in ((made, "3.11.7"), (chosen, "3.12.1")):
        python.write_text(f"#!/bin/sh\necho Python {version}\n")
        python.chmod(0o755)
    result = subprocess.run(["make", "setup", f"PYTHON={chosen}"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert f".venv was made with Python 3.11.7, and {chosen} is Python 3.12.1" in result.stderr


def test_the_pins_satisfy_what_the_project_requires() -> None:
    """`constraints.txt` pins every requirement of the wheel and of the package, within the bounds that these give."""
    Requirement = pytest.importorskip("packaging.requirements").Requirement  # noqa: N806  a class
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {pin.name: next(iter(pin.specifier)).version for pin in pins if not pin.marker or pin.marker.evaluate()}
    try:
        own = importlib.metadata.requires("peft_d2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("peft_d2 is on the path but not installed: its requirements are not known")
    required = [Requirement(text) for text in (*maker.REQUIREMENTS, *own)]
    required = [r for r in required if r.name not in ("lvis", "cityscapesscripts", "wandb")]  # never set up by make
    assert {"torch", "fvcore", "faster-coco-eval", "pytest", "ruff"} <= {r.name for r in required}
    for requirement in required:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
