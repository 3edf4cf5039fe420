"""``tools/ui.py`` in a headless browser: a picture is dropped, prompts are clicked, and the masks are the model's."""

from __future__ import annotations

import io
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

import demo  # noqa: E402
import ui  # noqa: E402
from PIL import Image  # noqa: E402

from .test_sam_tools import adapted, config  # noqa: E402, F401

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The last four: nothing of the browser's own goes to the network.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip


@pytest.mark.parametrize(
    ("clicks", "prompts", "said"),
    [
        ([], {}, "Click on the picture to say what to segment."),
        ([(ui.BOX, 9, 3)], {"boxes": [], "corner": [9, 3]}, "a corner at 9 3; click the opposite one"),
        ([(ui.BOX, 9, 3), (ui.BOX, 2, 8)], {"boxes": [[2, 3, 9, 8]]}, "box 2 3 9 8"),
        ([(ui.BOX, 1, 1), (ui.ON, 2, 3)], {"points": [[2, 3, 1]]}, "point 2 3"),
        ([(ui.ON, 2, 3), (ui.OFF, 4, 5)], {"points": [[2, 3, 1], [4, 5, 0]]}, "point 2 3; point 4 5, off the object"),
        ([(ui.ON, 2, 3), (ui.BOX, 4, 5), (ui.BOX, 6, 7)], {"boxes": [[4, 5, 6, 7]]}, "box 4 5 6 7"),
    ],
)
def test_clicks_become_prompts(clicks: list[Any], prompts: dict[str, Any], said: str) -> None:
    made: dict[str, Any] = {}
    for kind, x, y in clicks:
        made = ui.clicked(made, kind, x, y)
    assert made == prompts and ui.described(made) == said


def test_without_gradio_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as left:
        ui.main(["--config-file", "there_is_no_such_file.yaml"])
    told = capsys.readouterr().err
    assert left.value.code == 1 and told.count("\n") == 1 and "pip install 'peft_d2[ui]'" in told


@pytest.fixture
def browser() -> Iterator[Any]:
    """A tab; the test fails if the page logs an error or asks another host for anything."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if BROWSER is None:
        pytest.skip("needs a browser: chromium or google-chrome on the PATH")
    faults: list[str] = []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        tab = chromium.new_page()
        tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        elsewhere = re.compile(r"(?!http://127\.0\.0\.1:|data:|blob:)")
        tab.on("request", lambda asked: faults.append(asked.url) if elsewhere.match(asked.url) else None)
        yield tab
        chromium.close()
    assert faults == []


@pytest.fixture
def address(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:  # noqa: F811
    """The page of the tiny model with an adapter, as the command line serves it."""
    gradio = pytest.importorskip("gradio", reason="needs gradio")
    monkeypatch.setattr("detectron2.utils.visualizer.random_color", lambda **_: np.array([0.2, 0.9, 0.4]))
    adapted(config, {"NAME": "lora", "TARGETS": ["image_encoder.*.qkv"], "PARTS": ["q", "v"], "RANK": 4})
    arguments = ["--config-file", str(config), "--adapters", f"night={config.parent}/adapter"]
    threading.Thread(target=ui.main, args=(arguments,), daemon=True).start()
    said, patience = "", time.monotonic() + 120
    while "Ctrl-C" not in said and time.monotonic() < patience:
        time.sleep(0.2)
        said += capsys.readouterr().out
    (url,) = re.findall(r"The page is at (\S+)", said)
    yield url
    gradio.close_all()


def test_clicked_boxes_are_segmented_by_each_adapter(browser: Any, address: str, config: Path) -> None:  # noqa: F811
    photo = config.parent / "photos" / "a.png"  # 90 x 40 px
    browser.goto(address)
    browser.locator("input[type=file]").set_input_files(photo)
    shown = browser.locator(".image-frame img")
    prompts = browser.get_by_label("Prompts")

    def click(x: float, y: float, said: str) -> None:
        """Until the page says what it has understood: a click before it has taken the picture is lost."""
        for _ in range(6):
            browser.wait_for_function("img => img.complete && img.naturalWidth > 0", arg=shown.element_handle())
            area = shown.bounding_box()  # now: the layout moves until the picture is there
            shown.click(position={"x": x * area["width"], "y": y * area["height"]})
            for _ in range(100):
                if prompts.input_value().startswith(said):
                    return
                browser.wait_for_timeout(100)
        raise AssertionError(f"{said!r} is not said: {prompts.input_value()!r}")

    click(0.75, 0.75, "a corner")
    click(0.25, 0.25, "box")
    box = [float(side) for side in prompts.input_value().split()[1:]]
    np.testing.assert_allclose(box, [22.5, 10, 67.5, 30], atol=1)

    found = browser.locator(".grid-container img")
    found.nth(1).wait_for()
    args = ui.ui_parser().parse_args(["--config-file", str(config), "--adapters", f"night={config.parent}/adapter"])
    predictor = demo.Predictor(ui.prepare_config(args), demo.read_adapters(args.adapters))
    image, predictions = predictor(photo, [box])
    assert list(predictions) == ["base", "night"]
    for number, (name, prediction) in enumerate(predictions.items()):
        source = browser.request.get(found.nth(number).get_attribute("src")).body()
        wanted = ui.with_prompts(demo.paint(image, prediction, predictor.metadata, -9)[0], {"boxes": [box]}, 12)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(source)).convert("RGB")), wanted), name

    browser.get_by_label("base").uncheck()
    found.nth(1).wait_for(state="detached")
    assert browser.locator(".caption-label").inner_text() == "night (1)"
