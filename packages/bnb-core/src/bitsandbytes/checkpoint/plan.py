"""The list of work: what is written, in which order, into which files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import ceil, prod

import torch

from bitsandbytes.checkpoint.options import STORAGE_DTYPES, QuantizeOptions
from bitsandbytes.checkpoint.source import SINGLE_FILE, Source
from bitsandbytes.checkpoint.structure import Reshaping, Structure, Target
from bitsandbytes.checkpoint.tensorfile import DTYPE_NAMES, FLOAT_DTYPES, TensorInfo
from bitsandbytes.errors import CheckpointError
from bitsandbytes.ops.common import NESTED_BLOCKSIZE, block_count

#: Room for the packed description of a 4-bit tensor, which has 100 to 250 bytes.
DESCRIPTION_BYTES = 256

#: Values that the codebook of 4-bit codes and that of nested statistics have.
CODEBOOK_VALUES, NESTED_CODEBOOK_VALUES = 16, 256


@dataclass(frozen=True)
class Item:
    """Tensors that are read together and written into one file.

    Attributes:
        sources: tensors that are read.
        targets: tensors that are written, companions not counted.
        reshaping: the conversion between them, where they are not the same.
        nbytes: bytes that are written, at most.
    """

    sources: tuple[TensorInfo, ...]
    targets: tuple[Target, ...]
    nbytes: int
    reshaping: Reshaping | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes that are read."""
        return sum(info.nbytes for info in self.sources)


@dataclass(frozen=True)
class Shard:
    """One file of weights and what goes into it."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that is going to be written.

    Attributes:
        shards: the files.
        compute_dtype: dtype of the matrix products, resolved.
        digest: fingerprint of the plan; another decision gives another one.
    """

    shards: tuple[Shard, ...]
    compute_dtype: str
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are written, at most."""
        return sum(item.nbytes for shard in self.shards for item in shard.items)

    @property
    def read_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(item.read_bytes for shard in self.shards for item in shard.items)

    @property
    def largest_shard(self) -> int:
        """Bytes of the largest file, at most."""
        return max(sum(item.nbytes for item in shard.items) for shard in self.shards)


def make_plan(source: Source, structure: Structure, options: QuantizeOptions) -> Plan:
    """Check every tensor and distribute the work over files.

    Raises:
        CheckpointError: a tensor cannot be quantized, or none is to be.
    """
    items = [*_items(source, structure, options)]
    quantized = [info for item in items for info in item.sources if any(target.quantize for target in item.targets)]
    if not quantized:
        raise CheckpointError(
            f"{source.folder}: nothing to quantize: no weight of a linear layer is left (chosen by {structure.rule})"
        )
    groups = _split(items, options.max_shard_bytes)
    names = [SINGLE_FILE] if len(groups) == 1 else [_shard_name(index, len(groups)) for index in range(len(groups))]
    shards = tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True))
    return Plan(shards, options.compute_dtype or _weight_dtype(quantized, options), _digest(shards))


def _items(source: Source, structure: Structure, options: QuantizeOptions) -> list[Item]:
    grouped = {key: reshaping for reshaping in structure.reshapings for key in reshaping.sources}
    items, done = [], set()
    for key in source.names():
        reshaping = grouped.get(key)
        if reshaping is None:
            items.append(_single_item(source, key, structure.targets.get(key, Target(key)), options))
        elif reshaping.sources not in done:
            done.add(reshaping.sources)
            items.append(_reshaped_item(source, reshaping, options))
    return items


def _single_item(source: Source, key: str, target: Target, options: QuantizeOptions) -> Item:
    info = source.info(key)
    cast = kept_cast(info, target, options)
    if target.quantize:
        _check_quantizable(source, info, target.cast_for(options.cast_dtype))
        return Item((info,), (target,), _quantized_bytes(source.where(key), info.shape, options))
    return Item((info,), (target,), info.nbytes if cast is None else info.numel * cast.itemsize)


def kept_cast(info: TensorInfo, target: Target, options: QuantizeOptions) -> torch.dtype | None:
    """The dtype that a tensor which is not quantized is cast to, if any."""
    return target.cast_for(options.cast_dtype) if info.dtype in FLOAT_DTYPES else None


def _reshaped_item(source: Source, reshaping: Reshaping, options: QuantizeOptions) -> Item:
    infos = tuple(source.info(key) for key in reshaping.sources)
    nbytes = 0
    for info in infos:
        _check_quantizable(source, info, options.cast_dtype, matrix=False)
    for target in reshaping.targets:
        if target.name in source:
            raise CheckpointError(f"{source.where(target.name)} is also made from {reshaping.sources[0]!r}")
        if target.shape is None:
            raise CheckpointError(f"{source.where(reshaping.sources[0])}: the architecture has no {target.name!r}")
        if target.quantize:
            nbytes += _quantized_bytes(f"{source.folder}: tensor {target.name!r}", target.shape, options)
        else:
            nbytes += prod(target.shape) * (options.cast_dtype or torch.float64).itemsize
    return Item(infos, reshaping.targets, nbytes, reshaping)


def _check_quantizable(source: Source, info: TensorInfo, cast: torch.dtype | None, matrix: bool = True) -> None:
    allowed = FLOAT_DTYPES if cast is not None else FLOAT_DTYPES - {"F64"}
    if info.dtype not in allowed:
        advice = "; pass dtype to cast it first" if info.dtype == "F64" else ""
        raise CheckpointError(
            f"{source.where(info.name)} is the weight of a linear layer and has dtype {info.dtype}; "
            f"weights of dtype {', '.join(sorted(allowed))} can be quantized{advice}"
        )
    if matrix and len(info.shape) != 2:
        raise CheckpointError(f"{source.where(info.name)} is the weight of a linear layer, but has shape {info.shape}")


def _quantized_bytes(where: str, shape: tuple[int, ...], options: QuantizeOptions) -> int:
    count = prod(shape)
    if not options.four_bit:
        return count + 4 * shape[0] + 1
    packed, itemsize = ceil(count / 2), STORAGE_DTYPES[options.storage].itemsize
    if packed % itemsize:
        raise CheckpointError(
            f"{where} packs into {packed} bytes, which storage {options.storage} of {itemsize} bytes does not divide; "
            "use storage uint8"
        )
    blocks = block_count(count, options.blocksize)
    statistics = 4 * blocks
    if options.double_quant:
        statistics = blocks + 4 * block_count(blocks, NESTED_BLOCKSIZE) + 4 * NESTED_CODEBOOK_VALUES
    return packed + statistics + 4 * CODEBOOK_VALUES + DESCRIPTION_BYTES


def _split(items: list[Item], limit: int) -> list[list[Item]]:
    """Fill files one after the other; companions of a tensor stay beside it."""
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    return groups


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _weight_dtype(quantized: list[TensorInfo], options: QuantizeOptions) -> str:
    """The dtype that most weights have when they are quantized."""
    if options.dtype:
        return options.dtype
    sizes: dict[str, int] = {}
    for info in quantized:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    names = {DTYPE_NAMES[dtype]: str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES}
    return names[max(sizes, key=lambda dtype: sizes[dtype])]


def _digest(shards: tuple[Shard, ...]) -> str:
    """Fingerprint of all decisions about tensors."""
    content = [
        [shard.name, [[[info.name for info in item.sources], [str(t) for t in item.targets]] for item in shard.items]]
        for shard in shards
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
