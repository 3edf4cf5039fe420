#!/usr/bin/env python
"""Show what PEFT does, or could do, to a config's model: modules, what a pattern matches, the report.

    tools/inspect_targets.py --config-file configs/coco/instance/mask2former_r50.yaml --pattern self_attn.value_proj

Needs neither data nor weights.
"""

from __future__ import annotations

import argparse
from collections import Counter

from command_line import config_parser, take_pairs
from torch import nn

from peft_d2.engine.errors import one_line_errors
from peft_d2.engine.factory import build_without_weights
from peft_d2.engine.launch import prepare_config


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/inspect_targets.py``."""
    args = inspect_parser().parse_args(arguments)
    print(one_line_errors(lambda: describe(args)))


def inspect_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/inspect_targets.py``."""
    example = "--config-file configs/coco/instance/mask2former_r50.yaml --pattern self_attn.value_proj"
    what = "Show what PEFT does, or could do, to a config's model. Needs neither data nor weights."
    parser = config_parser(what, example, "a model's or a PEFT run's config", required=False)
    parser.add_argument("--pattern", action="append", default=[], help="list what this pattern matches (repeatable)")
    parser.add_argument("--modules", action="store_true", help="list every module with its type and parameters")
    take_pairs(parser)
    return parser


def describe(args: argparse.Namespace) -> str:
    """The text that ``tools/inspect_targets.py`` prints."""
    from peft_d2 import peft

    model = build_without_weights(prepare_config(args, reads=()))
    parts = [_matches(model, pattern) for pattern in args.pattern]
    if args.modules:
        parts.append(_modules(model))
    injection = peft.get_injection(model)
    if injection is not None:
        report = peft.make_report(model)
        parts.append(str(report))
        parts.append(f"{report.trainable:,} of {report.total:,} parameters are trained: {report.percent:.2f} %.")
    elif not parts:
        parts.append(_types(model))
    return "\n\n".join(parts)


def _matches(model: nn.Module, pattern: str) -> str:
    from peft_d2 import peft

    names = peft.match_targets(model, pattern)
    lines = [f"{pattern!r} matches {len(names)} places:"]
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        lines.append(f"  {name}  {_kind(modules[name]) if name in modules else 'parameter'}")
    return "\n".join(lines)


def _modules(model: nn.Module) -> str:
    rows = [(name, module) for name, module in model.named_modules() if name]
    return "\n".join(f"{name}  {_kind(module)}  {_size(module):,}" for name, module in rows)


def _types(model: nn.Module) -> str:
    """How often each type of module that holds parameters itself occurs, with an example of its name."""
    rows = [(n, m) for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
    counts = Counter(type(module).__name__ for _, module in rows)
    lines = [f"{_size(model):,} parameters. Modules that hold them (--modules lists all, --pattern tries one):"]
    for kind, count in counts.most_common():
        example = next(name for name, module in rows if type(module).__name__ == kind)
        lines.append(f"  {count:5d} x {kind:24s} e.g. {example}")
    return "\n".join(lines)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


if __name__ == "__main__":
    main()
