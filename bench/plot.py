"""`python -m bench.plot`: pictures of what was measured (bench.run) and modelled (bench.static_cost), from CSVs alone.

For every file of measurements two pictures beside it: time and memory against pixels, radius and classes, and the
ratios of the named cases. For one of modelled costs: the clocks a pixel that every unit of a multiprocessor needs.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from tqdm import tqdm

from bench.machine_code.model import FIELDS as MODELLED
from bench.measuring import table
from bench.measuring.figures import STYLES, draw_cases, draw_sweeps, draw_units
from bench.measuring.selection import named_rows, ran_out
from bench.measuring.surroundings import RESULTS
from bench.measuring.table import Row


def plot(path: Path, folder: Path) -> list[Path]:
    """Write the pictures of one CSV, of measurements or of modelled costs, into a folder; their paths."""
    if is_modelled(path):
        with path.open(newline="") as file:
            figures = {"units": draw_units(list(csv.DictReader(file)))}
    else:
        rows = table.read(path)
        figures = {"sweeps": draw_sweeps(rows), "cases": draw_cases(rows)}
    written = []
    for kind, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{path.stem}-{kind}.png")
            figure.savefig(written[-1], metadata={"Software": None})
            plt.close(figure)
    if not written:
        wanted = "of one problem" if is_modelled(path) else "of a sweep or of named cases, forward and backward"
        raise ValueError(f"{path}: expected rows {wanted}, got none")
    return written


def is_modelled(path: Path) -> bool:
    return path.is_file() and path.read_text(errors="replace").startswith(",".join(MODELLED))


def found_tables(measured: bool = False) -> list[Path]:
    """Those CSV files of bench/results that can be drawn, or that were measured; ValueError if there is none."""
    headers = tuple(",".join(fields) for fields in (table.FIELDS, MODELLED)[: 1 if measured else 2])
    found = [path for path in sorted(RESULTS.glob("*.csv")) if path.read_text(errors="replace").startswith(headers)]
    if not found:
        raise ValueError(f"tables: expected a CSV of bench.run or bench.static_cost in {RESULTS}, found none")
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table of the README: time and memory of the named cases, and how many times those the official code takes."""
    lines = [
        "| case | prediction | time | official | times as long | warm, times as long | offsets, times as long | memory "
        "| official, times |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    warm = named_rows(rows, warm="yes")
    missing = dict.fromkeys(table.FIELDS, "")
    for case, found in named_rows(rows).items():
        own = next((found[name] for name in STYLES if name.endswith("-engine") and name in found), None)
        if own is None or own["status"] not in table.MEASURED:
            continue
        official, offsets = (found.get(name, missing) for name in ("official", "offsets"))
        memory = [row["peak_bytes"] for row in (own, official)]
        columns = [
            case,
            own["shape"].replace("x", " x "),
            milliseconds(own),
            "does not fit" if ran_out(official) else milliseconds(official),
            speed_up(official),
            speed_up(warm.get(case, {}).get("official", missing)),
            speed_up(offsets),
            f"{int(memory[0]) / 1e6:.3g} MB" if memory[0] else "",
            f"{int(memory[1]) / int(memory[0]):.0f}" if all(memory) else "",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def milliseconds(row: Row) -> str:
    if not row["seconds_median"]:
        return ""
    value = 1e3 * float(row["seconds_median"])
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def speed_up(row: Row) -> str:
    if not row["ratio_median"]:
        return ""
    middle, low, high = (f"{float(row[f'ratio_{point}']):.3g}" for point in ("median", "p20", "p80"))
    return middle if row["turns"] == "1" else f"{middle} ({low}-{high})"


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=str(__doc__).split("\n")[0])
    parser.add_argument("tables", nargs="*", type=Path, help="CSV files; default: all of bench/results")
    parser.add_argument("--markdown", action="store_true", help="print the named cases as a table, and draw nothing")
    parser.add_argument("--out", type=Path, help="folder for the pictures; default: that of each file")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    matplotlib.use("Agg")
    parser, options = parse(arguments)
    try:
        if options.markdown:
            print("\n".join(markdown(table.read(path)) for path in options.tables or found_tables(measured=True)))
            return 0
        for path in tqdm(options.tables or found_tables(), disable=None):
            for picture in plot(path, options.out or path.parent):
                tqdm.write(str(picture))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --out: cannot write {error.filename}: {error.strerror}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
