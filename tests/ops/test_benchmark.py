"""The benchmark compares like with like: all implementations compute the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from peft_d2 import ops

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_op.py"
pytestmark = [
    pytest.mark.skipif(bool(ops.backends()["cpu"]), reason=f"compiled operator: {ops.backends()['cpu']}"),
    pytest.mark.skipif(not TOOL.is_file(), reason="needs a source tree"),
]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_op", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_op"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("queries", [None, 7])
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_all_implementations_compute_the_same(tool, form, queries) -> None:
    case = tool.Case("tiny", ((6, 5), (3, 2)), n=2, queries=queries, heads=2, channels=8)
    inputs = tool.make_inputs(case, "cpu", torch.float32)
    leaves = tool.leaves_of(inputs, form)
    functions = tool.runs(inputs, form, "cpu", tool.peers("cpu"))
    assert {"ours", "twin", "torch"} <= set(functions)
    expected = functions["twin"]()
    gradients = torch.autograd.grad(expected, leaves, inputs.grad)
    for function in functions.values():
        output = function()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        for found, wanted in zip(torch.autograd.grad(output, leaves, inputs.grad), gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_measurement_is_a_table_with_ratios_to_ours(tool) -> None:
    case = tool.Case("tiny", ((4, 4),), queries=3, heads=1, channels=4)
    rows = tool.measure(case, "cpu", torch.float32, "plain", 2, {})
    assert [row.implementation for row in rows] == ["ours", "twin", "torch"]
    assert all(row.forward > 0 and row.forward_backward > 0 for row in rows)
    ours, twin = rows[0], rows[1]
    assert f"{twin.forward / ours.forward:.1f}x, {twin.forward_backward / ours.forward_backward:.1f}x" in tool.table(
        rows
    )
    assert tool.check(case, "cpu", torch.float32, "plain") < 1e-3
