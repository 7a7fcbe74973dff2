"""Pictures of what was measured and of what was modelled, from the rows of their CSVs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from bench.measuring import table
from bench.measuring.selection import QUANTITIES, named_rows, position, ran_out, shape, sweep_rows
from bench.measuring.table import Row

# colours of Okabe and Ito; markers and dashes tell them apart in grey
STYLES = {
    "triton-engine": ("gcrf_triton, Triton engine", {"color": "#D55E00", "marker": "s", "linestyle": "-"}),
    "torch-engine": ("gcrf_triton, PyTorch engine", {"color": "#0072B2", "marker": "o", "linestyle": "-"}),
    "flex": ("FlexAttention", {"color": "#56B4E9", "marker": "X", "linestyle": (0, (4, 1, 1, 1))}),
    "unfold-compiled": ("unfold, torch.compile", {"color": "#CC79A7", "marker": "v", "linestyle": (0, (1, 1.5))}),
    "offsets-compiled": ("offsets, torch.compile", {"color": "#9A8A00", "marker": "<", "linestyle": (0, (1, 1))}),
    "offsets": ("loop over offsets", {"color": "#009E73", "marker": "^", "linestyle": "--"}),
    "unfold": ("unfold", {"color": "#E69F00", "marker": "D", "linestyle": "-."}),
    "official": ("official (PyMIC's copy)", {"color": "#000000", "marker": "P", "linestyle": (0, (6, 2))}),
}
FLOOR = {"color": "0.45", "linestyle": ":", "linewidth": 2}
CROSS = {"color": "0.3", "marker": "x", "markersize": 9, "markeredgewidth": 2.5, "linestyle": ""}
HOLLOW = {"markerfacecolor": "white", "linestyle": ""}
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
UNITS = {
    "issue": ("instructions issued", {"color": "#000000", "marker": "|", "markersize": 14}),
    "memory": ("loads, stores, shared memory", {"color": "#0072B2", "marker": "o"}),
    "special": ("powers of two", {"color": "#D55E00", "marker": "s"}),
    "tensor": ("tensor cores", {"color": "#009E73", "marker": "^"}),
    "fma": ("multiply-adds", {"color": "#CC79A7", "marker": "v"}),
    "alu": ("integers and comparisons", {"color": "#E69F00", "marker": "D"}),
    "dram": ("memory of the device", {"color": "#56B4E9", "marker": "P"}),
}
plt.style.use("default")
matplotlib.rcParams.update({"font.size": 12, "figure.dpi": 120, "svg.hashsalt": "gcrf_triton"})


def draw_sweep(axes: Axes, rows: Sequence[Row], quantity: str, column: str, scale: float) -> None:
    """Curves of one column ("seconds" or "peak_bytes") with bands, and the floor."""
    for name, (_, style) in STYLES.items():
        mine = [row for row in rows if row["implementation"] == name]
        median = f"{column}_median" if column == "seconds" else column
        measured = [row for row in mine if row["status"] in table.MEASURED and float(row[median] or 0) > 0]
        x = [position(row, quantity) for row in measured]
        axes.plot(x, [scale * float(row[median]) for row in measured], markersize=6, linewidth=1.8, **style)
        if column == "seconds":
            low, high = ([scale * float(row[f"{column}_{point}"]) for row in measured] for point in ("p20", "p80"))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
            once = [row for row in measured if row["status"] == "one step"]
            x, y = [position(row, quantity) for row in once], [scale * float(row[median]) for row in once]
            axes.plot(x, y, markersize=6, **style | HOLLOW)
    floor = {}
    for row in rows:
        if column == "peak_bytes":
            floor[position(row, quantity)] = scale * math.prod(shape(row)) * SIZES[row["dtype"]]
        elif row["implementation"] == "copy" and row["status"] in table.MEASURED:
            floor[position(row, quantity)] = scale * float(row["seconds_median"])
    axes.plot(list(floor), list(floor.values()), **FLOOR)


def draw_crosses(line: Sequence[Axes], curves: Mapping[str, Sequence[Row]]) -> None:
    """Crosses above the curves of a line of axes, where implementations ran out of memory."""
    curves = {quantity: [row for row in rows if row["implementation"] in STYLES] for quantity, rows in curves.items()}
    every = [row for rows in curves.values() for row in rows if ran_out(row)]
    lost = [name for name in STYLES if any(row["implementation"] == name for row in every)]
    strip = 0.06 * len(lost) + 0.02 * bool(lost)  # of the height of the axes
    low, high = line[0].get_ylim()
    line[0].set_ylim(low, high * (high / low) ** (strip / (1 - strip)))
    for axes, (quantity, rows) in zip(line, curves.items(), strict=True):
        for row in filter(ran_out, rows):
            height = 0.96 - 0.06 * lost.index(row["implementation"])
            style = CROSS | {"color": STYLES[row["implementation"]][1]["color"]}
            axes.plot(position(row, quantity), height, transform=axes.get_xaxis_transform(), **style)


def fixed_text(row: Row, quantity: str) -> str:
    n, classes, height, width = shape(row)
    parts = {
        "pixels": f"{n} image{'s' * (n > 1)}" if quantity == "pixels" else f"{n} x {height} x {width} pixels",
        "classes": f"{classes} classes",
        "radius": f"radius {row['radius']}",
    }
    return ", ".join(text for name, text in parts.items() if name != quantity or name == "pixels")


def draw_sweeps(rows: Sequence[Row]) -> Figure | None:
    """Time above memory, against every quantity that was swept."""
    curves = {quantity: sweep_rows(rows, quantity) for quantity in QUANTITIES}
    curves = {quantity: found for quantity, found in curves.items() if found}
    if not curves:
        return None
    figure, grid = plt.subplots(
        2, len(curves), figsize=(max(10, 1.5 + 4.6 * len(curves)), 9), squeeze=False, sharex="col", sharey="row"
    )
    for (quantity, found), (top, bottom) in zip(curves.items(), grid.T, strict=True):
        draw_sweep(top, found, quantity, "seconds", 1e3)
        draw_sweep(bottom, found, quantity, "peak_bytes", 1e-6)
        top.set_title(fixed_text(found[0], quantity), fontsize=12)
        bottom.set_xlabel({"pixels": "pixels of the prediction", "radius": "radius, pixels"}.get(quantity, quantity))
        for axes in (top, bottom):
            axes.set(xscale="log", yscale="log")
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
            axes.margins(x=0.06, y=0.12)
        if quantity != "pixels":
            places = sorted({position(row, quantity) for row in found})
            bottom.set_xticks(places, [str(place) for place in places])
            bottom.xaxis.set_minor_formatter(NullFormatter())
            bottom.xaxis.set_minor_locator(LogLocator(subs=()))
        else:
            bottom.xaxis.set_major_formatter(LogFormatterSciNotation())
    for line in grid:
        draw_crosses(line, curves)
    grid[0, 0].set_ylabel("loss and gradient, milliseconds")
    grid[1, 0].set_ylabel("peak memory above the inputs, MB")
    finish(figure, [row for found in curves.values() for row in found], floor=True)
    return figure


def draw_cases(rows: Sequence[Row]) -> Figure | None:
    """For every named case how many times the time and memory of this package's engine the others take."""
    cases = named_rows(rows)
    engines = [name for name in STYLES if name.endswith("-engine")]
    owns = {case: next((found[name] for name in engines if name in found), None) for case, found in cases.items()}
    cases = {case: found for case, found in cases.items() if owns[case] and owns[case]["status"] in table.MEASURED}
    if not cases:
        return None
    figure, grid = plt.subplots(1, 2, figsize=(13, 2.6 + 0.62 * len(cases)), sharey=True)
    names = [name for name in STYLES if any(name in found for found in cases.values())]
    for line, (case, found) in enumerate(cases.items()):
        for place, name in enumerate(names):
            row, own = found.get(name), owns[case]
            if row is None:
                continue
            y = line + 0.7 * ((place + 0.5) / len(names) - 0.5)
            style = {key: value for key, value in STYLES[name][1].items() if key != "linestyle"}
            for axes, column in zip(grid, ("ratio", "peak_bytes"), strict=True):
                if ran_out(row):
                    cross = CROSS | {"color": style["color"]}
                    axes.plot(0.96 - 0.04 * (place % 2), y, transform=axes.get_yaxis_transform(), **cross)
                elif column == "ratio" and row["ratio_median"]:
                    middle, low, high = (float(row[f"ratio_{point}"]) for point in ("median", "p20", "p80"))
                    error = [[max(middle - low, 0)], [max(high - middle, 0)]]
                    once = HOLLOW if row["status"] == "one step" else {}
                    axes.errorbar(middle, y, xerr=error, markersize=7, capsize=3, **style | once)
                elif column == "peak_bytes" and row[column] and own[column]:
                    axes.plot(int(row[column]) / int(own[column]), y, markersize=7, **style)
    labels = [f"{case}\n{next(iter(found.values()))['shape'].replace('x', ' x ')}" for case, found in cases.items()]
    grid[0].set_yticks(range(len(cases)), labels, fontsize=11)
    grid[0].set_ylim(len(cases) - 0.5, -0.5)
    everything = [row for found in cases.values() for row in found.values()]
    own_label = STYLES[next(iter(owns.values()))["implementation"]][0]
    for axes, quantity in zip(grid, ("time", "peak memory"), strict=True):
        axes.set(xscale="log", xlabel=f"{quantity}, times that of {own_label}")
        axes.axvline(1, color="0.45", linewidth=1.5)
        axes.grid(color="0.9", axis="x")
        axes.hlines([line + 0.5 for line in range(len(cases) - 1)], 0, 1, "0.9", transform=axes.get_yaxis_transform())
        axes.set_axisbelow(True)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.8), high * (2 if any(map(ran_out, everything)) else 1))  # room for crosses
        axes.xaxis.set_major_formatter("{x:g}")
    finish(figure, everything, floor=False)
    return figure


def finish(figure: Figure, rows: Sequence[Row], floor: bool) -> None:
    """Legend above the axes, and below them a caption with device, versions and date."""
    names = [name for name in STYLES if any(row["implementation"] == name for row in rows)]
    lines = [plt.Line2D([], [], label=STYLES[name][0], markersize=7, **STYLES[name][1]) for name in names]
    if any(map(ran_out, rows)):
        lines.append(plt.Line2D([], [], label="does not fit into memory", **CROSS))
    if any(row["status"] == "one step" for row in rows):
        lines.append(plt.Line2D([], [], label="time of a single step", color="0.3", marker="o", **HOLLOW))
    if floor:
        lines.append(plt.Line2D([], [], label="floor: copying the prediction; the gradient's bytes", **FLOOR))
    last = max(rows, key=lambda row: row["utc"])
    versions = [f"PyTorch {last['torch']}", f"gcrf_triton {last['gcrf_triton']} ({last['revision']})"]
    versions += [f"{label} {last[field]}" for label, field in (("Triton", "triton"), ("PyMIC", "pymic")) if last[field]]
    driver = f"driver {last['driver']}" if last["driver"] else f"threads: {last['threads']}"
    what = "forward and backward; bands and bars from the 20th to the 80th percentile"
    caption = f"{last['device']}, {driver}; {last['utc'][:10]}; {what}\n{', '.join(versions)}"
    width, height = figure.get_size_inches()
    columns = min(len(lines), 3 if width < 12 else 4)
    above = 0.15 + 0.27 * math.ceil(len(lines) / columns)
    figure.tight_layout(rect=(0, 0.6 / height, 1, 1 - above / height))
    figure.legend(handles=lines, ncols=columns, loc="upper center", frameon=False, fontsize=11, handlelength=3)
    figure.text(0.5, 0.1 / height, caption, ha="center", va="bottom", fontsize=10, color="0.25")


def draw_units(rows: Sequence[Row]) -> Figure | None:
    """For every target and dtype the modelled clocks a pixel of each unit, and those of the kernel without tiles."""
    together = [row for row in rows if row["kernel"] == "together" and row["gates"] == "no"]
    common = {(row["classes"], row["radius"]) for row in together}
    if len(common) != 1:  # nothing, or no one problem to compare targets by
        return None
    ((classes, radius),) = common
    figure, axes = plt.subplots(figsize=(12, 2.4 + 0.5 * len(together)))
    for line, row in enumerate(together):
        clocks = {unit: float(row[f"{unit}_clocks"]) for unit in UNITS}
        axes.barh(line, max(clocks.values()), height=0.62, color="0.9")
        for unit, value in clocks.items():
            style = {"markersize": 8, "markeredgewidth": 2 if unit == "issue" else 1} | UNITS[unit][1]
            axes.plot(max(value, 1e-3), line, linestyle="", **style)
    for row in rows:
        if row["kernel"] == "sum_offsets" and row["gates"] == "no":
            for line, tiled in enumerate(together):
                if (tiled["target"], tiled["dtype"]) == (row["target"], "float32"):
                    axes.plot(float(row["bound_clocks"]), line, **CROSS)
    labels = [f"{row['device']} ({row['target']})\n{row['dtype']}" for row in together]
    axes.set_yticks(range(len(together)), labels, fontsize=11)
    axes.set(xscale="log", ylim=(len(together) - 0.5, -0.5), xlabel="modelled clocks a pixel and multiprocessor")
    axes.set_xlim(left=1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="0.85", axis="x")
    axes.set_axisbelow(True)
    handles = [
        plt.Line2D([], [], label=label, linestyle="", **{"markersize": 8} | style) for label, style in UNITS.values()
    ]
    handles.append(plt.Line2D([], [], label="pairs one offset at a time, float32", **CROSS))
    handles.append(plt.Rectangle((0, 0), 1, 1, color="0.9", label="bound: the busiest unit"))
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.5 / height, 1, 1 - 0.95 / height))
    figure.legend(handles=handles, ncols=3, loc="upper center", frameon=False, fontsize=11)
    caption = (
        f"512 x 512 pixels, {classes} classes, radius {radius}, loss and gradient from logits; a model of compiled"
    )
    figure.text(0.5, 0.1 / height, f"{caption} code: nothing was measured", ha="center", fontsize=10, color="0.25")
    return figure
