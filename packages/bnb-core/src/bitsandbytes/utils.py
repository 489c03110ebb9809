"""Helpers around models: replacing layers, tracing outlier features, packing of dictionaries."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from bitsandbytes.blob import pack_dict_to_tensor, unpack_tensor_to_dict
from bitsandbytes.errors import ArgumentError

#: Layouts of int8 weights by name; all but ``row`` belong to the past.
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {value: key for key, value in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}

#: Magnitude from which a hidden value counts as an outlier (LLM.int8(), arXiv:2208.07339, section 4).
OUTLIER_MAGNITUDE = 6.0


def find_outlier_dims(
    weight: torch.Tensor,
    reduction_dim: int = 0,
    zscore: float = 4.0,
    topk: int | None = None,
    rdm: bool = False,
) -> torch.Tensor:
    """Columns whose standard deviation stands out.

    Args:
        weight: matrix.
        reduction_dim: dimension along which the standard deviation is taken.
        zscore: a column counts when the standard deviation of its values lies this many standard
            deviations above the mean of all columns.
        topk: return the columns with the largest standard deviation instead, this many.
        rdm: return ``topk`` random columns instead, for comparison.

    Returns:
        int64 indices.
    """
    if rdm:
        if topk is None:
            raise ArgumentError("find_outlier_dims: rdm=True needs topk, the number of columns to draw")
        return torch.randint(0, weight.shape[1], size=(topk,), device=weight.device)
    deviation = weight.std(reduction_dim)
    if topk is not None:
        return torch.topk(deviation.abs(), k=topk, dim=0).indices
    score = (deviation - deviation.mean()) / deviation.std()
    return torch.where(score > zscore)[0]


def outlier_hook(module: torch.nn.Module, input: tuple[torch.Tensor, ...]) -> None:
    """Forward pre-hook of :class:`OutlierTracer`: find the outlier columns of a layer, once.

    The columns of a layer show in the rows of the weight before it. The first layer has none before
    it, so there its input decides: columns with a large deviation or with outlier magnitudes.
    """
    tracer = OutlierTracer.get_instance()
    weight: Any = module.weight
    key = tracer.get_hvalue(weight)
    if key in tracer.hvalue2outlier_idx:
        # Every layer of one pass has been seen.
        for hook in tracer.hooks:
            hook.remove()
        return
    tracer.outliers.append(find_outlier_dims(weight))
    tracer.hvalues.append(key)
    if len(tracer.outliers) > 1:
        columns = tracer.outliers[-1]
        if columns.numel() and int(columns.max()) >= weight.shape[1]:
            raise RuntimeError(f"outlier column {int(columns.max())} of a weight with {weight.shape[1]} columns")
    else:
        hidden = input[0].detach().reshape(-1, input[0].shape[-1])
        deviating = find_outlier_dims(hidden, reduction_dim=0, zscore=3)
        large = torch.where((hidden.abs() > OUTLIER_MAGNITUDE).any(dim=0))[0]
        columns = torch.cat([deviating, large]).unique()
    tracer.hvalue2outlier_idx[key] = columns


class OutlierTracer:
    """Finds the outlier columns of all linear layers of a model during one forward pass."""

    _instance: ClassVar[OutlierTracer | None] = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self, model: torch.nn.Module) -> None:
        """Watch the linear layers of ``model`` during their next forward pass."""
        self.last_w: torch.Tensor | None = None
        self.current_outlier_dims: torch.Tensor | None = None
        self.hvalues: list[int] = []
        self.outliers: list[torch.Tensor] = []
        self.hvalue2outlier_idx: dict[int, torch.Tensor] = {}
        self.hooks = [
            module.register_forward_pre_hook(outlier_hook)
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        self.initialized = True

    def is_initialized(self) -> bool:
        """Whether a model is or was watched."""
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: torch.Tensor) -> int:
        """Identity of a weight: the address of its memory."""
        return weight.data.untyped_storage().data_ptr()

    def get_outliers(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Outlier columns of a weight, int64, or ``None`` with a note for one that was not watched."""
        if not self.is_initialized():
            print("Outlier tracer is not initialized...")
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        """The tracer of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance


def replace_linear(
    model: torch.nn.Module,
    linear_replacement: Callable[..., torch.nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> torch.nn.Module:
    """Replace the linear layers of a model, in place.

    Args:
        model: any module.
        linear_replacement: called with input features, output features and whether there is a bias.
        skip_modules: names, without the path, of layers to leave alone.
        copy_weights: give the new layers the weight and bias of the old ones.
        post_processing_function: name of a method to call on each replaced layer.

    Returns:
        ``model``.
    """
    for name, module in model.named_children():
        if list(module.children()):
            replace_linear(module, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(module, torch.nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(module.in_features, module.out_features, module.bias is not None)
        if copy_weights:
            _copy_weights(module, new)
        setattr(model, name, new)
        if post_processing_function is not None:
            method = getattr(new, post_processing_function, None)
            if method is not None:
                method()
    return model


def _copy_weights(old: torch.nn.Linear, new: torch.nn.Module) -> None:
    """Hand weight and bias over, keeping the class that the new layer gave its weight."""
    parameter = new.weight
    if type(parameter) is torch.nn.Parameter:
        new.weight = old.weight
    else:
        parameter.data = old.weight.data
    if old.bias is not None:
        new.bias = old.bias


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Run a command, without a shell.

    Returns:
        ``(stdout, stderr)``, decoded and stripped.
    """
    finished = subprocess.run(shlex.split(command_string), capture_output=True, check=False)
    return finished.stdout.decode(errors="replace").strip(), finished.stderr.decode(errors="replace").strip()


def sync_gpu(t: torch.Tensor) -> None:
    """Wait for the device of a tensor to finish its work."""
    if t.device.type in ("cuda", "xpu"):
        getattr(torch, t.device.type).synchronize(t.device)


__all__: list[Any] = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]
