"""Promise: what the README shows runs."""

import csv
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = tuple(ROOT / page for page in ("README.md", "bench/README.md", "bench/weak_supervision/README.md"))


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda text: text[:40])
def test_snippets(snippet):
    exec(snippet, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.name))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text())
    assert links
    for link, heading in links:
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not heading or heading in headings(target), heading


def headings(page):
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_table_is_that_of_the_measurements(capsys):
    from bench import plot

    first_link = re.search(r"\]\((bench/results/[\w-]+\.csv)\)", README)
    assert plot.main(["--markdown", str(ROOT / first_link[1])]) == 0
    table = capsys.readouterr().out
    assert table in README and "| times as long | warm, times as long |" in table
    assert all(f"\n| {name} |" in table for name in ("official-clicks", "voc-full", "wsl4mis"))


def test_the_versions_are_those_that_were_run():
    lines = (ROOT / "bench/results/versions.md").read_text().splitlines()
    assert len(lines) >= 5 and set(lines) <= set(README.splitlines())


def test_the_clocks_are_those_of_the_model():
    with (ROOT / "bench/results/static_cost.csv").open(newline="") as file:
        rows = {
            (row["dtype"], row["gates"], row["kernel"]): row for row in csv.DictReader(file) if row["target"] == "sm_90"
        }
    for dtype, gates in itertools.product(("float32", "float16"), ("no", "yes")):
        step, tile = (rows[dtype, gates, kernel] for kernel in ("together", "sum_tile"))
        clocks = [f"{float(step[f'{unit}_clocks']):.1f}" for unit in ("issue", "special", "memory", "tensor", "dram")]
        assert f"| {' | '.join([dtype, gates, *clocks, tile['registers'], step['launches']])} |\n" in README


def test_the_figures_of_the_h100_are_those_that_were_measured():
    from bench.measuring import table

    text = (ROOT / "bench/README.md").read_text()
    rows = {}
    for row in table.read(ROOT / "bench/results/nvidia-h100-80gb-hbm3.csv"):
        if row["gates"] == "no" and row["revision"] == "0d91964":
            rows.setdefault((row["case"], row["dtype"], row["implementation"]), row)
    whole = [("voc-full", "float16"), *((case, "float32") for case in ("voc-full", "official-clicks", "wsl4mis"))]
    for case, dtype in whole:
        own, *others = (rows[case, dtype, name] for name in ("triton-engine", "official", "flex"))
        points = [[float(other[f"ratio_{point}"]) for point in ("median", "p20", "p80")] for other in others]
        ratios = [f"{median:.3g} ({p20:.3g}-{p80:.3g})" for median, p20, p80 in points]
        assert f"| {case} | {dtype} | {1e3 * float(own['seconds_median']):.3f} ms | {' | '.join(ratios)} |" in text
        assert f" {int(own['peak_bytes']) / 1e6:.1f} MB, {int(others[0]['peak_bytes']) / 1e6:.0f} MB |" in text


def test_the_errors_are_those_that_were_found():
    from bench.accuracy import table_of

    with (ROOT / "bench/results/accuracy.csv").open(newline="") as file:
        lines = table_of(list(csv.DictReader(file))).splitlines()
    assert len(lines) == 5 and set(lines) <= set(README.splitlines())


def test_what_a_step_takes_of_the_host_is_what_was_measured():
    from bench.host import table_of

    with (ROOT / "bench/results/host.csv").open(newline="") as file:
        lines = table_of(list(csv.DictReader(file))).splitlines()
    assert len(lines) >= 8 and set(lines) <= set((ROOT / "bench/README.md").read_text().splitlines())


@pytest.mark.parametrize(("data", "metric"), [("acdc", "dice"), ("msrc", "miou")])
def test_the_tables_of_weak_supervision_are_those_of_the_trainings(data, metric):
    from bench.weak_supervision.report import table_of
    from bench.weak_supervision.rows import read_rows

    rows = read_rows(ROOT / "bench/results/weak_supervision" / f"{data}.csv")
    lines = table_of([row for row in rows if row["evaluate_on"] == "test"], metric).splitlines()
    assert len(lines) >= 5 and set(lines) <= set(README.splitlines())


def test_the_costs_are_those_of_the_measurements():
    from bench.weak_supervision.costs import table_of
    from bench.weak_supervision.rows import read_rows

    rows = read_rows(ROOT / "bench/results/weak_supervision/costs.csv")
    assert len(rows) >= 12 and set(table_of(rows).splitlines()) <= set(README.splitlines())
