"""METHODS: auto and tools/recommend.py: a file that trains within its budget, and is kept by a resumed run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("detectron2")

import recommend as tool  # noqa: E402

from peft_d2 import peft  # noqa: E402
from peft_d2.engine import recommend  # noqa: E402
from peft_d2.engine.checks import check_run  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402
from peft_d2.engine.optimizer import scale_learning_rate  # noqa: E402
from peft_d2.engine.trainer import Trainer  # noqa: E402

from .conftest import DINO, HEADS, TINY  # noqa: E402


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BATCHES", 2), ("MORE", 1), ("TEST_STEPS", 2), ("HELD_OUT", 1)):
        monkeypatch.setattr(recommend, name, value)


def test_auto(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    cfg = make_cfg(
        "MODEL.PEFT.METHODS", "auto", "MODEL.PEFT.TRAIN", HEADS, "MODEL.WEIGHTS", base_weights, "MODEL.PEFT.BUDGET", 5
    )
    found = recommend.settled(cfg)
    node = found.MODEL.PEFT
    assert {entry["NAME"] for entry in node.METHODS} == {"lora"} and len(node.TRAIN) >= 2
    tried = [cfg.SOLVER.BASE_LR * factor for factor in recommend.RATES]
    assert min(tried) <= found.SOLVER.BASE_LR <= max(tried)
    report = peft.make_report(Trainer.build_model(found))
    assert 2.5 < 100 * report.trainable / (report.total - report.injected) <= 5
    torch.manual_seed(99)
    again = recommend.settled(cfg, resume=True)
    assert recommend.settled(cfg, evaluate=True).MODEL.PEFT.METHODS == node.METHODS
    assert again.MODEL.PEFT.METHODS == node.METHODS and cfg.MODEL.PEFT.METHODS == ["auto"]
    written = load_config(str(TINY), str(tmp_path / recommend.FILE)).cfg  # a file for --peft-config
    assert written.MODEL.PEFT.METHODS == node.METHODS and written.MODEL.META_ARCHITECTURE == "PEFTModel"


def test_the_same_seed_recommends_the_same(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    """The data have three classes and the base seven: its new head starts at random."""
    cfg = make_cfg("MODEL.PEFT.METHODS", "auto", "MODEL.WEIGHTS", base_weights, "SEED", 3)
    texts = []
    for state in (1, 2):
        torch.manual_seed(state)
        texts.append(recommend.explained(*recommend.advise(cfg)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("config", [TINY, DINO], ids=["mask2former", "mask_dino"])
def test_a_training_takes_it(make_cfg: Callable[..., Any], weights_of: Callable[[Path], Path], config: Path) -> None:
    """Steps with the liveness proof before the first one, an adapter, and the adapter in a model of its own."""
    cfg = make_cfg(
        *("MODEL.PEFT.METHODS", "auto", "MODEL.WEIGHTS", weights_of(config), "SOLVER.MAX_ITER", 2, "SEED", 3),
        config=config,
    )
    cfg.DATASETS.TEST = ()
    settled = recommend.settled(cfg)
    trainer = Trainer(settled)
    trainer.resume_or_load(resume=False)
    trainer.train()
    settled = settled.clone()
    settled.defrost()
    settled.MODEL.PEFT.WEIGHTS = f"{cfg.OUTPUT_DIR}/adapter_final"
    stored, own = (peft.adapter_state_dict(model) for model in (Trainer.build_model(settled), trainer.model))
    assert stored.keys() == own.keys() and all(torch.equal(stored[name], own[name]) for name in own)


def test_auto_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "auto.yaml").write_text("MODEL:\n  PEFT:\n    METHODS: auto\n")
    for arguments in (("", str(tmp_path / "auto.yaml")), ("", "", ["MODEL.PEFT.METHODS", "auto"])):
        cfg = load_config(str(TINY), *arguments[1:]).cfg
        assert cfg.MODEL.PEFT.METHODS == ["auto"] and cfg.MODEL.META_ARCHITECTURE == "PEFTModel"


def test_an_evaluation_trains_nothing(make_cfg: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="there is no .*recommended.yaml of a training"):
        recommend.settled(make_cfg("MODEL.PEFT.METHODS", "auto"), evaluate=True)


def test_nobody_builds_what_is_not_settled(make_cfg: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="auto is settled on training data: by tools/train_net.py"):
        Trainer.build_model(make_cfg("MODEL.PEFT.METHODS", "auto"))


def test_too_small_a_budget(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    cfg = make_cfg(
        *("MODEL.PEFT.METHODS", "auto", "MODEL.PEFT.TRAIN", HEADS),
        *("MODEL.WEIGHTS", base_weights, "MODEL.PEFT.BUDGET", 0.01),
    )
    said = (
        r"METHODS auto: TRAIN alone has .* parameters and the budget is .*: raise it above [\d,]+ parameters, ([\d.]+) "
    )
    with pytest.raises(ConfigError, match=said) as raised:
        recommend.settled(cfg)
    cfg.MODEL.PEFT.BUDGET = 1.05 * float(re.search(said, str(raised.value))[1])  # type: ignore[index]
    assert recommend.advise(cfg)[1].train


def test_a_training_takes_the_rate_that_was_tried(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path
) -> None:
    """At the batch that it was tried at; at another it follows."""
    cfg = make_cfg(
        *("MODEL.PEFT.METHODS", "auto", "MODEL.WEIGHTS", base_weights, "SOLVER.BASE_LR", 0.008),
        *("SOLVER.REFERENCE_IMS", 8, "SOLVER.IMS_PER_BATCH", 2),
    )
    found = recommend.settled(cfg)
    file = tmp_path / recommend.FILE
    rate = yaml.safe_load(file.read_text())["SOLVER"]["BASE_LR"]
    assert 0.002 * recommend.RATES[0] <= rate <= 0.002 * recommend.RATES[-1]
    for opts, expected in (
        ([], rate),
        (["SOLVER.IMS_PER_BATCH", "2"], rate),
        (["SOLVER.IMS_PER_BATCH", "4"], 2 * rate),
        (["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.25"], 0.25),
    ):
        trained = load_config(str(TINY), str(file), opts).cfg if opts else found
        scale_learning_rate(trained)
        assert trained.SOLVER.BASE_LR == pytest.approx(expected)


@pytest.mark.parametrize("budget", [0, -5, 500])
def test_budgets_that_are_no_percentage(make_cfg: Callable[..., Any], budget: float) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.PEFT\.BUDGET is .*above 0 and at most 100"):
        check_run(make_cfg("MODEL.PEFT.METHODS", "auto", "MODEL.PEFT.BUDGET", budget), evaluate=False)


def test_no_file_of_another_kind_is_written_over(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path
) -> None:
    somebodys = tmp_path / recommend.FILE
    somebodys.write_text("MODEL: {}\n")
    with pytest.raises(ConfigError, match="recommended.yaml is no earlier recommendation, and would be written over"):
        recommend.settled(make_cfg("MODEL.PEFT.METHODS", "auto", "MODEL.WEIGHTS", base_weights))
    assert somebodys.read_text() == "MODEL: {}\n"


def test_rates_that_do_harm_are_said_to(make_cfg: Callable[..., Any]) -> None:
    found = recommend.Recommendation([], ["head"], [], 5, 1.0)
    worse = recommend.explained(make_cfg(), found, {0.0: 1.0, 0.1: 2.0, 0.2: 3.0, 0.4: math.inf})
    better = recommend.explained(make_cfg(), found, {0.0: 1.0, 0.1: 2.0, 0.2: 0.9, 0.4: 3.0})
    assert "NONE IS BETTER than no training: lower SOLVER.BASE_LR, 0.2 now" in worse and "NONE" not in better


class Overflows(nn.Module):
    """A loss that falls as the weight grows; from one weight on it is NaN, from the next on an error, as in R-CNNs."""

    def __init__(self, nan: float, error: float) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1)
        self.nan, self.error = nan, error
        nn.init.zeros_(self.fc.weight)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        weight = self.fc.weight.sum()
        value = float(weight.detach())
        if value >= self.error:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        return {"loss": -weight * (float("nan") if value >= self.nan else 1.0)}


def test_rates_that_diverge_are_not_taken(make_cfg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend, "TEST_STEPS", 1)
    cfg = make_cfg("SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.WEIGHT_DECAY", 0.0)
    step = cfg.SOLVER.BASE_LR * recommend.RATES[0]
    for nan, error, finite in ((3.0, 5.0, 2), (9.0, 1.5, 1)):
        model = Overflows(nan * step, error * step)
        peft.inject(model, [], ["fc"])
        losses = recommend.range_test(cfg, model, [[{}]], [[{}]])
        untrained, *trained = losses.values()
        assert untrained == 0 and [math.isfinite(loss) for loss in trained] == [i < finite for i in range(4)]
        rates = list(losses)[1:]
        assert rates[0] <= recommend.best_rate(losses) <= rates[finite - 1]
        assert model.fc.weight.item() == 0.0
    model = Overflows(0.5 * step, 9.0)
    peft.inject(model, [], ["fc"])
    with pytest.raises(ConfigError, match="METHODS auto: no loss is finite after 1 steps, .*: lower SOLVER.BASE_LR"):
        recommend.range_test(cfg, model, [[{}]], [[{}]])


@pytest.mark.parametrize(("nan", "error"), [(0.0, 9.0), (9.0, 0.0)])
def test_a_loss_that_is_not_finite_before_any_step(make_cfg: Callable[..., Any], nan: float, error: float) -> None:
    model = Overflows(nan, error)
    peft.inject(model, [], ["fc"])
    with pytest.raises(ConfigError, match="METHODS auto: the loss is not finite before any step"):
        recommend.range_test(make_cfg(), model, [[{}]], [[{}]])


def test_a_base_whose_weights_overflow(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    """Its numbers are finite, so that it loads."""
    checkpoint = torch.load(base_weights, weights_only=True)
    name = next(name for name in checkpoint["model"] if name.endswith("query_feat.weight"))
    checkpoint["model"][name] = torch.full_like(checkpoint["model"][name], 1e30)
    torch.save(checkpoint, tmp_path / "base.pth")
    cfg = make_cfg("MODEL.PEFT.METHODS", "auto", "MODEL.WEIGHTS", tmp_path / "base.pth")
    with pytest.raises(ConfigError, match="METHODS auto: batch 0, before any step: .*Look whether the base's weights"):
        recommend.settled(cfg)
    assert not Path(cfg.OUTPUT_DIR, recommend.FILE).exists()


def test_a_rate_is_tried_on_the_batches_over_and_over_and_falls_to_zero(
    make_cfg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain SGD on a loss of slope -1: the weight, and so the loss, is the sum of steps of 1, 4/5, 3/5, 2/5 and 1/5."""
    monkeypatch.setattr(recommend, "TEST_STEPS", 5)
    cfg = make_cfg("SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.WEIGHT_DECAY", 0.0)
    cfg.SOLVER.MOMENTUM = 0.0
    model = Overflows(math.inf, math.inf)
    peft.inject(model, [], ["fc"])
    losses = recommend.range_test(cfg, model, [[{}]], [[{}]])
    assert list(losses) == [0.0, *(cfg.SOLVER.BASE_LR * factor for factor in recommend.RATES)]
    for rate, loss in losses.items():
        assert loss == pytest.approx(-3 * rate)


@given(vertex=st.floats(-1.0, 4.0), curvature=st.floats(0.1, 3.0), shift=st.floats(-50, 50), unit=st.floats(1e-6, 1.0))
def test_the_rate_is_the_least_point_of_a_parabola(vertex: float, curvature: float, shift: float, unit: float) -> None:
    """Whatever the losses' level and the rates' unit are; within what was tried, to two digits."""
    losses = {unit * 2**x: shift + curvature * (x - vertex) ** 2 for x in range(4)}
    best = recommend.best_rate({0.0: max(losses.values()), **losses})
    assert best == pytest.approx(unit * 2 ** min(3.0, max(0.0, vertex)), rel=0.06)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((18.37, 14.92, 14.59, 14.13), 2.37),  # still falling at the end by less than the noise of one loss
        ((16.38, 14.41, 13.84, 14.27), 2.07),
        ((9.0, 8.0, 9.0, math.inf), 0.9),  # no worse than the untrained model's, so that it does not outweigh the rest
        ((9.0, 8.0, 9.0, 1e9), 0.9),
        ((9.0, 8.0, 7.0, 5.0), 3.0),  # no parabola with a least point
        ((20.0, 20.0, 20.0, 20.0), 0.0),  # nothing helps
    ],
)
def test_the_rate_of_losses_seen(losses: tuple[float, ...], best: float) -> None:
    tried = dict(zip((1e-3, 2e-3, 4e-3, 8e-3), losses, strict=True))
    assert recommend.best_rate({0.0: 20.0, **tried}) == pytest.approx(1e-3 * 2**best, rel=0.06)


def test_the_tool(toy_set: Any, base_weights: Path, tmp_path: Path) -> None:
    arguments = ["--config-file", str(TINY), "--train-json", str(toy_set.json), "--train-images", str(toy_set.images)]
    args = tool.recommend_parser().parse_args([*arguments, "--memory", "0.05", "MODEL.WEIGHTS", str(base_weights)])
    tree = yaml.safe_load(text := tool.recommended(args))
    assert tree["MODEL"]["PEFT"]["META_ARCHITECTURE"] == "PD2MaskFormer" and "Loss on batches left out" in text
    parameters = int(text.splitlines()[1].split()[1].replace(",", ""))
    assert 0 < parameters * 16 <= 0.05 * 2**20
    base = base_weights.read_bytes()
    with pytest.raises(ConfigError, match="is no earlier recommendation, and would be written over"):
        tool.recommended(tool.recommend_parser().parse_args([*arguments, "--output", str(base_weights)]))
    assert base_weights.read_bytes() == base


@pytest.mark.parametrize(
    ("json", "opts", "message"),
    [
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', [], "images: is empty"),
        ("", ["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH 0 cannot be dealt out"),
    ],
)
def test_the_tool_takes_what_a_training_takes(
    toy_set: Any, base_weights: Path, tmp_path: Path, json: str, opts: list[str], message: str
) -> None:
    (tmp_path / "own.json").write_text(json or toy_set.json.read_text())
    arguments = ["--config-file", str(TINY), "--name", tmp_path.name, "--train-json", str(tmp_path / "own.json")]
    opts = [*opts, "MODEL.WEIGHTS", str(base_weights), "OUTPUT_DIR", str(tmp_path / "output")]
    with pytest.raises(ConfigError, match=message):
        tool.recommended(tool.recommend_parser().parse_args([*arguments, "--train-images", str(toy_set.images), *opts]))
    assert not (tmp_path / "output").exists()
