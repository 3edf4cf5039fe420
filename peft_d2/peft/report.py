"""The table that a run prints: where parameters are, which are trained, and by what."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from .adapted import walk
from .record import LayerRecord, get_adapted, get_root


@dataclass(frozen=True)
class ReportRow:
    """Parameters of one part of the model: ``total`` counts injected ones too."""

    part: str
    total: int
    injected: int
    full: int

    @property
    def trainable(self) -> int:
        """Injected and fully trained parameters."""
        return self.injected + self.full


@dataclass(frozen=True)
class Report:
    """Parameters by part (shared ones once) and places by method. Percentages have the added parameters in the
    denominator.
    """

    adapter: str
    rows: list[ReportRow]
    places: list[LayerRecord]
    train: list[str]

    @property
    def total(self) -> int:
        """All parameters of the model with this adapter, the injected ones included."""
        return sum(row.total for row in self.rows)

    @property
    def injected(self) -> int:
        """Parameters that the methods added."""
        return sum(row.injected for row in self.rows)

    @property
    def trainable(self) -> int:
        """Parameters that are trained: injected, and in full."""
        return sum(row.trainable for row in self.rows)

    @property
    def percent(self) -> float:
        """100 x trainable / total."""
        return 100 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        head = ("part", "parameters", "injected", "in full", "trained %")
        body = [
            (
                row.part,
                f"{row.total:,}",
                f"{row.injected:,}",
                f"{row.full:,}",
                f"{100 * row.trainable / max(1, row.total):.2f}",
            )
            for row in self.rows
        ]
        full = sum(row.full for row in self.rows)
        body.append(("all", f"{self.total:,}", f"{self.injected:,}", f"{full:,}", f"{self.percent:.2f}"))
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(5)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *body)
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, lines[1])
        for (method, kind), count in Counter((place.method, place.kind) for place in self.places).items():
            chosen = [place for place in self.places if (place.method, place.kind) == (method, kind)]
            size = sum(place.parameters for place in chosen)
            last = f" ... {chosen[-1].name}" if count > 1 else ""
            lines.append(f"{method} on {count} {kind}: {size:,} parameters, {chosen[0].name}{last}")
        if self.train:
            lines.append(f"trained in full: {', '.join(self.train)}")
        return "\n".join(lines)


def make_report(model: nn.Module, adapter: str | None = None) -> Report:
    """The report of one adapter (the active one unless named)."""
    adapted, root = get_adapted(model), get_root(model)
    name = adapted.record.active if adapter is None else adapter
    record = adapted.adapter(name)
    full = set(record.full)
    total: Counter[str] = Counter()
    injected: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    seen: set[int] = set()
    own = {id(parameter) for parameter in adapted.injected[name]}
    for path, module, _ in walk(root):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            alias = f"{path}.{leaf}" if path else leaf
            total[_part(path)] += parameter.numel()
            everything = "*" in record.train
            if alias in full and (parameter.requires_grad or not everything):
                trained[_part(path)] += parameter.numel()
        if any(module is item for item in adapted.modules[name]):
            for parameter in module.peft_parameters(name).values():  # type: ignore[operator]
                if id(parameter) in own and id(parameter) not in seen:
                    seen.add(id(parameter))
                    total[_part(path)] += parameter.numel()
                    injected[_part(path)] += parameter.numel()
    rows = [ReportRow(part, total[part], injected[part], trained[part]) for part in total]
    return Report(name, rows, record.places, record.train)


def _part(path: str) -> str:
    """The first two levels of a name."""
    return ".".join(path.split(".")[:2]) or "(top)"
