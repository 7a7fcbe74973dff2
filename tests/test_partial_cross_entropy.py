"""Promise: the mean cross entropy of the labelled pixels, and a differentiable 0 where there are none."""

import pytest
import torch
import torch.nn.functional as F

from gcrf_triton import partial_cross_entropy


def problem(dtype=torch.float64, labelled=0.3):
    logits = torch.randn(2, 4, 6, 7, dtype=dtype)
    labels = torch.randint(0, 4, (2, 6, 7))
    return logits, labels.where(torch.rand(2, 6, 7) < labelled, 255)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_is_the_mean_over_labelled_pixels(dtype, weighted):
    logits, labels = problem()
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    expected = F.cross_entropy(logits, labels, weight, ignore_index=255)
    torch.testing.assert_close(partial_cross_entropy(logits, labels.to(dtype), weight=weight), expected)


def test_no_label_is_a_differentiable_zero():
    logits, labels = problem(labelled=0)
    logits.requires_grad_()
    for weight in (None, torch.rand(4)):
        loss = partial_cross_entropy(logits, labels, weight=weight)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and not gradient.any()
    logits, labels = problem()
    assert partial_cross_entropy(logits, labels, weight=torch.zeros(4)) == 0


def test_gradients():
    logits, labels = problem()
    weight = torch.rand(4, dtype=torch.float64)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        for arguments in ({}, {"weight": weight}):
            assert check(lambda z, a=arguments: partial_cross_entropy(z, labels, **a), logits.requires_grad_())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_under_no_label_never_leaks(poison):
    logits, labels = problem()
    expected = partial_cross_entropy(logits, labels)
    logits = logits.masked_fill((labels == 255)[:, None], poison).requires_grad_()
    loss = partial_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(loss, expected) and gradient.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_is_under_a_label_is_not_hidden(layout):
    logits, labels = problem()
    labels[0, 0, 0] = 1
    logits[0, 2, 0, 0] = -float("inf")  # a class that is out of the question
    logits = logits.contiguous(memory_format=layout).requires_grad_()
    loss = partial_cross_entropy(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, ignore_index=255))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    with torch.no_grad():
        logits[0, 2, 0, 0] = float("nan")
    assert partial_cross_entropy(logits, labels).isnan()


def test_another_ignore_index():
    logits, labels = problem()
    expected = partial_cross_entropy(logits, labels)
    for index in (-100, -1, 4):
        assert torch.equal(
            partial_cross_entropy(logits, labels.where(labels != 255, index), ignore_index=index), expected
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits_are_summed_in_float32(dtype):
    logits, labels = problem(dtype)
    loss = partial_cross_entropy(logits.requires_grad_(), labels)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), partial_cross_entropy(logits.double(), labels), rtol=1e-6, atol=0)


def test_compiles_into_one_graph():
    logits, labels = problem()
    compiled = torch.compile(partial_cross_entropy, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(logits, labels), partial_cross_entropy(logits, labels))


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "logits: expected a tensor", {"logits": [1.0]}),
        (TypeError, "logits: expected float64", {"logits": torch.zeros(2, 4, 6, 7, dtype=torch.long)}),
        (ValueError, r"logits: expected \[N, C, H, W\]", {"logits": torch.zeros(4, 6, 7)}),
        (TypeError, "labels: expected a tensor", {"labels": None}),
        (TypeError, "labels: expected an integer", {"labels": torch.zeros(2, 6, 7)}),
        (TypeError, "labels: expected an integer", {"labels": torch.zeros(2, 6, 7, dtype=torch.bool)}),
        (ValueError, r"labels: expected \[2, 6, 7\]", {"labels": torch.zeros(2, 7, 6, dtype=torch.long)}),
        (ValueError, r"labels: expected \[N, H, W\]", {"labels": torch.zeros(2, 1, 6, 7, dtype=torch.long)}),
        (ValueError, r"labels: expected 0 to 3 or ignore_index=255, got \[4\]", {"labels": torch.full((2, 6, 7), 4)}),
        (ValueError, r"labels: .*got \[-1\]", {"labels": torch.full((2, 6, 7), -1)}),
        (ValueError, "labels: expected on cpu", {"labels": torch.zeros(2, 6, 7, dtype=torch.long, device="meta")}),
        (ValueError, r"weight: expected \[4\]", {"weight": torch.ones(3)}),
        (ValueError, "weight: expected finite values >= 0, got -1.0", {"weight": -torch.ones(4)}),
        (ValueError, "weight: .*detach", {"weight": torch.ones(4, requires_grad=True)}),
        (TypeError, "ignore_index: expected an int, got float", {"ignore_index": 255.0}),
        (TypeError, "ignore_index: expected an int, got NoneType", {"ignore_index": None}),
        (TypeError, "weight: expected a tensor", {"weight": [1, 1, 1, 1]}),
    ],
)
def test_wrong_arguments(error, message, change):
    logits, labels = problem()
    arguments = {"logits": logits, "labels": labels, **change}
    with pytest.raises(error, match=message):
        partial_cross_entropy(**arguments)
