"""Files of another model's box proposals (``MODEL.LOAD_PROPOSALS``), checked before Detectron2 unpickles them."""

from __future__ import annotations

import os
import pickle
from functools import lru_cache
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager

from peft_d2.data.config import published_name
from peft_d2.data.images import DatasetError

_OLD_KEYS = {"indexes": "ids", "scores": "objectness_logits"}  # of the first Detectron
_NEEDED = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("_codecs", "encode"),
    ("detectron2.structures.boxes", "BoxMode"),
}


class _Proposals(pickle.Unpickler):
    """Reads arrays and plain containers; a pickle that asks for anything else could run code.

    The reader of checkpoints (``storage.torch_file``) lets more pass, since it puts stand-ins in its place. What passes
    here, Detectron2 unpickles for real.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NEEDED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no proposals need: it may be an attack")
        return super().find_class(module, name)


def proposal_files(cfg: Any, split: str) -> tuple[str, ...] | None:
    """The files of proposals for the data sets of ``split``, TRAIN or TEST; None where the config loads none.

    Raises:
        DatasetError: they are not one for each set, cannot be read, hold more than proposals, or none for an image.
    """
    node, key = cfg.DATASETS, f"DATASETS.PROPOSAL_FILES_{split}"
    if not cfg.MODEL.LOAD_PROPOSALS:
        if published_name(cfg) == "GeneralizedRCNN" and cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
            raise DatasetError(
                "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals needs MODEL.LOAD_PROPOSALS True, and files of "
                "proposals in DATASETS.PROPOSAL_FILES_TRAIN and PROPOSAL_FILES_TEST. Set them, or NAME RPN."
            )
        return None
    names, files = node[split], node[f"PROPOSAL_FILES_{split}"]
    if len(files) != len(names):
        raise DatasetError(
            f"MODEL.LOAD_PROPOSALS: {key} names {len(files)} file(s) for the {len(names)} set(s) of DATASETS.{split}. "
            "Name one for each, in their order."
        )
    for name, file in zip(names, files, strict=True):
        try:
            path = PathManager.get_local_path(file)
            held = _image_ids(path, os.stat(path).st_mtime_ns)
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{key}: {file} cannot be used: {error}. Expected a pickled dict of lists: ids, boxes (arrays of N x "
                "4), objectness_logits (arrays of N), and bbox_mode."
            ) from error
        ids = [str(record["image_id"]) for record in DatasetCatalog.get(name)]
        if missing := [number for number in ids if number not in held]:
            raise DatasetError(
                f"{key}: {file} has no proposals for {len(missing)} of the {len(ids)} images of {name!r}, image_id "
                f"{missing[0]} for one. Make them on this set's images."
            )
    return tuple(files)


@lru_cache(maxsize=8)
def _image_ids(path: str, changed: int) -> frozenset[str]:
    """The ids of the images that a file has proposals for; ``changed``, its time of change, makes a new one be read.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            content = _Proposals(stream, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # damaged bytes fail in as many ways as there are Python operations
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"it is no pickle of proposals ({said})") from error
    content = {_OLD_KEYS.get(key, key): value for key, value in content.items()} if isinstance(content, dict) else {}
    ids, boxes, scores = (content.get(key) for key in ("ids", "boxes", "objectness_logits"))
    if ids is None or boxes is None or scores is None or not len(ids) == len(boxes) == len(scores):
        raise ValueError(f"it holds {sorted(map(str, content)) or 'no dict'}, or lists of unequal lengths")
    for number, box, score in zip(ids, boxes, scores, strict=True):
        if np.shape(box) != (len(score), 4):
            raise ValueError(f"the boxes of image_id {number} are of shape {np.shape(box)} for {len(score)} scores")
    return frozenset(map(str, ids))
