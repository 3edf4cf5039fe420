"""One base with many adapters: each sample's result against a model of its own that holds its adapter alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import peft_d2
from peft_d2 import peft


class Attended(nn.Module):
    """Sequences first, (length, N, C), and a table that is read, not called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 4)
        self.queries = nn.Embedding(8, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query = self.queries.weight[:, None].expand(-1, x.shape[1], -1)
        return self.mlp(self.attn(query, x, x, need_weights=False)[0])


class Detector(nn.Module):
    """List of samples in, list of results out; windows in the middle, as many rows as queries at the end."""

    per_image_outputs = ("head",)

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.BatchNorm2d(width)
        self.windows = nn.Linear(width, width)
        self.attended = Attended(width)
        self.head = nn.Linear(width, classes)

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        x = F.relu(self.norm(self.stem(torch.stack([item["image"] for item in batch]))))
        n, c, height, width = x.shape
        tiles = x.view(n, c, 2, height // 2, 2, width // 2).permute(0, 2, 4, 3, 5, 1).reshape(4 * n, -1, c)
        x = self.windows(tiles).reshape(n, -1, c)
        logits = self.head(self.attended(x.transpose(0, 1)).transpose(0, 1))
        return [{"scores": logits[i].softmax(-1)} for i in range(n)]


LINEARS = ["windows", "mlp.0"]
KINDS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "lora": ([{"NAME": "lora", "TARGETS": [*LINEARS, "attn", "stem"]}], []),
    "dora": ([{"NAME": "lora", "TARGETS": LINEARS, "DORA": True}], []),
    "cobot": ([{"NAME": "lora", "TARGETS": LINEARS, "COBOT": True, "RANK": 4}], []),
    "adapter": ([{"NAME": "adapter", "TARGETS": ["attn", "stem"]}], []),
    "adaptformer": ([{"NAME": "adaptformer", "TARGETS": ["mlp"], "COBOT": True}], []),
    "mona": ([{"NAME": "mona", "TARGETS": ["stem"], "BOTTLENECK": 4}], []),
    "norm": ([{"NAME": "norm"}], ["norm"]),
    "heads": ([{"NAME": "lora", "TARGETS": ["windows"], "RANK": 2}], ["head", "attended"]),
}
BATCH = [*KINDS, None]


def samples(names: list[str | None]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    images = [torch.rand(3, 32, 32, generator=generator) for _ in names]
    return [{"image": image, **({"adapter": name} if name else {})} for image, name in zip(images, names, strict=True)]


def detector(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = Detector(classes=classes).eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
    return model


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, nn.Module], dict[str, Path]]:
    """A model for each adapter alone, made without this feature, and the folders saved from them."""
    models, folders = {}, {}
    for seed, (name, (methods, train)) in enumerate(KINDS.items()):
        models[name], folders[name] = detector(), tmp_path_factory.mktemp("adapters") / name
        peft_d2.inject(models[name], methods, train)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for item in peft.trained_parameters(models[name]):
                item.param.add_(0.2 * torch.randn(item.param.shape, generator=generator))
        peft_d2.save_adapter(models[name], folders[name])
    return models, folders


@pytest.fixture
def served(own: tuple[dict[str, nn.Module], dict[str, Path]]) -> nn.Module:
    model = detector()
    peft_d2.load_adapters(model, own[1])
    return model


@torch.no_grad()
def scores(model: nn.Module, names: list[str | None]) -> list[Tensor]:
    return [result["scores"] for result in model(samples(names))]


def test_samples_with_adapters_of_every_kind_in_one_batch(served: nn.Module, own: tuple[dict, dict]) -> None:
    mixed = scores(served, BATCH)
    for i, name in enumerate(BATCH):
        alone = scores(served, [name or "base"] * len(BATCH))
        assert torch.equal(mixed[i], alone[i])  # whatever the other samples name
        expected = scores(own[0][name] if name else detector(), [None] * len(BATCH))
        torch.testing.assert_close(mixed[i], expected[i], rtol=0, atol=1e-6)
        assert name is None or (mixed[i] - scores(detector(), [None] * len(BATCH))[i]).abs().max() > 1e-3
    assert not peft.get_injection(served).split.reason  # type: ignore[union-attr]


def test_without_names_it_is_the_base(served: nn.Module) -> None:
    assert all(map(torch.equal, scores(served, [None] * 3), scores(detector(), [None] * 3)))


def test_set_adapter_names_one_for_all(served: nn.Module, own: tuple[dict, dict]) -> None:
    peft_d2.set_adapter(served, "heads")
    assert all(map(torch.equal, scores(served, [None] * 3), scores(own[0]["heads"], [None] * 3)))


class Convolutions(TorchDispatchMode):
    """Batch sizes of the convolutions that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_the_frozen_part_runs_once_for_the_whole_batch(own: tuple[dict, dict]) -> None:
    model = detector()
    peft_d2.load_adapters(model, {"a": own[1]["heads"], "b": own[1]["adaptformer"]})
    scores(model, ["a", "b", None])  # finds out where the samples are
    with Convolutions() as convolutions:
        scores(model, ["a", "b", None])
    assert convolutions.sizes == [3]


def test_one_image_under_several_adapters(served: nn.Module, own: tuple[dict, dict]) -> None:
    image = samples([None])[0]["image"]
    results = served.predict_with(image, ["base", *KINDS])
    for name in KINDS:
        assert torch.equal(results[name]["scores"], scores(own[0][name], [None])[0])
    assert torch.equal(results["base"]["scores"], scores(detector(), [None])[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_common_frozen_part_runs_once_for_one_image(own: tuple[dict, dict], mode: Callable[[], Any]) -> None:
    model, image = detector(), samples([None])[0]["image"]
    peft_d2.load_adapters(model, {"a": own[1]["heads"], "b": own[1]["adaptformer"]})
    with mode(), Convolutions() as convolutions:
        model.predict_with(image, ["base", "a", "b"])
    assert convolutions.sizes == [1]


def test_a_pixel_decoder_runs_once_for_one_image(own: tuple[dict, dict]) -> None:
    """Heads call it by another method than forward."""

    class Pixels(nn.Module):
        def forward_features(self, image: Tensor) -> Tensor:
            return F.relu(image - image.mean())

    class Called(Detector):
        def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
            image = torch.stack([item["image"] for item in batch])
            return super().forward([{"image": x} for x in self.pixels.forward_features(image)])

    model = detector()
    model.__class__, model.pixels = Called, Pixels()  # type: ignore[assignment]
    image, ran = samples([None])[0]["image"], []
    peft_d2.load_adapters(model, {"a": own[1]["heads"], "b": own[1]["lora"]})
    before = model.pixels.forward_features
    model.pixels.forward_features = lambda x: (ran.append(x), before(x))[1]  # type: ignore[method-assign, assignment]
    results = model.predict_with(image, ["a", "b"])
    assert len(ran) == 1
    for name in ("a", "b"):
        peft_d2.set_adapter(model, name)
        assert torch.equal(results[name]["scores"], scores_of(model, image))


@torch.no_grad()
def scores_of(model: nn.Module, image: Tensor) -> Tensor:
    return model([{"image": image}])[0]["scores"]


@pytest.mark.parametrize("declared", [True, False], ids=["by sample", "one run each"])
def test_heads_of_other_class_counts(own: tuple[dict, dict], tmp_path: Path, declared: bool) -> None:
    other = detector(classes=9)
    own_state = other.state_dict()
    other.load_state_dict(
        {k: v for k, v in detector().state_dict().items() if own_state[k].shape == v.shape}, strict=False
    )
    peft_d2.inject(other, [{"NAME": "lora", "TARGETS": ["windows"]}], ["head"])
    peft_d2.save_adapter(other, tmp_path / "nine")
    model = detector()
    model.per_image_outputs = ("head",) if declared else ()  # type: ignore[assignment]
    peft_d2.load_adapters(model, {"nine": tmp_path / "nine", "lora": own[1]["lora"]})
    if declared:
        with pytest.MonkeyPatch.context() as patch:  # the logits of both as a list by sample, as a model may take them
            patch.setattr(Detector, "forward", _forward_by_list)
            mixed = scores(model, ["nine", "lora", None])
    else:
        mixed = scores(model, ["nine", "lora", None])
    for i, single in enumerate((other, own[0]["lora"], detector())):
        torch.testing.assert_close(mixed[i], scores(single, [None] * 3)[i], rtol=0, atol=1e-6)
    assert all(map(torch.equal, scores(model, [None] * 2), scores(detector(), [None] * 2)))  # the old classes
    peft_d2.set_adapter(model, "nine")
    peft_d2.save_merged(model, tmp_path / "merged.pth")
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)["model"]
    assert merged["head.weight"].shape == (9, 16)


def _forward_by_list(self: Any, batch: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    x = F.relu(self.norm(self.stem(torch.stack([item["image"] for item in batch]))))
    n, c, height, width = x.shape
    tiles = x.view(n, c, 2, height // 2, 2, width // 2).permute(0, 2, 4, 3, 5, 1).reshape(4 * n, -1, c)
    x = self.attended(self.windows(tiles).reshape(n, -1, c).transpose(0, 1)).transpose(0, 1).contiguous()
    logits = self.head(x)
    return [{"scores": logits[i].softmax(-1)} for i in range(n)]


def test_a_model_that_mixes_its_samples_runs_once_per_adapter(own: tuple[dict, dict]) -> None:
    class Mixing(Detector):
        def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
            x = torch.stack([item["image"] for item in batch]).transpose(0, 1).flip(1).transpose(0, 1)
            return super().forward([{"image": image} for image in x])[::-1]

    models = [detector(), own[0]["lora"]]
    model = detector()
    model.__class__ = Mixing
    peft_d2.load_adapters(model, {"lora": own[1]["lora"], "heads": own[1]["heads"]})
    mixed = scores(model, ["lora", None, "heads"])
    for i, single in ((0, models[1]), (1, models[0]), (2, own[0]["heads"])):
        torch.testing.assert_close(mixed[i], scores(single, [None] * 3)[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: torch.load(_saved(m), weights_only=False)], ids=["deepcopy", "pickle"]
)
def test_copies_serve_too(served: nn.Module, copied: Callable[[nn.Module], nn.Module]) -> None:
    expected = scores(served, BATCH)
    assert all(map(torch.equal, scores(copied(served), BATCH), expected))


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_after_remove_it_is_a_plain_model(served: nn.Module) -> None:
    peft.remove(served)
    assert type(served) is Detector
    assert all(map(torch.equal, served.state_dict().values(), detector().state_dict().values()))


def test_refusals(served: nn.Module, own: tuple[dict, dict], tmp_path: Path) -> None:
    with pytest.raises(peft.InjectionError, match="there is no adapter 'dusk'; this model has 'base', 'lora'"):
        scores(served, ["dusk", None])
    with pytest.raises(peft.InjectionError, match="inference alone"):
        scores(served.train(), ["lora", None])
    with pytest.raises(peft.InjectionError, match="'lora' is taken"):
        peft_d2.load_adapters(served, {"lora": own[1]["lora"]})
    with pytest.raises(ValueError, match="is no adapter: name one"):
        peft_d2.save_adapter(served, tmp_path / "base")
    model = detector()
    with pytest.raises(ValueError, match="missing"):
        peft_d2.load_adapters(model, {"lora": own[1]["lora"], "none": tmp_path / "missing"})
    assert type(model) is Detector and all(parameter.requires_grad for parameter in model.parameters())
    peft_d2.load_adapters(served.eval(), {})
    with pytest.raises(ValueError, match="missing"):
        peft_d2.load_adapters(served, {"more": own[1]["lora"], "none": tmp_path / "missing"})
    assert set(peft.get_injection(served).adapters) == {"base", *KINDS}  # type: ignore[union-attr]


def test_an_adapter_in_training_stays_what_it_is(own: tuple[dict, dict]) -> None:
    model = detector()
    peft_d2.inject(model, *KINDS["lora"])
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(0.1)
    expected = scores(model, [None] * 2)
    peft_d2.load_adapters(model, {"heads": own[1]["heads"]})
    assert all(map(torch.equal, scores(model, [None] * 2), scores(detector(), [None] * 2)))
    peft_d2.set_adapter(model, "default")
    assert all(map(torch.equal, scores(model, [None] * 2), expected))
