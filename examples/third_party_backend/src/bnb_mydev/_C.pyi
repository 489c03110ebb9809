def dequantize_4bit(
    packed: int, absmax: int, count: int, blocksize: int, quant_type: int, dtype: int, out: int, /
) -> None: ...
def gemm_4bit(
    a: int,
    packed: int,
    absmax: int,
    bias: int,
    rows: int,
    columns: int,
    width: int,
    blocksize: int,
    quant_type: int,
    dtype: int,
    out: int,
    /,
) -> None: ...
def int8_linear_matmul(a: int, b: int, rows: int, columns: int, width: int, out: int, /) -> None: ...
def launches() -> int: ...
