"""The operator as a part of torch: tracing, compilation, export, autocast, choice of the backend, errors."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from op_cases import BAD_LEVELS, Case, random_case

from peft_d2 import ops
from peft_d2.models.layers.transformer import MSDeformAttn
from peft_d2.ops import library

pytestmark = pytest.mark.skipif(bool(ops.backends()["cpu"]), reason=f"compiled operator: {ops.backends()['cpu']}")
SHAPES = torch.tensor([[4, 4], [2, 2], [1, 1]])
STARTS = torch.tensor([0, 16, 20])


def layer_and_inputs(numbers: int = 2) -> tuple[MSDeformAttn, tuple[torch.Tensor, ...]]:
    layer = MSDeformAttn(d_model=32, n_levels=3, n_heads=4, n_points=2)
    return layer, (torch.randn(2, 21, 32), torch.rand(2, 21, 3, numbers), torch.randn(2, 21, 32), SHAPES, STARTS)


@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device, reference) -> None:
    case = Case(*(None if x is None else x.to(device) for x in vars(random_case(reference=reference)).values()))
    for name in ("value", "points", "weights", "reference"):
        if getattr(case, name) is not None:
            getattr(case, name).requires_grad_()
    arguments = (case.value, case.spatial_shapes, case.level_start_index, case.reference, case.points, case.weights)
    torch.library.opcheck(torch.ops.peft_d2.ms_deform_attn.default, arguments)
    grad_output = torch.randn(2, 5, 24, dtype=torch.float64, device=device)
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
    caplog.clear()  # the twin's own line is there where an earlier test has made the log tell more
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
    with pytest.raises(
        ValueError, match="backend is PEFT_D2_BACKEND='fast'; it should be 'torch', 'gather', 'cpu' or 'cuda'"
    ):
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
        ("spatial_shapes", lambda x: x.to(torch.complex64), "spatial_shapes is torch.complex64 .* integer tensor"),
        ("level_start_index", lambda x: x > 0, "level_start_index is torch.bool .* integer tensor (L,)"),
        ("reference", lambda x: None, "reference_points is NoneType"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_errors_name_the_argument(name, change, message, backend) -> None:
    case = random_case()
    arguments = vars(case) | {name: change(getattr(case, name))}
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        ops.ms_deform_attn_fused(*arguments.values(), backend=backend)


@pytest.mark.parametrize(
    "backend, message",
    [("triton", "backend is 'triton'; it should be"), ("cuda", "backend is 'cuda', but value is on cpu")],
)
def test_wrong_backends(backend, message) -> None:
    with pytest.raises(ValueError, match=message):
        random_case().run(backend)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("reference", [0, 4])
@pytest.mark.parametrize("fault", BAD_LEVELS)
def test_levels_that_do_not_fill_value_are_refused(fault, reference, backend) -> None:
    case = random_case(reference=reference, dtype=torch.float32)
    shapes, starts, message = BAD_LEVELS[fault]
    case.spatial_shapes, case.level_start_index = torch.tensor(shapes), torch.tensor(starts)
    with pytest.raises(ValueError, match=f"ms_deform_attn: .*{message}"):
        case.run(backend)
    # The operator itself, which programs that were traced call without these checks, refuses the same.
    arguments = (case.value, case.spatial_shapes, case.level_start_index, case.reference, case.points, case.weights)
    with pytest.raises(RuntimeError, match="ms_deform_attn: .*level"):
        torch.ops.peft_d2.ms_deform_attn(*arguments)
    with pytest.raises(RuntimeError, match="ms_deform_attn: .*level"):
        torch.ops.peft_d2.ms_deform_attn_backward(torch.ones(2, 5, 24), *arguments, True, False)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n": 0, "heads": 2**31, "channels": 2**31},
        {"rows": 0, "heads": 2**31, "channels": 2},
        {"queries": 2**40, "points": 0},
        {"queries": 0, "levels": 0, "points": 2**40},
        {"n": 0, "queries": 2**31, "rows": 0},
        {"n": 2**31, "queries": 0, "rows": 2**28, "heads": 4, "channels": 0},
        {"n": 2**31, "rows": 0, "queries": 2**28, "heads": 4, "points": 0},
    ],
)
def test_sizes_whose_products_overflow_are_refused(sizes) -> None:
    """Tensors without numbers may have any other size."""
    given = {"n": 1, "rows": 1, "heads": 1, "channels": 1, "queries": 1, "levels": 1, "points": 1} | sizes
    n, rows, heads, channels, queries, levels, points = given.values()
    value = torch.empty(n, rows, heads, channels)
    locations = torch.empty(n, queries, heads, levels, points, 2)
    weights = torch.empty(n, queries, heads, levels, points)
    shapes = torch.tensor([[rows, 1]] * levels, dtype=torch.int64).reshape(levels, 2)
    starts = torch.zeros(levels, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="too large|at most 2.31"):
        torch.ops.peft_d2.ms_deform_attn(value, shapes, starts, None, locations, weights)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize(
    "sizes",
    [
        {"points": 0},
        {"channels": 0},
        {"heads": 0},
        {"n": 0},
        {"levels": ()},
        {"levels": ((0, 3), (2, 0))},
        {"levels": ((0, 3), (4, 2), (0, 0))},
    ],
)
def test_nothing_to_sample_gives_zeros(sizes, reference, backend) -> None:
    """An empty level among others changes nothing."""
    levels, number = sizes.get("levels", ((5, 7), (1, 1))), len(sizes.get("levels", ((5, 7), (1, 1))))
    rows = sum(height * width for height, width in levels)
    n, heads, channels, points = (sizes.get(k, v) for k, v in (("n", 2), ("heads", 3), ("channels", 4), ("points", 2)))
    shapes = torch.tensor(levels, dtype=torch.int64).reshape(-1, 2)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    tensors = {
        "value": torch.randn(n, rows, heads, channels),
        "reference": torch.rand(n, 5, number, reference) if reference else None,
        "points": torch.randn(n, 5, heads, number, points, 2),
        "weights": torch.rand(n, 5, heads, number * points) if reference else torch.rand(n, 5, heads, number, points),
    }
    case = Case(tensors["value"], shapes, starts, tensors["reference"], tensors["points"], tensors["weights"])
    found = case.run_with_gradients(torch.randn(n, 5, heads * channels), backend)
    for name in case.leaves():
        assert found[name].shape == tensors[name].shape
        assert found[name].isfinite().all()
    if levels == ((0, 3), (4, 2), (0, 0)):
        kept = Case(
            tensors["value"],
            shapes[1:2],
            starts[1:2],
            None if reference == 0 else tensors["reference"][:, :, 1:2],
            tensors["points"][:, :, :, 1:2],
            tensors["weights"].view(n, 5, heads, number, points)[:, :, :, 1:2],
        )
        if reference == 0:
            torch.testing.assert_close(found["output"], kept.run("cpu"))
        assert not found["points"][:, :, :, [0, 2]].any()
    else:
        assert not any(x.any() for x in found.values())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reference", [0, 2, 4])
def test_the_pure_torch_twin_exports_exactly(reference, strict) -> None:
    class Attention(torch.nn.Module):
        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            function = ops.ms_deform_attn_fused if reference else ops.ms_deform_attn
            return function(*arguments, backend="torch")

    case, other = random_case(reference=reference), random_case(reference=reference, seed=1)
    exported = torch.export.export(Attention(), tuple(case.arguments), strict=strict).module()
    # The levels are an input: another split of as many rows into as many levels.
    other.spatial_shapes = torch.tensor([[3, 5], [8, 4], [1, 1]])
    other.level_start_index = torch.tensor([0, 15, 47])
    for again in (case, other):
        assert torch.equal(exported(*again.arguments), again.run("torch"))


def test_the_pure_torch_twin_compiles_without_graph_breaks() -> None:
    case = random_case(reference=4)
    leaves, grad = list(case.leaves().values()), torch.randn(2, 5, 24, dtype=torch.float64)
    compiled = torch.compile(
        lambda *x: ops.ms_deform_attn_fused(*x, backend="torch"), fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(*case.arguments), leaves, grad)
    for a, b in zip(found, torch.autograd.grad(case.run("torch"), leaves, grad), strict=True):
        torch.testing.assert_close(a, b)
