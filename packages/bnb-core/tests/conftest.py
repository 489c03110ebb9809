"""Core is tested on its reference implementations alone, whatever backends are installed."""

import os

os.environ["BNB_BACKENDS"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
