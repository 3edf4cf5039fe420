"""What only a CUDA device has: graphs, streams, atomics, 2^31 elements, and kernels that stop themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import BAD_LEVELS, Case, assert_same, oracle, random_case

from peft_d2 import ops

pytestmark = pytest.mark.gpu


def on_gpu(case: Case) -> Case:
    return Case(*(None if x is None else x.cuda() for x in vars(case).values()))


def test_deterministic_gradients_repeat_bit_for_bit() -> None:
    case, grad = random_case(queries=0, dtype=torch.float32), torch.randn(2, 48, 24)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (on_gpu(case).run_with_gradients(grad.cuda(), "cuda") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same({name: x.cpu() for name, x in first.items()}, oracle(case, grad), 2e-5)


def test_a_captured_graph_follows_its_inputs() -> None:
    case = on_gpu(random_case(dtype=torch.float32))
    leaves, grad = list(case.leaves().values()), torch.randn(2, 5, 24, device="cuda")

    def step() -> list[torch.Tensor]:
        output = case.run("cuda")
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        case.value.copy_(torch.randn_like(case.value))
    graph.replay()
    for a, b in zip(found, step(), strict=True):
        torch.testing.assert_close(a, b)


def test_runs_on_the_current_stream() -> None:
    """A second stream's result is right although the default stream is kept busy, and waits for nothing there."""
    case = on_gpu(random_case(dtype=torch.float32))
    expected = case.run("cuda")
    torch.cuda.synchronize()
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda._sleep(500_000_000)  # a quarter of a second on the default stream
    with torch.cuda.stream(side):
        found = case.run("cuda")
        done.record()
    done.synchronize()
    assert not torch.cuda.default_stream().query(), "the default stream should still be busy"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_beyond_two_to_the_31_elements(dtype) -> None:
    """The second level begins at element 2^31 of value."""
    if torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs 50 GiB of free GPU memory")
    small = on_gpu(random_case(((8, 8),), 1, 8, 256, 64, 4, 0, dtype))
    before = 1 << 20
    value = torch.cat([torch.zeros(1, before, 8, 256, device="cuda", dtype=dtype), small.value.detach()], 1)
    assert before * 8 * 256 >= 2**31
    large = Case(
        value,
        torch.tensor([[1024, 1024], [8, 8]], device="cuda"),
        torch.tensor([0, before], device="cuda"),
        None,
        torch.cat([torch.full_like(small.points, 0.5), small.points], 3),
        torch.cat([torch.zeros_like(small.weights), small.weights], 3),
    )
    grad = torch.randn(1, 64, 2048, device="cuda", dtype=dtype)
    found, expected = large.run_with_gradients(grad, "cuda"), small.run_with_gradients(grad, "cuda")
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found["output"], expected["output"], **tolerance)
    torch.testing.assert_close(found["value"][:, before:], expected["value"], **tolerance)
    torch.testing.assert_close(found["points"][:, :, :, 1:], expected["points"], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("fault", ["sum beyond 64 bits", "overlapping", "larger"])
def test_bad_levels_stop_the_kernel(fault) -> None:
    """In a process of its own: a kernel that stops itself ends the process's use of the device."""
    program = f"""
import torch
from op_cases import BAD_LEVELS, random_case
case = random_case(dtype=torch.float32)
shapes, starts, _ = BAD_LEVELS[{fault!r}]
levels = torch.tensor(shapes).cuda(), torch.tensor(starts).cuda()
arguments = case.value.cuda(), *levels, case.reference.cuda(), case.points.cuda(), case.weights.cuda()
from peft_d2 import ops
ops.ms_deform_attn_fused(*arguments, backend="cuda")
torch.cuda.synchronize()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=100
    )
    assert result.returncode != 0
    assert "check spatial_shapes and level_start_index" in result.stdout + result.stderr


def test_levels_on_the_cpu_are_checked_before_anything_runs() -> None:
    case = on_gpu(random_case())
    shapes, starts, message = BAD_LEVELS["overlapping"]
    case.spatial_shapes, case.level_start_index = torch.tensor(shapes), torch.tensor(starts)
    with pytest.raises(ValueError, match=message):
        case.run("cuda")


@pytest.mark.parametrize("reference", [0, 2, 4])
def test_nothing_to_sample_gives_zeros(reference) -> None:
    for sizes in ({"points": 0}, {"channels": 0}):
        case = on_gpu(random_case(reference=reference, **sizes))
        found = case.run_with_gradients(torch.randn(case.run("cuda").shape, device="cuda"), "cuda")
        assert not any(x.any() for x in found.values())


def test_inductor_compiles_it_whole() -> None:
    case = on_gpu(random_case(reference=4, dtype=torch.float32))
    compiled = torch.compile(lambda *x: ops.ms_deform_attn_fused(*x, backend="cuda") * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*case.arguments), case.run("cuda") * 2)
