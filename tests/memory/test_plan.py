"""Fitting a step into a budget: same losses and gradients, same names, a true prediction, refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_d2
from peft_d2 import memory, peft
from peft_d2.memory import plan as planning
from peft_d2.memory.blocks import Block, BlockState, find_blocks, make_block
from peft_d2.memory.kept import strides_to_keep
from peft_d2.memory.meter import Meter
from peft_d2.memory.plan import choose
from peft_d2.memory.step import LeanStep, measure, measure_on_host
from peft_d2.peft.errors import InjectionError

GIB = 2**30


class Layer(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, width: int = 64, depth: int = 6, drop: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(Layer(width, drop) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, batch: Any) -> Any:
        x = torch.stack(list(batch)) if isinstance(batch, list) else batch
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        y = self.head(x)
        return {"loss": y.square().mean(), "loss_2": y.abs().mean()}


LORA = [{"NAME": "lora", "TARGETS": ["layers.*.{fc1,fc2}"], "RANK": 4}]


def net(dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(**options).to(dtype)
    peft.inject(model, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.1)
    return model


def step(model: nn.Module, batch: Any, autocast: bool = False) -> tuple[dict[str, float], dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model(batch)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    values = {name: value.item() for name, value in losses.items()}
    return values, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def all_recomputing(model: nn.Module) -> int:
    """Let every block recompute; returns how many there are."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.memory_block.mode = "recompute"
    return len(blocks)


@pytest.mark.parametrize("autocast", [False, True])
def test_losses_and_gradients_are_the_same(autocast: bool) -> None:
    model, batch = net(), torch.randn(2, 50, 8)
    losses, gradients = step(model, batch, autocast)
    peft_d2.fit_memory(model, batch, None)
    assert all_recomputing(model) == 6
    again, regradients = step(model, batch, autocast)
    assert again == losses
    assert gradients.keys() == regradients.keys()
    assert all(torch.equal(gradients[name], regradients[name]) for name in gradients)


def test_double_gradients_equal_to_1e_10() -> None:
    model, batch = net(torch.float64), torch.randn(2, 50, 8, dtype=torch.float64)
    _, gradients = step(model, batch)
    peft_d2.fit_memory(model, batch, None)
    all_recomputing(model)
    _, again = step(model, batch)
    assert all((again[name] - gradients[name]).abs().max() <= 1e-10 for name in gradients)


def test_nothing_but_the_class_changes() -> None:
    model, batch = net(), torch.randn(2, 50, 8)
    before = {name: id(module) for name, module in model.named_modules()}
    keys, layer_class, state = list(model.state_dict()), type(model.layers[0]), torch.get_rng_state()
    peft_d2.fit_memory(model, batch, None)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(model.layers[0], Layer)
    memory.release_memory(model)
    assert type(model.layers[0]) is layer_class
    assert not any(isinstance(module, Block) for module in model.modules())


def test_copies_and_pickles_go_on_recomputing() -> None:
    model, batch = net(), torch.randn(2, 50, 8)
    peft_d2.fit_memory(model, batch, None)
    all_recomputing(model)
    _, gradients = step(model, batch)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(isinstance(module, Block) for module in copied.modules()) == 6
        _, again = step(copied, batch)
        assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_recomputing_lowers_what_is_kept() -> None:
    model, batch = net(), torch.randn(4, 500, 8)
    plain = sum(memory.saved_by_module(model, lambda: model(batch)).values())
    peft_d2.fit_memory(model, batch, None)
    all_recomputing(model)
    assert sum(memory.saved_by_module(model, lambda: model(batch)).values()) < 0.1 * plain


def measured_step(model: nn.Module, batch: Any) -> tuple[dict[str, BlockState], LeanStep]:
    """One lean step as the planner measures it, by tensors alone: what else the process holds is not the plan's."""
    states = {name: make_block(module, name) for name, module in find_blocks(model)}
    measured = measure(model, batch, lambda model, batch: model(batch), states)
    measured.unseen = 0
    return states, measured


@pytest.mark.parametrize(
    ("tensor", "strides"),
    [
        (torch.zeros(3, 5), (5, 1)),
        (torch.zeros(3, 5).t(), (1, 5)),
        (torch.zeros(2, 59, 64)[..., :59], (59 * 64, 64, 1)),  # as attention pads a mask
        (torch.zeros(4, 30)[:, :10], (10, 1)),  # a third of a wider tensor
        (torch.zeros(5, 1).expand(5, 4), (4, 1)),
        (torch.zeros(10).unfold(0, 4, 2), (4, 1)),
        (torch.zeros(()), ()),
        (torch.zeros(0, 3), (3, 1)),
    ],
)
def test_a_tensor_on_the_host_keeps_its_strides_where_they_take_no_room(
    tensor: Tensor, strides: tuple[int, ...]
) -> None:
    assert strides_to_keep(tensor) == strides


def test_offloaded_blocks_are_measured_from_their_forward_to_their_backward_pass() -> None:
    """On a CPU nothing is offloaded: all blocks' activations are there when the last one's backward pass begins."""
    model, batch = net(), torch.randn(2, 200, 8)
    states, recomputing = measured_step(model, batch)
    offloaded = measure_on_host(model, batch, lambda model, batch: model(batch), states, recomputing)
    assert [call.name for call in offloaded.calls] == [call.name for call in recomputing.calls]
    assert [call.size for call in offloaded.calls] == [call.size for call in recomputing.calls]
    ends, starts = ([getattr(call, name) for call in offloaded.calls] for name in ("forward_end", "start"))
    assert ends == sorted(ends) and starts == sorted(starts, reverse=True) and ends[-1] < starts[-1]
    kept = offloaded.readings[starts[-1]][0]
    assert kept == pytest.approx(sum(call.size for call in recomputing.calls), rel=0.1)


def test_prediction_of_tensors_within_ten_percent() -> None:
    model, batch = net(depth=8), torch.randn(4, 1000, 8)
    states, measured = measured_step(model, batch)
    whole = choose(measured, None, 0, "recompute", 1)
    recomputed = []
    for share in (0.0, 0.3, 0.6, 0.9, 1.0):
        room = int(whole.smallest + share * (whole.unplanned_peak - whole.smallest))
        plan = choose(measured, room, 0, "recompute", 1)
        assert plan.peak <= room
        for name, state in states.items():
            state.mode = plan.modes[name]
        with Meter(torch.device("cpu")) as meter:
            step(model, batch)
            assert meter.read()[1] == pytest.approx(plan.peak, rel=0.1)
        recomputed.append(len(plan.recomputed))
    assert recomputed == sorted(recomputed, reverse=True)
    assert recomputed[0] >= 7 and recomputed[-1] == 0


def test_growth_counts_from_the_start_of_a_step() -> None:
    """By it, blocks know when to give freed memory back, and the step before has left some."""
    assert LeanStep([(10, 100), (20, 30)], [], 0.0, 0).largest_growth == 100
    assert LeanStep([(10, 20), (20, 90)], [], 0.0, 0).largest_growth == 80


def test_an_impossible_budget_names_the_smallest() -> None:
    model, batch = net(), torch.randn(4, 200, 8)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(memory.MemoryBudgetError, match=r"the smallest possible is [\d.]+ GiB") as refusal:
        peft_d2.fit_memory(model, batch, 0.001)
    assert [type(module) for module in model.modules()] == classes
    assert refusal.value.smallest > 0.001


def test_a_batch_goes_in_pieces_where_recomputing_does_not_do() -> None:
    model, batch = net(depth=1), [torch.randn(20000, 8) for _ in range(4)]
    whole = peft_d2.fit_memory(model, batch, None)
    plan = peft_d2.fit_memory(model, batch, (whole.resident + 0.6 * (whole.smallest - whole.resident)) / GIB)
    assert plan.pieces in (2, 4)


def test_a_model_of_which_nothing_is_trained() -> None:
    with pytest.raises(InjectionError, match="inject before fit_memory"):
        peft_d2.fit_memory(net(depth=1).requires_grad_(False), torch.randn(4, 8), 1.0)


@pytest.mark.parametrize("budget", [0, -1.0, "much", float("nan"), True])
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(memory.MemoryBudgetError, match="expected GiB above 0, or 'auto'"):
        peft_d2.fit_memory(net(), torch.randn(2, 5, 8), budget)


def test_an_earlier_plan_outlives_a_refused_one() -> None:
    model, batch = net(), torch.randn(2, 50, 8)
    peft_d2.fit_memory(model, batch, None)
    all_recomputing(model)
    kinds, plan = [type(m) for m in model.modules()], [vars(m).get("memory_block") for m in model.modules()]
    with pytest.raises(memory.MemoryBudgetError, match="smallest possible"):
        peft_d2.fit_memory(model, batch, 1e-6)
    with pytest.raises(TypeError):
        peft_d2.fit_memory(model, "no batch", 1.0)
    assert kinds == [type(m) for m in model.modules()]
    assert plan == [vars(m).get("memory_block") for m in model.modules()]


@pytest.mark.parametrize("others", [{"accuracy": 0.5, "count": torch.tensor(3), "name": None}, {"deep": ["a", {}]}])
def test_figures_beside_the_losses(others: dict[str, Any]) -> None:
    model, batch = net(), torch.randn(2, 5, 8)
    peft_d2.fit_memory(model, batch, None, forward=lambda m, x: {**others, "loss": m(x)})
    with pytest.raises(peft_d2.peft.InjectionError, match="has no loss that depends on what is trained"):
        peft_d2.fit_memory(model, batch, None, forward=lambda m, x: others)


@pytest.mark.parametrize(("others", "expected"), [([0, 0, 0], 1), ([1, 1, 1], 3)], ids=["none", "each time"])
def test_a_choice_is_measured_again_where_another_process_has_a_new_one(
    monkeypatch: pytest.MonkeyPatch, others: list[int], expected: int
) -> None:
    """All processes take equally many steps: their losses may wait for each other."""
    measured: list[int] = []
    measure_peak = planning.measure_peak
    monkeypatch.setattr(planning, "measure_peak", lambda *args: measured.append(measure_peak(*args)) or measured[-1])
    answers = iter([0, *others, 0])  # of a step that was measured, of new choices, of an excess
    peft_d2.fit_memory(net(), torch.randn(2, 5, 8), 100.0, agree=lambda own: max(own, next(answers)))
    assert len(measured) == expected and not list(answers)


def test_what_one_process_has_no_memory_for_all_leave_out() -> None:
    answers = iter([1, 0, -1])  # another one's step does not fit, in two pieces it does
    fitted = peft_d2.fit_memory(net(), list(torch.randn(2, 5, 8)), None, agree=lambda own: max(own, next(answers)))
    assert fitted.pieces == 2 and not list(answers)


def test_all_is_kept_where_there_is_room() -> None:
    assert not peft_d2.fit_memory(net(), torch.randn(2, 5, 8), 100.0).recomputed
    assert not peft_d2.fit_memory(net(), torch.randn(2, 5, 8), "auto").recomputed


def test_prove_live_sees_through_recomputing() -> None:
    model, batch = net(drop=0.0), torch.randn(2, 50, 8)
    peft_d2.fit_memory(model, batch, None)
    all_recomputing(model)
    peft_d2.prove_live(model, batch)


def test_a_module_without_weights_can_be_a_block() -> None:
    class Heavy(nn.Module):
        is_memory_block = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * torch.rand_like(x)).exp().sin().square()

    model = nn.Sequential(nn.Sequential(Heavy(), nn.Linear(8, 8)), nn.Linear(8, 8))
    assert [name for name, _ in find_blocks(model)] == ["0.0"]
    batch, gradients = torch.randn(50, 8, requires_grad=True), []
    for recomputed in (False, True):
        if recomputed:
            all_recomputing(model)
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(model(batch).sum(), batch)[0])
    assert torch.equal(*gradients)


def test_a_norm_that_learns_its_statistics_is_not_run_twice() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = nn.Sequential(nn.Sequential(block, block))
    assert [name for name, _ in find_blocks(model)] == []
    block[1].eval()
    assert len(list(find_blocks(model))) == 1
