"""The whole run: decide, quantize file by file, publish."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch

from bitsandbytes.checkpoint.encode import (
    CHUNK_VALUES,
    LoadedMatrix,
    Matrix,
    StoredMatrix,
    TransposedMatrix,
    write_quantized,
)
from bitsandbytes.checkpoint.options import QuantizeOptions, quantization_config, refuse_quantized
from bitsandbytes.checkpoint.plan import Item, Plan, kept_cast, make_plan
from bitsandbytes.checkpoint.report import Progress, QuantizeReport, Tally
from bitsandbytes.checkpoint.sidecar import copy_sidecars, write_config, write_index
from bitsandbytes.checkpoint.source import Source, open_source
from bitsandbytes.checkpoint.structure import Structure, Target, find_structure
from bitsandbytes.checkpoint.tensorfile import DTYPE_NAMES, TensorInfo, open_tensor_file
from bitsandbytes.checkpoint.tensorwriter import ShardWriter
from bitsandbytes.checkpoint.workspace import Workspace, check_folders, fingerprint_of
from bitsandbytes.errors import CheckpointError

#: Bytes of a kept tensor that are copied at once.
COPY_BYTES = 32 << 20


def quantize_checkpoint(
    source: str | PathLike[str],
    out: str | PathLike[str],
    options: QuantizeOptions | None = None,
    *,
    resume: bool = True,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    chunk_values: int = CHUNK_VALUES,
) -> QuantizeReport:
    """Quantize a checkpoint folder into a new one that ``from_pretrained`` loads.

    Tensors are read, quantized and written one by one, large ones in pieces, so that memory holds
    a piece and the statistics of one tensor. The bytes are those that transformers gets when it
    quantizes on loading. The new folder appears when it is complete. A run that was interrupted
    leaves ``OUT.partial-…`` beside it, which the same call continues.

    Args:
        source: folder with ``config.json`` and safetensors files. It is only read.
        out: folder to be made.
        options: format and its options; nf4 in blocks of 64 where not given.
        resume: continue an interrupted run with the same source and options; else start again.
        force: replace an existing checkpoint folder, after the new one is complete.
        progress: called after every tensor.
        chunk_values: values that are quantized at once; less needs less memory.

    Returns:
        Sizes, error and warnings.

    Raises:
        ArgumentError: an option is out of range.
        CheckpointError: the source is damaged, incomplete or quantized already, or ``out`` cannot be
            written; the message names file and tensor. ``out`` is as it was.
    """
    started = time.monotonic()
    options = options or QuantizeOptions()
    source_folder, out_folder = Path(source), Path(out)
    check_folders(source_folder, out_folder, force)
    checkpoint = open_source(source_folder)
    try:
        refuse_quantized(checkpoint.config, set(checkpoint.names()), str(source_folder))
        structure = find_structure(checkpoint, options)
        plan = make_plan(checkpoint, structure, options)
        with Workspace(out_folder, _fingerprint(checkpoint, structure, plan, options), resume) as workspace:
            resumed = len(workspace.finished)
            _check_space(plan, workspace)
            _write_shards(checkpoint, plan, options, workspace, progress, chunk_values)
            report = _complete(checkpoint, structure, plan, options, workspace)
            _check_unchanged(checkpoint)
            workspace.publish()
    finally:
        checkpoint.close()
    report.resumed_shards = resumed
    report.seconds = round(time.monotonic() - started, 3)
    return report


def _fingerprint(source: Source, structure: Structure, plan: Plan, options: QuantizeOptions) -> str:
    from bitsandbytes import __version__

    return fingerprint_of(
        {
            "version": __version__,
            "source": [str(source.folder.resolve()), source.fingerprint()],
            "config": hashlib.sha256(json.dumps(source.config, sort_keys=True).encode()).hexdigest(),
            "options": options.as_dict(),
            "structure": [structure.rule, structure.skip_modules],
            "plan": plan.digest,
        }
    )


def _check_space(plan: Plan, workspace: Workspace) -> None:
    """Refuse at once what cannot fit; a file needs its space twice while it is put together."""
    left = sum(item.nbytes for shard in plan.shards if shard.name not in workspace.finished for item in shard.items)
    needed = left + (plan.largest_shard if left else 0)
    free = shutil.disk_usage(workspace.root).free
    if needed > free:
        raise CheckpointError(
            f"{workspace.out}: needs up to {needed:,} bytes while it is written, the disk has {free:,} free; "
            "free some space or make max_shard_bytes smaller"
        )


def _check_unchanged(source: Source) -> None:
    for file in source.files.values():
        now = open_tensor_file(file.path)
        if (now.size, now.mtime_ns, now.header_digest) != (file.size, file.mtime_ns, file.header_digest):
            raise CheckpointError(f"{file.path}: was changed while it was read; run again")


def _write_shards(
    source: Source,
    plan: Plan,
    options: QuantizeOptions,
    workspace: Workspace,
    progress: Callable[[Progress], None] | None,
    chunk_values: int,
) -> None:
    done = 0
    for shard in plan.shards:
        if shard.name in workspace.finished:
            done += sum(item.read_bytes for item in shard.items)
            if progress is not None:
                progress(Progress(done, plan.read_bytes, shard.name, ""))
            continue
        with ShardWriter(workspace.folder / shard.name) as writer:
            tally = Tally()
            for item in shard.items:
                _write_item(writer, source, item, options, tally, chunk_values)
                done += item.read_bytes
                if progress is not None:
                    progress(Progress(done, plan.read_bytes, shard.name, item.targets[0].name))
            tally.tensors = writer.names()
            writer.finish()
        workspace.finish_shard(shard.name, tally)


def _write_item(
    writer: ShardWriter,
    source: Source,
    item: Item,
    options: QuantizeOptions,
    tally: Tally,
    chunk_values: int,
) -> None:
    if item.reshaping is not None:
        _write_reshaped(writer, source, item, options, tally, chunk_values)
        return
    info, target = item.sources[0], item.targets[0]
    file = source.file(info.name)
    if not target.quantize:
        _write_kept(writer, source, info, kept_cast(info, target, options), tally)
        return
    kind = TransposedMatrix if target.transposed else StoredMatrix
    _write_matrix(writer, target, kind(file, info, target.cast_for(options.cast_dtype)), options, tally, chunk_values)


def _write_matrix(
    writer: ShardWriter, target: Target, matrix: Matrix, options: QuantizeOptions, tally: Tally, chunk_values: int
) -> None:
    before = writer.nbytes
    write_quantized(writer, target.name, matrix, options, tally, chunk_values)
    tally.quantized_tensors += 1
    tally.quantized_parameters += matrix.shape[0] * matrix.shape[1]
    tally.quantized_bytes += writer.nbytes - before


def _write_kept(writer: ShardWriter, source: Source, info: TensorInfo, dtype: torch.dtype | None, tally: Tally) -> None:
    """Copy a tensor in pieces, as it is or cast."""
    before, file = writer.nbytes, source.file(info.name)
    writer.begin(info.name, info.dtype if dtype is None else DTYPE_NAMES[dtype], info.shape)
    if dtype is None:
        for first in range(0, info.nbytes, COPY_BYTES):
            writer.write(file.read_bytes(info, first, min(COPY_BYTES, info.nbytes - first)))
    else:
        step = COPY_BYTES // info.itemsize
        for first in range(0, info.numel, step):
            writer.write(file.read(info, first, min(step, info.numel - first)).to(dtype))
    writer.end()
    tally.kept_tensors += 1
    tally.kept_parameters += info.numel
    tally.kept_bytes += writer.nbytes - before


def _write_reshaped(
    writer: ShardWriter, source: Source, item: Item, options: QuantizeOptions, tally: Tally, chunk_values: int
) -> None:
    """Convert tensors as the architecture asks, and quantize or keep what comes out."""
    assert item.reshaping is not None
    tensors = {}
    for info in item.sources:
        tensor = source.file(info.name).read(info, 0, info.numel).reshape(info.shape)
        tensors[info.name] = tensor if options.cast_dtype is None else tensor.to(options.cast_dtype)
    made = item.reshaping.convert(tensors)
    tensors.clear()
    for target in item.targets:
        if target.name not in made or tuple(made[target.name].shape) != target.shape:
            got = f"shape {tuple(made[target.name].shape)}" if target.name in made else "nothing"
            where = source.where(item.sources[0].name)
            raise CheckpointError(f"{where} gives {got} for {target.name!r}, the architecture has {target.shape}")
        tensor = made.pop(target.name)
        if target.quantize and target.full_precision:
            tensor = tensor.float()
        if target.quantize:
            matrix = LoadedMatrix(tensor.t().contiguous() if target.transposed else tensor)
            _write_matrix(writer, target, matrix, options, tally, chunk_values)
        else:
            before = writer.nbytes
            writer.add(target.name, tensor)
            tally.kept_tensors += 1
            tally.kept_parameters += tensor.numel()
            tally.kept_bytes += writer.nbytes - before


def _complete(
    source: Source, structure: Structure, plan: Plan, options: QuantizeOptions, workspace: Workspace
) -> QuantizeReport:
    """Add the files that are not weights and sum up."""
    total = Tally()
    for shard in plan.shards:
        total.add(workspace.finished[shard.name])
    left_out, warnings = copy_sidecars(source, workspace.folder)
    entry = quantization_config(options, plan.compute_dtype, structure.skip_modules)
    write_config(source, workspace.folder, entry, options.dtype)
    parameters = total.quantized_parameters + total.kept_parameters
    if len(plan.shards) > 1:
        keys = {shard.name: workspace.finished[shard.name].tensors for shard in plan.shards}
        write_index(workspace.folder, keys, parameters, total.quantized_bytes + total.kept_bytes)
    after = sum((workspace.folder / shard.name).stat().st_size for shard in plan.shards)
    return QuantizeReport(
        source=str(source.folder),
        out=str(workspace.out),
        format=options.format,
        rule=structure.rule,
        compute_dtype=plan.compute_dtype,
        skip_modules=structure.skip_modules,
        quantized_tensors=total.quantized_tensors,
        kept_tensors=total.kept_tensors,
        quantized_parameters=total.quantized_parameters,
        kept_parameters=total.kept_parameters,
        bytes_before=source.nbytes,
        bytes_after=after,
        ratio=source.nbytes / after,
        bits_per_parameter=8 * total.quantized_bytes / max(total.quantized_parameters, 1),
        relative_rms_error=total.relative_rms_error,
        seconds=0.0,
        resumed_shards=0,
        shards=[shard.name for shard in plan.shards],
        left_out=left_out,
        warnings=[
            *source.warnings,
            *structure.warnings,
            *warnings,
            *_value_warnings(total),
            *_dtype_warnings(source, options, plan),
            *[f"{path} is left from an interrupted run with other options" for path in workspace.others()],
        ],
    )


def _value_warnings(total: Tally) -> list[str]:
    return [f"tensor {name!r} has {count} values that are NaN or infinite" for name, count in total.nonfinite.items()]


def _dtype_warnings(source: Source, options: QuantizeOptions, plan: Plan) -> list[str]:
    """A configuration may promise another dtype than the weights have; loading casts to it first."""
    stated = source.config.get("dtype") or source.config.get("torch_dtype")
    if options.dtype is not None or not isinstance(stated, str):
        return []
    names = {str(dtype).removeprefix("torch."): name for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
    quantized = _quantized_dtypes(plan)
    if stated in names and quantized != {names[stated]}:
        return [
            f"config.json says {stated}, the quantized weights have {', '.join(sorted(quantized))}; "
            f"dtype {stated} would cast them first, as loading does"
        ]
    return []


def _quantized_dtypes(plan: Plan) -> set[str]:
    return {
        info.dtype
        for shard in plan.shards
        for item in shard.items
        if any(target.quantize for target in item.targets)
        for info in item.sources
    }
