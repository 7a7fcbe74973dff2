"""What a compiled kernel takes: registers, memory, and the instructions that its warps execute."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from bench.machine_code.compiling import compile_launch
from bench.machine_code.recording import Launch
from gcrf_triton.constants import KEYS

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
    name, num_warps = launch.kernel.fn.__name__, launch.constants.get("num_warps", 4)
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
    name, constants = launch.kernel.fn.__name__, launch.constants
    deepest = max(depths, default=0)
    if name == "sum_offsets":
        # rows and columns of the window, then channels, which compilers write out
        window = 2 * constants["RADIUS"] + 1
        by_depth = [1, window, window**2, *[3 * window**2] * (deepest - 2)]
    elif name == "prepare":
        pixels = launch.arguments["height"] * launch.arguments["width"]
        steps = -(-pixels // (launch.grid[1] * constants["PIXELS"]))
        by_depth = [1, steps, *[steps * constants["SCANNED"]] * (deepest - 1)]
    else:
        by_depth = [1] * (deepest + 1)
    trips: list[float] = [by_depth[depth] for depth in depths]
    if name == "sum_tile" and loops:
        _walk(trips, constants, instructions, loops)
    return trips


def _walk(
    trips: list[float], constants: Mapping[str, Any], instructions: Sequence[str], loops: Sequence[tuple[int, int]]
) -> None:
    # How often the loops of `sum_tile` through the halo run: three of rows in one of chunks, as far as compilers leave
    # them. What a loop holds is known by its products, so many a step; what is written out leaves it fewer steps.
    radius, tile_y = constants["RADIUS"], constants["TILE_Y"]
    values = sum(constants["BLOCKS"]) // 8 * (3 if constants["SPLIT"] else 1)
    products = constants["PIXELS"] // 16 // constants["num_warps"] or 1
    products *= 4 * constants["N_SETS"] + 2 * constants["GATED"] + values
    inner = [
        loop
        for loop in loops
        if not any(loop[0] <= other[0] and other[1] <= loop[1] and other != loop for other in loops)
    ]
    chunks = -(-(constants["TILE_X"] + 2 * radius) // KEYS)
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
