"""Promise: the benchmark's cases are those of real use, and what it compares computes the same on all of them."""

import dataclasses

import pytest
import torch
from measurements import CPU

from bench.measuring import cases, implementations


def test_named_cases_are_those_of_real_use():
    shapes = {case.name: case.shape for case in cases.NAMED}
    assert shapes["official-clicks"] == (48, 21, 64, 64) and shapes["cityscapes-full"] == (1, 19, 1024, 2048)
    assert len(shapes) == len(cases.NAMED) == 15
    assert {case.channels for case in cases.NAMED if case.name in ("wsl4mis", "pymic")} == {1}
    assert all(case.radius == 5 for case in cases.NAMED)


def test_quick_cases_are_small_and_different():
    quick = cases.named([case.name for case in cases.NAMED], quick=True)
    assert {"official-clicks", "official-two-kernels", "pymic", "saliency", "ade20k"} <= {case.name for case in quick}
    without_names = [dataclasses.replace(case, name="") for case in quick]
    assert all(case not in without_names[:place] for place, case in enumerate(without_names))
    for case in quick:
        n, classes, height, width = case.shape
        assert n * classes * height * width <= 2**18
        (full,) = cases.named([case.name])
        assert classes == full.shape[1] and height * full.shape[3] == width * full.shape[2]
    assert [case.name for case in cases.named(["voc-full-batch"], quick=True)] == ["voc-full-batch"]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("quantity", cases.SWEEPS)
def test_a_sweep_varies_one_quantity(quantity, quick):
    swept = cases.sweep(quantity, quick)
    field = {"pixels": "shape", "classes": "shape", "batch": "shape"}.get(quantity, quantity)
    values = [getattr(case, field) for case in swept]
    assert len(values) > 1 and all(value not in values[:place] for place, value in enumerate(values))
    same = {"name": "", field: None}
    assert all(dataclasses.replace(case, **same) == dataclasses.replace(swept[0], **same) for case in swept)
    varied = {"pixels": {2, 3}, "classes": {1}, "batch": {0}}.get(quantity, set())
    for axis in range(4):
        assert (len({case.shape[axis] for case in swept}) > 1) == (axis in varied)


def assert_same_as_the_unfold(name, case):
    torch.compiler.reset()  # as for every case that is measured
    inputs = implementations.make_inputs(case)
    exact = implementations.make_step("unfold", case, "forward+backward")(*inputs)
    found = implementations.make_step(name, case, "forward+backward")(*inputs)
    tolerance = 1e-6 if name == "official" else 1e-12  # its coordinates are float32
    for value, expected in zip(found, exact, strict=True):
        assert (value - expected).norm() <= tolerance * expected.norm()
    (forward,) = implementations.make_step(name, case, "forward")(*inputs)
    assert torch.equal(forward, found[0]) or (forward - found[0]).abs() <= tolerance * found[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("gates, logits", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (1, 1, 6, 8), (1, 2, 2, 5), (1, 4, 19, 35)])
@pytest.mark.parametrize("kernels", [cases.RGB_XY, cases.PYMIC_PAIR], ids=["one", "two"])
@pytest.mark.parametrize("name", ["offsets", "torch-engine", "official", "flex"])
def test_implementations_compute_the_same(name, kernels, shape, gates, logits):
    if name == "official":
        pytest.importorskip("pymic", reason="needs pip install --no-deps pymic==0.6.2")
    if logits and shape[1] == 1:
        pytest.skip("the softmax of one class is 1, and the loss 0")
    assert_same_as_the_unfold(name, cases.Case("", shape, kernels, 3, dtype="float64", gates=gates, logits=logits))


@pytest.mark.parametrize("name", [name for name in implementations.LOSSES if name.endswith("-compiled")])
def test_compiled_implementations_compute_the_same(name):
    if reason := implementations.why_not(name, CPU):
        pytest.skip(reason)
    assert_same_as_the_unfold(name, cases.Case("", (1, 3, 9, 7), radius=1, dtype="float64", gates=True, logits=True))


@pytest.mark.parametrize("name", ["triton-engine", "triton-engine-again", "flex"])
def test_what_does_not_run_on_a_cpu_says_why(name):
    assert "CPU" in implementations.why_not(name, CPU)
