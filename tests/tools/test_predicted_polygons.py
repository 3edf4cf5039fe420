"""What ``peft-d2 predict`` writes for other programs, read back: by pycocotools, shapely, our reader of labelme."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="needs Detectron2")

import demo  # noqa: E402
import torch  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402

from peft_d2.data.formats import read_folder  # noqa: E402
from peft_d2.data.segmentation import segmentation_to_mask  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402

HEIGHT, WIDTH = 30, 40


def _masks() -> torch.Tensor:
    """A ring, two parts, and noise with parts, holes and corners that touch."""
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 3:20, 4:30] = True
    masks[0, 8:12, 10:20] = False
    masks[1, 1:5, 1:5] = masks[1, 10:20, 30:38] = True
    masks[2, 10:25, 5:35] = torch.rand(15, 30) < 0.7
    return masks


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the files for a model that finds these masks, of which the last one's score is too low."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "photos" / "a.jpg")
    masks = torch.cat([_masks(), torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool)])
    instances = Instances((HEIGHT, WIDTH), pred_masks=masks, scores=torch.tensor([0.9, 0.8, 0.7, 0.1]))
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 9, 9]]).repeat(4, 1))
    instances.pred_classes = torch.tensor([0, 1, 1, 0])
    ids = {7: 0, 3: 1}
    metadata = SimpleNamespace(get=lambda key, default: ids if "id" in key else ["cat", "dog"])
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)

    class Predictor:
        prompted = False

        def __init__(self, cfg: object, adapters: object) -> None:
            self.metadata = metadata

        def __call__(self, path: Path, boxes: object) -> tuple[np.ndarray, dict]:
            return image, {"instances": instances}

    monkeypatch.setattr(demo, "Predictor", Predictor)
    monkeypatch.setattr(demo, "prepare_config", lambda args, **_: None)
    monkeypatch.setattr(demo, "draw", lambda *args: 3)

    def write(*arguments: str) -> Path:
        common = ["--config-file", "x", "--input", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
        demo.picture(demo.demo_parser().parse_args([*common, *arguments]))
        return tmp_path / "out"

    return write


def test_labelme_gives_the_masks_back(written, tmp_path: Path) -> None:
    file = written("--polygons", "labelme") / "a.json"
    assert (tmp_path / "out" / json.loads(file.read_text())["imagePath"]).resolve() == tmp_path / "photos" / "a.jpg"
    file.rename(tmp_path / "photos" / "a.json")  # as an annotator would keep it
    said, data, _ = read_folder(tmp_path / "photos")
    assert said == "labelme: 1 images, 3 objects, 2 class(es): cat, dog"
    found = [segmentation_to_mask(thing["segmentation"], HEIGHT, WIDTH) for thing in data["annotations"]]
    assert np.array_equal(found, _with_the_same_seed())


def test_annotations_beside_the_photos_are_not_overwritten(written, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a.json").write_text("by hand")
    with pytest.raises(ConfigError, match="a.json is there already"):
        written("--polygons", "labelme", "--output", str(tmp_path / "photos"))
    assert (tmp_path / "photos" / "a.json").read_text() == "by hand"


@pytest.mark.parametrize("option", ["--json", "--results"])
def test_predictions_are_written_over_earlier_ones_alone(written, tmp_path: Path, option: str) -> None:
    file = tmp_path / "train.json"
    truth = '{"images": [], "annotations": [{"id": 1, "bbox": [0, 0, 2, 2]}], "categories": []}'
    for content in (truth, "[1, 2]", "a note"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="train.json holds something else than predictions"):
            written(option, str(file))
        assert file.read_text() == content
    for _ in range(2):
        written(option, str(tmp_path / "found.json"))


def _with_the_same_seed() -> np.ndarray:
    torch.manual_seed(0)
    return _masks().numpy()


def test_geojson_covers_the_masks(written) -> None:
    shapely = pytest.importorskip("shapely")
    geometry = pytest.importorskip("shapely.geometry")
    features = json.loads((written("--polygons", "geojson") / "a.geojson").read_text())["features"]
    assert [f["properties"]["classification"]["name"] for f in features] == ["cat", "dog", "dog"]
    assert [round(f["properties"]["score"], 3) for f in features] == [0.9, 0.8, 0.7]
    xs, ys = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    for feature, mask in zip(features[:2], _with_the_same_seed()[:2], strict=True):
        shape = geometry.shape(feature["geometry"])
        assert shape.is_valid and shape.area == mask.sum()
        assert np.array_equal(shapely.contains_xy(shape, xs, ys), mask)
    noise = [shapely.Polygon(outer, holes).area for outer, *holes in features[2]["geometry"]["coordinates"]]
    assert sum(noise) == _with_the_same_seed()[2].sum()


def test_simplified_polygons_stay_near(written) -> None:
    exact = json.loads((written("--polygons", "geojson") / "a.geojson").read_text())["features"]
    near = json.loads((written("--polygons", "geojson", "--simplify", "2") / "a.geojson").read_text())["features"]
    count = [
        sum(len(ring) for f in features for p in f["geometry"]["coordinates"] for ring in p)
        for features in (exact[2:], near[2:])
    ]
    assert count[1] < 0.7 * count[0]
    assert near[1]["geometry"] == exact[1]["geometry"]  # corners of rectangles are none of these points


def test_results_as_coco_reads_them(written, tmp_path: Path) -> None:
    out = written("--json", str(tmp_path / "set.json"), "--results", str(tmp_path / "results.json"))
    assert not list(out.glob("*.json"))
    found = COCO(str(tmp_path / "set.json")).loadRes(str(tmp_path / "results.json"))
    assert [a["category_id"] for a in found.loadAnns(found.getAnnIds())] == [7, 3, 3]
    masks = [found.annToMask(a).astype(bool) for a in found.loadAnns(found.getAnnIds())]
    assert np.array_equal(masks, _with_the_same_seed())
