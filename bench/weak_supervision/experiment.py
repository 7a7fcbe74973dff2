"""The experiment: partial cross entropy, the same with the Gated CRF loss, and dense labels, over kinds and seeds.

    python -m bench.weak_supervision.experiment --acdc ACDC --msrc MSRC_v2 [--quick]
    python -m bench.weak_supervision.experiment --acdc ACDC --sweep weight radius sigma
    python -m bench.weak_supervision.experiment --voc VOC2012 --kinds clicks --labels-from objects.json,background.json

Every training is a row of `acdc.csv`, `msrc.csv`, ... in the folder --out. Killed and started again, the command skips
the rows that are there and goes on from the checkpoint of the training that was cut. The table is scored on the test
list; sweeps, which choose settings, on training patients or images held apart. Any setting of
`python -m bench.weak_supervision` can be given for all trainings alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path

from ..measuring.progress import write_line
from .collection import fingerprint, open_collection
from .data import open_data
from .masks import loss_of_masks
from .report import Strength, draw_curves, draw_panel, draw_sweeps, draw_transfer, table_of
from .rows import Plan, append_row, read_rows, refuse_changes, row_of
from .settings import GATES, Settings, add_options, preset
from .train import train

KINDS = {"acdc": ["scribbles"], "msrc": ["clicks", "scribbles"], "voc": ["clicks"], "folder": ["clicks"]}
QUICK = {"acdc": 200, "msrc": 120, "voc": 120, "folder": 120}  # steps
# sweeps of ACDC are at half the resolution: 3 minutes a training
SMALLER = {"acdc": {"side": 128, "crop": 112, "steps": 1200, "evaluations": 2, "amp": "bfloat16"}}
METRIC = {"acdc": "dice", "msrc": "miou", "voc": "miou", "folder": "miou"}
NATIVE = {"acdc": "full", "msrc": "4"}  # the stride of the presets' networks
SWEEPS: dict[str, tuple[str, tuple]] = {
    "weight": ("weight", (0.1, 0.3, 1, 3, 10)),  # times the usual
    "length": ("steps", (0.5, 1, 2)),  # times the usual
    "radius": ("radius", (2, 3, 5, 8)),
    "sigma": ("sigma", (0.03, 0.06, 0.1, 0.2)),
    "kernels": ("kernels", ("rgb+xy", "xy", "rgb", "rgb+xy,xy")),
    "resolution": ("loss_stride", ("full", "2", "4", "8")),
    "gates": ("gates", GATES),
    "delay": ("delay", (0.0, 0.05, 0.2, 0.5)),
    "ramp": ("ramp", (0.0, 0.2, 0.5)),
    "labels": ("keep", (0.25, 0.5, 1.0)),
    "thickness": ("thickness", (1.0, 3.0, 5.0)),
}
# does a weight mean the same under other kernels and grids? each of these with each weight
TRANSFER = "transfer"
TRANSFER_WEIGHTS = (1, 10, 0.1)  # times the usual
TRANSFER_CHANGES: tuple[dict[str, object], ...] = (
    {},
    {"sigma": 0.03},
    {"sigma": 0.3},
    {"radius": 2},
    {"radius": 10},
    {"loss_stride": "4"},
    {"loss_stride": "full"},
)
LABEL_SETTINGS = ("thickness", "keep", "label_seed")  # mean nothing to dense labels
# these mean nothing to partial cross entropy alone
LOSS_SETTINGS = ("weight", "delay", "ramp", "kernels", "sigma", "xy", "radius", "loss_stride", "gates")
DECIDED_HERE = ("data", "root", "labels", "loss", "seed", "evaluate_on")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing; print tables and draw curves, panels and sweeps."""
    options, changes = parse_arguments(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        points: list[Strength] = []
        for data in KINDS:
            root = getattr(options, data)
            if root and options.sweep:
                points += run_sweeps(data, root, options, changes)
            elif root:
                run_table(data, root, options, changes)
        if points:
            draw_transfer(points, options.out / f"{TRANSFER}.png")
        elif TRANSFER in options.sweep:
            print("no gain over partial cross entropy yet, of which to draw shares")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, object]]:
    """The command line, and the settings that it changes."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weak_supervision.experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--acdc", default="", metavar="FOLDER", help="slices of ACDC, as WSL4MIS cuts them")
    parser.add_argument("--msrc", default="", metavar="FOLDER", help="MSRC-v2 in the layout of PASCAL VOC")
    parser.add_argument("--voc", default="", metavar="FOLDER", help="PASCAL VOC 2012 with the masks of SBD")
    parser.add_argument("--folder", default="", metavar="FOLDER", help="images and palette masks of your own")
    parser.add_argument("--kinds", nargs="+", choices=("clicks", "scribbles"), help="of labels (what the data has)")
    parser.add_argument("--out", type=Path, default=Path("weak-supervision-output"), help="folder (%(default)s)")
    parser.add_argument("--seeds", type=int, default=None, help="how many (3, of sweeps and --quick 1)")
    parser.add_argument("--quick", action="store_true", help="the table with too few steps, in minutes")
    parser.add_argument(
        "--sweep", nargs="+", default=[], choices=(*SWEEPS, TRANSFER), help="settings to vary, instead of the table"
    )
    parser.add_argument("--report", action="store_true", help="train nothing; tables and pictures of what is there")
    parser.add_argument("--on-broken", choices=("stop", "skip"), default="stop", help="at unusable files (%(default)s)")
    free = [entry.name for entry in dataclasses.fields(Settings) if entry.name not in DECIDED_HERE]
    add_options(parser, free)
    options = parser.parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("expected one process; torchrun is for python -m bench.weak_supervision")
    if not any(getattr(options, data) for data in KINDS):
        parser.error("expected the folder of at least one data set")
    if options.seeds is None:
        options.seeds = 1 if options.quick or options.sweep else 3
    return options, {name: value for name, value in vars(options).items() if name in free}


def run_table(data: str, root: str, options: argparse.Namespace, changes: dict[str, object]) -> None:
    """Train what is missing of the table; print it, draw curves and a panel of predictions."""
    wanted = table_plans(data, root, options, changes)
    rows = list(run_all(data, wanted, options).values())
    if rows:
        print(f"\n{table_of(rows, METRIC[data])}\n")
        draw_curves(rows, METRIC[data], options.out, options.out / f"{data}-curves.png")
        collection = open_collection(wanted[0].settings)
        draw_panel(collection, rows, options.out, options.out / f"{data}-panel.png")
        draw_panel(collection, rows, options.out, options.out / f"{data}-predictions.png", with_data=False)


def run_sweeps(data: str, root: str, options: argparse.Namespace, changes: dict[str, object]) -> list[Strength]:
    """Train what is missing of the sweeps and draw each; how strong the loss was in the one that crosses weights."""
    panels, points = {}, []
    for sweep in options.sweep:
        wanted = sweep_plans(data, root, options, changes, sweep)
        rows = run_all(data, wanted, options)
        if sweep == TRANSFER:
            points = strengths(wanted, rows, METRIC[data])
        elif rows:
            panels[SWEEPS[sweep][0]] = list(rows.values())
    if panels:
        draw_sweeps(panels, METRIC[data], options.out / f"{data}-sweeps.png")
    return points


def table_plans(data: str, root: str, options: argparse.Namespace, changes: dict[str, object]) -> list[Plan]:
    """Every training of the table, seed by seed."""
    if options.quick:
        changes = {"steps": QUICK[data], "evaluations": 1} | changes
    kinds = options.kinds or KINDS[data]
    found = []
    for seed in range(options.seeds):
        base = preset(data, **{"root": root, "seed": seed} | changes)
        for kind in kinds[:1] if options.quick else kinds:
            found += [plan(base, labels=kind, loss=loss) for loss in ("pce", "gcrf")]
            if kind == kinds[0]:
                found.append(plan(base, labels="dense", loss="pce"))
    return found


def sweep_plans(
    data: str, root: str, options: argparse.Namespace, changes: dict[str, object], sweep: str
) -> list[Plan]:
    """Every training of a sweep, seed by seed, and what to compare with, scored on what is held apart."""
    found = []
    for seed in range(options.seeds):
        kind = (options.kinds or KINDS[data])[0]
        fixed = {"root": root, "seed": seed, "labels": kind, "evaluate_on": "held-out"}
        base = preset(data, **SMALLER.get(data, {}) | fixed | changes)
        found += [plan(base, loss="pce"), plan(base, labels="dense", loss="pce")]
        found += transfer_plans(base) if sweep == TRANSFER else values_plans(base, sweep)
    return list({training.name: training for training in found}.values())


def values_plans(base: Settings, sweep: str) -> list[Plan]:
    """One seed of one setting's values."""
    name, values = SWEEPS[sweep]
    found = []
    for value in values:
        if sweep == "weight":
            value = round(value * base.weight, 6)
        elif sweep == "length":
            value = round(value * base.steps)
        elif sweep == "resolution" and value == NATIVE.get(base.data):
            value = "native"
        found.append(plan(base, loss="gcrf", **{name: value}))
        if sweep in ("labels", "thickness", "length"):
            found.append(plan(base, loss="pce", **{name: value}))
        if sweep == "length":
            found.append(plan(base, labels="dense", loss="pce", **{name: value}))
    return found


def transfer_plans(base: Settings) -> list[Plan]:
    """One seed of the weights with every kernel and grid."""
    found = values_plans(base, "weight")
    for factor in TRANSFER_WEIGHTS:
        weight = round(factor * base.weight, 6)
        for changes in TRANSFER_CHANGES:
            if changes.get("loss_stride") != NATIVE.get(base.data):
                found.append(plan(base, loss="gcrf", weight=weight, **changes))
    return found


def plan(base: Settings, **changes: object) -> Plan:
    """A training named after what differs from the usual, so that sweeps and tables share those that are the same."""
    settings = dataclasses.replace(base, **changes)
    usual = preset(settings.data, **(SMALLER.get(settings.data, {}) if settings.evaluate_on == "held-out" else {}))
    meaningless = LOSS_SETTINGS if settings.loss == "pce" else ()
    meaningless += LABEL_SETTINGS if settings.labels == "dense" else ()
    settings = dataclasses.replace(settings, **{name: getattr(usual, name) for name in meaningless})
    parts = [settings.data, settings.labels, settings.loss]
    parts += [
        f"{name}={getattr(settings, name)}"
        for name in (*LABEL_SETTINGS, *LOSS_SETTINGS, "class_weights", "steps")
        if getattr(settings, name) != getattr(usual, name)
    ]
    if settings.evaluate_on != "test":
        parts.append(settings.evaluate_on)
    return Plan("-".join([*parts, str(settings.seed)]), settings)


def run_all(data: str, wanted: list[Plan], options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Train what has no row yet, one after the other; the rows of what is wanted and done, by name."""
    table = options.out / f"{data}.csv"
    settings = wanted[0].settings
    files = fingerprint(open_collection(settings), settings.labels_from)
    for training in wanted:
        rows = {row["run"]: row for row in read_rows(table)}
        if training.name in rows:
            refuse_changes(training, rows[training.name], files, table)
            continue
        if options.report:
            continue
        folder = options.out / training.name
        folder.mkdir(parents=True, exist_ok=True)
        data_read = open_data(training.settings, options.out / "labels", options.on_broken)
        for row in list(rows.values())[:1]:
            if wrong := {f"iou {name}" for name in data_read.collection.class_names} - set(row):
                raise ValueError(f"{table}: expected a column {min(wrong)!r}, got none; choose another --out")
        result = train(training.settings, data_read, folder)
        (folder / "curve.json").write_text(json.dumps(result.curve))
        append_row(table, row_of(training, result, files=files, left_out=data_read.left_out))
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        write_line(f"{training.name}: " + ", ".join(f"{name} {result.scores[name]:.3f}" for name in ("dice", "miou")))
    done = {row["run"]: row for row in read_rows(table)}
    return {training.name: done[training.name] for training in wanted if training.name in done}


def strengths(wanted: list[Plan], done: dict[str, dict[str, str]], metric: str) -> list[Strength]:
    """What every weight with every kernel and grid gained, if any did, means over seeds; how strong the loss was."""
    without = [float(row[metric]) for row in done.values() if row["loss"] == "pce" and row["labels"] != "dense"]
    same: dict[Settings, list[dict[str, str]]] = {}
    for training in wanted:
        if training.settings.loss == "gcrf" and training.name in done:
            same.setdefault(dataclasses.replace(training.settings, seed=0), []).append(done[training.name])
    scores = {settings: statistics.fmean(float(row[metric]) for row in rows) for settings, rows in same.items()}
    if not without or not scores or max(scores.values()) <= statistics.fmean(without):
        return []
    least, best = statistics.fmean(without), max(scores.values())
    found: list[Strength] = []
    losses: dict[tuple[object, ...], float] = {}
    for settings, rows in same.items():
        native = settings.loss_stride == "native"
        grid = dataclasses.replace(settings, loss_stride=NATIVE.get(settings.data, "full")) if native else settings
        kernel = (settings.sigma, settings.radius, grid.loss_stride)
        if kernel not in losses:
            losses[kernel] = loss_of_masks(open_collection(grid), grid).loss
        row = rows[0]
        changed = [f"{name} {row[name]}" for name in ("sigma", "radius", "loss_stride") if f"-{name}=" in row["run"]]
        found.append(
            Strength(
                data=settings.data,
                kernel=", ".join(changed).replace("_", " ") or "preset",
                weight=settings.weight,
                mass=statistics.fmean(float(row["kernel_mass"]) for row in rows),
                masks=losses[kernel],
                gain=(scores[settings] - least) / (best - least),
            )
        )
    return found


if __name__ == "__main__":
    main()
