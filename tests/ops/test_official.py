"""The operator under the names that other people's code imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import random_case

from peft_d2 import ops
from peft_d2.ops import official

# What the published modules do with the extension, in the fewest lines.
CALLER = """
import torch
import MultiScaleDeformableAttention as MSDA

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return MSDA.ms_deform_attn_forward(*inputs, 128)

    @staticmethod
    def backward(ctx, grad_output):
        value, locations, weights = MSDA.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, 128)
        return value, None, None, locations, weights

shapes = torch.tensor([[3, 4], [2, 2]])
starts = torch.tensor([0, 12])
value = torch.randn(2, 16, 2, 4, dtype=torch.float64, requires_grad=True)
locations = torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
weights = torch.rand(2, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(Function.apply, (value, shapes, starts, locations, weights))
print("right")
"""
DETREX = """
def multi_scale_deformable_attn_pytorch(value, shapes, locations, weights):
    raise AssertionError("the slow one")

try:
    from detrex import _C
except ImportError:
    _C = None
"""


def run(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inserted = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    root = str(Path(ops.__file__).parents[2])
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", inserted + code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("backend", ["", "torch"])
def test_the_official_module_is_served(backend: str) -> None:
    serve = "from peft_d2.ops.official import serve_official\nprint(serve_official())\n"
    result = run(serve + CALLER, PEFT_D2_BACKEND=backend)
    assert result.stdout.splitlines() == ["['MultiScaleDeformableAttention']", "right"], result.stderr


def test_it_is_served_for_good_and_taken_away(tmp_path: Path) -> None:
    official.install(tmp_path)
    official.install(tmp_path)  # twice is once
    assert run(CALLER, tmp_path).stdout == "right\n"
    official.remove(tmp_path)
    assert "ModuleNotFoundError" in run(CALLER, tmp_path).stderr
    with pytest.raises(FileNotFoundError, match="nothing was removed"):
        official.remove(tmp_path)


def test_a_real_one_wins(tmp_path: Path) -> None:
    real = tmp_path / f"{official.OFFICIAL}.py"
    real.write_text("name = 'real'\n")
    serve = "from peft_d2.ops.official import serve_official\nprint(serve_official())\n"
    code = f"{serve}import {official.OFFICIAL} as m\nprint(m.name)"
    assert run(code, tmp_path).stdout == "[]\nreal\n"
    for change in (official.install, official.remove):
        with pytest.raises(OSError):
            change(tmp_path)
    assert real.read_text() == "name = 'real'\n"


def test_detrex_gets_the_operator_and_loses_its_slow_function(tmp_path: Path) -> None:
    layers = tmp_path / "detrex" / "layers"
    layers.mkdir(parents=True)
    (layers.parent / "__init__.py").write_text("from detrex import layers\n")  # as the real one: importing it runs all
    (layers / "__init__.py").write_text("from . import multi_scale_deform_attn\n")
    (layers / "multi_scale_deform_attn.py").write_text(DETREX)
    case = random_case(reference=0, dtype=torch.float32)
    expected = case.run("torch")
    torch.save((expected, case.value, case.spatial_shapes, case.points, case.weights), tmp_path / "case.pth")
    code = f"""
import torch
from peft_d2.ops.official import serve_official
serve_official()
from detrex.layers import multi_scale_deform_attn as layer
expected, *arguments = torch.load({str(tmp_path / "case.pth")!r})
torch.testing.assert_close(layer.multi_scale_deformable_attn_pytorch(*arguments), expected)
print(layer._C.ms_deform_attn_forward.__module__)
"""
    result = run(code, tmp_path)
    assert result.stdout == "peft_d2.ops.official\n", result.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_have_the_types_of_their_inputs(dtype: torch.dtype) -> None:
    case = random_case(reference=0, dtype=dtype)
    grad_output = torch.randn(case.value.shape[0], case.points.shape[1], case.value.shape[2] * case.value.shape[3])
    inputs = (case.value, case.spatial_shapes, case.level_start_index, case.points, case.weights)
    grads = official.ms_deform_attn_backward(*inputs, grad_output.to(dtype))
    wide = [x.detach().double().requires_grad_() for x in (case.value, case.points, case.weights)]
    output = ops.ms_deform_attn(wide[0], case.spatial_shapes, case.level_start_index, *wide[1:], backend="torch")
    expected = torch.autograd.grad(output, wide, grad_output.to(dtype).double())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for found, right, given in zip(grads, expected, (case.value, case.points, case.weights), strict=True):
        assert found.dtype == given.dtype
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))
