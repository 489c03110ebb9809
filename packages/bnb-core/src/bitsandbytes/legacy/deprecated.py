"""Functions that upstream has retired. They still work, with a FutureWarning that names the successor."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bitsandbytes.codebooks import dynamic_map
from bitsandbytes.errors import ArgumentError
from bitsandbytes.ops import search

Function = TypeVar("Function", bound=Callable[..., Any])


def retired(successor: str) -> Callable[[Function], Function]:
    """Mark a function as retired in favour of ``successor``."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            warnings.warn(
                f"{function.__name__} is deprecated and will be removed in a future release; use {successor}",
                FutureWarning,
                stacklevel=2,
            )
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _nearest(A: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return search.nearest_code_8bit(A.float().clamp(-1.0, 1.0), code.to(A.device, torch.float32))


@retired("quantize_blockwise")
def quantize_no_absmax(A: torch.Tensor, code: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Codes (uint8) of values that are in [-1, 1] already."""
    codes = _nearest(A, code)
    return codes if out is None else out.copy_(codes)


@retired("dequantize_blockwise")
def dequantize_no_absmax(A: torch.Tensor, code: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Values of 8-bit codes, float32, without any scale."""
    values = code.to(A.device, torch.float32)[A.int()]
    return values if out is None else out.copy_(values)


@retired("quantize_blockwise")
def quantize(
    A: torch.Tensor, code: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Quantize a tensor with a single absmax.

    Returns:
        ``(codes, (absmax, code))``.
    """
    code = dynamic_map(True, A.device).clone() if code is None else code.to(A.device)
    absmax = A.abs().max()
    codes = _nearest(A.float() / absmax.float().clamp_min(search.TINY_ABSMAX), code)
    return (codes if out is None else out.copy_(codes)), (absmax, code)


@retired("dequantize_blockwise")
def dequantize(
    A: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor] | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values of codes from :func:`quantize`: float32 ``code[A] * absmax``."""
    if state is not None:
        absmax, code = state
    if absmax is None:
        raise ArgumentError("dequantize: pass either state or absmax")
    code = dynamic_map(True, A.device) if code is None else code
    values = code.to(A.device, torch.float32)[A.int()] * absmax.to(A.device)
    return values if out is None else out.copy_(values)


@retired("optimizer_update_8bit_blockwise")
def optimizer_update_8bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: torch.Tensor,
    qmap2: torch.Tensor | None,
    max1: torch.Tensor,
    max2: torch.Tensor | None,
    new_max1: torch.Tensor,
    new_max2: torch.Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: torch.Tensor | None = None,
    max_unorm: float = 0.0,
) -> None:
    """One optimizer step with 8-bit state under one absmax for the whole tensor, in place.

    The states are read with ``max1`` and ``max2`` and written with the new absmax, which goes into
    ``new_max1`` and ``new_max2``; the caller swaps them before the next step.
    """
    first = qmap1[state1.int()] * max1
    second = None if state2 is None or qmap2 is None or max2 is None else qmap2[state2.int()] * max2
    norm = torch.linalg.vector_norm(p.float()).item() if max_unorm > 0.0 else 0.0
    torch.ops.bitsandbytes.optimizer_update_32bit.default(
        optimizer_name,
        g,
        p,
        first,
        second,
        unorm_vec,
        max_unorm,
        norm,
        beta1,
        beta2,
        0.0,
        0.0,
        eps,
        weight_decay,
        step,
        lr,
        gnorm_scale,
    )
    _store(first, state1, qmap1, new_max1)
    if second is not None and state2 is not None and qmap2 is not None and new_max2 is not None:
        _store(second, state2, qmap2, new_max2)


def _store(values: torch.Tensor, codes: torch.Tensor, qmap: torch.Tensor, new_max: torch.Tensor) -> None:
    absmax = values.abs().max()
    new_max.fill_(absmax)
    codes.copy_(_nearest(values / absmax.clamp_min(search.TINY_ABSMAX), qmap))
