"""The CSV of measurements: what a row holds, reading, appending, and comparing new rows with old ones."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str]

PROBLEM = ("case", "sweep", "shape", "radius", "kernels", "dtype", "channels", "gates", "input", "mode")
SURROUNDINGS = ("device", "threads", "contended", "warm", "cuda_graph", "huge_pages")
FIELDS = (
    *PROBLEM,
    "implementation",
    "status",
    *("seconds_median", "seconds_p20", "seconds_p80", "turns"),
    *("ratio_median", "ratio_p20", "ratio_p80"),  # to the engine that impl="auto" stands for, turn by turn
    "peak_bytes",
    *("loss_error", "gradient_error"),
    "config",
    *SURROUNDINGS,
    *("driver", "torch", "triton", "gcrf_triton", "pymic", "revision", "utc"),
)
MEASURED = ("ok", "one step")


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV of measurements; ValueError in one line for a file that is none."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != FIELDS:
                raise ValueError(f"{path}: expected the columns of bench.run, got {_first(reader.fieldnames)}")
            rows = list(reader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV file: {error}") from None
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}: expected {len(FIELDS)} values in line {number}, got another number")
    return rows


def _first(names: Sequence[str] | None) -> str:
    return ", ".join(list(names or ["none"])[:3])


def check_writable(path: Path) -> None:
    """ValueError in one line unless rows can be appended to a file, which is left as it is."""
    if path.exists() and path.stat().st_size:
        read(path)
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
    if new:
        path.unlink()


def append(rows: Sequence[Mapping], path: Path) -> None:
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def latest(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    """The last row of every implementation, problem and surroundings."""
    return {_key(row): row for row in rows}


def _key(row: Row, implementation: str | None = None) -> tuple[str, ...]:
    name = implementation or row["implementation"]
    return (name, *(str(row[field]) for field in (*PROBLEM, *SURROUNDINGS)))


def compare(new: Sequence[Row], old: Sequence[Row]) -> list[tuple[Row, str, float]]:
    """How much worse the engines of this package became: (new row, what was compared, factor above 1 if worse).

    Time is that relative to the unfold's of the same turns where both runs have it, since clocks and neighbours of a
    machine slow both down; else seconds. An engine that no longer finishes is infinitely worse.
    """
    new_rows, old_rows = latest(new), latest(old)
    changes = []
    for key, row in new_rows.items():
        before = old_rows.get(key)
        if not row["implementation"].endswith("-engine") or before is None or before["status"] not in MEASURED:
            continue
        if row["status"] not in MEASURED:
            changes.append((row, f"status {row['status']}", float("inf")))
            continue
        unfolds = [rows.get(_key(row, "unfold")) for rows in (new_rows, old_rows)]
        if all(unfold and unfold["ratio_median"] for unfold in unfolds) and row["ratio_median"]:
            after, then = (
                float(own["ratio_median"]) / float(unfold["ratio_median"])
                for own, unfold in zip((row, before), unfolds, strict=True)
            )
            changes.append((row, "time relative to the unfold", after / then))
        else:
            changes.append((row, "seconds", float(row["seconds_median"]) / float(before["seconds_median"])))
        if row["peak_bytes"] and before["peak_bytes"]:
            changes.append((row, "peak memory", float(row["peak_bytes"]) / max(float(before["peak_bytes"]), 1.0)))
    return changes
