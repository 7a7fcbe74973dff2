"""Which of the measured rows a picture or the table of the front page shows, and where they lie on an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.measuring import table
from bench.measuring.table import Row

QUANTITIES = ("pixels", "radius", "classes")


def shape(row: Row) -> tuple[int, ...]:
    return tuple(map(int, row["shape"].split("x")))


def position(row: Row, quantity: str) -> int:
    """Where a row lies on the axis of a quantity."""
    n, classes, height, width = shape(row)
    return {"pixels": n * height * width, "classes": classes, "radius": int(row["radius"])}[quantity]


def usual(row: Row, warm: str = "no") -> bool:
    """Forward and backward from probabilities without gates, on a machine as it is, with nothing else running."""
    usual = {"mode": "forward+backward", "gates": "no", "input": "probabilities", "contended": "no", "warm": warm}
    return all(row[name] == value for name, value in usual.items()) and row["huge_pages"] != "requested"


def sweep_rows(rows: Sequence[Row], quantity: str) -> list[Row]:
    """The latest rows of a sweep that differ in nothing else: of several such sets that of most points, then newest."""
    sets: dict[tuple, list[Row]] = {}
    for row in table.latest(rows).values():
        if row["sweep"] == quantity and usual(row):
            n, classes, height, width = shape(row)
            fixed = {"pixels": (n, classes, row["radius"]), "classes": (n, height, width, row["radius"])}
            alike = fixed.get(quantity, row["shape"])
            others = (row[field] for field in ("kernels", "dtype", "channels", *table.SURROUNDINGS))
            sets.setdefault((alike, *others), []).append(row)
    newest = max(
        sets.values(),
        key=lambda alike: (len({position(row, quantity) for row in alike}), max(row["utc"] for row in alike)),
        default=[],
    )
    return sorted(newest, key=lambda row: position(row, quantity))


def named_rows(rows: Sequence[Row], warm: str = "no") -> dict[str, dict[str, Row]]:
    """Case -> implementation -> row of the latest turns, forward and backward, of the largest shape, in float32."""
    cases: dict[str, dict[str, Row]] = {}
    chosen = [
        row
        for row in table.latest(rows).values()
        if not row["sweep"] and usual(row, warm) and row["cuda_graph"] == "no" and row["dtype"] == "float32"
    ]
    for row in sorted(chosen, key=lambda row: (math.prod(shape(row)), row["utc"])):
        case = cases.setdefault(row["case"], {})
        if any(other[name] != row[name] for other in case.values() for name in ("shape", "utc")):
            case.clear()
        case[row["implementation"]] = row
    return cases


def ran_out(row: Row) -> bool:
    return row["status"].startswith("oom")
