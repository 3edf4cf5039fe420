"""SEEM for instance, panoptic and semantic segmentation by class names (Zou et al., NeurIPS 2023)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from peft_d2.models.mask2former.model import MaskFormer
from peft_d2.models.registration import entry
from peft_d2.models.seem.transformer_decoder import Parked
from peft_d2.models.seem.vocabulary import ClassVectors, ClassVectorsError, Vocabulary

_PREDICTOR = "sem_seg_head.predictor."
_logger = logging.getLogger(__name__)


@entry(META_ARCH_REGISTRY, "PD2SEEM", upstream="GeneralizedSEEM")
class SEEM(MaskFormer):
    """Mask2Former's losses and inference, but for the last resize; classes are names, see :meth:`set_classes`.

    ``MODEL.SEEM.CLASS_NAMES`` sets the number of classes, too. The predictor is a :class:`SEEMDecoder`.
    """

    bicubic_results = True

    def __init__(self, cfg: CfgNode) -> None:
        if names := cfg.MODEL.SEEM.CLASS_NAMES:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(names)
        super().__init__(cfg)
        if cfg.DATASETS.TEST:  # inference tells the things from the stuff of the classes that it scores
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        # Of the published interactive training; kept so that checkpoints are loaded and written whole.
        self.register_buffer("dilation_kernel", torch.ones(1, 1, 3, 3))

    @property
    def class_names(self) -> tuple[str, ...]:
        """What inference scores, by class id; empty where nobody has said."""
        return self.sem_seg_head.predictor.vocabulary.names

    @property
    def thing_classes(self) -> set[int] | None:
        """Ids of the classes whose objects are told apart: the data set's, or all of another list of names."""
        names, known = self.class_names, self.metadata
        counts = {len(getattr(known, key, ())) for key in ("stuff_classes", "thing_classes")} - {0}
        if names and (not hasattr(known, "thing_dataset_id_to_contiguous_id") or counts and len(names) not in counts):
            return set(range(len(names)))
        return super().thing_classes

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in Mask2Former; a checkpoint of a SEEM trained without prompts may lack what is parked here."""
        state = super().upgrade_state_dict(state)
        if not any(name.startswith(_PREDICTOR) for name in state):
            return state
        text = _PREDICTOR + "lang_encoder.lang_encoder."
        own = self.state_dict()
        if any(name.startswith(text) for name in own) and not any(name.startswith(text) for name in state):
            raise ClassVectorsError(
                f"the checkpoint has no text encoder ({text}*): set MODEL.SEEM.TEXT_ENCODER to False, and name a file "
                "of class vectors in MODEL.SEEM.CLASS_VECTORS"
            )
        parked = {
            f"{name}.{leaf}": value
            for name, module in self.named_modules()
            if isinstance(module, Parked)
            for leaf, value in module.state_dict().items()
        }
        if parked and not parked.keys() & state.keys():
            _logger.info("The checkpoint has no tensors of prompts: %d of them stay zero.", len(parked))
            state.update(parked)
        return state

    def set_classes(self, classes: ClassVectors | Sequence[str]) -> None:
        """Predict these classes from now on: their vectors, or names for the text encoder."""
        predictor = self.sem_seg_head.predictor
        given = classes if isinstance(classes, ClassVectors) else None
        names = () if isinstance(classes, ClassVectors) else classes
        predictor.vocabulary = Vocabulary(names, "set_classes", predictor.vocabulary.tokenizer, given=given)
