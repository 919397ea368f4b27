"""How MKL divides a product among its threads.

MKL cuts the output of ``x W^T`` by itself, on some processors along the rows of x: each thread then lays out the whole
weight for itself, which with few rows takes as long as the multiplication. Cut along the columns, each lays out a part of
it. (The setting is `MKL_NUM_STRIPES` in oneMKL's developer guide, "partitions along the leading dimension of the output
matrix".) It is of the whole process, so it is set for one product and set back; a product of another thread meanwhile may
be cut the same way, which changes no value.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _stripes() -> tuple[Any, Any] | None:
    """MKL's functions that get and set the number of cuts; None in a torch without them."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        library = ctypes.CDLL(torch._C.__file__)  # its symbols and those of what it is linked to
        get, put = library.mkl_serv_get_num_stripes, library.mkl_serv_set_num_stripes
    except (OSError, AttributeError):
        return None
    get.argtypes, get.restype, put.argtypes, put.restype = [], ctypes.c_int, [ctypes.c_int], None
    return get, put


def takes_stripes() -> bool:
    """Whether MKL can be told how to cut a product, and has threads to cut it for."""
    return torch.get_num_threads() > 1 and _stripes() is not None


def striped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` by torch, MKL cutting it along its columns: one part for each thread."""
    functions = _stripes()
    if functions is None:
        return F.linear(x, weight, bias)
    get, put = functions
    before = get()
    put(torch.get_num_threads())
    try:
        return F.linear(x, weight, bias)
    finally:
        put(max(before, 0))  # 0 and below: as MKL decides; it takes no numbers below
