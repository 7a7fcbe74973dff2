"""The experiment: partial cross entropy, the same with the Gated CRF loss, and dense labels, over kinds and seeds.

    python -m bench.weak_supervision.experiment --acdc ACDC --msrc MSRC_v2 [--quick]
    python -m bench.weak_supervision.experiment --acdc ACDC --sweep weight

Every training is a row of `acdc.csv` or `msrc.csv` in the folder --out. Killed and started again, the command skips the
rows that are there and goes on from the checkpoint of the training that was cut. The table is scored on the test list;
sweeps, which choose settings, on training patients or images held apart. Any setting of
`python -m bench.weak_supervision` can be given for all trainings alike.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import gcrf_triton

from ..run import processor
from .data import open_collection, open_data
from .report import draw_curves, draw_panel, draw_sweep, print_table
from .settings import GATES, Settings, add_options, preset
from .train import Result, train

LABELS = {"acdc": ("scribbles",), "msrc": ("clicks", "scribbles")}
QUICK = {"acdc": {"steps": 200, "evaluations": 1}, "msrc": {"steps": 120, "evaluations": 1}}
MASS = {"acdc": 70.0, "msrc": 35.0}  # of the presets' kernels: a weight times this is the one of --normalise mass
SWEEPS: dict[str, list[dict[str, object]]] = {
    "weight": [{"weight": factor} for factor in (0.1, 0.3, 1, 3, 10)],  # times the preset's
    "radius": [{"radius": radius} for radius in (2, 3, 5, 8)],
    "sigma": [{"sigma": sigma} for sigma in (0.03, 0.06, 0.1, 0.2)],
    "kernels": [{"kernels": kernels} for kernels in ("rgb+xy", "xy", "rgb", "rgb+xy,xy")],
    "resolution": [{"loss_stride": stride} for stride in ("full", "2", "4", "8")],
    "gates": [{"gates": gates} for gates in GATES],
    "delay": [{"delay": delay} for delay in (0.0, 0.05, 0.2, 0.5)],
    "labels": [{"keep": keep} for keep in (0.25, 0.5, 1.0)],
}
CHANGES_MASS = ("radius", "sigma", "resolution")  # swept with and without normalisation
NOT_RECORDED = ("root", "labels_from")  # places on one machine
CALLS = ("data", "root", "labels", "loss", "seed", "evaluate_on")  # settings that the experiment decides


@dataclass(frozen=True)
class Plan:
    """One training of the experiment."""

    name: str
    sweep: str
    settings: Settings


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing; print tables and draw curves, panels and sweeps."""
    options, changes = parse_arguments(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for data in ("acdc", "msrc"):
            if root := getattr(options, data):
                run_all(data, plans(data, root, options, changes), options)
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
    parser.add_argument("--out", type=Path, default=Path("weak-supervision-output"), help="folder (%(default)s)")
    parser.add_argument("--seeds", type=int, default=None, help="how many (3, of sweeps and --quick 1)")
    parser.add_argument("--quick", action="store_true", help="the table with too few steps, in minutes")
    parser.add_argument("--sweep", choices=SWEEPS, help="one setting instead of the table")
    parser.add_argument("--report", action="store_true", help="train nothing; tables and pictures of what is there")
    parser.add_argument("--on-broken", choices=("stop", "skip"), default="stop", help="at unusable files (%(default)s)")
    free = [entry.name for entry in dataclasses.fields(Settings) if entry.name not in CALLS]
    add_options(parser, free)
    options = parser.parse_args(arguments)
    if not options.acdc and not options.msrc:
        parser.error("expected --acdc, --msrc or both")
    if options.seeds is None:
        options.seeds = 1 if options.quick or options.sweep else 3
    return options, {name: value for name, value in vars(options).items() if name in free}


def plans(data: str, root: str, options: argparse.Namespace, changes: dict[str, object]) -> list[Plan]:
    """Every training of the table, or of a sweep, seed by seed."""
    changes = (QUICK[data] if options.quick else {}) | changes
    found = []
    for seed in range(options.seeds):
        common = {"root": root, "seed": seed} | changes
        if options.sweep:
            found += sweep_plans(data, options.sweep, common)
            continue
        weak = LABELS[data][:1] if options.quick else LABELS[data]
        for labels in weak:
            for loss in ("pce", "gcrf"):
                settings = preset(data, **common, labels=labels, loss=loss)
                found.append(Plan(f"{data}-{labels}-{loss}-{seed}", "", settings))
            if labels == weak[0]:
                settings = preset(data, **common, labels="dense", loss="pce")
                found.append(Plan(f"{data}-dense-pce-{seed}", "", settings))
    return found


def sweep_plans(data: str, sweep: str, common: dict[str, object]) -> list[Plan]:
    """One seed of a sweep, scored on what is held apart."""
    base = preset(data, **common, loss="gcrf", evaluate_on="held-out")
    found = []
    for change in SWEEPS[sweep]:
        ((name, value),) = change.items()
        if name == "weight":
            value = round(value * base.weight, 6)
        settings = dataclasses.replace(base, **{name: value})
        label = f"{data}-{base.labels}-{name}={value}"
        found.append(Plan(f"{label}-{base.seed}", sweep, settings))
        if sweep in CHANGES_MASS:
            settings = dataclasses.replace(settings, normalise="mass", weight=base.weight * MASS[data])
            found.append(Plan(f"{label}-mass-{base.seed}", sweep, settings))
        if sweep == "labels":
            found.append(Plan(f"{label}-pce-{base.seed}", sweep, dataclasses.replace(settings, loss="pce")))
    return found


def run_all(data: str, wanted: list[Plan], options: argparse.Namespace) -> None:
    """Train what has no row yet, one after the other."""
    table = options.out / f"{data}.csv"
    for plan in wanted:
        rows = {row["run"]: row for row in read_rows(table)}
        if plan.name in rows:
            refuse_changes(plan, rows[plan.name], table)
            continue
        if options.report:
            continue
        folder = options.out / plan.name
        folder.mkdir(parents=True, exist_ok=True)
        data_read = open_data(plan.settings, options.out / "labels", options.on_broken)
        result = train(plan.settings, data_read, folder)
        if result is None:  # another process than the first
            continue
        (folder / "curve.json").write_text(json.dumps(result.curve))
        append_row(table, row_of(plan, result))
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        tqdm.write(f"{plan.name}: " + ", ".join(f"{name} {result.scores[name]:.3f}" for name in ("dice", "miou")))
    report(data, wanted, read_rows(table), options)


def report(data: str, wanted: list[Plan], rows: list[dict[str, str]], options: argparse.Namespace) -> None:
    """The table with curves and panel, or the plot of a sweep, of the trainings that are done."""
    done = {row["run"]: row for row in rows}
    rows = [done[plan.name] for plan in wanted if plan.name in done]
    if not rows:
        return
    metric = "dice" if data == "acdc" else "miou"
    if options.sweep:
        draw_sweep(rows, options.sweep, metric, options.out / f"{data}-{options.sweep}.png")
        return
    print_table(rows, metric)
    draw_curves(rows, metric, options.out, options.out / f"{data}-curves.png")
    draw_panel(open_collection(wanted[0].settings), rows, options.out, options.out / f"{data}-panel.png")


def row_of(plan: Plan, result: Result) -> dict[str, object]:
    """Scores, costs, every setting and what it ran with."""
    settings = {name: value for name, value in asdict(plan.settings).items() if name not in NOT_RECORDED}
    scores = {name: value for name, value in result.scores.items() if name not in ("step", "pce", "gcrf")}
    return (
        {"run": plan.name, "sweep": plan.sweep}
        | scores
        | {
            "seconds_per_step": round(result.seconds_per_step, 4),
            "loss_share": round(result.loss_share, 4),
            "kernel_mass": round(result.kernel_mass, 2),
        }
        | settings
        | {
            "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gcrf_triton": gcrf_triton.__version__,
            "revision": revision(),
        }
    )


def refuse_changes(plan: Plan, row: dict[str, str], table: Path) -> None:
    """Raise ValueError unless a row has the settings that are asked for."""
    for name, value in asdict(plan.settings).items():
        if name not in NOT_RECORDED and row[name] != str(value):
            raise ValueError(
                f"{table}: expected {plan.name} with {name}={value}, got {row[name]}; choose another --out"
            )


def revision() -> str:
    """The commit of this code, with a + where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return ended.stdout.strip() or "unknown"


def read_rows(table: Path) -> list[dict[str, str]]:
    """What is done already."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(table: Path, row: dict[str, object]) -> None:
    """One more line."""
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
