"""Bytes and numbers of this project beside those of the ``bitsandbytes`` release on PyPI.

``python -m tests.compare.run --ours PY1 --theirs PY2`` gives both environments the same inputs through
the public API, compares what comes out bit by bit, and exits with 1 when a difference has no
explanation. An explanation is a known fault of the release, or a sum whose order is not part of a
contract; either way our value must be the right one, which is computed in float64.
"""
