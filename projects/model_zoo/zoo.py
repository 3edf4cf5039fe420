#!/usr/bin/env python
"""MODEL_ZOO.md: every config with its parameters, what the methods train of it, and what was measured.

What was measured is in docs/measured.json: ``settings``, name -> a sentence that says how; ``results``, config ->
``{"mask AP": 38.4, ..., "setting": name}``, figures or texts such as "38.4 ± 0.3", in columns of these names.
Models are built on torch's meta device, without weights or data, so the figures are those of the code at hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peft_d2.data.config import base_architecture
from peft_d2.engine.config import load_config, read_tree
from peft_d2.engine.errors import ConfigError, one_line_errors
from peft_d2.engine.factory import build_without_weights

MEASURED = Path("docs", "measured.json")
ZOO = Path("MODEL_ZOO.md")


@dataclass(frozen=True)
class Family:
    """A chapter: configs of one model.

    Attributes:
        title, text: the heading and what stands below it.
        configs: globs below ``configs``; files whose names begin with an underscore are bases and left out.
        main: column -> name in ``configs/peft``: the methods that are shown for every config. Without any, the configs
            name their methods themselves.
        methods: globs in ``configs/peft``: all methods of this family.
        examples: configs for which all methods are shown.
    """

    title: str
    text: str
    configs: tuple[str, ...]
    main: dict[str, str]
    methods: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


FAMILIES = (
    Family(
        "Mask2Former",
        "",
        ("coco", "cityscapes", "ade20k", "lvis"),
        {"heads": "mask2former/heads", "2 adapters": "mask2former/adapters", "LoRA": "mask2former/lora"},
        ("mask2former/*", "full"),
        ("coco/instance/mask2former_r50", "coco/instance/mask2former_swin_t", "coco/instance/mask2former_swin_l_in21k"),
    ),
    Family(
        "Mask DINO",
        "`mask_dino/paper` holds the settings of Abou Baker et al., MAKE 6(4), 2024 (arXiv 2606.01947).",
        ("mask_dino",),
        {"heads": "mask_dino/heads", "2 adapters": "mask_dino/adapters2", "LoRA": "mask_dino/lora"},
        ("mask_dino/**/*", "full"),
        ("mask_dino/coco/instance_r50", "mask_dino/coco/instance_swin_l"),
    ),
    Family(
        "SEEM",
        "`seem/paper` holds the settings of the same paper. The text encoder counts where a config trains it.",
        ("seem",),
        {"heads": "seem/heads", "2 adapters": "seem/adapters2", "LoRA": "seem/lora"},
        ("seem/*", "full"),
        ("seem/focal_t", "seem/focal_l", "seem/davit_d3"),
    ),
    Family(
        "Segment Anything",
        "`sam/paper` holds the data sets of Peng et al., CVPR 2024 (SAM-COBOT).",
        ("sam",),
        {"decoder": "sam/decoder", "LoRA": "sam/lora", "LoRA with COBOT": "sam/lora_cobot"},
        ("sam/*", "sam/ablations/*", "mask2former/lora_cobot_sam", "full"),
        ("sam/vit_b", "sam/vit_l", "sam/vit_h", "sam/vit_b_mask2former"),
    ),
    Family(
        "Segment Anything 2",
        "Its image path.",
        ("sam2",),
        {"decoder": "sam2/decoder", "LoRA": "sam2/lora", "LoRA with COBOT": "sam2/lora_cobot"},
        ("sam2/*", "mask2former/lora_cobot_sam2", "full"),
        ("sam2/hiera_t", "sam2/hiera_b_plus", "sam2/hiera_l", "sam2/hiera_t_mask2former"),
    ),
    Family(
        "EoMT",
        "Encoders are timm's; their heads learn in full with every method.",
        ("eomt",),
        {"head": "eomt/head", "LoRA": "eomt/lora", "Mona": "eomt/mona"},
        ("eomt/*", "full"),
        (
            "eomt/coco/instance_dinov2_small_640",
            "eomt/coco/instance_dinov2_base_640",
            "eomt/coco/instance_dinov3_large_640",
        ),
    ),
    Family("Small models for nuclei", "From fluorescence to histology: see the README.", ("nuclei",), {}),
    Family("The toy world", "What tests and `tools/analyze_peft.py` use: `tools/toy.py`.", ("demo",), {}),
)
INTRODUCTION = """# Model zoo

Written by `projects/model_zoo/zoo.py`; do not edit. Every file of `configs/` that builds a model, with its parameters
and what a method of `configs/peft` trains of it: trained parameters, their share (added ones in the denominator), and
the size of the adapter file. A dash: the method does not fit, as the model lacks what it names or has another kind of
it.

Any config goes with any method that fits:

```bash
python tools/train_net.py --config-file configs/coco/instance/mask2former_r50.yaml \\
  --peft-config configs/peft/mask2former/lora.yaml ...
```

Results are those that were measured with this code, in the setting named below their table. Where a chapter has none,
nothing was measured.
"""


@dataclass(frozen=True)
class Figures:
    """Parameters of a model with a method, those trained, and the bytes of the tensors in the adapter file."""

    total: int
    trained: int
    size: int

    def __str__(self) -> str:
        share = 100 * self.trained / self.total
        return f"{self.trained / 1e6:.3f} M, {share:.2f} %, {self.size / 1e6:.2f} MB"


class Zoo:
    """Counts and writes.

    Args:
        root: the repository: the folder of ``configs``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._built: dict[str, nn.Module] = {}
        self._figures: dict[str, Figures | None] = {}
        self._configs: dict[str, Any] = {}
        path = root / MEASURED
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": {}, "results": {}}
        self.settings: dict[str, str] = stored["settings"]
        self.measured: dict[str, dict[str, Any]] = stored["results"]

    def configs(self, family: Family) -> list[str]:
        """Names of the family's configs: paths below ``configs`` without suffix."""
        top = self.root / "configs"
        paths = [path for folder in family.configs for path in sorted((top / folder).rglob("*.yaml"))]
        return [path.relative_to(top).with_suffix("").as_posix() for path in paths if not path.stem.startswith("_")]

    def methods(self, family: Family) -> list[str]:
        """Names of the family's methods: paths below ``configs/peft`` without suffix."""
        top = self.root / "configs/peft"
        paths = [path for glob in family.methods for path in top.glob(f"{glob}.yaml")]
        return sorted({path.relative_to(top).with_suffix("").as_posix() for path in paths})

    def figures(self, config: str, method: str = "") -> Figures | None:
        """Counts for a config with a method on top, or as it is; None where the method does not fit."""
        cfg = self._config(config)
        node = self._method(method) if method else cfg.MODEL.PEFT
        model, methods, train = _model_key(cfg), node.get("METHODS", []), node.get("TRAIN", [])
        key = model + json.dumps([methods, train])
        if key not in self._figures:
            if model not in self._built:
                plain = cfg.clone()
                plain.defrost()
                plain.MODEL.META_ARCHITECTURE = base_architecture(cfg)
                self._built[model] = build_without_weights(plain)
            self._figures[key] = count(self._built[model], methods, train)
        return self._figures[key]

    def _config(self, config: str) -> Any:
        if config not in self._configs:
            self._configs[config] = load_config(str(self.root / "configs" / f"{config}.yaml")).cfg
        return self._configs[config]

    def _method(self, method: str) -> dict[str, Any]:
        """What a file of ``configs/peft`` says of methods and full training."""
        return read_tree(str(self.root / "configs/peft" / f"{method}.yaml"))["MODEL"]["PEFT"]

    def text(self) -> str:
        """The whole of MODEL_ZOO.md."""
        return "\n".join([INTRODUCTION, *(line for family in FAMILIES for line in self.chapter(family))])

    def chapter(self, family: Family) -> Iterator[str]:
        """The lines of a family."""
        configs = self.configs(family)
        yield f"## {family.title}\n"
        if family.text:
            yield f"{family.text}\n"
        measured = [config for config in configs if config in self.measured]
        if measured:
            results = self.result_names(measured)
            yield "Measured:\n"
            yield from _header("config", "trained, share, file", *results)
            for config in measured:
                cells = [self.measured[config].get(name) for name in results]
                yield _row(f"[{config}](configs/{config}.yaml)", self.figures(config), *cells)
            yield ""
            yield from self._settings(measured)
            yield "Parameters:\n"
        yield from _header("config", "parameters", *(family.main or ["trained, share, file"]))
        for config in configs:
            yield self.model_row(family, config)
        yield ""
        if family.examples:
            examples = [name for name in family.examples if name in configs]
            yield "All methods:\n"
            yield from _header("method", *(f"`{name}`" for name in examples))
            for method in self.methods(family):
                shown = [self.figures(config, method) for config in examples]
                if any(shown):
                    yield _row(f"[{method}](configs/peft/{method}.yaml)", *shown)
            yield ""

    def model_row(self, family: Family, config: str) -> str:
        """A config's line in the table of its family's models."""
        figures = self.figures(config)
        assert figures is not None
        shown = [self.figures(config, method) for method in family.main.values()] or [figures]
        return _row(f"[{config}](configs/{config}.yaml)", f"{figures.total / 1e6:.2f} M", *shown)

    def result_names(self, configs: Sequence[str]) -> list[str]:
        """What was measured of these, in the order of first mention, and how; AP in any case."""
        mentioned = [name for config in configs for name in self.measured.get(config, {})]
        names = dict.fromkeys(["mask AP", *mentioned])
        return sorted(names, key=lambda name: name == "setting")

    def _settings(self, configs: Sequence[str]) -> Iterator[str]:
        """How the results came about, once each."""
        for setting in sorted({self.measured[config]["setting"] for config in configs}):
            yield f"Setting {setting}: {self.settings[setting]}\n"


def count(base: nn.Module, methods: Sequence[Any], train: Sequence[str]) -> Figures | None:
    """Counts for ``base``, which stays as it is, with methods and fully trained parts; None where one does not fit."""
    from peft_d2 import peft

    if not (methods or train):
        total = sum(parameter.numel() for parameter in base.parameters())
        return Figures(total, total, 4 * total)
    try:
        report = peft.inject(base, [dict(entry) for entry in methods], train=tuple(train))
    except peft.PeftError:
        return None
    tensors = peft.adapter_state_dict(base).values()
    figures = Figures(report.total, report.trainable, sum(t.numel() * t.element_size() for t in tensors))
    peft.remove(base)
    return figures


def _model_key(cfg: Any) -> str:
    """What the parameters of a config's model follow from: its architecture and nodes, but not what it puts out."""
    nodes = {name: node for name, node in cfg.MODEL.items() if name not in ("PEFT", "WEIGHTS", "META_ARCHITECTURE")}
    for name, node in nodes.items():
        if isinstance(node, dict):
            nodes[name] = {key: value for key, value in node.items() if key != "TEST" or "SEMANTIC_CE_LOSS" in node}
    return base_architecture(cfg) + json.dumps(nodes, default=str)


def _header(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield "|" + "---|" * len(cells)


def _row(*cells: object) -> str:
    return "| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Run ``projects/model_zoo/zoo.py``."""
    parser = argparse.ArgumentParser(description="Write MODEL_ZOO.md from configs/ and docs/measured.json.")
    parser.add_argument("--root", default=".", metavar="DIR", help="the repository")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is out of date")
    titles = [family.title for family in FAMILIES]
    parser.add_argument("--only", default="", choices=titles, help="write this chapter alone anew, which is quicker")
    args = parser.parse_args(arguments)
    one_line_errors(lambda: write(Path(args.root), args.check, args.only))


def _renewed(text: str, book: Zoo, title: str) -> str:
    """``text`` with one chapter written anew."""
    (family,) = (family for family in FAMILIES if family.title == title)
    before, heading, after = text.partition(f"## {title}\n")
    if not heading:
        raise ConfigError(f"{ZOO} has no chapter {title!r}. Run projects/model_zoo/zoo.py without --only.")
    _, following, rest = after.partition("\n## ")
    return before + "\n".join(book.chapter(family)) + following + rest


def write(root: Path, check: bool = False, only: str = "") -> None:
    """Write the file, or see whether it is up to date; with ``only``, the chapter of this title.

    Raises:
        ConfigError: there are no configs below ``root``; with ``check``, the file is not up to date.
    """
    from peft_d2.engine.factory import register

    if not (root / "configs").is_dir():
        raise ConfigError(f"{root} has no folder 'configs'. Give the repository with --root.")
    register()
    path = root / ZOO
    text = _renewed(path.read_text(encoding="utf-8"), Zoo(root), only) if only else Zoo(root).text()
    if not check:
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{path} is out of date. Run projects/model_zoo/zoo.py.")


if __name__ == "__main__":
    main()
