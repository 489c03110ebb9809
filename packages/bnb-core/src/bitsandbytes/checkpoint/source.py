"""The folder to be quantized: which files it has, which tensors they hold, and a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitsandbytes.checkpoint.tensorfile import MAX_HEADER_BYTES, TensorFile, TensorInfo, open_tensor_file, parse_object
from bitsandbytes.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


@dataclass
class Source:
    """A checkpoint folder with its headers read.

    Attributes:
        folder: the folder.
        config: ``config.json``.
        files: files of weights by name.
        warnings: oddities that do not stop the work.
    """

    folder: Path
    config: dict[str, Any]
    files: dict[str, TensorFile]
    warnings: list[str] = field(default_factory=list)
    _home: dict[str, TensorFile] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for file in self.files.values():
            for key in file.tensors:
                if key in self._home:
                    raise CheckpointError(
                        f"{self.folder}: tensor {key!r} is in two files, "
                        f"{self._home[key].path.name} and {file.path.name}"
                    )
                self._home[key] = file

    def __contains__(self, key: str) -> bool:
        return key in self._home

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        return sorted(self._home, key=_natural_key)

    def info(self, key: str) -> TensorInfo:
        """Where a tensor lies in its file."""
        return self._home[key].tensors[key]

    def file(self, key: str) -> TensorFile:
        """The file that holds a tensor."""
        return self._home[key]

    def where(self, key: str) -> str:
        """File and tensor, for messages."""
        return f"{self._home[key].path}: tensor {key!r}"

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(file.size for file in self.files.values())

    def fingerprint(self) -> dict[str, Any]:
        """What tells one state of the folder from another without reading the weights."""
        return {name: [file.size, file.mtime_ns, file.header_digest] for name, file in sorted(self.files.items())}

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: has more than {MAX_HEADER_BYTES} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_object(str(path), text)


def read_weight_map(index: Path) -> dict[str, str]:
    """The table of an index: file name by tensor.

    Raises:
        CheckpointError: the table is missing or damaged, or a file name leads out of the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for key, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0:")
        if not plain or name.startswith("."):
            raise CheckpointError(
                f"{index}: tensor {key!r} is said to be in {name!r:.200}; expected the plain name of a "
                ".safetensors file in the same folder"
            )
    return weight_map


def open_weights(folder: Path) -> tuple[dict[str, TensorFile], list[str]]:
    """Open the files of weights of a folder: a single one, or those that an index names.

    Returns:
        The files by name, and warnings.

    Raises:
        CheckpointError: there are none, one is missing or damaged, or index and files disagree.
    """
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: open_tensor_file(folder / SINGLE_FILE)}, []
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(_no_weights(folder))
    weight_map = read_weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: names {len(missing)} files that are missing: {', '.join(missing[:5])}")
    files = {name: open_tensor_file(folder / name) for name in names}
    for key, name in weight_map.items():
        if key not in files[name].tensors:
            raise CheckpointError(f"{folder / name}: tensor {key!r} is missing, though {INDEX_FILE} says it is here")
    extra = [key for file in files.values() for key in file.tensors if key not in weight_map]
    warnings = [f"{INDEX_FILE} does not list {len(extra)} tensors, such as {extra[0]!r}"] if extra else []
    return files, warnings


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: is no folder"
    found = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5")
    )
    seen = f"; it has {', '.join(found[:5])}" if found else ""
    return (
        f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}{seen}; "
        "load it with its own library and save it with save_pretrained first"
    )


def open_source(folder: Path) -> Source:
    """Read configuration and headers of the folder to be quantized.

    Raises:
        CheckpointError: something is missing, damaged or contradictory.
    """
    files, warnings = open_weights(folder)
    source = Source(folder, read_json(folder / CONFIG_FILE), files, warnings)
    if not source.names():
        raise CheckpointError(f"{folder}: holds no tensors")
    return source
