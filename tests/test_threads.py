"""Promise: results do not depend on threads, and nobody else's threads are touched."""

import threading

import pytest
import torch
from problems import make_problem, value_and_gradient
from threadpoolctl import threadpool_info

from gcrf_triton import torch_engine


@pytest.fixture
def many_threads(monkeypatch):
    monkeypatch.setattr(torch_engine, "VALUES_PER_THREAD", 1)
    monkeypatch.setattr(torch_engine, "CPU_TILE", 64)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("inference", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(many_threads, inference):
    problem = make_problem((2, 3, 40, 30), gates="s", dtype=torch.float32)
    results = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        if inference:
            with torch.inference_mode():
                results.append((problem.loss(), problem.loss(reduction="none")))
        else:
            results.append(value_and_gradient(problem, lambda p: p.loss()))
    for value, other in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(other, results[0][1])


@pytest.mark.parametrize("gates", ["s", "d"])
def test_bits_of_large_inputs(gates):
    problem = make_problem((1, 2, 300, 300), radius=1, gates=gates, dtype=torch.float32)
    before, losses = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        losses.append(problem.loss())
    torch.set_num_threads(before)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_callers_in_several_threads(many_threads):
    torch.set_num_threads(2)
    problems = [make_problem((1, 3, 20 + k, 30), seed=k) for k in range(6)]
    expected = [problem.loss() for problem in problems]
    found = [None] * 6

    def work(k):
        for _ in range(3):
            found[k] = problems[k].loss()

    workers = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_thread_settings_stay_as_they_were():
    def settings():
        pools = [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()]
        return torch.get_num_threads(), torch.get_num_interop_threads(), pools

    make_problem((1, 3, 30, 30)).loss()
    before = settings()
    during, inside = [], threading.Event()
    done = threading.Event()

    def watch():
        inside.set()
        while not done.is_set():
            during.append(torch.get_num_threads())

    watcher = threading.Thread(target=watch)
    watcher.start()
    inside.wait()
    for _ in range(5):
        make_problem((1, 3, 60, 60)).loss()
    done.set()
    watcher.join()
    assert settings() == before
    assert set(during) == {before[0]}


def test_settings_are_restored_after_an_error(monkeypatch):
    def fail(*args):
        raise RuntimeError("stopped")

    before = torch.get_num_threads()
    monkeypatch.setattr(torch_engine, "_accumulate_blocks", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        make_problem((1, 3, 6, 6)).loss()
    assert torch.get_num_threads() == before
