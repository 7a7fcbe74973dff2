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
