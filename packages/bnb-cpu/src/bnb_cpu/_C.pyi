"""Native kernels of the active instruction set; see ``kernels/table.h`` for what each one does.

Arguments are positional. Pointers are addresses of contiguous memory (``Tensor.data_ptr()``); ``dtype``
is 0 for float32, 1 for float16, 2 for bfloat16; ``quant_type`` is 0 for NF4, 1 for FP4.
"""

from collections.abc import Callable
from typing import Any

OPTIMIZER_RULES: int

def isa() -> str: ...
def isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def advise_huge_pages(data: int, bytes: int, /) -> None: ...
def read_tensors(
    exchange: object,
    types: tuple[type, ...],
    lists: tuple[list[Any], ...],
    states: list[dict[str, Any]],
    keys: tuple[str | None, ...],
    shared: tuple[str, ...],
    count: int,
    record: bool,
    kinds: int,
    table: int,
    /,
) -> int: ...
def new_repeats(
    op: str, exchange: object, tensor_type: type, allocate: Callable[..., Any], context: Callable[[], int], /
) -> Any: ...
def call_again(handle: Any, /, *arguments: Any) -> Any: ...
def note_call(handle: Any, layout: tuple[Any, ...], options: dict[str, Any], /, *arguments: Any) -> None: ...
def quantize_4bit(
    x: int, dtype: int, count: int, blocksize: int, quant_type: int, packed: int, absmax: int, threads: int, /
) -> None: ...
def dequantize_4bit(
    packed: int, absmax: int, count: int, blocksize: int, quant_type: int, out: int, dtype: int, threads: int, /
) -> None: ...
def dequantize_4bit_nested(
    packed: int,
    absmax: int,
    absmax_8bit: int,
    code: int,
    code_size: int,
    offset: int,
    count: int,
    blocksize: int,
    nested_blocksize: int,
    quant_type: int,
    out: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def quantize_blockwise(
    x: int,
    dtype: int,
    count: int,
    blocksize: int,
    code: int,
    code_size: int,
    codes: int,
    absmax: int,
    threads: int,
    /,
) -> None: ...
def dequantize_blockwise(
    codes: int,
    absmax: int,
    code: int,
    code_size: int,
    count: int,
    blocksize: int,
    out: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def embedding_4bit(
    indices: int,
    index_bytes: int,
    count: int,
    packed: int,
    table_rows: int,
    width: int,
    absmax: int,
    absmax_8bit: int,
    code: int,
    code_size: int,
    offset: int,
    blocksize: int,
    nested_blocksize: int,
    quant_type: int,
    out: int,
    dtype: int,
    threads: int,
    /,
) -> int: ...
def gemm_4bit(
    a: int,
    dtype: int,
    count: int,
    packed: int,
    rows: int,
    width: int,
    absmax: int,
    absmax_8bit: int,
    code: int,
    code_size: int,
    offset: int,
    blocksize: int,
    table: int,
    quant_type: int,
    bias: int,
    bias_dtype: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def gemm_4bit_transposed(
    a: int,
    dtype: int,
    count: int,
    packed: int,
    rows: int,
    width: int,
    absmax: int,
    absmax_8bit: int,
    code: int,
    code_size: int,
    offset: int,
    blocksize: int,
    quant_type: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def int8_vectorwise_quant(
    x: int,
    dtype: int,
    rows: int,
    width: int,
    threshold: float,
    codes: int,
    absmax: int,
    outlier_columns: int,
    threads: int,
    /,
) -> int: ...
def int8_columnwise_quant(
    x: int, dtype: int, rows: int, width: int, threshold: float, codes: int, absmax: int, threads: int, /
) -> None: ...
def int8_vectorwise_dequant(codes: int, absmax: int, rows: int, width: int, out: int, threads: int, /) -> None: ...
def int8_matmul(a: int, b: int, count: int, rows: int, width: int, out: int, threads: int, /) -> None: ...
def int8_mm_dequant(
    sums: int,
    row_stats: int,
    col_stats: int,
    rows: int,
    columns: int,
    bias: int,
    bias_dtype: int,
    out: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def int8_scaled_mm(
    a: int,
    b: int,
    row_stats: int,
    col_stats: int,
    count: int,
    rows: int,
    width: int,
    x: int,
    outlier_columns: int,
    outlier_count: int,
    bias: int,
    bias_dtype: int,
    out: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def int8_linear(
    x: int,
    dtype: int,
    count: int,
    b: int,
    col_stats: int,
    rows: int,
    width: int,
    threshold: float,
    bias: int,
    bias_dtype: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def optimizer_step_32bit(
    rule: int,
    tensors: int,
    table: int,
    dtype: int,
    steps: int,
    schedule: int,
    seeds: int,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float,
    max_unorm: float,
    param_norms: int,
    update_norms: int,
    skip_zeros: bool,
    threads: int,
    /,
) -> None: ...
def optimizer_step_8bit(
    rule: int,
    tensors: int,
    table: int,
    dtype: int,
    qmap1: int,
    qmap2: int,
    steps: int,
    schedule: int,
    seeds: int,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float,
    max_unorm: float,
    skip_zeros: bool,
    threads: int,
    /,
) -> None: ...
