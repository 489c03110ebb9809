"""The product of an LLM.int8() layer, from activations. See :mod:`bnb_cuda.ops` for what all kernels share."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, empty

from bitsandbytes.backends.description import Kernel
from bnb_cuda import _C
from bnb_cuda.arguments import (
    DTYPES,
    address,
    all_plain,
    dtype_number,
    is_plain,
    plain,
    plain_or_none,
    rows_of,
    stream_of,
)
from bnb_cuda.int8 import LIBRARY_ROWS, plan, quantize_rows, scaled_product
from bnb_cuda.int8_outliers import COUNT_WORDS, flag_words
from bnb_cuda.tuning import LIBRARY_MULTIPLE, MOST_ROWS_INT8_GEMV, Int8Path

#: In place of codes, absmax, flags, list and number of outlier columns, whether they are cleared, and what is gathered.
NO_INTERMEDIATES = (0, 0, 0, 0, 0, True, 0, 0)


def int8_linear(A: Tensor, CB: Tensor, SCB: Tensor, threshold: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """Native ``int8_linear``: nothing waits for the device, whatever outliers there are."""
    A = plain(A)
    path = linear_plan(rows_of(A), *CB.shape, A.dtype, CB.device.index, threshold > 0.0)
    if path is Int8Path.GEMV:
        return vector_product(A, plain(CB), plain(SCB), threshold, plain_or_none(bias))
    cleared = path is not Int8Path.GROUPS
    codes, absmax, outliers = quantize_rows(A, threshold, cleared)
    values = A if threshold > 0.0 else None
    return scaled_product(codes, CB, absmax, SCB, values, outliers, bias, A.dtype, cleared)


def vector_product(A: Tensor, CB: Tensor, SCB: Tensor, threshold: float, bias: Tensor | None) -> Tensor:
    """``int8_linear`` of very few rows, in one kernel."""
    n, k = CB.shape
    device = CB.device
    out = empty((*A.shape[:-1], n), dtype=A.dtype, device=device)
    _C.int8_linear(
        Int8Path.GEMV.value,
        device.index,
        stream_of(device.index),
        A.data_ptr(),
        DTYPES[A.dtype],
        rows_of(A),
        n,
        k,
        threshold,
        *NO_INTERMEDIATES,
        CB.data_ptr(),
        SCB.data_ptr(),
        address(bias),
        dtype_number(bias),
        out.data_ptr(),
    )
    return out


@cache
def linear_plan(rows: int, n: int, k: int, dtype: torch.dtype, device: int, outliers: bool) -> Int8Path:
    """The plan for quantization and product, remembered."""
    if rows <= MOST_ROWS_INT8_GEMV and _C.int8_gemv_fits(rows, n, k, DTYPES[dtype], _C.capability(device)):
        return Int8Path.GEMV
    return plan(rows, n, k, dtype, device, outliers)


def bind_int8_linear(
    CB: Tensor, SCB: Tensor, threshold: float = 0.0, bias: Tensor | None = None
) -> Callable[[Tensor], Tensor | None] | None:
    """``int8_linear`` as a function of the activations alone. It keeps addresses, no tensors.

    Activations whose product needs copies, and those of a weight that is gone, it leaves to the op.
    """
    n, k = CB.shape
    if not all_plain(CB, SCB, bias) or n == 0 or k == 0:
        return None
    device, index = CB.device, CB.device.index
    weight, weight_absmax = CB.data_ptr(), SCB.data_ptr()
    bias_address, bias_dtype = address(bias), dtype_number(bias)
    linear, stream = _C.int8_linear, stream_of
    weight_of = weakref.ref(CB)
    # Sizes that the library takes without a copy of the weight.
    whole = n % LIBRARY_MULTIPLE == 0 and k % LIBRARY_MULTIPLE == 0
    # Room for list and number of the outlier columns, and, by rows, for their flags.
    finds = threshold > 0.0
    outlier_bytes = (k + COUNT_WORDS) * 4 if finds else 0
    room = _C.gathered_room(k) if finds else 0

    def run(A: Tensor) -> Tensor | None:
        rows, dtype = rows_of(A), A.dtype
        path, stored = linear_plan(rows, n, k, dtype, index, finds), None
        if path is Int8Path.LIBRARY:
            stored = weight_of()
            if rows <= LIBRARY_ROWS or not whole or stored is None:
                return None
        if rows == 0:
            return None
        A = A if is_plain(A) else plain(A)
        out = empty((*A.shape[:-1], n), dtype=dtype, device=device)
        on, values, number = stream(index), A.data_ptr(), DTYPES[dtype]
        if path is Int8Path.GEMV:
            intermediates = NO_INTERMEDIATES
        else:
            # Outlier columns side by side come first, for their alignment.
            gathered_bytes = (n + rows) * room * 2 if path is Int8Path.GROUPS else 0
            listed_bytes = outlier_bytes + flag_words(rows, k) * 4 if outlier_bytes else 0
            space = empty(gathered_bytes + rows * (k + 4) + listed_bytes, dtype=torch.uint8, device=device)
            gathered = space.data_ptr()
            codes = gathered + gathered_bytes
            absmax = codes + rows * k
            flags = columns = count = 0
            if outlier_bytes:
                columns = absmax + rows * 4
                count = columns + k * 4
                flags = absmax + rows * 4 + outlier_bytes
            cleared = path is not Int8Path.GROUPS
            intermediates = codes, absmax, flags, columns, count, cleared, gathered, room
        if stored is None:
            linear(
                path.value,
                index,
                on,
                values,
                number,
                rows,
                n,
                k,
                threshold,
                *intermediates,
                weight,
                weight_absmax,
                bias_address,
                bias_dtype,
                out.data_ptr(),
            )
            return out
        _C.int8_quantize_rows(
            index, on, values, number, rows, k, threshold, codes, absmax, flags, columns, count, cleared
        )
        with torch._C.DisableTorchFunctionSubclass():
            integers = torch._int_mm(space[: rows * k].view(torch.int8).view(rows, k), stored.t())
        _C.int8_gemm(
            path.value,
            index,
            on,
            integers.data_ptr(),
            codes,
            weight,
            rows,
            n,
            k,
            absmax,
            weight_absmax,
            values if outlier_bytes else 0,
            flags,
            columns,
            count,
            cleared,
            0,
            0,
            bias_address,
            bias_dtype,
            out.data_ptr(),
            number,
        )
        return out

    return run


#: What this module serves, by op.
INT8_LINEAR_KERNELS = (Kernel("int8_linear", int8_linear, bind=bind_int8_linear),)
