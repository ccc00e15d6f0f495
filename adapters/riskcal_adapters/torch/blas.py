"""Matrix products inside compiled loops: torch's own BLAS, called without torch.

A product of a few rows takes a few microseconds, and so does calling torch for it. Where torch's library does not show its
BLAS, scipy's is called.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding
from numba import njit, types
from numba.extending import get_cython_function_address

_NAME = "riskcal_sgemm"


def _address() -> int:
    """Of a single-precision product as Fortran calls it."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*")):
        try:
            found = ctypes.cast(ctypes.CDLL(str(library)).sgemm_, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        if found:
            return found
    return int(get_cython_function_address("scipy.linalg.cython_blas", "sgemm"))


# compiled code that was kept from an earlier process looks the address up by this name
binding.add_symbol(_NAME, _address())
_types: Any = types
# sizes have 8 bytes, of which a library that counts in 32 bits reads the first four: the same number on a little-endian machine
_CHARS, _SIZES = _types.CPointer(types.uint8), _types.CPointer(types.int64)
_FLOATS = _types.CPointer(types.float32)
_sgemm: Any = _types.ExternalFunction(
    _NAME,
    _types.void(
        *(_CHARS, _CHARS, _SIZES, _SIZES, _SIZES, _FLOATS, _FLOATS, _SIZES),
        *(_FLOATS, _SIZES, _FLOATS, _FLOATS, _SIZES),
    ),
)


@njit(cache=True)
def product(a: Any, b: Any, c: Any, kept: Any) -> None:
    """``c = kept * c + a @ b`` in place, of float32 matrices whose rows each stand together in memory."""
    if not len(c):
        return
    plain = np.full(1, ord("N"), dtype=np.uint8)
    sizes, factors = np.empty(6, dtype=np.int64), np.empty(2, dtype=np.float32)
    # Fortran reads each matrix transposed
    sizes[0], sizes[1], sizes[2] = c.shape[1], c.shape[0], a.shape[1]
    sizes[3], sizes[4], sizes[5] = b.strides[0] // 4, a.strides[0] // 4, c.strides[0] // 4
    factors[0], factors[1] = 1.0, kept
    _sgemm(
        plain.ctypes,
        plain.ctypes,
        sizes.ctypes,
        sizes[1:].ctypes,
        sizes[2:].ctypes,
        factors.ctypes,
        b.ctypes,
        sizes[3:].ctypes,
        a.ctypes,
        sizes[4:].ctypes,
        factors[1:].ctypes,
        c.ctypes,
        sizes[5:].ctypes,
    )
