"""Promise: what is modelled or ranked without a GPU says so, keeps what was found before, and fails aloud."""

import csv
import json
import sys

import matplotlib.image
import pytest
import torch

from bench import autotune, gpu, plot, static_cost
from gcrf_triton import tuning

pytest.importorskip("gcrf_triton.triton_engine")

no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU measures instead of modelling")


def fails_in_one_line(capsys, command, arguments, *expected):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1
    for part in expected:
        assert part in message


@pytest.fixture
def modelled(monkeypatch):
    """Instead of compiling: tiles cost what their area is, whatever else they are."""

    def rows_of(target, dtype, classes, radius, gates, config, **problem):
        return [{"kernel": "together", "bound_clocks": 100.0 + config.tile_y * config.tile_x - config.unroll / 2}]

    monkeypatch.setattr(static_cost, "rows_of", rows_of)


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@no_gpu
def test_without_a_gpu_configurations_are_ranked_by_the_model(modelled, tmp_path, capsys):
    path = tmp_path / "configs.json"
    arguments = ["--out", str(path), "--gates", "no", "--cases"]
    assert autotune.main([*arguments, "official-clicks"]) == 0
    assert autotune.main([*arguments, "wsl4mis", "ade20k"]) == 0
    content = json.loads(path.read_text())
    assert "nothing was measured" in content["ranked_by"] and content["device"] == "sm_90"
    assert len(content["entries"]) == len(content["costs"]) == 3
    for name, entry in content["entries"].items():
        config, costs = tuning.Config(**entry), content["costs"][name]
        assert costs["best"] == 100 + config.tile_y * config.tile_x - config.unroll / 2
        assert costs["best"] <= costs["heuristic"] <= costs["worst"] and costs["best"] < costs["worst"]
    assert any(name.startswith("sm_90, 64 columns") for name in content["entries"])  # a pass of 150 classes
    printed = capsys.readouterr().out
    assert "nothing was measured" in printed and "3 problems are in" in printed


@no_gpu
@pytest.mark.parametrize("content", ["hello", "[1]", '{"schema": 1}'])
def test_a_foreign_file_is_no_file_of_configurations(content, tmp_path, capsys):
    path = tmp_path / "configs.json"
    path.write_text(content)
    fails_in_one_line(capsys, autotune, ["--out", str(path)], "--out: expected a file of configurations", str(path))
    assert path.read_text() == content


@no_gpu
def test_what_cannot_be_ranked_is_one_line(tmp_path, capsys):
    fails_in_one_line(capsys, autotune, ["--cases", "nope"], "--cases: expected names of official-clicks", "'nope'")
    fails_in_one_line(capsys, autotune, ["--out", str(tmp_path / "no" / "x.json")], "--out: cannot write")
    fails_in_one_line(capsys, autotune, ["--target", "gfx942"], "--target: expected one whose tiles", "gfx942")


def test_nothing_is_compiled_under_the_interpreter(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fails_in_one_line(capsys, static_cost, [], "TRITON_INTERPRET=1")
    fails_in_one_line(capsys, autotune, [], "TRITON_INTERPRET=1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    fails_in_one_line(capsys, static_cost, ["--csv", str(tmp_path / "no" / "x.csv")], "--csv: cannot write")
    fails_in_one_line(capsys, static_cost, ["--radius", "0"], "--classes, --radius: expected classes from 1 to 64")
    fails_in_one_line(capsys, static_cost, ["--classes", "150"], "--classes, --radius: expected classes from 1 to 64")
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("case,seconds\n")
    fails_in_one_line(capsys, static_cost, ["--csv", str(foreign)], "--csv: expected a new file", str(foreign))
    assert foreign.read_text() == "case,seconds\n"


def modelled_row(**values):
    known = {"target": "sm_90", "device": "H100", "classes": 21, "radius": 5, "gates": "no", "dtype": "float32"}
    known |= {f"{unit}_clocks": 10.0 + place for place, unit in enumerate(static_cost.CLOCKS)}
    known |= {"bound_clocks": 16.0, "bound_by": static_cost.CLOCKS[-1]}
    return dict.fromkeys(static_cost.FIELDS, "") | known | values


def test_units_are_drawn(tmp_path, capsys):
    path = tmp_path / "cost.csv"

    def write(*rows):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, static_cost.FIELDS)
            writer.writeheader()
            writer.writerows(rows)

    write(modelled_row(kernel="together"), modelled_row(kernel="sum_offsets", bound_clocks=300.0))
    assert plot.main([str(path)]) == 0
    with_baseline = matplotlib.image.imread(tmp_path / "cost-units.png")
    write(modelled_row(kernel="together"))
    assert plot.main([str(path)]) == 0
    alone = matplotlib.image.imread(tmp_path / "cost-units.png")
    assert with_baseline.shape == alone.shape and (with_baseline != alone).any()
    write(modelled_row(kernel="pack"))
    fails_in_one_line(capsys, plot, [str(path)], "expected rows of one problem, got none")


def program(text):
    return [sys.executable, "-c", text]


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    interrupted = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    planned = [
        ("tests", 20, program("import os; print(os.environ['TRITON_INTERPRET'], os.environ['GCRF_TRITON_CACHE'])")),
        ("tune", 20, program("raise SystemExit(3)")),
        ("cases", 2, program(interrupted)),
        ("plot", 20, program("print('drawn')")),
    ]
    monkeypatch.setattr(gpu, "steps", lambda folder, dry_run: planned)
    folder = tmp_path / "results"
    assert gpu.main(["--dry-run", "--out", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for line, ending in zip(lines, ("done", "failed with status 3", "met its limit", "done"), strict=False):
        assert ending in line
    assert f"0 {folder / 'cache'}" in (folder / "tests.log").read_text()
    assert "kept" in (folder / "cases.log").read_text() and "drawn" in (folder / "plot.log").read_text()
    fails_in_one_line(capsys, gpu, ["--dry-run", "--out", str(folder)], "--out: expected a new folder")


def test_all_steps_fit_into_25_minutes(tmp_path):
    for dry_run in (False, True):
        planned = gpu.steps(tmp_path, dry_run)
        assert sum(limit for _, limit, _ in planned) <= 25 * 60
        assert len({name for name, _, _ in planned}) == len(planned)


@no_gpu
def test_no_gpu_is_one_line(tmp_path, capsys):
    fails_in_one_line(capsys, gpu, ["--out", str(tmp_path / "new")], "expected a GPU", "--dry-run")
    assert not (tmp_path / "new").exists()
