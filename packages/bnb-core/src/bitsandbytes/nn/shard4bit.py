"""What a process holds of a packed 4-bit weight that FSDP2 has spread over processes.

Packed codes that are stored in a floating dtype are no numbers, and many of them are patterns of NaN. FSDP2
copies parameters into the buffer of its all-gather with ``torch._foreach_copy_``, whose CUDA kernel goes through
float and writes one and the same NaN for all of them (pytorch/pytorch#159333), and with mixed precision it
converts them. A shard of the class here hands it integers instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

_aten = torch.ops.aten

#: The integers of the size of a floating dtype.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Views, copies and new tensors of the same kind: what sharding, moving, saving and loading do to a shard. They work
#: on integers, and their results are shards again.
_KEPT: frozenset[Any] = frozenset(
    (
        _aten.detach.default,
        _aten.alias.default,
        _aten.view.default,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.as_strided.default,
        _aten.clone.default,
        _aten._to_copy.default,
        _aten._pin_memory.default,
        _aten.new_zeros.default,
        _aten.new_empty.default,
        _aten.empty_like.default,
        _aten.zeros_like.default,
    )
)


class Shard4bit(torch.Tensor):
    """Packed codes with a floating dtype outside and integers inside.

    FSDP2 makes its shards of what :class:`~bitsandbytes.nn.Params4bit` gives it, and calls the two methods ``fsdp_*``
    for each all-gather. Views, copies and moves of a shard are shards; every other op gets a plain tensor of the
    floating dtype around the same memory. It pickles as such a tensor, so that checkpoints need no class of ours.

    Args:
        codes: integers of the item size of ``dtype``, of any shape.
        dtype: the dtype that the codes are stored as.
    """

    codes: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch types it otherwise

    @staticmethod
    def __new__(cls, codes: torch.Tensor, dtype: torch.dtype) -> Shard4bit:  # noqa: D102  # the class says it
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            codes.shape,
            strides=codes.stride(),
            storage_offset=codes.storage_offset(),
            dtype=dtype,
            device=codes.device,
        )
        self.codes = codes
        return self

    @classmethod
    def of(cls, packed: torch.Tensor) -> Shard4bit:
        """The shard in the memory of ``packed``, a plain tensor of a floating dtype and any shape."""
        return cls(packed.view(_INTEGERS[packed.itemsize]), packed.dtype)

    def plain(self) -> torch.Tensor:
        """A plain tensor of the floating dtype in the same memory."""
        return self.codes.view(self.dtype)

    def fsdp_pre_all_gather(
        self,
        mesh: Any,
        outer_size: torch.Size | None = None,
        outer_stride: Any = None,
        module: Any = None,
        mp_policy: Any = None,
    ) -> tuple[tuple[torch.Tensor], None]:
        """What this process sends, called by FSDP2.

        Args:
            mesh: the processes that the weight is spread over.
            outer_size: shape of the whole weight. The first releases of FSDP2 do not say it, and refuse to spread
                rows that the number of processes does not divide.
            outer_stride: not used.
            module: not used.
            mp_policy: not used; codes are never converted.

        Returns:
            The integers, with as many rows as the first process has, and nothing to remember.
        """
        codes = self.codes
        rows = codes.shape[0] if outer_size is None else -(-outer_size[0] // mesh.size())
        if codes.shape[0] < rows:
            padded = codes.new_zeros((rows, *codes.shape[1:]))
            padded[: codes.shape[0]].copy_(codes)
            codes = padded
        return (codes,), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """The whole weight from what all processes sent, called by FSDP2.

        Args:
            all_gather_outputs: the integers of all processes, padding included, in memory that FSDP2 frees after use
                and allocates again for the next.
            metadata: not used.
            param_dtype: not used; codes keep their dtype.
            out: what the first call returned, from the second on.

        Returns:
            The codes in that memory, and no further tensors to free; nothing with ``out``, which is that memory.

        Raises:
            RuntimeError: ``out`` lies elsewhere.
        """
        (gathered,) = all_gather_outputs
        if out is None:
            return gathered.view(self.dtype), ()
        if out.untyped_storage().data_ptr() != gathered.untyped_storage().data_ptr():
            raise RuntimeError("FSDP2 gathered a 4-bit weight into other memory than that of its parameter")
        return None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types a method of an instance
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Shard4bit):
            if func in _KEPT and kwargs.get("dtype") in (None, first.dtype):
                given = {key: value for key, value in kwargs.items() if key != "dtype"}
                result = func(first.codes, *args[1:], **given)
                return tree_map(lambda codes: cls(codes, first.dtype), result)
            if func is _aten.copy_.default and args[1].dtype == first.dtype:
                source = args[1] if isinstance(args[1], Shard4bit) else cls.of(args[1])
                first.codes.copy_(source.codes, *args[2:], **kwargs)
                return first
        return _run_plain(func, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)


def with_shard_class_of(before: Any, weight: Any) -> Any:
    """A sharded weight whose part on this process is a :class:`Shard4bit` where that of the one before it was.

    Args:
        before: a DTensor or any other tensor, whose place ``weight`` takes.
        weight: a DTensor, whose part may be a plain tensor that was loaded.

    Returns:
        ``weight`` itself where nothing is to be done, else a parameter in the same memory.
    """
    local = weight.to_local()
    if not hasattr(before, "to_local") or not isinstance(before.to_local(), Shard4bit) or isinstance(local, Shard4bit):
        return weight
    spread = type(weight).from_local(
        Shard4bit.of(local.detach()),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return torch.nn.Parameter(spread, requires_grad=False)


def _run_plain(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an op on plain tensors in the place of shards."""
    shards: dict[int, Shard4bit] = {}

    def plain(value: Any) -> Any:
        if not isinstance(value, Shard4bit):
            return value
        tensor = value.plain()
        shards[id(tensor)] = value
        return tensor

    args, kwargs = tree_map(plain, (args, kwargs))
    result = func(*args, **kwargs)
    # An op that works in place returns its operand.
    return shards.get(id(result), result)
