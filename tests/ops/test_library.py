"""The operator as a part of torch: tracing, compilation, export, autocast, choice of the backend, errors."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from op_cases import random_case

from peft_d2 import ops
from peft_d2.models.layers.ms_deform_attn import MSDeformAttn
from peft_d2.ops import library

pytestmark = pytest.mark.skipif(bool(ops.backends()["cpu"]), reason=f"compiled operator: {ops.backends()['cpu']}")
SHAPES = torch.tensor([[4, 4], [2, 2], [1, 1]])
STARTS = torch.tensor([0, 16, 20])


def layer_and_inputs(numbers: int = 2) -> tuple[MSDeformAttn, tuple[torch.Tensor, ...]]:
    layer = MSDeformAttn(d_model=32, n_levels=3, n_heads=4, n_points=2)
    return layer, (torch.randn(2, 21, 32), torch.rand(2, 21, 3, numbers), torch.randn(2, 21, 32), SHAPES, STARTS)


@pytest.mark.parametrize("reference", [0, 2, 4])
def test_opcheck(reference) -> None:
    case = random_case(reference=reference)
    for name in ("value", "points", "weights", "reference"):
        if getattr(case, name) is not None:
            getattr(case, name).requires_grad_()
    arguments = (case.value, case.spatial_shapes, case.level_start_index, case.reference, case.points, case.weights)
    torch.library.opcheck(torch.ops.peft_d2.ms_deform_attn.default, arguments)
    grad_output = torch.randn(2, 5, 24, dtype=torch.float64)
    modes = ("test_schema", "test_autograd_registration", "test_faketensor")  # second derivatives do not exist
    for wanted in (False, True):
        backward = (grad_output, *arguments, wanted, False)
        torch.library.opcheck(torch.ops.peft_d2.ms_deform_attn_backward.default, backward, test_utils=modes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic) -> None:
    layer, inputs = layer_and_inputs()
    expected = torch.autograd.grad(layer(*inputs).square().sum(), list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs).square().sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_exports() -> None:
    layer, inputs = layer_and_inputs(4)
    exported = torch.export.export(layer, inputs)
    assert any("ms_deform_attn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*inputs), layer(*inputs))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_computes_in_its_type_and_stays_close(compiled) -> None:
    layer, inputs = layer_and_inputs()
    expected = layer(*inputs)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with torch.autocast("cpu", torch.bfloat16):
        found = run(*inputs)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert layer.sampling_offsets.weight.grad.isfinite().all()
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_autocast_leaves_float64_alone() -> None:
    case = random_case()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run("cpu"), case.to(torch.float64).run("cpu"))


def test_low_precision_locations_are_widened() -> None:
    """The plain form never computes with locations below float32."""
    case = random_case(reference=0, dtype=torch.float32)
    low = [x.bfloat16() if x.is_floating_point() else x for x in case.arguments]
    wide = [low[0], *low[1:3], low[3].float(), low[4].float()]
    assert torch.equal(ops.ms_deform_attn(*low, backend="cpu"), ops.ms_deform_attn(*wide, backend="cpu"))


def test_second_derivatives_are_a_clear_error() -> None:
    case = random_case()
    value = case.value.requires_grad_()
    (grad,) = torch.autograd.grad(case.run("cpu").square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; .* create_graph"):
        grad.sum().backward()


def test_unbuilt_operator_falls_back_with_one_line(monkeypatch, caplog) -> None:
    case = random_case()
    expected = case.run("torch")
    monkeypatch.setitem(library.UNAVAILABLE, "cpu", "libpeft_d2_cpu is not built")
    monkeypatch.setattr(ops, "_logged", set())
    with caplog.at_level(logging.INFO, logger="peft_d2.ops"):
        assert torch.equal(case.run(), expected)
        case.run()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "libpeft_d2_cpu is not built" in caplog.text
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: libpeft_d2_cpu is not built"):
        case.run("cpu")


def test_environment_is_read() -> None:
    environment = {**os.environ, "PEFT_D2_BACKEND": "torch"}
    program = "from peft_d2 import ops; print(ops._ENVIRONMENT)"
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "torch"


@pytest.mark.parametrize(
    "choice, line", [("torch", "twin, as asked for"), ("cpu", "compiled operator"), ("cuda", "compiled operator")]
)
def test_environment_chooses(choice, line, monkeypatch, caplog) -> None:
    """A choice of another device's operator leaves this device's default."""
    monkeypatch.setattr(ops, "_ENVIRONMENT", choice)
    monkeypatch.setattr(ops, "_logged", set())
    with caplog.at_level(logging.INFO, logger="peft_d2.ops"):
        random_case().run()
    assert line in caplog.text


def test_unknown_backend_in_the_environment_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(ops, "_ENVIRONMENT", "fast")
    with pytest.raises(ValueError, match="backend is PEFT_D2_BACKEND='fast'; it should be 'torch', 'cpu' or 'cuda'"):
        random_case().run()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("value", lambda x: x[0], "value is torch.float64 of shape .*; it should be .* tensor (N, S, M, D)"),
        ("value", lambda x: x.long(), "value is torch.int64"),
        ("spatial_shapes", lambda x: x.double(), "spatial_shapes is torch.float64 .* integer tensor (L, 2)"),
        ("level_start_index", lambda x: x[:-1], "level_start_index is .* should be an integer tensor (L,) = (3,)"),
        ("reference", lambda x: x[..., :1], "reference_points is .* (N, Q, L, 2|4)"),
        (
            "points",
            lambda x: x[:, :, :2],
            "sampling_offsets is .* should be .* (N, Q, M, L, P, 2) = (2, 5, 3, 3, 2, 2)",
        ),
        ("weights", lambda x: x[..., :5], "attention_logits is .* should be .* (N, Q, M, L*P) = (2, 5, 3, 6)"),
        ("points", lambda x: x.to("meta"), "sampling_offsets is on meta; it should be on value's cpu"),
        ("spatial_shapes", lambda x: x + 1, "levels? .*should"),
        ("level_start_index", lambda x: x + 40, "level.*should"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_errors_name_the_argument(name, change, message, backend) -> None:
    case = random_case()
    setattr(case, name, change(getattr(case, name)))
    pattern = re.escape(message).replace(r"\.\*", ".*").replace(r"levels\?", "levels?")
    with pytest.raises((ValueError, RuntimeError), match=pattern):
        case.run(backend)


@pytest.mark.parametrize(
    "backend, message",
    [("triton", "backend is 'triton'; it should be"), ("cuda", "backend is 'cuda', but value is on cpu")],
)
def test_wrong_backends(backend, message) -> None:
    with pytest.raises(ValueError, match=message):
        random_case().run(backend)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("shapes", "start"),
    [
        ([[20000, 1]], 2**63 - 20000),  # start + height * width is 2**63, which is negative in 64 bits
        ([[1, 20000]], 2**63 - 20000),
        ([[20000, 1]], 1),
        ([[20000, 1]], -1),
        ([[2**32, 2**32]], 0),  # the product is 0 in 64 bits
        ([[2**63 - 1, 1]], 0),
        ([[0, 2**62]], 0),
    ],
)
def test_levels_whose_arithmetic_overflows_are_refused(shapes, start, backward) -> None:
    value = torch.randn(1, 20000, 1, 4)
    levels = torch.tensor(shapes), torch.tensor([start])
    points, weights = torch.rand(1, 2, 1, 1, 1, 2), torch.rand(1, 2, 1, 1, 1)
    with pytest.raises(RuntimeError, match="level"):
        if backward:
            torch.ops.peft_d2.ms_deform_attn_backward(
                torch.ones(1, 2, 4), value, *levels, None, points, weights, False, False
            )
        else:
            torch.ops.peft_d2.ms_deform_attn(value, *levels, None, points, weights)
