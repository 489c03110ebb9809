"""The structure of a checkpoint's model, asked of transformers. Importing this needs transformers."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import re
from collections import defaultdict
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from bitsandbytes.checkpoint.options import QuantizeOptions
from bitsandbytes.checkpoint.source import Source
from bitsandbytes.checkpoint.structure import Reshaping, Structure, Target, matches_skip
from bitsandbytes.errors import CheckpointError

# Where these live depends on the version; before 5, some do not exist.
_base = importlib.import_module("transformers.quantizers.base")
_integrations = importlib.import_module("transformers.integrations")
get_keys_to_not_convert = getattr(_base, "get_keys_to_not_convert", None) or _integrations.get_keys_to_not_convert
try:
    should_convert_module = importlib.import_module("transformers.quantizers.quantizers_utils").should_convert_module
except (ImportError, AttributeError):
    should_convert_module = None
try:
    conversions: Any = importlib.import_module("transformers.conversion_mapping")
    loading: Any = importlib.import_module("transformers.core_model_loading")
except ImportError:
    conversions = loading = None

#: Modules that transformers replaces by others before it loads a pre-quantized checkpoint, whose
#: parameters then have other names and shapes than in the checkpoint.
_REPLACED_ON_LOAD = "MODULES_TO_PATCH_FOR_QUANTIZATION"


class UnknownArchitectureError(Exception):
    """transformers does not know the architecture, or only through code inside the checkpoint."""


def build_on_meta(source: Source) -> Any:
    """The model that a configuration names, without memory for its weights.

    Raises:
        UnknownArchitectureError: transformers cannot build it without running code of the checkpoint.
        CheckpointError: the configuration asks for more layers than the checkpoint can fill.
    """
    _refuse_absurd_sizes(source)
    names = source.config.get("architectures") or [None]
    name = names[0] if isinstance(names, list) else None
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise UnknownArchitectureError(
            f"transformers {transformers.__version__} refuses config.json: {error}"
        ) from error
    architecture = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(architecture, type) or not issubclass(architecture, transformers.PreTrainedModel):
        raise UnknownArchitectureError(f"transformers {transformers.__version__} has no architecture {name!r}")
    try:
        # Some architectures print while they are built; standard output belongs to the caller.
        with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
            return architecture(copy.deepcopy(config)).eval()
    except Exception as error:
        raise UnknownArchitectureError(f"{name} cannot be built from config.json: {error}") from error


def _refuse_absurd_sizes(source: Source) -> None:
    """Building a model takes time and memory per layer even on the meta device."""
    tensors = len(source.names())
    pending = [source.config]
    while pending:
        entry = pending.pop()
        pending += [value for value in entry.values() if isinstance(value, dict)]
        for name in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"):
            layers = entry.get(name)
            # Some architectures run a layer several times and count each.
            if isinstance(layers, int) and layers > tensors + 1000:
                raise CheckpointError(
                    f"{source.folder / 'config.json'}: {name} is {layers}, but the checkpoint has {tensors} tensors"
                )


def structure_by_transformers(source: Source, options: QuantizeOptions) -> Structure:
    """What transformers would do with every tensor.

    Raises:
        UnknownArchitectureError: it does not know the architecture.
        CheckpointError: shapes of the checkpoint contradict the architecture, or the architecture is
            one that transformers cannot load from a pre-quantized checkpoint.
    """
    model = build_on_meta(source)
    _refuse_replaced_modules(model, source)
    skip_modules, warnings = _skip_modules(model, options)
    linear = linear_modules(model, skip_modules)
    names = KeyResolver(model, _full_precision(model, source, options))
    structure = Structure(
        rule=f"transformers {transformers.__version__}: {type(model).__name__}",
        targets={},
        skip_modules=skip_modules,
        warnings=warnings,
    )
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    reached: set[str] = set()
    for key in source.names():
        parameter, pattern = names.resolve(key)
        if pattern is not None:
            groups[parameter].append((key, pattern))
            continue
        reached.add(parameter)
        structure.targets[key] = names.target(parameter, linear, written_as=key)
    for parameter, members in groups.items():
        reshaping = names.reshaping(parameter, members, linear)
        reached.update(target.name for target in reshaping.targets)
        # Where no linear layer comes out, the tensors stay as they are and are converted on every load.
        if any(target.quantize for target in reshaping.targets):
            structure.reshapings.append(reshaping)
    missing = sorted(f"{module}.weight" for module in linear if f"{module}.weight" not in reached)
    if missing:
        structure.warnings.append(
            f"{len(missing)} linear layers of the architecture have no tensor in the checkpoint, such as {missing[0]}"
        )
    _check_shapes(structure, source)
    return structure


def _skip_modules(model: Any, options: QuantizeOptions) -> tuple[list[str] | None, list[str]]:
    """The entry ``llm_int8_skip_modules``, and warnings.

    A list there replaces the automatic choice when the checkpoint is loaded, so it has to hold both.
    It has full names: patterns mean different things to different versions of transformers.
    """
    if not options.skip:
        return None, []
    linear = linear_modules(model, [])
    matched = [[name for name in linear if matches_skip(name, [pattern])] for pattern in options.skip]
    warnings = [
        f"skip pattern {pattern!r} matches no linear layer"
        for pattern, names in zip(options.skip, matched, strict=True)
        if not names
    ]
    return sorted({*get_keys_to_not_convert(model), *(name for names in matched for name in names)}), warnings


def linear_modules(model: Any, skip_modules: list[str] | None) -> dict[str, bool]:
    """The linear layers that get quantized: by name, whether the weight is transposed first."""
    if skip_modules is None:
        skip_modules = get_keys_to_not_convert(model)
    kept = [*skip_modules, *(model._keep_in_fp32_modules or ())]
    found = {}
    for name, module in model.named_modules():
        conv1d = isinstance(module, Conv1D)
        if (conv1d or _is_plain_linear(module)) and not _is_kept(name, kept):
            found[name] = conv1d
    return found


def _is_plain_linear(module: torch.nn.Module) -> bool:
    # Before version 5, subclasses of Linear were replaced as well.
    if conversions is None:
        return isinstance(module, torch.nn.Linear)
    return type(module) is torch.nn.Linear


def _is_kept(name: str, kept: list[str]) -> bool:
    if should_convert_module is not None:
        return not should_convert_module(name, kept)
    if conversions is None:
        # The rule of the integration before version 5.
        return name.rpartition(".")[2] in kept or any(f"{key}." in name or key == name for key in kept)
    return matches_skip(name, kept)


def _full_precision(model: Any, source: Source, options: QuantizeOptions) -> list[str]:
    """Patterns of parameters that transformers keeps in float32 in a model of float16 or bfloat16."""
    dtype = options.dtype or source.config.get("dtype") or source.config.get("torch_dtype")
    patterns: set[str] = set()
    if dtype == "float16":
        patterns.update(model._keep_in_fp32_modules or ())
    if dtype in ("float16", "bfloat16"):
        patterns.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return sorted(pattern.replace("*", ".*") for pattern in patterns)


def _refuse_replaced_modules(model: Any, source: Source) -> None:
    replaced = getattr(_base, _REPLACED_ON_LOAD, {})
    for module in model.modules():
        kind = type(module).__name__
        if kind in replaced and "bitsandbytes" in [
            str(method.value) for method in replaced[kind]["quantization_methods"]
        ]:
            raise CheckpointError(
                f"{source.folder}: {type(model).__name__} has {kind} modules, which transformers "
                f"{transformers.__version__} replaces on loading by others that its own checkpoints do not fit; "
                "quantize this architecture on loading, with BitsAndBytesConfig"
            )


def _check_shapes(structure: Structure, source: Source) -> None:
    for key, target in structure.targets.items():
        shape = source.info(key).shape
        if target.quantize and target.shape != shape:
            raise CheckpointError(f"{source.where(key)} has shape {shape}, the architecture has {target.shape}")


class KeyResolver:
    """Where a tensor of a checkpoint goes in the model.

    Checkpoints differ from models in prefixes and, through the conversions that transformers knows,
    in names and in how tensors are cut.
    """

    def __init__(self, model: Any, full_precision: list[str]):
        self._model = model
        self._full_precision = full_precision
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        if conversions is not None:
            mapping = conversions.get_model_conversion_mapping(model)
            self._renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
            self._converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def resolve(self, key: str) -> tuple[str, str | None]:
        """The parameter, and the pattern of the conversion that makes it, if there is one."""
        if conversions is None:
            return self._resolve_by_prefix(key), None
        prefix, shapes = self._model.base_model_prefix, self._shapes
        parameter, pattern = loading.rename_source_key(key, self._renamings, self._converters, prefix, shapes)
        if parameter not in shapes and key in shapes:
            parameter, pattern = loading.rename_source_key(key, [], [], prefix, shapes)
        return parameter, pattern

    def _resolve_by_prefix(self, key: str) -> str:
        """The rule before version 5: regular expressions of the model's class, then the prefix."""
        for pattern, replacement in (getattr(self._model, "_checkpoint_conversion_mapping", None) or {}).items():
            key, count = re.subn(pattern, re.sub(r"^\^|\(.*?\)", "", replacement), key)
            if count:
                break
        prefix = f"{self._model.base_model_prefix}."
        if key in self._shapes:
            return key
        return key.removeprefix(prefix) if key.startswith(prefix) else prefix + key

    def target(self, parameter: str, linear: dict[str, bool], written_as: str) -> Target:
        """Describe a parameter; ``written_as`` is the name of its tensor in the new checkpoint."""
        module, _, name = parameter.rpartition(".")
        shape = self._shapes.get(parameter)
        quantize = name == "weight" and module in linear and shape is not None
        return Target(
            written_as,
            shape,
            quantize=quantize,
            transposed=quantize and linear[module],
            full_precision=any(re.search(pattern, parameter) for pattern in self._full_precision),
        )

    def reshaping(self, parameter: str, members: list[tuple[str, str]], linear: dict[str, bool]) -> Reshaping:
        """The conversion that makes ``parameter`` and, where it splits, its siblings."""
        converter = self._by_pattern[members[0][1]]
        names = [parameter]
        for pattern in converter.target_patterns[1:]:
            names.append(parameter.replace(converter.target_patterns[0], pattern))
        targets = tuple(self.target(name, linear, written_as=name) for name in names)

        def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            working = copy.deepcopy(converter)
            for key, pattern in members:
                working.add_tensor(parameter, key, pattern, tensors[key])
            made = working.convert(parameter, model=self._model, config=self._model.config)
            return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

        return Reshaping(tuple(key for key, _ in members), targets, convert)
