"""Promise: PyTorch can compile, trace, autocast, distribute and fake the operator."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from problems import make_problem

from gcrf_triton import GatedCRFLoss, gated_crf_loss
from gcrf_triton.op import pairwise_energy
from gcrf_triton.tensors import area_average

SETTINGS = ([1.0, 0.3], [6.0, 0.1, 2.0, 0.0], 2)  # weights, sigmas, radius

both_engines = pytest.mark.engines("torch", "triton")


def layouts():
    p = torch.rand(2, 3, 5, 6, dtype=torch.float64).softmax(1)
    yield "contiguous", p
    yield "channels_last", p.contiguous(memory_format=torch.channels_last)
    yield "expanded", p[:, :1, :1].expand(2, 3, 5, 6)
    yield "sliced", torch.rand(2, 5, 9, 11, dtype=torch.float64)[:, ::2, 1:6, :6]


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("compatibility", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "sliced"])
def test_opcheck(layout, compatibility, gates, from_logits, with_gradient):
    p = dict(layouts())[layout]
    gate = torch.rand(2, 5, 6, dtype=torch.float64) if gates else None
    mu = torch.rand(3, 3, dtype=torch.float64) if compatibility else None
    rgb = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    p.requires_grad_(with_gradient)
    arguments = (p, [rgb], gate, gate, mu, from_logits, *SETTINGS, True, with_gradient, "auto")
    torch.library.opcheck(pairwise_energy, arguments)


@pytest.mark.engines("triton")
@pytest.mark.parametrize(
    "layout, from_logits", [("contiguous", True), ("channels_last", False), ("expanded", True), ("sliced", False)]
)
def test_opcheck_in_the_interpreter(layout, from_logits):
    p = dict(layouts())[layout].float().requires_grad_()
    gate, rgb = torch.rand(2, 5, 6), torch.rand(2, 3, 5, 6)
    arguments = (p, [rgb], gate, gate, None, from_logits, *SETTINGS, True, True, "auto")
    torch.library.opcheck(pairwise_energy, arguments)


@both_engines
@pytest.mark.parametrize("compatibility", [None, 1 - torch.eye(2)])
def test_one_gate_leaves_the_other_open(compatibility):
    p, gate = torch.rand(1, 2, 4, 5), torch.rand(1, 4, 5)
    rest = (compatibility, False, [1.0], [2.0], 1, False, True, "auto")
    for gates, both in (((gate, None), (gate, torch.ones(1, 4, 5))), ((None, gate), (torch.ones(1, 4, 5), gate))):
        torch.testing.assert_close(pairwise_energy(p, [], *gates, *rest), pairwise_energy(p, [], *both, *rest))


@both_engines
def test_a_window_of_the_pixel_alone_has_no_pairs():
    p = torch.full((1, 2, 3, 4), float("nan"))
    _, gradient, _ = pairwise_energy(p, [], None, None, None, False, [1.0], [2.0], 0, True, True, "auto")
    assert (gradient == 0).all()


def test_opcheck_of_the_average():
    torch.library.opcheck(area_average, (torch.rand(2, 3, 17, 9), 5, 4))


def test_a_loss_alone_cannot_be_differentiated():
    p = torch.rand(1, 2, 3, 4, requires_grad=True)
    energy, *_ = pairwise_energy(p, [], None, None, None, False, [1.0], [2.0], 1, False, False, "auto")
    with pytest.raises(RuntimeError, match="with_gradient"):
        energy.backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(backend, dynamic, reduction):
    torch._dynamo.reset()
    module = GatedCRFLoss(from_logits=True, reduction=reduction)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=backend)
    for height, width in ((12, 9), (7, 15), (20, 20)):
        logits = torch.randn(2, 4, height, width, requires_grad=True)
        arguments = ({"rgb": torch.rand(2, 3, 2 * height, 3 * width)}, torch.rand(2, height, width) > 0.5)
        loss, expected = compiled(logits, *arguments), module(logits, *arguments)
        torch.testing.assert_close(loss, expected)
        gradients = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
        torch.testing.assert_close(*gradients)


@both_engines
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile's default backend needs a C++ compiler")
def test_compiles_with_the_default_backend():
    torch._dynamo.reset()
    compiled = torch.compile(gated_crf_loss, fullgraph=True, dynamic=True)
    for height, width in ((12, 9), (7, 15)):
        logits, image = torch.randn(2, 4, height, width, requires_grad=True), torch.rand(2, 3, 2 * height, 3 * width)
        results = [loss(logits, {"rgb": image}, from_logits=True) for loss in (compiled, gated_crf_loss)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(result, logits)[0] for result in results))


@both_engines
def test_compiled_autograd():
    torch._dynamo.reset()
    problem = make_problem((1, 3, 9, 8))
    x = problem.probabilities.requires_grad_()
    (expected,) = torch.autograd.grad(problem.loss(), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        problem.loss().backward()
    torch.testing.assert_close(x.grad, expected)


@both_engines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    problem = make_problem((2, 3, 9, 8), gates="s", compatibility=True, dtype=torch.float32)
    network = torch.nn.Conv2d(3, 3, 1)
    with torch.autocast("cpu", dtype=dtype):
        logits = network(problem.features["rgb"])
        problem.probabilities = logits
        loss = problem.loss(from_logits=True)
        energies = problem.loss(from_logits=True, reduction="none")
        operator_energy, *_ = pairwise_energy(logits, [], None, None, None, False, [1.0], [2.0], 1, False, True, "auto")
    loss.backward()
    assert logits.dtype == dtype and network.weight.grad.isfinite().all()
    problem.probabilities = logits.detach().double()
    exact = problem.to(torch.float64)
    assert loss.dtype == energies.dtype == operator_energy.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact.loss(from_logits=True), rtol=1e-6, atol=0)
    torch.testing.assert_close(energies.double(), exact.loss(from_logits=True, reduction="none"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
def test_autocast_is_registered(device):
    key = f"Autocast{device.upper()}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key("gcrf_triton::pairwise_energy", key)


@both_engines
def test_inference_mode():
    problem = make_problem((1, 3, 9, 8))
    expected = problem.loss()
    with torch.inference_mode():
        inside = make_problem((1, 3, 9, 8))
        assert inside.probabilities.is_inference()
        assert torch.equal(inside.loss(), expected)


def test_more_than_two_to_the_31_elements_without_memory():
    logits = torch.empty(9, 21, 4096, 4096, device="meta", requires_grad=True)
    image = torch.empty(9, 3, 4096, 4096, device="meta")
    loss = gated_crf_loss(logits, {"rgb": image}, from_logits=True)
    loss.backward()
    assert loss.shape == () and logits.grad.shape == logits.shape
    assert gated_crf_loss(logits, {"rgb": image}, reduction="none").shape == (9, 4096, 4096)


@both_engines
def test_the_operator_is_registered_under_its_name():
    p = torch.rand(1, 2, 4, 4)
    arguments = (p, [], None, None, None, False, [1.0], [2.0], 1, False, True, "auto")
    energy, gradient, _ = torch.ops.gcrf_triton.pairwise_energy(*arguments)
    assert energy > 0 and gradient.shape == p.shape


def test_two_processes_with_gloo():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = textwrap.dedent(
        """
        import os
        import torch
        from torch.nn.parallel import DistributedDataParallel
        from gcrf_triton import gated_crf_loss

        torch.manual_seed(0)
        image = torch.rand(4, 3, 16, 16)
        network = torch.nn.Conv2d(3, 4, 3, padding=1)
        gated_crf_loss(network(image), {"rgb": image}, from_logits=True).backward()
        expected = network.weight.grad.clone()
        network.zero_grad()
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        half = image[2 * rank : 2 * rank + 2]
        parallel = DistributedDataParallel(network)
        gated_crf_loss(parallel(half), {"rgb": half}, from_logits=True).backward()
        torch.testing.assert_close(network.weight.grad, expected)
        torch.distributed.barrier()
        os._exit(0)  # PyTorch's own gloo threads now and then abort an interpreter that shuts down in order
        """
    )
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env={**environment, "RANK": str(rank)}) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
