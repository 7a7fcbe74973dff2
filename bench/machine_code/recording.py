"""What a step launches, found without a GPU: Triton's kernels with their arguments, and PyTorch's operations."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.measuring.cases import RGB_XY
from gcrf_triton import gated_crf_loss, op
from gcrf_triton.checks import parse_kernels
from gcrf_triton.planning import describe
from gcrf_triton.problem import Energy, Mode, Problem, Window
from gcrf_triton.tensors import accumulation_dtype
from gcrf_triton.tuning import Config, use_config


@dataclasses.dataclass
class Launch:
    """A kernel, its grid and its arguments by name, recorded instead of launched."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def constants(self) -> dict[str, Any]:
        """Those that are compiled into the kernel, and how it is compiled."""
        return {name: value for name, value in self.arguments.items() if name.isupper() or name.startswith("num_")}


def record_launches(
    shape: Sequence[int] = (1, 21, 512, 512),
    dtype: torch.dtype = torch.float32,
    radius: int = 5,
    kernels: Sequence[Mapping[str, float]] = RGB_XY,
    channels: Mapping[str, int] | None = None,
    gated: bool = False,
    from_logits: bool = True,
    gradient: bool = True,
    target: str = "sm_90",
    config: Config | None = None,
    tiles: bool = True,
) -> list[Launch]:
    """The launches of one loss and its gradient, as they would be configured for a target, or with `config`.

    With `tiles=False` those of the product with all columns, an offset at a time.
    """
    from gcrf_triton import triton_engine

    names, terms = parse_kernels("kernels", kernels)
    n, _, height, width = shape
    input = torch.empty(*shape, dtype=dtype, device="meta")
    wide = accumulation_dtype(dtype)
    features = [
        torch.empty(n, (channels or {}).get(name, 3), height, width, dtype=wide, device="meta") for name in names
    ]
    mask = torch.empty(n, height, width, dtype=torch.bool, device="meta") if gated else None
    problem, energy = Problem(features, terms, Window(radius), mask, mask), Energy(from_logits=from_logits, mean=True)
    gate = None if mask is None else mask.to(wide)
    converted = Problem(features, terms, Window(radius), gate, gate)
    with recorded(target) as launches, contextlib.nullcontext() if config is None else use_config(config):
        if not tiles:
            triton_engine._sum_offsets(input.to(wide), converted)
        elif triton_engine.can_tile(description := describe(input, problem, energy), input.device):
            mode = Mode.ENERGY_AND_GRADIENT if gradient else Mode.ENERGY
            result = torch.empty_like(input) if gradient else input.new_empty(0)
            triton_engine.potts_energy(input, problem, description, mode, result, 1.0)
        else:
            triton_engine.apply_pairwise([input.to(wide)], converted)
    return launches


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Context in which tensors of any device are taken for a target's, and launches are only noted."""
    from gcrf_triton import kernels as module
    from gcrf_triton import tensors, triton_engine

    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: launches.append(Launch(self.kernel, grid, arguments))

    with contextlib.ExitStack() as stack:
        for name in ("prepare", "pack", "sum_tile", "sum_offsets"):
            stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name))))
        stack.enter_context(mock.patch.object(triton_engine, "device_and_arch", lambda device: (target, target)))
        stack.enter_context(mock.patch.object(triton_engine, "unavailable", lambda device: None))
        stack.enter_context(mock.patch.object(tensors, "holds_values", lambda tensor: False))  # none is readable
        yield launches


def bytes_per_pixel(launches: Sequence[Launch]) -> dict[str, float]:
    """Bytes a pixel that the launches move between memory and GPU, counted from the sizes of their tensors.

    "inputs" and "outputs" of the kernels, the copy of what is constant among both; "record", which is written and read.
    """
    arguments: dict[str, dict[str, Any]] = {}
    for launch in launches:
        arguments.setdefault(launch.kernel.fn.__name__, launch.arguments)
    prepare, pack, tile = (arguments[name] for name in ("prepare", "pack", "sum_tile"))
    pixels = prepare["height"] * prepare["width"]

    def bytes_of(tensor: Tensor) -> float:
        return math.prod(tensor.shape[1:]) / pixels * tensor.element_size()

    gates = [prepare[name] for name in ("source", "destination") if prepare[name.upper()]]
    inputs = [*prepare["features"], *gates, pack["copies"], pack["values"]]
    outputs = [pack["copies"], *[tile["result"]] * tile["RESULT"]]
    sums = [sum(map(bytes_of, tensors)) for tensors in (inputs, outputs)]
    return {"inputs": sums[0], "outputs": sums[1], "record": 2.0 * pack["RECORD"]}


@dataclasses.dataclass
class Operation:
    """An operation of PyTorch that would launch a kernel on a GPU, and the tensors that it reads and writes."""

    name: str
    tensors: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class Operations(TorchDispatchMode):
    """Notes the operations of PyTorch below autograd that would launch a kernel, and what is allocated."""

    ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []
        self.allocated: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is op.pairwise_energy:
            with self:
                return op.compute(*args, **kwargs)
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        given, results = (
            [each for each in tree_leaves(tree) if isinstance(each, Tensor)] for tree in ((args, kwargs), result)
        )
        shares = {each.untyped_storage().data_ptr() for each in given}
        new = [each for each in results if each.untyped_storage().data_ptr() not in shares]
        self.allocated += new
        if name not in self.ALLOCATIONS and (new or function._schema.is_mutable):
            self.found.append(Operation(name, [*given, *new]))
        return result


def record_step(
    target: str,
    shape: Sequence[int] = (1, 21, 512, 512),
    dtype: torch.dtype = torch.float32,
    gated: bool = False,
    kernels: Sequence[Mapping[str, float]] = RGB_XY,
    channels: Mapping[str, int] | None = None,
    autocast: bool = False,
    **settings: Any,
) -> tuple[list[Launch], Operations]:
    """What one loss and its gradient launch on a GPU: kernels of Triton, and operations of PyTorch."""
    n, _, height, width = shape
    input = torch.zeros(*shape, dtype=dtype, requires_grad=True)
    names, _ = parse_kernels("kernels", kernels)
    features = {name: torch.zeros(n, (channels or {}).get(name, 3), height, width) for name in names}
    gate = torch.ones(n, height, width, dtype=torch.bool) if gated else None
    with recorded(target) as launches, Operations() as operations:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = gated_crf_loss(input, features, kernels, source=gate, destination=gate, impl="triton", **settings)
        torch.autograd.grad(loss, input)
    return launches, operations
