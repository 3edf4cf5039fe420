"""SEEM for instance, panoptic and semantic segmentation by class names (Zou et al., NeurIPS 2023)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from peft_d2.models.layers.transformer import MLP
from peft_d2.models.mask2former.model import MaskedTransformerDecoder, MaskFormer
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY, entry
from peft_d2.models.seem.text_encoder import TextEncoder
from peft_d2.models.seem.vocabulary import ClassVectors, ClassVectorsError, Vocabulary, vocabularies

_EPS = 1e-7
_PREDICTOR = "sem_seg_head.predictor."
_logger = logging.getLogger(__name__)
KEYS = """
MODEL:
  # SEEM's text encoder, and the channels in which queries and classes are compared.
  DIM_PROJ: 512
  TEXT:
    {PRETRAINED_TOKENIZER: openai/clip-vit-base-patch32, CONTEXT_LENGTH: 77, WIDTH: 512, HEADS: 8, LAYERS: 12,
     # Tokens of the text encoder; the published code asks the tokenizer.
     VOCABULARY: 49408}
  SEEM:
    # The classes by name; [] takes the data set's: those of TRAIN in training, those of TEST in inference.
    CLASS_NAMES: []
    # A file of their vectors; "" computes them with the text encoder of MODEL.WEIGHTS.
    CLASS_VECTORS: ""
    # False builds no text encoder; class vectors come from a file then.
    TEXT_ENCODER: true
    # Rows of the embeddings of spatial prompts, which are kept and not used; 0 for a model that never had any.
    SPATIAL_MEMORIES: 32
"""


class LogitScale(nn.Module):
    """The text encoder's stand-in if class vectors come from a file: it holds ``logit_scale`` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(()))


class Parked(nn.Module):
    """Tensors of published checkpoints that are unused here, kept so that a checkpoint is loaded and written whole."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))


@entry(TRANSFORMER_DECODER_REGISTRY, "PD2SEEMDecoder", upstream="SEEMDecoder", keys=KEYS)
class SEEMDecoder(MaskedTransformerDecoder):
    """Class logits are exp(logit_scale) times the cosine of a query's vector with the classes' vectors.

    ``lang_encoder`` has ``logit_scale``; a text encoder computes class vectors besides, and starts frozen.
    """

    def __init__(self, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> None:
        channels, node, text = cfg.MODEL.MASK_FORMER.HIDDEN_DIM, cfg.MODEL.SEEM, cfg.MODEL.TEXT
        lang_encoder: TextEncoder | LogitScale = LogitScale()
        if node.TEXT_ENCODER:
            sizes = (text.VOCABULARY, text.CONTEXT_LENGTH, text.WIDTH, text.HEADS, text.LAYERS)
            lang_encoder = TextEncoder(*sizes, cfg.MODEL.DIM_PROJ)
        super().__init__(cfg, in_channels, mask_classification)
        self.training_vocabulary, self.vocabulary = vocabularies(cfg)
        self.lang_encoder = lang_encoder
        for name, parameter in self.lang_encoder.named_parameters():
            parameter.requires_grad_(name == "logit_scale")
        self.mask_embed = MLP(channels, channels, cfg.MODEL.SEM_SEG_HEAD.MASK_DIM, 3)
        self.class_embed = nn.Parameter(torch.empty(channels, cfg.MODEL.DIM_PROJ))
        nn.init.trunc_normal_(self.class_embed, std=0.02)
        if node.SPATIAL_MEMORIES:
            matrix, memory = (channels, channels), (node.SPATIAL_MEMORIES, channels)
            self.mask_sptial_embed = Parked(**{str(level): matrix for level in range(3)})  # spelled as published
            self.spatial_embed = Parked(weight=memory)
            self.spatial_featured = Parked(weight=memory)
            self.pn_indicator = Parked(weight=(2, channels))

    def classifier(self) -> Callable[[Tensor], Tensor]:
        """Scores by the classes' vectors; in training each class's is of a random template, drawn in each pass."""
        rows_of = self.training_vocabulary.training_rows if self.training else self.vocabulary.rows
        rows = rows_of(self.lang_encoder)
        return partial(self.class_logits, rows=rows.to(self.class_embed))

    def class_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Normalised hidden states (N, Q, C) and class vectors (K + 1, D) -> (N, Q, K + 1), in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            query = hidden.float() @ self.class_embed
            query = query / (query.norm(dim=-1, keepdim=True) + _EPS)
            return self.lang_encoder.logit_scale.exp() * query @ rows.T


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
        """The names that inference predicts, by class id; empty if they are not known."""
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
        """As in Mask2Former; checkpoints of a SEEM that was trained without prompts may lack the :class:`Parked`."""
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
        parents = {name: self.get_submodule(name.rpartition(".")[0]) for name in own}
        parked = {name: own[name] for name, parent in parents.items() if isinstance(parent, Parked)}
        if parked and not parked.keys() & state.keys():
            _logger.info("The checkpoint has no tensors of prompts: %d of them stay zero.", len(parked))
            state.update(parked)
        return state

    def set_classes(self, classes: ClassVectors | Sequence[str]) -> None:
        """Predict these classes from now on: their vectors, or names for the text encoder."""
        predictor = self.sem_seg_head.predictor
        names, given = ((), classes) if isinstance(classes, ClassVectors) else (classes, None)
        predictor.vocabulary = Vocabulary(names, "set_classes", predictor.vocabulary.tokenizer, given=given)
