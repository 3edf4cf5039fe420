"""What a GPU does with this project, in eight minutes: one step after the other, the most telling first.

    tools/check_gpu.sh                      all steps
    tools/check_gpu.sh --steps load speed   some of them
    tools/check_gpu.sh --dry-run            all of it in small on the CPU, but for what only a GPU can do

It needs torch with CUDA and pytest; what else is missing comes from gpu_kit/, which `make gpu-kit` fills on a machine
with a network and nvcc. Each step is a process with a time limit of its own, and writes each figure as soon as it is
known: results.jsonl and results.md (the same as a table), log.txt, the benchmark's files and ncu's report. The exit
status is 1 when something was wrong, 0 also where a step was left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.0


@dataclass(frozen=True)
class Run:
    """One run of the script, the same in all of its processes."""

    output: Path
    work: Path  # unpacked wheels, other operators, training runs; thrown away
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def record(self, step: str, name: str, value: object, ok: bool | None = True) -> None:
        """Write one line at once; ok is None for what was left out."""
        line = {"step": step, "name": name, "value": value, "ok": ok}
        with (self.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"[{step}] {'WRONG ' if ok is False else ''}{name}: {value}", flush=True)

    def command(self, *parts: object, limit: float, **environment: str) -> tuple[int, str]:
        """Exit status and output of a command, whose whole process group ends after `limit` seconds."""
        with tempfile.TemporaryFile("w+") as file:
            process = subprocess.Popen(
                [str(part) for part in parts],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = process.wait()
            file.seek(0)
            text = file.read()
        print(text, flush=True)
        return status, text


# ---------------------------------------------------------------------------------------------------------------- steps


def load(run: Run) -> None:
    """The libraries load, and every type in every form gives the numbers of the twin in float64 on the CPU."""
    sys.path.insert(0, str(ROOT / "tests" / "ops"))
    import torch
    from op_cases import DTYPES, Case, assert_same, oracle, random_case

    from peft_d2 import ops

    card = "no GPU (dry run)" if run.dry else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    run.record("load", "machine", f"{card}; {versions}; {date.today()}")
    for device in ("cpu", run.device):
        reason = ops.backends()[device]
        run.record("load", f"operator for {device}", reason or "ready", ok=not reason)
    for dtype, raw, tolerance in DTYPES:
        wrong = []
        for reference in (0, 2, 4):
            case = random_case(dtype=dtype, raw=raw, reference=reference)
            grad = torch.randn(2, 5, 24).to(dtype)
            moved = Case(*(None if x is None else x.to(run.device) for x in vars(case).values()))
            found = moved.run_with_gradients(grad.to(run.device), run.device)
            try:
                assert_same({name: x.cpu() for name, x in found.items()}, oracle(case, grad), tolerance)
            except AssertionError as error:
                wrong.append(f"reference {reference}: {error}")
        run.record("load", f"value {dtype}, points {raw}", "; ".join(wrong) or "as the twin", ok=not wrong)


def correct(run: Run) -> None:
    """The tests that need a device: the operator's and whole models'."""
    report = run.work / "tests.xml"
    chosen = ["-k", "every_width or non_finite or outside"] if run.dry else ["-m", "gpu"]
    tests = ["tests/ops/test_ms_deform_attn.py"] if run.dry else ["tests/ops", "tests/models/test_on_gpu.py"]
    chosen += ["-n", "8"] if not run.dry and installed("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests, *chosen]
    status, _ = run.command(*command, limit=140)
    if not report.exists():
        return run.record("correct", "tests/ops", f"pytest ended with status {status}", ok=False)
    suite = next(xml.etree.ElementTree.parse(report).iter("testsuite"))
    number, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    for test in suite.iter("testcase"):
        if (failure := next((x for x in test if x.tag in ("failure", "error")), None)) is not None:
            run.record("correct", str(test.get("name")), str(failure.get("message"))[:300], ok=False)
    run.record("correct", "tests on the device", f"{number - skipped} run, {skipped} skipped", ok=status == 0)


def sanitize(run: Run) -> None:
    """compute-sanitizer over the operator's kernels, small cases."""
    check = [sys.executable, "tools/benchmark_op.py", "--device", run.device, "--check", "--small"]
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if run.dry or not Path(tool).exists():
        status, _ = run.command(*check, limit=60)
        return run.record("sanitize", "small cases, without compute-sanitizer", f"status {status}", ok=status == 0)
    for name in ("memcheck", "racecheck", "synccheck"):
        options = ["--tool", name, "--error-exitcode", 9, "--kernel-regex", "kns=peft_d2"]
        status, text = run.command(tool, *options, *check, limit=40)
        said = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY).*", text)
        impossible = "not supported" in text or "Unable to" in text
        value = said[-1] if said else f"status {status}: {text.strip().splitlines()[-1][:200] if text.strip() else ''}"
        run.record("sanitize", name, value, ok=None if impossible else status == 0)


def speed(run: Run) -> None:
    """The operator beside others, as ratios to ours and beside what the device's memory and L1 caches allow."""
    import benchmark_op
    import torch

    options = ["--small", "--rounds", "1", "--dtypes", "float32"] if run.dry else ["--rounds", "8", "--dtypes"]
    options += [] if run.dry else ["float32", "bfloat16", "float16"]
    wait_for_peers(run, 60)
    command = ["tools/benchmark_op.py", "--device", run.device, "--output", run.output, *options]
    peers = os.pathsep.join([str(run.work / "peers"), os.environ.get("PYTHONPATH", "")])
    status, text = run.command(sys.executable, *command, limit=140, PYTHONPATH=peers)
    for line in re.findall(r"^.*(?:left out|does not run).*$", text, re.MULTILINE):
        run.record("speed", "left out", line.strip(), ok=None)
    file = run.output / f"{run.device}.json"
    rows = [benchmark_op.Row(**row) for row in json.loads(file.read_text())["rows"]] if file.exists() else []
    for row in rows:
        ours = next(r for r in rows if r.implementation == "ours" and benchmark_op.key(r) == benchmark_op.key(row))
        backward = row.forward_backward - row.forward
        value = {"forward_us": round(row.forward * 1e3, 1), "backward_us": round(backward * 1e3, 1)}
        if row is not ours:
            value["ours_is_faster"] = [
                round(row.forward / ours.forward, 2), round(row.forward_backward / ours.forward_backward, 2)
            ]  # fmt: skip
        elif not run.dry:
            case = next(c for c in benchmark_op.CUDA_CASES if c.name == row.case)
            value["floors_us"] = floors(case, getattr(torch, row.dtype), row.form)
        run.record("speed", f"{row.case}, {row.dtype}, {row.form}, {row.implementation}", value)
    run.record("speed", "benchmark", f"{len(rows)} rows, status {status}", ok=status == 0 and bool(rows))


def floors(case: Any, dtype: Any, form: str) -> dict[str, float]:
    """Microseconds: bytes that must move at the speed of a copy, and corner rows at one a clock and multiprocessor."""
    import torch

    rows = sum(height * width for height, width in case.levels)
    queries, count = case.queries or rows, len(case.levels) * case.points
    size = torch.finfo(dtype).bits // 8
    value = case.n * rows * case.heads * case.channels
    output = case.n * queries * case.heads * case.channels * size
    points = case.n * queries * case.heads * count * 3 * (size if form == "fused" else 4)
    # Backward: inputs read, gradients written, the float32 sums zeroed, and for halves written and read once more.
    sums = value * 4 * (1 if dtype == torch.float32 else 3)
    moved = {"forward": value * size + points + output, "backward": 2 * (value * size + points) + output + sums}
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = min(device_seconds(lambda: target.copy_(source)) for _ in range(5))
    bandwidth = 2 * source.numel() / seconds
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 0) * 1e3 or 1.755e9
    corners = case.n * queries * case.heads * count * 4
    l1 = corners * (case.channels * size / 128) / (properties.multi_processor_count * clock)
    found = {name: round(number / bandwidth * 1e6, 1) for name, number in moved.items()}
    return {**found, "forward_L1": round(l1 * 1e6, 1)}


def device_seconds(function: Callable[[], object]) -> float:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


BASES = {
    "Mask2Former R50": "configs/coco/instance/mask2former_r50.yaml",
    "Mask2Former Swin-T": "configs/coco/instance/mask2former_swin_t.yaml",
}
METHODS = {
    "LoRA": "configs/peft/mask2former/lora.yaml",
    "full": "configs/peft/full.yaml",
    "adapters": "configs/peft/mask2former/adapters.yaml",
    "heads": "configs/peft/mask2former/heads.yaml",
}


def train(run: Run) -> None:
    """Training steps of published models in three precisions: time, peak memory, losses beside the CPU's; merging."""
    bases = {"tiny Mask2Former": "tests/engine/tiny.yaml"} if run.dry else BASES
    methods = dict(list(METHODS.items())[: 2 if run.dry else 4])
    side, batch = (64, 1) if run.dry else (1024, 2)
    for method in methods:  # the first of these says whether training is right at all
        base = next(iter(bases))
        with random_numbers_of_the_cpu():
            first = [
                losses_of(bases[base], METHODS[method], 64 if run.dry else 256, where) for where in ("cpu", run.device)
            ]
        worst = max(abs(first[1][name] - loss) / (abs(loss) + 1e-3) for name, loss in first[0].items())
        run.record("train", f"{base}, {method}: first losses beside the CPU's", f"{worst:.1e} apart", ok=worst < 2e-2)
    for base, config in bases.items():
        for method in methods:
            model = build(config, METHODS[method], run.device)
            for precision in ("bfloat16", "float32", "float16"):
                name = f"{base}, {method}, {precision}, {side} px, batch {batch}"
                try:
                    value = measure_training(model, side, batch, precision, run.device)
                    run.record("train", name, value, ok=value["finite"])
                except Exception as error:  # one that runs out of memory must not hide the others
                    run.record("train", name, f"{type(error).__name__}: {error}"[:300], ok=False)
        merged = measure_merged(build(config, METHODS["LoRA"], run.device), side, run.device)
        run.record("train", f"{base}, LoRA: inference, {side} px", merged)


def build(config: str, method: str, device: str) -> Any:
    """A model of random weights, as tools/train_net.py would build it."""
    import torch
    from detectron2.modeling import build_model

    import peft_d2
    from peft_d2.engine.config import load_config

    peft_d2.register()
    torch.manual_seed(0)
    cfg = load_config(str(ROOT / config), str(ROOT / method), ["MODEL.DEVICE", device, "MODEL.WEIGHTS", ""]).cfg
    return build_model(cfg)


def pictures(side: int, batch: int) -> list[dict[str, Any]]:
    """Noise with twelve objects each, the same whenever it is asked for."""
    import torch
    from analyze_peft import random_sample

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [random_sample(side, classes=7, objects=12) for _ in range(batch)]


@contextmanager
def random_numbers_of_the_cpu() -> Iterator[None]:
    """Random points and dropout drawn on the CPU whatever the device, so that two devices draw the same."""
    import torch
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kwargs = dict(kwargs or {})
            if function in (torch.rand, torch.randn) and (device := kwargs.pop("device", None)) is not None:
                return function(*args, **kwargs).to(device)
            if function in (torch.rand_like, torch.randn_like, torch.randint_like):
                return function(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
            return function(*args, **kwargs)

    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with OnCpu():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def losses_of(config: str, method: str, side: int, device: str) -> dict[str, float]:
    import torch

    model = build(config, method, device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or hasattr(module, "drop_prob"):
            module.eval()
    torch.manual_seed(1)
    return {name: float(loss) for name, loss in model(pictures(side, 1)).items()}


def memory(run: Run) -> None:
    """Training steps under memory budgets: planned and measured peak, time, and the first losses beside no budget's."""
    import torch

    import peft_d2
    from peft_d2.memory import MemoryBudgetError

    base = "tests/engine/tiny.yaml" if run.dry else BASES["Mask2Former Swin-T"]
    methods = {"LoRA everywhere": "configs/peft/mask2former/lora_swin.yaml", "full": METHODS["full"]}
    methods = {"LoRA in the head": METHODS["LoRA"]} if run.dry else methods
    side, batch = (64, 2) if run.dry else (1024, 2)
    for method, file in methods.items():
        for precision in ("float32",) if run.dry else ("float32", "bfloat16"):
            model = build(base, file, run.device).train()
            name = f"{method}, {precision}, {side} px, batch {batch}"
            weights = [parameter.detach().cpu().clone() for parameter in model.parameters()]
            free = measure_training(model, side, batch, precision, run.device)
            run.record("memory", f"{name}: no budget", free, ok=free["finite"])
            dtype = getattr(torch, precision)
            options = {"forward": lambda m, b, dtype=dtype: under_autocast(m, b, run.device, dtype)}
            try:
                peft_d2.fit_memory(model, pictures(side, batch), 1e-3, **options)
            except MemoryBudgetError as error:
                smallest = error.smallest
            budgets = {"auto": "auto", "the smallest": smallest * 1.01}
            if not run.dry:
                budgets |= {f"{share} of the peak": share * free["peak_GiB"] for share in (0.7, 0.45)}
            for title, budget in budgets.items():
                try:
                    plan = peft_d2.fit_memory(model, pictures(side, batch), budget, **options)
                except MemoryBudgetError as error:
                    run.record("memory", f"{name}: {title}", str(error)[:200], ok=None)
                    continue
                modes = list(plan.modes.values())
                for parameter, weight in zip(model.parameters(), weights, strict=True):
                    parameter.data.copy_(weight)
                value = measure_training(model, side, batch, precision, run.device, plan.pieces)
                value |= {"planned_GiB": round(plan.peak / 2**30, 2), "planned_ms": round(plan.seconds * 1e3, 1)}
                value |= {mode: modes.count(mode) for mode in ("recompute", "offload")} | {"pieces": plan.pieces}
                off = abs(value["first_loss"] - free["first_loss"]) / abs(free["first_loss"])
                right = value["finite"] and (plan.pieces > 1 or off < 2e-2)
                fits = run.dry or value["peak_GiB"] <= 1.1 * value["planned_GiB"]
                run.record("memory", f"{name}: {title}", value, ok=right and fits)


def under_autocast(model: Any, inputs: list[dict[str, Any]], device: str, dtype: Any) -> dict[str, Any]:
    import torch

    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        return model(inputs)


def measure_training(model: Any, side: int, batch: int, precision: str, device: str, pieces: int = 1) -> dict[str, Any]:
    """A few steps: median time, peak memory, first and last loss."""
    import torch

    inputs = pictures(side, batch)
    size = batch // pieces
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=precision == "float16")
    dtype, on_gpu = getattr(torch, precision), device == "cuda"
    seconds, losses = [], []
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(7 if on_gpu else 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.manual_seed(1)
        for piece in range(pieces):
            part = inputs[piece * size : (piece + 1) * size]
            loss = sum(under_autocast(model, part, device, dtype).values()) / pieces
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.1)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))  # waits for the device
        seconds.append(time.perf_counter() - start)
    value: dict[str, Any] = {"step_ms": round(statistics.median(seconds[len(seconds) // 3 :]) * 1e3, 1)}
    if on_gpu:
        value["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    value |= {"first_loss": round(losses[0], 3), "last_loss": round(losses[-1], 3)}
    value["trained_millions"] = round(sum(parameter.numel() for parameter in trained) / 1e6, 3)
    return {**value, "finite": bool(norm.isfinite()) and all(abs(loss) < 1e6 for loss in losses)}


def measure_merged(model: Any, side: int, device: str) -> dict[str, float]:
    """Milliseconds a picture: with LoRA beside the layers, merged into them, and switched off."""
    import torch

    import peft_d2

    model, inputs = model.eval(), pictures(side, 1)

    def milliseconds() -> float:
        times = []
        with torch.no_grad():
            for _ in range(6 if device == "cuda" else 2):
                start = time.perf_counter()
                model(inputs)
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        return round(min(times[1:]) * 1e3, 1)

    with_adapter = milliseconds()
    with peft_d2.disabled(model):
        off = milliseconds()
    peft_d2.merge(model)
    return {"adapter_ms": with_adapter, "merged_ms": milliseconds(), "off_ms": off}


def runs(run: Run) -> None:
    """The demo's training stopped half-way and resumed, then the same in one process under torchrun (NCCL on GPUs)."""
    import toy

    data = toy.generate(run.work / "toy", "night", 8 if run.dry else 64, seed=1, size=64 if run.dry else 128)
    config = ["--config-file", "configs/demo/lora.yaml"]
    if run.dry:
        config = ["--config-file", "tests/engine/tiny.yaml", "--peft-config", METHODS["LoRA"]]
    config += ["--name", "night", "--train-json", str(data.json), "--train-images", str(data.images)]
    config += ["--val-json", str(data.json), "--val-images", str(data.images)]
    steps = 4 if run.dry else 50
    options = ["MODEL.DEVICE", run.device, "SEED", "1", "TEST.EVAL_PERIOD", "0", "SOLVER.WARMUP_ITERS", "1"]
    options += ["SOLVER.CHECKPOINT_PERIOD", str(steps // 2), "DATALOADER.NUM_WORKERS", "0"]

    def train_net(name: str, last: int, *extra: str, launcher: tuple[str, ...] = ()) -> bool:
        more = ["SOLVER.MAX_ITER", str(last), "OUTPUT_DIR", str(run.work / name)]
        command = [sys.executable, *launcher, "tools/train_net.py", *config, *extra, *options, *more]
        begin = time.perf_counter()
        status, text = run.command(*command, limit=60)
        said = [line for line in text.strip().splitlines() if line.strip()][-1:] or [""]
        seconds = f"{time.perf_counter() - begin:.0f} s"
        value = seconds if status == 0 else f"status {status} after {seconds}: {said[0][:300]}"
        run.record("runs", f"{name} to step {last}{' ' + ' '.join(extra) if extra else ''}", value, ok=status == 0)
        return status == 0

    if train_net("demo, LoRA", steps // 2):
        train_net("demo, LoRA", steps, "--resume")
    train_net(
        "one process under torchrun", steps // 2, launcher=("-m", "torch.distributed.run", "--nproc-per-node", "1")
    )
    budget = ("SOLVER.AMP.ENABLED", "True", "MODEL.PEFT.MEMORY_BUDGET", "auto")
    train_net("half precision under a memory budget", steps // 2, *budget)


def profile(run: Run) -> None:
    """ncu on the two encoder kernels."""
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if run.dry or not Path(tool).exists():
        return run.record("profile", "ncu", "left out: " + ("dry run" if run.dry else "no ncu"), ok=None)
    report = run.output / "ncu"
    options = ["--set", "full", "--clock-control", "none", "--force-overwrite", "--export", report]
    options += ["--kernel-name", "regex:(forward|backward)_kernel", "--launch-skip", 2, "--launch-count", 4]
    status, text = run.command(tool, *options, sys.executable, __file__, "--kernels", limit=60)
    if status or not report.with_suffix(".ncu-rep").exists():
        said = text.strip().splitlines()[-1:] or [""]
        return run.record("profile", "ncu", f"status {status}: {said[0][:200]}", ok=None)
    _, details = run.command(tool, "--import", report.with_suffix(".ncu-rep"), "--page", "details", limit=30)
    (run.output / "ncu.txt").write_text(details)
    names = "Duration|Achieved Occupancy|L1/TEX Cache Throughput|DRAM Throughput|Registers Per Thread"
    wanted = rf"^\s*({names})\s+(\S+)\s+(\S+)"
    for name, unit, number in re.findall(wanted, details, re.MULTILINE):
        run.record("profile", name, f"{number} {unit}")


def kernels() -> None:
    """What ncu watches: the encoder's forward and backward pass in float32 and bfloat16."""
    import benchmark_op
    import torch

    for dtype in (torch.float32, torch.float32, torch.bfloat16):  # the first warms up
        inputs = benchmark_op.make_inputs(benchmark_op.CUDA_CASES[0], "cuda", dtype)
        output = benchmark_op.runs(inputs, "fused", "cuda", {})["ours"]()
        torch.autograd.grad(output, benchmark_op.leaves_of(inputs, "fused"), inputs.grad)
    torch.cuda.synchronize()


# In order of worth; seconds that each may take.
STEPS: dict[str, tuple[Callable[[Run], None], float]] = {
    "load": (load, 45),
    "correct": (correct, 150),
    "sanitize": (sanitize, 120),
    "speed": (speed, 210),
    "train": (train, 200),
    "memory": (memory, 150),
    "runs": (runs, 150),
    "profile": (profile, 90),
}


# ---------------------------------------------------------------------------------------- what a bare machine lacks


def unpack_kit(run: Run, kit: Path) -> None:
    """Wheels of what is missing here to run.work/site, libraries beside peft_d2/ops, other operators to run.work."""
    if not (kit / "kit.json").exists():
        return run.record("kit", str(kit), "no kit: `make gpu-kit` makes one; only what is installed is used", ok=None)
    site = run.work / "site"
    for wheel in sorted((kit / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            packages = {name.partition("/")[0].removesuffix(".py") for name in archive.namelist()}
            packages = {name for name in packages if name.isidentifier() and not name.startswith("_")}
            if not all(installed(name) for name in packages):
                archive.extractall(site)
                run.record("kit", wheel.name.partition("-")[0], "from the kit")
    for library in kit.glob("libpeft_d2_*"):
        target = ROOT / "peft_d2" / "ops" / library.name
        if not target.exists() or target.read_bytes() != library.read_bytes():
            target.unlink(missing_ok=True)  # a process may have loaded it: a new file, not new contents
            shutil.copy2(library, target)
            run.record("kit", library.name, "from the kit")
    sys.path.insert(0, str(ROOT / "tools"))
    from make_gpu_kit import sources_digest

    same = json.loads((kit / "kit.json").read_text())["sources"] == sources_digest()
    run.record(
        "kit", "libraries", "made from these sources" if same else "made from OTHER sources: make gpu-kit", ok=same
    )


def installed(name: str) -> bool:
    """Whether a package can be found by a fresh interpreter here."""
    program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def build_peers(run: Run, kit: Path) -> list[subprocess.Popen]:
    """Start building other operators in the background; `speed` waits for the ends."""
    if run.dry or not kit.exists():
        return []
    folder = run.work / "peers"
    folder.mkdir(exist_ok=True)
    jobs = [
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", folder, archive]
        for archive in (kit / "peers").glob("*.tar.gz")
    ]
    if (kit / "official" / "src").is_dir():
        sources = run.work / "official"
        shutil.copytree(kit / "official" / "src", sources)
        for file in sources.rglob("*.c*"):  # two lines that torch 2.11 no longer compiles
            text = re.sub(r"\.type\(\)\.is_cuda\(\)", ".is_cuda()", file.read_text())
            file.write_text(re.sub(r"(AT_DISPATCH_\w+\()(\w+)\.type\(\)", r"\1\2.scalar_type()", text))
        jobs.append([sys.executable, __file__, "--build-official", sources, folder])
    builds = []
    for number, job in enumerate(jobs):
        log = (run.work / f"peer{number}.log").open("w")
        command = ["sh", "-c", '"$@"; echo ended $?', "sh", *map(str, job)]
        environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "8"}
        options = {"env": environment, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        builds.append(subprocess.Popen(command, cwd=ROOT, **options))
    return builds


def build_official(sources: Path, folder: Path) -> None:
    from torch.utils.cpp_extension import load as compile_and_load

    files = [str(file) for pattern in ("*.cpp", "cpu/*.cpp", "cuda/*.cu") for file in sources.glob(pattern)]
    flags = ["-DWITH_CUDA"]
    options = {"extra_cflags": flags, "extra_cuda_cflags": flags, "extra_include_paths": [str(sources)]}
    compile_and_load("MultiScaleDeformableAttention", files, build_directory=str(folder), with_cuda=True, **options)


def wait_for_peers(run: Run, seconds: float) -> None:
    """Until all builds have ended, or so many seconds."""
    end = time.monotonic() + seconds
    logs = sorted(run.work.glob("peer*.log"))
    while time.monotonic() < end and not all("ended" in log.read_text() for log in logs):
        time.sleep(1)
    for log in logs:
        text = log.read_text().strip()
        if not text.endswith("ended 0"):
            run.record("speed", f"another operator's build, {log.name}", text[-300:] or "not ended", ok=None)


# ------------------------------------------------------------------------------------------------------------ the whole


def table(output: Path) -> str:
    """results.jsonl as markdown, for the docs."""
    lines = ["| step | what | result |", "|---|---|---|"]
    for text in (output / "results.jsonl").read_text().splitlines():
        row = json.loads(text)
        value = row["value"]
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        mark = {True: "", False: "WRONG: ", None: "not checked: "}[row["ok"]]
        lines.append(f"| {row['step']} | {row['name']} | {mark}{value} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


def run_steps(run: Run, kit: Path, steps: list[str], minutes: float) -> int:
    """Each step in a process of its own; returns the exit status."""
    end = time.monotonic() + minutes * 60
    (run.output / "results.jsonl").write_text("")
    unpack_kit(run, kit)
    paths = [str(run.work / "site"), str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["PYTHONUNBUFFERED"] = "1"
    builds = build_peers(run, kit) if "speed" in steps else []
    with (run.output / "log.txt").open("w") as log:
        for step in steps:
            limit = min(STEPS[step][1], end - time.monotonic())
            if limit < 5:
                run.record(step, "all of it", "left out: no time left", ok=None)
                continue
            command = [sys.executable, __file__, "--step", step, "--output", run.output, "--work", run.work]
            process = subprocess.Popen(
                [str(part) for part in command] + ["--dry-run"] * run.dry,
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                if status := process.wait(limit):
                    run.record(step, "all of it", f"ended with status {status}, see log.txt", ok=False)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                run.record(step, "the rest of it", f"cut off after {limit:.0f} s", ok=None)
            (run.output / "results.md").write_text(table(run.output))
    for process in builds:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    print(f"\n{table(run.output)}\nwritten: {run.output}")
    rows = [json.loads(line) for line in (run.output / "results.jsonl").read_text().splitlines()]
    return int(any(row["ok"] is False for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT", ROOT / "output" / "gpu"))
    parser.add_argument("--output", type=Path, default=default, help="where the results go (default: %(default)s)")
    parser.add_argument("--kit", type=Path, default=ROOT / "gpu_kit", help="made by `make gpu-kit`")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps together")
    parser.add_argument("--dry-run", action="store_true", help="in small, on the CPU")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--build-official", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kernels:
        kernels()
    elif arguments.build_official:
        build_official(*arguments.build_official)
    elif arguments.step:
        STEPS[arguments.step][0](Run(arguments.output, arguments.work, arguments.dry_run))
    else:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="check_gpu_") as work:
            run = Run(arguments.output.resolve(), Path(work), arguments.dry_run)
            return run_steps(run, arguments.kit.resolve(), arguments.steps, arguments.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
