"""Promise: importing is free of side effects, and the package describes itself."""

import subprocess
import sys
from pathlib import Path

import gcrf_triton

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_importing_touches_no_driver_and_no_thread():
    program = (
        "import sys, threading, torch\n"
        "torch.set_num_threads(1); before = threading.active_count()\n"
        "import gcrf_triton\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "assert torch.get_num_threads() == 1 and threading.active_count() == before\n"
    )
    run("-W", "error", "-c", program)


def test_the_module_describes_the_installation():
    output = run("-m", "gcrf_triton")
    assert gcrf_triton.__version__ in output
    for row in ("torch", "triton", "device", "impl='auto'", "configurations", "cache"):
        assert any(line.startswith(row) for line in output.splitlines())


def test_types_are_published():
    assert (Path(gcrf_triton.__file__).parent / "py.typed").exists()


def test_the_reference_stands_alone():
    for file in (ROOT / "reference").glob("*.py"):
        assert "gcrf_triton" not in file.read_text()


def test_users_never_meet_an_assert():
    for file in (ROOT / "gcrf_triton").glob("*.py"):
        assert "assert " not in file.read_text()
