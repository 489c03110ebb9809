"""``python -m bnb_native --include-dir``, ``--cmake-dir`` and ``--copy FOLDER``, for build systems and authors."""

import argparse

from bnb_native import cmake_dir, copy_to, include_dir


def main() -> None:
    """Print the requested folder."""
    parser = argparse.ArgumentParser(prog="python -m bnb_native", description="Locate the bnb C++ headers.")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--include-dir", action="store_const", dest="folder", const=include_dir)
    group.add_argument("--cmake-dir", action="store_const", dest="folder", const=cmake_dir)
    group.add_argument("--copy", metavar="FOLDER", help="copy all of it to FOLDER/bnb_native")
    arguments = parser.parse_args()
    print(copy_to(arguments.copy) if arguments.copy else arguments.folder())


if __name__ == "__main__":
    main()
