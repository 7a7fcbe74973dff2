"""`nox` runs the tests with every pair of PyTorch and Triton in PAIRS, and prints the README's table of versions.

Every pair has an environment and a Python of its own, so nox needs Python 3.10 to 3.13 (with pyenv, PYENV_VERSION lists
them), uv, and some 6 GB a pair. `nox -s oldest` takes the lowest version of every package that pyproject.toml admits,
and runs what depends on PyTorch and Triton most: three minutes, which CI spends every time.
"""

import pathlib
import xml.etree.ElementTree

import nox

PAIRS = (  # Python, PyTorch, Triton
    ("3.10", "2.9.1", "3.5.1"),
    ("3.12", "2.11.0", "3.6.0"),
    ("3.11", "2.13.0", "3.9.0"),
    ("3.13", "2.14.1", "3.8.0"),
)
REPORTS = pathlib.Path("build/versions")
TABLE = pathlib.Path("bench/results/versions.md")
PYTEST = ("python", "-m", "pytest", "-n", "2", "--dist", "loadfile")
nox.options.sessions = ["pair", "table"]
nox.options.default_venv_backend = "uv"


@nox.session
@nox.parametrize("python, torch, triton", PAIRS)
def pair(session: nox.Session, torch: str, triton: str) -> None:
    """The whole suite."""
    session.install("-e", ".[test]", f"torch=={torch}")
    session.install("--no-deps", f"triton=={triton}", "pymic==0.6.2")  # whichever Triton PyTorch brought
    report = REPORTS / f"{session.python}_{torch}_{triton}.xml"
    report.unlink(missing_ok=True)
    session.run(*PYTEST, f"--junit-xml={report}")


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """What the suites found."""
    lines = ["| Python | PyTorch | Triton | tests passed | failed | skipped |", "|---|---|---|---|---|---|"]
    for versions in PAIRS:
        report = REPORTS / f"{'_'.join(versions)}.xml"
        counts = ["not run", "", ""]
        if report.exists():
            suite = xml.etree.ElementTree.parse(report).getroot()[0]
            total, failures, errors, skipped = (
                int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
            )
            counts = [total - failures - errors - skipped, failures + errors, skipped]
        lines.append(f"| {' | '.join(map(str, (*versions, *counts)))} |")
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Import, both engines, gradients, autocast, torch.compile and machine code with the oldest of everything."""
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    session.run(*PYTEST, *(f"tests/test_{name}.py" for name in ("package", "operator", "gradients", "targets")))
