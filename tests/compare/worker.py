"""Runs cases against whichever ``bitsandbytes`` this interpreter imports; public API only.

``python -m tests.compare.worker CASES RESULTS MARKER`` reads a list of ``(op, id, inputs)`` and appends to the
file RESULTS. MARKER names the case being run, so that whoever started the process knows what killed it.
"""

from __future__ import annotations

import copy
import io
import json
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

Inputs = dict[str, Any]
Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def handler(function: Handler) -> Handler:
    """Register ``function`` as the way to run the op of its name."""
    HANDLERS[function.__name__] = function
    return function


def dtype_of(name: str | None) -> Any:
    """``torch.float32`` for ``"float32"``."""
    return None if name is None else getattr(torch, name)


def describe_state(state: Any) -> dict[str, Any]:
    """Everything that a quantization state holds."""
    parts = {"blocksize": state.blocksize, "quant_type": state.quant_type, "dtype": str(state.dtype)}
    parts |= {"absmax": state.absmax, "code": state.code, "offset": state.offset}
    parts["shape"] = None if state.shape is None else list(state.shape)
    if state.state2 is not None:
        parts["state2"] = describe_state(state.state2)
    return parts


def describe_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Keys in order, and the tensors."""
    return {"keys": list(state_dict), "tensors": {key: value.clone() for key, value in state_dict.items()}}


@handler
def codebook(name: str, arguments: list[Any], keywords: Inputs) -> torch.Tensor:
    """A ``create_*_map`` function or ``get_4bit_type``."""
    import bitsandbytes.functional as F

    return torch.as_tensor(getattr(F, name)(*arguments, **keywords))


@handler
def quantize_4bit(A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: str, nested: bool) -> Any:
    """Packed bytes, state and the dictionary that goes into a checkpoint."""
    import bitsandbytes.functional as F

    packed, state = F.quantize_4bit(
        A,
        blocksize=blocksize,
        quant_type=quant_type,
        compress_statistics=nested,
        quant_storage=dtype_of(quant_storage),
    )
    result = {"packed": packed, "state": describe_state(state)}
    if A.numel():
        result["as_dict"] = describe_state_dict(state.as_dict(packed=True))
    return result


@handler
def dequantize_4bit(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: str
) -> torch.Tensor:
    """Values of given codes and statistics."""
    return torch.ops.bitsandbytes.dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype_of(dtype))


@handler
def dequantize_4bit_state(A: torch.Tensor, quantized_stats: Inputs, transposed: bool) -> torch.Tensor:
    """Values of given codes and a state as a checkpoint has it."""
    import bitsandbytes.functional as F

    state = F.QuantState.from_dict(dict(quantized_stats), device=torch.device("cpu"))
    return F.dequantize_4bit(A.t() if transposed else A, state)


@handler
def round_trip_4bit(A: torch.Tensor, blocksize: int, quant_type: str) -> torch.Tensor:
    """Quantize and dequantize through the state."""
    import bitsandbytes.functional as F

    return F.dequantize_4bit(*F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type))


@handler
def quantize_blockwise(A: torch.Tensor, code: torch.Tensor | None, blocksize: int, nested: bool) -> Any:
    """Codes and state."""
    import bitsandbytes.functional as F

    codes, state = F.quantize_blockwise(A, code=code, blocksize=blocksize, nested=nested)
    return {"codes": codes, "state": describe_state(state)}


@handler
def dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: str
) -> torch.Tensor:
    """Values of given codes and statistics."""
    return torch.ops.bitsandbytes.dequantize_blockwise(A, absmax, code, blocksize, dtype_of(dtype))


@handler
def int8_vectorwise_quant(A: torch.Tensor, threshold: float) -> Any:
    """Codes, statistics and outlier columns; the input must survive."""
    import bitsandbytes.functional as F

    codes, absmax, columns = F.int8_vectorwise_quant(A, threshold)
    return {"codes": codes, "absmax": absmax, "outlier_columns": columns, "A": A}


@handler
def int8_double_quant(A: torch.Tensor, threshold: float) -> Any:
    """Codes and statistics by row and by column."""
    import bitsandbytes.functional as F

    row_codes, column_codes, row_absmax, column_absmax, columns = F.int8_double_quant(A, threshold=threshold)
    return {
        "row_codes": row_codes,
        "column_codes": column_codes,
        "row_absmax": row_absmax,
        "column_absmax": column_absmax,
        "outlier_columns": columns,
    }


@handler
def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Codes times the scale of their row."""
    import bitsandbytes.functional as F

    return F.int8_vectorwise_dequant(A, stats)


@handler
def int8_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Exact integer product."""
    import bitsandbytes.functional as F

    return F.int8_linear_matmul(A, B)


@handler
def int8_mm_dequant(
    A: torch.Tensor, row_stats: torch.Tensor, col_stats: torch.Tensor, dtype: str | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Scaled integer product."""
    return torch.ops.bitsandbytes.int8_mm_dequant(A, row_stats, col_stats, dtype=dtype_of(dtype), bias=bias)


@handler
def int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: str,
) -> torch.Tensor:
    """Product and scales in one op."""
    return torch.ops.bitsandbytes.int8_scaled_mm(A, B, row_stats, col_stats, bias=bias, dtype=dtype_of(dtype))


@handler
def gemm_4bit(A: torch.Tensor, B: torch.Tensor, shapeB: list[int], absmax: torch.Tensor, **rest: Any) -> torch.Tensor:
    """Product with a 4-bit weight."""
    return torch.ops.bitsandbytes.gemm_4bit(A, B, shapeB, absmax, rest["blocksize"], rest["quant_type"], rest["bias"])


@handler
def gemv_4bit(A: torch.Tensor, B: torch.Tensor, shapeB: list[int], absmax: torch.Tensor, **rest: Any) -> torch.Tensor:
    """Product of one row with a 4-bit weight."""
    return torch.ops.bitsandbytes.gemv_4bit(A, B, shapeB, absmax, rest["code"], rest["blocksize"])


def make_linear4bit(options: Inputs, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    """A quantized ``Linear4bit`` on the CPU."""
    layer = empty_linear4bit(options, weight.shape, bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer.to("cpu")


def empty_linear4bit(options: Inputs, shape: torch.Size | list[int], bias: bool) -> torch.nn.Module:
    """A ``Linear4bit`` before any weight is quantized."""
    import bitsandbytes as bnb

    dtypes = {key: dtype_of(options[key]) for key in ("compute_dtype", "quant_storage")}
    return bnb.nn.Linear4bit(
        shape[1],
        shape[0],
        bias=bias,
        compress_statistics=options["nested"],
        quant_type=options["quant_type"],
        **dtypes,
    )


def make_linear8bit(options: Inputs, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    """A quantized ``Linear8bitLt`` on the CPU."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=bias is not None, **options)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer.to("cpu")


@handler
def linear4bit_state_dict(options: Inputs, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """``state_dict`` of a quantized layer before and after a forward pass."""
    return around_forward(make_linear4bit(options, weight, bias), torch.ones(2, weight.shape[1], dtype=torch.bfloat16))


@handler
def linear8bit_state_dict(options: Inputs, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """``state_dict`` of a layer before and after a forward pass."""
    return around_forward(make_linear8bit(options, weight, bias), torch.ones(2, weight.shape[1]))


def around_forward(layer: torch.nn.Module, x: torch.Tensor) -> Any:
    """``state_dict`` before and after a forward pass, which may fail."""
    before = describe_state_dict(layer.state_dict())
    try:
        with torch.no_grad():
            layer.eval()(x)
    except Exception as error:
        return {"before": before, "after": failure(error)}
    return {"before": before, "after": describe_state_dict(layer.state_dict())}


@handler
def linear4bit_load(options: Inputs, shape: list[int], state_dict: Inputs) -> Any:
    """Rebuild a quantized layer that the other side saved; give its weight in full and save it again."""
    import bitsandbytes as bnb

    layer = empty_linear4bit(options, shape, "bias" in state_dict)
    stats = {key.removeprefix("weight."): value for key, value in state_dict.items() if key.startswith("weight.")}
    layer.weight = bnb.nn.Params4bit.from_prequantized(state_dict["weight"], stats, device="cpu", module=layer)
    if "bias" in state_dict:
        layer.bias.data = state_dict["bias"]
    state = layer.weight.quant_state
    return {
        "weight": bnb.functional.dequantize_4bit(layer.weight.data, state),
        "state": describe_state(state),
        "saved": describe_state_dict(layer.state_dict()),
    }


@handler
def linear8bit_load(options: Inputs, shape: list[int], state_dict: Inputs, x: torch.Tensor) -> Any:
    """The same for 8 bit, with what the layer computes."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias="bias" in state_dict, **options).to("cpu")
    layer.load_state_dict(state_dict)
    codes, stats = layer.weight.data, layer.weight.SCB
    saved = describe_state_dict(layer.state_dict())
    weight = bnb.functional.int8_vectorwise_dequant(codes, stats)
    with torch.no_grad():
        return {"weight": weight, "saved": saved, "y": layer.eval()(x)}


@handler
def optimizer_op(bits: int, name: str, tensors: Inputs, numbers: Inputs) -> Any:
    """One step of one parameter from a given state; every tensor is given back."""
    ops, t, n = torch.ops.bitsandbytes, tensors, numbers
    if bits == 32:
        ops.optimizer_update_32bit(
            name, t["g"], t["p"], t["state1"], t["state2"], t["unorm_vec"], n["max_unorm"], n["param_norm"],
            n["beta1"], n["beta2"], n["beta3"], n["alpha"], n["eps"], n["weight_decay"], n["step"], n["lr"],
            n["gnorm_scale"], n["skip_zeros"],
        )  # fmt: skip
    else:
        ops.optimizer_update_8bit_blockwise(
            name, t["g"], t["p"], t["state1"], t["state2"], n["beta1"], n["beta2"], n["beta3"], n["alpha"],
            n["eps"], n["step"], n["lr"], t["qmap1"], t["qmap2"], t["absmax1"], t["absmax2"], n["weight_decay"],
            n["gnorm_scale"], n["skip_zeros"],
        )  # fmt: skip
    return t


@handler
def optimizer_state_dict(name: str, options: Inputs, parameters: list[torch.Tensor], grads: list[Any]) -> Any:
    """Parameters and ``state_dict`` after each step of an optimizer class."""
    optimizer, held = make_optimizer(name, options, parameters)
    steps = []
    for step in grads:
        take_step(optimizer, held, step)
        steps.append(copy.deepcopy({"parameters": [p.data for p in held], "state_dict": optimizer.state_dict()}))
    return {"steps": steps}


@handler
def optimizer_load(
    name: str,
    options: Inputs,
    parameters: list[torch.Tensor],
    state_dict: Inputs,
    grads: list[torch.Tensor],
    flat: bool,
) -> Any:
    """Load a ``state_dict`` that the other side saved, save it again, take one more step."""
    optimizer, held = make_optimizer(name, options, parameters)
    if flat:
        state_dict = state_dict | {"state": {key: flatten_state(value) for key, value in state_dict["state"].items()}}
    optimizer.load_state_dict(state_dict)
    saved = copy.deepcopy(optimizer.state_dict())
    take_step(optimizer, held, grads)
    return {"saved": saved, "parameters": [p.data for p in held], "state_dict": optimizer.state_dict()}


def flatten_state(state: Inputs) -> Inputs:
    """The layout of releases before quantized state was nested."""
    flat = {key: value for key, value in state.items() if not isinstance(value, dict)}
    for value in state.values():
        if isinstance(value, dict):
            flat |= value
    return flat


def make_optimizer(
    name: str, options: Inputs, parameters: list[torch.Tensor]
) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    """An optimizer of a class of ``bitsandbytes.optim`` over copies of ``parameters``."""
    import bitsandbytes as bnb

    held = [torch.nn.Parameter(p.clone()) for p in parameters]
    return getattr(bnb.optim, name)(held, **options), held


def take_step(optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    """One optimizer step with given gradients."""
    for parameter, grad in zip(held, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()


def attempt(op: str, inputs: Inputs) -> Any:
    """The result, or the text of the exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return HANDLERS[op](**inputs)
        except Exception as error:
            return failure(error)


def failure(error: Exception) -> dict[str, str]:
    """An exception as a result."""
    return {"error": f"{type(error).__name__}: {error}"}


def write_record(file: BinaryIO, key: str, result: Any) -> None:
    """Append one result as a length and a ``torch.save`` archive."""
    buffer = io.BytesIO()
    torch.save((key, result), buffer)
    file.write(struct.pack("<q", buffer.getbuffer().nbytes))
    file.write(buffer.getbuffer())
    file.flush()


def main(cases: str, results: str, marker: str) -> None:
    """Run every case of a file."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(json.dumps({"version": bnb.__version__, "torch": torch.__version__, "file": bnb.__file__}))
    with open(results, "ab") as file:
        for op, name, inputs in torch.load(cases, weights_only=True):
            Path(marker).write_text(f"{op} {name}")
            write_record(file, f"{op} {name}", attempt(op, inputs))
    Path(marker).write_text("")


if __name__ == "__main__":
    main(*sys.argv[1:])
