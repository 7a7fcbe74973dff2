"""The loss by PyTorch's FlexAttention: what it does on a GPU, with no kernel of one's own.

    sum_j k_ij v_j = out_i exp(lse_i)      with log k_ij as score, the window as mask, and v as values

Blocks of queries and keys are tiles of pixels, so that a window lies in few of them. One pass gives loss and gradient,
as the operator is symmetric; the backward of FlexAttention, which would do more, is not called.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from bench.measuring.cases import Case

TILE_Y, TILE_X = 8, 16  # pixels of a block
BLOCK = TILE_Y * TILE_X
HEAD = 16  # channels of queries, keys and values, at the least


class FlexEnergy(torch.autograd.Function):
    """`FlexEnergy.apply(p, image, case, source, destination)`: energy of p [N, C, H, W], gates [N, H, W] or None."""

    @staticmethod
    def forward(ctx, p: Tensor, image: Tensor, case: Case, source: Tensor | None, destination: Tensor | None) -> Tensor:
        if source is None and destination is None:
            sums, mass = pairwise_sums(p, image, case)
            energies, gradient = mass - (p * sums).sum(1, keepdim=True), -2 * sums
        else:
            # gates of 0 and 1, in the dtype of p: float32 ones would make the products those of float32
            s, d = (
                torch.ones_like(p[:, :1]) if gate is None else gate[:, None].to(p) for gate in (source, destination)
            )
            sums, _ = pairwise_sums(torch.cat([s * p, d * p, s], dim=1), image, case)
            by_source, by_destination, mass = sums.split([p.shape[1], p.shape[1], 1], dim=1)
            energies = d * (mass - (p * by_source).sum(1, keepdim=True))
            gradient = -(d * by_source + s * by_destination)
        ctx.save_for_backward(gradient)
        ctx.dtype = p.dtype
        return energies.sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ((grad * ctx.saved_tensors[0]).to(ctx.dtype), *[None] * 4)


def pairwise_sums(columns: Tensor, image: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """sum_j k_ij v_j of columns v [N, V, H, W], and sum_j k_ij [N, 1, H, W]; at least in float32."""
    n, count, height, width = columns.shape
    tiles = -(-height // TILE_Y), -(-width // TILE_X)
    channels = [channel.contiguous() for channel in to_tiles(image, tiles).unbind(1)]  # [N, L] each
    values = to_tiles(columns, tiles).transpose(1, 2)[:, None]  # [N, 1, L, V]
    values = torch.nn.functional.pad(values, (0, max(HEAD - count, 0)))
    query, key = (values.new_zeros(n, 1, values.shape[2], HEAD) for _ in range(2))  # score nothing

    def log_kernel(score: Tensor, image: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        colours = sum((channel[image, i] - channel[image, j]).square() for channel in channels)
        (y_i, x_i), (y_j, x_j) = position(i, tiles[1]), position(j, tiles[1])
        squares = {"rgb": colours, "xy": ((y_i - y_j) * (y_i - y_j) + (x_i - x_j) * (x_i - x_j)).to(colours.dtype)}
        exponents = []
        for kernel in case.kernels:
            terms = [squares[name] / (-2 * sigma**2) for name, sigma in kernel.items() if name != "weight"]
            exponents.append(math.log(kernel["weight"]) + sum(terms))
        return score + (torch.log(sum(map(torch.exp, exponents))) if len(exponents) > 1 else exponents[0])

    attend = compiled_attention("eager" if columns.device.type == "cpu" else "inductor")
    mask = window(height, width, case.radius, columns.device)
    settings = {"score_mod": log_kernel, "block_mask": mask, "scale": 1.0, "return_aux": AuxRequest(lse=True)}
    out, auxiliary = attend(query, key, values, **settings)
    mass = auxiliary.lse.exp()  # [N, 1, L]; 0 where a window is empty
    sums = (out[..., :count] * mass[..., None]).where(mass[..., None] > 0, 0.0)
    return from_tiles(sums[:, 0].transpose(1, 2), tiles, height, width), from_tiles(mass, tiles, height, width)


@functools.cache
def compiled_attention(backend: str):
    return torch.compile(flex_attention, dynamic=False, backend=backend)


def to_tiles(image: Tensor, tiles: tuple[int, int]) -> Tensor:
    """[N, V, H, W] -> [N, V, L], tile after tile, with zeros beyond the image."""
    bottom, right = tiles[0] * TILE_Y - image.shape[2], tiles[1] * TILE_X - image.shape[3]
    padded = torch.nn.functional.pad(image, (0, right, 0, bottom))
    return padded.unflatten(3, (-1, TILE_X)).unflatten(2, (-1, TILE_Y)).transpose(3, 4).flatten(2)


def from_tiles(flat: Tensor, tiles: tuple[int, int], height: int, width: int) -> Tensor:
    """[N, V, L] -> [N, V, H, W], the inverse."""
    image = flat.unflatten(2, (tiles[0], tiles[1], TILE_Y, TILE_X)).transpose(3, 4)
    return image.flatten(4).flatten(2, 3)[:, :, :height, :width]


def position(pixel: Tensor, tiles_x: int) -> tuple[Tensor, Tensor]:
    """y and x of what lies at a place of L."""
    tile, inside = pixel // BLOCK, pixel % BLOCK
    return tile // tiles_x * TILE_Y + inside // TILE_X, tile % tiles_x * TILE_X + inside % TILE_X


@functools.lru_cache(maxsize=4)
def window(height: int, width: int, radius: int, device: torch.device) -> BlockMask:
    """Pairs of different pixels of the image within a window, and the tiles they lie in."""
    tiles_y, tiles_x = -(-height // TILE_Y), -(-width // TILE_X)

    def meet(image: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        (y_i, x_i), (y_j, x_j) = position(i, tiles_x), position(j, tiles_x)
        near = ((y_i - y_j).abs() <= radius) & ((x_i - x_j).abs() <= radius) & (i != j)
        return near & (y_i < height) & (y_j < height) & (x_i < width) & (x_j < width)

    reach_y, reach_x = -(-radius // TILE_Y), -(-radius // TILE_X)
    y = (
        torch.arange(tiles_y, device=device)[:, None, None, None]
        + torch.arange(-reach_y, reach_y + 1, device=device)[:, None]
    )
    x = torch.arange(tiles_x, device=device)[:, None, None] + torch.arange(-reach_x, reach_x + 1, device=device)
    exist = ((y >= 0) & (y < tiles_y) & (x >= 0) & (x < tiles_x)).flatten(0, 1).flatten(1)  # [tiles, neighbours]
    neighbours = (y * tiles_x + x).flatten(0, 1).flatten(1)
    order = exist.int().argsort(dim=1, descending=True, stable=True)
    neighbours = neighbours.where(exist, 0).gather(1, order).int()
    counts = exist.sum(1).int()
    length = tiles_y * tiles_x * BLOCK
    return BlockMask.from_kv_blocks(
        counts[None, None],
        neighbours[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=meet,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )
