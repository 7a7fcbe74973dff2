"""Promise: neither another default device nor another default dtype changes anything."""

import ast
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import make_problem

import gcrf_triton
from gcrf_triton import GatedCRFLoss, partial_cross_entropy
from gcrf_triton.compat import ModelLossSemsegGatedCRF

FACTORIES = [
    f"torch.{name}" for name in ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
]
KERNELS = [{"weight": 0.9, "xy": 6.0, "rgb": 0.1}, {"weight": 0.1, "xy": 6.0}]


def factory_calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if (ast.unparse(node.args[0]) if name == "functools.partial" else name) in FACTORIES:
                yield node


def test_every_new_tensor_is_told_its_device_and_dtype():
    found = 0
    for path in Path(gcrf_triton.__file__).parent.glob("*.py"):
        if path.name == "tuner.py":  # a command's
            continue
        for call in factory_calls(ast.parse(path.read_text())):
            found += 1
            assert {"device", "dtype"} <= {each.arg for each in call.keywords}, (path.name, ast.unparse(call))
    assert found > 5


@functools.cache
def expected_of(engine):
    """What an engine of the tests computes without another default."""
    return everything(a_problem())


def a_problem():
    return make_problem((2, 3, 5, 6), KERNELS, 2, "sd", True, torch.float32)


def everything(problem):
    """Losses and gradients of the main paths, of tensors on the CPU."""
    cpu = {"device": "cpu", "dtype": torch.float32}
    y, image = problem.probabilities, problem.features["rgb"]
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mask, labels = torch.ones(2, 1, 10, 12, **cpu), torch.zeros(2, 5, 6, device="cpu", dtype=torch.int64)
    labels[:, 2:] = 255
    found = []
    for dtype in (torch.float32, torch.float16):
        prediction = y.to(dtype)

        def step(loss, prediction=prediction):
            x = prediction.clone().requires_grad_()
            value = loss(x)
            value.sum().backward()
            found.extend([value.detach(), x.grad])

        for reduction in ("mean", "none"):
            step(lambda x, reduction=reduction: GatedCRFLoss(KERNELS, 2, reduction=reduction)(x, {"rgb": large}))
            step(lambda x, reduction=reduction: replace(problem, probabilities=x).loss(reduction=reduction))
        for masks in ((None, None), (mask, None), (None, mask)):
            step(lambda x, masks=masks: ModelLossSemsegGatedCRF()(x, KERNELS, 2, {"rgb": large}, 5, 6, *masks)["loss"])
        step(lambda x: 3 * partial_cross_entropy(4 * x, labels, weight=y[0, :, 0, 0]))
        drawn = ModelLossSemsegGatedCRF()(prediction, KERNELS, 1, large, 5, 6, mask, out_kernels_vis=True)
        found.append(drawn["kernels_vis"])
    return found


@pytest.mark.engines("torch", "triton")
@pytest.mark.parametrize("default", ["meta", torch.float64, torch.float16], ids=str)
def test_defaults_change_nothing(default, engine):
    problem, expected = a_problem(), expected_of(engine)
    try:
        if default == "meta":
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        found = everything(problem)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
