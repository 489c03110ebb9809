"""The checks that every backend passes. See :mod:`bitsandbytes.testing` for how to use them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bitsandbytes.contract import OPS
from bitsandbytes.errors import ArgumentError
from bitsandbytes.testing.case import Case
from bitsandbytes.testing.cases import all_cases
from bitsandbytes.testing.gaps import Gaps
from bitsandbytes.testing.refusals import Refusal, all_refusals
from bitsandbytes.testing.tolerances import relative_error, same_bits


def representatives(cases: list[Case]) -> list[Case]:
    """The cases of each op that the slower checks run on: a few spread over the list."""
    by_op: dict[str, list[Case]] = {}
    for case in cases:
        by_op.setdefault(case.op, []).append(case)
    return [case for group in by_op.values() for case in group[:: max(1, len(group) // 3)]]


CASES = all_cases()
FEW_CASES = representatives(CASES)
REFUSALS = all_refusals()


def case_id(item: Case | Refusal | str) -> str:
    """Readable pytest id."""
    return item if isinstance(item, str) else f"{item.op}-{item.id}"


def expects_gaps(check: Callable[..., None]) -> Callable[..., None]:
    """Let a check fail where ``gaps.txt`` says so, and fail where it passes against that."""

    @functools.wraps(check)
    def run(self: BackendSuite, item: Any) -> None:
        name = f"{check.__name__.removeprefix('test_')}-{case_id(item)}"
        reason = Gaps.read(self.gaps).reason(name)
        try:
            check(self, item)
        except (Exception, pytest.fail.Exception) as error:
            if reason is None:
                raise
            pytest.xfail(f"{reason} ({type(error).__name__})")
        if reason is not None:
            pytest.fail(f"{name} passes, but {self.gaps} lists it: {reason}")

    return run


class BackendSuite:
    """Conformance of one device. Subclass it and set :attr:`device`."""

    #: Device to run on, as ``torch.device`` takes it.
    device: ClassVar[str] = "cpu"
    #: File of declared gaps, see :mod:`bitsandbytes.testing.gaps`.
    gaps: ClassVar[Path | None] = None

    def to_device(self, value: Any) -> Any:
        """Move a tensor, or each of a list, to the device under test, keeping strides; other values stay."""
        if isinstance(value, (list, tuple)):
            return [self.to_device(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_contiguous() or value.numel() == 0:
            return value.to(self.device)
        # Rebuild the same view over a copied storage, since .to() may make a tensor contiguous.
        base = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return base.to(self.device).as_strided(value.shape, value.stride(), value.storage_offset())

    def call(self, case: Case, *, suffix: str = "") -> tuple[Any, ...]:
        """Run the op of a case on the device; results, and what it wrote in place, as a tuple."""
        arguments = [self.to_device(argument) for argument in case.arguments()]
        results = as_tuple(OPS[case.op + suffix].overload(*arguments))
        return (*results, *flat_tensors([arguments[place] for place in written_arguments(case.op + suffix)]))

    def expected(self, case: Case) -> tuple[Any, ...]:
        """What the reference computes on the CPU."""
        return as_tuple(OPS[case.op].reference(*case.arguments()))

    def judge(self, case: Case, results: tuple[Any, ...]) -> None:
        """Compare results with the reference's bits or with the float64 truth."""
        expected = self.expected(case)
        assert len(results) == len(expected)
        for position, (result, wanted) in enumerate(zip(results, expected, strict=True)):
            if wanted is None:
                assert result is None
                continue
            assert result.device.type == torch.device(self.device).type
            assert result.shape == wanted.shape
            assert result.dtype == wanted.dtype
            if case.tolerance is None or position > 0:
                assert same_bits(result, wanted), describe_difference(result, wanted)
                continue
            truth = wanted if case.truth is None else case.truth(*case.arguments())
            error = relative_error(result, truth)
            assert error <= case.tolerance, f"relative error {error:.3g}, allowed {case.tolerance:.3g}"

    @pytest.mark.parametrize("item", CASES, ids=case_id)
    @expects_gaps
    def test_values(self, item: Case) -> None:
        """Results are the reference's bits, or within the tolerance of the truth."""
        if item.judge is None:
            self.judge(item, self.call(item))
            return
        arguments = [self.to_device(argument) for argument in item.arguments()]
        assert OPS[item.op].overload(*arguments) is None
        item.judge(item.arguments(), tuple(on_cpu(argument) for argument in arguments))

    @pytest.mark.parametrize("item", FEW_CASES, ids=case_id)
    @expects_gaps
    def test_arguments_untouched(self, item: Case) -> None:
        """An op leaves the arguments as they were that its schema does not mark as written."""
        arguments = [self.to_device(argument) for argument in item.arguments()]
        written = written_arguments(item.op)
        kept = flat_tensors([value for place, value in enumerate(arguments) if place not in written])
        copies = [value.clone() for value in kept]
        OPS[item.op].overload(*arguments)
        for value, copy in zip(kept, copies, strict=True):
            assert same_bits(value, copy)

    @pytest.mark.parametrize("item", FEW_CASES, ids=case_id)
    @expects_gaps
    def test_deterministic(self, item: Case) -> None:
        """Two calls give the same bits."""
        for first, second in zip(self.call(item), self.call(item), strict=True):
            assert (first is None and second is None) or same_bits(first, second)

    @pytest.mark.parametrize("item", [case for case in FEW_CASES if f"{case.op}.out" in OPS], ids=case_id)
    @expects_gaps
    def test_out_overload(self, item: Case) -> None:
        """``.out`` writes every element of a poisoned buffer, also a strided one."""
        arguments = [self.to_device(argument) for argument in item.arguments()]
        (wanted,) = as_tuple(OPS[item.op].overload(*arguments))
        poison = 77
        dense = torch.full_like(wanted, poison)
        wide = torch.full((*wanted.shape[:-1], 2 * wanted.shape[-1]), poison, dtype=wanted.dtype, device=wanted.device)
        for out in (dense, wide[..., ::2]):
            assert OPS[f"{item.op}.out"].overload(*arguments, out) is None
            assert same_bits(out, wanted)
        assert bool((wide[..., 1::2] == poison).all()), "wrote outside of the buffer"

    @pytest.mark.parametrize("item", FEW_CASES, ids=case_id)
    @expects_gaps
    def test_opcheck(self, item: Case) -> None:
        """torch's own check of schema, fake implementation and dispatch."""
        arguments = tuple(self.to_device(argument) for argument in item.arguments())
        torch.library.opcheck(OPS[item.op].overload, arguments)

    @pytest.mark.parametrize("item", sorted({case.op for case in CASES}), ids=case_id)
    @expects_gaps
    def test_compiles(self, item: str) -> None:
        """The op is traced without a graph break and gives the eager bits."""
        case = next(case for case in CASES if case.op == item)
        overload = OPS[item].overload
        arguments = [self.to_device(argument) for argument in case.arguments()]
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: overload(*a), fullgraph=True, backend="aot_eager")
        results = as_tuple(compiled(*arguments))
        results = (*results, *flat_tensors([arguments[place] for place in written_arguments(item)]))
        for first, second in zip(results, self.call(case), strict=True):
            assert (first is None and second is None) or same_bits(first, second)

    @pytest.mark.parametrize("item", REFUSALS, ids=case_id)
    @expects_gaps
    def test_refuses(self, item: Refusal) -> None:
        """A broken contract is refused with an error that names the op and the argument."""
        arguments = [self.to_device(argument) for argument in item.make()]
        with pytest.raises(ArgumentError) as caught:
            OPS[item.op].overload(*arguments)
        assert item.op in str(caught.value)
        assert item.names in str(caught.value)


def as_tuple(results: Any) -> tuple[Any, ...]:
    """Results of an op as a tuple."""
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def written_arguments(op: str) -> list[int]:
    """Positions of the arguments that the schema of an op marks as written."""
    arguments = OPS[op].overload._schema.arguments
    return [place for place, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]


def flat_tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among arguments, those in lists included."""
    flat: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            flat.append(argument)
        elif isinstance(argument, (list, tuple)):
            flat.extend(flat_tensors(argument))
    return flat


def on_cpu(argument: Any) -> Any:
    """An argument with its tensors moved to the CPU."""
    if isinstance(argument, (list, tuple)):
        return [on_cpu(item) for item in argument]
    return argument.detach().cpu() if isinstance(argument, torch.Tensor) else argument


def describe_difference(result: torch.Tensor, wanted: torch.Tensor) -> str:
    """Where two tensors differ first, and how often."""
    result, wanted = result.detach().cpu().reshape(-1), wanted.detach().cpu().reshape(-1)
    different = (result != wanted) & ~(result.isnan() & wanted.isnan()) | (result.signbit() != wanted.signbit())
    places = different.nonzero().reshape(-1)
    first = int(places[0])
    return f"{len(places)} of {len(wanted)} differ, first at {first}: {result[first]} instead of {wanted[first]}"
