"""The CSV of trainings, a row each: what a row holds, reading, appending, and refusing one of other settings."""

from __future__ import annotations

import csv
import datetime
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import gcrf_triton

from ..measuring.surroundings import processor, revision
from .settings import Settings
from .train import WITHOUT_EFFECT, Result

NOT_RECORDED = ("root", "labels_from")  # places on one machine


@dataclass(frozen=True)
class Plan:
    """One training of the experiment."""

    name: str
    settings: Settings


def row_of(training: Plan, result: Result, files: str, left_out: int) -> dict[str, object]:
    """Scores, costs, every setting, the fingerprint of the files, how many were left out, and what it ran with."""
    settings = {name: value for name, value in asdict(training.settings).items() if name not in NOT_RECORDED}
    scores = {name: value for name, value in result.scores.items() if name not in ("step", "pce", "gcrf")}
    return (
        {"run": training.name}
        | scores
        | {
            "seconds_per_step": round(result.seconds_per_step, 4),
            "loss_share": round(result.loss_share, 4),
            "kernel_mass": round(result.kernel_mass, 2),
        }
        | settings
        | {
            "files": files,
            "left_out": left_out,
            "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gcrf_triton": gcrf_triton.__version__,
            "revision": revision(),
        }
    )


def refuse_changes(training: Plan, row: dict[str, str], files: str, table: Path) -> None:
    """Raise ValueError unless a row has the settings and files that are asked for."""
    for name, value in (asdict(training.settings) | {"files": files}).items():
        if name not in (*NOT_RECORDED, *WITHOUT_EFFECT) and row.get(name) != str(value):
            found = row.get(name, "no such column")
            raise ValueError(
                f"{table}: expected {training.name} with {name}={value}, got {found}; choose another --out"
            )


def read_rows(table: Path) -> list[dict[str, str]]:
    """What is done already."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(table: Path, row: dict[str, object]) -> None:
    """One more line, under the columns that are there."""
    rows = read_rows(table)
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, list((rows or [row])[0]))
        if not rows:
            writer.writeheader()
        writer.writerow(row)
