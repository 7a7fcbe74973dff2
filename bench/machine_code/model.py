"""A model of a multiprocessor: the clocks a pixel that each of its units needs for compiled kernels, if none waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.machine_code.compiling import TARGETS
from bench.machine_code.instructions import KINDS, Code, count_instructions
from bench.machine_code.recording import Launch, bytes_per_pixel, record_launches, record_step
from bench.measuring.cases import RGB_XY
from gcrf_triton import tuning
from gcrf_triton.checks import parse_kernels
from gcrf_triton.planning import LIMITS, describe
from gcrf_triton.problem import Energy, Problem, Window

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
SIZE = (512, 512)  # pixels of the image


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a target's multiprocessor does a clock, from NVIDIA's programming guide, and a device, from its data sheet.

    `fma` and `alu` are lanes; `tensor` are multiply-adds of halves, summed in float32, at the data sheet's peak.
    """

    device: str
    multiprocessors: int
    gigahertz: float
    bandwidth: float  # GB/s
    cache: int  # MiB of L2
    warps: int  # resident at most
    programs: int
    shared: int  # KiB
    fma: int
    tensor: int
    alu: int = 64
    special: int = 16
    transfer: int = 128  # bytes between registers and first-level cache or shared memory
    issue: int = 4  # warp instructions

    @property
    def bytes_a_clock(self) -> float:
        return self.bandwidth / self.multiprocessors / self.gigahertz


MACHINES = {
    "sm_75": Machine("T4", 40, 1.59, 320, 4, 32, 16, 64, 64, 512, transfer=64),
    "sm_80": Machine("A100 SXM 80 GB", 108, 1.41, 2039, 40, 64, 32, 164, 64, 1024),
    "sm_86": Machine("RTX 3090", 82, 1.695, 936, 6, 48, 16, 100, 128, 256),
    "sm_89": Machine("RTX 4090", 128, 2.52, 1008, 72, 48, 24, 100, 128, 256),
    "sm_90": Machine("H100 SXM", 132, 1.83, 3350, 50, 64, 32, 228, 128, 2048),
    "sm_100": Machine("B200", 148, 1.86, 8000, 126, 64, 32, 228, 128, 2048),
    "sm_120": Machine("RTX 5090", 170, 2.41, 1792, 96, 48, 24, 100, 128, 256),
}
# bytes of shared memory a program may have, from NVIDIA's and AMD's programming guides
SHARED = dict(zip(TARGETS, (65536, 166912, 101376, 101376, 232448, 232448, 101376, 65536, 65536), strict=True))
CLOCKS = ("issue", "fma", "alu", "special", "memory", "tensor", "dram")
FIELDS = [
    *("target", "device", "dtype", "classes", "radius", "gates", "config", "kernel"),
    *("registers", "spilled_bytes", "spills", "shared_bytes", "occupancy", "loads", "wide_loads", "global_bytes"),
    *(f"{kind}_{place}" for place in ("inside", "outside") for kind in KINDS),
    "instructions",
    *(f"{unit}_clocks" for unit in CLOCKS),
    *("bound_clocks", "bound_by", "bytes", "bytes_with_records", "unfold_bytes", "launches"),
]


def occupancy(code: Code, machine: Machine) -> float:
    """Share of the resident warps that registers, shared memory and the number of programs leave room for."""
    per_warp = -(-code.registers * 32 // 256) * 256
    by_registers = 16384 // per_warp * 4 // code.num_warps  # a warp's lie in one of four parts
    shared = code.shared_bytes + (1024 if machine.shared > 64 else 0)  # the system keeps 1 KiB of every program's
    programs = min(machine.programs, machine.warps // code.num_warps, by_registers)
    programs = min(programs, machine.shared * 1024 // shared) if shared else programs
    return programs * code.num_warps / machine.warps


def unit_clocks(codes: Sequence[Code], machine: Machine) -> dict[str, float]:
    """Clocks a pixel that each unit of a multiprocessor needs for kernels, one after another."""
    counts = {kind: sum(code.inside[kind] + code.outside[kind] for code in codes) for kind in KINDS}
    return {
        "issue": sum(counts.values()) / machine.issue,
        "fma": counts["fma"] * 32 / machine.fma,
        "alu": counts["alu"] * 32 / machine.alu,
        "special": (counts["exp2"] + counts["special"]) * 32 / machine.special,
        "memory": sum(code.transfer_bytes for code in codes) / machine.transfer,
        "tensor": sum(code.multiply_adds for code in codes) / machine.tensor,
    }


def rows_of(
    target: str,
    dtype: str = "float32",
    classes: int = 21,
    radius: int = 5,
    gates: bool = False,
    config: tuning.Config | None = None,
    kernels: Sequence[Mapping[str, float]] = RGB_XY,
    **problem: Any,
) -> list[dict[str, Any]]:
    """The rows of one loss and its gradient from logits: one a kernel, and one for the whole step.

    The step's clocks are the kernels'; its bytes and launches have those of PyTorch's operations around them too.
    """
    given = {name: value for name, value in problem.items() if name in ("channels", "from_logits")}
    given = {"from_logits": True} | given

    problem = {"shape": (1, classes, *SIZE), "dtype": DTYPES[dtype], "radius": radius, "gated": gates} | problem
    launches = record_launches(**problem, kernels=kernels, target=target, config=config)
    case = {"target": target, "dtype": dtype, "classes": classes, "radius": radius, "gates": "yes" if gates else "no"}
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel.fn.__name__, []).append(launch)
    case["config"] = _describe(by_kernel)
    n, _, height, width = problem["shape"]
    codes = [count_instructions(alike, n * height * width, target) for alike in by_kernel.values()]
    machine = MACHINES.get(target)
    rows = [case | _code_columns(code, machine) for code in codes]
    if machine and len(codes) > 1:
        described = {"kernels": kernels, **{name: problem[name] for name in ("shape", "dtype", "gated", "radius")}}
        step, operations = record_step(target, **described, **given)
        around = sum(operation.bytes for operation in operations.found) / (n * height * width)
        moved = bytes_per_pixel(launches)
        least = moved["inputs"] + moved["outputs"] + around
        # records come back from a cache that holds the workspace
        dram = least if machine.cache * 2**20 > LIMITS.workspace else least + 2 * moved["record"]
        clocks = unit_clocks(codes, machine) | {"dram": dram / machine.bytes_a_clock}
        together = case | _clock_columns(clocks) | {"kernel": "together", "device": machine.device, "bytes": least}
        together["instructions"] = sum(row["instructions"] for row in rows)
        together["launches"] = len(step) + len(operations.found)
        together["bytes_with_records"] = least + 2 * moved["record"]
        together["unfold_bytes"] = 4 * max(2 * classes, 3 * 5) * (2 * radius + 1) ** 2  # 3 colours and 2 coordinates
        rows.append(together)
    return rows


def gather_row(target: str, classes: int = 21, radius: int = 5) -> dict[str, Any]:
    """The row of `sum_offsets` on the same problem in float32: pairs offset by offset, without tiles."""
    shape = (1, classes, *SIZE)
    launches = record_launches(shape, radius=radius, target=target, tiles=False)
    code = count_instructions(launches, SIZE[0] * SIZE[1], target)
    case = {"target": target, "dtype": "float32", "classes": classes, "radius": radius, "gates": "no"}
    machine = MACHINES[target]
    return case | _code_columns(code, machine) | _clock_columns(unit_clocks([code], machine))


def fits(row: Mapping[str, Any]) -> bool:
    """Whether a kernel's loops run in registers, and in the shared memory that a program may have.

    NVIDIA's compiler sometimes sets 8 or 16 bytes aside over a loop and fetches them after it, which is no spill here:
    fewer than one in two hundred instructions.
    """
    small = row["spilled_bytes"] <= 16 and row.get("spills", 0.0) < 0.005 * row.get("instructions", 0.0)
    return (row["spilled_bytes"] == 0 or small) and row["shared_bytes"] <= SHARED[row["target"]]


def _code_columns(code: Code, machine: Machine | None) -> dict[str, Any]:
    columns: dict[str, Any] = {"kernel": code.kernel, "registers": code.registers, "spilled_bytes": code.spilled_bytes}
    columns["shared_bytes"] = code.shared_bytes
    if machine:
        places = {"inside": code.inside, "outside": code.outside}
        columns |= {f"{kind}_{place}": count for place, counts in places.items() for kind, count in counts.items()}
        columns |= {"device": machine.device, "loads": code.loads, "wide_loads": code.wide_loads}
        columns |= {"spills": code.spills, "global_bytes": code.global_bytes}
        columns |= {"occupancy": occupancy(code, machine), "instructions": code.instructions}
    return columns


def _clock_columns(clocks: Mapping[str, float]) -> dict[str, Any]:
    unit = max(clocks, key=clocks.__getitem__)
    columns: dict[str, Any] = {f"{name}_clocks": value for name, value in clocks.items()}
    return columns | {"bound_clocks": clocks[unit], "bound_by": unit}


def problem_key(
    target: str,
    dtype: str = "float32",
    classes: int = 21,
    radius: int = 5,
    gates: bool = False,
    kernels: Sequence[Mapping[str, float]] = RGB_XY,
    shape: Sequence[int] | None = None,
    channels: Mapping[str, int] | None = None,
) -> tuning.Key:
    """What the configuration of a problem is chosen by on a target."""
    from gcrf_triton import triton_engine

    names, terms = parse_kernels("kernels", kernels)
    n, _, *size = shape or (1, classes, *SIZE)
    logits = torch.empty(n, classes, *size, dtype=DTYPES[dtype], device="meta")
    features = [torch.empty(n, (channels or {}).get(name, 3), *size, device="meta") for name in names]
    gate = logits[:, 0] if gates else None
    description = describe(logits, Problem(features, terms, Window(radius), gate, gate), Energy(from_logits=True))
    return dataclasses.replace(triton_engine.problem_key(description, logits.device), device=target, arch=target)


def _describe(by_kernel: Mapping[str, Sequence[Launch]]) -> str:
    if "sum_tile" not in by_kernel:
        return ""
    pack, tile = by_kernel["pack"][0].constants, by_kernel["sum_tile"][0].constants
    stages = tile["num_stages"]
    steps = "unrolled" if tile["UNROLL"] else "looped" if stages == 1 else f"looped {stages} stages"
    return f"{tile['TILE_Y']}x{tile['TILE_X']} pack {pack['PIXELS']} {steps} {tile['num_warps']} warps"
