"""``python -m bitsandbytes`` is ``bnb doctor``."""

import sys

from bitsandbytes.cli.main import main

main(["doctor", *sys.argv[1:]], prog_name="python -m bitsandbytes")
