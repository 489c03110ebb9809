"""Muon: momentum whose singular values are made about equal, for the matrices of a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from bitsandbytes.errors import ArgumentError, ArgumentTypeError
from bitsandbytes.optim.base import Optimizer8bit
from bitsandbytes.optim.composed import ComposedBatch
from bitsandbytes.optim.engine import Batch
from bitsandbytes.optim.settings import MockArgs, check_settings
from bitsandbytes.optim.sharded import is_sharded, local
from bitsandbytes.optim.variants import Storage, reduced

#: Coefficients of the quintic polynomial, chosen for a steep slope at zero (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

#: Elements that are worked on together; matrices of one shape share their products.
PORTION = 2**25

#: Dtypes that the products may be computed in.
PRODUCT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def rms_scale(name: str | None, rows: int, columns: int) -> float:
    """Factor on the learning rate of a matrix of that shape.

    Args:
        name: "original", or ``None``, for ``sqrt(max(1, rows / columns))``; "match_rms_adamw" for
            ``0.2 sqrt(max(rows, columns))``, with which updates are as large as AdamW's (Liu et al. 2025,
            arXiv:2502.16982, section 2.2).
        rows, columns: shape of the matrix.
    """
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Matrices with the same singular vectors and singular values near 1, by a Newton-Schulz iteration.

    ``X = X / |X|``, then ``X = a X + (b A + c A^2) X`` with ``A = X X^T``, ``steps`` times
    (https://kellerjordan.github.io/posts/muon).

    Args:
        matrices: shape ``(count, rows, columns)``, any float dtype.
        coefficients: ``a``, ``b`` and ``c``.
        steps: number of iterations.
        eps: least value of the Frobenius norm ``|X|``.
        dtype: that of products and result.
    """
    a, b, c = coefficients
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    x = (wide / norms.clamp(min=eps)).to(dtype)
    # The product with itself is the smaller one this way.
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _number in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonBatch(ComposedBatch):
    """Matrices of one group."""

    def make_steps(self, gradients: list[torch.Tensor]) -> None:
        """Orthogonalize the momentums, matrices of one shape together, and move the parameters."""
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for place, p in enumerate(self.params):
            if p.numel():
                by_shape[p.shape].append(place)
        for shape, places in by_shape.items():
            count = max(1, PORTION // shape.numel())
            for start in range(0, len(places), count):
                self._step_alike(places[start : start + count], shape, gradients)

    def _step_alike(self, places: list[int], shape: torch.Size, gradients: list[torch.Tensor]) -> None:
        products, lookahead = self.setting("ns_dtype"), 1.0 if self.setting("nesterov") else 0.0
        # Rounded to the precision of the products at most.
        work = self.dtype if self.dtype in (torch.float64, products) else torch.float32
        values = [self._plain(local(gradients[place])).to(work) for place in places]
        stack = torch.zeros((len(values), *values[0].shape), dtype=work, device=self.device)
        beta = float(self.setting("momentum"))
        # The average of the gradients, as torch has it.
        scale = (1.0 - beta) * float(self.setting("gnorm_scale", 1.0))
        self.advance(places, values, list(stack.unbind()), beta, 0.0, lookahead, scale)
        eps, steps = float(self.setting("eps")), self.setting("ns_steps")
        whole = _gathered(stack, self.params[places[0]]) if self.sharded else stack
        directions = orthogonalize(whole, self.setting("ns_coefficients"), steps, eps, products)
        if self.sharded:
            directions = _own_part(directions, self.params[places[0]])
        rate = self.setting("lr") * rms_scale(self.setting("adjust_lr_fn"), *shape)
        for place, direction in zip(places, directions.unbind(), strict=True):
            self.move(place, direction, rate)


class MuonFamily(Storage, Optimizer8bit):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), with AdamW for what is no matrix.

    ``m = momentum m + (1-momentum) g``, ``u = (1-momentum) g + momentum m`` with ``nesterov``, else ``m``,
    ``p = p (1 - lr wd) - lr scale orthogonalized(u)``, see :func:`orthogonalize` and :func:`rms_scale`.

    A group with ``use_muon=False`` is updated by AdamW with the group's ``lr``, ``betas``, ``eps`` and
    ``weight_decay``: embeddings, the output layer, biases, norms, kernels of convolutions. :meth:`groups_of` makes
    the groups of a model. All other groups must hold matrices alone.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled weight decay.
        momentum: decay rate of the average of gradients.
        nesterov: look ahead by one step of momentum.
        ns_coefficients: coefficients of the iteration.
        eps: least norm that a momentum is divided by; 1e-8 and AdamW's where ``use_muon`` is false.
        ns_steps: number of iterations, less than 100.
        adjust_lr_fn: how the step depends on the shape of a matrix: "original", which ``None`` means too, or
            "match_rms_adamw", with which learning rates and decays are those of AdamW.
        betas: decay rates of AdamW.
        ns_dtype: dtype of the products: bfloat16, float32 or float64.
        optim_bits: bits per element of state, 32 or 8.
        min_8bit_size: parameters with fewer elements have 32-bit state always.

    Raises:
        ArgumentError: an argument has a value without meaning, or a group of matrices holds something else; the
            text names it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        betas: Any = (0.9, 0.95),
        ns_dtype: torch.dtype = torch.bfloat16,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
    ):
        bits, owner = self.stored_bits(optim_bits), type(self).__name__
        lr, betas = check_settings(owner, lr, betas, eps, weight_decay)
        if len(betas) != 2:
            raise ArgumentError(f"{owner}: betas is {betas}, expected 2 numbers")
        if ns_dtype not in PRODUCT_DTYPES:
            allowed = ", ".join(map(str, PRODUCT_DTYPES))
            raise ArgumentTypeError(f"{owner}: ns_dtype is {ns_dtype}, allowed: {allowed}")
        self.optimizer_name = "sgd"
        settings = {"optim_bits": bits, "min_8bit_size": min_8bit_size, "max_unorm": 0.0, "skip_zeros": False}
        self.args = MockArgs({**settings, "ns_dtype": ns_dtype})
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": betas,
            "use_muon": True,
        }
        super().__init__(params, defaults, bits)

    @staticmethod
    def groups_of(model: torch.nn.Module, others: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Groups of all parameters of a model that require a gradient.

        Args:
            model: matrices that belong to no embedding and not to the output layer, which
                ``get_output_embeddings()`` of the model tells where it has that method, are for Muon.
            others: beginnings of the names of further parameters that are for AdamW.
        """
        find_head = getattr(model, "get_output_embeddings", None)
        head = find_head() if callable(find_head) else None
        tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        apart = {id(p) for module in (*tables, head) if module is not None for p in module.parameters()}
        groups: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups[p.dim() == 2 and id(p) not in apart and not name.startswith(tuple(others))].append(p)
        return [{"params": params, "use_muon": kind} for kind, params in groups.items() if params]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ArgumentError: the group, or the optimizer's setting that counts for it, has no meaning.
        """
        if isinstance(param_group, dict) and param_group.get("use_muon") is False:
            param_group = {"eps": 1e-8, **param_group}
        super().add_param_group(param_group)
        try:
            _check_group(type(self).__name__, len(self.param_groups) - 1, self.param_groups[-1])
        except ArgumentError:
            self.param_groups.pop()
            raise

    def rule_of(self, group: dict[str, Any]) -> str:
        """The rule of the momentum, or AdamW's."""
        return self.optimizer_name if group["use_muon"] else "adam"

    def batch_type(self, group: dict[str, Any]) -> type[Batch]:
        """What makes the steps of a group."""
        return MuonBatch if group["use_muon"] else Batch


def _check_group(owner: str, number: int, group: dict[str, Any]) -> None:
    where = f"{owner}: group {number}"
    if group["use_muon"] not in (True, False):
        raise ArgumentError(f"{where}: use_muon is {group['use_muon']!r}, allowed: True and False")
    if not group["use_muon"]:
        return
    for index, p in enumerate(group["params"]):
        if p.dim() != 2:
            raise ArgumentError(
                f"{where}: parameter {index} has shape {tuple(p.shape)}, but Muon takes matrices; put it, with "
                f"embeddings and the output layer, into a group with use_muon=False, which AdamW updates "
                f"(Muon.groups_of does so)"
            )
        if is_sharded(p):
            _check_placements(where, index, p)
    if not 0.0 <= group["momentum"] < 1.0:
        raise ArgumentError(f"{where}: momentum is {group['momentum']}, expected 0 to 1, without 1")
    if not 0 <= group["ns_steps"] < 100:
        raise ArgumentError(f"{where}: ns_steps is {group['ns_steps']}, expected 0 to 99")
    if len(group["ns_coefficients"]) != 3:
        raise ArgumentError(f"{where}: ns_coefficients is {group['ns_coefficients']}, expected 3 numbers")
    if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        raise ArgumentError(
            f"{where}: adjust_lr_fn is {group['adjust_lr_fn']!r}, allowed: None, 'original' and 'match_rms_adamw'"
        )


# --- sharded matrices ------------------------------------------------------------------------------


def _check_placements(where: str, index: int, p: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    if not all(type(placement) in (Shard, Replicate) for placement in p.placements):
        raise ArgumentError(
            f"{where}: parameter {index} has placements {tuple(p.placements)}, which Muon cannot gather; allowed: "
            f"Shard and Replicate"
        )


def _stacked(p: Any) -> list[Any]:
    """Placements of a stack of tensors that are sharded like ``p``."""
    from torch.distributed.tensor import Shard

    return [Shard(placement.dim + 1) if placement.is_shard() else placement for placement in p.placements]


def _gathered(stack: torch.Tensor, p: Any) -> torch.Tensor:
    """Whole matrices from the shards of all processes."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((stack.shape[0], *p.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        stack, p.device_mesh, _stacked(p), run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _own_part(whole: torch.Tensor, p: Any) -> torch.Tensor:
    """The shards of this process."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    spread = DTensor.from_local(whole.contiguous(), p.device_mesh, everywhere, run_check=False)
    return spread.redistribute(placements=_stacked(p)).to_local()


class Muon(MuonFamily):
    """Muon; ``optim_bits`` says how states are stored."""


class Muon8bit(MuonFamily):
    """Muon with 8-bit states."""

    bits = 8
    __init__ = reduced(MuonFamily.__init__, "optim_bits")


class Muon32bit(MuonFamily):
    """Muon with 32-bit states."""

    bits = 32
    __init__ = reduced(MuonFamily.__init__, "optim_bits")
