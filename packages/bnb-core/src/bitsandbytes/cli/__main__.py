"""``python -m bitsandbytes.cli`` is ``bnb``, for where the script is not on the path."""

from bitsandbytes.cli.main import main

main(prog_name="python -m bitsandbytes.cli")
