"""What a run tells while it works and when it is done."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: bytes of the source that are dealt with.
        total: bytes of the source in all.
        shard: file that is being written.
        tensor: tensor that was dealt with last.
    """

    done: int
    total: int
    shard: str
    tensor: str


@dataclass
class Tally:
    """Sums over the tensors of one file; they add up over files.

    Attributes:
        quantized_tensors, kept_tensors: tensors of the source.
        quantized_parameters, kept_parameters: their values.
        quantized_bytes: bytes of quantized weights with statistics and descriptions.
        kept_bytes: bytes of the other tensors as written.
        squared_error: sum over quantized weights of the squared difference after dequantization.
        squared_norm: sum over quantized weights of their squares.
        nonfinite: number of NaN and infinite values by tensor.
        tensors: keys of the tensors that were written.
    """

    quantized_tensors: int = 0
    kept_tensors: int = 0
    quantized_parameters: int = 0
    kept_parameters: int = 0
    quantized_bytes: int = 0
    kept_bytes: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    nonfinite: dict[str, int] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the sums of another file."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, dict):
                mine.update(value)
            elif isinstance(value, list):
                mine.extend(value)
            else:
                setattr(self, name, mine + value)

    @property
    def relative_rms_error(self) -> float:
        """Root of the squared error over the squared norm; 0 for weights that are all zero."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass
class QuantizeReport:
    """What was done.

    Attributes:
        source, out: the folders.
        format: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        rule: who chose the linear layers.
        compute_dtype: dtype of the matrix products that the configuration asks for.
        skip_modules: modules that the configuration lists as kept; ``None`` for the automatic choice.
        quantized_tensors, kept_tensors, quantized_parameters, kept_parameters: counts.
        bytes_before, bytes_after: bytes of the files of weights.
        ratio: ``bytes_before / bytes_after``.
        bits_per_parameter: of the quantized weights alone, statistics included.
        relative_rms_error: of the quantized weights after dequantization, against the source.
        seconds: time of this run.
        resumed_shards: files that an earlier, interrupted run had finished.
        shards: files of weights.
        left_out: files of the source that were not copied.
        warnings: what the user should know.
    """

    source: str
    out: str
    format: str
    rule: str
    compute_dtype: str
    skip_modules: list[str] | None
    quantized_tensors: int
    kept_tensors: int
    quantized_parameters: int
    kept_parameters: int
    bytes_before: int
    bytes_after: int
    ratio: float
    bits_per_parameter: float
    relative_rms_error: float
    seconds: float
    resumed_shards: int
    shards: list[str]
    left_out: list[str]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)
