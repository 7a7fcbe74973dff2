"""How many threads PyTorch's short operations on the CPU use: one, or several for as long as that is faster."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from threadpoolctl import ThreadpoolController

VECTOR = 32  # elements of one step of PyTorch's vectorised loops, at most
GRAIN = 32768  # elements below which PyTorch gives a thread no share: at::internal::GRAIN_SIZE
MOST_THREADS = 8  # about as many as PyTorch gives a share of a tile
# Elements of whole vectors for each of 1, 2, 4 or 8 threads. Where a share ends within a vector, the rest is rounded
# differently, and results would depend on the number of threads.
WHOLE_SHARES = VECTOR * MOST_THREADS
BASELINE_STEPS = 3  # timed with one thread
PATIENCE = 2  # baseline steps that several threads may lose in all


@functools.cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


def limit_threads(device: torch.device, threads: int = 1) -> AbstractContextManager:
    """Context in which the calling thread's operations on the CPU use so many threads; no other thread sees it."""
    if device.type != "cpu":
        return nullcontext()
    torch.get_num_threads()  # PyTorch sets a new thread's limit when it is first asked, which would undo ours
    return _openmp().limit(limits=threads)


class AdaptiveThreads:
    """Runs short operations with one thread first, then with several, and with one again once those have lost time.

    With idle cores, several threads are faster. Beside another process, each of hundreds of operations waits for a
    thread that does not get to run, and one thread alone is much faster. Several are given up for good when they have
    taken PATIENCE baseline steps longer than one thread would have.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device, self.threads = device, threads if device.type == "cpu" else 1
        self.steps, self.baseline_seconds, self.seconds_lost = 0, math.inf, 0.0
        self.limit = ExitStack()

    def using(self, elements: int) -> ExitStack:
        """Context of operations on at least so many elements."""
        # a power of two, and no more than PyTorch gives a share
        self.shares = 1 << max(min(self.threads, MOST_THREADS, -(-elements // GRAIN)), 1).bit_length() - 1
        if self.steps >= BASELINE_STEPS:
            self.use_several()
        return self.limit

    def record(self, seconds: float) -> None:
        """Note how long a pixel took, and choose the number of threads of the next operations."""
        self.steps += 1
        if self.steps <= BASELINE_STEPS:
            self.baseline_seconds = min(self.baseline_seconds, seconds)
            if self.steps == BASELINE_STEPS:
                self.use_several()
        elif self.threads > 1:
            self.seconds_lost += seconds - self.baseline_seconds
            if self.seconds_lost > PATIENCE * self.baseline_seconds:
                self.threads = 1
                self.limit.close()

    def use_several(self) -> None:
        """Raise the limit of the current context to as many threads as its operations have shares for."""
        if self.threads > 1 and self.shares > 1:
            self.limit.enter_context(limit_threads(self.device, self.shares))
