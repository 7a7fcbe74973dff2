"""Weak labels: strokes and clicks read from, and written to, the files they come in; or made from dense masks.

A click is a stroke of one point. Scribbles are ScribbleSup's XML files, one an image: `annotation/polygon` elements
with a `tag`, the name of the class, and `point` elements with `X` and `Y`. Clicks are JSON files as of What's the Point
and of Cityscapes: image name -> list of {"x", "y", "cls"}, where `cls` is a name or a number: that of the class, and
for the classes of Cityscapes its label id.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt, label
from scipy.sparse.csgraph import dijkstra
from sklearn.feature_extraction.image import grid_to_graph

UNLABELLED = 255
SMALLEST_REGION = 16  # pixels; nobody clicks on less
ALIASES = {  # tags of ScribbleSup that are not VOC's names
    "plane": "aeroplane",
    "bike": "bicycle",
    "table": "diningtable",
    "plant": "pottedplant",
    "monitor": "tvmonitor",
}
CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of these classes
CITYSCAPES_ALL_IDS = range(-1, 34)


@dataclass(frozen=True)
class Stroke:
    """A polyline of one class, (x, y) in pixels of the image; a click has one point."""

    label: int
    points: tuple[tuple[float, float], ...]


def read_scribbles(path: Path, class_names: Sequence[str]) -> list[Stroke]:
    """The strokes of one XML file. Raises ValueError in one line, naming the file."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: expected scribbles as XML, got {reason(error)}") from error
    strokes = []
    for polygon in root.iter("polygon"):
        number = class_number(polygon.findtext("tag", "").strip(), class_names, path)
        try:
            points = tuple((float(p.findtext("X")), float(p.findtext("Y"))) for p in polygon.iter("point"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected numbers X and Y in every point, got {error}") from error
        if points:
            strokes.append(Stroke(number, points))
    if not strokes and len(root):
        raise ValueError(f"{path}: expected scribbles as polygons of points, got {root[0].tag} and no polygon")
    return strokes


def write_scribbles(path: Path, strokes: Iterable[Stroke], class_names: Sequence[str]) -> None:
    """One XML file."""
    root = ElementTree.Element("annotation")
    for stroke in strokes:
        polygon = ElementTree.SubElement(root, "polygon")
        ElementTree.SubElement(polygon, "tag").text = class_names[stroke.label]
        for x, y in stroke.points:
            point = ElementTree.SubElement(polygon, "point")
            ElementTree.SubElement(point, "X").text = f"{x:g}"
            ElementTree.SubElement(point, "Y").text = f"{y:g}"
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path)


def read_clicks(paths: Iterable[Path]) -> dict[str, list[tuple[Path, object]]]:
    """Image name -> clicks, each with its file: all JSON files together, as foreground and background come apart."""
    clicks: dict[str, list[tuple[Path, object]]] = {}
    for path in paths:
        try:
            entries = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected clicks as JSON, got {reason(error)}") from error
        if not isinstance(entries, dict) or not all(isinstance(points, list) for points in entries.values()):
            raise ValueError(f"{path}: expected image names with lists of x, y and cls, got something else")
        for name, points in entries.items():
            clicks.setdefault(name, []).extend((path, point) for point in points)
    return clicks


def click_of(point: object, class_names: Sequence[str], where: object) -> Stroke | None:
    """One entry of such a file; None where Cityscapes does not score its class."""
    if not isinstance(point, Mapping) or not {"x", "y", "cls"} <= set(point):
        raise ValueError(f"{where}: expected a click with x, y and cls, got {point!r}")
    try:
        place = float(point["x"]), float(point["y"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected numbers x and y, got {point['x']!r} and {point['y']!r}") from error
    tag = point["cls"]
    if tuple(class_names) == CITYSCAPES_CLASSES and tag in CITYSCAPES_ALL_IDS:
        return Stroke(CITYSCAPES_IDS.index(tag), (place,)) if tag in CITYSCAPES_IDS else None
    return Stroke(class_number(tag, class_names, where), (place,))


def write_clicks(path: Path, clicks: Mapping[str, Iterable[Stroke]], class_names: Sequence[str]) -> None:
    """One JSON file; a stroke's points become clicks of their own."""
    numbers = CITYSCAPES_IDS if tuple(class_names) == CITYSCAPES_CLASSES else range(len(class_names))
    entries = {
        name: [{"x": x, "y": y, "cls": numbers[stroke.label]} for stroke in strokes for x, y in stroke.points]
        for name, strokes in clicks.items()
    }
    path.write_text(json.dumps(entries))


def draw(strokes: Iterable[Stroke], height: int, width: int, thickness: float) -> np.ndarray:
    """Labels [H, W] uint8, 255 where nobody drew; clicks are discs and strokes lines of that many pixels.

    Raises:
        ValueError: for a point outside the image.
    """
    canvas = Image.new("L", (width, height), UNLABELLED)
    pen = ImageDraw.Draw(canvas)
    for stroke in strokes:
        for x, y in stroke.points:
            if not (-0.5 <= x <= width + 0.5 and -0.5 <= y <= height + 0.5):
                raise ValueError(f"expected points within {width} x {height} pixels, got x={x:g}, y={y:g}")
        points = [(min(int(x), width - 1), min(int(y), height - 1)) for x, y in stroke.points]
        if len(points) > 1:
            pen.line(points, fill=stroke.label, width=max(round(thickness), 1), joint="curve")
        elif thickness < 2:
            pen.point(points, fill=stroke.label)
        else:
            x, y = points[0]
            reach = (thickness - 1) / 2
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=stroke.label)
    return np.array(canvas)


def make_clicks(mask: np.ndarray) -> list[Stroke]:
    """One click for every connected region of a dense mask [H, W], at its innermost pixel."""
    return [Stroke(number, (innermost(depth(region)),)) for number, region in regions(mask)]


def make_scribbles(mask: np.ndarray, random: np.random.Generator) -> list[Stroke]:
    """A curve inside every connected region of a dense mask [H, W]: between far ends, keeping away from the outline."""
    return [Stroke(number, curve(depth(region), random)) for number, region in regions(mask)]


def regions(mask: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Class and pixels [H, W] bool of every connected region that is not void and not tiny."""
    found = []
    for number in np.unique(mask[mask != UNLABELLED]):
        numbered, count = label(mask == number)
        sizes = np.bincount(numbered.ravel(), minlength=count + 1)
        found += [(int(number), numbered == k) for k in range(1, count + 1) if sizes[k] >= SMALLEST_REGION]
    return found


def depth(region: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest one outside the region, or outside the image, [H, W]."""
    return distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]


def innermost(depths: np.ndarray) -> tuple[float, float]:
    y, x = np.unravel_index(depths.argmax(), depths.shape)
    return float(x), float(y)


def curve(depths: np.ndarray, random: np.random.Generator) -> tuple[tuple[float, float], ...]:
    # the cheapest way from one far end to the other, where shallow pixels are dear
    inside = depths > 0
    pixels = np.argwhere(inside)  # [P, 2], in the order of the graph's nodes
    graph = grid_to_graph(*inside.shape, mask=inside).tocoo()
    shallow = 1 / depths[inside]
    graph.data = (shallow[graph.row] + shallow[graph.col]) * (graph.row != graph.col)
    graph = graph.tocsr()
    graph.eliminate_zeros()
    deep = np.flatnonzero(depths[inside] >= np.quantile(depths[inside], 0.7))
    first = int(random.choice(deep))
    start = farthest(dijkstra(graph, indices=first), deep)
    costs, before = dijkstra(graph, indices=start, return_predecessors=True)
    way = [farthest(costs, deep)]
    while way[-1] != start:
        way.append(int(before[way[-1]]))
    return tuple((float(x), float(y)) for y, x in pixels[way])


def farthest(costs: np.ndarray, among: np.ndarray) -> int:
    reachable = np.where(np.isfinite(costs[among]), costs[among], -1)
    return int(among[reachable.argmax()])


def class_number(tag: object, class_names: Sequence[str], where: object) -> int:
    """A class by its name or its number."""
    name = ALIASES.get(tag, tag) if isinstance(tag, str) and tag not in class_names else tag
    if name in class_names:
        return list(class_names).index(name)
    number = int(tag) if isinstance(tag, str) and tag.isdigit() else tag
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(class_names):
        return number
    raise ValueError(f"{where}: expected one of the {len(class_names)} classes, got {tag!r}")


def reason(error: Exception) -> str:
    """Why a file could not be read, in one line."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
