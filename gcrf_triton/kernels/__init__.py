"""The Triton kernels: copy what is constant, pack what a pixel brings into one record, multiply tiles by their halo.

product_i = sum_j S_ij v_j,    S_ij = k_ij (s_j d_i + s_i d_j) / 2    (S_ij = k_ij without gates),    j != i
k_ij = sum_m 2^(log2 w_m - x_m |i - j|^2 - sum_f (g_f,i - g_f,j)^2)    g_f: feature f times a factor of term m
"""

from .offsets import sum_offsets
from .packing import pack
from .preparing import prepare
from .tiles import sum_tile

__all__ = ["pack", "prepare", "sum_offsets", "sum_tile"]
