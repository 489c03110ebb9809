"""AdamW: Adam with another default of the weight decay."""

from __future__ import annotations

from bitsandbytes.optim.adam import AdamFamily
from bitsandbytes.optim.variants import reduced


class AdamWFamily(AdamFamily):
    """AdamW (arXiv:1711.05101); arguments and formula as for :class:`~bitsandbytes.optim.adam.AdamFamily`."""

    __init__ = reduced(AdamFamily.__init__, weight_decay=1e-2)


class AdamW(AdamWFamily):
    """AdamW; ``optim_bits`` says how states are stored."""


class AdamW8bit(AdamWFamily):
    """AdamW with 8-bit states."""

    bits = 8


class AdamW32bit(AdamWFamily):
    """AdamW with 32-bit states."""

    bits = 32


class PagedAdamW(AdamWFamily):
    """AdamW with paged states; ``optim_bits`` says how they are stored."""

    paged = True
    __init__ = reduced(AdamWFamily.__init__, "is_paged")


class PagedAdamW8bit(AdamWFamily):
    """AdamW with paged 8-bit states."""

    bits, paged = 8, True
    __init__ = reduced(AdamWFamily.__init__, "is_paged")


class PagedAdamW32bit(AdamWFamily):
    """AdamW with paged 32-bit states."""

    bits, paged = 32, True
    __init__ = reduced(AdamWFamily.__init__, "is_paged")
