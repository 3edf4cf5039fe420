"""Measure multi-scale deformable attention: ours against the pure-torch core and other implementations.

    python tools/benchmark_op.py                         the machine's GPU if there is one, else its CPU
    python tools/benchmark_op.py --device cpu --threads 1 2 --dtypes float32 bfloat16
    python tools/benchmark_op.py --check                 only compare the results with the twin in float64

All implementations of a case take turns of about the same length, round by round, so that other load on the machine
meets all of them alike; a turn begins with a run that does not count, as the one before has left its own data in the
caches. The figures are medians. CPU times are wall times, CUDA times come from events. "fused" runs start from the
raw projections: peers get softmax and locations computed by torch, as in their own modules. "torch" is the pure-torch
core in the type of value, as published; "twin" is this package's, which sums in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_d2 import ops
from peft_d2.ops.reference import accumulation_dtype, sampling_locations_from_offsets

Core = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes: levels (H, W), batch N, queries (None: one for each pixel)."""

    name: str
    levels: tuple[tuple[int, int], ...]
    n: int = 1
    queries: int | None = None
    heads: int = 8
    channels: int = 32
    points: int = 4


CPU_CASES = [
    Case("encoder, 512 px", ((64, 64), (32, 32), (16, 16))),
    Case("300 queries, 512 px", ((64, 64), (32, 32), (16, 16)), queries=300),
]
CUDA_CASES = [
    Case("Mask2Former encoder, 1024 px", ((128, 128), (64, 64), (32, 32))),
    Case("Mask DINO encoder, 1024 px", ((128, 128), (64, 64), (32, 32), (16, 16))),
    Case("300 queries, 1024 px, N 4", ((128, 128), (64, 64), (32, 32), (16, 16)), n=4, queries=300),
]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds."""

    case: str
    device: str
    threads: int
    dtype: str
    form: str
    implementation: str
    forward: float
    forward_backward: float


def published_core(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The pure-torch formula in the type of value throughout."""
    n, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = 2 * locations.to(value.dtype) - 1
    parts = []
    for level, rows in enumerate(value.split([h * w for h, w in shapes.tolist()], dim=1)):
        height, width = shapes[level].tolist()
        image = rows.flatten(2).transpose(1, 2).reshape(n * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        parts.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.to(value.dtype).transpose(1, 2).reshape(n * heads, 1, queries, len(parts) * points)
    return (torch.stack(parts, -2).flatten(-2) * weights).sum(-1).view(n, heads * channels, queries).transpose(1, 2)


def peers(device: str) -> dict[str, Core]:
    """Cores of other packages that run on `device`, as far as they are installed, in the plain form."""
    found: dict[str, Core] = {}
    try:
        from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

        found["transformers"] = _pure_torch(multi_scale_deformable_attention)
    except ImportError as error:
        print(f"transformers is left out: {error}")
    try:
        import mmcv.ops.multi_scale_deform_attn as mmcv
    except ImportError as error:
        print(f"mmcv is left out: {error}")
    else:
        kernels: Core = lambda *x: mmcv.MultiScaleDeformableAttnFunction.apply(*x, 64)  # noqa: E731
        found["mmcv"] = kernels if device == "cuda" else _pure_torch(mmcv.multi_scale_deformable_attn_pytorch)
    try:
        import torch_ms_deform_attn
    except ImportError as error:
        print(f"torch-ms-deform-attn is left out: {error}")
    else:
        found["torch-ms-deform-attn"] = lambda value, *levels_and_points: torch_ms_deform_attn.ms_deform_attn(
            value, *levels_and_points[:2], *(x.to(value.dtype) for x in levels_and_points[2:])
        )
    if device == "cpu":
        return found  # the others have no CPU kernels
    try:
        import MultiScaleDeformableAttention as official
    except ImportError as error:
        print(f"the official operator is left out: {error}")
    else:
        if "peft_d2" in (official.__doc__ or ""):
            print("the official operator is left out: peft_d2 serves its name here")
        else:
            found["official"] = _official(official)
    try:
        from kernels import get_kernel

        found["kernels-community"] = _official(get_kernel("kernels-community/deformable-detr"))
    except Exception as error:  # the package, its network and its binaries all fail in their own ways
        print(f"transformers' kernels are left out: {type(error).__name__}: {error}")
    return found


def _pure_torch(function: Callable[[Tensor, list, Tensor, Tensor], Tensor]) -> Core:
    """A formula by grid_sample, which needs all in one type."""
    return lambda value, shapes, starts, locations, weights: function(
        value, shapes.tolist(), locations.to(value.dtype), weights.to(value.dtype)
    )


def _official(module) -> Core:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return module.ms_deform_attn_forward(*inputs, 64)

        @staticmethod
        def backward(ctx, grad):
            value, locations, weights = module.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), 64)
            return value, None, None, locations, weights

    return Function.apply


@dataclass
class Inputs:
    """Tensors of a case, value, offsets and logits being leaves."""

    value: Tensor
    shapes: Tensor
    starts: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Offsets like a trained model's: a few pixels."""
    torch.manual_seed(0)
    shapes = torch.tensor(case.levels)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    rows, levels = int(shapes.prod(1).sum()), len(case.levels)
    if case.queries is None:
        axes = [((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in case.levels]
        pixels = [torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).reshape(-1, 2) for y, x in axes]
        reference = torch.cat(pixels)[None, :, None].expand(case.n, -1, levels, -1).contiguous()
    else:
        reference = torch.rand(case.n, case.queries, levels, 2)
    queries = reference.shape[1]
    value = torch.randn(case.n, rows, case.heads, case.channels).to(dtype)
    offsets = (torch.randn(case.n, queries, case.heads, levels, case.points, 2) * 2).to(dtype)
    logits = torch.randn(case.n, queries, case.heads, levels * case.points).to(dtype)
    wide = accumulation_dtype(dtype)
    locations = sampling_locations_from_offsets(reference.to(wide), offsets.to(wide), shapes)
    weights = logits.to(wide).softmax(-1).view(offsets.shape[:-1])
    grad = torch.randn(case.n, queries, case.heads * case.channels).to(dtype)
    tensors = [value, shapes, starts, reference, offsets, logits, locations, weights, grad]
    moved = Inputs(*(x.to(device) for x in tensors))
    for leaf in (moved.value, moved.offsets, moved.logits, moved.locations, moved.weights):
        leaf.requires_grad_()
    return moved


def runs(inputs: Inputs, form: str, device: str, cores: dict[str, Core]) -> dict[str, Callable[[], Tensor]]:
    """A forward pass for each implementation."""
    x = inputs
    levels = (x.value, x.shapes, x.starts)
    plain = (*levels, x.locations, x.weights)
    fused = (*levels, x.reference, x.offsets, x.logits)

    def from_projections(core: Core) -> Tensor:
        locations = sampling_locations_from_offsets(x.reference, x.offsets.float(), x.shapes)
        weights = x.logits.softmax(-1).view(x.offsets.shape[:-1])
        return core(*levels, locations, weights)

    found: dict[str, Callable[[], Tensor]] = {}
    if form == "plain":
        found["ours"] = lambda: ops.ms_deform_attn(*plain, backend=device)
        found["twin"] = lambda: ops.ms_deform_attn(*plain, backend="torch")
    else:
        found["ours"] = lambda: ops.ms_deform_attn_fused(*fused, backend=device)
        found["twin"] = lambda: ops.ms_deform_attn_fused(*fused, backend="torch")
    for name, core in {"torch": published_core, **cores}.items():
        found[name] = (
            (lambda core=core: core(*plain)) if form == "plain" else (lambda core=core: from_projections(core))
        )
    return found


def leaves_of(inputs: Inputs, form: str) -> list[Tensor]:
    return [inputs.value, *((inputs.locations, inputs.weights) if form == "plain" else (inputs.offsets, inputs.logits))]


def milliseconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def measure(case: Case, device: str, dtype: torch.dtype, form: str, rounds: int, cores: dict[str, Core]) -> list[Row]:
    """Medians of all implementations of one case, which take turns."""
    inputs = make_inputs(case, device, dtype)
    leaves = leaves_of(inputs, form)
    steps: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    functions = runs(inputs, form, device, cores)
    for name, forward in functions.items():
        steps[name] = lambda f=forward: torch.autograd.grad(f(), leaves, inputs.grad)
        try:
            steps[name]()  # warms up
            first[name] = milliseconds(steps[name], device)
        except (RuntimeError, NotImplementedError) as error:
            print(f"  {name} does not run {dtype}: {str(error).splitlines()[0]}")
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in first}
    for _ in range(rounds):
        for name, (forwards, both) in times.items():
            for run in range(1 + min(50, max(1, round(max(first.values()) / first[name])))):
                with torch.no_grad():
                    one = milliseconds(functions[name], device)
                step = milliseconds(steps[name], device)
                if run:
                    forwards.append(one)
                    both.append(step)
    threads = torch.get_num_threads() if device == "cpu" else 0
    kind = str(dtype).removeprefix("torch.")
    return [
        Row(case.name, device, threads, kind, form, name, statistics.median(a), statistics.median(b))
        for name, (a, b) in times.items()
    ]


def check(case: Case, device: str, dtype: torch.dtype, form: str) -> float:
    """The largest difference to the twin in float64, of output and gradients, each relative to its largest number."""
    inputs = make_inputs(case, device, dtype)
    leaves = leaves_of(inputs, form)
    arguments = [inputs.shapes, inputs.starts] + ([] if form == "plain" else [inputs.reference.to(leaves[1].dtype)])
    function = ops.ms_deform_attn if form == "plain" else ops.ms_deform_attn_fused
    wide_leaves = [x.detach().double().requires_grad_() for x in leaves]
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    output = function(leaves[0], *arguments, *leaves[1:], backend=device)
    expected = function(wide_leaves[0], *wide, *wide_leaves[1:], backend="torch")
    found = [output, *torch.autograd.grad(output, leaves, inputs.grad)]
    truth = [expected, *torch.autograd.grad(expected, wide_leaves, inputs.grad.double())]
    # A location's gradient jumps at pixel borders, where rounding decides the side: nearly all must agree.
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        difference = (a.detach().double() - b.detach()).abs().flatten() / b.abs().max()
        worst = max(worst, difference.kthvalue(max(1, int(difference.numel() * 0.999))).values.item())
    return worst


def table(rows: list[Row]) -> str:
    """Markdown, each implementation with its ratio to ours."""
    lines = [
        "| case | type | threads | form | implementation | forward, ms | forward + backward, ms | ours is faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = next(r for r in rows if r.implementation == "ours" and asdict(r).items() >= key(row).items())
        ratio = f"{row.forward / ours.forward:.1f}x, {row.forward_backward / ours.forward_backward:.1f}x"
        lines.append(
            f"| {row.case} | {row.dtype} | {row.threads or '-'} | {row.form} | {row.implementation} "
            f"| {row.forward:.3f} | {row.forward_backward:.3f} | {'' if row is ours else ratio} |"
        )
    return "\n".join(lines)


def key(row: Row) -> dict[str, object]:
    """What rows that are compared have in common."""
    return {name: getattr(row, name) for name in ("case", "device", "threads", "dtype", "form")}


def plot(rows: list[Row], path: Path) -> None:
    """Bars of forward + backward, one group a case."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    groups = list(dict.fromkeys(tuple(key(row).values()) for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    figure = Figure(figsize=(10, 0.5 + 0.22 * len(groups) * (len(names) + 1)))
    axes = figure.subplots()
    for offset, name in enumerate(names):
        bars = {tuple(key(row).values()): row.forward_backward for row in rows if row.implementation == name}
        positions = [i * (len(names) + 1) + offset for i, group in enumerate(groups) if group in bars]
        axes.barh(positions, [bars[group] for group in groups if group in bars], label=name)
    labels = [f"{case}, {kind}, {form}" + (f", {t} threads" if t else "") for case, _, t, kind, form in groups]
    axes.set_yticks([i * (len(names) + 1) + (len(names) - 1) / 2 for i in range(len(groups))], labels)
    axes.set_xscale("log")
    axes.set_xlabel("forward + backward, ms")
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="of the CPU")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--forms", nargs="+", choices=["plain", "fused"], default=["plain", "fused"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--check", action="store_true", help="compare with the twin in float64 and measure nothing")
    parser.add_argument("--small", action="store_true", help="an eighth of each level: for sanitizers")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_op"), help="folder for json and plot")
    arguments = parser.parse_args()
    device = arguments.device
    if reason := ops.backends()[device]:
        raise SystemExit(f"the compiled operator is not available on {device}: {reason}")

    cases = CPU_CASES if device == "cpu" else CUDA_CASES
    if arguments.small:
        cases = [Case(c.name, tuple((h // 8, w // 8) for h, w in c.levels), c.n, c.queries) for c in cases]
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    runs_of = [(c, dtype, form) for c in cases for dtype in dtypes for form in arguments.forms]
    if arguments.check:
        limits = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
        worst = [(check(c, device, dtype, form), limits[dtype], c.name, dtype, form) for c, dtype, form in runs_of]
        for error, limit, *what in worst:
            print(f"{'ok  ' if error <= limit else 'WRONG'} {error:.1e} (at most {limit:.0e})", *what)
        raise SystemExit(any(error > limit for error, limit, *_ in worst))

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}")
    cores = peers(device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for threads in arguments.threads if device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for c, dtype, form in runs_of:
            rows += measure(c, device, dtype, form, arguments.rounds, cores)
            record = {"torch": torch.__version__, "device": name, "rows": [asdict(row) for row in rows]}
            (arguments.output / f"{device}.json").write_text(json.dumps(record, indent=1))
    print(table(rows))
    plot(rows, arguments.output / f"{device}.png")
    print(f"written: {arguments.output}/{device}.json and .png")


if __name__ == "__main__":
    main()
