"""The native module. Addresses are integers, 0 for none; sizes count elements."""

from typing import Any

MOST_SPLIT: int
OUTLIER_COUNT_WORDS: int
GATHERED_MULTIPLE: int
OPTIMIZER_COLUMNS: int
OPTIMIZER_RULES: int

def processors(device: int, /) -> int: ...
def capability(device: int, /) -> int: ...
def quantize_4bit(
    device: int,
    stream: int,
    x: int,
    dtype: int,
    count: int,
    blocksize: int,
    quant_type: int,
    packed: int,
    absmax: int,
    /,
) -> None: ...
def dequantize_4bit(
    device: int,
    stream: int,
    packed: int,
    absmax: int,
    absmax_8bit: int,
    code: int,
    code_size: int,
    offset: int,
    nested_blocksize: int,
    count: int,
    blocksize: int,
    quant_type: int,
    out: int,
    dtype: int,
    /,
) -> None: ...
def embedding_4bit(
    device: int,
    stream: int,
    indices: int,
    indices_64bit: bool,
    lookups: int,
    packed: int,
    absmax: int,
    absmax_8bit: int,
    code: int,
    code_size: int,
    offset: int,
    rows: int,
    width: int,
    blocksize: int,
    quant_type: int,
    out: int,
    dtype: int,
    /,
) -> None: ...
def quantize_blockwise(
    device: int,
    stream: int,
    x: int,
    dtype: int,
    count: int,
    blocksize: int,
    code: int,
    code_size: int,
    codes: int,
    absmax: int,
    /,
) -> None: ...
def dequantize_blockwise(
    device: int,
    stream: int,
    codes: int,
    absmax: int,
    code: int,
    code_size: int,
    count: int,
    blocksize: int,
    out: int,
    dtype: int,
    /,
) -> None: ...
def gemm_4bit_fits(n: int, k: int, blocksize: int, dtype: int, capability: int, /) -> bool: ...
def gemm_4bit(
    path: int,
    split: int,
    device: int,
    stream: int,
    a: int,
    dtype: int,
    m: int,
    n: int,
    k: int,
    packed: int,
    absmax: int,
    absmax_8bit: int,
    code: int,
    code_size: int,
    offset: int,
    blocksize: int,
    quant_type: int,
    bias: int,
    bias_dtype: int,
    out: int,
    table: int,
    /,
) -> None: ...
def int8_quantize_rows(
    device: int,
    stream: int,
    x: int,
    dtype: int,
    rows: int,
    columns: int,
    threshold: float,
    codes: int,
    absmax: int,
    flags: int,
    listed: int,
    count: int,
    cleared: bool,
    /,
) -> None: ...
def int8_double_quantize(
    device: int,
    stream: int,
    x: int,
    dtype: int,
    rows: int,
    columns: int,
    threshold: float,
    row_codes: int,
    column_codes: int,
    row_absmax: int,
    column_absmax: int,
    flags: int,
    listed: int,
    count: int,
    /,
) -> None: ...
def int8_dequantize_rows(
    device: int, stream: int, codes: int, absmax: int, rows: int, columns: int, out: int, dtype: int, /
) -> None: ...
def int8_gemv_fits(m: int, n: int, k: int, dtype: int, capability: int, /) -> bool: ...
def int8_gemm_fits(n: int, k: int, capability: int, /) -> bool: ...
def gathered_room(k: int, /) -> int: ...
def outlier_flag_words(rows: int, columns: int, /) -> int: ...
def int8_gemm(
    path: int,
    device: int,
    stream: int,
    product: int,
    a: int,
    b: int,
    m: int,
    n: int,
    k: int,
    a_absmax: int,
    b_absmax: int,
    values: int,
    flags: int,
    listed: int,
    count: int,
    cleared: bool,
    gathered: int,
    room: int,
    bias: int,
    bias_dtype: int,
    out: int,
    dtype: int,
    /,
) -> None: ...
def int8_linear(
    path: int,
    device: int,
    stream: int,
    values: int,
    dtype: int,
    m: int,
    n: int,
    k: int,
    threshold: float,
    codes: int,
    absmax: int,
    flags: int,
    listed: int,
    count: int,
    cleared: bool,
    gathered: int,
    room: int,
    b: int,
    b_absmax: int,
    bias: int,
    bias_dtype: int,
    out: int,
    /,
) -> None: ...
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
def optimizer_units(elements: int, first: int, tensors: int, /) -> int: ...
def optimizer_workspace(tensors: int, units: int, max_unorm: float, scheduled: bool, /) -> int: ...
def optimizer_step(
    device: int,
    stream: int,
    table: int,
    tensors: int,
    units: int,
    rule: int,
    dtype: int,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float,
    step: float,
    max_unorm: float,
    skip_zeros: bool,
    code1: int,
    code2: int,
    schedule: int,
    schedule_double: bool,
    workspace: int,
    /,
) -> None: ...
def has_managed_memory(device: int, /) -> bool: ...
def allocate_managed(device: int, bytes: int, /) -> int: ...
def free_managed(address: int, /) -> None: ...
def is_capturing(device: int, stream: int, /) -> bool: ...
def prefetch_managed(device: int, stream: int, address: int, bytes: int, to_host: bool, /) -> None: ...
