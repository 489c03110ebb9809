"""From parameters to op calls: one call for all parameters that can share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from bitsandbytes.contract import OPS
from bitsandbytes.ops.common import FLOAT_DTYPES
from bitsandbytes.ops.optim_rules import RULES, Hyper
from bitsandbytes.optim.bound import BoundBatch
from bitsandbytes.optim.paged import paged_of
from bitsandbytes.optim.schedules import alpha_at, alpha_on_device, beta3_at, beta3_on_device
from bitsandbytes.optim.sharded import clip_scales, local

State = dict[str, Any]

_DTYPE, _DEVICE, _LAYOUT = attrgetter("dtype"), attrgetter("device"), attrgetter("layout")


class Numbers(NamedTuple):
    """Arguments of the op from ``step`` on, in its order."""

    step: list[int]
    lr: float
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    gnorm_scale: float
    max_unorm: float
    skip_zeros: bool
    rounding_seed: list[int]
    schedule: torch.Tensor | None

    def hyper(self, index: int) -> Hyper:
        """What the rules need to know about one of the parameters."""
        moving: Sequence[Any] = (self.lr, self.step[index] if self.step else 0, self.beta3, self.alpha)
        lr, step, beta3, alpha = moving if self.schedule is None else self.schedule[index].unbind()
        return Hyper(
            lr,
            step,
            self.beta1,
            self.beta2,
            beta3,
            alpha,
            self.eps,
            self.weight_decay,
            self.gnorm_scale,
            self.max_unorm,
            self.skip_zeros,
        )


@dataclass(eq=False)
class Batch:
    """Parameters of one group that share device, dtype, kind of state and settings."""

    rule: str
    group: dict[str, Any]
    #: Settings of the optimizer and of these parameters, which win over those of the group.
    overrides: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    params: list[torch.Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    #: Position of each parameter in the optimizer; part of the seed of stochastic rounding.
    positions: list[int] = field(default_factory=list)
    #: Whether the parameters are DTensors, of which this process has a part.
    sharded: bool = False
    #: Bytes of the states that are paged, so that they may have to be fetched ahead of their use.
    paged: int = 0
    #: Departures of paged memory from the device before it was last fetched; see :mod:`bitsandbytes.paging`.
    fetched: int | None = 0
    #: Step numbers on the device, where the step must not be read by the host.
    counter: torch.Tensor | None = None
    #: The step prepared for repetition, where that is possible.
    bound: BoundBatch = field(default_factory=BoundBatch)
    #: Whether :attr:`bound` has been prepared for the gradients that were read last.
    prepared: bool = False
    #: Whether a step has been made: the first of several is not worth being prepared for.
    repeated: bool = False
    #: Whether numbers of steps have come apart, so that the parameters had better be divided anew.
    mixed: bool = False

    def add(self, parameter: torch.Tensor, state: State, position: int) -> None:
        """Take in a parameter, with its place in the optimizer."""
        self.params.append(parameter)
        self.states.append(state)
        self.positions.append(position)
        self.paged += sum(tensor.nbytes for tensor in paged_of(state))

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting of these parameters."""
        return self.overrides[key] if key in self.overrides else self.group.get(key, default)

    def gradients(self) -> list[torch.Tensor] | None:
        """Gradients by parameter, ``None`` when one is missing or a parameter has changed its place."""
        gradients: list[Any] = [parameter.grad for parameter in self.params]
        # Thousands of parameters are usual: sets are built in C, loops would not be.
        if self.mixed or type(None) in set(map(type, gradients)):
            return None
        self.prepared = self.bound.takes(gradients)
        if not self.prepared and (
            set(map(_DTYPE, self.params)) != {self.dtype}
            or set(map(_DEVICE, self.params)) != {self.device}
            or not self._shares_codebooks()
        ):
            return None
        return gradients

    def _shares_codebooks(self) -> bool:
        return all(len({id(state.get(key)) for state in self.states}) == 1 for key in ("qmap1", "qmap2"))

    def run(self, gradients: list[torch.Tensor]) -> None:
        """Make one step of all parameters."""
        uniform = self.count_step()
        prepared, self.prepared, self.mixed = self.prepared and uniform, False, not uniform
        if prepared:
            self.bound.run(self._op(), self.params, self.states[0], self._numbers())
        else:
            self._call(gradients)
        self.repeated = True

    def count_step(self) -> bool:
        """Count the step that is about to be made; says whether one number of the step serves all parameters."""
        if self._on_device():
            if self.counter is None:
                dtype = torch.float32 if self.device.type == "mps" else torch.float64
                steps = [float(state["step"]) for state in self.states]
                self.counter = torch.tensor(steps, dtype=dtype, device=self.device)
                for index, state in enumerate(self.states):
                    state["step"] = self.counter[index]
            self.counter += 1
            return True
        self.counter = None
        counts = [state["step"] for state in self.states]
        if set(map(type, counts)) != {int} or len(set(counts)) > 1:
            for state in self.states:
                state["step"] = int(state["step"]) + 1
            return len({state["step"] for state in self.states}) == 1
        number = counts[0] + 1
        for state in self.states:
            state["step"] = number
        return True

    def _on_device(self) -> bool:
        lr = self.setting("lr")
        return bool(self.setting("capturable", False)) or (isinstance(lr, torch.Tensor) and lr.device.type != "cpu")

    def _call(self, gradients: list[torch.Tensor]) -> None:
        params, grads, states = self.params, gradients, self.states
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.sharded or not self._are_plain(params, grads):
            params, grads, copies = self._made_plain(params, grads)
        eight, two = states[0]["state1"].dtype == torch.uint8, RULES[self.rule].states == 2
        op = OPS[self._op()]
        # The ops take the usual dtypes; float64 parameters, a rarity, are served by the reference.
        call = op.overload if self.dtype in FLOAT_DTYPES else op.reference
        numbers = self._numbers()
        if self.sharded and numbers.max_unorm > 0.0:
            numbers = self._limited(numbers, params, grads)
        call(self.rule, grads, params, *_stored(states, eight, two), *numbers)
        for parameter, copy in copies:
            parameter.copy_(copy)
        if self.repeated and not (self.sharded or copies or self.dtype not in FLOAT_DTYPES):
            self.bound.bind(op.name, self.rule, grads, params, states)

    def _op(self) -> str:
        eight = self.states[0]["state1"].dtype == torch.uint8
        return "optimizer_step_8bit" if eight else "optimizer_step_32bit"

    def _are_plain(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
        """Whether the op can take these as they are."""
        return (
            set(map(_LAYOUT, grads)) == {torch.strided}
            and set(map(_DTYPE, grads)) == {self.dtype}
            and all(map(torch.Tensor.is_contiguous, grads))
            and all(map(torch.Tensor.is_contiguous, params))
        )

    def _made_plain(
        self, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Local parts, contiguous and dense: parameters, gradients, and copies that must be written back."""
        plain, copies = [], []
        for parameter in params:
            part = local(parameter.detach())
            plain.append(part.contiguous())
            if not part.is_contiguous():
                copies.append((part, plain[-1]))
        return plain, [self._plain(local(gradient)) for gradient in grads], copies

    def _plain(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient dense, contiguous and in the parameter's dtype."""
        if gradient.layout is not torch.strided:
            gradient = gradient.to_dense()
        return gradient.to(self.dtype).contiguous()

    def _limited(self, numbers: Numbers, params: list[torch.Tensor], grads: list[torch.Tensor]) -> Numbers:
        """Limit the norms of the updates of whole parameters, of which the op sees shards: by the learning rates.

        A decoupled decay must not be scaled along, so it is taken here.
        """
        hypers = [numbers.hyper(index) for index in range(len(params))]
        scales = clip_scales(self.rule, self.params, params, grads, self.states, hypers)
        columns = [torch.as_tensor([h[field] for h in hypers]) for field in (0, 1, 4, 5)]
        rates, *others = (column.to(self.device, torch.float64) for column in columns)
        if not RULES[self.rule].coupled_decay and numbers.weight_decay > 0.0:
            for parameter, h in zip(params, hypers, strict=True):
                parameter.mul_(1.0 - h.lr * h.weight_decay)
            numbers = numbers._replace(weight_decay=0.0)
        schedule = torch.stack((rates * scales, *others), dim=1)
        return numbers._replace(max_unorm=0.0, schedule=schedule)

    def _numbers(self) -> Numbers:
        betas = self.setting("betas", (0.0, 0.0))
        beta1, beta2 = betas[0], betas[1] if len(betas) > 1 else 0.0
        beta3, alpha = betas[2] if len(betas) > 2 else 0.0, self.setting("alpha", 0.0)
        t_alpha, t_beta3 = self.setting("t_alpha"), self.setting("t_beta3")
        lr = self.setting("lr") * self.setting("lr_warmup", 1.0)
        steps: list[int] = []
        schedule = None
        if self.counter is not None:
            now = self.counter
            # A number is not copied to the device, which a captured graph could not do.
            rates = lr.to(now).expand_as(now) if isinstance(lr, torch.Tensor) else torch.full_like(now, lr)
            beta3s, alphas = beta3_on_device(now, beta1, beta3, t_beta3), alpha_on_device(now, alpha, t_alpha)
            schedule, lr = torch.stack((rates, now, beta3s, alphas), dim=1), 0.0
        else:
            steps = [state["step"] for state in self.states]
            if t_alpha is not None or t_beta3 is not None:
                # One step number serves all: a plan never mixes numbers under a schedule.
                alpha = alpha_at(steps[0], alpha, t_alpha)
                beta3 = beta3_at(steps[0], beta1, beta3, t_beta3)
        return Numbers(
            steps,
            float(lr),
            float(beta1),
            float(beta2),
            float(beta3),
            float(alpha),
            float(self.setting("eps", 0.0)),
            float(self.setting("weight_decay", 0.0)),
            float(self.setting("gnorm_scale", 1.0)),
            float(self.setting("max_unorm", 0.0)),
            bool(self.setting("skip_zeros", False)),
            self._seeds(self.positions),
            schedule,
        )

    def _seeds(self, positions: Sequence[int]) -> list[int]:
        if self.dtype is not torch.bfloat16 or not self.setting("stochastic_rounding", False):
            return []
        seed = int(self.setting("rounding_seed", 0))
        return [seed + position for position in positions]


def _stored(states: list[State], eight: bool, two: bool) -> tuple[Any, ...]:
    """The states as the op takes them, from ``state1`` on."""
    first = [state["state1"] for state in states]
    second = [state["state2"] for state in states] if two else []
    if not eight:
        return first, second
    return (
        first,
        second,
        states[0]["qmap1"],
        states[0]["qmap2"] if two else None,
        [state["absmax1"] for state in states],
        [state["absmax2"] for state in states] if two else [],
    )
