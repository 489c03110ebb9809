"""Set-up shared by the tests that span packages."""

import os
import sys
from pathlib import Path

# Read when transformers is imported: nothing may be fetched while a test runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
# The converter of the model and the measurements of the demo are scripts, not installed packages.
sys.path[:0] = [str(REPOSITORY / "tools"), str(REPOSITORY / "examples" / "demo")]
