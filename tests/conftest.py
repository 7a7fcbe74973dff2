import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on the CPU

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fill every uninitialised allocation with NaN, so that reading one shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def engine(request, monkeypatch):
    """The engine that impl="auto" stands for: each of those that pytest.mark.engines names, else PyTorch's."""
    name = getattr(request, "param", "torch")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed, as it does not exist for this system")
    monkeypatch.setenv("GCRF_TRITON_IMPL", name)
    return name


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("engines")
    if marker:
        metafunc.parametrize("engine", marker.args, indirect=True)
