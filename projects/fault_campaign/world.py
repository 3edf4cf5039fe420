"""A tiny world to break: data, config, and training processes that are forked, so that each starts in a moment."""

from __future__ import annotations

import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import toy

import peft_d2
from peft_d2.engine.checks import apply_class_count
from peft_d2.engine.config import load_config

CONFIG = Path(__file__).with_name("tiny.yaml")
LORA = "[{'NAME': 'lora', 'RANK': %d, 'ALPHA': 2, 'TARGETS': ['qkv', 'self_attn.value_proj']}]"
TRAIN = "['sem_seg_head.predictor.class_embed', 'sem_seg_head.predictor.mask_embed']"


@dataclass
class Result:
    """What came of one kind of fault: how often it was caused, how often the promise held, and what was seen if not."""

    fault: str
    caused: int = 0
    held: int = 0
    details: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, failure: str, detail: str = "") -> None:
        """Count one; an empty ``failure`` means that the promise held."""
        self.caused += 1
        self.held += not failure
        if detail:
            self.details[detail] = self.details.get(detail, 0) + 1
        if failure:
            self.failures.append(failure)


class World:
    """A folder with a toy data set and the weights of a tiny base model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.set_num_threads(1)  # forked processes may not use threads that their parent started
        peft_d2.register()
        self.data = toy.generate(root / "toy", sorted(toy.DOMAINS)[0], images=6, seed=0, size=64)
        self.base = root / "base.pth"
        torch.manual_seed(11)
        torch.save({"model": self.model().state_dict()}, self.base)

    def cfg(
        self,
        output: Path,
        *opts: Any,
        peft: bool = True,
        rank: int = 2,
        data: toy.ToySet | None = None,
        evaluate: bool = False,
    ) -> Any:
        """A config of the tiny model, trained on the toy set and, where asked, evaluated on it."""
        pairs = ["OUTPUT_DIR", output, "MODEL.WEIGHTS", getattr(self, "base", ""), "SOLVER.CHECKPOINT_PERIOD", 1]
        if peft:
            pairs += ["MODEL.PEFT.METHODS", LORA % rank, "MODEL.PEFT.TRAIN", TRAIN, "MODEL.PEFT.PROVE_LIVE", False]
        cfg = load_config(str(CONFIG), opts=[str(item) for item in [*pairs, *opts]]).cfg
        data = data or self.data
        name = "toy" + str(data.json.parent).replace("/", "_")  # one for each world of a process
        cfg.DATASETS.REGISTER = [{"NAME": name, "JSON": str(data.json), "IMAGES": str(data.images)}]
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), (name,) if evaluate else ()
        apply_class_count(cfg)
        return cfg

    def model(self, **options: Any) -> torch.nn.Module:
        """A tiny model, injected unless ``peft=False``."""
        from detectron2.modeling import build_model

        return build_model(self.cfg(self.root / "none", **{"peft": False, **options}))


class Child:
    """A forked process that runs ``function(tell)``; what it tells and how it ends is read here.

    Its output goes to the file ``console``. ``tell(*words)`` sends one line.
    """

    def __init__(self, function: Callable[[Callable[..., None]], Any], console: Path) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.console = console
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            _be_child(function, write, console)
        os.close(write)
        self._pipe, self._rest = read, b""
        self.status: int | None = None

    def line(self, timeout: float = 120.0) -> list[str]:
        """The next thing that it tells, as words; empty when it has ended."""
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            if not select.select([self._pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"process {self.pid} said nothing for {timeout} s; see {self.console}")
            data = os.read(self._pipe, 1 << 16)
            if not data:
                return []
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode().split()

    def wait(self) -> int:
        """Its exit code, -9 after SIGKILL."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def kill(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def close(self) -> None:
        """Leave nothing of it behind."""
        if self.status is None:
            os.kill(self.pid, 9)
            self.wait()
        os.close(self._pipe)


def _be_child(function: Callable[[Callable[..., None]], Any], pipe: int, console: Path) -> None:
    code = 1
    try:
        target = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        function(lambda *words: os.write(pipe, " ".join(map(str, words)).encode() + b"\n"))
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
