"""The operator's numbers: against published outputs, finite differences, and the pure-torch twin in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, Case, assert_same, golden_cases, oracle, random_case

from peft_d2 import ops

BACKENDS = [name for name in ("cpu", "torch", "gather") if not ops.backends()[name]]
NEEDS_CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason=f"compiled operator: {ops.backends()['cpu']}")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def gradient_for(case: Case) -> torch.Tensor:
    n, _, heads, channels = case.value.shape
    return torch.randn(n, case.points.shape[1], heads * channels, dtype=torch.float64).to(case.value.dtype)


def check_on(device: str, case: Case, tolerance: float) -> None:
    grad_output = gradient_for(case)
    moved = Case(*(None if x is None else x.to(device) for x in vars(case).values()))
    found = moved.run_with_gradients(grad_output.to(device), device)
    assert_same({name: x.cpu() for name, x in found.items()}, oracle(case, grad_output), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(6))
def test_equals_published_outputs(index, backend) -> None:
    golden = golden_cases()[index]
    names = ["value", "sampling_locations", "attention_weights"]
    value, locations, weights = (golden[name].requires_grad_() for name in names)
    output = ops.ms_deform_attn(
        value, golden["spatial_shapes"], golden["level_start_index"], locations, weights, backend=backend
    )
    output.backward(golden["grad_output"])
    found = {"output": output.detach(), "grad_value": value.grad, "grad_attention_weights": weights.grad}
    assert_same(found, {name: golden[name] for name in found}, 1e-12)
    smooth = ~golden["kink_mask"][..., None]
    expected = {"locations": golden["grad_sampling_locations"] * smooth}
    assert_same({"locations": locations.grad * smooth}, expected, 1e-12)


@NEEDS_CPU
@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_equal_finite_differences(device, reference) -> None:
    case = random_case(levels=((3, 4), (2, 2)), heads=2, channels=3, queries=3, reference=reference)
    arguments = [x.to(device).requires_grad_(x.is_floating_point()) for x in case.arguments]
    function = ops.ms_deform_attn if reference == 0 else ops.ms_deform_attn_fused
    # Atomics add in any order.
    assert torch.autograd.gradcheck(lambda *x: function(*x, backend=device), arguments, nondet_tol=1e-12)


@NEEDS_CPU
@pytest.mark.parametrize("dtype, raw, tolerance", DTYPES)
@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize("queries", [5, 0])
@pytest.mark.parametrize("device", DEVICES)
def test_every_type(device, dtype, raw, tolerance, reference, queries) -> None:
    check_on(device, random_case(dtype=dtype, raw=raw, reference=reference, queries=queries), tolerance)


@NEEDS_CPU
@pytest.mark.parametrize("channels", [1, 5, 30, 32, 64, 256])
@pytest.mark.parametrize("queries", [4, 0])
@pytest.mark.parametrize("device", DEVICES)
def test_every_width(device, channels, queries) -> None:
    check_on(device, random_case(channels=channels, queries=queries, dtype=torch.float32), 2e-5)


LEVEL = st.tuples(st.integers(1, 6), st.integers(1, 6))


@NEEDS_CPU
@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(LEVEL, min_size=1, max_size=4),
    n=st.integers(0, 2),
    heads=st.integers(1, 4),
    channels=st.sampled_from([1, 3, 8, 17, 32]),
    queries=st.integers(-1, 9),
    points=st.integers(1, 5),
    reference=st.sampled_from([0, 2, 4]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(levels, n, heads, channels, queries, points, reference, dtype, seed) -> None:
    case = random_case(tuple(levels), n, heads, channels, max(queries, 0), points, reference, dtype, seed=seed)
    if queries < 0:
        case.points, case.weights = case.points[:, :0], case.weights[:, :0]
        case.reference = None if case.reference is None else case.reference[:, :0]
    check_on("cpu", case, 1e-11 if dtype == torch.float64 else 1e-4)


@NEEDS_CPU
@settings(max_examples=60, deadline=None)
@given(
    x=st.sampled_from([-1e30, -7.0, -1.5, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0, 1e9, 1e30]),
    y=st.sampled_from([-1e30, -1.0, 0.0, 0.5, 0.75, 1.0, 2.0, 1e30]),
    size=LEVEL,
)
def test_borders_pixel_centres_and_far_away(x, y, size) -> None:
    """Where the location gradient is one-sided only the output and the other gradients are defined."""
    case = random_case((size,), n=1, heads=1, channels=4, queries=1, points=1, reference=0)
    height, width = size
    for centre in (False, True):
        # Half a pixel further: on a pixel's centre where x * W is an integer.
        offset = torch.tensor([0.5 / width, 0.5 / height], dtype=torch.float64) * centre
        case.points = torch.tensor([x, y], dtype=torch.float64).reshape(1, 1, 1, 1, 1, 2) + offset
        grad_output = gradient_for(case)
        expected = oracle(case, grad_output)
        assert_same(
            case.run_with_gradients(grad_output, "cpu"), {k: expected[k] for k in expected if k != "points"}, 1e-9
        )


@NEEDS_CPU
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["value", "reference", "points", "weights"])
@pytest.mark.parametrize("backend", ["cpu", "torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_non_finite_input_spoils_only_what_it_touches(backend, name, bad) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    case = Case(*(x.to(device) for x in vars(random_case(n=2, dtype=torch.float32)).values()))
    grad_output = gradient_for(case).to(device)
    clean = case.run(backend)
    getattr(case, name)[0, 0].fill_(bad)
    found = case.run_with_gradients(grad_output, backend)["output"]
    assert torch.equal(found[1], clean[1])


@NEEDS_CPU
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_point_outside_reads_nothing(backend, bad) -> None:
    """Neither the value of any pixel nor the point's own weight matters, however bad."""
    device = "cuda" if backend == "cuda" else "cpu"
    case = random_case(n=1, reference=0, dtype=torch.float32)
    case.points.fill_(2.0)
    case.value.fill_(bad)
    case = Case(*(None if x is None else x.to(device) for x in vars(case).values()))
    found = case.run_with_gradients(gradient_for(case).to(device), backend)
    assert not any(found[name].any() for name in found)


@NEEDS_CPU
@pytest.mark.parametrize("device", DEVICES)
def test_inputs_need_not_be_contiguous(device) -> None:
    case = random_case(reference=4)
    grad_output = gradient_for(case)
    expected = oracle(case, grad_output)
    strided = Case(*(x.to(device).transpose(0, -1).contiguous().transpose(0, -1) for x in vars(case).values()))
    assert not strided.value.is_contiguous()
    found = strided.run_with_gradients(grad_output.to(device).transpose(0, 2).contiguous().transpose(0, 2), device)
    assert_same({name: x.cpu() for name, x in found.items()}, expected, 1e-12)


@NEEDS_CPU
def test_gradients_add_up_where_value_is_shared() -> None:
    first, second = random_case(seed=1), random_case(seed=2)
    value = first.value.requires_grad_()
    second.value = value
    grad_output = gradient_for(first)
    (first.run("cpu") + second.run("cpu")).backward(grad_output)
    expected = oracle(first, grad_output)["value"] + oracle(second, grad_output)["value"]
    assert_same({"value": value.grad}, {"value": expected}, 1e-12)


@NEEDS_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [700, 3])
def test_threads_do_not_change_a_bit(two_threads, dtype, queries) -> None:
    case = random_case(n=3, heads=5, queries=queries, dtype=dtype)
    grad_output = gradient_for(case)
    two = case.run_with_gradients(grad_output, "cpu")
    torch.set_num_threads(1)
    one = case.run_with_gradients(grad_output, "cpu")
    # Packing depends on the number of threads and only moves data.
    assert all(torch.equal(one[name], two[name]) for name in one)


@NEEDS_CPU
@pytest.mark.parametrize("kernels", ["plain", "avx2", "avx512"])
def test_every_instruction_set(kernels, monkeypatch) -> None:
    """A processor that lacks one falls back, so this only tests what it has."""
    monkeypatch.setenv("PEFT_D2_CPU_KERNELS", kernels)
    for dtype, raw, tolerance in DTYPES:
        for channels, queries in ((32, 60), (13, 3)):
            check_on("cpu", random_case(dtype=dtype, raw=raw, channels=channels, queries=queries), tolerance)


@NEEDS_CPU
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
def test_backward_takes_no_more_memory_than_the_gradient_in_float32() -> None:
    program = """
import resource, torch
from peft_d2 import ops
torch.set_num_threads(2)
shapes = torch.tensor([[160, 160], [80, 80]])
rows, heads, channels, points = int(shapes.prod(1).sum()), 8, 64, 1
op = torch.ops.peft_d2
value = torch.randn(1, rows, heads, channels).bfloat16()
points = torch.rand(1, rows, heads, 2, 1, 2)
weights = torch.rand(1, rows, heads, 2, 1)
grad = torch.randn(1, rows, heads * channels).bfloat16()
arguments = (value, shapes, torch.tensor([0, 25600]), None, points, weights)
small = [x[:, :4] if i > 3 else x for i, x in enumerate(arguments)]
op.ms_deform_attn_backward(grad[:, :4], *small, False, False)  # all but the packing has run once
outputs = value.numel() * 2 + points.numel() * 4 + weights.numel() * 4
keep = torch.ones(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
op.ms_deform_attn_backward(grad, *arguments, False, False)
extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - outputs
print(extra / (value.numel() * 4))
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert float(result.stdout) <= 1.05
