"""The whole report of ``bnb doctor``, as data."""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass, field
from typing import Any

from bitsandbytes.diagnostics.finding import Finding, Level
from bitsandbytes.diagnostics.installation import (
    CORE,
    SHIM,
    core_is_intact,
    installed_version,
    intruders,
    restore_command,
)

#: Libraries whose versions matter in a report of a problem.
RELATED = ("transformers", "accelerate", "peft", "diffusers", "trl", "safetensors", "numpy", "triton")


@dataclass
class Report:
    """What ``bnb doctor`` found."""

    versions: dict[str, str]
    devices: list[dict[str, Any]] = field(default_factory=list)
    plugins: list[dict[str, Any]] = field(default_factory=list)
    #: By device type: the steps of the self-test.
    selftest: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing that was found is an error."""
        return all(finding.level is not Level.ERROR for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report for ``--json``."""
        return {
            "healthy": self.healthy,
            "versions": self.versions,
            "devices": self.devices,
            "plugins": self.plugins,
            "selftest": self.selftest,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def collect(selftest: bool = True) -> Report:
    """Look at everything; with ``selftest``, also run the ops on every usable device.

    When another distribution has replaced modules of this package, the report ends with that: what
    could be said beyond it would be about somebody else's code.
    """
    report = Report(_versions())
    if not core_is_intact():
        report.findings = _overwritten()
        return report
    _examine(report, selftest)
    return report


def _examine(report: Report, selftest: bool) -> None:
    import torch

    from bitsandbytes.diagnostics import findings, machine
    from bitsandbytes.diagnostics.plugins import describe_plugins

    devices = machine.usable_devices()
    # More exact than the metadata, which does not name the build.
    report.versions["torch"] = torch.__version__
    report.versions["torch build"] = machine.torch_build()
    report.devices = [device.as_dict() for device in devices]
    report.plugins = describe_plugins()
    if selftest:
        _run_selftests(report, [device.type for device in devices])
    report.findings += [
        *findings.installation_findings(),
        *findings.place_findings(),
        *findings.torch_findings(devices),
        *findings.plugin_findings(devices),
        *findings.environment_findings(),
    ]


def _run_selftests(report: Report, devices: list[str]) -> None:
    from bitsandbytes.diagnostics.selftest import run_selftest
    from bitsandbytes.errors import BackendWarning

    for device in devices:
        with warnings.catch_warnings():
            # The findings say the same.
            warnings.simplefilter("ignore", BackendWarning)
            steps = run_selftest(device)
        report.selftest[device] = [vars(step) for step in steps]
        report.findings += [
            Finding(Level.ERROR, f"self-test on {device!r}: {step.name} failed: {step.detail}")
            for step in steps
            if not step.passed
        ]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in (CORE, SHIM, "torch", *RELATED):
        version = installed_version(name)
        if version is not None:
            versions[name] = version
    return versions


def _overwritten() -> list[Finding]:
    names = [owner.name for owner in intruders()] or [SHIM]
    return [
        Finding(
            Level.ERROR,
            "another distribution has replaced modules of bnb-core in the folder bitsandbytes/: "
            + ", ".join(owner.label for owner in intruders()),
            restore_command(names),
        )
    ]
