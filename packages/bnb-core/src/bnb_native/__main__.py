"""``python -m bnb_native --include-dir`` and ``--cmake-dir``, for build systems."""

import argparse

from bnb_native import cmake_dir, include_dir


def main() -> None:
    """Print the requested folder."""
    parser = argparse.ArgumentParser(prog="python -m bnb_native", description="Locate the bnb C++ headers.")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--include-dir", action="store_const", dest="folder", const=include_dir)
    group.add_argument("--cmake-dir", action="store_const", dest="folder", const=cmake_dir)
    print(parser.parse_args().folder())


if __name__ == "__main__":
    main()
