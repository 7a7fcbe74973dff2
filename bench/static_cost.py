"""`python -m bench.static_cost`: what the Triton kernels cost, from compilation alone. Needs Triton, but no GPU.

The launches of one loss and its gradient are recorded on tensors without memory, compiled for a target as Triton would
compile them there, and the instructions of the machine code counted: those that all warps execute, divided by the
pixels of the image. Clocks are a model, not a measurement: a streaming multiprocessor issues 4 warp instructions a
clock and computes 16 powers of two (so a warp's 32 take 2), whatever the latencies.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import itertools
import math
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# bytes of shared memory a program may have, from NVIDIA's and AMD's programming guides
SHARED = dict(zip(TARGETS, (65536, 166912, 101376, 101376, 232448, 232448, 101376, 65536, 65536), strict=True))
RGB_XY = ({"weight": 1.0, "xy": 6.0, "rgb": 0.1},)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


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
) -> list[Launch]:
    """The launches of one loss and its gradient, as they would be configured for a target."""
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
    find_arch = triton_engine._device_and_arch
    try:
        triton_engine._device_and_arch = lambda device: (target, target)
        for name, kernel in originals.items():
            setattr(module, name, Recorder(kernel))
        if triton_engine.fits(shape[1] + (not from_logits), dtype, features, sigmas):
            triton_engine.potts_energy(
                input, *pairs, from_logits, torch.empty_like(input) if gradient else input.new_empty(0)
            )
        else:
            triton_engine.apply_pairwise([input], *pairs)
    finally:
        triton_engine._device_and_arch = find_arch
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


@dataclasses.dataclass
class Cost:
    """What one launch costs on a target; counts are warp instructions a pixel, None where not counted."""

    kernel: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: float | None = None
    exp2: float | None = None
    tensor: float | None = None
    wide_loads: int | None = None
    loads: int | None = None


def measure(launches: Sequence[Launch], pixels: int, target: str) -> Cost:
    """Compile the launches of one kernel, which are alike, and count what they execute for so many pixels."""
    launch = launches[0]
    compiled = compile_launch(launch, target)
    name = launch.kernel.fn.__name__
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]

        def field(label: str) -> int:
            return sum(int(number) for number in re.findall(rf"\.{label}:\s+(\d+)", assembly))

        return Cost(
            name, target, field("vgpr_count"), field("private_segment_fixed_size"), field("group_segment_fixed_size")
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        code = _tool("nvdisasm", "-c", cubin)
    registers, stack = (int(re.search(rf"{label}:(\d+)", usage)[1]) for label in ("REG", "STACK"))  # type: ignore[index]
    cost = Cost(name, target, registers, stack, compiled.metadata.shared)
    if name == "sum_offsets":
        return cost  # loops over offsets: nothing to compare with a tile
    counts = _executed(code, launch)
    warps = launch.keywords.get("num_warps", 4) * sum(math.prod(each.grid) for each in launches)
    cost.instructions = warps * sum(counts.values()) / pixels
    cost.exp2 = warps * sum(count for name, count in counts.items() if name.startswith("MUFU.EX2")) / pixels
    cost.tensor = warps * sum(count for name, count in counts.items() if name.startswith("HMMA")) / pixels
    loads = [line for line in code.splitlines() if re.search(r"\bLDG(STS)?\b", line)]
    cost.loads, cost.wide_loads = len(loads), sum(".128" in line for line in loads)
    return cost


def _tool(name: str, *arguments: Any) -> str:
    import triton

    (path,) = list(pathlib.Path(triton.__file__).parent.rglob(name))[:1]
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _executed(code: str, launch: Launch) -> collections.Counter[str]:
    # machine instructions a warp executes, by name; loops are those of the halo, as often as its rows and chunks
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(\S+)(.*);", line):
            instructions.append(instruction[1] + instruction[2])
    loops = []
    for place, text in enumerate(instructions):
        target = re.search(r"\((\.L_x_\d+)\)", text)
        if text.startswith("BRA") and target and labels.get(target[1], math.inf) < place:
            loops.append((labels[target[1]], place))
    deepest = max((_depth(loops, place) for place in range(len(instructions))), default=0)
    counts: collections.Counter[str] = collections.Counter()
    for place, text in enumerate(instructions):
        target = re.search(r"\((\.L_x_\d+)\)", text)
        if text.startswith("NOP") or (target and labels.get(target[1]) == place):
            continue  # what fills up the end of a kernel
        counts[text.split()[0]] += _trips(launch, _depth(loops, place), deepest)
    return counts


def _depth(loops: Sequence[tuple[int, int]], place: int) -> int:
    return sum(first <= place <= last for first, last in loops)


def _trips(launch: Launch, depth: int, deepest: int) -> int:
    if not depth:
        return 1
    rows = launch.keywords["TILE_Y"] + 2 * launch.keywords["RADIUS"]
    chunks = -(-(launch.keywords["TILE_X"] + 2 * launch.keywords["RADIUS"]) // 16)
    return chunks if deepest == 2 and depth == 1 else rows * (chunks if deepest == 2 else 1)


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


def total(costs: Sequence[Cost]) -> dict[str, float]:
    """Modelled clocks a pixel and streaming multiprocessor of all launches together."""
    return {
        "issue_clocks": sum(cost.instructions or 0 for cost in costs) / 4,
        "exp2_clocks": sum(cost.exp2 or 0 for cost in costs) * 2,
    }


def rows_of(target: str, **problem: Any) -> list[dict[str, Any]]:
    """One row a kernel of a problem, and one for all of them, as the table has them."""
    launches = record_launches(**problem, target=target)
    shape, dtype = problem.get("shape", (1, 21, 512, 512)), problem.get("dtype", torch.float32)
    kernels: dict[str, list[Launch]] = {}
    for launch in launches:
        kernels.setdefault(launch.kernel.fn.__name__, []).append(launch)
    pixels = shape[0] * shape[2] * shape[3]
    costs = [measure(alike, pixels, target) for alike in kernels.values()]
    case = {
        "dtype": str(dtype).removeprefix("torch."),
        "classes": shape[1],
        "radius": problem.get("radius", 5),
        "gates": problem.get("gated", False),
    }
    rows = [case | dataclasses.asdict(cost) for cost in costs]
    if not target.startswith("gfx") and len(costs) > 1:
        moved = bytes_per_pixel(launches)
        together = {"kernel": "together", "target": target, **total(costs)}
        together["instructions"] = sum(cost.instructions or 0 for cost in costs)
        together["bytes"] = moved["inputs"] + moved["outputs"]
        together["bytes_with_records"] = together["bytes"] + 2 * moved["record"]
        rows.append(case | together)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.static_cost", description=str(__doc__).splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=TARGETS, metavar="TARGET")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=DTYPES)
    parser.add_argument("--classes", type=int, nargs="+", default=[21])
    parser.add_argument("--radius", type=int, nargs="+", default=[5])
    parser.add_argument("--gates", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--csv", help="write the rows to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    cases = itertools.product(options.targets, options.dtypes, options.classes, options.radius, options.gates)
    fields = ["target", "dtype", "classes", "radius", "gates", "kernel"]
    fields += [field.name for field in dataclasses.fields(Cost) if field.name not in fields]
    fields += ["issue_clocks", "exp2_clocks", "bytes", "bytes_with_records"]
    print("  ".join(f"{name[:12]:>12}" for name in fields))
    with contextlib.ExitStack() as stack:
        writer = None
        if options.csv:
            writer = csv.DictWriter(stack.enter_context(open(options.csv, "w", newline="")), fields)
            writer.writeheader()
        for target, dtype, classes, radius, gates in cases:
            shape = (1, classes, 512, 512)
            for row in rows_of(target, shape=shape, dtype=DTYPES[dtype], radius=radius, gated=gates == "yes"):
                print("  ".join(f"{_show(row.get(name)):>12}" for name in fields), flush=True)
                if writer:
                    writer.writerow({name: _show(row.get(name)) for name in fields})


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
