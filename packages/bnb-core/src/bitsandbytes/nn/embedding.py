"""Embeddings: stable ones for training, and quantized ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from bitsandbytes.errors import ArgumentError
from bitsandbytes.nn.int8_params import Int8Params
from bitsandbytes.nn.params4bit import Params4bit
from bitsandbytes.nn.storage4bit import Storage4bit, fix_4bit_weight_quant_state_from_module
from bitsandbytes.nn.storage8bit import Storage8bit
from bitsandbytes.optim import GlobalOptimManager
from bitsandbytes.state import QuantState

_ops = torch.ops.bitsandbytes


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` with Xavier uniform initialisation and 32-bit optimizer state.

    Updates of embedding rows are rare and large, which 8-bit state handles badly (8-bit Optimizers,
    arXiv:2110.02861, section 2.3).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )
        _keep_32bit_state(self)

    def reset_parameters(self) -> None:
        """Xavier uniform values, zeros at ``padding_idx``."""
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def _fill_padding_idx_with_zero(self) -> None:
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up ``input``, int64 or int32 of any shape."""
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class StableEmbedding(Embedding):
    """:class:`Embedding` followed by a layer normalisation, computed in torch's default dtype.

    Source: 8-bit Optimizers (arXiv:2110.02861), section 2.3.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Embedding.__init__(
            self,
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device)
        _keep_32bit_state(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up ``input`` and normalise; the result has the dtype of the weight."""
        rows = super().forward(input).to(torch.get_default_dtype())
        return self.norm(rows).to(self.weight.dtype)


def _keep_32bit_state(module: torch.nn.Module) -> None:
    GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


class Embedding8bit(Storage8bit, torch.nn.Embedding):
    """An embedding whose table is quantized to int8, row by row, by the first move to a device.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: size of a row.
        device: where to create the table.
        dtype: dtype of the result, and of the table before it is quantized.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.data.dtype
        self.weight = Int8Params(self.weight.data, requires_grad=False, has_fp16_weights=False)
        self._prepare_storage()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up ``input``: the rows of the dequantized table, in ``self.dtype``."""
        weight = self.weight
        if weight.dtype != torch.int8:
            return functional.embedding(input, weight).to(self.dtype)
        scales = self._scales()
        if scales is None:
            raise ArgumentError(
                "Embedding8bit: the table holds int8 codes, but weight.SCB, their absmax by row, is None"
            )
        rows = functional.embedding(input, weight.data)
        return _ops.int8_vectorwise_dequant.default(rows, scales[input]).to(self.dtype)


class Embedding4bit(Storage4bit, torch.nn.Embedding):
    """An embedding whose table is quantized to 4 bit by the first move to a device.

    Only the rows that are looked up are dequantized; ``embedding_dim`` need not be a multiple of the
    block size.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: size of a row.
        dtype: dtype of the result, and of the table before it is quantized.
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are stored as.
        device: where to create the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: Any = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.data.dtype
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state: QuantState | None = None
        self._default_quant_type = quant_type

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up ``input``: the rows of the dequantized table, in ``self.dtype``."""
        fix_4bit_weight_quant_state_from_module(self)
        weight = self.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            return functional.embedding(input, weight).to(self.dtype)
        return _ops.embedding_4bit.default(
            input,
            weight.data,
            state.shape,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=self.dtype,
            **state.nested_arguments(),
        )

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="fp4"``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: Any = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="nf4"``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: Any = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)
