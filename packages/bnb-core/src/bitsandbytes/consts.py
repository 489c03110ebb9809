"""Constants under their historical names."""

import platform
from pathlib import Path

PACKAGE_DIR = Path(__file__).parent
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
DYNAMIC_LIBRARY_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
NONPYTORCH_DOC_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
