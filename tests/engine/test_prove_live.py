"""Several processes prove together that what is trained has an effect: all go on, or all stop with its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm

import peft_d2
from peft_d2.engine import processes
from peft_d2.engine.trainer import Trainer

METHODS = "[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['class_embed', 'backbone.layers.3.blocks.*.attn.qkv']}]"


def train(cfg: Any, folder: str) -> None:
    """What each of two processes runs: one of the modules that were injected is replaced."""
    peft_d2.register()
    trainer = Trainer(cfg)
    decoder: Any = trainer.model.module.sem_seg_head.predictor  # type: ignore[union-attr]
    injected = decoder.class_embed
    decoder.class_embed, decoder.unused = torch.nn.Linear(injected.in_features, injected.out_features), injected
    try:
        trainer.train()
    except Exception as error:
        Path(folder, f"{comm.get_rank()}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def test_two_processes_stop_together(make_cfg: Callable[..., Any], tmp_path: Path) -> None:
    opts = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1, "MODEL.PEFT.METHODS", METHODS)
    cfg, layout = make_cfg(*opts, output=tmp_path), processes.Layout(2, on_cpu=True)
    with pytest.raises(SystemExit):
        processes.launch(train, (cfg, str(tmp_path)), layout)
    for rank in (0, 1):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "InjectionError: what was injected is no longer in the model" in said
        assert "predictor.class_embed (adapted)" in said
