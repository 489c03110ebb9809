"""Writing safetensors files piece by piece.

A header stands before the data and needs every length, but the length of a packed description is
known only after its tensor is quantized. So the data goes to a spool file in the order in which it
comes, and the final file is put together from it. Order and padding are those of the ``safetensors``
package: the same tensors give the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bitsandbytes.checkpoint.tensorfile import DTYPE_BITS, DTYPE_NAMES, LENGTH_BYTES, TensorInfo, bytes_of
from bitsandbytes.errors import CheckpointError

#: What transformers writes as well; it marks row-major tensors of PyTorch.
METADATA = {"format": "pt"}

COPY_BYTES = 16 << 20

_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a :class:`CheckpointError` that names the file."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space and run again, finished shards are kept" if full else ""
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}{advice}") from error


class ShardWriter:
    """One safetensors file in the making.

    Use it as a context manager: without :meth:`finish`, nothing but the spool file was touched, and
    leaving the block removes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._spool_path = path.with_name(path.name + ".spool")
        self._entries: list[TensorInfo] = []
        self._open: tuple[str, str, tuple[int, ...], int] | None = None
        self._end = 0
        with writing(self._spool_path):
            self._spool: Any = self._spool_path.open("w+b", buffering=0)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)

    def begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Start a tensor whose bytes come in pieces, through :meth:`write`."""
        self._open = (name, dtype, shape, self._end)

    def write(self, piece: torch.Tensor) -> None:
        """Append the bytes of a contiguous CPU tensor to the tensor that was begun."""
        if not piece.numel():
            return
        data = bytes_of(piece)
        with writing(self.path):
            while data:
                done = self._spool.write(data)
                self._end += done
                data = data[done:]

    def end(self) -> TensorInfo:
        """Close the tensor that was begun, and check its length."""
        assert self._open is not None
        name, dtype, shape, start = self._open
        info = TensorInfo(name, dtype, shape, start, self._end - start)
        assert info.nbytes * 8 == info.numel * DTYPE_BITS[dtype], f"{name}: {info.nbytes} bytes for {dtype} {shape}"
        self._entries.append(info)
        self._open = None
        return info

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""
        self.begin(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        self.write(tensor.contiguous())
        self.end()

    def reread(self, start: int, count: int) -> torch.Tensor:
        """Bytes ``start`` to ``start + count`` of the tensor that was begun or ended last."""
        base = self._open[3] if self._open is not None else self._entries[-1].start
        piece = torch.empty(count, dtype=torch.uint8)
        with writing(self.path):
            self._spool.seek(base + start)
            target = bytes_of(piece)
            while target:
                target = target[self._spool.readinto(target) or len(target) :]
            self._spool.seek(0, os.SEEK_END)
        return piece

    @property
    def nbytes(self) -> int:
        """Bytes that were written so far."""
        return self._end

    def names(self) -> list[str]:
        """Keys of the tensors that were written so far."""
        return [info.name for info in self._entries]

    def finish(self) -> int:
        """Put the file together and move it into place. Returns its size in bytes."""
        entries = sorted(self._entries, key=lambda info: (_RANK[info.dtype], info.name))
        header: dict[str, Any] = {"__metadata__": METADATA}
        position = 0
        for info in entries:
            header[info.name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [position, position + info.nbytes],
            }
            position += info.nbytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % LENGTH_BYTES)
        part = self.path.with_name(self.path.name + ".part")
        try:
            with writing(self.path), part.open("wb") as file:
                file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
                for info in entries:
                    self._copy(info, file)
                file.flush()
                os.fsync(file.fileno())
            with writing(self.path):
                os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        return LENGTH_BYTES + len(text) + position

    def _copy(self, info: TensorInfo, file: Any) -> None:
        self._spool.seek(info.start)
        left = info.nbytes
        while left:
            piece = self._spool.read(min(left, COPY_BYTES))
            file.write(piece)
            left -= len(piece)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either complete or absent."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
