#!/usr/bin/env python
"""A page in the browser: drop a picture, choose adapters, see what each finds side by side; click prompts for SAM.

    tools/ui.py --config-file configs/demo/base.yaml --adapters night=output/night/adapter_final

It is tools/demo.py with a page before it, and needs gradio: pip install 'peft_d2[ui]'.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

import numpy as np
from command_line import config_parser, take_pairs
from demo import Predictor, paint, read_adapters
from PIL import Image, ImageDraw

from peft_d2.engine.errors import ConfigError, bounded, is_expected, one_line_errors
from peft_d2.engine.launch import prepare_config

BOX, ON, OFF = "box: two clicks", "point on the object", "point off it"


def ui_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/ui.py``."""
    example = "--config-file output/mine/config.yaml --adapters mine=output/mine/adapter_final"
    what = "A page in the browser: drop a picture, see what a model or several adapters find in it."
    parser = config_parser(what, example)
    parser.add_argument("--adapters", nargs="+", default=[], metavar="NAME=DIR", help="to choose from, with the base")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 shows the page to the whole network")
    parser.add_argument("--port", type=bounded(int, 1, 65535), help="by default the first that is free from 7860 on")
    take_pairs(parser)
    return parser


def clicked(prompts: dict[str, Any], kind: str, x: float, y: float) -> dict[str, Any]:
    """Prompts after a click at x, y (px): a corner of a box each, or a point; one kind takes the other's place."""
    if kind != BOX:
        return {"points": [*prompts.get("points", []), [x, y, int(kind == ON)]]}
    boxes = prompts.get("boxes", [])
    if "corner" not in prompts:
        return {"boxes": boxes, "corner": [x, y]}
    (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(prompts["corner"], [x, y], strict=True))
    return {"boxes": [*boxes, [x0, y0, x1, y1]]}


def described(prompts: dict[str, Any]) -> str:
    """What has been clicked, in words."""
    lines = [f"box {x0:.0f} {y0:.0f} {x1:.0f} {y1:.0f}" for x0, y0, x1, y1 in prompts.get("boxes", [])]
    lines += [f"point {x:.0f} {y:.0f}{'' if on else ', off the object'}" for x, y, on in prompts.get("points", [])]
    if "corner" in prompts:
        lines.append("a corner at {:.0f} {:.0f}; click the opposite one".format(*prompts["corner"]))
    return "; ".join(lines) or "Click on the picture to say what to segment."


def pictures(
    predictor: Predictor, path: str, threshold: float, adapters: list[str], prompts: dict[str, Any]
) -> list[tuple[np.ndarray, str]]:
    """What the model, or each of ``adapters``, finds in an image: pictures with a caption."""
    given = {name: rows for name, rows in prompts.items() if name != "corner" and rows}
    if (predictor.prompted and not given) or (predictor.by_adapter and not adapters):
        return []
    image, prediction = predictor(Path(path), **given, adapters=adapters)
    found = []
    for name in adapters if predictor.by_adapter else [""]:
        of = predictor.by_adapter[name] if name else predictor.metadata
        # A prompt's score is the expected IoU of its mask: what was asked for is shown whatever that is.
        least = -np.inf if predictor.prompted else threshold
        picture, count = paint(image, prediction[name] if name else prediction, of, least)
        found.append((with_prompts(picture, prompts, picture.shape[0] / image.shape[0]), f"{name} ({count})".strip()))
    return found


def with_prompts(picture: np.ndarray, prompts: dict[str, Any], scale: float) -> np.ndarray:
    """The picture with boxes and points on it; ``scale`` px of it are one of the image."""
    drawn = Image.fromarray(picture)
    pen = ImageDraw.Draw(drawn)
    for box in prompts.get("boxes", []):
        pen.rectangle([scale * side for side in box], outline="white", width=2)
    for x, y, on in prompts.get("points", []):
        pen.circle((scale * x, scale * y), 5, "lime" if on else "red", "white")
    return np.asarray(drawn)


def page(gradio: Any, predictor: Predictor) -> Any:
    """The page, not yet served."""
    names = list(predictor.by_adapter)

    def predict(path: str | None, threshold: float, chosen: list[str], prompts: dict[str, Any]) -> Any:
        try:
            return pictures(predictor, path, threshold, chosen, prompts) if path else []
        except Exception as error:
            if is_expected(error):
                raise gradio.Error(str(error)) from error
            raise

    def click(prompts: dict[str, Any], kind: str, event: gradio.SelectData) -> tuple[dict[str, Any], str]:
        prompts = clicked(prompts, kind, *map(float, event.index))
        return prompts, described(prompts)

    click.__annotations__["event"] = gradio.SelectData  # by which gradio knows what to pass
    with gradio.Blocks(title="peft_d2", analytics_enabled=False) as blocks:
        with gradio.Row():
            with gradio.Column(scale=1):
                image = gradio.Image(type="filepath", label="Picture", sources=["upload", "clipboard"])
                chosen = gradio.CheckboxGroup(names, value=names, label="Adapters", visible=bool(names))
                least = gradio.Slider(0, 1, 0.5, label="Show from this score on", visible=not predictor.prompted)
                with gradio.Group(visible=predictor.prompted):
                    kind = gradio.Radio([BOX, ON, OFF], value=BOX, label="A click is a")
                    said = gradio.Textbox(described({}), label="Prompts", interactive=False)
                    clear = gradio.Button("Clear the prompts")
            found = gradio.Gallery(
                label="Found", columns=max(1, min(3, len(names))), object_fit="contain", format="png", scale=2
            )
        prompts = gradio.State({})
        inputs = [image, least, chosen, prompts]
        if predictor.prompted:
            image.select(click, [prompts, kind], [prompts, said])
            gradio.on([clear.click, image.upload, image.clear], lambda: ({}, described({})), None, [prompts, said])
        events = [image.change, least.release, chosen.change, prompts.change]
        gradio.on(events, predict, inputs, found, concurrency_limit=1)
    return blocks


def serve(args: argparse.Namespace) -> None:
    """Build the model and serve the page until Ctrl-C.

    Raises:
        ConfigError: gradio is not there, or anything of the command line that the user can put right.
    """
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(
            f"the page needs gradio ({error}): pip install 'peft_d2[ui]', or pip install gradio."
        ) from error
    predictor = Predictor(prepare_config(args, reads=()), read_adapters(args.adapters))
    try:
        # Fonts of the machine: the page loads nothing from elsewhere.
        theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        blocks = page(gradio, predictor)
        socket.create_server((args.host, args.port or 0)).close()  # gradio would wait for a host that there is not
        _, address, _ = blocks.launch(
            server_name=args.host, server_port=args.port, theme=theme, footer_links=[], quiet=True,
            prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"--host {args.host}, --port {args.port}: {error}") from error
    print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
    blocks.block_thread()


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/ui.py``."""
    args = ui_parser().parse_args(arguments)
    one_line_errors(lambda: serve(args))


if __name__ == "__main__":
    main()
