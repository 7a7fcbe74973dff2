"""Promise: on a GPU the loss repeats, uses little memory, and follows devices, streams and graphs.

Run with `TRITON_INTERPRET=0 python -m pytest -m gpu`.
"""

import os
import subprocess
import sys

import pytest
import torch
from problems import KERNELS, make_problem, value_and_gradient

from gcrf_triton import gated_crf_loss
from gcrf_triton.engines import select_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a GPU, and TRITON_INTERPRET=0",
    ),
]


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv("GCRF_TRITON_IMPL")  # what users have


def picture(n=2, classes=21, height=129, width=130, dtype=torch.float32, device="cuda"):
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(n, classes, height, width, generator=generator, device=device).to(dtype)
    return logits.requires_grad_(), torch.rand(n, 3, height, width, generator=generator, device=device)


def step(logits, image, **settings):
    loss = gated_crf_loss(logits, {"rgb": image}, from_logits=True, **settings)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_auto_is_triton():
    assert select_engine("auto", torch.device("cuda")) == "triton"


@pytest.mark.parametrize("gates", ["", "s", "sd"])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_engines_agree(dtype, kernels, gates):
    problem = make_problem((2, 21, 67, 53), kernels, 5, gates).to(dtype)
    expected, expected_gradient = value_and_gradient(problem.to(torch.float64), lambda p: p.loss(reduction="sum"))
    for name in ("probabilities", "source", "destination"):
        tensor = getattr(problem, name)
        setattr(problem, name, None if tensor is None else tensor.cuda())
    problem.features = {name: feature.cuda() for name, feature in problem.features.items()}
    value, gradient = value_and_gradient(problem, lambda p: p.loss(reduction="sum"))
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-5}.get(dtype, 3e-3) + torch.finfo(dtype).eps
    assert abs(value.cpu() - expected) <= tolerance * abs(expected)
    assert (gradient.cpu().double() - expected_gradient).norm() <= tolerance * expected_gradient.norm()


def test_autocast():
    logits, image = picture()
    expected = step(logits, image)
    network = torch.nn.Conv2d(21, 21, 1, bias=False, device="cuda")
    torch.nn.init.eye_(network.weight.data[:, :, 0, 0])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        halves = network(logits)
        loss = gated_crf_loss(halves, {"rgb": image}, from_logits=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert halves.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert abs(loss - expected[0]) <= 1e-2 * expected[0]
    assert (gradient - expected[1]).norm() <= 2e-2 * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bit_by_bit(dtype):
    logits, image = picture(dtype=dtype)
    first = step(logits, image)
    for _ in range(5):
        again = step(logits, image)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("radius", [5, 11])
def test_peak_memory(radius):
    logits, image = picture(2, 21, 1024, 1024)
    step(logits, image, radius=radius)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(logits, image, radius=radius)
    torch.cuda.synchronize()
    # the gradient twice (stored, and multiplied by that of the loss), a copy of the image, and the workspace
    pixels = 2 * 1024**2
    assert torch.cuda.max_memory_allocated() - before <= (2 * 84 + 12) * pixels + 40 * 2**20


def test_other_streams():
    logits, image = picture()
    expected = step(logits, image)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)  # what is launched elsewhere would overtake
        copy = logits.detach().clone().requires_grad_()
        found = step(copy, image)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_input():
    logits, image = picture()
    expected = step(logits, image)
    found = step(logits.detach().to("cuda:1").requires_grad_(), image.to("cuda:1"))
    assert found[1].device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(found[1].cpu(), expected[1].cpu())


def test_a_cuda_graph():
    logits, image = picture()
    step(logits, image)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(logits, image)
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    expected = step(logits, image)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_no_synchronisation():
    logits, image = picture()
    gate = torch.rand(2, 129, 130, device="cuda") > 0.5
    step(logits, image, source=gate)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits, image, source=gate)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "message, call",
    [
        ("source: expected values >= 0", "gated_crf_loss(x.softmax(1), {'rgb': image}, source=-gate)"),
        ("labels: expected 0 to 3 or ignore_index=255", "partial_cross_entropy(x, 4 * gate.long())"),
    ],
)
def test_wrong_values_stop_the_device_with_a_message(message, call):
    program = (
        "import torch\n"
        "from gcrf_triton import gated_crf_loss, partial_cross_entropy\n"
        "x, image = torch.randn(1, 4, 8, 9, device='cuda'), torch.rand(1, 3, 8, 9, device='cuda')\n"
        "gate = torch.ones(1, 8, 9, device='cuda')\n"
        f"{call}\n"
        "torch.cuda.synchronize()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode and message in run.stderr + run.stdout
