"""Quantize and inspect checkpoint folders in the safetensors format, in bounded memory.

:func:`quantize_checkpoint` turns a folder as ``save_pretrained`` writes it into a pre-quantized one
that ``from_pretrained`` loads; :func:`inspect_checkpoint` says what such a folder or file holds.
The files are described in ``docs/formats.md``.
"""

from bitsandbytes.checkpoint.inspection import CheckpointSummary, TensorSummary, inspect_checkpoint
from bitsandbytes.checkpoint.options import QuantizeOptions, parse_size
from bitsandbytes.checkpoint.pipeline import quantize_checkpoint
from bitsandbytes.checkpoint.report import Progress, QuantizeReport
from bitsandbytes.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "CheckpointSummary",
    "Progress",
    "QuantizeOptions",
    "QuantizeReport",
    "TensorSummary",
    "inspect_checkpoint",
    "parse_size",
    "quantize_checkpoint",
]
