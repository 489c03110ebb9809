"""Facade for the historical import path of the layers."""

from bitsandbytes.functional import (
    QuantState,
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
    has_avx512bf16,
)
from bitsandbytes.nn.embedding import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    StableEmbedding,
)
from bitsandbytes.nn.int8_params import Int8Params
from bitsandbytes.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from bitsandbytes.nn.linear8bit import Linear8bitLt
from bitsandbytes.nn.outliers import OutlierAwareLinear
from bitsandbytes.nn.params4bit import Params4bit
from bitsandbytes.nn.storage4bit import fix_4bit_weight_quant_state_from_module
from bitsandbytes.nn.storage8bit import maybe_rearrange_weight
from bitsandbytes.optim import GlobalOptimManager
from bitsandbytes.utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "GlobalOptimManager",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "OutlierTracer",
    "Params4bit",
    "QuantState",
    "StableEmbedding",
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "fix_4bit_weight_quant_state_from_module",
    "has_avx512bf16",
    "maybe_rearrange_weight",
]
