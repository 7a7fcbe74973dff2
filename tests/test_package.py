"""Promise: importing is free of side effects, and the package describes itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OPTIONAL

import gcrf_triton

ROOT = Path(__file__).parent.parent


def run(*arguments, **settings):
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, **settings).stdout


def test_importing_touches_no_driver_and_no_thread():
    program = (
        "import sys, threading, torch, warnings\n"
        "warnings.simplefilter('error')  # PyTorch's own import warns where NumPy is missing\n"
        "torch.set_num_threads(1); before = threading.active_count()\n"
        "import gcrf_triton\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "assert torch.get_num_threads() == 1 and threading.active_count() == before\n"
    )
    run("-c", program)


def test_the_module_describes_the_installation():
    output = run("-m", "gcrf_triton")
    assert gcrf_triton.__version__ in output
    for row in ("torch", "triton", "device", "impl='auto'", "configurations", "cache"):
        assert any(line.startswith(row) for line in output.splitlines())


@pytest.mark.parametrize("options", [[], ["-m", "gpu"]], ids=["all", "gpu"])
def test_the_tests_collect_without_optional_packages(options):
    program = (
        "import sys, pytest\n"
        "from importlib.machinery import PathFinder\n"
        "class Installed(PathFinder):\n"
        "    def find_spec(name, *rest):\n"
        f"        return None if name.split('.')[0] in {OPTIONAL} else PathFinder.find_spec(name, *rest)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Installed\n"
        f"sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *{options}]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    output = run("-c", program, env=environment)
    assert "test_gpu.py::test_both_engines_agree" in output
    assert re.search(r"SKIPPED .*test_demo.py.*: No module named '(numpy|PIL)'", output)


def test_types_are_published():
    assert (Path(gcrf_triton.__file__).parent / "py.typed").exists()


def test_the_reference_stands_alone():
    for file in (ROOT / "reference").glob("*.py"):
        assert "gcrf_triton" not in file.read_text()


def test_users_never_meet_an_assert():
    for file in (ROOT / "gcrf_triton").glob("*.py"):
        assert "assert " not in file.read_text()
