"""Native kernels of the active instruction set; see ``kernels/table.h`` for what each one does.

Arguments are positional. Pointers are addresses of contiguous memory (``Tensor.data_ptr()``); ``dtype``
is 0 for float32, 1 for float16, 2 for bfloat16; ``quant_type`` is 0 for NF4, 1 for FP4.
"""

def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
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
