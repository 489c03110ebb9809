"""The folder in which a checkpoint grows until it is complete, and takes its final name.

Beside ``OUT`` lies ``OUT.partial-<fingerprint>`` with a manifest and, in ``checkpoint/``, the files
that are finished. The fingerprint covers the source, the options and every decision, so a run that
was cut off is continued by the same call and by no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitsandbytes.checkpoint.report import Tally
from bitsandbytes.checkpoint.source import CONFIG_FILE, read_json
from bitsandbytes.checkpoint.tensorfile import open_tensor_file
from bitsandbytes.checkpoint.tensorwriter import sync_folder, write_text, writing
from bitsandbytes.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: two runs into the same folder are not kept apart there.
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


def fingerprint_of(content: dict[str, Any]) -> str:
    """SHA-256 over everything that decides what is written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_folders(source: Path, out: Path, force: bool) -> None:
    """Refuse an output folder that exists or that would touch the source.

    Raises:
        CheckpointError: see above; with ``force`` only a checkpoint or an empty folder is replaced.
    """
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(f"{out}: overlaps the source {source}; choose a folder outside of it")
    if not there.parent.is_dir():
        raise CheckpointError(f"{out}: its parent folder {there.parent} does not exist")
    if not os.path.lexists(out):
        return
    if not force:
        raise CheckpointError(f"{out}: exists already; pass force (--force) to replace it")
    if out.is_symlink() or not out.is_dir():
        raise CheckpointError(f"{out}: is no folder; it is not replaced")
    if any(out.iterdir()) and not (out / CONFIG_FILE).is_file():
        raise CheckpointError(f"{out}: holds files but no {CONFIG_FILE}, so it is no checkpoint; it is not replaced")


class Workspace:
    """The growing checkpoint. A context manager: it holds a lock against a second run.

    Attributes:
        folder: where finished files lie.
        finished: sums of each finished file of weights.
    """

    def __init__(self, out: Path, fingerprint: str, resume: bool):
        self.out = out.resolve()
        self.root = self.out.with_name(f"{self.out.name}.partial-{fingerprint[:12]}")
        self.folder = self.root / "checkpoint"
        self.finished: dict[str, Tally] = {}
        self._fingerprint = fingerprint
        self._resume = resume
        self._shards: dict[str, dict[str, Any]] = {}
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        with writing(self.root):
            self.root.mkdir(exist_ok=True)
        self._take_lock()
        try:
            if self._resume:
                self._load()
            self._clear()
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
        except BaseException:
            self._release_lock()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._release_lock()

    def others(self) -> list[Path]:
        """Folders of interrupted runs into the same place with other sources or options."""
        return sorted(
            path
            for path in self.out.parent.glob(f"{_escape(self.out.name)}.partial-*")
            if path != self.root and path.is_dir()
        )

    def finish_shard(self, name: str, tally: Tally) -> None:
        """Record that a file of weights is complete and on disk."""
        file = open_tensor_file(self.folder / name)
        self._shards[name] = {"size": file.size, "header": file.header_digest, "tally": asdict(tally)}
        self.finished[name] = tally
        sync_folder(self.folder)
        manifest = {"version": MANIFEST_VERSION, "fingerprint": self._fingerprint, "shards": self._shards}
        write_text(self.root / MANIFEST, json.dumps(manifest, indent=1))

    def publish(self) -> None:
        """Give the finished checkpoint its name; what had it before is removed after that."""
        sync_folder(self.folder)
        old = self.out.with_name(f"{self.out.name}.old-{self._fingerprint[:12]}")
        replaces = os.path.lexists(self.out)
        try:
            if replaces:
                # Left by a run that was killed between the two renames; what stands at OUT is newer.
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.out, old)
            try:
                os.replace(self.folder, self.out)
            except OSError:
                if replaces:
                    os.replace(old, self.out)
                raise
            sync_folder(self.out.parent)
        except OSError as error:
            raise CheckpointError(
                f"{self.out}: the finished checkpoint cannot be moved here and stays in {self.folder}: "
                f"{error.strerror or error}"
            ) from error
        shutil.rmtree(old, ignore_errors=True)
        self._release_lock()
        shutil.rmtree(self.root, ignore_errors=True)

    def _load(self) -> None:
        """Believe the manifest as far as the files bear it out."""
        try:
            manifest = read_json(self.root / MANIFEST)
            if manifest.get("version") != MANIFEST_VERSION or manifest.get("fingerprint") != self._fingerprint:
                return
            for name, entry in manifest["shards"].items():
                file = open_tensor_file(self.folder / name)
                if (file.size, file.header_digest) == (entry["size"], entry["header"]):
                    self.finished[name] = Tally(**entry["tally"])
                    self._shards[name] = entry
        except (CheckpointError, KeyError, TypeError, AttributeError):
            # A manifest or a file that is damaged is made again.
            return

    def _clear(self) -> None:
        """Remove everything that is not a finished file of weights."""
        with writing(self.root):
            if self.folder.is_dir():
                for path in self.folder.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    elif path.name not in self.finished:
                        path.unlink()

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._release_lock()
            raise CheckpointError(f"{self.root}: another run is writing here") from error

    def _release_lock(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)
            self._lock = None


def _escape(name: str) -> str:
    """A file name as a glob pattern that matches just this name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
