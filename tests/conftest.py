"""What all tests share: one thread, fixed seeds, which are slow, and the reason why GPU tests are skipped."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Tools and projects are programs, not packages: tests import them, and what they are made of, by name.
sys.path[:0] = [str(ROOT / folder) for folder in ("tools", "projects", "projects/model_zoo", "projects/nuclei")]

# Tests run in several processes, and small tensors are slower on several threads: one each, in what they start too.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Files that train, start processes or compilers: `make test-fast` leaves them out.
SLOW = {
    *("data/test_hostile.py", "data/test_formats.py", "docs/test_notebook.py", "examples/test_examples.py"),
    "tools/test_command_line.py",
    *("faults/test_campaign.py", "ops/test_check_gpu.py", "ops/test_sanitizers.py", "ops/test_cuda_on_host.py"),
    *(f"engine/test_{name}.py" for name in ("training", "processes", "prove_live", "loader_workers", "resume", "seem")),
    *(
        f"engine/test_{name}.py"
        for name in ("sam", "mask_dino", "mask_rcnn", "failing_evaluation", "tracking", "tasks")
    ),
    *(f"engine/test_{name}.py" for name in ("load_order", "augmented", "recompute", "memory_budget")),
    *("engine/test_feature_cache.py", "engine/test_recommend.py", "evaluation/test_memory.py"),
    *("memory/test_plan.py", "memory/test_side.py", "models/mask_dino/test_mask_dino_losses.py"),
    *("models/sam/test_sam_training.py", "models/test_mixed_batches.py", "tools/test_take_adapter.py"),
    *("ops/test_official.py", "ops/test_build.py"),
    *(f"peft/test_{name}.py" for name in ("execution", "whole_model", "ddp", "lora_layers")),
    *(f"models/test_{name}.py" for name in ("timm", "training", "configs", "habits", "half_precision")),
    *(
        f"tools/test_{name}.py"
        for name in ("train_net", "export", "analyze_peft", "visualize_data", "model_zoo", "nuclei_study", "ui")
    ),
    *(
        "engine/test_eomt.py",
        "engine/test_sam2.py",
        "models/sam2/test_sam2.py",
        "models/eomt/test_eomt.py",
        "models/mask2former/test_golden.py",
        "models/mask2former/test_transformers.py",
    ),
    *("models/mask_dino/test_mask_dino.py", "models/mask_dino/test_mask_dino_peft.py"),
    *("models/mask_dino/test_mask_dino_training.py", "models/seem/test_seem.py", "models/seem/test_seem_peft.py"),
    *("models/eomt/test_eomt_transformers.py", "models/test_registration.py", "evaluation/test_lvis.py"),
    *("storage/test_torchvision_names.py", "tools/test_peft_benchmark.py", "tools/test_memory_table.py"),
    *("test_environment.py", "storage/test_says_lora.py", "field/test_data.py", "field/test_runs.py"),
}


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forget_loggers() -> Iterator[Callable[[], None]]:
    """Detectron2's loggers keep the stdout and files of their first use: they are let go of after each test, and by a
    test that runs several programs, through what this gives, between them.
    """

    def forget() -> None:
        for name in ("detectron2", "fvcore", "peft_d2"):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
        if "detectron2.utils.logger" in sys.modules:
            sys.modules["detectron2.utils.logger"].setup_logger.cache_clear()

    yield forget
    forget()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what depends on threads, and where tensors are large enough to gain."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if item.path.relative_to(tests).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
