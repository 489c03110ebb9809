"""What is checked of every op; each check is a function of the device under test and one item.

A check that finds fault raises. The checks need no test framework:
:class:`~bitsandbytes.testing.suite.BackendSuite` gives them to pytest, ``bnb plugins check`` runs them
by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bitsandbytes.contract import OPS
from bitsandbytes.errors import ArgumentError
from bitsandbytes.testing.case import Case
from bitsandbytes.testing.cases import all_cases
from bitsandbytes.testing.device import (
    DeviceUnderTest,
    as_tuple,
    flat_tensors,
    on_cpu,
    read_only_tensors,
    written_tensors,
)
from bitsandbytes.testing.refusals import Refusal, all_refusals
from bitsandbytes.testing.roundtrip import RoundTrip, all_round_trips, check_round_trip
from bitsandbytes.testing.tolerances import demand, demand_same_bits, describe_difference, relative_error, same_bits

Item = Case | Refusal | RoundTrip


@dataclass(frozen=True)
class Check:
    """One kind of check and everything that it is done to."""

    name: str
    run: Callable[[DeviceUnderTest, Any], None]
    items: tuple[Item, ...]

    def id_of(self, item: Item) -> str:
        """The name that ``gaps.txt`` and the command line use: ``<check>-<op>-<case>``."""
        return f"{self.name}-{item.op}-{item.id}"


def expected(device: str, case: Case) -> tuple[Any, ...]:
    """What the reference computes on the device, whose class decides about the rules of quantization."""
    place = DeviceUnderTest()
    arguments = [place.to_device(argument, device) for argument in case.arguments()]
    return as_tuple(OPS[case.op].reference(*arguments))


def judge(device: str, case: Case, results: tuple[Any, ...]) -> None:
    """Compare results with the reference's bits or with the float64 truth."""
    wanted_results = expected(device, case)
    demand(len(results) == len(wanted_results), f"{len(results)} results, expected {len(wanted_results)}")
    for position, (result, wanted) in enumerate(zip(results, wanted_results, strict=True)):
        what = f"result {position}"
        if wanted is None:
            demand(result is None, f"{what} is {result!r}, expected None")
            continue
        demand(result.device.type == torch.device(device).type, f"{what} is on {result.device}, expected {device}")
        demand(result.shape == wanted.shape, f"{what} has shape {tuple(result.shape)}, expected {tuple(wanted.shape)}")
        demand(result.dtype == wanted.dtype, f"{what} has dtype {result.dtype}, expected {wanted.dtype}")
        if case.tolerance is None or position > 0:
            if not (same_bits(result, wanted) or accepts_alternative(device, case, position, result, wanted)):
                raise AssertionError(f"{what}: {describe_difference(result, wanted)}")
            continue
        truth = wanted if case.truth is None else case.truth(*case.arguments())
        error = relative_error(result, truth)
        demand(error <= case.tolerance, f"{what}: relative error {error:.3g}, allowed {case.tolerance:.3g}")


def accepts_alternative(device: str, case: Case, position: int, result: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the case allows this result on devices whose arithmetic leaves a choice."""
    if case.alternative is None or torch.device(device).type == "cpu":
        return False
    return case.alternative(case.arguments(), position, result.cpu(), wanted.cpu())


def check_values(under_test: DeviceUnderTest, case: Case) -> None:
    """Results are the reference's bits, or within the tolerance of the truth."""
    _judge_call(under_test, case, under_test.arguments(case))


def _judge_call(under_test: DeviceUnderTest, case: Case, arguments: list[Any]) -> None:
    results = OPS[case.op].overload(*arguments)
    if case.judge is None:
        judge(under_test.device, case, (*as_tuple(results), *written_tensors(case.op, arguments)))
        return
    demand(results is None, f"an op that works in place returned {type(results).__name__}")
    case.judge(case.arguments(), tuple(on_cpu(argument) for argument in arguments), torch.device(under_test.device))


def check_strided(under_test: DeviceUnderTest, case: Case) -> None:
    """Arguments with gaps in memory, as far as the contract takes them, change nothing."""
    arguments = under_test.arguments(case)
    written = {id(tensor) for tensor in written_tensors(case.op, arguments)}
    for place, value in enumerate(arguments):
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or id(value) in written:
            continue
        arguments[place] = with_gaps(value)
        try:
            OPS[case.op].check(*arguments)
        except ArgumentError:
            arguments[place] = value
    _judge_call(under_test, case, arguments)


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each followed by an unused element."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    view = wide[..., ::2]
    view.copy_(tensor)
    return view


def check_arguments_untouched(under_test: DeviceUnderTest, case: Case) -> None:
    """An op writes only what its schema marks as written, and its results are memory of their own."""
    arguments = under_test.arguments(case)
    kept = read_only_tensors(case.op, arguments)
    copies = [value.clone() for value in kept]
    results = flat_tensors(as_tuple(OPS[case.op].overload(*arguments)))
    for number, (value, copy) in enumerate(zip(kept, copies, strict=True)):
        demand_same_bits(value, copy, f"tensor {number} of the arguments, which the op must not write,")
    given = {value.untyped_storage().data_ptr() for value in flat_tensors(arguments) if value.numel()}
    for number, result in enumerate(results):
        shares = result.numel() > 0 and result.untyped_storage().data_ptr() in given
        demand(not shares, f"result {number} shares its memory with an argument")


def check_deterministic(under_test: DeviceUnderTest, case: Case) -> None:
    """Two calls give the same bits."""
    for number, (first, second) in enumerate(zip(under_test.call(case), under_test.call(case), strict=True)):
        if first is not None or second is not None:
            demand_same_bits(second, first, f"result {number} of the second call")


def check_out_overload(under_test: DeviceUnderTest, case: Case) -> None:
    """``.out`` writes every element of a poisoned buffer, also of a strided one, and nothing else."""
    arguments = under_test.arguments(case)
    (wanted,) = as_tuple(OPS[case.op].overload(*arguments))
    poison = 77
    dense = torch.full_like(wanted, poison)
    wide = torch.full((*wanted.shape[:-1], 2 * wanted.shape[-1]), poison, dtype=wanted.dtype, device=wanted.device)
    for label, out in (("a dense buffer", dense), ("a buffer with gaps", wide[..., ::2])):
        returned = OPS[f"{case.op}.out"].overload(*arguments, out)
        demand(returned is None, f".out returned {type(returned).__name__}, expected nothing")
        demand_same_bits(out, wanted, label)
    demand(bool((wide[..., 1::2] == poison).all()), "wrote outside of the buffer")


def check_opcheck(under_test: DeviceUnderTest, case: Case) -> None:
    """torch's own check of schema, fake implementation and dispatch."""
    torch.library.opcheck(OPS[case.op].overload, tuple(under_test.arguments(case)))


def check_compiles(under_test: DeviceUnderTest, case: Case) -> None:
    """The op is traced without a graph break and gives the eager bits."""
    overload = OPS[case.op].overload
    arguments = under_test.arguments(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: overload(*a), fullgraph=True, backend="aot_eager")
    results = (*as_tuple(compiled(*arguments)), *written_tensors(case.op, arguments))
    for number, (result, eager) in enumerate(zip(results, under_test.call(case), strict=True)):
        if result is not None or eager is not None:
            demand_same_bits(result, eager, f"result {number} of the compiled op")


def check_refuses(under_test: DeviceUnderTest, refusal: Refusal) -> None:
    """A broken contract is refused with an error that names the op and the argument, before anything is written."""
    arguments = [under_test.to_device(argument) for argument in refusal.make()]
    tensors = flat_tensors(arguments)
    copies = [value.clone() for value in tensors]
    try:
        OPS[refusal.op].overload(*arguments)
    except ArgumentError as error:
        for text in (refusal.op, refusal.names):
            demand(text in str(error), f"the error does not name {text!r}: {error}")
    else:
        raise AssertionError(f"no ArgumentError about {refusal.names!r}")
    for number, (value, copy) in enumerate(zip(tensors, copies, strict=True)):
        demand_same_bits(value, copy, f"tensor {number} of the refused arguments")


def representatives(cases: list[Case]) -> list[Case]:
    """The cases of each op that the slower checks run on: a few spread over the list."""
    return [case for group in _by_op(cases).values() for case in group[:: max(1, len(group) // 3)]]


def _by_op(cases: list[Case]) -> dict[str, list[Case]]:
    by_op: dict[str, list[Case]] = {}
    for case in cases:
        by_op.setdefault(case.op, []).append(case)
    return by_op


def _all_checks() -> dict[str, Check]:
    cases = all_cases()
    few = tuple(representatives(cases))
    checks = (
        Check("values", check_values, tuple(cases)),
        Check("strided", check_strided, few),
        Check("arguments_untouched", check_arguments_untouched, few),
        Check("deterministic", check_deterministic, few),
        Check("out_overload", check_out_overload, tuple(case for case in few if f"{case.op}.out" in OPS)),
        Check("opcheck", check_opcheck, few),
        Check("compiles", check_compiles, tuple(group[0] for group in _by_op(cases).values())),
        Check("refuses", check_refuses, tuple(all_refusals())),
        Check("round_trip", check_round_trip, tuple(all_round_trips())),
    )
    return {check.name: check for check in checks}


#: Every check by its name.
CHECKS = _all_checks()
