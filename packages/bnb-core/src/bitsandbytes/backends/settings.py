"""Environment variables that steer the loading of backends.

``BNB_BACKENDS``
    Comma-separated names; only these are loaded. An empty value loads none.
``BNB_DISABLE_BACKENDS``
    Comma-separated names that are not loaded. It wins over the allow-list.
``BNB_BACKENDS_STRICT``
    ``1`` turns every warning about a backend into an error at import.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

ALLOW = "BNB_BACKENDS"
DENY = "BNB_DISABLE_BACKENDS"
STRICT = "BNB_BACKENDS_STRICT"


@dataclass(frozen=True)
class Settings:
    """Parsed environment."""

    allow: frozenset[str] | None
    deny: frozenset[str]
    strict: bool

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the variables as they are now."""
        allow = os.environ.get(ALLOW)
        return cls(
            allow=None if allow is None else _names(allow),
            deny=_names(os.environ.get(DENY, "")),
            strict=os.environ.get(STRICT, "").strip().lower() in {"1", "true", "yes", "on"},
        )

    def why_skipped(self, name: str) -> str | None:
        """The reason why the backend ``name`` must not be loaded, or ``None``."""
        if name in self.deny:
            return f"disabled by {DENY}"
        if self.allow is not None and name not in self.allow:
            return f"not in {ALLOW}"
        return None

    def unknown(self, installed: set[str]) -> list[tuple[str, str]]:
        """Pairs of variable and name that match no installed backend."""
        allow = self.allow or frozenset()
        return [(ALLOW, name) for name in sorted(allow - installed)] + [
            (DENY, name) for name in sorted(self.deny - installed)
        ]


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())
