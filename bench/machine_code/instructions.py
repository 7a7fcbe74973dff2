"""What the Triton kernels become: launches recorded without a GPU, compiled for a target, instructions counted."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.measuring.cases import RGB_XY
from gcrf_triton import op
from gcrf_triton.tuning import Config, use_config

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# Which unit of an NVIDIA multiprocessor executes an instruction, by how its name begins. Integer multiply-adds and
# halves share the FMA pipe with float32; comparisons, selections and conversions to halves go with integers. What is
# not here (branches, constants, what a warp's threads have in common) is only issued.
UNITS = {
    "tensor": ("HMMA", "IMMA", "DMMA", "HGMMA"),
    "exp2": ("MUFU.EX2",),
    "special": ("MUFU", "I2F.", "F2I", "F2F.", "FRND"),
    "memory": ("LDG.", "LDGSTS", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "MOVM", "LDL", "STL", "ATOM", "RED"),
    "fma": ("FADD", "FMUL", "FFMA", "IMAD", "IMUL", "HADD2", "HMUL2", "HFMA2"),
    "alu": (
        *("IADD", "LOP", "SHF", "SHL", "SHR", "LEA", "ISETP", "IMNMX", "VIMNMX", "IABS", "VIADD", "PRMT", "SEL", "MOV"),
        *("FSETP", "FSEL", "FSET", "FMNMX", "FCHK", "F2FP", "I2FP", "HSETP2", "HMNMX2", "PLOP", "P2R", "R2P"),
        *("FLO", "POPC", "BMSK", "SGXT", "CS2R"),
    ),
}
KINDS = (*UNITS, "other")


@dataclasses.dataclass
class Launch:
    """A kernel, its grid and its arguments, recorded instead of launched."""

    kernel: Any
    grid: tuple[int, ...]
    positional: tuple[Any, ...]
    keywords: dict[str, Any]


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
    from gcrf_triton.checks import parse_kernels
    from gcrf_triton.op import accumulation_dtype

    names, weights, sigmas = parse_kernels("kernels", kernels)
    n, _, height, width = shape
    input = torch.empty(*shape, dtype=dtype, device="meta")
    wide = accumulation_dtype(dtype)
    features = [
        torch.empty(n, (channels or {}).get(name, 3), height, width, dtype=wide, device="meta") for name in names
    ]
    mask = torch.empty(n, height, width, dtype=torch.bool, device="meta") if gated else None
    gate = None if mask is None else mask.to(wide)
    pairs = (features, gate, gate, weights, sigmas, radius)
    with recorded(target) as launches, contextlib.nullcontext() if config is None else use_config(config):
        if not tiles:
            triton_engine._sum_offsets(input.to(wide), *pairs)
        elif triton_engine.fits(input, shape[1] + (not from_logits), features, sigmas):
            result = torch.empty_like(input) if gradient else input.new_empty(0)
            pairs = (features, mask, mask, weights, sigmas, radius)
            triton_engine.potts_energy(input, *pairs, True, from_logits, result, 1.0)
        else:
            triton_engine.apply_pairwise([input.to(wide)], *pairs)
    return launches


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Context in which tensors of any device are taken for a target's, and launches are only noted."""
    from gcrf_triton import checks, loss, triton_engine
    from gcrf_triton import kernels as module

    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *positional, **keywords: launches.append(Launch(self.kernel, grid, positional, keywords))

    with contextlib.ExitStack() as stack:
        for name in ("prepare", "pack", "sum_tile", "sum_offsets"):
            stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name))))
        stack.enter_context(mock.patch.object(triton_engine, "device_and_arch", lambda device: (target, target)))
        stack.enter_context(mock.patch.object(triton_engine, "unavailable", lambda device: None))
        for place in (checks, loss, op):
            stack.enter_context(mock.patch.object(place, "readable", lambda tensor: False))
        yield launches


def specialised(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and attributes of a launch's arguments: what Triton tells compiled kernels apart by."""
    arguments = dict(zip(launch.kernel.arg_names, launch.positional, strict=False)) | launch.keywords
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif parameter.do_not_specialize:
            signature[parameter.name] = _width(value)
        else:
            signature[parameter.name] = _type(value, (place,), constants, attributes)
    return signature, constants, attributes


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a recorded launch for a target, specialised as at a real launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: launch.keywords[name] for name in ("num_warps", "num_stages") if name in launch.keywords}
    number = target.removeprefix("sm_")
    gpu = (
        GPUTarget("cuda", int(number), 32)
        if number != target
        else GPUTarget("hip", target, 64 - 32 * ("gfx1" in target))
    )
    return triton.compile(ASTSource(launch.kernel, *specialised(launch)), target=gpu, options=options)


def _type(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    # what Triton specialises an argument on: its type, divisibility by 16, and the integer 1
    names = {
        torch.uint8: "u8",
        torch.float64: "fp64",
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
    }
    if isinstance(value, Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + names[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(item, (*path, place), constants, attributes) for place, item in enumerate(value))
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return _width(value)


def _width(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@dataclasses.dataclass(frozen=True)
class Code:
    """A compiled kernel: what a program of it takes, and the warp instructions of all its programs a pixel.

    `inside` its loops (where the steps are written out, from the first exp2 to the last) and `outside`, by KINDS, which
    are empty where they cannot be counted; `transfer_bytes`, what loads and stores move a pixel, were every thread to
    move its own; `multiply_adds`, those of tensor cores a pixel.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    inside: Mapping[str, float] = dataclasses.field(default_factory=dict)
    outside: Mapping[str, float] = dataclasses.field(default_factory=dict)
    transfer_bytes: float = 0.0
    global_bytes: float = 0.0  # of those, what goes to memory or its caches
    multiply_adds: float = 0.0
    loads: int = 0
    wide_loads: int = 0
    spills: float = 0.0  # of the instructions, those that store or load what registers do not hold

    @property
    def instructions(self) -> float:
        return sum(self.inside.values()) + sum(self.outside.values())


def count_instructions(launches: Sequence[Launch], pixels: int, target: str) -> Code:
    """Compile the launches of one kernel, which are alike, and count what they execute for so many pixels."""
    launch = launches[0]
    compiled = compile_launch(launch, target)
    name, num_warps = launch.kernel.fn.__name__, launch.keywords.get("num_warps", 4)
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]

        def field(label: str) -> int:
            return sum(int(number) for number in re.findall(rf"\.{label}:\s+(\d+)", assembly))

        spilled, shared = field("private_segment_fixed_size"), field("group_segment_fixed_size")
        return Code(name, field("vgpr_count"), spilled, shared, num_warps)
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        text = _tool("nvdisasm", "-c", "--no-dataflow", cubin)  # the analysis of branches takes a quarter of it
    registers, stack = (int(re.search(rf"{label}:(\d+)", usage)[1]) for label in ("REG", "STACK"))  # type: ignore[index]
    instructions, trips, inside = _executed(text, launch)
    warps = num_warps * sum(math.prod(each.grid) for each in launches) / pixels
    counts = {True: collections.Counter(), False: collections.Counter()}  # type: ignore[var-annotated]
    transferred = global_bytes = multiply_adds = spills = 0.0
    for instruction, times, within in zip(instructions, trips, inside, strict=True):
        counts[within][_kind(instruction)] += times * warps
        spills += times * warps * instruction.startswith(("STL", "LDL"))
        transferred += times * warps * _transfer_bytes(instruction)
        global_bytes += times * warps * _transfer_bytes(instruction) * instruction.startswith(("LDG", "STG"))
        if shape := re.match(r"HMMA\.(16|8)(8)(\d+)\.", instruction):  # rows, columns, depth
            multiply_adds += times * warps * math.prod(map(int, shape.groups()))
    loads = [instruction for instruction in instructions if instruction.startswith(("LDG.", "LDGSTS."))]
    wide = sum(".128" in instruction for instruction in loads)
    memory = (registers, stack, compiled.metadata.shared)
    by_kind = [{kind: counts[within][kind] for kind in KINDS} for within in (True, False)]
    return Code(name, *memory, num_warps, *by_kind, transferred, global_bytes, multiply_adds, len(loads), wide, spills)


def _tool(name: str, *arguments: Any) -> str:
    import triton

    (path,) = list(pathlib.Path(triton.__file__).parent.rglob(name))[:1]
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _kind(instruction: str) -> str:
    return next((kind for kind, names in UNITS.items() if instruction.startswith(names)), "other")


def _transfer_bytes(instruction: str) -> float:
    # of a warp's load, store or exchange of 32, 64 or 128 bits a thread, or of 1, 2 or 4 matrices of 8 x 8 halves
    if _kind(instruction) != "memory":
        return 0.0
    name = instruction.split()[0]
    if matrices := re.fullmatch(r"(?:LDSM|STSM).*?(?:\.([24]))?", name):
        return 128.0 * int(matrices[1] or 1)
    bits = re.search(r"\.(64|128)\b", name)
    return 4.0 * int(bits[1]) if bits else 128.0


def _executed(text: str, launch: Launch) -> tuple[list[str], list[float], list[bool]]:
    # machine instructions, how often a warp executes each, and whether it is inside the main loop
    instructions: list[str] = []
    labels: dict[str, int] = {}
    early_ends: list[int] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\d+ )?(\S+)(.*);", line):
            if instruction[1] and instruction[2] == "EXIT":
                early_ends.append(len(instructions))
            instructions.append(instruction[2] + instruction[3])
    loops, skips = [], []
    for place, instruction in enumerate(instructions):
        jump = re.search(r"\((\.L_x_\d+)\)", instruction)
        if not instruction.startswith("BRA") or jump is None or jump[1] not in labels:
            continue
        target = labels[jump[1]]
        if target == place:  # what fills up the end of a kernel
            instructions[place] = "NOP"
        elif target < place:
            loops.append((target, place))
        else:
            skips.append((place, target))
    # What only images need whose features span too much is left out: a loop of `sum_tile` that is jumped over, and what
    # `pack` does where it could have ended.
    rare = [skip for skip in skips if any(skip[0] < first and last < skip[1] for first, last in loops)]
    rare = rare if launch.kernel.fn.__name__ == "sum_tile" else []
    if launch.kernel.fn.__name__ == "pack" and early_ends:
        rare.append((early_ends[0], len(instructions)))
    for start, target in rare:
        instructions[start + 1 : target] = ["NOP"] * (target - start - 1)
        loops = [loop for loop in loops if not start < loop[0] < target]
    depths = [sum(first <= place <= last for first, last in loops) for place in range(len(instructions))]
    trips = _trips(launch, instructions, loops, depths)
    powers = [place for place, instruction in enumerate(instructions) if instruction.startswith("MUFU.EX2")]
    straight = not loops and launch.kernel.fn.__name__ == "sum_tile" and bool(powers)
    executed = [place for place, instruction in enumerate(instructions) if not instruction.startswith("NOP")]
    return (
        [instructions[place] for place in executed],
        [trips[place] for place in executed],
        [powers[0] <= place <= powers[-1] if straight else depths[place] > 0 for place in executed],
    )


def _trips(
    launch: Launch, instructions: Sequence[str], loops: Sequence[tuple[int, int]], depths: Sequence[int]
) -> list[float]:
    # how often each instruction is executed, by how many loops deep it is
    name, keywords = launch.kernel.fn.__name__, launch.keywords
    deepest = max(depths, default=0)
    if name == "sum_offsets":
        # rows and columns of the window, then channels, which compilers write out
        window = 2 * keywords["RADIUS"] + 1
        by_depth = [1, window, window**2, *[3 * window**2] * (deepest - 2)]
    elif name == "prepare":
        arguments = dict(zip(launch.kernel.arg_names, launch.positional, strict=False))
        steps = -(-arguments["height"] * arguments["width"] // (launch.grid[1] * keywords["PIXELS"]))
        by_depth = [1, steps, *[steps * keywords["COUNT"]] * (deepest - 1)]
    else:
        by_depth = [1] * (deepest + 1)
    trips: list[float] = [by_depth[depth] for depth in depths]
    if name == "sum_tile" and loops:
        _walk(trips, keywords, instructions, loops)
    return trips


def _walk(
    trips: list[float], keywords: Mapping[str, Any], instructions: Sequence[str], loops: Sequence[tuple[int, int]]
) -> None:
    # How often the loops of `sum_tile` through the halo run: three of rows in one of chunks, as far as compilers leave
    # them. What a loop holds is known by its products, so many a step; what is written out leaves it fewer steps.
    radius, tile_y = keywords["RADIUS"], keywords["TILE_Y"]
    values = sum(keywords["BLOCKS"]) // 8 * (3 if keywords["SPLIT"] else 1)
    products = keywords["PIXELS"] // 16 // keywords["num_warps"] or 1
    products *= 4 * keywords["N_SETS"] + 2 * keywords["GATED"] + values
    inner = [
        loop
        for loop in loops
        if not any(loop[0] <= other[0] and other[1] <= loop[1] and other != loop for other in loops)
    ]
    chunks = -(-(keywords["TILE_X"] + 2 * radius) // 16)
    outer = [loop for loop in loops if loop not in inner]
    for first, last in outer:
        trips[first : last + 1] = [chunks] * (last + 1 - first)
    held = [sum(each.startswith("HMMA") for each in instructions[first:last]) / products for first, last in inner]
    rows = [count for count in (radius, tile_y, radius) if count > 1]
    if len(rows) == len(inner):
        times = [count / each for count, each in zip(rows, held, strict=True)]
    else:
        written_out = sum(instruction.startswith("HMMA") for instruction in instructions) / products - sum(held)
        left = tile_y + 2 * radius - int(written_out)
        times = [left / sum(held)] * len(inner)
    for (first, last), count in zip(inner, times, strict=True):
        trips[first : last + 1] = [count * (chunks if outer else 1)] * (last + 1 - first)


def bytes_per_pixel(launches: Sequence[Launch]) -> dict[str, float]:
    """Bytes a pixel that the launches move between memory and GPU, counted from the sizes of their tensors.

    "inputs" and "outputs" of the kernels, the copy of what is constant among both; "record", which is written and read.
    """
    arguments = {}
    for launch in launches:
        named = dict(zip(launch.kernel.arg_names, launch.positional, strict=False))
        arguments.setdefault(launch.kernel.fn.__name__, (named, launch.keywords))
    (first, flags), (packed, keywords), (tile, _) = (arguments[name] for name in ("prepare", "pack", "sum_tile"))
    pixels = first["height"] * first["width"]

    def bytes_of(tensor: Tensor) -> float:
        return math.prod(tensor.shape[1:]) / pixels * tensor.element_size()

    given = [*first["features"], *(first[name] for name in ("source", "destination") if flags[name.upper()])]
    inputs = [*given, packed["constants"], packed["values"]]
    outputs = [packed["constants"], *[tile["result"]] * (tile["result"].dim() == 4)]
    sums = [sum(map(bytes_of, tensors)) for tensors in (inputs, outputs)]
    return {"inputs": sums[0], "outputs": sums[1], "record": 2.0 * keywords["RECORD"]}


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
    from gcrf_triton import gated_crf_loss
    from gcrf_triton.checks import parse_kernels

    n, _, height, width = shape
    input = torch.zeros(*shape, dtype=dtype, requires_grad=True)
    names, _, _ = parse_kernels("kernels", kernels)
    features = {name: torch.zeros(n, (channels or {}).get(name, 3), height, width) for name in names}
    gate = torch.ones(n, height, width, dtype=torch.bool) if gated else None
    with recorded(target) as launches, Operations() as operations:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = gated_crf_loss(input, features, kernels, source=gate, destination=gate, impl="triton", **settings)
        torch.autograd.grad(loss, input)
    return launches, operations
