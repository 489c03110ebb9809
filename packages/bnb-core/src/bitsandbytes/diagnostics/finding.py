"""One thing that the doctor has to say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Level(Enum):
    """How much a finding matters."""

    #: Something does not work or will break.
    ERROR = "error"
    #: It works, but not as it could.
    WARNING = "warning"
    #: Worth knowing.
    INFO = "info"


@dataclass(frozen=True)
class Finding:
    """A fact, and what to run or to do about it."""

    level: Level
    text: str
    mend: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The finding for ``--json``."""
        return asdict(self) | {"level": self.level.value}
