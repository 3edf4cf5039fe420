"""The config keys of PEFT and of training, and the reading of config files and ``KEY VALUE`` pairs with clear errors.

Files are read here, not by Detectron2, whose reader falls back to one that executes ``!!python`` tags. Published files
have one such tag, in which they write a list of image sizes. That list is computed; every other tag is refused.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import logging
import operator
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from peft_d2.compat import find_file, require_detectron2
from peft_d2.data.config import PEFT_ARCHITECTURE
from peft_d2.engine.errors import ConfigError
from peft_d2.storage import foreign

BASE_KEY = "_BASE_"
AUTO = "auto"
_MAX_VALUES, _MAX_DEPTH, _MAX_SIZES = 100_000, 50, 10_000
_NUMBER = r"(\d{1,6}(?:\.\d{1,6})?)"
_SIZES = re.compile(rf"\[int\(x\*{_NUMBER}\*{_NUMBER}\)forxinrange\((\d{{1,6}}),(\d{{1,6}})\)\]")
_EXPECTED: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a tuple, such as \"('a', 'b')\" or \"(1, 2)\", with a comma behind a single one",
    list: "a list, such as \"['a', 'b']\" or \"[1, 2]\"",
}
_MAY_BE_NONE = ("SOLVER.BIAS_LR_FACTOR", "SOLVER.WEIGHT_DECAY_BIAS", "MODEL.WEIGHTS")
logger = logging.getLogger(__name__)
KEYS = """
MODEL:
  PEFT:
    # The registered model that META_ARCHITECTURE PEFTModel builds and injects.
    META_ARCHITECTURE: ""
    # An adapter folder to start from or to evaluate.
    WEIGHTS: ""
    # What is injected where, a list of {NAME, TARGETS, ...}: see the methods. Or auto: chosen by gradients on your
    # data, within BUDGET.
    METHODS: []
    # Percent of the model's parameters that METHODS auto may train, TRAIN included.
    BUDGET: 6.0
    # Modules or parameters (patterns) that are trained in full besides; ["*"] is full fine-tuning.
    TRAIN: []
    # Factor on SOLVER.BASE_LR for what is injected.
    LR_FACTOR: 1.0
    # Factor on SOLVER.BASE_LR for what TRAIN names.
    TRAIN_LR_FACTOR: 1.0
    # Further factors by the parameters' names (patterns), a list of {PARAMETERS, FACTOR}; the first match counts.
    LR_FACTORS: []
    # Load an adapter that was made for another base all the same.
    ALLOW_OTHER_BASE: false
    # Prove before the first step that each injected part changes the output and gets a gradient.
    PROVE_LIVE: true
    # GiB that a training step may take, weights and optimizer included, or "auto": what the device has free. A plan is
    # made before the first step: which blocks recompute their activations, in how many pieces a batch is computed.
    MEMORY_BUDGET: null
INPUT:
  # Which mapper makes a sample of an image's record; "" follows from the model.
  DATASET_MAPPER_NAME: ""
SOLVER:
  # SGD, as plain Detectron2's configs mean it, or ADAMW.
  OPTIMIZER: SGD
  # Factor on BASE_LR for what is trained in full inside a backbone.
  BACKBONE_MULTIPLIER: 1.0
  # Layer-wise decay: what is trained in full in a block learns at so much of the rate of the block after it.
  LAYER_DECAY: 1.0
  # Which modules are these blocks (a pattern), from the first to the last.
  LAYER_DECAY_BLOCKS: backbone.net.blocks.*
  # So many of the last blocks learn at the full rate all the same.
  LAYER_DECAY_SPARED: 0
  # In how many pieces each process computes its share of a batch, to save memory; gradients are the whole batch's.
  ACCUMULATE: 1
  # The batch size that BASE_LR was chosen for. 0: the files' own, where the command line changes IMS_PER_BATCH and not
  # BASE_LR, else the rate stays as it is.
  REFERENCE_IMS: 0
  # How many periodic checkpoints stay on disk; 0 keeps all.
  CHECKPOINTS_TO_KEEP: 0
  # Exponent of WarmupPolyLR and TwoStagePolyLR.
  POLY_LR_POWER: 0.9
  # The share of BASE_LR below which WarmupPolyLR does not fall.
  POLY_LR_CONSTANT_ENDING: 0.0
  # In TwoStagePolyLR what is trained in full in a backbone starts after WARMUP_ITERS, and warms up in so many steps.
  BACKBONE_WARMUP_ITERS: 0
  AMP:
    # auto (bf16 where the device has it, else fp16), bf16 or fp16.
    DTYPE: auto
TRACKING:
  # Services that get a run's figures, of wandb and mlflow.
  WITH: []
  # The project, or experiment, that the run belongs to there.
  PROJECT: peft_d2
  # The run's name there; "" takes that of OUTPUT_DIR.
  RUN: ""
"""


def add_config(cfg: Any, models: bool = True) -> None:
    """Add ``MODEL.PEFT``, the models' own nodes and the data keys to a Detectron2 config.

    What exists already keeps its value, so it is safe after an upstream ``add_*_config`` and twice. Without ``models``
    it is ``MODEL.PEFT`` alone, for code that has models, data and a trainer of its own.
    """
    require_detectron2()
    from peft_d2.data.config import add_data_config, add_keys
    from peft_d2.models import add_models_config

    if not models:
        return add_keys(cfg, {"MODEL": {"PEFT": yaml.safe_load(KEYS)["MODEL"]["PEFT"]}})
    add_keys(cfg, KEYS)  # first: a plain Detectron2 config keeps its optimizer, whatever a model's files choose
    add_data_config(cfg)
    add_models_config(cfg)


@dataclass
class LoadedConfig:
    """A config and the keys that its user wrote himself.

    Attributes:
        cfg: the config.
        explicit: key -> where: 0 in the top config file, 1 in the PEFT file, 2 among the ``KEY VALUE`` pairs, 3 in an
            argument of the command line. What a base file says is not in it.
    """

    cfg: Any
    explicit: dict[str, int] = field(default_factory=dict)


def load_config(config_file: str, peft_config: str = "", opts: Sequence[str] = ()) -> LoadedConfig:
    """Read a model's config file, one of ``configs/peft`` on top of it, and ``KEY VALUE`` pairs.

    ``configs/...`` that is not there is taken from the package.

    Raises:
        ConfigError: a file that is missing or unsafe, a key that does not exist, a value of the wrong type.
    """
    require_detectron2()
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_config(cfg)
    loaded = LoadedConfig(cfg)
    if config_file:
        _merge_file(loaded, find_file(config_file), 0)
    model = cfg.MODEL.META_ARCHITECTURE
    if peft_config:
        _merge_file(loaded, find_file(peft_config), 1)
    batch = cfg.SOLVER.IMS_PER_BATCH
    _merge_pairs(loaded, opts)
    explicit, solver = loaded.explicit, cfg.SOLVER
    if explicit.get("SOLVER.REFERENCE_IMS") != 2:
        if explicit.get("SOLVER.BASE_LR") == 2:
            solver.REFERENCE_IMS = 0  # the files' is that of their own rate
        elif explicit.get("SOLVER.IMS_PER_BATCH") == 2 and not solver.REFERENCE_IMS:
            solver.REFERENCE_IMS = batch  # the files' rate follows the batch size given beside them
    _switch_peft_on(cfg, model)
    resolve_device(cfg)
    return loaded


def _switch_peft_on(cfg: Any, model: str) -> None:
    """Make ``PEFTModel`` the config's model, and the model named there its base, where PEFT is asked for.

    It is where ``MODEL.PEFT`` names a method, ``TRAIN`` or an adapter, or a PEFT file has set ``PEFTModel`` itself.

    Args:
        model: the config's META_ARCHITECTURE without the PEFT file.
    """
    node = cfg.MODEL.PEFT
    if cfg.MODEL.META_ARCHITECTURE != PEFT_ARCHITECTURE and (node.METHODS or node.TRAIN or node.WEIGHTS):
        node.META_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, PEFT_ARCHITECTURE
    elif not node.META_ARCHITECTURE and model != PEFT_ARCHITECTURE:
        node.META_ARCHITECTURE = model if cfg.MODEL.META_ARCHITECTURE == PEFT_ARCHITECTURE else ""


def resolve_device(cfg: Any) -> None:
    """Turn ``MODEL.DEVICE: cuda`` into ``cpu``, with one line, where torch sees no CUDA device.

    Raises:
        ConfigError: torch knows no such device.
    """
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
        if device.type != "cuda":  # where a tensor would take memory of the device in each process
            torch.empty(1, device=device)
    except Exception as error:  # of torch, of a backend that is not there
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"MODEL.DEVICE is {name!r}; expected 'cpu', 'cuda' or 'cuda:0' (torch: {said}).") from error
    if device.type == "cuda" and (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise ConfigError(f"MODEL.DEVICE is {name!r}, and torch sees {torch.cuda.device_count()} CUDA devices here.")
    if device.type == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.warning("MODEL.DEVICE is %r but torch sees no CUDA device here: running on the CPU.", name)


def with_values(cfg: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a config in which these keys, "SOLVER.BASE_LR" say, have these values; frozen if ``cfg`` is."""
    cfg = cfg.clone()
    for key, value in values.items():
        path, _, leaf = key.rpartition(".")
        operator.attrgetter(path)(cfg)[leaf] = value
    return cfg


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key with dots, value) of everything in a config or a part of one."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge_file(loaded: LoadedConfig, path: str, level: int) -> None:
    """Merge a file and its bases into the config, and note its own keys as written at ``level``."""
    cfg = loaded.cfg
    tree = read_tree(path)
    _adjust(tree, cfg, path)
    tree.setdefault("VERSION", cfg.VERSION)
    with tempfile.TemporaryDirectory() as folder:
        # Detectron2's merge, which upgrades old versions, takes a file: it gets one without bases and tags.
        plain = Path(folder, "config.yaml")
        plain.write_text(yaml.safe_dump(tree))
        try:
            cfg.merge_from_file(str(plain), allow_unsafe=False)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            unknown = re.search(r"Non-existent config key: ([^']+)", str(error))
            raise ConfigError(
                _unknown_key(path, unknown[1], cfg) if unknown else _mismatch(path, error, cfg)
            ) from error
    loaded.explicit.update({key: level for key, _ in leaves(read_top(path)) if key.partition(".")[0] != BASE_KEY})


def _merge_pairs(loaded: LoadedConfig, opts: Sequence[str]) -> None:
    """Merge the ``KEY VALUE`` pairs of a command line into the config, and note their keys."""
    opts = list(opts or ())
    flags = [item for item in opts if item.startswith("--")]
    if flags:
        raise ConfigError(f"{flags[0]} comes after config KEY VALUE pairs; put all arguments before them.")
    joined = [item for item in opts[::2] if re.match(r"[A-Z]\w*(\.\w+)*=", str(item))]
    if joined:
        raise ConfigError(f"{joined[0]}: config keys and values are two words, {' '.join(joined[0].split('=', 1))!r}.")
    if len(opts) % 2:
        raise ConfigError(f"config options come in KEY VALUE pairs; the last one, {opts[-1]!r}, stands alone.")
    known = dict(leaves(loaded.cfg))
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key not in known:
            inside = next((name for name in known if name.startswith(f"{key}.")), "")
            said = f"command line: {key} is a group of keys. Give one of them, such as {inside}."
            raise ConfigError(said if inside else _unknown_key("command line", key, loaded.cfg))
        value = _adjusted("command line", key, None if value == "None" else value, known[key])
        try:
            loaded.cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(_mismatch(f"command line: {key} {_short(value)}", error, loaded.cfg)) from error
        except (RecursionError, MemoryError) as error:  # Python's parser, on brackets in thousands
            raise ConfigError(f"command line: {key} {_short(value)}: is nested too deeply.") from error
        loaded.explicit[key] = 2


def _adjust(tree: dict[str, Any], node: Any, path: str, prefix: str = "") -> None:
    """Replace each value of a file's tree by what :func:`_adjusted` makes of it, in place."""
    for key, value in tree.items():
        default = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(value, dict):
            _adjust(value, default, path, f"{prefix}{key}.")
        else:
            tree[key] = _adjusted(path, f"{prefix}{key}", value, default)


def _adjusted(where: str, key: str, value: Any, default: Any) -> Any:
    """A value in the form that Detectron2 accepts: a whole number as a float where one is expected, AUTO as a list.

    Raises:
        ConfigError: it names a key twice; or it is None, which Detectron2 accepts for any value and then fails with.
    """
    _refuse_repeated_keys(f"{where}: {key}", value)
    if value is None and type(default) in _EXPECTED and key not in _MAY_BE_NONE:
        raise ConfigError(f"{where}: {key}: is empty (None); expected {_EXPECTED[type(default)]}.")
    if isinstance(default, float) and re.fullmatch(r"[+-]?\d+", str(value)):
        return float(value)
    return [AUTO] if (key, value) == ("MODEL.PEFT.METHODS", AUTO) else value


def _mismatch(where: str, error: Exception, cfg: Any) -> str:
    """A message that says what to write, in place of what Detectron2 says about a value of the wrong type."""
    key = (re.findall(r"for config key: (\S+)", str(error)) or [""])[-1]
    default: Any = cfg
    for part in key.split(".") if key else ():
        default = default.get(part) if isinstance(default, Mapping) else None
    expected = "a group of keys" if isinstance(default, Mapping) else _EXPECTED.get(type(default), "")
    if not key or not expected:
        return f"{where}: {' '.join(str(error).split())}"
    return f"{where}: expected {expected}{'' if where.startswith('command') else f' for {key}'}."


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 80 else f"{text[:77]}..."


def _refuse_repeated_keys(where: str, value: Any) -> None:
    """Refuse a dict with a key twice in a text, which Detectron2 evaluates as Python: the last value would count."""
    if not isinstance(value, str) or "{" not in value:
        return
    try:
        nodes = list(ast.walk(ast.parse(value.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # no Python, or none that will be evaluated
    for node in nodes:
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
        for key, count in Counter(keys).items():
            if count > 1:
                raise ConfigError(f"{where}: the key {key!r} is given twice in one entry. Leave one of them out.")


def _unknown_key(where: str, key: str, cfg: Any) -> str:
    """The message about a key that does not exist, with the nearest one that does."""
    parts = [known.split(".") for known, _ in leaves(cfg)]
    known = sorted({".".join(part[:count]) for part in parts for count in range(1, len(part) + 1)})  # groups, too
    if key in known:
        return (
            f"{where}: config key {key!r} has another name in the VERSION that the file says it is of. Leave that out."
        )
    group, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    near = [name for name in known if name.lower() == key.lower()]
    near = near or [name for last, name in siblings.items() if leaf in last.split("_")]
    near = near or [siblings[n] for n in difflib.get_close_matches(key.rpartition(".")[2], siblings, n=1, cutoff=0.5)]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if near:
        return f"{where}: config key {key!r} does not exist; the nearest one is {near[0]!r}."
    return (
        f"{where}: config key {key!r} does not exist, nor one like it. If another program has it (AdelaiDet, fc-clip, "
        "VoVNet, ...), run that one: docs/codebases.md has the lines that its train_net.py needs for MODEL.PEFT."
    )


def read_tree(path: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file's content merged over that of its base files; ``above`` are those that it is a base of.

    Raises:
        ConfigError: a file that cannot be read, is no yaml mapping, names a key twice, holds code or aliases that grow
            without bound, or is its own base.
    """
    if os.path.realpath(path) in above:
        raise ConfigError(f"{path}: is its own {BASE_KEY}, directly or through others.")
    if len(above) > _MAX_DEPTH:
        raise ConfigError(f"{path}: is the end of a chain of more than {_MAX_DEPTH} files by {BASE_KEY}.")
    tree = read_top(path)
    bases = tree.pop(BASE_KEY, [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        beside = os.path.join(os.path.dirname(path), os.path.expanduser(str(base)))
        _merge_trees(read_tree(beside, (*above, os.path.realpath(path))), merged, path)
    _merge_trees(tree, merged, path)
    return merged


def read_top(path: str) -> dict[str, Any]:
    """The content of the file alone; raises as :func:`read_tree`."""
    if path.endswith(".py"):
        raise ConfigError(f"{path}: is Python, as LazyConfigs are; these programs read yaml. See docs/plug-in.md.")
    if os.path.isdir(path):
        raise ConfigError(f"config file {path!r} is a folder. Give the path of a yaml file.")
    if not os.path.isfile(path):
        raise ConfigError(f"config file {path!r} does not exist. {_moved(path) or 'Give the path of a yaml file.'}")
    try:
        with open(path, encoding="utf-8") as stream:
            tree = yaml.load(stream, Loader=_ConfigLoader)  # noqa: S506  a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply for a config.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8 ({error}). Save it as that.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {_kind(path) or ' '.join(str(error).split())}") from error
    if not isinstance(tree, dict | None) or not all(isinstance(key, str) for key in tree or ()):
        if kind := _kind(path):
            raise ConfigError(f"{path}: {kind}")
        other = "keys that are no texts" if isinstance(tree, dict) else f"a {type(tree).__name__}"
        raise ConfigError(f"{path}: a config file holds KEY: VALUE pairs, this one {other}.")
    return tree or {}


def _kind(path: str) -> str:
    """The end of an error about a file that is something else than a config, a web page say; "" if it is not known."""
    kind = foreign.kind_of_file(path)
    return f"is {kind}, not a config." if kind else ""


def _moved(path: str) -> str:
    """Say where a file of configs/peft lies now that used to have its model in its name, as ``lora_mask_dino.yaml``.

    "" for other files.
    """
    folder, words = Path(path).parent, set(re.split("[_.]", Path(path).name))
    candidates = []
    for file in folder.glob("*/**/*.yaml") if folder.name == "peft" else ():
        known = set(re.split("[_./]", file.relative_to(folder).as_posix()))
        if words <= known:
            candidates.append((len(known - words - {"ablations"}), str(file)))
    return f"It is {min(candidates)[1]} now: each model has a folder of its own." if candidates else ""


def _merge_trees(new: Mapping[str, Any], into: dict[str, Any], path: str) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and key in into:
            if not isinstance(into[key], dict):
                raise ConfigError(f"{path}: {key} is a group of keys here and a single value in the base file.")
            _merge_trees(value, into[key], path)
        else:
            into[key] = value


class _ConfigLoader(yaml.SafeLoader):
    """Plain yaml, each key once and of bounded size, and the one tag that published configs use."""

    def get_single_node(self) -> Any:
        """The document's root, checked before anything is made of it."""
        node = super().get_single_node()
        if node is not None:
            _check_node(node, 1, itertools.count())
        return node


def _check_node(node: yaml.Node, depth: int, values: Iterator[int]) -> None:
    """Refuse a yaml node that gives a key two values, or has more values or levels than a config can need.

    Aliases count as often as they are used. The same value twice is let pass: the official Mask2Former has one.
    """
    if next(values) > _MAX_VALUES or depth > _MAX_DEPTH:
        raise _refused(node, f"holds more than {_MAX_VALUES:,} values, aliases written out, or {_MAX_DEPTH} levels")
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    pairs = children if isinstance(node, yaml.MappingNode) else []
    for child in [part for pair in pairs for part in pair] or children:
        _check_node(child, depth + 1, values)
    said: dict[str, Any] = {}
    for key, value in pairs:
        if isinstance(key, yaml.ScalarNode) and said.setdefault(key.value, _meaning(value)) != _meaning(value):
            raise _refused(node, f"the key {key.value!r} is given twice in this group, with two values")


def _meaning(node: yaml.Node) -> Any:
    """A yaml node in a form that can be compared: its tag, and its text or the same of its children."""
    if not isinstance(node, yaml.CollectionNode):
        return node.tag, node.value
    return node.tag, [tuple(map(_meaning, item)) if isinstance(item, tuple) else _meaning(item) for item in node.value]


def _refused(node: yaml.Node, why: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


def _sizes(loader: yaml.SafeLoader, node: yaml.Node) -> list[int]:
    """``[int(x * 0.1 * 1024) for x in range(5, 21)]``, the form in which published files list sizes."""
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    text = str(items[0].value) if len(items) == 1 and isinstance(items[0], yaml.ScalarNode) else ""
    found = _SIZES.fullmatch(text.replace(" ", ""))
    if found is None or int(found[4]) - int(found[3]) > _MAX_SIZES:
        why = f"{text[:80]!r} is more than the arithmetic over a range by which published files list sizes, "
        raise _refused(node, why + "[int(x * 0.1 * 1024) for x in range(5, 21)]; code in config files is not run")
    return [int(x * float(found[1]) * float(found[2])) for x in range(int(found[3]), int(found[4]))]


_ConfigLoader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _sizes)
