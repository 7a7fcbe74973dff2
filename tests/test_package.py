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


HIDE = """
import sys
from importlib.machinery import PathFinder
class Installed(PathFinder):
    def find_spec(name, *rest):
        return None if name.split('.')[0] in {} else PathFinder.find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""


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


def test_what_is_declared_is_enough_to_run_without_a_warning():
    (declared,) = re.findall(r"^dependencies = \[$(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    undeclared = {*OPTIONAL, "numpy"} - set(re.findall(r'^ +"([\w-]+)', declared, re.M))
    program = (
        f"{HIDE.format(undeclared)}import warnings\n"
        "warnings.simplefilter('error', UserWarning)\n"
        "import runpy, torch\n"
        "from gcrf_triton import gated_crf_loss, partial_cross_entropy\n"
        "logits, image = torch.randn(1, 3, 8, 8), torch.rand(1, 3, 8, 8)\n"
        "labels = torch.randint(0, 3, (1, 8, 8), dtype=torch.uint8)\n"
        "for leaf in (logits, logits.clone().requires_grad_()):\n"
        "    loss = gated_crf_loss(leaf, {'rgb': image}, from_logits=True) + partial_cross_entropy(leaf, labels)\n"
        "    if loss.requires_grad:\n"
        "        loss.backward()\n"
        "sys.argv[1:] = []\n"
        "runpy.run_module('gcrf_triton', run_name='__main__')\n"
    )
    assert gcrf_triton.__version__ in run("-c", program)


@pytest.mark.parametrize("options", [[], ["-m", "gpu"]], ids=["all", "gpu"])
def test_the_tests_collect_without_optional_packages(options):
    program = (
        f"{HIDE.format(OPTIONAL)}import pytest\n"
        f"sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *{options}]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    output = run("-c", program, env=environment)
    assert "test_gpu.py::test_both_engines_agree" in output
    assert re.search(r"SKIPPED .*test_demo.py.*: No module named 'PIL'", output)


def test_types_are_published():
    assert (Path(gcrf_triton.__file__).parent / "py.typed").exists()


def test_the_reference_stands_alone():
    for file in (ROOT / "reference").glob("*.py"):
        assert "gcrf_triton" not in file.read_text()


def test_users_never_meet_an_assert():
    for file in (ROOT / "gcrf_triton").glob("*.py"):
        assert "assert " not in file.read_text()
