"""What the experiment shows: tables, learning curves, sweeps and panels of predictions."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imgviz
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .collection import Collection, Slices, stem
from .data import seeded
from .labels import UNLABELLED, draw, make_clicks, make_scribbles

DENSE = "dense CE"
METHODS = {"pce": "partial CE", "gcrf": "partial CE + Gated CRF"}
SWEPT = {METHODS["pce"]: ("C1", "s", "--"), METHODS["gcrf"]: ("C0", "o", "-"), DENSE: ("k", "^", ":")}  # in sweeps
Row = dict[str, str]


def supervision(row: Row) -> str:
    """What a row is called among those of one kind of labels."""
    return DENSE if row["labels"] == "dense" else METHODS[row["loss"]]


def method(row: Row) -> str:
    """What a row is called in tables and pictures."""
    name = supervision(row)
    return name if name == DENSE else f"{row['labels']}: {name}"


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of the same method, dense supervision last."""
    names = sorted(dict.fromkeys(map(method, rows)), key=lambda name: name == DENSE)
    return {name: [row for row in rows if method(row) == name] for name in names}


def scores_of(rows: Sequence[Row], metric: str) -> list[float]:
    """In per cent."""
    return [100 * float(row[metric]) for row in rows]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table_of(rows: Sequence[Row], metric: str) -> str:
    """Markdown, one line a method: means and standard deviations over seeds."""
    methods = by_method(rows)
    title = f"{rows[0]['data']}, {int(rows[0]['steps']):,} steps, on {rows[0]['evaluate_on']}"
    name_of_metric = {"dice": "Dice", "miou": "mIoU"}[metric]
    scored = {metric: f"{name_of_metric}, %", "boundary_miou": "boundary mIoU, %"}
    if all(row.get("miou_classes_told") for row in rows):
        scored["miou_classes_told"] = "mIoU, classes told, %"
    columns = [title, *scored.values(), "gap closed (seeds)", "loss, share of step", "runs"]
    lines = [columns, ["---"] * len(columns)]
    for name, mine in methods.items():
        share = statistics.median(float(row["loss_share"]) for row in mine)
        scores = [spread(scores_of(mine, column)) for column in scored]
        loss = f"{share:.1%}" if mine[0]["loss"] == "gcrf" else ""
        lines.append([name, *scores, gap_closed(mine, methods, metric), loss, str(len(mine))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gap_closed(mine: Sequence[Row], methods: dict[str, list[Row]], metric: str) -> str:
    """(with the loss - without) / (dense - without), of the means over the seeds that all three have, and of each."""
    if mine[0]["loss"] != "gcrf":
        return ""
    without = methods.get(f"{mine[0]['labels']}: {METHODS['pce']}", [])
    trio = [{row["seed"]: float(row[metric]) for row in group} for group in (without, mine, methods.get(DENSE, []))]
    seeds = sorted(set.intersection(*(set(group) for group in trio)))
    if not seeds:
        return ""
    each = [[group[seed] for group in trio] for seed in seeds]
    means = [statistics.mean(scores) for scores in zip(*each, strict=True)]
    of_means, *of_seeds = (
        f"{(middle - low) / (high - low):.0%}" if high > low else "no gap" for low, middle, high in [means, *each]
    )
    return f"{of_means} ({', '.join(of_seeds)})"


def draw_curves(rows: Sequence[Row], metric: str, folder: Path, path: Path) -> None:
    """Losses and scores over the steps, every seed a line."""
    columns = {"pce": "partial cross entropy", "gcrf": "Gated CRF loss", metric: f"{metric}, %"}
    figure = Figure((12, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(columns))
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        axis.set(xlabel="step", title=title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        for number, (name, mine) in enumerate(by_method(rows).items()):
            for row in mine:
                if column == "gcrf" and row["loss"] != column:
                    continue
                curve = json.loads((folder / row["run"] / "curve.json").read_text())
                values = [100 * point[column] if column == metric else point[column] for point in curve]
                steps = [point["step"] for point in curve]
                axis.plot(steps, values, color=f"C{number}", marker="o", ms=3, label=name if row is mine[0] else None)
    lines, names = axes[-1].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path)


def draw_sweeps(panels: dict[str, Sequence[Row]], metric: str, path: Path) -> None:
    """Scores over the values of each setting that was swept."""
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure((4 * columns, 3 * lines + 0.6), dpi=110, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axis, (setting, rows) in zip(axes, panels.items(), strict=False):
        draw_sweep(axis, rows, setting, metric)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    entries = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False)
    figure.supylabel(f"{metric} on what is held apart, %")
    figure.savefig(path)


def draw_sweep(axis: Axes, rows: Sequence[Row], column: str, metric: str) -> None:
    """Every seed a point, a line through the means of those that all values have; a band from worst to best of what has
    no such setting. Prints the means.
    """
    values = list(dict.fromkeys(row[column] for row in rows if row["loss"] == "gcrf"))
    if not values:
        return
    print()
    for name, (colour, marker, line) in SWEPT.items():
        mine = [row for row in rows if supervision(row) == name]
        if not mine:
            continue
        groups = [[row for row in mine if row[column] == value] for value in values]
        if mine[0]["loss"] == "pce" and sum(map(bool, groups)) <= 1:  # the same whatever the value
            groups = [mine] * len(values)
            scores = scores_of(mine, metric)
            axis.fill_between(range(len(values)), min(scores), max(scores), color=colour, alpha=0.12, lw=0)
        else:
            for place, group in enumerate(groups):
                axis.plot([place] * len(group), scores_of(group, metric), colour + marker, ms=4)
        shared = set.intersection(*({row["seed"] for row in group} for group in groups if group))
        kept = [scores_of([row for row in group if row["seed"] in shared], metric) for group in groups]
        means = [statistics.fmean(scores or [math.nan]) for scores in kept]
        axis.plot(range(len(values)), means, colour + line, label=name)
        print(f"{name:42}" + "".join(f"{value:>13}: {mean:4.1f}" for value, mean in zip(values, means, strict=True)))
    axis.set_xticks(range(len(values)), values)
    axis.set_xlabel(column.replace("_", " "))
    axis.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class Strength:
    """How strong the Gated CRF loss was in trainings that differ in nothing but the seed, and what it brought."""

    data: str
    kernel: str
    weight: float
    mass: float  # of the kernel: the loss where no two predictions agree
    masks: float  # the loss of the dense masks
    gain: float  # over partial cross entropy alone, as a share of the data set's best


def draw_transfer(points: Sequence[Strength], path: Path) -> None:
    """Shares of the best gain over three strengths of the loss: where curves meet, a weight transfers.

    Prints how much of a data set's variance one parabola through all its points explains on each axis.
    """
    strengths = {
        "weight": [point.weight for point in points],
        "weight x kernel mass": [point.weight * point.mass for point in points],
        "weight x loss of the dense masks": [point.weight * point.masks for point in points],
    }
    gains = [100 * point.gain for point in points]
    figure = Figure((12, 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(strengths), sharey=True)
    print()
    for axis, (title, values) in zip(panels, strengths.items(), strict=True):
        curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for point, value, share in zip(points, values, gains, strict=True):
            curves.setdefault((point.data, point.kernel), []).append((value, share))
        for (data, kernel), curve in curves.items():
            style = "o-" if data == points[0].data else "s--"
            axis.plot(*zip(*sorted(curve), strict=True), style, ms=4, label=f"{data}, {kernel}")
        axis.axhline(0, color="k", lw=1)
        axis.set(xscale="log", xlabel=title, ylim=(max(min(gains) - 5, -60), 105))
        axis.spines[["top", "right"]].set_visible(False)
        for data in dict.fromkeys(point.data for point in points):
            mine = [
                (value, gain) for point, value, gain in zip(points, values, gains, strict=True) if point.data == data
            ]
            best, _ = max(mine, key=lambda pair: pair[1])
            explained = variance_explained(*zip(*mine, strict=True))
            print(f"{data}: {title} is {best:.2g} at the best of {len(mine)}, explains {explained:.0%} of the variance")
    panels[0].set_ylabel("gain over partial CE, % of the data set's best")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    figure.savefig(path)


def variance_explained(strengths: Sequence[float], scores: Sequence[float]) -> float:
    """R squared of the least-squares parabola over the logarithm."""
    logarithms = np.log(strengths)
    if len(scores) <= 3 or len(set(strengths)) < 3 or len(set(scores)) == 1:
        return math.nan
    residuals = np.asarray(scores) - np.polyval(np.polyfit(logarithms, scores, 2), logarithms)
    return 1 - float(np.var(residuals) / np.var(scores))


def draw_panel(collection: Collection, rows: Sequence[Row], folder: Path, path: Path, with_data: bool = True) -> None:
    """A line for every method: what it makes of a few test images with the first seed.

    Below image and labels as in training, and above the truth; or alone, since few data sets may be passed on.
    """
    first = {name: mine[0]["run"] for name, mine in by_method(rows).items()}
    kept = [{file.stem for file in (folder / run / "predictions").glob("*.png")} for run in first.values()]
    names = [name for name in collection.lists["test"] if stem(name) in set.intersection(*kept)]
    if not names:
        return
    lines = len(first) + 3 * with_data
    figure = Figure((1.3 + 1.9 * len(names), 1.7 * lines), dpi=110, layout="constrained")
    axes = figure.subplots(lines, len(names), squeeze=False)
    for number, (column, name) in enumerate(zip(axes.T, names, strict=True)):
        image, truth = collection.read_image(name).expand(3, -1, -1), collection.read_mask(name)
        photo = (255 * image.permute(1, 2, 0).numpy()).astype(np.uint8)
        kind = rows[0]["labels"]
        pictures = {}
        for title, run in first.items():
            with Image.open(folder / run / "predictions" / f"{stem(name)}.png") as prediction:
                pictures[title] = paint(photo, np.array(prediction), opacity=0.65 if with_data else 1)
        if with_data:
            labels = paint(photo, weak_labels(collection, name, kind, truth), opacity=1)
            pictures = {"image": photo, kind: labels} | pictures | {"truth": paint(photo, truth, opacity=0.65)}
        for axis, (title, picture) in zip(column, pictures.items(), strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[], frame_on=False)
            if number == 0:
                label = title.replace(": ", ":\n").replace(" + ", "\n+ ")
                axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path)


def weak_labels(collection: Collection, name: str, kind: str, truth: np.ndarray) -> np.ndarray:
    """What a test image would be trained with, [H, W] uint8, drawn to be seen."""
    if isinstance(collection, Slices) and kind == "scribbles":
        return collection.read_scribbles(name, *truth.shape)
    strokes = make_clicks(truth) if kind == "clicks" else make_scribbles(truth, seeded(0, name))
    return draw(strokes, *truth.shape, thickness=7)


def paint(photo: np.ndarray, labels: np.ndarray, opacity: float) -> np.ndarray:
    """Classes in VOC's colours over a photograph, [H, W, 3] uint8; unlabelled pixels stay."""
    colours = np.where(labels == 0, 60, 0)[..., None] + imgviz.label_colormap()[labels]  # not black on black
    mixed = ((1 - opacity) * photo + opacity * colours.clip(0, 255)).astype(np.uint8)
    return np.where((labels == UNLABELLED)[..., None], photo, mixed)
