"""Promise: a step launches little, passes over the prediction once, and compiles once for all sizes."""

import ast
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import KERNELS

from bench.machine_code.compiling import specialised
from bench.machine_code.recording import record_step, recorded
from gcrf_triton import gated_crf_loss
from gcrf_triton.tuning import Config, use_config

pytest.importorskip("gcrf_triton.triton_engine")

TRITON = ["prepare", "pack", "sum_tile"]
SHAPE = (2, 21, 45, 70)
HALVES = [torch.float16, torch.bfloat16]


def sizes(tensors):
    return [tuple(tensor.shape) for tensor in tensors]


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_launches(dtype, gated, from_logits):
    launches, operations = record_step("sm_90", SHAPE, dtype, gated, from_logits=from_logits)
    assert [launch.kernel.fn.__name__ for launch in launches] == TRITON
    names = [operation.name for operation in operations.found]
    # the sum of the tiles' energies, the 1 that autograd starts from, and the multiplication by what comes in, which in
    # float16 without gates also takes a power of two
    unit = ["div"] if dtype == torch.float16 and not gated else []
    assert names == ["sum", "ones_like", *unit, "mul"]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_launches_do_not_grow_with_kernels_and_features(kernels, gated):
    launches, operations = record_step("sm_90", SHAPE, gated=gated, kernels=kernels, from_logits=True)
    assert len(launches) + len(operations.found) <= 6


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_nothing_but_the_kernels_passes_over_the_prediction(dtype, gated):
    launches, operations = record_step("sm_90", SHAPE, dtype, gated, from_logits=True)
    passing = [operation.name for operation in operations.found if SHAPE in sizes(operation.tensors)]
    assert passing == ["mul"]  # backward
    for launch in launches:
        tensors = launch.arguments
        touched = launch.kernel.fn.__name__ != "prepare" or launch.constants["SCANNED"] > 0
        assert touched == (launch.kernel.fn.__name__ in ("pack", "sum_tile")), tensors


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_allocates_two_tensors_of_the_prediction_s_size_and_dtype(autocast, dtype, gated):
    _, operations = record_step("sm_90", SHAPE, dtype, gated, from_logits=True, autocast=autocast)
    large = [tensor for tensor in operations.allocated if tuple(tensor.shape) == SHAPE]
    stored = torch.float32 if dtype == torch.float16 and gated else dtype  # gates may be larger than float16 can hold
    assert [tensor.dtype for tensor in large] == [stored, dtype]  # the gradient, and it times what comes in


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_step_under_autocast_is_that_of_halves(dtype, gated):
    plain, under = (record_step("sm_90", SHAPE, dtype, gated, from_logits=True, autocast=on) for on in (False, True))
    for step in (plain, under):
        step[1].found = [(operation.name, operation.bytes) for operation in step[1].found]
        step[1].allocated = [(tensor.dtype, tuple(tensor.shape)) for tensor in step[1].allocated]
    assert plain[1].found == under[1].found and plain[1].allocated == under[1].allocated
    assert [launch.constants for launch in plain[0]] == [launch.constants for launch in under[0]]


def count_variants(layout, dtype, gated):
    """Of each kernel, for 200 problems that differ in size and batch alone."""
    generator = random.Random(0)
    compiled = {name: set() for name in TRITON}
    for number in range(200):
        step = 16 if number % 4 == 0 else 1
        height, width = (step * generator.randint(1, 160 // step) for _ in range(2))
        batch = generator.randint(1, 9)
        input = torch.zeros(batch, 21, height, width, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        image = torch.zeros(batch, 3, height, width)
        gate = torch.ones(batch, height, width, dtype=torch.bool) if gated else None
        with recorded("sm_90") as launches, use_config(Config()):
            gated_crf_loss(input, {"rgb": image}, radius=1, source=gate, from_logits=True, impl="triton")
        for launch in launches:
            compiled[launch.kernel.fn.__name__].add(repr(specialised(launch)) + repr(launch.constants))
    return {name: len(variants) for name, variants in compiled.items()}


LAYOUTS, DTYPES = (torch.contiguous_format, torch.channels_last), (torch.float32, torch.float16)


@pytest.fixture(scope="module")
def variants():
    """What `count_variants` finds for every layout and dtype, without and with gates, in a process that compiles."""
    cases = list(itertools.product(LAYOUTS, DTYPES, (False, True)))
    program = f"from test_launches import *; print([count_variants(*case) for case in {cases}])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    return dict(zip(cases, ast.literal_eval(run.stdout), strict=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kernels_compile_once_for_all_sizes(layout, dtype, gated, variants):
    # one, and one for rows of whole 16s, which are read 16 bytes at a time
    wide = 2 if layout == torch.contiguous_format else 1
    assert variants[layout, dtype, gated] == dict.fromkeys(TRITON, wide) | {"prepare": 1}
