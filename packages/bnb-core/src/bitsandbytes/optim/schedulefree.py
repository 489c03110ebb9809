"""Schedule-free AdamW: an average of the parameters takes the place of a decaying learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bitsandbytes.errors import ArgumentError
from bitsandbytes.ops.optim_storage import load_state
from bitsandbytes.optim.optimizer import Optimizer2State
from bitsandbytes.optim.sharded import local
from bitsandbytes.optim.variants import Storage, reduced

#: What a group keeps from step to step, and what its next step needs: numbers, or tensors on the device.
COUNTERS = ("k", "weight_sum", "lr_max", "alpha", "lr_warmup")


class ScheduleFreeAdamWFamily(Storage, Optimizer2State):
    """Schedule-free AdamW (arXiv:2405.15682).

    With ``u = g / (sqrt(v / (1-b2^t)) + eps) + wd y`` and ``c = w / (sum of all w)``,
    ``w = t^r (largest lr so far)^weight_lr_power``::

        z = z - lr u
        x = (1-c) x + c z
        y = (1-b1) z + b1 x

    Parameters are ``y``, where gradients belong, from the start and after :meth:`train`, and ``x``, which is to be
    evaluated and saved, after :meth:`eval`. Stored is ``d = z - y`` instead of ``z``, so that its 8 bits
    cannot lose the parameters: ``y = y + c d - lr (1 - b1 (1-c)) u``, ``d = (1-c) (d - lr b1 u)`` and
    ``x = y + (1 - 1/b1) d``.

    The betas of a group must stay the same, and there must be no decay of the learning rate.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element; 1 to 10 times that of AdamW.
        betas: weight of ``x`` in ``y``, above 0, and decay rate of the average of squares.
        eps: added to the root of that average.
        weight_decay: decoupled weight decay, of ``y``.
        warmup_steps: number of steps over which the learning rate grows linearly from 0.
        r: exponent of the number of the step in the weights of the average ``x``.
        weight_lr_power: exponent of the learning rate there.
        optim_bits: bits per element of state, 32 or 8.
        min_8bit_size: parameters with fewer elements have 32-bit state always.

    Raises:
        ArgumentError: an argument has a value without meaning; the text names it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 0.0025,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
    ):
        bits, owner = self.stored_bits(optim_bits), type(self).__name__
        given = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        for name, value in given.items():
            if not value >= 0:
                raise ArgumentError(f"{owner}: {name} is {value}, expected 0 or more")
        super().__init__("schedule_free", params, lr, betas, eps, weight_decay, bits, None, min_8bit_size)
        if self.defaults["betas"][0] == 0.0:
            raise ArgumentError(f"{owner}: betas is {self.defaults['betas']}, the first must be above 0")
        # Among the defaults from now on, for groups that are added later.
        start = {**given, "k": 0, "weight_sum": 0.0, "lr_max": 0.0, "lr_warmup": 1.0, "train_mode": True}
        for settings in (self.defaults, *self.param_groups):
            for name, value in start.items():
                settings.setdefault(name, value)

    def train(self) -> None:
        """Make the parameters ``y`` again, to go on with training; they may be so already."""
        self._switch(True)

    def eval(self) -> None:
        """Make the parameters ``x``, to evaluate or save the model; they may be so already."""
        self._switch(False)

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        for gindex, group in enumerate(self.param_groups):
            if group["train_mode"] == training:
                continue
            for pindex, p in enumerate(group["params"]):
                if "state1" in self.state.get(p, {}):
                    self._follow(p)
                    part = 1.0 - 1.0 / self.get_config(gindex, pindex, group)["betas"][0]
                    shard, d = local(p.detach()), _stored_difference(self.state[p])
                    shard.copy_(shard.to(torch.promote_types(p.dtype, d.dtype)) + (-part if training else part) * d)
            group["train_mode"] = training

    def prepare_step(self) -> None:
        """Find the learning rates of this step and the weights of ``z`` in the averages.

        Raises:
            ArgumentError: the parameters are those to be evaluated.
        """
        for index, group in enumerate(self.param_groups):
            if not group["train_mode"]:
                raise ArgumentError(
                    f"{type(self).__name__}: the parameters of group {index} are the averages that eval() has put "
                    f"there; call train() before step()"
                )
        for group in self.param_groups:
            lr, params = group["lr"], group["params"]
            if params and (group.get("capturable") or (isinstance(lr, torch.Tensor) and lr.device.type != "cpu")):
                _advance_on_device(group, local(params[0]).device)
            else:
                _advance(group)

    def state_dict(self) -> dict[str, Any]:
        """As for every optimizer here; what groups count on the device is saved as numbers."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            _read_counters(group)
        return saved


def _advance(group: dict[str, Any]) -> None:
    """Count a step of a group on the host."""
    _read_counters(group)
    group["k"] += 1
    group["lr_warmup"] = min(group["k"] / max(group["warmup_steps"], 1), 1.0)
    group["lr_max"] = max(group["lr_max"], float(group["lr"]) * group["lr_warmup"])
    weight = group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
    group["weight_sum"] += weight
    group["alpha"] = weight / group["weight_sum"] if group["weight_sum"] > 0.0 else 0.0


def _advance_on_device(group: dict[str, Any], device: torch.device) -> None:
    """:func:`_advance` without a look at the values, in tensors that a captured graph updates."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    for key in ("k", "weight_sum", "lr_max"):
        if not isinstance(group[key], torch.Tensor):
            group[key] = torch.tensor(float(group[key]), dtype=dtype, device=device)
    group["k"] += 1
    group["lr_warmup"] = (group["k"] / max(group["warmup_steps"], 1)).clamp(max=1.0)
    lr_max, weight_sum = group["lr_max"], group["weight_sum"]
    lr_max.copy_(torch.maximum(lr_max, group["lr_warmup"] * group["lr"]))
    weight = group["k"] ** group["r"] * lr_max ** group["weight_lr_power"]
    weight_sum += weight
    group["alpha"] = torch.where(weight_sum > 0.0, weight / weight_sum, 0.0)


def _read_counters(group: dict[str, Any]) -> None:
    """Numbers in the place of tensors."""
    for key in COUNTERS:
        if isinstance(group.get(key), torch.Tensor):
            group[key] = int(group[key]) if key == "k" else float(group[key])


def _stored_difference(state: Mapping[str, Any]) -> torch.Tensor:
    d = state["state1"]
    return load_state(d, state["qmap1"], state["absmax1"]) if d.dtype == torch.uint8 else d


class ScheduleFreeAdamW(ScheduleFreeAdamWFamily):
    """Schedule-free AdamW; ``optim_bits`` says how states are stored."""


class ScheduleFreeAdamW8bit(ScheduleFreeAdamWFamily):
    """Schedule-free AdamW with 8-bit states."""

    bits = 8
    __init__ = reduced(ScheduleFreeAdamWFamily.__init__, "optim_bits")


class ScheduleFreeAdamW32bit(ScheduleFreeAdamWFamily):
    """Schedule-free AdamW with 32-bit states."""

    bits = 32
    __init__ = reduced(ScheduleFreeAdamWFamily.__init__, "optim_bits")
