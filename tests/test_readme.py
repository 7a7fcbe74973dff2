"""Promise: what the README shows runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda text: text[:40])
def test_snippets(snippet):
    exec(snippet, {})


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_links_into_the_page_exist():
    headings = {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", README, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_the_table_is_that_of_the_measurements(capsys):
    from bench import plot

    assert plot.main(["--markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\d x \d", line)]
    shown = [line for line in README.splitlines() if line in lines]
    assert len(shown) >= 5 and all(f"| {name}" in "".join(shown) for name in ("official-clicks", "voc-full", "wsl4mis"))


@pytest.mark.parametrize(("data", "metric"), [("acdc", "dice"), ("msrc", "miou")])
def test_the_tables_of_weak_supervision_are_those_of_the_trainings(data, metric):
    from bench.weak_supervision.experiment import read_rows
    from bench.weak_supervision.report import table_of

    rows = read_rows(ROOT / "bench/results/weak_supervision" / f"{data}.csv")
    lines = table_of([row for row in rows if row["evaluate_on"] == "test"], metric).splitlines()
    assert len(lines) >= 5 and set(lines) <= set(README.splitlines())
