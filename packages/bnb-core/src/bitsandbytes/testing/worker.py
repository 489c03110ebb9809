"""The process that runs checks for ``bnb plugins check``; see :mod:`bitsandbytes.testing.runner`.

Its only argument is a request in JSON. It answers with one JSON object a line:

* ``{"event": "unavailable", "reason": ..., "mend": ...}``: nothing can be checked;
* ``{"event": "plan", "total": ...}``: how many checks there are;
* ``{"event": "start", "index": ..., "id": ..., "op": ...}`` before each check;
* ``{"event": "end", "outcome": ..., "text": ..., "native": ...}`` after it, ``native`` being whether
  the backend's own kernel ran, ``None`` for a plugin that registers its kernels with torch;
* ``{"event": "done"}``.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bitsandbytes.backends.plugin import FAILED, Plugin, Status
from bitsandbytes.backends.registry import REGISTRY
from bitsandbytes.errors import BackendError, BackendWarning
from bitsandbytes.testing.checks import Check, Item
from bitsandbytes.testing.device import DeviceUnderTest
from bitsandbytes.testing.gaps import Gaps, Outcome, run_check
from bitsandbytes.testing.selection import Selection

#: Exit code of a worker whose device no longer answers, as after an illegal access on a GPU: the run
#: goes on in a new process.
DEVICE_LOST = 75


class Worker:
    """Runs the checks of one request."""

    def __init__(self, request: dict[str, Any], channel: int) -> None:
        self.request = request
        self.channel = channel
        self.calls: Counter[str] = Counter()

    def tell(self, event: str, **fields: Any) -> None:
        """Write one answer at once: the next call may end the process."""
        os.write(self.channel, json.dumps({"event": event, **fields}).encode() + b"\n")

    def run(self) -> int:
        """Run the checks; returns the exit code."""
        plugin = next((plugin for plugin in REGISTRY.plugins if plugin.name == self.request["name"]), None)
        if plugin is None:
            self.tell("unavailable", reason="it is not installed in this environment", mend="")
            return 0
        if not self._ready(plugin):
            self.tell("unavailable", reason=plugin.cause or plugin.availability().reason, mend=plugin.mend)
            return 0
        if not answers(self.request["device"]):
            self.tell("unavailable", reason=f"torch cannot use device {self.request['device']!r} here", mend="")
            return 0
        chosen = Selection(tuple(self.request["ops"]), tuple(self.request["patterns"]))
        gaps = Gaps.read(Path(self.request["gaps"]) if self.request["gaps"] else None)
        checks = list(chosen.checks())
        self.tell("plan", total=len(checks))
        under_test = type("UnderTest", (DeviceUnderTest,), {"device": self.request["device"]})()
        for index, (check, item) in enumerate(itertools.islice(checks, self.request["start"], None)):
            self.tell("start", index=self.request["start"] + index, id=check.id_of(item), op=item.op, check=check.name)
            if not self._run_one(plugin, check, item, under_test, gaps):
                return DEVICE_LOST
        self.tell("done")
        return 0

    def _ready(self, plugin: Plugin) -> bool:
        """Whether the plugin serves its devices here; from now on, its kernels are counted."""
        REGISTRY.settle()
        if plugin.status is Status.CALLED:
            return True
        if plugin.status in FAILED or not plugin.availability().available:
            return False
        try:
            plugin.watch(lambda op: self.calls.update([op]))
        except BackendError:
            return False
        return True

    def _run_one(self, plugin: Plugin, check: Check, item: Item, under_test: DeviceUnderTest, gaps: Gaps) -> bool:
        """Run a check and tell its result; returns whether the device still answers."""
        before = self.calls[item.op]
        result = run_check(check, under_test, item, gaps)
        native = None if plugin.status is Status.CALLED else self.calls[item.op] > before
        self.tell("end", outcome=result.outcome.value, text=result.text, native=native)
        return result.outcome not in (Outcome.FAILED, Outcome.GAP) or answers(under_test.device)


def answers(device: str) -> bool:
    """Whether a device still takes work."""
    try:
        return torch.ones(1, device=device).cpu().item() == 1.0
    # Besides RuntimeError, a build of torch without the device raises AssertionError.
    except (RuntimeError, AssertionError):
        return False


def main() -> None:
    """Run the request that the command line holds."""
    # What kernels print, from Python or from native code, goes to standard error.
    channel = os.dup(1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore", BackendWarning)
    raise SystemExit(Worker(json.loads(sys.argv[1]), channel).run())


if __name__ == "__main__":
    main()
