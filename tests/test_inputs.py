"""Promise: any layout goes in, nothing is written to, and a wrong call says what was expected and what came."""

import warnings

import numpy as np
import pytest
import torch
from problems import make_problem, value_and_gradient

from gcrf_triton import GatedCRFLoss, gated_crf_loss

pytestmark = pytest.mark.engines("torch", "triton")


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded batch"])
def test_layouts(layout):
    problem = make_problem((2, 3, 9, 8), gates="sd")
    expected = value_and_gradient(problem, lambda p: p.loss())

    def change(t):
        if layout == "channels_last":
            return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        if layout == "transposed":
            return t.mT.contiguous().mT
        if layout == "sliced":
            spaced = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
            spaced[..., ::2] = t
            return spaced[..., ::2]
        return t

    if layout == "expanded batch":
        problem = make_problem((1, 3, 9, 8), gates="sd")
        single = value_and_gradient(problem, lambda p: p.loss(reduction="none"))
        problem.probabilities = problem.probabilities.expand(2, 3, 9, 8)
        problem.features = {name: feature.expand(2, -1, 9, 8) for name, feature in problem.features.items()}
        problem.source, problem.destination = problem.source.expand(2, 9, 8), problem.destination.expand(2, 9, 8)
        value, gradient = value_and_gradient(problem, lambda p: p.loss(reduction="none"))
        torch.testing.assert_close(value, 2 * single[0])
        torch.testing.assert_close(gradient, single[1].expand(2, 3, 9, 8))
        return
    problem.probabilities = change(problem.probabilities)
    problem.features = {name: change(feature) for name, feature in problem.features.items()}
    problem.source, problem.destination = change(problem.source), change(problem.destination)
    value, gradient = value_and_gradient(problem, lambda p: p.loss())
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_inputs_and_what_surrounds_them_are_never_written():
    problem = make_problem((2, 3, 9, 8), gates="sd", compatibility=True, dtype=torch.float32)

    def guard(tensor):
        canary = torch.full((tensor.numel() + 128,), 12345.0)
        inner = canary[64:-64].view(tensor.shape).copy_(tensor)
        canaries.append((canary, canary.clone()))
        return inner

    canaries = []
    problem.features = {name: guard(feature) for name, feature in problem.features.items()}
    problem.source, problem.destination = guard(problem.source), guard(problem.destination)
    problem.compatibility = guard(problem.compatibility)
    problem.probabilities = guard(problem.probabilities).requires_grad_()
    canaries = [(canary, before.copy_(canary)) for canary, before in canaries]
    for reduction in ("mean", "none"):
        for from_logits in (False, True):
            problem.loss(reduction=reduction, from_logits=from_logits).sum().backward()
    assert len(canaries) == 6
    for canary, before in canaries:
        assert torch.equal(canary, before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gates", ["", "s", "sd"])
def test_the_caller_may_change_features_and_gates_before_backward(gates, reduction):
    problem = make_problem((1, 3, 6, 6), gates=gates)
    x = problem.probabilities.requires_grad_()
    (expected,) = torch.autograd.grad(problem.loss(reduction=reduction).sum(), x)
    loss = problem.loss(reduction=reduction)
    for tensor in (problem.features["rgb"], problem.source, problem.destination):
        if tensor is not None:
            tensor.zero_()
    assert torch.equal(torch.autograd.grad(loss.sum(), x)[0], expected)


def test_features_and_gates_from_inference_mode():
    problem = make_problem((1, 3, 6, 6), gates="sd")
    with torch.inference_mode():
        problem.features = {"rgb": problem.features["rgb"] * 1}
        problem.source, problem.destination = problem.source * 1, problem.destination * 1
    problem.probabilities.requires_grad_()
    problem.loss().backward()


def test_numbers_of_numpy():
    kernels = [{"weight": np.float32(1), "xy": np.int64(6), "rgb": np.float64(0.1)}]
    assert gated_crf_loss(INPUT, {"rgb": RGB}, kernels, np.int64(5)) == gated_crf_loss(INPUT, {"rgb": RGB})


def test_logits_taken_for_probabilities_are_told():
    logits = torch.randn(1, 3, 8, 9)
    with pytest.warns(UserWarning, match=r"input: expected probabilities, got -.* to .*pass from_logits=True"):
        gated_crf_loss(logits, {"rgb": torch.rand(1, 3, 8, 9)})
    with pytest.warns(UserWarning, match="input: expected logits of classes, got one"):
        assert gated_crf_loss(logits[:, :1], {"rgb": torch.rand(1, 3, 8, 9)}, from_logits=True) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated_crf_loss(logits, {"rgb": torch.rand(1, 3, 8, 9)}, from_logits=True)
        gated_crf_loss(logits.softmax(1), {"rgb": torch.rand(1, 3, 8, 9)})


INPUT = torch.full((2, 3, 8, 9), 1 / 3)
RGB = torch.rand(2, 3, 8, 9)
KERNEL = {"weight": 1.0, "xy": 6.0, "rgb": 0.1}
NAN = float("nan")
WRONG = {
    "input a list": (TypeError, "input: expected a tensor", {"input": [[1.0]]}),
    "input an array": (TypeError, "input: expected a tensor", {"input": np.ones((2, 3, 8, 9))}),
    "input of 3 dimensions": (ValueError, r"input: expected \[N, C, H, W\], got \[3, 8, 9\]", {"input": INPUT[0]}),
    "input of integers": (TypeError, "input: expected float64, .*, got torch.int64", {"input": INPUT.long()}),
    "input complex": (TypeError, "input: expected float64", {"input": INPUT.to(torch.complex64)}),
    "input of 8 bits": (TypeError, "input: expected float64", {"input": INPUT.to(torch.float8_e5m2)}),
    "input sparse": (TypeError, "input: expected a dense tensor", {"input": INPUT.to_sparse()}),
    "from_logits a string": (TypeError, "from_logits: expected a bool, got str", {"from_logits": "no"}),
    "feature without channels": (ValueError, "at least one channel", {"features": {"rgb": RGB[:, :0]}}),
    "source infinite": (ValueError, "source: .*got inf", {"source": torch.full((2, 8, 9), float("inf"))}),
    "compatibility complex": (TypeError, "compatibility: .*real", {"compatibility": torch.zeros(3, 3).cfloat()}),
    "compatibility infinite": (
        ValueError,
        "compatibility: expected finite values",
        {"compatibility": (1 - torch.eye(3)) / 0},
    ),
    "input without classes": (ValueError, "input: expected at least one class", {"input": INPUT[:, :0]}),
    "input without pixels": (ValueError, "input: expected at least one class and one pixel", {"input": INPUT[..., :0]}),
    "features a tensor": (TypeError, "features: expected a mapping", {"features": RGB}),
    "features missing": (
        ValueError,
        r"features: kernels use 'rgb', got only \['image'\]",
        {"features": {"image": RGB}},
    ),
    "features empty": (ValueError, "features: kernels use 'rgb', got only none", {"features": {}}),
    "unknown modality": (ValueError, "kernels use 'depth'", {"kernels": [{"weight": 1, "depth": 1}]}),
    "feature not a tensor": (TypeError, r"features\['rgb'\]: expected a tensor", {"features": {"rgb": RGB.numpy()}}),
    "feature of 3 dimensions": (
        ValueError,
        r"features\['rgb'\]: expected \[N, F, h, w\]",
        {"features": {"rgb": RGB[0]}},
    ),
    "feature of another batch": (ValueError, r"features\['rgb'\]: expected \[2, F", {"features": {"rgb": RGB[:1]}}),
    "feature too small": (ValueError, "with h >= 8 and w >= 9", {"features": {"rgb": RGB[:, :, :4]}}),
    "feature of integers": (TypeError, "expected floating point or uint8", {"features": {"rgb": RGB.long()}}),
    "feature elsewhere": (ValueError, r"features\['rgb'\]: expected on cpu", {"features": {"rgb": RGB.to("meta")}}),
    "feature requires grad": (
        ValueError,
        r"features\['rgb'\].*detach",
        {"features": {"rgb": RGB.clone().requires_grad_()}},
    ),
    "kernels a mapping": (TypeError, "kernels: expected a sequence", {"kernels": KERNEL}),
    "kernels empty": (ValueError, "kernels: expected at least one", {"kernels": []}),
    "kernel a pair": (TypeError, r"kernels\[0\]: expected a mapping", {"kernels": [("weight", 1.0)]}),
    "kernel without weight": (ValueError, r"kernels\[0\]: expected a 'weight'", {"kernels": [{"xy": 6.0, "rgb": 1.0}]}),
    "kernel without modality": (ValueError, r"kernels\[0\]: .*at least one modality", {"kernels": [{"weight": 1.0}]}),
    "kernel with a number for a name": (TypeError, "names of modalities", {"kernels": [{"weight": 1.0, 3: 1.0}]}),
    "radius a float": (TypeError, "radius: expected an int, got float", {"radius": 5.0}),
    "radius a bool": (TypeError, "radius: expected an int, got bool", {"radius": True}),
    "radius zero": (ValueError, "radius: expected at least 1, got 0", {"radius": 0}),
    "source of another size": (ValueError, r"source: expected \[2, 8, 9\]", {"source": torch.ones(2, 16, 18)}),
    "source of 2 dimensions": (ValueError, r"source: expected \[N, H, W\]", {"source": torch.ones(8, 9)}),
    "source not a tensor": (TypeError, "source: expected a tensor", {"source": 1.0}),
    "source negative": (ValueError, "source: expected finite values >= 0, got -1.0", {"source": -torch.ones(2, 8, 9)}),
    "source NaN": (ValueError, "source: expected finite values >= 0, got nan", {"source": torch.full((2, 8, 9), NAN)}),
    "source complex": (TypeError, "source: .*complex", {"source": torch.ones(2, 8, 9, dtype=torch.complex64)}),
    "source elsewhere": (ValueError, "source: expected on cpu", {"source": torch.ones(2, 8, 9, device="meta")}),
    "source requires grad": (ValueError, "source: .*detach", {"source": torch.ones(2, 8, 9, requires_grad=True)}),
    "destination negative": (ValueError, "destination: .*-1", {"destination": -torch.ones(2, 8, 9, dtype=torch.int8)}),
    "destination with channels": (
        ValueError,
        r"destination: expected \[2, 8, 9\]",
        {"destination": torch.ones(2, 3, 8, 9)},
    ),
    "compatibility of another size": (
        ValueError,
        r"compatibility: expected \[3, 3\]",
        {"compatibility": torch.zeros(4, 4)},
    ),
    "compatibility a list": (TypeError, "compatibility: expected a tensor", {"compatibility": [[0, 1], [1, 0]]}),
    "compatibility with a diagonal": (
        ValueError,
        "compatibility: .*zero diagonal",
        {"compatibility": torch.ones(3, 3)},
    ),
    "compatibility negative": (ValueError, "compatibility: .*>= 0", {"compatibility": torch.eye(3) - 1}),
    "compatibility requires grad": (
        ValueError,
        "compatibility: .*detach",
        {"compatibility": (1 - torch.eye(3)).requires_grad_()},
    ),
    "unknown reduction": (ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'max'", {"reduction": "max"}),
    "unknown engine": (ValueError, "impl: expected one of .*, got 'cuda'", {"impl": "cuda"}),
}
for value in (0, -1.0, NAN, float("inf"), 1e-200, 10**400):
    for name in ("weight", "xy", "rgb"):
        WRONG[f"{name} {str(value)[:8]}"] = (
            ValueError,
            rf"kernels\[0\]\['{name}'\]: expected a number from 1e-12 to .*, got {value}",
            {"kernels": [{**KERNEL, name: value}]},
        )
for value in ("6", None, True, (6.0, 6.0)):
    WRONG[f"xy {value}"] = (
        TypeError,
        r"kernels\[0\]\['xy'\]: expected a number",
        {"kernels": [{**KERNEL, "xy": value}]},
    )


@pytest.mark.parametrize("error, message, arguments", WRONG.values(), ids=WRONG)
def test_wrong_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        gated_crf_loss(**{"input": INPUT, "features": {"rgb": RGB}, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [{"kernels": []}, {"radius": 0}, {"reduction": "max"}, {"impl": "cuda"}, {"compatibility": torch.ones(2, 2)}],
    ids=str,
)
def test_the_module_checks_its_settings_at_once(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        GatedCRFLoss(**arguments)


def test_a_module_does_not_share_its_kernels():
    GatedCRFLoss().kernels[0]["rgb"] = 0.5
    assert GatedCRFLoss().kernels[0]["rgb"] == 0.1


def test_constants_may_require_grad_where_nobody_records():
    rgb = RGB.clone().requires_grad_()
    with torch.no_grad():
        assert gated_crf_loss(INPUT, {"rgb": rgb}) > 0


def test_the_module_is_the_function():
    problem = make_problem((2, 3, 8, 9), gates="sd", compatibility=True)
    module = GatedCRFLoss(problem.kernels, 3, compatibility=problem.compatibility, from_logits=True, reduction="sum")
    expected = gated_crf_loss(
        problem.probabilities,
        problem.features,
        problem.kernels,
        3,
        source=problem.source,
        destination=problem.destination,
        compatibility=problem.compatibility,
        from_logits=True,
        reduction="sum",
    )
    found = module(problem.probabilities, problem.features, problem.source, problem.destination)
    assert torch.equal(found, expected)
    assert "compatibility" in module.state_dict() and "radius=3" in repr(module)
