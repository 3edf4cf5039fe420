"""The operator under the address and undefined-behaviour sanitizers: sound calls are clean, bad levels are refused.

The CPU library is built whole, the CUDA kernels' bodies for the host (cuda_on_host.h); one process runs both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from op_cases import BAD_LEVELS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++")
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-g1",
    "-O0",
    "-fPIC",
    "-std=c++17",
    "-Wno-attributes",
]


def runtime(name: str) -> str:
    """The sanitizer's library, which must be loaded before all others; "" where the compiler has none."""
    found = subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs Linux and g++"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs a source tree"),
    pytest.mark.skipif(
        tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10), reason="needs torch >= 2.10"
    ),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not runtime("libasan.so"):
        pytest.skip("the compiler has no address sanitizer")
    folder, torch_folder = tmp_path_factory.mktemp("sanitizers"), Path(torch.__file__).parent
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_folder / "include")]
    sources = {
        "kernels.o": [*stable, "-DPEFT_D2_KERNELS=kernels_plain", "-c", "csrc/cpu/kernels.cpp"],
        "entry.o": [*stable, "-c", "csrc/cpu/ms_deform_attn.cpp"],
        "schemas.o": [*stable, "-c", "csrc/registration.cpp"],
        "cuda.so": ["-shared", "-Wno-unknown-pragmas", str(HERE / "cuda_on_host.cpp")],
    }
    commands = [[str(COMPILER), *SANITIZE, *rest, "-o", str(folder / name)] for name, rest in sources.items()]

    def build(command: list[str]) -> None:
        subprocess.run(command, check=True, cwd=ROOT)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, commands))
    objects = [str(folder / name) for name in sources if name.endswith(".o")]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    build([str(COMPILER), *SANITIZE, "-shared", *objects, "-o", str(folder / "cpu.so"), *link])
    return folder


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
    }
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


CPU = """
import sys, torch
torch.__version__ = "2.9"  # keeps the package from loading its own library
torch.ops.load_library(sys.argv[1])
from op_cases import BAD_LEVELS, DTYPES, LEVELS, random_case

def call(case):
    arguments = (case.value, case.spatial_shapes, case.level_start_index, case.reference, case.points, case.weights)
    output = torch.ops.peft_d2.ms_deform_attn(*arguments)
    torch.ops.peft_d2.ms_deform_attn_backward(output, *arguments, True, False)

for dtype, raw, _ in DTYPES:
    for reference in (0, 2, 4):
        for channels, queries, points in ((1, 5, 2), (13, 0, 1), (32, 3, 4), (8, 5, 0), (0, 5, 2), (8, 9, 40)):
            case = random_case(LEVELS, 1, 2, channels, queries, points, reference, dtype, raw)
            for bad in (0.5, float("nan"), float("inf"), 6e4, -6e4):
                case.points[0, 0].fill_(bad)
                call(case)
refused = 0
for shapes, starts, _ in BAD_LEVELS.values():
    case = random_case(dtype=torch.float32)
    case.spatial_shapes, case.level_start_index = torch.tensor(shapes), torch.tensor(starts)
    try:
        call(case)
    except RuntimeError as error:
        refused += "level" in str(error)
print("refused", refused, len(BAD_LEVELS))
"""

CUDA = """
import ctypes, os, signal, sys, torch
torch.__version__ = "2.9"
from op_cases import BAD_LEVELS, DTYPES, LEVELS, random_case
from test_cuda_on_host import run

library, stopped = ctypes.CDLL(sys.argv[1]), 0
for dtype, raw, _ in DTYPES[::2]:
    for channels, queries, points, vectors in ((5, 4, 2, False), (16, 0, 1, True), (64, 3, 4, True)):
        case = random_case(LEVELS, 1, 2, channels, queries, points, 2, dtype, raw)
        for deterministic in (False, True):
            run(library, case, torch.ones(1, case.points.shape[1], 2 * channels), vectors, deterministic)
for shapes, starts, _ in BAD_LEVELS.values():
    if not (child := os.fork()):
        case = random_case(dtype=torch.float32, n=1, heads=1)
        case.spatial_shapes, case.level_start_index = torch.tensor(shapes), torch.tensor(starts)
        run(library, case, torch.ones(1, 5, 8), True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    stopped += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT
print("stopped", stopped, len(BAD_LEVELS))
"""


@pytest.mark.parametrize("name, program", [("cpu.so", CPU), ("cuda.so", CUDA)])
def test_sound_calls_are_clean_and_bad_levels_end_before_they_read(libraries, name, program) -> None:
    """The CPU operator refuses bad levels, the CUDA kernels end by their own trap; no sanitizer speaks before."""
    result = run(program, str(libraries / name))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].split()[1:] == [str(len(BAD_LEVELS))] * 2, result.stdout
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr, result.stderr[-3000:]
