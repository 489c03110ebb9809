"""All known differences, in the order in which they are tried."""

from __future__ import annotations

from tests.compare import known_layers, known_optim, known_quant
from tests.compare.explanation import Difference, Explanation

EXPLANATIONS: tuple[Explanation, ...] = (
    *known_quant.EXPLANATIONS,
    *known_layers.EXPLANATIONS,
    *known_optim.EXPLANATIONS,
)


def explain(difference: Difference) -> Explanation | None:
    """The first explanation that applies, after our value was proved; ``None`` without one."""
    for explanation in EXPLANATIONS:
        if difference.case.op in explanation.ops and explanation.applies(difference):
            explanation.prove(difference)
            return explanation
    return None
