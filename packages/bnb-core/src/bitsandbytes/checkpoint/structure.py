"""Which tensors of a checkpoint are weights of linear layers that get quantized.

With transformers installed, the answer is its own: the architecture is built without memory for
weights (on the meta device) and asked the questions that loading with ``BitsAndBytesConfig`` asks.
Without it, or for an architecture that it does not know, a rule on names and shapes answers, and the
result says so. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from bitsandbytes.checkpoint.options import QuantizeOptions
from bitsandbytes.checkpoint.source import Source
from bitsandbytes.checkpoint.tensorfile import FLOAT_DTYPES

RULE_BY_NAME = "names and shapes"

#: Architectures whose linear layers store their weight as (in, out): ``Conv1D`` of transformers.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})

#: Linear layers that these architectures keep in full precision in a model of float16.
KEPT_LAYERS = dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), ("wo",))

#: Parts of module names that mark what is kept in the rule on names: embeddings, norms and outputs.
_KEPT_PARTS = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|tokens_embed|positions_embed|shared|\w*norm\w*|ln|ln_\w+|lm_head|head|"
    r"classifier|score|qa_outputs|output_projection|router|relative_attention_bias)(?=[._]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Target:
    """A parameter of the model that receives a tensor of the checkpoint.

    Attributes:
        name: name that the tensor is written under, without companions.
        shape: shape that the architecture gives it, where it is known.
        quantize: whether it is the weight of a linear layer that gets quantized.
        transposed: whether the layer is a ``Conv1D``, whose weight is transposed first.
        full_precision: whether the architecture wants it in float32 in a model of float16 or bfloat16.
    """

    name: str
    shape: tuple[int, ...] | None = None
    quantize: bool = False
    transposed: bool = False
    full_precision: bool = False

    def cast_for(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that floating point values are cast to where ``dtype`` is asked for.

        What is kept in full precision is not cast when it is copied; a weight to be quantized is
        cast to float32, as loading does.
        """
        if self.full_precision:
            return torch.float32 if self.quantize else None
        return dtype


@dataclass(frozen=True)
class Reshaping:
    """Tensors that transformers splits or joins while it loads them, before it quantizes.

    Attributes:
        sources: tensors of the checkpoint.
        targets: parameters that come out.
        convert: from the tensors by key of the checkpoint to those by name of the parameter.
    """

    sources: tuple[str, ...]
    targets: tuple[Target, ...]
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = field(compare=False)


@dataclass
class Structure:
    """The answer: what is to be done with every tensor.

    Attributes:
        rule: who gave the answer.
        targets: by key of the checkpoint; keys that are not here are copied as they are.
        reshapings: groups of tensors that are converted together.
        skip_modules: entry ``llm_int8_skip_modules`` of the configuration.
        warnings: what the user should know.
    """

    rule: str
    targets: dict[str, Target]
    reshapings: list[Reshaping] = field(default_factory=list)
    skip_modules: list[str] | None = None
    warnings: list[str] = field(default_factory=list)


def find_structure(source: Source, options: QuantizeOptions) -> Structure:
    """Decide what to do with every tensor of a checkpoint.

    Raises:
        CheckpointError: the checkpoint contradicts its architecture.
    """
    try:
        from bitsandbytes.checkpoint.architecture import UnknownArchitectureError, structure_by_transformers
    except ImportError:
        return structure_by_name(source, options, "transformers is not installed")
    try:
        return structure_by_transformers(source, options)
    except UnknownArchitectureError as error:
        return structure_by_name(source, options, str(error))


def structure_by_name(source: Source, options: QuantizeOptions, reason: str) -> Structure:
    """The rule without transformers.

    Quantized is every matrix of floating point numbers named ``….weight``, unless a part of its name
    marks an embedding, a norm, a router or an output layer, or a ``skip`` pattern matches it. All
    other matrices are listed in the configuration as modules to skip, so that a loader makes the same
    choice. Architectures with ``Conv1D`` layers are known by their ``model_type``.
    """
    model_type = source.config.get("model_type")
    transposed = model_type in CONV1D_MODEL_TYPES
    kept_layers = KEPT_LAYERS.get(model_type, ()) if isinstance(model_type, str) else ()
    targets: dict[str, Target] = {}
    kept: list[str] = []
    for key in source.names():
        module, _, name = key.rpartition(".")
        info = source.info(key)
        if name != "weight" or len(info.shape) != 2 or info.dtype not in FLOAT_DTYPES:
            continue
        if _KEPT_PARTS.search(module) or matches_skip(module, (*kept_layers, *options.skip)):
            kept.append(module)
        else:
            targets[key] = Target(key, quantize=True, transposed=transposed)
    return Structure(
        rule=RULE_BY_NAME,
        targets=targets,
        skip_modules=sorted({*kept, "lm_head"}),
        warnings=[f"linear layers were chosen by {RULE_BY_NAME}: {reason}"],
    )


def matches_skip(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module is named by a skip list, as transformers reads it.

    A pattern matches from the start of the name up to the end of a part (a name or a regular
    expression), or as its end.
    """
    return any(
        re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(pattern) for pattern in patterns
    )
