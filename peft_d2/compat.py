"""Which Detectron2 is there, if any, and what differs between 0.5, 0.6 and its main branch."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import types
from pathlib import Path
from typing import Any

HOW_TO_GET_DETECTRON2 = (
    "Run `peft-d2 setup-detectron2` (0.5, pure Python, from the package index), or install 0.6 or the main branch from "
    "the Detectron2 project's sources, or somebody's wheel of it that was built for this torch and Python"
)


_FOLDER = Path(__file__).parent


def bundled(name: str) -> Path:
    """A file that comes with the package: ``configs/...`` or ``tools/...``, of a wheel or of a checkout."""
    return (_FOLDER if (_FOLDER / "configs").is_dir() else _FOLDER.parent) / name


def find_file(path: str) -> str:
    """``path``, or, where ``configs/...`` is no file below the working directory, the package's own of that name."""
    if path.startswith("configs/") and not Path(path).exists() and bundled(path).is_file():
        return str(bundled(path))
    return path


class Detectron2Missing(ImportError):
    """Something was called that needs Detectron2, and there is none that can be imported."""


def require_detectron2() -> None:
    """Raise :class:`Detectron2Missing` where Detectron2 is not installed or cannot be imported, saying which."""
    try:
        importlib.import_module("detectron2")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "detectron2"
        state = "is not installed" if absent else f"is installed but cannot be imported ({error})"
        raise Detectron2Missing(f"Detectron2 {state}, and this needs it. {HOW_TO_GET_DETECTRON2}.") from error


def accept_empty_polygons() -> None:
    """Let ``polygons_to_bitmask`` return an empty mask for an instance that a crop left without polygons.

    The main branch does; 0.5 and 0.6 assert instead, in a data loader's worker, hours into a training.
    """
    require_detectron2()
    import numpy as np
    from detectron2 import structures
    from detectron2.data import detection_utils
    from detectron2.structures import masks

    original = masks.polygons_to_bitmask
    with contextlib.suppress(AssertionError):
        original([], 1, 1)
        return

    def polygons_to_bitmask(polygons: Any, height: int, width: int) -> Any:
        return original(polygons, height, width) if len(polygons) else np.zeros((height, width), dtype=bool)

    for module in (masks, structures, detection_utils):  # each has imported the name
        module.polygons_to_bitmask = polygons_to_bitmask


def require_cityscapes(polygons: bool = False) -> None:
    """Raise a ModuleNotFoundError, which names the extra, where a package for Cityscapes is not installed.

    ``polygons``: the package by which Detectron2 reads its instances is needed, too.
    """
    for package in ("cityscapesscripts", "shapely") if polygons else ("cityscapesscripts",):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"Cityscapes needs the package {package}, which is not installed: pip install 'peft_d2[cityscapes]'."
            )
    lend_cityscapesscripts()


def lend_cityscapesscripts() -> None:
    """Let Detectron2's main branch find cityscapesscripts, which it imports by the path that it has inside its company.

    Its import statements name modules that nobody can install: entries in ``sys.modules`` are the only way short of
    copies of its loader and its evaluators. Does nothing for 0.5 and 0.6, or where the package is not installed.
    """
    from detectron2.data.datasets import cityscapes

    company = "deeplearning.projects.cityscapesApi"
    installed = importlib.util.find_spec("cityscapesscripts") is not None
    if not installed or "deeplearning" in sys.modules or company not in inspect.getsource(cityscapes):
        return
    for name in ("deeplearning", "deeplearning.projects", company):
        sys.modules[name] = types.ModuleType(name)
    for name in (
        "", ".helpers", ".helpers.labels", ".evaluation", ".evaluation.evalInstanceLevelSemanticLabeling",
        ".evaluation.evalPixelLevelSemanticLabeling",
    ):  # fmt: skip
        sys.modules[f"{company}.cityscapesscripts{name}"] = importlib.import_module(f"cityscapesscripts{name}")
    for name in ("deeplearning.projects", company, f"{company}.cityscapesscripts"):
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[name])


def create_local_process_group(size: int) -> None:
    """Tell Detectron2 which ranks share a machine: each ``size`` in a row. All processes call it together.

    The main branch has a function for that; in 0.5 and 0.6 its launcher sets the group itself.
    """
    require_detectron2()
    import torch.distributed as dist
    from detectron2.utils import comm

    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
    else:
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(size)


def forget_process_groups() -> None:
    """Let go of the groups that Detectron2 keeps: one that outlives the run's end can abort the process at its exit."""
    from detectron2.utils import comm

    comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
