"""Models for Detectron2's registries."""

from __future__ import annotations

from peft_d2.compat import require_detectron2

require_detectron2()

from peft_d2.models.config import add_models_config  # noqa: E402
from peft_d2.models.registration import register  # noqa: E402

__all__ = ["add_models_config", "register"]
