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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases import RGB_XY
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
    from gcrf_triton import kernels as module
    from gcrf_triton import triton_engine
    from gcrf_triton.loss import parse_kernels
    from gcrf_triton.op import accumulation_dtype

    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *positional, **keywords: launches.append(Launch(self.kernel, grid, positional, keywords))

    names, weights, sigmas = parse_kernels(kernels)
    n, _, height, width = shape
    input = torch.empty(*shape, dtype=dtype, device="meta")
    wide = accumulation_dtype(dtype)
    features = [
        torch.empty(n, (channels or {}).get(name, 3), height, width, dtype=wide, device="meta") for name in names
    ]
    gate = torch.empty(n, height, width, dtype=wide, device="meta") if gated else None
    pairs = (features, gate, gate, weights, sigmas, radius)
    originals = {name: getattr(module, name) for name in ("pack", "sum_tile", "sum_offsets")}
    find_arch = triton_engine.device_and_arch
    try:
        triton_engine.device_and_arch = lambda device: (target, target)
        for name, kernel in originals.items():
            setattr(module, name, Recorder(kernel))
        with contextlib.nullcontext() if config is None else use_config(config):
            if not tiles:
                triton_engine._sum_offsets(input.to(wide), *pairs)
            elif triton_engine.fits(input, shape[1] + (not from_logits), features, sigmas):
                result = torch.empty_like(input) if gradient else input.new_empty(0)
                triton_engine.potts_energy(input, *pairs, from_logits, result)
            else:
                triton_engine.apply_pairwise([input.to(wide)], *pairs)
    finally:
        triton_engine.device_and_arch = find_arch
        for name, kernel in originals.items():
            setattr(module, name, kernel)
    return launches


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a recorded launch for a target, specialised as at a real launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: launch.keywords[name] for name in ("num_warps", "num_stages") if name in launch.keywords}
    names = launch.kernel.arg_names
    arguments = dict(zip(names, launch.positional, strict=False))
    arguments |= {name: value for name, value in launch.keywords.items() if name not in options}
    constant = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for place, name in enumerate(names):
        value = arguments[name]
        if name in constant:
            signature[name], constants[(place,)] = "constexpr", value
        else:
            signature[name] = _type(value, (place,), constants, attributes)
    number = target.removeprefix("sm_")
    gpu = (
        GPUTarget("cuda", int(number), 32)
        if number != target
        else GPUTarget("hip", target, 64 - 32 * ("gfx1" in target))
    )
    return triton.compile(ASTSource(launch.kernel, signature, constants, attributes), target=gpu, options=options)


def _type(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    # what Triton specialises an argument on: its type, divisibility by 16, and the integer 1
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if isinstance(value, Tensor):
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
        text = _tool("nvdisasm", "-c", cubin)
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


def _executed(text: str, launch: Launch) -> tuple[list[str], list[int], list[bool]]:
    # machine instructions, how often a warp executes each, and whether it is inside the main loop
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(\S+)(.*);", line):
            instructions.append(instruction[1] + instruction[2])
    loops = []
    for place, instruction in enumerate(instructions):
        jump = re.search(r"\((\.L_x_\d+)\)", instruction)
        if instruction.startswith("BRA") and jump and labels.get(jump[1], math.inf) <= place:
            if labels[jump[1]] == place:  # what fills up the end of a kernel
                instructions[place] = "NOP"
            else:
                loops.append((labels[jump[1]], place))
    depths = [sum(first <= place <= last for first, last in loops) for place in range(len(instructions))]
    trips = _trips(launch, max(depths, default=0))
    powers = [place for place, instruction in enumerate(instructions) if instruction.startswith("MUFU.EX2")]
    straight = not loops and launch.kernel.fn.__name__ == "sum_tile" and bool(powers)
    executed = [place for place, instruction in enumerate(instructions) if not instruction.startswith("NOP")]
    return (
        [instructions[place] for place in executed],
        [trips[depths[place]] for place in executed],
        [powers[0] <= place <= powers[-1] if straight else depths[place] > 0 for place in executed],
    )


def _trips(launch: Launch, deepest: int) -> list[int]:
    # how often what is so many loops deep is executed
    radius = launch.keywords["RADIUS"]
    if launch.kernel.fn.__name__ == "sum_offsets":
        # rows and columns of the window, then channels, which compilers write out
        window = 2 * radius + 1
        return [1, window, window**2, *[3 * window**2] * (deepest - 2)]
    if not deepest:
        return [1]
    rows, chunks = launch.keywords["TILE_Y"] + 2 * radius, -(-(launch.keywords["TILE_X"] + 2 * radius) // 16)
    return [1, chunks, chunks * rows] if deepest == 2 else [1, rows]


def bytes_per_pixel(launches: Sequence[Launch]) -> dict[str, float]:
    """Bytes a pixel that the launches move between memory and GPU, counted from the sizes of their tensors."""
    first = next(launch for launch in launches if launch.kernel.fn.__name__ == "pack")
    tile = next(launch for launch in launches if launch.kernel.fn.__name__ == "sum_tile")
    packed = dict(zip(first.kernel.arg_names, first.positional, strict=False))
    result = dict(zip(tile.kernel.arg_names, tile.positional, strict=False))["result"]

    def bytes_of(tensor: Tensor) -> float:
        return math.prod(tensor.shape[1:]) / math.prod(tensor.shape[-2:]) * tensor.element_size()

    inputs = bytes_of(packed["values"]) + sum(map(bytes_of, packed["features"]))
    if first.keywords["GATED"]:
        inputs += 2 * packed["source"].element_size()
    outputs = bytes_of(result) if result.dim() == 4 else 0.0
    return {"inputs": inputs, "record": 2.0 * first.keywords["RECORD"], "outputs": outputs}
