"""Promise: tensors that other libraries bring behave as plain ones; what holds no values, or has no rule, says so."""

import functools

import pytest
import torch
from problems import make_problem
from torch._subclasses.fake_tensor import FakeTensorMode

from gcrf_triton import gated_crf_loss, partial_cross_entropy
from gcrf_triton.compat import ModelLossSemsegGatedCRF

KERNELS = [{"weight": 1.0, "xy": 6.0, "rgb": 0.1}]


class Bare(torch.Tensor):
    """A subclass that adds nothing."""


class Annotated(torch.Tensor):
    """An image with what is known about it, as MONAI's MetaTensor: results of all functions are such images, too."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.new_empty, torch.Tensor.aminmax, torch.empty_like):
            raise TypeError(f"{function.__name__}(): unexpected on an image")
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls):
            result.known = next((each.known for each in args if isinstance(each, cls) and hasattr(each, "known")), {})
        return result


class Weight(torch.nn.Parameter):
    """A subclass of a parameter."""


def annotate(tensor):
    image = tensor.as_subclass(Annotated)
    image.known = {"spacing": 1.0}
    return image


WRAPPERS = {
    "bare": lambda tensor: tensor.as_subclass(Bare),
    "annotated": annotate,
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "subclass of a parameter": lambda tensor: Weight(tensor, requires_grad=False),
    "buffer": torch.nn.Buffer,
}


def loss_and_gradient(wrap, settings, recording):
    """The loss of wrapped tensors, and where it is recorded the gradient."""
    problem = make_problem((2, 3, 5, 6), gates="sd", compatibility=True, dtype=torch.float32)
    x = problem.probabilities = wrap(problem.probabilities).requires_grad_(recording is torch.enable_grad)
    problem.features = {name: wrap(feature) for name, feature in problem.features.items()}
    for name in ("source", "destination", "compatibility"):
        setattr(problem, name, wrap(getattr(problem, name)))
    with recording():
        loss = problem.loss(**settings)
    if recording is torch.enable_grad:
        loss.sum().backward()
    return loss, x.grad


@functools.cache
def of_plain_tensors(engine, recording, **settings):
    """`loss_and_gradient`, by the engine of the tests."""
    return loss_and_gradient(lambda tensor: tensor, settings, recording)


@pytest.mark.engines("torch", "triton")
@pytest.mark.parametrize("recording", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("settings", [{}, {"reduction": "sum", "from_logits": True}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_loss_of_subclasses_is_that_of_plain_tensors(wrap, settings, recording, engine):
    expected, expected_gradient = of_plain_tensors(engine, recording, **settings)
    loss, gradient = loss_and_gradient(wrap, settings, recording)
    assert type(loss) is torch.Tensor and torch.equal(loss, expected)
    if recording is torch.enable_grad:
        assert torch.equal(gradient.as_subclass(torch.Tensor), expected_gradient)


@pytest.mark.parametrize("recording", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_drop_in_and_partial_cross_entropy_take_subclasses(wrap, recording):
    problem = make_problem((2, 3, 5, 6), dtype=torch.float32)
    y, image, mask = problem.probabilities, problem.features["rgb"], torch.ones(2, 1, 5, 6)
    labels = torch.randint(0, 3, (2, 5, 6))
    module = ModelLossSemsegGatedCRF()

    def results(change):
        downsamplers = {"rgb": lambda tensor, size: change(tensor[:, :, ::2, ::2])}
        with recording():
            return [
                module(change(y), KERNELS, 2, {"rgb": change(image)}, 5, 6, change(mask))["loss"],
                module(change(y), KERNELS, 2, change(image), 5, 6, out_kernels_vis=True)["kernels_vis"],
                module(change(y[..., :3, :3]), KERNELS, 2, change(image), 5, 6, None, None, None, downsamplers)["loss"],
                partial_cross_entropy(change(10 * y), change(labels), weight=change(torch.rand(3).sort().values)),
            ]

    torch.manual_seed(0)
    expected = results(lambda tensor: tensor)
    torch.manual_seed(0)
    for one, other in zip(results(wrap), expected, strict=True):
        assert type(one) is torch.Tensor and torch.equal(one, other)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_values_of_subclasses_are_checked(wrap):
    input, features = torch.full((1, 2, 4, 5), 0.5), {"rgb": torch.rand(1, 3, 4, 5)}
    for name in ("source", "destination"):
        with pytest.raises(ValueError, match=f"{name}: expected finite values >= 0, got -1.0"):
            gated_crf_loss(input, features, **{name: wrap(-torch.ones(1, 4, 5))})
    with pytest.raises(ValueError, match="compatibility: expected a zero diagonal"):
        gated_crf_loss(input, features, compatibility=wrap(torch.ones(2, 2)))
    with pytest.raises(ValueError, match=r"labels: expected 0 to 1 .*got \[7\]"):
        partial_cross_entropy(wrap(input), wrap(torch.full((1, 4, 5), 7)))
    with pytest.warns(UserWarning, match="input: expected probabilities, got"):
        gated_crf_loss(wrap(4 * input), features)


def test_fake_tensors_give_shapes():
    with FakeTensorMode():
        logits = torch.rand(2, 3, 8, 9, requires_grad=True)
        labels = torch.zeros(2, 8, 9, dtype=torch.int64)
        for reduction, shape in (("mean", ()), ("none", (2, 8, 9))):
            loss = gated_crf_loss(logits, {"rgb": torch.rand(2, 3, 8, 9)}, from_logits=True, reduction=reduction)
            assert loss.shape == shape
            (loss.sum() + partial_cross_entropy(logits, labels)).backward()
            assert logits.grad.shape == logits.shape


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, x: torch.func.grad(loss)(x),
        lambda loss, x: torch.func.vmap(loss)(x[None]),
        lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_transforms_of_functions_are_refused(transform):
    x, image = torch.rand(1, 3, 5, 6).softmax(1), torch.rand(1, 3, 5, 6)
    with pytest.raises(NotImplementedError, match=r"input: expected no .*(torch.autograd|reverse mode only)"):
        transform(lambda y: gated_crf_loss(y, {"rgb": image}), x)
    with pytest.raises(NotImplementedError, match="y_hat_softmax: expected no"):
        transform(lambda y: ModelLossSemsegGatedCRF()(y, KERNELS, 2, {"rgb": image}, 5, 6)["loss"], x)


def test_gates_and_images_inside_a_transform_are_refused():
    x, image = torch.rand(1, 3, 5, 6).softmax(1), torch.rand(1, 3, 5, 6)
    for call in (
        lambda each: gated_crf_loss(x, {"rgb": each}),
        lambda each: gated_crf_loss(x, {"rgb": image}, source=each[:, 0]),
    ):
        with pytest.raises(NotImplementedError, match="input: expected no transform"):
            torch.func.vmap(call)(image[None])


def test_gradients_in_batches():
    problem = make_problem((1, 3, 5, 6), gates="s")
    x = problem.probabilities.requires_grad_()
    (expected,) = torch.autograd.grad(problem.loss(), x)
    (found,) = torch.autograd.grad(problem.loss(), x, torch.arange(3.0), is_grads_batched=True)
    torch.testing.assert_close(found, torch.arange(3.0)[:, None, None, None, None] * expected)
