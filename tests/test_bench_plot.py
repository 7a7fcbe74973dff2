"""Promise: pictures and the table of the front page show the measurements, and nothing else."""

import matplotlib.image
import matplotlib.pyplot as plt
import pytest
import torch
from measurements import fails_in_one_line, row

from bench import plot
from bench.measuring import cases, figures, selection, table


def test_nothing_to_draw_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    (tmp_path / "other.csv").write_bytes(b"\xff,foreign\n")
    fails_in_one_line(capsys, plot, [], "tables", "found none")
    path = tmp_path / "rows.csv"
    table.append([row(mode="forward")], path)
    fails_in_one_line(capsys, plot, [], "rows.csv", "forward and backward")
    table.append([row()], path)
    assert plot.main([]) == 0 and (tmp_path / "rows-cases.png").exists()
    fails_in_one_line(capsys, plot, ["--out", str(tmp_path / "no")], "--out", "no")


def measurements():
    """Rows of three sweeps and two named cases of four implementations, one of which runs out of memory."""
    for quantity in selection.QUANTITIES:
        for place, case in enumerate(cases.sweep(quantity, quick=True)):
            for factor, name in ((1, "torch-engine"), (5, "offsets"), (40, "unfold"), (0.1, "copy")):
                lost = name == "unfold" and place == 3
                seconds = 0.001 * factor * 3**place
                yield row(
                    **case.describe(),
                    implementation=name,
                    status="oom-predicted" if lost else "ok",
                    seconds_median="" if lost else seconds,
                    seconds_p20="" if lost else 0.9 * seconds,
                    seconds_p80="" if lost else 1.2 * seconds,
                    peak_bytes="" if lost else int(1e6 * factor * 3**place),
                )
    for case in cases.NAMED[:2]:
        yield row(**case.describe())
        yield row(**case.describe(), implementation="unfold", ratio_median=40, ratio_p20=38, ratio_p80=45)


def test_pictures_show_the_measurements(tmp_path):
    path = tmp_path / "imagined.csv"
    table.append(list(measurements()), path)
    assert plot.main([str(path)]) == 0
    pictures = [tmp_path / "imagined-sweeps.png", tmp_path / "imagined-cases.png"]
    for picture in pictures:
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert min(pixels.shape[:2]) > 300
        for colour in ("#0072B2", "#E69F00") if picture == pictures[0] else ("#E69F00",):
            expected = torch.tensor(matplotlib.colors.to_rgb(colour))
            close = (torch.from_numpy(pixels.copy()) - expected).abs().amax(-1) < 0.02
            assert close.sum() > 100


@pytest.mark.parametrize("name", ["triton-engine-again", "copy"])
def test_pictures_leave_out_what_has_no_style(name, tmp_path):
    rows = list(measurements())
    rows += [row(**case.describe(), implementation=name, status="oom") for case in cases.sweep("pixels", quick=True)]
    plt.close(figures.draw_sweeps(rows))


def test_pictures_repeat(tmp_path):
    path = tmp_path / "imagined.csv"
    table.append([r for r in measurements() if not r["sweep"]], path)
    contents = []
    for _ in range(2):
        (picture,) = plot.plot(path, tmp_path)
        contents.append(picture.read_bytes())
    assert contents[0] == contents[1]


def test_curves_are_the_rows():
    rows = list(measurements())
    figure = figures.draw_sweeps(rows)
    axes = figure.axes[0]
    curves = {line.get_color(): line for line in axes.get_lines() if line.get_linestyle() != "None"}
    assert list(curves["#0072B2"].get_xdata()) == [256, 1024, 4096, 16384]
    assert list(curves["#0072B2"].get_ydata()) == pytest.approx([1, 3, 9, 27])
    assert list(curves["#E69F00"].get_xdata()) == [256, 1024, 4096]
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [16384]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    plt.close(figure)


def test_a_curve_holds_what_differs_in_one_quantity():
    quick = [row(**case.describe()) for case in cases.sweep("radius", quick=True)]
    full = [row(**case.describe()) for case in cases.sweep("radius")]
    assert [selection.position(r, "radius") for r in selection.sweep_rows(quick + full + quick, "radius")] == [
        1, 2, 3, 5, 8, 11, 16
    ]  # fmt: skip
    assert {r["shape"] for r in selection.sweep_rows(full + quick, "radius")} == {"1x21x192x192"}


@pytest.mark.parametrize(
    "other", [{"contended": "yes"}, {"warm": "yes"}, {"huge_pages": "requested"}, {"mode": "forward"}]
)
def test_pictures_show_the_usual_surroundings(other):
    usual = [row(**case.describe()) for case in (*cases.NAMED[:2], *cases.sweep("radius", quick=True))]
    unusual = [r | other | {"utc": "2026-01-03"} for r in usual]
    assert selection.named_rows(usual + unusual) == selection.named_rows(usual)
    assert selection.sweep_rows(usual + unusual, "radius") == selection.sweep_rows(usual, "radius")


def test_the_table_has_the_ratios_of_fresh_and_of_warm_processes():
    ratios = [
        {f"ratio_{point}": value + step for point, step in (("median", 0), ("p20", -1), ("p80", 1))}
        for value in (40, 20)
    ]
    rows = [
        row(implementation=name, warm=warm, turns=3, utc=warm, **(ratio if name == "official" else {}))
        for warm, ratio in zip(("no", "yes"), ratios, strict=True)
        for name in ("torch-engine", "official")
    ]
    heading, _, line = ([cell.strip() for cell in line.split("|")] for line in plot.markdown(rows).splitlines())
    found = dict(zip(heading, line, strict=True))
    assert (found["times as long"], found["warm, times as long"]) == ("40 (39-41)", "20 (19-21)")
    assert plot.markdown(rows[:2]).splitlines()[-1] == plot.markdown(rows).splitlines()[-1].replace("20 (19-21)", "")


def test_a_case_shows_what_took_turns():
    case = cases.NAMED[0].describe()
    before = [row(implementation=name, utc="2026-01-01", **case) for name in ("torch-engine", "official")]
    after = row(implementation="torch-engine", utc="2026-01-02", **case)
    assert list(selection.named_rows(before)[case["case"]]) == ["torch-engine", "official"]
    assert selection.named_rows([*before, after])[case["case"]] == {"torch-engine": after}
