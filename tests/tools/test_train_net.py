"""The command-line tools, as a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

import demo  # noqa: E402
import inspect_targets  # noqa: E402
import toy  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

from peft_d2.engine import launch  # noqa: E402

from ..models.conftest import SMALL_EOMT  # noqa: E402

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "engine" / "tiny.yaml"
DINO = ROOT / "tests" / "engine" / "tiny_mask_dino.yaml"
LORA = "[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['qkv', 'self_attn.value_proj']}]"
HEADS = "['class_embed', 'mask_embed']"


def process(tool: str, *arguments: object) -> str:
    """Run a tool in a process of its own; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], forget_loggers: Callable[[], None]) -> Callable[..., str]:
    """Run a tool in this process, which is quicker; returns what it printed, of one that must fail only stderr."""
    for name in {"own_train", "own_val"} & set(DatasetCatalog):  # those of another module's tests
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)

    def call(tool: str, *arguments: object, fails: bool = False) -> str:
        forget_loggers()
        capsys.readouterr()
        module = {"train_net": launch, "demo": demo, "inspect_targets": inspect_targets}[tool]
        try:
            module.main([str(item) for item in arguments])
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            forget_loggers()
        out, error = capsys.readouterr()
        assert (code != 0) == fails, error + out
        return error if fails else out + error

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> toy.ToySet:
    return toy.generate(tmp_path_factory.mktemp("data"), sorted(toy.DOMAINS)[0], images=4, seed=0, size=64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: toy.ToySet) -> Callable[[Path], Path]:
    """``runs(config)``: the folder of a base's run and of one that adapts it: ``base`` and ``lora``."""
    made: dict[Path, Path] = {}

    def make(config: Path) -> Path:
        if config in made:
            return made[config]
        folder = tmp_path_factory.mktemp("runs")
        own = [f"--{split}-{what}" for split in ("train", "val") for what in ("json", "images")]
        files = [item for flag, path in zip(own, [data.json, data.images] * 2, strict=True) for item in (flag, path)]
        common = ("--config-file", config, *files, "--name", "toys", "SOLVER.MAX_ITER", 2)
        process("train_net", *common, "OUTPUT_DIR", folder / "base")
        peft = ("MODEL.PEFT.METHODS", LORA, "MODEL.PEFT.TRAIN", HEADS)
        weights = ("MODEL.WEIGHTS", folder / "base" / "model_final.pth")
        console = process("train_net", *common, "OUTPUT_DIR", folder / "lora", *peft, *weights)
        (folder / "console.txt").write_text(console)
        made[config] = folder
        return folder

    return make


@pytest.fixture(scope="module")
def finished(runs: Callable[[Path], Path]) -> Path:
    """The runs of the tiny Mask2Former."""
    return runs(TINY)


MODELS = pytest.mark.parametrize("config", [TINY, DINO], ids=["mask2former", "mask_dino"])


def copypaste(text: str) -> list[str]:
    return re.findall(r"copypaste: (.*)", text)


@MODELS
def test_one_command_on_own_data(runs: Callable[[Path], Path], config: Path) -> None:
    finished = runs(config)
    console = (finished / "console.txt").read_text()
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES: 7 -> 3" in console
    assert "lora on" in console and "Frozen weights are unchanged" in console
    assert "AP,AP50,AP75,APs,APm,APl" in copypaste(console)
    lora = finished / "lora"
    assert {"config.yaml", "log.txt", "metrics.json", "adapter_final"} <= {p.name for p in lora.iterdir()}
    assert (lora / "log.txt").read_text().count("lora on") == console.count("lora on") > 0
    assert {"adapter_model.safetensors", "adapter_config.json", "peft_d2.json"} <= {
        p.name for p in (lora / "adapter_final").iterdir()
    }


@MODELS
def test_eval_only_gives_the_figures_of_the_run(
    run: Callable[..., str], runs: Callable[[Path], Path], tmp_path: Path, config: Path
) -> None:
    """With the run's own config and an adapter folder, with and without PEFT keys in the config."""
    finished = runs(config)
    expected = copypaste((finished / "console.txt").read_text())
    adapter = ("MODEL.PEFT.WEIGHTS", finished / "lora" / "adapter_final", "OUTPUT_DIR", tmp_path)
    assert (
        copypaste(run("train_net", "--config-file", finished / "lora/config.yaml", "--eval-only", *adapter)) == expected
    )
    weights = ("MODEL.WEIGHTS", finished / "base" / "model_final.pth")
    console = run("train_net", "--config-file", finished / "base/config.yaml", "--eval-only", *adapter, *weights)
    assert copypaste(console) == expected


def test_a_config_holds_from_any_folder(
    finished: Path, data: toy.ToySet, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and weights given relative to where the run was started."""
    monkeypatch.chdir(finished)
    own = [os.path.relpath(item) for item in (data.json, data.images)]
    first = ("--val-json", own[0], "--val-images", own[1], "--name", "toys", "--eval-only")
    weights = ("MODEL.WEIGHTS", "base/model_final.pth", "MODEL.PEFT.WEIGHTS", "lora/adapter_final")
    console = run("train_net", "--config-file", TINY, *first, "OUTPUT_DIR", tmp_path / "eval", *weights)
    monkeypatch.chdir(tmp_path)
    again = ("--config-file", "eval/config.yaml", "--eval-only", "OUTPUT_DIR", "again")
    assert copypaste(run("train_net", *again)) == copypaste(console)


def test_an_evaluation_leaves_the_config_of_the_training(run: Callable[..., str], finished: Path) -> None:
    config = finished / "lora" / "config.yaml"
    before = config.read_bytes()
    console = run("train_net", "--config-file", config, "--eval-only", "TEST.DETECTIONS_PER_IMAGE", 3)
    assert config.read_bytes() == before and "is kept: it belongs to the training" in console
    assert "this is the base without a trained adapter" in console and "adapter_final" in console
    other = LORA.replace("2", "3")
    error = run("train_net", "--config-file", config, "--resume", "MODEL.PEFT.METHODS", other, fails=True)
    assert "RANK is 3 in the model and 2 in the file" in error
    assert config.read_bytes() == before


def test_killed_and_resumed(finished: Path, run: Callable[..., str], tmp_path: Path) -> None:
    """A process that is killed without warning, at a moment when one checkpoint is whole and the next is not."""
    config = ("--config-file", finished / "lora" / "config.yaml")
    opts = ("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 3000, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()")
    command = [sys.executable, ROOT / "tools" / "train_net.py", *config, *opts]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    training = subprocess.Popen([str(item) for item in command], env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "last_checkpoint").is_file() and training.poll() is None:
        time.sleep(0.02)
    training.kill()
    assert training.wait() == -9
    newest = max(int(path.name[8:]) for path in tmp_path.glob("adapter_*") if (path / "training_state.pth").is_file())
    end = ("SOLVER.MAX_ITER", newest + 3)
    console = run("train_net", *config, "--resume", *opts, *end)
    assert f"Resuming from {tmp_path}/adapter_{newest:07d}" in console
    assert f"Starting training from iteration {newest + 1}" in console
    assert (tmp_path / "adapter_final").is_dir()


def test_a_plain_model_is_evaluated_afterwards(run: Callable[..., str], finished: Path, tmp_path: Path) -> None:
    """A run without PEFT, and --num-gpus 0 and a GPU that is not there on the way."""
    config = ("--config-file", finished / "base" / "config.yaml", "--eval-only", "--num-gpus", 0)
    weights = ("MODEL.WEIGHTS", finished / "base" / "model_final.pth", "OUTPUT_DIR", tmp_path)
    console = run("train_net", *config, *weights, "MODEL.DEVICE", "cuda" if not torch.cuda.is_available() else "cpu")
    assert "AP,AP50,AP75,APs,APm,APl" in copypaste(console)
    assert torch.cuda.is_available() or console.count("torch sees no CUDA device here") == 1


def test_own_data_as_labelme_and_yolo_have_it(run: Callable[..., str], tmp_path: Path) -> None:
    """Trained on one, evaluated on the other, whose class has another name; and what was understood is said."""
    for folder, words in (("labelme", ""), ("yolo", "0 .1 .1 .6 .1 .6 .6 .1 .6")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "a.png")
        if words:
            (tmp_path / folder / "a.txt").write_text(words)
            (tmp_path / folder / "classes.txt").write_text("kitten\n")
    shape = {"label": "cat", "shape_type": "polygon", "points": [[5, 5], [40, 5], [40, 40]]}
    (tmp_path / "labelme" / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": [shape]}))
    out = tmp_path / "out"
    common = ["--config-file", TINY, "--train-data", tmp_path / "labelme", "--val-data", tmp_path / "yolo"]
    common += ["--name", "labelled"]
    settings = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 1, "OUTPUT_DIR", out]
    assert "kitten" in run("train_net", *common[:-1], "unpaired", *settings, fails=True)
    error = run("train_net", *common, "--class-map", "kitten=cat,dog=cat", *settings, fails=True)
    assert "'dog' is no class of this data. It has cat, kitten" in error
    said = run("train_net", *common, "--class-map", "kitten=cat", *settings)
    assert "labelme: 1 images, 1 objects, 1 class(es): cat" in said and "YOLO segmentation: 1 images, 1 objects" in said
    results = json.loads((out / "inference" / "labelled_val" / "coco_instances_results.json").read_text())
    assert {row["category_id"] for row in results} == {1}
    again = run(
        "train_net", "--config-file", out / "config.yaml", "--eval-only", "MODEL.WEIGHTS", out / "model_final.pth"
    )
    assert "Evaluation results for segm" in again


@MODELS
def test_demo(
    run: Callable[..., str], runs: Callable[[Path], Path], data: toy.ToySet, tmp_path: Path, config: Path
) -> None:
    finished = runs(config)
    opts = ("--opts", "MODEL.PEFT.WEIGHTS", finished / "lora" / "adapter_final")
    common = ("--config-file", finished / "lora" / "config.yaml", "--output", tmp_path)
    run("demo", *common, "--input", data.images, "--confidence-threshold", 0.0, *opts)
    pictures = sorted(p.stem for p in tmp_path.iterdir())
    assert pictures == sorted(p.stem for p in data.images.iterdir())
    picture = np.asarray(Image.open(tmp_path / f"{pictures[0]}.png").convert("RGB"))
    assert picture.shape[:2] == (480, 480)
    run("demo", *common, "--input", sorted(data.images.iterdir())[0], "--confidence-threshold", 1.0, *opts)
    empty = np.asarray(Image.open(tmp_path / f"{pictures[0]}.png").convert("RGB"))
    assert not np.array_equal(empty, picture)
    error = run("demo", *common, "--input", tmp_path / "nowhere.png", *opts, fails=True)
    assert error.strip().splitlines()[-1].startswith("error: --input") and "Traceback" not in error


def test_demo_inputs_that_need_care(run: Callable[..., str], finished: Path, data: toy.ToySet, tmp_path: Path) -> None:
    picture = Image.open(sorted(data.images.iterdir())[0]).convert("RGB")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "a.jpg"):
        picture.save(photos / name)
    picture.convert("RGBA").save(photos / "b.png")
    picture.convert("L").save(photos / "c.png")
    (photos / "._c.png").write_bytes(b"as an archive made on macOS leaves them")
    common = ("--config-file", finished / "lora" / "config.yaml", "--input", photos)
    run("demo", *common, "--output", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.png.png", "a.jpg.png", "b.png", "c.png"}
    assert "would be overwritten" in run("demo", *common, "--output", photos, fails=True)
    (photos / "d.png").write_bytes(b"")
    assert "d.png: is no image that can be read" in run("demo", *common, "--output", tmp_path / "out", fails=True)


def test_demo_of_folders_and_its_predictions_as_coco(
    run: Callable[..., str], finished: Path, data: toy.ToySet, tmp_path: Path
) -> None:
    picture = Image.open(sorted(data.images.iterdir())[0]).convert("RGB")
    for name in ("one/a.png", "one/two/a.gif", "b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    common = ("--config-file", finished / "lora" / "config.yaml", "--input", tmp_path, "--confidence-threshold", 0.0)
    out, weights = tmp_path / "drawn", ("--opts", "MODEL.PEFT.WEIGHTS", finished / "lora" / "adapter_final")
    for _ in range(2):  # what was drawn is no image of the second time
        run("demo", *common, "--output", out, "--json", out / "found.json", *weights)
        drawn = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
        assert drawn == {"one/a.png", "one/two/a.png", "b.png"}
    from pycocotools.coco import COCO

    found = COCO(str(out / "found.json"))
    assert [image["file_name"] for image in found.dataset["images"]] == ["b.png", "one/a.png", "one/two/a.gif"]
    assert {category["name"] for category in found.dataset["categories"]} == {
        category["name"] for category in json.loads(data.json.read_text())["categories"]
    }
    first = [found.anns[key] for key in found.getAnnIds(imgIds=1)]
    assert len(first) == 8 and all(0 <= row["score"] <= 1 and row["category_id"] in found.cats for row in first)
    assert [found.annToMask(row).sum() for row in first] == [row["area"] for row in first]


def test_the_terminal_shows_figures_and_the_file_all(
    finished: Path, run: Callable[..., str], tmp_path: Path, data: toy.ToySet
) -> None:
    """Names of classes cannot colour or clear a terminal, either."""
    content = json.loads(data.json.read_text())
    content["categories"][0]["name"] = "nuc\x1b[31mleus\x1b[2J"
    path = tmp_path / "coloured.json"
    path.write_text(json.dumps(content))
    own = ("--train-json", path, "--train-images", data.images, "--val-json", path, "--val-images", data.images)
    opts = ("SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "run", "MODEL.PEFT.METHODS", LORA)
    console = run("train_net", "--config-file", TINY, *own, "--name", "coloured", *opts)
    log = (tmp_path / "run" / "log.txt").read_text()
    for printout in ("Running with full config:", "Model:\nMaskFormer(", "Environment info:"):
        assert log.count(printout) == 1 and printout not in console
    assert "What is trained" in console and "\x1b" not in log and "\x1b[31m" not in console and "[2J" not in console
    assert len(console.splitlines()) < 150


def test_an_error_is_said_once_and_last(run: Callable[..., str], finished: Path, tmp_path: Path) -> None:
    opts = (
        "OUTPUT_DIR",
        tmp_path,
        "SOLVER.BASE_LR",
        1e30,
        "SOLVER.CLIP_GRADIENTS.ENABLED",
        False,
        "SOLVER.MAX_ITER",
        50,
    )
    config = finished / "lora" / "config.yaml"
    error = run("train_net", "--config-file", config, *opts, "SOLVER.WARMUP_ITERS", 0, fails=True)
    assert error.strip().splitlines()[-1].startswith("error: iteration ") and "Traceback" not in error
    assert (tmp_path / "log.txt").read_text().count("The step was not applied") == 1


@pytest.mark.parametrize(("processes", "killed"), [(1, False), (2, False), (2, True)])
def test_ctrl_c_saves_and_leaves(
    finished: Path, run: Callable[..., str], tmp_path: Path, processes: int, killed: bool
) -> None:
    """Which a terminal sends to the training, to those that it started, and to their workers. So do the processes of
    a launcher that was killed.
    """
    config = ("--config-file", finished / "lora" / "config.yaml")
    opts = f"OUTPUT_DIR {tmp_path} DATASETS.TEST () DATALOADER.NUM_WORKERS 1 SOLVER.CHECKPOINT_PERIOD 1000000".split()
    command = [sys.executable, ROOT / "tools" / "train_net.py", *config, "--num-processes", processes, *opts]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "console.txt").open("w") as console:
        training = subprocess.Popen(
            [str(c) for c in (*command, "SOLVER.MAX_ITER", 100_000)],
            env=environment, stdout=console, stderr=console, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # these tests may run in the background
        )  # fmt: skip
        figures = tmp_path / "metrics.json"  # has its first line when all processes are well within the training
        while not (figures.is_file() and figures.stat().st_size) and training.poll() is None:
            time.sleep(0.02)
        (os.kill if killed else os.killpg)(training.pid, signal.SIGKILL if killed else signal.SIGINT)
        try:
            status = training.wait(timeout=60)
            deadline = time.monotonic() + 60
            with contextlib.suppress(ProcessLookupError):  # until nobody of the group is left
                while time.monotonic() < deadline:
                    os.killpg(training.pid, 0)
                    time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(training.pid, signal.SIGKILL)
    said = (tmp_path / "console.txt").read_text()
    assert status == (-signal.SIGKILL if killed else 130) and "Traceback" not in said, said[-3000:]
    assert said.count("a second one leaves at once") == (not killed) and "saved after iteration" in said
    (saved,) = tmp_path.glob("adapter_*")
    reached = int(saved.name[8:])
    console = run("train_net", *config, "--resume", *opts, "SOLVER.MAX_ITER", reached + 3)
    assert f"Starting training from iteration {reached + 1}" in console


@pytest.mark.parametrize("limit", ["NOFILE", "AS"])
def test_a_limit_of_the_system_is_one_line_and_resumable(finished: Path, tmp_path: Path, limit: str) -> None:
    """Met while the training and its workers run."""
    resource = pytest.importorskip("resource")
    config = ("--config-file", finished / "lora" / "config.yaml", "OUTPUT_DIR", tmp_path, "DATASETS.TEST", "()")
    opts = ("SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", 2)
    command = [sys.executable, ROOT / "tools" / "train_net.py", *config, *opts, "SOLVER.CHECKPOINTS_TO_KEEP", 2]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "console.txt").open("w") as console:
        training = subprocess.Popen([str(c) for c in command], env=environment, stdout=console, stderr=console)
        while not (tmp_path / "last_checkpoint").is_file() and training.poll() is None:
            time.sleep(0.02)
        now = int(Path(f"/proc/{training.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        few = {"NOFILE": 8, "AS": now}[limit]
        children = Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split()
        for process_id in (training.pid, *map(int, children)):
            resource.prlimit(process_id, getattr(resource, f"RLIMIT_{limit}"), (few, few))
        try:
            status = training.wait(timeout=120)
        except subprocess.TimeoutExpired:
            training.kill()
            pytest.skip("the limit was not met")
    text = (tmp_path / "console.txt").read_text()
    errors = re.findall("^error: .*", text, re.MULTILINE)
    assert status == 1 and len(errors) == 1 and text.strip().splitlines()[-1] == errors[0], text[-3000:]
    assert "train_net.py" not in text and "Exception in thread" not in text, text[-3000:]  # workers' exits are Python's
    newest = max(int(path.name[8:]) for path in tmp_path.glob("adapter_*") if path.name[8:].isdigit())
    again = process(
        "train_net", config[0], config[1], "--resume", *config[2:], *opts[4:], "SOLVER.MAX_ITER", newest + 3
    )
    assert f"Starting training from iteration {newest + 1}" in again


def test_inspect_targets(run: Callable[..., str], finished: Path) -> None:
    report = run("inspect_targets", "--config-file", finished / "lora" / "config.yaml")
    figures = json.loads((finished / "lora" / "peft_report.json").read_text())
    assert f"{figures['total']:,}" in report and f"{figures['percent']:.2f}" in report
    matches = run("inspect_targets", "--config-file", TINY, "--pattern", "self_attn.value_proj")
    assert "matches 1 places" in matches and "Linear(in_features=32, out_features=32, bias=True)" in matches
    assert "4 x MultiheadAttention" in run("inspect_targets", "--config-file", TINY)
    assert "qkv" in run("inspect_targets", "--config-file", TINY, "--pattern", "qvk", fails=True)


BAD = {
    "key": (["SOLVER.MAX_ITRE", "3"], "'SOLVER.MAX_ITRE' does not exist; the nearest one is 'SOLVER.MAX_ITER'"),
    "pattern": (["MODEL.PEFT.METHODS", "[{'NAME': 'lora', 'TARGETS': ['qvk']}]"], "'qvk' matches no .*qkv"),
    "json": (["--train-json", "nowhere.json"], "nowhere.json' is no file"),
    "images": (["--train-images", "nowhere"], "nowhere' is no folder"),
    "half": (["--val-json", "a.json"], "--val-json and --val-images belong together"),
    "weights": (["MODEL.WEIGHTS", "nowhere.pth"], "'nowhere.pth' do not exist"),
    "adapter": (["MODEL.PEFT.WEIGHTS", "nowhere"], "nowhere"),
    "classes": (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"], "NUM_CLASSES is 5 but the json .* lists 3 categories"),
    "order": (["SOLVER.MAX_ITER", "3", "--resume"], "--resume comes after"),
    "gpus": (["--num-gpus", "99"], "--num-gpus 99, but torch sees"),
    "device": (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'; expected 'cpu'"),
    "test set": (["DATASETS.TEST", "('nope',)"], "DATASETS.TEST: data set 'nope' is not registered"),
    "model": (["MODEL.META_ARCHITECTURE", "MaskFromer"], ": 'MaskFromer' is not registered .*MaskFormer"),
    "size": (["MODEL.SWIN.WINDOW_SIZE", "0"], "MODEL.SWIN.WINDOW_SIZE is 0; it should be a number of at least 1"),
    "mapper": (["INPUT.DATASET_MAPPER_NAME", "nope"], "DATASET_MAPPER_NAME 'nope' is not known"),
    "batch": (["SOLVER.IMS_PER_BATCH", "0"], "IMS_PER_BATCH 0 cannot be dealt out"),
    "steps": (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER is 0"),
    "rate": (["SOLVER.BASE_LR", "-1"], "SOLVER.BASE_LR is -1.0"),
    "nothing": (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
    "folder": (["OUTPUT_DIR", str(TINY)], "OUTPUT_DIR .*tiny.yaml' cannot be made"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run: Callable[..., str], data: toy.ToySet, tmp_path: Path, name: str) -> None:
    extra, message = BAD[name]
    flags = [] if not extra[0].startswith("--") else extra
    pairs = [] if flags else extra
    own = {"--train-json": data.json, "--train-images": data.images}
    own.update(zip(flags[::2], flags[1::2], strict=True))
    arguments = [item for pair in own.items() for item in pair]
    if name == "nothing":
        arguments = []
    if name == "classes":
        pairs = [*pairs, "DATASETS.REGISTER", "[]"]
        sets = [{"NAME": "toys", "JSON": str(data.json), "IMAGES": str(data.images)}]
        arguments, pairs[-1] = [], str(sets)
        pairs += ["DATASETS.TRAIN", "('toys',)", "DATASETS.TEST", "()"]
    error = run("train_net", "--config-file", TINY, *arguments, "OUTPUT_DIR", tmp_path, *pairs, fails=True)
    assert "Traceback" not in error
    assert re.search(f"^error: .*{message}", error, re.MULTILINE), error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("what", "message"), [("annotations", "no image with annotations"), ("masks", "boxes alone")])
def test_nothing_to_learn_from(
    run: Callable[..., str], data: toy.ToySet, tmp_path: Path, what: str, message: str, workers: int
) -> None:
    content = json.loads(data.json.read_text())
    if what == "annotations":
        content["annotations"] = []
    for annotation in content["annotations"]:
        annotation.pop("segmentation")
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(content))
    own = ("--train-json", path, "--train-images", data.images, "--name", f"no_{what}_{workers}")
    opts = ("OUTPUT_DIR", tmp_path / "out", "DATALOADER.NUM_WORKERS", workers)
    error = run("train_net", "--config-file", TINY, *own, *opts, fails=True)
    assert re.search(rf"^ *error: .*{message}", error, re.MULTILINE) and "Traceback" not in error, error


@pytest.mark.parametrize("defect", ["nan", "odd", "category"])
def test_bad_annotations_are_refused(run: Callable[..., str], data: toy.ToySet, tmp_path: Path, defect: str) -> None:
    content = json.loads(data.json.read_text())
    annotation = content["annotations"][1]
    if defect == "nan":
        annotation["segmentation"][0][0] = float("nan")
    elif defect == "odd":
        annotation["segmentation"][0] = annotation["segmentation"][0][:5]
    else:
        annotation["category_id"] = 99
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    own = ("--train-json", path, "--train-images", data.images, "--name", defect)
    error = run("train_net", "--config-file", TINY, *own, "OUTPUT_DIR", tmp_path / "out", fails=True)
    assert re.search(rf"^error: data set .{defect}_train. .*bad.json.* has 1 error", error, re.MULTILINE), error
    assert f"id {annotation['id']}" in error and "Traceback" not in error


def test_a_frozen_vit_is_adapted_and_merged(run: Callable[..., str], data: toy.ToySet, tmp_path: Path) -> None:
    """EoMT by its own configs: trained, evaluated from the adapter's folder, and from the merged file."""
    pytest.importorskip("timm")
    from merge_adapter import merge_adapter, merge_parser

    files = [
        item for split in ("train", "val") for item in (f"--{split}-json", data.json, f"--{split}-images", data.images)
    ]
    tiny = {
        **{key: value for key, value in SMALL_EOMT.items() if "NUM_CLASSES" not in key},
        **{"SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 2, "SOLVER.AMP.ENABLED": False, "DATALOADER.NUM_WORKERS": 0},
        **{"INPUT.IMAGE_SIZE": 64, "INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 64, "SEED": 1},
        "SOLVER.WARMUP_ITERS": 0,
    }
    opts = [part for item in tiny.items() for part in item]
    config = ("--config-file", ROOT / "configs/eomt/coco/instance_dinov2_small_640.yaml", *files, "--name", "toys")
    run("train_net", *config, *opts, "OUTPUT_DIR", tmp_path / "base")
    base = ("MODEL.WEIGHTS", tmp_path / "base" / "model_final.pth")
    recipe = ("--peft-config", ROOT / "configs/peft/eomt/lora.yaml")
    expected = copypaste(run("train_net", *config, *recipe, *opts, *base, "OUTPUT_DIR", tmp_path / "lora"))
    adapter = ("MODEL.PEFT.WEIGHTS", tmp_path / "lora" / "adapter_final", "OUTPUT_DIR", tmp_path / "again")
    console = run("train_net", "--config-file", tmp_path / "lora/config.yaml", "--eval-only", *adapter)
    assert copypaste(console) == expected
    files = (
        "--config-file",
        tmp_path / "base/config.yaml",
        "--adapter",
        adapter[1],
        "--output",
        tmp_path / "merged.pth",
    )
    merge_adapter(merge_parser().parse_args([str(part) for part in (*files, *base)]))
    weights = ("MODEL.WEIGHTS", tmp_path / "merged.pth", "OUTPUT_DIR", tmp_path / "whole")
    console = run("train_net", "--config-file", tmp_path / "base/config.yaml", "--eval-only", *weights)
    assert copypaste(console) == expected
