"""What ``import peft_d2`` gives, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import peft_d2


def test_importing_needs_torch_alone() -> None:
    code = (
        "import sys, peft_d2, torch; peft_d2.inject; peft_d2.save_adapter; peft_d2.ms_deform_attn; "
        "found = {name.partition('.')[0] for name in sys.modules}; print(sorted(found & {'detectron2', 'fvcore'}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", peft_d2.__all__)
def test_names(name: str) -> None:
    found = getattr(peft_d2, name)
    assert name in dir(peft_d2)
    if name != "__version__":
        assert callable(found) and found.__name__ == name and found.__module__.startswith("peft_d2.")


def test_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'injekt'"):
        _ = peft_d2.injekt
