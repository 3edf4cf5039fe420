"""All faults, one after another, and the table of what came of them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .damage import damaged_bases, damaged_states
from .deaths import dead_ranks, dead_workers, preemptions
from .disk import full_disks
from .hostile import hostile_files, wrong_options
from .kills import kills
from .mutations import mutations
from .odd_images import odd_images
from .poison import bad_losses
from .world import Result, World


def main(arguments: list[str] | None = None) -> None:
    """Run ``projects/fault_campaign/run.py``."""
    parser = argparse.ArgumentParser(description="Cause faults on a tiny model and count how often each promise holds.")
    parser.add_argument("--kills", type=int, default=200, help="kill -9 of a training")
    parser.add_argument("--mutations", type=int, default=1000, help="of adapter files")
    parser.add_argument("--states", type=int, default=3000, help="flipped bits and the like in training states")
    parser.add_argument("--bases", type=int, default=600, help="flipped bits in base weights")
    parser.add_argument("--hostile", type=int, default=500, help="files made to run code or to eat memory")
    parser.add_argument("--options", type=int, default=5000, help="wrong values for methods' options")
    parser.add_argument("--repeats", type=int, default=6, help="of the faults that are caused in a few ways only")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and mutations")
    parser.add_argument("--only", nargs="+", choices=sorted(_FAULTS), default=list(_FAULTS), help="some of the faults")
    parser.add_argument("--json", default="", metavar="FILE", help="counts go there, too")
    parser.add_argument("--quick", action="store_true", help="a few of each, in a minute")
    args = parser.parse_args(arguments)
    if args.quick:
        args.kills, args.mutations, args.repeats = 7, 54, 2
        args.states, args.bases, args.hostile, args.options = 40, 40, 70, 200
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name in args.only:
            start = time.perf_counter()
            found = _FAULTS[name](world, args)
            results += found
            for result in found:
                print(_row(result), f"({time.perf_counter() - start:.0f} s)", flush=True)
                for failure in result.failures[:10]:
                    print(f"    {failure}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(result) for result in results], indent=1))
    sys.exit(any(result.failures or result.held < result.caused for result in results))


def _row(result: Result) -> str:
    details = ", ".join(f"{count} {name}" for name, count in sorted(result.details.items()))
    return f"| {result.fault} | {result.held} of {result.caused} | {details} |"


_FAULTS: dict[str, Callable[[World, argparse.Namespace], list[Result]]] = {
    "kills": lambda world, args: kills(world, args.kills, args.seed),
    "mutations": lambda world, args: mutations(world, args.mutations, args.seed),
    "states": lambda world, args: damaged_states(world, args.states, args.seed),
    "bases": lambda world, args: damaged_bases(world, args.bases, args.seed),
    "hostile": lambda world, args: hostile_files(world, args.hostile, args.seed),
    "options": lambda world, args: wrong_options(world, args.options, args.seed),
    "disks": lambda world, args: full_disks(world, args.repeats, args.seed),
    "workers": lambda world, args: dead_workers(world, args.repeats, args.seed),
    "ranks": lambda world, args: dead_ranks(world, args.repeats, args.seed),
    "losses": lambda world, args: bad_losses(world, args.quick),
    "images": lambda world, args: odd_images(world, args.quick),
    "preemption": lambda world, args: preemptions(world, args.repeats, args.seed),
}
