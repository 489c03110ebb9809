"""Known differences of optimizers.

Neither side promises the last bit of float32 sums, so every difference is proved against a float64
run of the formulas; beside that the layout of a checkpoint must be the same.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.compare import truth, truth_optim
from tests.compare.explanation import Difference, Explanation, need
from tests.compare.optimizer_cases import NUMBERS
from tests.compare.verdict import leaves

NESTED = "__bnb_optimizer_quant_state__"
#: Relative to the largest term of a sum in float32, after a handful of operations.
FLOAT_NOISE = 1e-6
#: How much farther than the nearest code a chosen one may be, in units of absmax: the search first
#: rounds to a grid of 65536 points over [-1, 1], which moves a value by up to half a step.
CODE_SLACK = 2 / 65535 + 1e-6
#: Decay rates and the like by class, as ``NUMBERS`` has them for the ops.
CLASS_NUMBERS: dict[str, dict[str, Any]] = {
    "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "lr": 1e-3},
    "ademamix": {
        "beta1": 0.9,
        "beta2": 0.999,
        "beta3": 0.9999,
        "alpha": 5.0,
        "eps": 1e-8,
        "lr": 1e-3,
        "weight_decay": 0.01,
    },
    "lamb": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "lr": 1e-3, "max_unorm": 1.0},
    "momentum": {"beta1": 0.9},
    "lars": {"beta1": 0.9, "max_unorm": 0.02},
    "rmsprop": {"beta1": 0.99, "eps": 1e-8, "lr": 1e-2},
    "adagrad": {"beta1": 0.0, "eps": 1e-10, "lr": 1e-2},
    "lion": {"beta1": 0.9, "beta2": 0.99, "lr": 1e-4},
}
RULE_OF_CLASS = {
    "Adam": "adam", "AdamW": "adam", "PagedAdamW": "adam", "AdEMAMix": "ademamix", "LAMB": "lamb", "SGD": "momentum",
    "LARS": "lars", "RMSprop": "rmsprop", "Adagrad": "adagrad", "Lion": "lion",
}  # fmt: skip


def rule_of(name: str) -> str:
    """Update rule of an optimizer class."""
    return RULE_OF_CLASS[name.removesuffix("8bit").removesuffix("32bit")]


def need_parameter(actual: torch.Tensor, before: torch.Tensor, after: torch.Tensor, what: str) -> None:
    """The parameter, rounded once to its dtype."""
    terms = before.abs() + (after - before).abs()
    bound = truth.rounding_bound(after, terms, actual.dtype)
    wrong = truth.outside(actual, after, bound)
    need(wrong == 0, f"{wrong} of {after.numel()} values of {what} are off")


def need_state(actual: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, what: str) -> None:
    """A float32 state, summed from ``terms``."""
    need(actual.shape == expected.shape and actual.dtype == torch.float32, f"{what} is {actual.dtype}")
    wrong = truth.outside(actual, expected, (expected.abs() + terms) * FLOAT_NOISE + 1e-30)
    need(wrong == 0, f"{wrong} of {expected.numel()} values of {what} are off")


def need_codes(
    codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, expected: torch.Tensor, what: str
) -> None:
    """An 8-bit state: right statistics, and codes as near as any."""
    _, right_absmax = truth_optim.encode(expected, code, halves=absmax.dim() == 2)
    need(codes.dtype == torch.uint8 and codes.shape == expected.shape, f"{what} is {codes.dtype}")
    wrong = truth.outside(absmax, right_absmax, right_absmax * FLOAT_NOISE)
    need(wrong == 0, f"{wrong} of {right_absmax.numel()} statistics of {what} are off")
    rows = expected.reshape(2 if absmax.dim() == 2 else 1, -1)
    scales = torch.stack(
        [truth.per_element(row, rows.shape[1], truth_optim.BLOCKSIZE) for row in right_absmax.reshape(len(rows), -1)]
    )
    scaled = torch.where(scales > 0, rows / scales, 0.0).reshape(-1, 1)
    distance = (scaled - code.double()).abs()
    chosen = distance.gather(1, codes.reshape(-1, 1).long()).reshape(-1)
    far = int((chosen > distance.amin(dim=1) + CODE_SLACK).sum())
    need(far == 0, f"{far} of {codes.numel()} codes of {what} are not the nearest")


def float_states(tensors: dict[str, Any]) -> truth_optim.Tensors:
    """Float64 states of a parameter, decoded where they are 8-bit."""
    states = {}
    for number in ("1", "2"):
        state = tensors.get(f"state{number}")
        if state is None:
            continue
        if state.dtype == torch.uint8:
            states[f"state{number}"] = truth_optim.decode(state, tensors[f"absmax{number}"], tensors[f"qmap{number}"])
        else:
            states[f"state{number}"] = state.double()
    return states


def need_step(
    rule: str,
    p: torch.Tensor,
    g: torch.Tensor,
    numbers: truth_optim.Numbers,
    given: dict[str, Any],
    found: dict[str, Any],
) -> truth_optim.Step:
    """The step from the ``given`` state leads to the ``found`` parameter and state."""
    before = float_states(given)
    step = truth_optim.step(rule, p.double(), g, before, numbers)
    need_parameter(found["p"], p.double(), step.p, "the parameter")
    for number, value in (("1", step.state1), ("2", step.state2)):
        what = f"state{number}"
        if value is None:
            continue
        need(found[what].dtype == given[what].dtype, f"{what} turned from {given[what].dtype} to {found[what].dtype}")
        if found[what].dtype == torch.uint8:
            need_codes(found[what], found[f"absmax{number}"], found[f"qmap{number}"], value, what)
        else:
            need_state(found[what], value, before[what].abs() + cancelled(rule, p, g, numbers), what)
    return step


def cancelled(rule: str, p: torch.Tensor, g: torch.Tensor, numbers: truth_optim.Numbers) -> torch.Tensor:
    """Magnitude of gradient and decay, which may cancel in a state where the decay is part of the gradient."""
    if rule in truth_optim.DECOUPLED:
        return torch.zeros(p.shape, dtype=torch.float64)
    terms = g.double().abs() * numbers["gnorm_scale"] + p.double().abs() * numbers["weight_decay"]
    return terms**2 if rule in ("rmsprop", "adagrad") else terms


def prove_op(d: Difference) -> None:
    """One step from the given state."""
    tensors, numbers = d.inputs["tensors"], d.inputs["numbers"]
    step = need_step(d.inputs["name"], tensors["p"], tensors["g"], numbers, tensors, d.ours)
    if step.unorm is not None and d.inputs["bits"] == 32:
        found = float(d.ours["unorm_vec"])
        need(abs(found - step.unorm) <= step.unorm * FLOAT_NOISE * 10, f"unorm_vec is {found}, expected {step.unorm}")
    need(torch.equal(d.ours["g"], tensors["g"]), "the gradient was modified")


def numbers_of(d: Difference, step_number: int, p: torch.Tensor) -> truth_optim.Numbers:
    """What one step of an optimizer class uses."""
    rule, options = rule_of(d.inputs["name"]), d.inputs["options"]
    numbers = NUMBERS | {"eps": 0.0, "alpha": 0.0, "beta3": 0.0} | CLASS_NUMBERS[rule] | {"step": step_number}
    numbers |= {key: options[key] for key in ("lr", "weight_decay") if key in options}
    numbers["param_norm"] = float(torch.linalg.vector_norm(p))
    if rule == "ademamix":
        beta1, beta3 = numbers["beta1"], numbers["beta3"]
        numbers["alpha"] = truth_optim.schedule(step_number, numbers["alpha"], options.get("t_alpha"))
        numbers["beta3"] = truth_optim.schedule_beta3(step_number, beta1, beta3, options.get("t_beta3"))
    return numbers


def flat_state(state: dict[str, Any]) -> dict[str, Any]:
    """State of one parameter without the nested level."""
    return {key: value for key, value in state.items() if key != NESTED} | dict(state.get(NESTED, {}))


def prove_load(d: Difference) -> None:
    """The state as given, and one more step from it."""
    need_class_step(d, d.inputs["parameters"], d.inputs["state_dict"]["state"], d.inputs["grads"], d.ours)


def prove_run(d: Difference) -> None:
    """Each step from where the one before led."""
    parameters, state = d.inputs["parameters"], None
    for grads, found in zip(d.inputs["grads"], d.ours["steps"], strict=True):
        need_class_step(d, parameters, state, grads, found)
        parameters, state = found["parameters"], found["state_dict"]["state"]


def need_class_step(
    d: Difference,
    parameters: list[torch.Tensor],
    state: dict[int, Any] | None,
    grads: list[torch.Tensor],
    found: dict[str, Any],
) -> None:
    """One step of an optimizer class, for each parameter; ``state`` is ``None`` at the start."""
    rule = rule_of(d.inputs["name"])
    for place, (p, g) in enumerate(zip(parameters, grads, strict=True)):
        after = flat_state(found["state_dict"]["state"][place])
        given = start_state(after) if state is None else flat_state(state[place])
        eight_bit = "8bit" in d.inputs["name"] and p.numel() >= truth_optim.MIN_8BIT_SIZE
        need(
            (after["state1"].dtype == torch.uint8) == eight_bit, f"parameter {place} has {after['state1'].dtype} state"
        )
        need(after["step"] == given["step"] + 1, f"step went from {given['step']} to {after['step']}")
        numbers = numbers_of(d, after["step"], p.double())
        need_step(rule, p, g, numbers, given, after | {"p": found["parameters"][place]})


def start_state(after: dict[str, Any]) -> dict[str, Any]:
    """Zero states of the kind that ``after`` has; a zero absmax makes every code zero."""
    zeros = {key: torch.zeros_like(value) for key, value in after.items() if key.startswith(("state", "absmax"))}
    return after | zeros | {"step": 0}


def has_same_layout(d: Difference) -> bool:
    """Same keys, shapes, dtypes and plain values on both sides, and what was loaded is as it was."""
    if d.they_failed or any(path.startswith("saved") for path in d.paths):
        return False
    ours, theirs = dict(leaves(d.ours)), dict(leaves(d.theirs))
    return ours.keys() == theirs.keys() and all(
        (ours[path].shape, ours[path].dtype) == (theirs[path].shape, theirs[path].dtype)
        if isinstance(ours[path], torch.Tensor) and isinstance(theirs[path], torch.Tensor)
        else ours[path] == theirs[path]
        for path in ours
    )


def is_close(d: Difference, *aside: str) -> bool:
    """Both sides are close to each other, leaving ``aside`` some tensors."""
    if not has_same_layout(d):
        return False
    ours, theirs = dict(leaves(d.ours)), dict(leaves(d.theirs))
    for path in d.paths:
        first, second = ours[path], theirs[path]
        if path.endswith(aside):
            continue
        if first.dtype == torch.uint8:
            if float((first != second).double().mean()) > 0.01:
                return False
        elif truth.relative_error(first, second.double()) > 1e-4:
            return False
    return True


def uses_limit(d: Difference) -> bool:
    """Whether the norm of the update is limited."""
    if "numbers" in d.inputs:
        return bool(d.inputs["numbers"]["max_unorm"] > 0)
    return rule_of(d.inputs["name"]) in ("lamb", "lars")


def prove(d: Difference) -> None:
    """By the kind of case."""
    {"optimizer_op": prove_op, "optimizer_load": prove_load, "optimizer_state_dict": prove_run}[d.case.op](d)


OPTIMIZERS = ("optimizer_op", "optimizer_state_dict", "optimizer_load")
CLASSES = OPTIMIZERS[1:]
EXPLANATIONS = (
    Explanation(OPTIMIZERS, "the last bits of float32 sums, whose order is not part of the contract", is_close, prove),
    Explanation(
        ("optimizer_op",),
        "skip_zeros has no effect in the release on the CPU",
        lambda d: has_same_layout(d) and d.inputs["numbers"]["skip_zeros"],
        prove,
    ),
    Explanation(
        ("optimizer_op",),
        "max_unorm has no effect on AdEMAMix, Adagrad and Lion in the release on the CPU",
        lambda d: has_same_layout(d) and uses_limit(d) and d.inputs["name"] in ("ademamix", "adagrad", "lion"),
        prove,
    ),
    Explanation(
        CLASSES,
        "unorm_vec, which every step of the release overwrites, is not kept by our optimizers",
        lambda d: uses_limit(d) and is_close(d, "unorm_vec"),
        prove,
    ),
    Explanation(
        OPTIMIZERS,
        "LAMB and LARS: the release limits the update before bias correction (32-bit) or not at all (8-bit) on the CPU",
        lambda d: has_same_layout(d) and uses_limit(d),
        prove,
    ),
    Explanation(
        ("optimizer_state_dict",),
        "AdEMAMix32bit of the release fails at its first step",
        lambda d: d.they_failed and d.inputs["name"] == "AdEMAMix32bit",
        prove,
    ),
)
