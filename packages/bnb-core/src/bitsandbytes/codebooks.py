"""The one source of every quantization table.

Native code does not repeat these numbers: ``tools/gen_codebooks.py`` writes them into the C++
header ``bnb/codebooks.h``, and the lint session fails when the two differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from bitsandbytes.errors import ArgumentError

#: NormalFloat4, appendix E of QLoRA (Dettmers et al. 2023, arXiv:2305.14314). Sorted; index = code.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

#: Magnitudes of FP4 (sign, two exponent bits, one mantissa bit) by the low three bits of the code,
#: divided by the largest magnitude, 12. Bit 3 of the code is the sign.
FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8.0 / 12, 12.0 / 12, 4.0 / 12, 6.0 / 12, 2.0 / 12, 3.0 / 12)

#: FP4 by code, not sorted. Code 8 is a negative zero in sign and magnitude; it decodes to +0.
FP4 = (*FP4_MAGNITUDES, 0.0, *(-value for value in FP4_MAGNITUDES[1:]))

#: Signed integers -7..7 scaled to [-1, 1], with a second zero so that code 8 is defined.
INT4 = tuple(value / 7.0 for value in (7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7))

#: AbnormalFloat4 for block size 64 (Yoshida 2023, arXiv:2306.06965), by code: descending.
AF4_64 = (
    1.0,
    0.72424863,
    0.55496234,
    0.42563882,
    0.31675666,
    0.21961274,
    0.12934483,
    0.04273164,
    0.0,
    -0.04934812,
    -0.14982478,
    -0.25607552,
    -0.3736951,
    -0.51243739,
    -0.69441008,
    -1.0,
)

#: Types that a 4-bit op can quantize to.
QUANT_TYPES_4BIT = ("nf4", "fp4")

_TABLES_4BIT = {"nf4": NF4, "fp4": FP4}


def order_4bit(quant_type: str) -> tuple[int, ...]:
    """The codes of a 4-bit type in ascending order of their values; FP4's +0 comes before its -0."""
    table = _TABLES_4BIT[quant_type]
    return tuple(sorted(range(16), key=lambda code: (table[code], code)))


_shared_tables: dict[tuple[str, str, torch.device], torch.Tensor] = {}


def _shared(kind: str, name: str, device: torch.device, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Build a constant tensor once per device.

    Made outside inference mode, so that autograd may save it. A fake tensor, as seen while a graph
    is traced, is not kept: it must not leak into later calls.
    """
    key = (kind, name, device)
    table = _shared_tables.get(key)
    if table is None:
        with torch.inference_mode(False):
            table = make()
        if type(table) is torch.Tensor:
            _shared_tables[key] = table
    return table


def code_4bit(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit type by code, float32, shared between callers: do not write to it."""
    return _shared(
        "code", quant_type, device, lambda: torch.tensor(_TABLES_4BIT[quant_type], dtype=torch.float32, device=device)
    )


def ranks_4bit(quant_type: str, device: torch.device) -> torch.Tensor:
    """The codes of a 4-bit type in ascending order of value, uint8, shared: do not write to it."""
    return _shared(
        "rank",
        quant_type,
        device,
        lambda: torch.tensor(
            order_4bit(quant_type) if follows_cpu(device) else ORDER_4BIT_GPU[quant_type],
            dtype=torch.uint8,
            device=device,
        ),
    )


#: Boundaries between the codes of a 4-bit type on GPUs: the largest float32 with the lower code. They are
#: midpoints written with few digits, and those of FP4 are compared with magnitudes.
_NF4_BOUNDARIES_GPU = (
    -0.8480964303016663,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552542090416,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016633868217468,
    0.6427869200706482,
    0.8614783883094788,
)
_FP4_BOUNDARIES_GPU = (
    -0.8333333730697632,
    -0.5833330750465393,
    -0.416666716337204,
    -0.2916666865348816,
    -0.2083333432674408,
    -0.0859375074505806,
    -0.002604170236736536,
    -1.401298464324817e-45,
    0.0026041700039058924,
    0.0859375,
    0.2083333283662796,
    0.2916666567325592,
    0.4166666865348816,
    0.5833330154418945,
    0.8333333134651184,
)
BOUNDARIES_4BIT_GPU = {"nf4": _NF4_BOUNDARIES_GPU, "fp4": _FP4_BOUNDARIES_GPU}

#: FP4 has two codes for zero. GPUs code zero as 0 and small negative numbers as 8, the CPU the other way
#: round.
_FP4_ORDER_GPU = (11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3)
ORDER_4BIT_GPU = {"nf4": tuple(range(16)), "fp4": _FP4_ORDER_GPU}


def follows_cpu(device: torch.device) -> bool:
    """Whether quantization on a device follows the rules of the CPU rather than those of GPUs."""
    return device.type in ("cpu", "meta")


def midpoints_4bit(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 15 float32 boundaries between neighbours of the sorted table, shared: do not write to it.

    A value on a boundary takes the lower code. On the CPU they are the midpoints.
    """

    def make() -> torch.Tensor:
        if not follows_cpu(device):
            return torch.tensor(BOUNDARIES_4BIT_GPU[quant_type], dtype=torch.float32, device=device)
        table = code_4bit(quant_type, device)[list(order_4bit(quant_type))]
        return (table[:-1] + table[1:]) / 2

    return _shared("midpoint", quant_type, device, make)


def dynamic_map(signed: bool, device: torch.device) -> torch.Tensor:
    """The 8-bit dynamic codebook, float32, shared between callers: do not write to it."""
    return _shared("dynamic", str(signed), device, lambda: create_dynamic_map(signed).to(device))


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """Dynamic data type: a decimal exponent of varying length and a linear fraction.

    Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561,
    section 2.2), with the centres of the fraction's intervals as values. Exponent ``e`` contributes
    values ``10**e * m`` with ``m`` in (0.1, 1); there are twice as many of them for each larger
    exponent. Zero and one are always present.

    Args:
        signed: values in [-1, 1] instead of [0, 1].
        max_exponent_bits: number of exponents.
        total_bits: bits per code, at most 8.

    Returns:
        256 float32 values in ascending order, padded with zeros where ``total_bits`` is below 8.
    """
    magnitude_bits = total_bits - 1
    values = [0.0, 1.0]
    for step in range(max_exponent_bits):
        power = step + magnitude_bits - max_exponent_bits + (0 if signed else 1)
        values += _fractions(int(2**power) + 1, 10.0 ** (step - max_exponent_bits + 1), signed)
    extra = int(2 ** (magnitude_bits - max_exponent_bits)) - 1
    if extra > 0:
        values += _fractions(extra + 1, 1.0, signed)
    if len(values) > 256:
        raise ArgumentError(f"create_dynamic_map: total_bits is {total_bits}, at most 8 fit a codebook of 256 values")
    return _padded(values)


def _fractions(boundaries: int, scale: float, signed: bool) -> list[float]:
    edges = torch.linspace(0.1, 1, boundaries)
    centres = ((edges[:-1] + edges[1:]) / 2.0 * scale).tolist()
    return centres + [-value for value in centres] if signed else centres


def _padded(values: list[float]) -> torch.Tensor:
    """The values and as many zeros as make 256, in ascending order."""
    return torch.tensor(sorted(values + [0.0] * (256 - len(values))))


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """NormalFloat: quantiles of the normal distribution, scaled to [-1, 1].

    QLoRA (arXiv:2305.14314), appendix E. Positive and negative quantiles are evenly spaced in
    probability between ``offset`` and 1/2; with ``use_extra_value`` there is one more positive one.

    Returns:
        256 float32 values in ascending order: 15 quantiles (14 without the extra value) with zeros
        between the signs.
    """
    quantile = statistics.NormalDist().inv_cdf
    # The probabilities are rounded to float32, as in the table that QLoRA published.
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9 if use_extra_value else 8)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    values = _padded(positive + negative)
    return values / values.max()


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """Evenly spaced values in [-1, 1] (signed) or [0, 1].

    With ``add_zero``, or below 8 bits, a signed map drops one value so that zero is exact and the
    map is symmetric.

    Returns:
        256 float32 values; missing ones are zeros in the middle.
    """
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count)
    half = count // 2
    return torch.cat((values[:half], torch.zeros(256 - count), values[half:]))


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """All values of a small floating point format, scaled to [-1, 1].

    A number is ``(1 + fraction) * 2**(bias + 1 - e)`` with the stored exponent ``e`` counting down, or
    ``fraction * 2**-bias`` where ``e`` is 0, with ``bias = 2**(exponent_bits - 1)``.

    Returns:
        256 float32 values in ascending order, padded with zeros where ``total_bits`` is below 8.
    """
    if exponent_bits + precision_bits != total_bits - int(signed):
        raise ArgumentError(
            f"create_fp8_map: {exponent_bits} exponent bits and {precision_bits} precision bits do not make "
            f"{total_bits} bits {'with' if signed else 'without'} a sign"
        )
    bias = 2 ** (exponent_bits - 1)
    values: list[float] = []
    for exponent in range(2**exponent_bits):
        for step in range(2**precision_bits):
            fraction = step / 2**precision_bits
            value = (1 + fraction) * 2.0 ** (bias + 1 - exponent) if exponent else fraction * 2.0**-bias
            values += [value, -value] if signed else [value]
    codes = _padded(values)
    return codes / codes.max()


def named_4bit_type(typename: str, device: torch.device, blocksize: int = 64) -> torch.Tensor:
    """The 16 values of a 4-bit data type by code, scaled to [-1, 1]; a new tensor.

    Args:
        typename: ``"nf4"``, ``"fp4"``, ``"int4"`` or ``"af4"`` (known for block size 64 only).
        device: where to put the table.
        blocksize: the block size that an ``af4`` table is made for.
    """
    tables = {"nf4": NF4, "fp4": FP4, "int4": INT4, "af4": AF4_64}
    if typename not in tables:
        raise NotImplementedError(f"4-bit type {typename!r} is not known; known types: {', '.join(tables)}")
    if typename == "af4" and blocksize != 64:
        raise NotImplementedError(f"af4 is known for blocksize 64 only, got {blocksize}")
    table = torch.tensor(tables[typename], device=device)
    return table / table.abs().max()
