"""Runs the conformance kit against one backend, in processes of their own.

A kernel under test may crash its process or leave a GPU that no longer answers. Then that check has
failed, and the run goes on with the next one in a new process. In these processes the backend is the
only one that is loaded, so that no other one answers in its place.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bitsandbytes.backends.settings import ALLOW, DENY, STRICT
from bitsandbytes.errors import BackendError
from bitsandbytes.testing.gaps import Outcome
from bitsandbytes.testing.selection import Selection
from bitsandbytes.testing.worker import DEVICE_LOST

#: After this many processes that died the run ends: what is left would tell nothing new.
MOST_CRASHES = 20


@dataclass
class OpReport:
    """Checks of one op, counted by outcome."""

    passed: int = 0
    failed: int = 0
    gaps: int = 0
    #: Checks in which the backend's own kernel ran, of those that call the op with valid arguments.
    native: int = 0
    calling: int = 0


@dataclass
class Conformance:
    """What came out of a run on one device."""

    name: str
    device: str
    total: int = 0
    ops: dict[str, OpReport] = field(default_factory=dict)
    #: Id and text of each failure, listed checks that passed included.
    failures: list[tuple[str, str]] = field(default_factory=list)
    #: Id and reason of each declared gap.
    gaps: list[tuple[str, str]] = field(default_factory=list)
    #: Processes that died.
    crashes: int = 0
    #: Whether it is known which calls the backend's own kernels served.
    counts_native: bool = True

    @property
    def conforms(self) -> bool:
        """Whether every check was run, and passed or is a declared gap."""
        done = sum(op.passed + op.failed + op.gaps for op in self.ops.values())
        return not self.failures and done == self.total

    def as_dict(self) -> dict[str, Any]:
        """The result for ``--json``."""
        return {
            "name": self.name,
            "device": self.device,
            "conforms": self.conforms,
            "total": self.total,
            "crashes": self.crashes,
            "ops": {name: self._op(report) for name, report in self.ops.items()},
            "failures": [{"id": name, "text": text} for name, text in self.failures],
            "gaps": [{"id": name, "reason": text} for name, text in self.gaps],
        }

    def _op(self, report: OpReport) -> dict[str, Any]:
        return vars(report) | {"native": report.native if self.counts_native else None}

    def record(self, op: str, check: str, name: str, outcome: Outcome, text: str, native: bool | None) -> None:
        """Count the outcome of one check."""
        report = self.ops.setdefault(op, OpReport())
        if check != "refuses":
            report.calling += 1
            report.native += bool(native)
        self.counts_native &= native is not None
        if outcome is Outcome.PASSED:
            report.passed += 1
        elif outcome is Outcome.GAP:
            report.gaps += 1
            self.gaps.append((name, text))
        else:
            report.failed += 1
            self.failures.append((name, text))


def check_backend(
    name: str,
    device: str,
    selection: Selection = Selection(),  # noqa: B008  (immutable)
    gaps: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conformance:
    """Run the selected checks on one device of one backend.

    Args:
        name: name of the backend.
        device: device to run on, as ``torch.device`` takes it.
        selection: which checks to run.
        gaps: file of declared gaps.
        progress: told how many checks of how many are done.

    Raises:
        BackendError: the backend cannot serve the device here; the text says why.
    """
    result = Conformance(name, device)
    request = {
        "name": name,
        "device": device,
        "ops": selection.ops,
        "patterns": selection.patterns,
        "gaps": None if gaps is None else str(gaps.resolve()),
    }
    start = 0
    while result.crashes < MOST_CRASHES:
        done = _one_process(result, request | {"start": start}, progress)
        if done is None:
            break
        start = done
    return result


def _one_process(result: Conformance, request: dict[str, Any], progress: Callable[[int, int], None]) -> int | None:
    """Run checks in one process until all are done or it dies; the index to go on at, ``None`` at the end."""
    environment = {key: value for key, value in os.environ.items() if key not in (DENY, STRICT)}
    command = [sys.executable, "-m", "bitsandbytes.testing.worker", json.dumps(request)]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=messages, env=environment | {ALLOW: request["name"]}
        )
        current: dict[str, Any] | None = None
        index, finished = request["start"], False
        assert process.stdout is not None
        with process.stdout as answers:
            for line in answers:
                answer = json.loads(line)
                if answer["event"] == "unavailable":
                    process.wait()
                    raise BackendError(_unavailable(request, answer))
                if answer["event"] == "plan":
                    result.total = answer["total"]
                elif answer["event"] == "start":
                    current = answer
                elif answer["event"] == "end" and current is not None:
                    outcome = Outcome(answer["outcome"])
                    result.record(
                        current["op"], current["check"], current["id"], outcome, answer["text"], answer["native"]
                    )
                    index, current = current["index"] + 1, None
                    progress(index, result.total)
                finished = answer["event"] == "done"
        code = process.wait()
        if finished:
            return None
        if current is None and code != DEVICE_LOST:
            raise BackendError(f"the process of the checks ended with {_ending(code)}:\n{_tail(messages)}")
    result.crashes += 1
    if current is not None:
        text = f"the process died: {_ending(code)}"
        result.record(current["op"], current["check"], current["id"], Outcome.FAILED, text, False)
        index = current["index"] + 1
    progress(index, result.total)
    return index if index < result.total else None


def _unavailable(request: dict[str, Any], answer: dict[str, Any]) -> str:
    mend = f". To mend it: {answer['mend']}" if answer["mend"] else ""
    return f"backend {request['name']!r} cannot be checked here: {answer['reason'].rstrip('. ')}{mend}"


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _tail(messages: IO[bytes], lines: int = 12) -> str:
    messages.seek(0)
    return "\n".join(messages.read().decode(errors="replace").splitlines()[-lines:])
