"""A Segment Anything of the size of the golden sam_tiny."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "EMBED_DIM": 48,
    "DEPTH": 4,
    "NUM_HEADS": 4,
    "WINDOW_SIZE": 3,
    "GLOBAL_BLOCKS": [1, 3],
    "OUT_CHANNELS": 32,
    "DECODER_HEADS": 4,
    "DECODER_MLP_DIM": 64,
    "IOU_HEAD_HIDDEN": 32,
}

# A grid of 8 x 8, as for images of 128 px with patches of 16, or of 64 px with patches of 8.
SAM_TINY: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.SAM.IMAGE_SIZE": 128,
    **{f"MODEL.SAM.{key}": value for key, value in SIZES.items()},
}
