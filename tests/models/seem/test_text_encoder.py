"""SEEM's text encoder, its tokenizer, and class vectors: computed, kept in a file, drawn from."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from encode_classes import encoder_of, read_text_encoder
from torch import Tensor, nn

from peft_d2.engine.errors import ConfigError
from peft_d2.models.seem.text_encoder import TEMPLATES, TextEncoder, TokenizerError, load_tokenizer, prompts
from peft_d2.models.seem.vocabulary import ClassVectors, ClassVectorsError, encode_classes
from peft_d2.storage.disk import dump_tensors, load_tensors

from ..conftest import GOLDENS, ROOT

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c e", "ce l", "cel l</w>", "p h", "ph o", "pho t", "phot o</w>", "o f</w>", "t h", "th e</w>", "a c", "i n"]
SIZES: dict[str, Any] = {"width": 32, "n_heads": 4, "n_layers": 2, "projection": 48}


def clip_characters() -> dict[int, str]:
    """The printable stand-in of every byte in CLIP's (and GPT-2's) vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = itertools.count(256)
    return {byte: chr(byte) for byte in plain} | {b: chr(next(others)) for b in range(256) if b not in plain}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of CLIP's form: bytes, bytes that end a word, merges, start and end."""
    path = tmp_path_factory.mktemp("clip")
    characters = list(clip_characters().values())
    words = [*characters, *(c + "</w>" for c in characters), *(m.replace(" ", "") for m in MERGES), START, END]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    return path


def plain_bpe(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Byte-pair encoding by its definition: merge the earliest learned pair until there is none; for letters alone."""
    ids = [vocabulary[START]]
    for word in text.lower().replace(".", " . ").split():
        parts = [*word[:-1], word[-1] + "</w>"]
        while True:
            ranks = [MERGES.index(" ".join(p)) if " ".join(p) in MERGES else 99 for p in itertools.pairwise(parts)]
            if not ranks or min(ranks) == 99:
                break
            at = ranks.index(min(ranks))
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        ids += [vocabulary[part] for part in parts]
    return [*ids, vocabulary[END]]


def test_tokenizer(folder: Path) -> None:
    texts = ["cell", "A photo of the Cell.", "the cells", "", "acne in photo"]
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    ids = load_tokenizer(folder)(texts)
    expected = [plain_bpe(text, vocabulary) for text in texts]
    assert ids.shape == (5, max(map(len, expected)))
    for row, wanted in zip(ids.tolist(), expected, strict=True):
        assert row[: len(wanted)] == wanted
        assert set(row[len(wanted) :]) <= {vocabulary[END]}
    short = load_tokenizer(folder, context=4)(texts)
    assert short.shape == (5, 4) and short[1].tolist() == [*expected[1][:3], vocabulary[END]]


def test_tokenizer_that_is_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError, match=r"holds no tokenizer: give a folder that holds vocab\.json"):
        load_tokenizer(tmp_path)
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    words |= {"extra": len(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (tmp_path / "merges.txt").write_text((folder / "merges.txt").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(TokenizerError, match="end token 525; the text encoder needs it to be the last"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenizerError, match=r"pip install 'peft_d2\[text\]'"):
        load_tokenizer(folder)


def test_templates() -> None:
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 81
    assert all(t.count("{}") == 1 and t.endswith(".") for t in TEMPLATES)
    assert {"{}.", "itap of my {}.", "a black and white photo of the {}.", "graffiti of a {}."} < set(TEMPLATES)
    assert prompts("wall-other-merged", ["a {}.", "{}!"]) == ["a wall.", "wall!"]


def filled(filler: ModuleType, vocabulary: int = 96, context: int = 8) -> TextEncoder:
    """The encoder under the names and so with the weights that it has in the golden."""
    model, encoder = nn.Module(), TextEncoder(vocabulary=vocabulary, context=context, **SIZES)
    model.sem_seg_head = nn.Module()
    model.sem_seg_head.predictor = nn.Module()
    model.sem_seg_head.predictor.lang_encoder = encoder
    filler.fill(model, skip=["logit_scale"])
    return encoder.eval()


@torch.no_grad()
def test_vectors_are_the_published_ones(filler: ModuleType) -> None:
    expected = np.load(GOLDENS / "seem_tiny_instance.npz")
    encoder, ids = filled(filler), torch.from_numpy(expected["language.input_ids"])
    features = encoder.lang_encoder(ids) @ encoder.lang_proj
    np.testing.assert_allclose(features.numpy(), expected["language.token_embedding_raw"], rtol=0, atol=1e-4)
    found = encoder(ids).numpy()
    np.testing.assert_allclose(found, expected["language.class_embedding_normalised"], rtol=0, atol=1e-4)
    # What comes after the end token has no effect, so texts need not be filled up to the whole context.
    assert ids[1].tolist()[2:] == [95] * 6
    np.testing.assert_allclose(encoder(ids[1:2, :3]).numpy(), found[1:2], rtol=0, atol=1e-6)


def test_sizes_are_read_off_the_state(filler: ModuleType) -> None:
    encoder = filled(filler)
    ids = torch.tensor([[94, 5, 17, 95]])
    again = encoder_of(encoder.state_dict(), n_heads=4)
    assert torch.equal(again(ids), encoder(ids)) and not again.training
    state = encoder.state_dict()
    del state["lang_encoder.ln_final.bias"]
    with pytest.raises(ValueError, match=r"(?s)not a text encoder's tensors.*ln_final\.bias"):
        encoder_of(state)
    with pytest.raises(ValueError, match="not a text encoder's tensors"):
        encoder_of({})


@pytest.fixture
def encoder(filler: ModuleType) -> TextEncoder:
    return filled(filler, vocabulary=526, context=77)


@torch.no_grad()
def test_evaluation_is_the_mean_over_templates(encoder: TextEncoder, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    classes = encode_classes(encoder, tokenizer, ["cell", "a cell"])
    assert classes.names == ("cell", "a cell") and classes.vectors.shape == (81, 3, 48)
    for i, name in enumerate(["cell", "a cell", "background"]):
        one_by_one = torch.cat([encoder(tokenizer([template.format(name)])) for template in TEMPLATES])
        torch.testing.assert_close(classes.vectors[:, i], one_by_one, rtol=0, atol=1e-5)
        mean = one_by_one.double().mean(0)
        torch.testing.assert_close(classes.evaluation()[i].double(), mean / mean.norm(), rtol=0, atol=1e-5)


def some(names: tuple[str, ...] = ("cell", "nucleus"), templates: int = 3) -> ClassVectors:
    vectors = nn.functional.normalize(torch.randn(templates, len(names) + 1, 4), dim=-1)
    return ClassVectors(names, vectors, TEMPLATES[:templates], "abc")


def test_training_draws_a_template_for_each_class() -> None:
    classes = some()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([classes.sample(generator) for _ in range(200)])
    match = (draws[:, None] == classes.vectors).all(-1)  # (draw, template, class)
    assert (match.sum(1) == 1).all()
    templates = match.int().argmax(1)
    assert len({tuple(row) for row in templates.tolist()}) == 27  # every combination: each class has its own draw
    again = torch.Generator().manual_seed(0)
    assert torch.equal(torch.stack([classes.sample(again) for _ in range(200)]), draws)


def test_classes_are_chosen_by_name() -> None:
    classes = some(("cell", "nucleus", "debris"))
    chosen = classes.select(["debris", "cell"])
    assert chosen.names == ("debris", "cell") and chosen.encoder == "abc"
    assert torch.equal(chosen.vectors, classes.vectors[:, [2, 0, 3]])
    with pytest.raises(ClassVectorsError, match="no vectors of the classes 'car', only of cell, nucleus, debris: "):
        classes.select(["cell", "car"])


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("a", "b"), (3, 2, 4), r"are \(3, 2, 4\); 2 classes and the background in 3 templates need \(3, 3\)"),
        (("a", "a"), (3, 3, 4), "named twice: a"),
    ],
)
def test_impossible_vectors(names: tuple[str, ...], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ClassVectorsError, match=message):
        ClassVectors(names, torch.zeros(shape), TEMPLATES[:3])


def test_nothing_and_another_vocabulary_cannot_be_encoded(filler: ModuleType, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ClassVectorsError, match="no class to encode, or one without a name"):
        encode_classes(filled(filler), tokenizer, [])
    with pytest.raises(ClassVectorsError, match="ids up to 525; the text encoder takes 8 tokens with ids below 96"):
        encode_classes(filled(filler), tokenizer, ["cell"])


def test_file(tmp_path: Path) -> None:
    classes = some(("cell", "Zellkörper"))
    classes.write(tmp_path / "a.safetensors")
    again = ClassVectors.read(tmp_path / "a.safetensors")
    assert (again.names, again.templates, again.encoder) == (classes.names, classes.templates, classes.encoder)
    assert torch.equal(again.vectors, classes.vectors)
    classes.write(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def damaged(change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        tensors, metadata = load_tensors(data)
        record = json.loads(metadata["class_vectors"])
        change(tensors, record)
        return dump_tensors(tensors, {"class_vectors": json.dumps(record)})

    return apply


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut short": (lambda data: data[:-8], "cut short, damaged"),
    "empty": (lambda data: b"", "it is empty"),
    "other tensors": (lambda data: dump_tensors({"x": torch.zeros(2)}), "holds no class vectors"),
    "changed": (damaged(lambda tensors, _: tensors["vectors"].mul_(2)), "not those that were written"),
    "not finite": (damaged(lambda tensors, _: tensors["vectors"].fill_(torch.nan)), "not those that were written"),
    "newer": (damaged(lambda _, record: record.update(format=2)), "format 2, and this version reads 1"),
    "no names": (damaged(lambda _, record: record.pop("names")), "names or templates are not lists"),
    "a name less": (damaged(lambda _, record: record["names"].pop()), "1 classes and the background"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    path = tmp_path / "classes.safetensors"
    some().write(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ClassVectorsError, match=rf"classes\.safetensors: .*{message}.*encode_classes\.py"):
        ClassVectors.read(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ClassVectorsError, match=r"none\.safetensors: No such file.*encode_classes\.py"):
        ClassVectors.read(tmp_path / "none.safetensors")


@pytest.mark.parametrize("source", ["--names", "--annotations"])
def test_tool(
    encoder: TextEncoder, folder: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    state = {f"sem_seg_head.predictor.lang_encoder.{name}": v for name, v in encoder.state_dict().items()}
    torch.save({"model": state, "iteration": 3}, tmp_path / "seem.pth")
    categories = [{"id": 7, "name": "nucleus"}, {"id": 2, "name": "cell"}]
    (tmp_path / "train.json").write_text(json.dumps({"categories": categories}), encoding="utf-8")
    classes = ["cell", "nucleus"] if source == "--names" else [str(tmp_path / "train.json")]
    options = ["--weights", tmp_path / "seem.pth", "--tokenizer", folder, "--heads", "4", "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["encode_classes.py", *map(str, options), source, *classes])
    runpy.run_path(str(ROOT / "tools" / "encode_classes.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip().endswith("2 classes and the background in 81 templates, 48 channels")
    expected = encode_classes(encoder, load_tokenizer(folder), ["cell", "nucleus"])
    found = ClassVectors.read(tmp_path / "out")
    assert (found.names, found.encoder) == (expected.names, expected.encoder)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=1e-5)


def test_tool_ends_with_one_line(tmp_path: Path, encoder: TextEncoder, monkeypatch: Any, capsys: Any) -> None:
    torch.save(encoder.state_dict(), tmp_path / "seem.pth")
    options = ["--weights", tmp_path / "seem.pth", "--tokenizer", tmp_path, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["encode_classes.py", *map(str, options), "--names", "cell"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "encode_classes.py"), run_name="__main__")
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and len(said) == 1 and "holds no tokenizer: give a folder" in said[0]


def test_tool_names_what_is_wrong(tmp_path: Path, encoder: TextEncoder) -> None:
    torch.save({"backbone.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other\.pth has 0 text encoders.*give a checkpoint of SEEM"):
        read_text_encoder(str(tmp_path / "other.pth"))
    torch.save({"lang_encoder.lang_proj": torch.zeros(2, 2)}, tmp_path / "part.pth")
    with pytest.raises(ConfigError, match=r"part\.pth: these are not a text encoder's tensors"):
        read_text_encoder(str(tmp_path / "part.pth"))
