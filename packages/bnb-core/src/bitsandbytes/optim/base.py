"""The optimizer: parameters, states and the step. What it computes is a rule of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any, ClassVar

import torch

from bitsandbytes import paging
from bitsandbytes.codebooks import dynamic_map
from bitsandbytes.errors import ArgumentError, CheckpointError
from bitsandbytes.ops.optim_rules import RULES
from bitsandbytes.ops.optim_storage import state_blocks
from bitsandbytes.optim import statedict
from bitsandbytes.optim.engine import Batch
from bitsandbytes.optim.overrides import GlobalOptimManager
from bitsandbytes.optim.paged import PAGED_PORTION, STATE_KEYS, fetched_ahead, moved_state, new_state, paged_of
from bitsandbytes.optim.settings import check_bits
from bitsandbytes.optim.sharded import collect, is_sharded, local, spread


class Optimizer8bit(torch.optim.Optimizer):
    """Base of all optimizers: keeps states in 32 or 8 bit and steps all parameters in a few op calls.

    Per parameter the state holds ``step`` and ``state1``, for rules with two states ``state2``; in
    8 bit also ``qmap1``, ``absmax1`` and their second ones.

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        defaults: settings of groups that have none of their own.
        optim_bits: bits per element of state, 32 or 8.
        is_paged: keep large states in memory that can move to the host, where the device has it.
    """

    _FSDP_WRAPPED_QUANT_STATE_KEY: ClassVar[str] = statedict.QUANT_STATE_KEY

    #: Name of the update rule, a key of :data:`bitsandbytes.ops.optim_rules.RULES`.
    optimizer_name: str
    #: Settings that are the same for all groups: optim_bits, min_8bit_size, max_unorm, skip_zeros.
    args: Any

    def __init__(self, params: Any, defaults: dict[str, Any], optim_bits: int = 32, is_paged: bool = False):
        check_bits(type(self).__name__, optim_bits)
        self._start(is_paged)
        super().__init__(params, defaults)
        self.fill_qmap()

    def _start(self, is_paged: bool) -> None:
        self.initialized = False
        self.is_paged = is_paged
        self.name2qmap: dict[str, torch.Tensor] = {}
        self.non_castable_tensor_keys = set(statedict.TENSOR_KEYS)
        self.mng = GlobalOptimManager.get_instance()
        self._plan: list[Batch] = []
        self._idle: list[torch.Tensor] = []
        self._planned: tuple[Any, ...] | None = None

    @property
    def page_mng(self) -> Any:
        """The list of paged tensors that callers keep, under its historical name."""
        from bitsandbytes.functional import GlobalPageManager

        return GlobalPageManager.get_instance()

    def fill_qmap(self) -> None:
        """Put the codebooks of 8-bit states into ``name2qmap``."""
        cpu = torch.device("cpu")
        self.name2qmap["dynamic"] = dynamic_map(True, cpu)
        self.name2qmap["udynamic"] = dynamic_map(False, cpu)

    # --- settings ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :meth:`torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        self._planned = None

    def check_overrides(self) -> None:
        """Look up the settings that :class:`GlobalOptimManager` has for single parameters."""
        self._overrides = self.mng.of(chain.from_iterable(group["params"] for group in self.param_groups))
        self._overrides_version = self.mng.version

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """All settings that count for one parameter."""
        if getattr(self, "_overrides_version", None) != self.mng.version:
            self.check_overrides()
        settings = {key: value for key, value in group.items() if key != "params"}
        return {**vars(self.args), **settings, **self._overrides.get(id(group["params"][pindex]), {})}

    def rule_of(self, group: dict[str, Any]) -> str:
        """Name of the update rule of a group, a key of :data:`bitsandbytes.ops.optim_rules.RULES`."""
        return self.optimizer_name

    def batch_type(self, group: dict[str, Any]) -> type[Batch]:
        """What makes the steps of a group."""
        return Batch

    # --- state ------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Make the state of one parameter."""
        config = self.get_config(gindex, pindex, group)
        rule = RULES[self.rule_of(group)]
        bits = check_bits(type(self).__name__, config["optim_bits"])
        shard = local(p)
        # The whole size of a sharded parameter counts, so that all processes have states of one kind.
        eight = bits == 8 and p.numel() >= config["min_8bit_size"]
        state = self.state[p]
        state["step"] = 0
        for position in range(1, rule.states + 1):
            slots = rule.slots if position == 1 else 1
            shape = (slots, *shard.shape) if slots > 1 else tuple(shard.shape)
            state[f"state{position}"] = self._buffer(shape, torch.uint8 if eight else torch.float32, shard.device)
            if eight:
                blocks = state_blocks(shard.numel())
                state[f"qmap{position}"] = dynamic_map(position == 1, shard.device)
                state[f"absmax{position}"] = torch.zeros(
                    (slots, blocks) if slots > 1 else (blocks,), dtype=torch.float32, device=shard.device
                )
        if config["max_unorm"] > 0.0:
            # Read by upstream, which keeps the norm of the update here, when it loads the state.
            state["unorm_vec"] = torch.zeros(1, device=shard.device)

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A zero tensor in the shape of the parameter, paged where the optimizer is."""
        shard = local(p)
        return self._buffer(tuple(shard.shape), dtype, shard.device)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return new_state(shape, dtype, device) if self.is_paged else torch.zeros(shape, dtype=dtype, device=device)

    def prefetch_state(self, p: torch.Tensor) -> None:
        """Begin to move the paged state of one parameter to its device."""
        for tensor in paged_of(self.state[p]):
            paging.prefetch(tensor)

    def to_gpu(self) -> None:
        """Move states to the device of their parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    self._follow(p)

    def _follow(self, p: torch.Tensor) -> None:
        device = local(p).device
        state = self.state[p]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.device != device and key != "step":
                state[key] = self._placed(key, value, device)

    def _placed(self, key: str, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor of a state for parameters on a device; a copy, or the codebook that all share."""
        if key.startswith("qmap"):
            return _shared_map(key, value, device)
        if self.is_paged and key in STATE_KEYS:
            return moved_state(value, device)
        return value.to(device=device, copy=True)

    # --- step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.prepare_step()
        if type(self).update_step is not Optimizer8bit.update_step:
            # A subclass with a step of its own for a single parameter.
            self._step_one_by_one()
            return loss
        for batch, gradients in fetched_ahead(self._work()):
            batch.run(gradients)
        self.initialized = True
        return loss

    def prepare_step(self) -> None:
        """Do what an optimizer does once per step, before the parameters are updated."""

    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Update a single parameter, which must have a gradient and a state."""
        batch = self._batch_of(group, p, gindex, pindex)
        batch.add(p, self.state[p], self._position(gindex, pindex))
        gradients = batch.gradients()
        if gradients is None:
            raise ArgumentError(f"{type(self).__name__}: parameter {pindex} of group {gindex} has no gradient")
        batch.run(gradients)

    def _step_one_by_one(self) -> None:
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is not None:
                    if not self.state[p]:
                        self.init_state(group, p, gindex, pindex)
                    self.update_step(group, p, gindex, pindex)
        self.initialized = True

    def _work(self) -> list[tuple[Batch, list[torch.Tensor]]]:
        """The batches of this step with their gradients; the plan of the last step where it still fits."""
        work = self._with_gradients() if self._fingerprint() == self._planned else None
        if work is None:
            self._make_plan()
            work = self._with_gradients()
        return work or []

    def _with_gradients(self) -> list[tuple[Batch, list[torch.Tensor]]] | None:
        work = []
        for batch in self._plan:
            gradients = batch.gradients()
            if gradients is None:
                return None
            work.append((batch, gradients))
        return None if any(p.grad is not None for p in self._idle) else work

    def _fingerprint(self) -> tuple[Any, ...]:
        """What a plan depends on, apart from the parameters themselves."""
        return (
            self.mng.version,
            id(self.state),
            self.optimizer_name,
            *((id(g), len(g["params"]), g.get("t_alpha"), g.get("t_beta3")) for g in self.param_groups),
        )

    def _make_plan(self) -> None:
        batches: dict[Any, Batch] = {}
        plan, idle = [], []
        self.check_overrides()
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    idle.append(p)
                    continue
                if "state1" not in self.state[p]:
                    self.init_state(group, p, gindex, pindex)
                self._follow(p)
                state = self.state[p]
                kind = (state["state1"].dtype, *(id(state.get(key)) for key in ("qmap1", "qmap2")))
                own = self._overrides.get(id(p))
                key: tuple[Any, ...] = (gindex, p.device, p.dtype, kind, repr(sorted(own.items())) if own else None)
                if is_sharded(p):
                    key = (*key, p.device_mesh, tuple(p.placements))
                scheduled = any(self._setting(group, own, name) is not None for name in ("t_alpha", "t_beta3"))
                # One number of the step serves a batch; on the device each parameter has its own.
                if scheduled or not isinstance(state["step"], torch.Tensor):
                    key = (*key, int(state["step"]))
                if key not in batches or batches[key].paged >= PAGED_PORTION:
                    batches[key] = self._batch_of(group, p, gindex, pindex)
                    plan.append(batches[key])
                batches[key].add(p, state, self._position(gindex, pindex))
        # At the end: a state that finds no memory leaves the old plan, which is then found not to fit.
        self._plan, self._idle, self._planned = plan, idle, self._fingerprint()

    @staticmethod
    def _setting(group: dict[str, Any], own: Mapping[str, Any] | None, name: str) -> Any:
        return own[name] if own and name in own else group.get(name)

    def _batch_of(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> Batch:
        own = self.mng.of([p]).get(id(p), {})
        fixed = {key: value for key, value in vars(self.args).items() if key not in group}
        kind = self.batch_type(group)
        return kind(self.rule_of(group), group, {**fixed, **own}, p.device, p.dtype, sharded=is_sharded(p))

    def _position(self, gindex: int, pindex: int) -> int:
        return sum(len(group["params"]) for group in self.param_groups[:gindex]) + pindex

    # --- state dicts and pickles ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer; the tensors of each parameter lie in a dict of their own.

        That dict keeps sharded training from gathering them as if they had the parameter's shape.
        """
        saved = super().state_dict()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        nested = {}
        for key, state in saved["state"].items():
            if isinstance(key, int) and key < len(params) and is_sharded(params[key]) and "state1" in state:
                state = spread(state, params[key])
            nested[key] = statedict.nest(state) if isinstance(state, Mapping) else state
        saved["state"] = nested
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Load what :meth:`state_dict` returned, here or in upstream, in its nested or its older flat layout.

        Tensors keep their dtype, whatever that of the parameters is.

        Args:
            state_dict: it is not changed and shares nothing with the optimizer afterwards.
            move_to_device: move states to the device of their parameter now rather than at the next step.

        Raises:
            CheckpointError: groups or states do not fit this optimizer, which is then unchanged.
        """
        loaded = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, loaded)
            loaded = loaded if replaced is None else dict(replaced)
        groups = [dict(group) for group in deepcopy([_light(group) for group in loaded["param_groups"]])]
        parameters = self._match(groups)
        rules = {id(p): RULES[self.rule_of(group)] for group in self.param_groups for p in group["params"]}
        state: dict[Any, Any] = defaultdict(dict)
        for key, saved in loaded["state"].items():
            if key not in parameters:
                state[key] = deepcopy(saved)
                continue
            p, where = parameters[key], f"state of parameter {key}"
            shard, rule = local(p), rules[id(p)]
            flat = statedict.flatten(saved) if isinstance(saved, Mapping) else {}
            flat = collect(flat, p, rule.slots)
            device = shard.device if move_to_device else None
            for name, value in flat.items():
                tensor = isinstance(value, torch.Tensor)
                flat[name] = self._placed(name, value, device or value.device) if tensor else deepcopy(value)
            state[p] = statedict.modernize(flat, rule, shard.numel(), where)
            if state[p]:
                self.check_loaded(state[p], p, where)
        for group, own in zip(groups, self.param_groups, strict=True):
            group["params"] = own["params"]
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def check_loaded(self, state: Mapping[str, Any], p: torch.Tensor, where: str) -> None:
        """Raise CheckpointError for a loaded state that lacks what an optimizer keeps beside the usual."""

    def _match(self, groups: list[dict[str, Any]]) -> dict[Any, torch.Tensor]:
        """Parameters by the key that saved groups give them."""
        if len(groups) != len(self.param_groups):
            raise CheckpointError(f"the state dict has {len(groups)} groups, expected {len(self.param_groups)}")
        parameters: dict[Any, torch.Tensor] = {}
        for index, (group, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            saved, expected = len(group["params"]), len(own["params"])
            if saved != expected:
                raise CheckpointError(f"group {index} of the state dict has {saved} parameters, expected {expected}")
            parameters.update(zip(group["params"], own["params"], strict=True))
        return parameters

    def __getstate__(self) -> dict[str, Any]:
        kept = ("optimizer_name", "args", "initialized", "is_paged")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept if key in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "name2qmap" not in self.__dict__:
            self._start(state.get("is_paged", False))
            self.fill_qmap()
        super().__setstate__(state)
        self._planned = None


def _light(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group, with its list of parameters copied but not what it lists."""
    return {**group, "params": list(group["params"])}


def _shared_map(key: str, qmap: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The codebook on a device: the one that all states share, where the values are the same.

    States whose codebook is one object can be updated by one op call.
    """
    values = qmap.detach().cpu().reshape(-1)
    for signed in (key == "qmap1", key != "qmap1"):
        if qmap.dtype == torch.float32 and torch.equal(values, dynamic_map(signed, torch.device("cpu"))):
            return dynamic_map(signed, device)
    return qmap.to(device, copy=True)
