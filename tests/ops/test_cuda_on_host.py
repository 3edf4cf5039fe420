"""The CUDA kernels' own source, run thread by thread on the host, against the pure-torch twin."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import DTYPES, Case, assert_same, golden_cases, oracle, random_case
from torch import Tensor

from peft_d2.ops.reference import accumulation_dtype

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
TYPES = [(value, raw) for value, raw, _ in DTYPES]
pytestmark = pytest.mark.skipif(
    not (COMPILER and sys.platform == "linux"), reason="needs a C++ compiler and Linux's coroutines (ucontext.h)"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("cuda_on_host") / "kernels.so"
    source = Path(__file__).with_name("cuda_on_host.cpp")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def run(
    library: ctypes.CDLL, case: Case, grad_output: Tensor, vectors: bool, deterministic: bool = False, blocks: int = 0
) -> dict[str, Tensor]:
    n, s, heads, channels = case.value.shape
    queries, levels, points = case.points.shape[1], case.points.shape[3], case.points.shape[4]
    numbers = 0 if case.reference is None else case.reference.shape[-1]
    sizes = (ctypes.c_int64 * 8)(n, s, heads, channels, queries, levels, points, numbers)
    kind = TYPES.index((case.value.dtype, case.points.dtype))
    inputs = pointers(
        [case.spatial_shapes, case.level_start_index, case.value, case.reference, case.points, case.weights]
    )
    wide = accumulation_dtype(case.value.dtype)
    output = case.value.new_full((n, queries, heads * channels), torch.nan)
    library.run_forward(sizes, inputs, ctypes.c_void_p(output.data_ptr()), kind, vectors, blocks)

    grad_output = grad_output.to(case.value.dtype).contiguous()
    grads = [
        grad_output,
        torch.zeros(case.value.shape, dtype=wide),
        torch.full((n, queries, heads, levels, numbers), torch.nan, dtype=wide),
        torch.full_like(case.points, torch.nan),
        torch.full_like(case.weights, torch.nan),
        torch.full((n, queries, heads, levels * points), torch.nan, dtype=wide),
    ]
    library.run_backward(sizes, inputs, pointers(grads), kind, vectors, deterministic, blocks)
    found = {"output": output, "value": grads[1], "points": grads[3], "weights": grads[4]}
    return found | ({"reference": grads[2].sum(2)} if numbers else {})


def check(library: ctypes.CDLL, case: Case, tolerance: float, vectors: bool, **options: int) -> None:
    n, _, heads, channels = case.value.shape
    grad_output = torch.randn(n, case.points.shape[1], heads * channels).to(case.value.dtype)
    assert_same(run(library, case, grad_output, vectors, **options), oracle(case, grad_output), tolerance)


@pytest.mark.parametrize("dtype, raw, tolerance", DTYPES)
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("reference", [2, 4])
def test_every_type(library, dtype, raw, tolerance, vectors, reference) -> None:
    check(library, random_case(dtype=dtype, raw=raw, reference=reference), tolerance, vectors)


@pytest.mark.parametrize(
    "channels, vectors", [(1, False), (5, False), (30, False), (32, True), (64, True), (256, False)]
)
@pytest.mark.parametrize("queries", [0, 37])
def test_every_width_and_tiling(library, channels, vectors, queries) -> None:
    case = random_case(channels=channels, queries=queries, heads=2, n=1, reference=0, dtype=torch.float32)
    check(library, case, 2e-5, vectors)


@pytest.mark.parametrize("blocks", [1, 2, 64])
def test_any_grid_does_all_tiles(library, blocks) -> None:
    case = random_case(levels=((9, 17), (4, 9), (1, 1)), queries=0, heads=1, channels=16, dtype=torch.float32)
    check(library, case, 2e-5, True, blocks=blocks)
    check(library, case, 2e-5, True, blocks=blocks, deterministic=True)


def test_many_points_make_blocks_smaller(library) -> None:
    check(library, random_case(points=60, heads=1, channels=4, queries=9, dtype=torch.float32), 2e-5, True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["value", "reference", "points", "weights"])
def test_non_finite_input_spoils_only_what_it_touches(library, name, bad) -> None:
    case = random_case(n=2, dtype=torch.float32)
    grad_output = torch.randn(2, 5, 24)
    clean = run(library, case, grad_output, True)
    getattr(case, name)[0, 0].fill_(bad)
    found = run(library, case, grad_output, True)
    assert all(torch.equal(found[key][1], clean[key][1]) for key in clean if key != "value")


@pytest.mark.parametrize("reference", [0, 2, 4])
def test_deterministic_gradient_repeats_bit_for_bit(library, reference) -> None:
    case = random_case(queries=40, reference=reference, dtype=torch.float32)
    grad_output = torch.randn(2, 40, 24)
    first = run(library, case, grad_output, True, deterministic=True, blocks=1)
    assert_same(first, oracle(case, grad_output), 2e-5)
    second = run(library, case, grad_output, True, deterministic=True, blocks=5)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_published_outputs(library) -> None:
    for golden in golden_cases():
        names = ["value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"]
        value, shapes, starts, locations, weights = (golden[name] for name in names)
        case = Case(value, shapes, starts, None, locations, weights)
        found = run(library, case, golden["grad_output"], vectors=value.shape[-1] % 2 == 0)
        expected = {
            "output": golden["output"],
            "value": golden["grad_value"],
            "weights": golden["grad_attention_weights"],
        }
        assert_same(found, expected, 1e-12)
        smooth = ~golden["kink_mask"][..., None]
        assert_same({"points": found["points"] * smooth}, {"points": golden["grad_sampling_locations"] * smooth}, 1e-12)
