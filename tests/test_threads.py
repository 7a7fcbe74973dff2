"""Promise: results do not depend on threads, and nobody else's threads are touched."""

import threading

import pytest
import torch
from problems import make_problem, value_and_gradient
from threadpoolctl import threadpool_info

from gcrf_triton import torch_engine
from gcrf_triton.threads import AdaptiveThreads, limit_threads


@pytest.fixture
def many_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def always_several(threads, seconds):
    threads.steps += 1
    if threads.steps == 1:
        threads.use_several()


@pytest.mark.parametrize("gates", ["", "s", "d", "sd"])
@pytest.mark.parametrize("shape", [(1, 5, 90, 81), (1, 5, 300, 290), (2, 6, 192, 256), (3, 2, 201, 203)])
@pytest.mark.parametrize("from_logits", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(many_threads, monkeypatch, from_logits, shape, gates):
    monkeypatch.setattr(AdaptiveThreads, "record", always_several)
    problem = make_problem(shape, radius=2, gates=gates, dtype=torch.float32)
    results = []
    for threads in (1, 2, 5, 7, 9, 2):
        torch.set_num_threads(threads)
        found = value_and_gradient(problem, lambda p: p.loss(from_logits=from_logits))
        results.append((*found, problem.loss(reduction="none")))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_single_energies_of_logits_repeat_on_one_number_of_threads(many_threads):
    problem = make_problem((1, 5, 300, 290), radius=2, gates="s", dtype=torch.float32)
    torch.set_num_threads(3)
    first, second = (problem.loss(from_logits=True, reduction="none") for _ in range(2))
    assert torch.equal(first, second)


def test_several_threads_work_until_they_have_lost_time():
    def threads_after(*milliseconds):
        threads = AdaptiveThreads(torch.device("cpu"), 2)
        with limit_threads(torch.device("cpu")), threads.using(10**6):
            used = []
            for step in milliseconds:
                threads.record(step / 1000)
                used.append(torch.get_num_threads())
        return used

    before = torch.get_num_threads()
    assert threads_after(5, 3, 4) == [1, 1, 2]
    assert threads_after(5, 3, 4, 2, 2, 2, 2) == [1, 1, 2, 2, 2, 2, 2]
    assert threads_after(5, 3, 4, 2, 9, 2, 2) == [1, 1, 2, 2, 2, 2, 2]  # once is no reason
    assert threads_after(5, 3, 4, 4, 4, 2, 1) == [1, 1, 2, 2, 2, 2, 2]
    assert threads_after(5, 3, 4, 1, 1, 1, 14, 1) == [1, 1, 2, 2, 2, 2, 2, 2]  # still ahead of one thread
    assert threads_after(5, 3, 4, 4, 4, 8, 1) == [1, 1, 2, 2, 2, 1, 1]
    assert threads_after(5, 3, 4, 99, 1) == [1, 1, 2, 1, 1]
    assert torch.get_num_threads() == before


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
    monkeypatch.setattr(torch_engine, "_affinity", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        make_problem((1, 3, 6, 6)).loss()
    assert torch.get_num_threads() == before
