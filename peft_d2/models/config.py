"""The config nodes of the models, with the published names and defaults."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

# What add_maskformer2_config adds, and of add_deeplab_config what published yaml files set, flattened.
_PUBLISHED: dict[str, Any] = {
    "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic",
    "INPUT.COLOR_AUG_SSD": False,
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 1.0,
    "INPUT.SIZE_DIVISIBILITY": -1,
    "INPUT.IMAGE_SIZE": 1024,
    "INPUT.MIN_SCALE": 0.1,
    "INPUT.MAX_SCALE": 2.0,
    "SOLVER.WEIGHT_DECAY_EMBED": 0.0,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
    "SOLVER.POLY_LR_POWER": 0.9,
    "SOLVER.POLY_LR_CONSTANT_ENDING": 0.0,
    "MODEL.RESNETS.RES4_DILATION": 1,
    "MODEL.RESNETS.RES5_MULTI_GRID": [1, 2, 4],
    "MODEL.RESNETS.STEM_TYPE": "deeplab",
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": True,
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.1,
    "MODEL.MASK_FORMER.CLASS_WEIGHT": 1.0,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 1.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 20.0,
    "MODEL.MASK_FORMER.NHEADS": 8,
    "MODEL.MASK_FORMER.DROPOUT": 0.1,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 2048,
    "MODEL.MASK_FORMER.ENC_LAYERS": 0,
    "MODEL.MASK_FORMER.DEC_LAYERS": 6,
    "MODEL.MASK_FORMER.PRE_NORM": False,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 256,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 100,
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5",
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": False,
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 32,
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 112 * 112,
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": 3.0,
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": 0.75,
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": True,
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": False,
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 256,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": 4,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": 8,
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": 224,
    "MODEL.SWIN.PATCH_SIZE": 4,
    "MODEL.SWIN.EMBED_DIM": 96,
    "MODEL.SWIN.DEPTHS": [2, 2, 6, 2],
    "MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24],
    "MODEL.SWIN.WINDOW_SIZE": 7,
    "MODEL.SWIN.MLP_RATIO": 4.0,
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.QK_SCALE": None,
    "MODEL.SWIN.DROP_RATE": 0.0,
    "MODEL.SWIN.ATTN_DROP_RATE": 0.0,
    "MODEL.SWIN.DROP_PATH_RATE": 0.3,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.SWIN.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SWIN.USE_CHECKPOINT": False,
    # What add_maskdino_config adds to these. Some do nothing; published yaml files set them all the same.
    "Default_loading": True,
    "MODEL.MaskDINO.LEARN_TGT": False,
    "MODEL.MaskDINO.PANO_BOX_LOSS": False,
    "MODEL.MaskDINO.SEMANTIC_CE_LOSS": False,
    "MODEL.MaskDINO.DEEP_SUPERVISION": True,
    "MODEL.MaskDINO.NO_OBJECT_WEIGHT": 0.1,
    "MODEL.MaskDINO.CLASS_WEIGHT": 4.0,
    "MODEL.MaskDINO.DICE_WEIGHT": 5.0,
    "MODEL.MaskDINO.MASK_WEIGHT": 5.0,
    "MODEL.MaskDINO.BOX_WEIGHT": 5.0,
    "MODEL.MaskDINO.GIOU_WEIGHT": 2.0,
    "MODEL.MaskDINO.COST_CLASS_WEIGHT": 4.0,
    "MODEL.MaskDINO.COST_DICE_WEIGHT": 5.0,
    "MODEL.MaskDINO.COST_MASK_WEIGHT": 5.0,
    "MODEL.MaskDINO.COST_BOX_WEIGHT": 5.0,
    "MODEL.MaskDINO.COST_GIOU_WEIGHT": 2.0,
    "MODEL.MaskDINO.NHEADS": 8,
    "MODEL.MaskDINO.DROPOUT": 0.1,
    "MODEL.MaskDINO.DIM_FEEDFORWARD": 2048,
    "MODEL.MaskDINO.ENC_LAYERS": 0,
    "MODEL.MaskDINO.DEC_LAYERS": 6,
    "MODEL.MaskDINO.INITIAL_PRED": True,
    "MODEL.MaskDINO.PRE_NORM": False,
    "MODEL.MaskDINO.BOX_LOSS": True,
    "MODEL.MaskDINO.HIDDEN_DIM": 256,
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 100,
    "MODEL.MaskDINO.ENFORCE_INPUT_PROJ": False,
    "MODEL.MaskDINO.TWO_STAGE": True,
    "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no",
    "MODEL.MaskDINO.DN": "seg",
    "MODEL.MaskDINO.DN_NOISE_SCALE": 0.4,
    "MODEL.MaskDINO.DN_NUM": 100,
    "MODEL.MaskDINO.PRED_CONV": False,
    "MODEL.MaskDINO.EVAL_FLAG": 1,
    "MODEL.MaskDINO.SIZE_DIVISIBILITY": 32,
    "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME": "MaskDINODecoder",
    "MODEL.MaskDINO.TRAIN_NUM_POINTS": 112 * 112,
    "MODEL.MaskDINO.OVERSAMPLE_RATIO": 3.0,
    "MODEL.MaskDINO.IMPORTANCE_SAMPLE_RATIO": 0.75,
    "MODEL.MaskDINO.TEST.TEST_FOUCUS_ON_BOX": False,
    "MODEL.MaskDINO.TEST.SEMANTIC_ON": True,
    "MODEL.MaskDINO.TEST.INSTANCE_ON": False,
    "MODEL.MaskDINO.TEST.PANOPTIC_ON": False,
    "MODEL.MaskDINO.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MaskDINO.TEST.OVERLAP_THRESHOLD": 0.0,
    "MODEL.MaskDINO.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
    "MODEL.MaskDINO.TEST.PANO_TRANSFORM_EVAL": True,
    "MODEL.MaskDINO.TEST.PANO_TEMPERATURE": 0.06,
    "MODEL.SEM_SEG_HEAD.NUM_FEATURE_LEVELS": 3,
    "MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 4,
    "MODEL.SEM_SEG_HEAD.FEATURE_ORDER": "high2low",
    # What SEEM's published yaml files set for the backbones focal and focal_dw; the defaults are its Focal-T.
    "MODEL.BACKBONE.FOCAL.PRETRAIN_IMG_SIZE": 224,
    "MODEL.BACKBONE.FOCAL.PATCH_SIZE": 4,
    "MODEL.BACKBONE.FOCAL.EMBED_DIM": 96,
    "MODEL.BACKBONE.FOCAL.DEPTHS": [2, 2, 6, 2],
    "MODEL.BACKBONE.FOCAL.FOCAL_LEVELS": [3, 3, 3, 3],
    "MODEL.BACKBONE.FOCAL.FOCAL_WINDOWS": [3, 3, 3, 3],
    "MODEL.BACKBONE.FOCAL.DROP_PATH_RATE": 0.3,
    "MODEL.BACKBONE.FOCAL.MLP_RATIO": 4.0,
    "MODEL.BACKBONE.FOCAL.DROP_RATE": 0.0,
    "MODEL.BACKBONE.FOCAL.PATCH_NORM": True,
    "MODEL.BACKBONE.FOCAL.USE_CONV_EMBED": True,
    "MODEL.BACKBONE.FOCAL.SCALING_MODULATOR": True,
    "MODEL.BACKBONE.FOCAL.USE_CHECKPOINT": False,
    "MODEL.BACKBONE.FOCAL.USE_POSTLN": True,
    "MODEL.BACKBONE.FOCAL.USE_POSTLN_IN_MODULATION": False,
    "MODEL.BACKBONE.FOCAL.USE_LAYERSCALE": True,
    "MODEL.BACKBONE.FOCAL.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.BACKBONE.FOCAL.OUT_INDICES": [0, 1, 2, 3],
    # The same for its backbone davit; the defaults are its DaViT-d3.
    "MODEL.BACKBONE.DAVIT.DROP_PATH_RATE": 0.3,
    "MODEL.BACKBONE.DAVIT.PATCH_SIZE": [7, 2, 2, 2],
    "MODEL.BACKBONE.DAVIT.PATCH_STRIDE": [4, 2, 2, 2],
    "MODEL.BACKBONE.DAVIT.PATCH_PADDING": [3, 0, 0, 0],
    "MODEL.BACKBONE.DAVIT.PATCH_PRENORM": [False, True, True, True],
    "MODEL.BACKBONE.DAVIT.DIM_EMBED": [128, 256, 512, 1024],
    "MODEL.BACKBONE.DAVIT.NUM_HEADS": [4, 8, 16, 32],
    "MODEL.BACKBONE.DAVIT.NUM_GROUPS": [4, 8, 16, 32],
    "MODEL.BACKBONE.DAVIT.DEPTHS": [1, 1, 9, 1],
    "MODEL.BACKBONE.DAVIT.WINDOW_SIZE": 7,
    "MODEL.BACKBONE.DAVIT.CONV_AT_ATTN": True,
    "MODEL.BACKBONE.DAVIT.CONV_AT_FFN": True,
    "MODEL.BACKBONE.DAVIT.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.BACKBONE.DAVIT.OUT_INDICES": [0, 1, 2, 3],
    "MODEL.BACKBONE.DAVIT.ENABLE_CHECKPOINT": False,
    # SEEM's text encoder, and the channels in which queries and classes are compared.
    "MODEL.DIM_PROJ": 512,
    "MODEL.TEXT.PRETRAINED_TOKENIZER": "openai/clip-vit-base-patch32",
    "MODEL.TEXT.CONTEXT_LENGTH": 77,
    "MODEL.TEXT.WIDTH": 512,
    "MODEL.TEXT.HEADS": 8,
    "MODEL.TEXT.LAYERS": 12,
}

# Ours. They sit under Detectron2's own nodes: upstream's functions replace MODEL.MASK_FORMER and MODEL.SWIN as a whole.
_OWN: dict[str, Any] = {
    # PD2FPN: the backbone under Detectron2's pyramid, and what makes the coarsest maps ("pool", "p6p7" or "").
    "MODEL.FPN.BOTTOM_UP": "",
    "MODEL.FPN.TOP_BLOCK": "pool",
    # Hidden channels of the pixel decoder's encoder: 1024 in the published models, whatever MASK_FORMER says.
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 1024,
    # True computes the activations of the pixel decoder's encoder again in the backward pass instead of keeping them.
    "MODEL.SEM_SEG_HEAD.USE_CHECKPOINT": False,
    # True runs the pixel decoder in the autocast type with SOLVER.AMP; the published models keep it in float32.
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_AUTOCAST": False,
    # Boxes of instances are computed from their masks; False leaves them zero, as the published code does.
    "MODEL.SEM_SEG_HEAD.INSTANCE_BOXES": True,
    # Mask DINO's target boxes are relative to the padded batch, as its masks and results are; False: to the image
    # without padding, as in the published code. Both agree where nothing is padded, as with large-scale jitter.
    "MODEL.SEM_SEG_HEAD.PADDED_BOXES": False,
    # SEEM. The classes by name; [] takes the data set's: those of TRAIN in training, those of TEST in inference.
    "MODEL.SEEM.CLASS_NAMES": [],
    # A file of their vectors; "" computes them with the text encoder of MODEL.WEIGHTS.
    "MODEL.SEEM.CLASS_VECTORS": "",
    # False builds no text encoder; class vectors come from a file then.
    "MODEL.SEEM.TEXT_ENCODER": True,
    # Rows of the embeddings of spatial prompts, which are kept and not used; 0 for a model that never had any.
    "MODEL.SEEM.SPATIAL_MEMORIES": 32,
    # Tokens of SEEM's text encoder; the published code asks the tokenizer.
    "MODEL.TEXT.VOCABULARY": 49408,
    # Segment Anything; the defaults are the published ViT-B. Channels and positions of the image encoder:
    "MODEL.SAM.IMAGE_SIZE": 1024,
    "MODEL.SAM.PATCH_SIZE": 16,
    "MODEL.SAM.EMBED_DIM": 768,
    "MODEL.SAM.DEPTH": 12,
    "MODEL.SAM.NUM_HEADS": 12,
    "MODEL.SAM.MLP_RATIO": 4.0,
    "MODEL.SAM.WINDOW_SIZE": 14,
    "MODEL.SAM.GLOBAL_BLOCKS": [2, 5, 8, 11],
    "MODEL.SAM.OUT_CHANNELS": 256,
    "MODEL.SAM.USE_CHECKPOINT": False,
    # Its prompt encoder and mask decoder:
    "MODEL.SAM.MASK_IN_CHANNELS": 16,
    "MODEL.SAM.DECODER_DEPTH": 2,
    "MODEL.SAM.DECODER_HEADS": 8,
    "MODEL.SAM.DECODER_MLP_DIM": 2048,
    "MODEL.SAM.IOU_HEAD_DEPTH": 3,
    "MODEL.SAM.IOU_HEAD_HIDDEN": 256,
    # Inference: three masks per prompt, of which the one with the best expected IoU is taken; prompts in one call.
    "MODEL.SAM.MULTIMASK": False,
    "MODEL.SAM.PROMPTS_PER_CALL": 64,
    # A folder that keeps the embeddings of a frozen image encoder, so that each image is encoded once; "" keeps none.
    # The published models' take 4 MiB for each image and flip in float32, half of it with SOLVER.AMP.
    "MODEL.SAM.FEATURE_CACHE": "",
    "MODEL.SAM.MASK_WEIGHT": 1.0,
    "MODEL.SAM.DICE_WEIGHT": 1.0,
    "MODEL.SAM.IOU_WEIGHT": 0.0,
    # As a backbone (PD2SAMViT) of other heads: levels of the pyramid, and their channels.
    "MODEL.SAM.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SAM.PYRAMID_CHANNELS": 256,
}


def add_models_config(cfg: CfgNode) -> None:
    """Add the models' config nodes to ``cfg``, in place.

    What is there already stays: this can come after upstream's ``add_*_config``, before them, or twice.
    """
    for key, value in {**_PUBLISHED, **_OWN}.items():
        *path, name = key.split(".")
        node = cfg
        for part in path:
            if part not in node:
                node[part] = CfgNode()
            node = node[part]
        if name not in node:
            # A list of its own for every config: CfgNode keeps what it is given.
            node[name] = list(value) if isinstance(value, list) else value
