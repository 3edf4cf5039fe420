"""``peft-d2 COMMAND ...``, or ``python -m peft_d2``: the programs of tools/, from any folder."""

from __future__ import annotations

import difflib
import sys
import warnings
from types import ModuleType

from peft_d2.compat import HOW_TO_GET_DETECTRON2, bundled
from peft_d2.engine.errors import one_line_errors

COMMANDS = {  # name: the program, arguments that stand before the user's, what it does
    "train": ("train_net.py", [], "train on your data, or go on with --resume"),
    "eval": ("train_net.py", ["--eval-only"], "evaluate a run's adapter, or a base"),
    "predict": ("demo.py", [], "predict on images: pictures, COCO json, polygons"),
    "ui": ("ui.py", [], "a page in the browser: drop a picture, see adapters side by side, click boxes"),
    "merge": ("merge_adapter.py", [], "merge an adapter into its base: one ordinary checkpoint"),
    "take-adapter": ("take_adapter.py", [], "make an adapter of a checkpoint of somebody else's trainer"),
    "export": ("export.py", [], "write a model for use without this package"),
    "inspect": ("inspect_targets.py", [], "what a config trains, and what a pattern matches"),
    "check-data": ("check_dataset.py", [], "find what would crash or mislead a training; picture a data set"),
    "tile": ("tile_dataset.py", [], "cut a data set of large images into tiles to train on"),
    "analyze": ("analyze_peft.py", [], "measure methods beside full fine-tuning: time, memory, size"),
    "recommend": ("recommend.py", [], "which method fits your data, memory and time"),
    "doctor": ("doctor.py", [], "what this environment has, what is missing, what to do about it"),
    "demo": ("run_demo.py", [], "adapt a small model to real images five ways, with nothing to download"),
    "setup-detectron2": ("build_detectron2.py", ["--install"], "install a pure-Python Detectron2 where there is none"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the program that the first argument names; its exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    known = {command: row for command, row in COMMANDS.items() if bundled(f"tools/{row[0]}").is_file()}
    if name in ("-h", "--help", "-V", "--version"):
        import peft_d2

        usage = "\nusage: peft-d2 COMMAND ...        (peft-d2 COMMAND --help: its arguments and an example)\n"
        rows = [usage, *(f"  {command:18}{row[2]}" for command, row in known.items())] if "h" in name else []
        one_line_errors(lambda: print(f"peft_d2 {peft_d2.__version__}", *rows, sep="\n"))
        return 0
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Expected one of {', '.join(known)}."
        print(f"error: {name!r} is no command of peft-d2. {hint}", file=sys.stderr)
        return 2
    program, before, _ = known[name]
    # Run the program as if Python had been called with it, so that processes it spawns find it; argv[0] says peft-d2.
    file = bundled(f"tools/{program}")
    sys.argv = [f"peft-d2 {name}", *before, *rest]
    # A warning at every start that is for the authors of fvcore and Detectron2: users can do nothing about it.
    warnings.filterwarnings("ignore", r".*torch\.jit\.script", FutureWarning)
    sys.path.insert(0, str(file.parent))
    sys.modules["__main__"] = module = ModuleType("__main__")
    module.__file__ = str(file)
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "detectron2":
            raise
        print(f"error: Detectron2 is not installed, and {name} needs it. {HOW_TO_GET_DETECTRON2}.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
