"""Which tensors of a checkpoint are weights of linear layers that get quantized.

With transformers installed, the answer is its own: the architecture is built without memory for
weights (on the meta device) and asked the questions that loading with ``BitsAndBytesConfig`` asks.
Without it, or for an architecture that it does not know, a rule on names and shapes answers, and the
result says so. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bitsandbytes.checkpoint.options import QuantizeOptions
from bitsandbytes.checkpoint.source import Source
from bitsandbytes.checkpoint.tensorfile import FLOAT_DTYPES

RULE_BY_NAME = "names and shapes"

#: Architectures whose linear layers store their weight as (in, out): ``Conv1D`` of transformers.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})

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
    """

    name: str
    shape: tuple[int, ...] | None = None
    quantize: bool = False
    transposed: bool = False


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
        full_precision: patterns of parameters that a cast to float16 or bfloat16 leaves alone.
        warnings: what the user should know.
    """

    rule: str
    targets: dict[str, Target]
    reshapings: list[Reshaping] = field(default_factory=list)
    skip_modules: list[str] | None = None
    full_precision: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)

    def keeps_dtype(self, key: str) -> bool:
        """Whether a cast leaves a tensor alone, as the architecture wants it in full precision."""
        return any(
            re.search(rf"(^|\.){re.escape(pattern).replace(re.escape('*'), '.*')}(\.|$)", key)
            for pattern in self.full_precision
        )


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
    transposed = source.config.get("model_type") in CONV1D_MODEL_TYPES
    targets: dict[str, Target] = {}
    kept: list[str] = []
    for key in source.names():
        module, _, name = key.rpartition(".")
        info = source.info(key)
        if name != "weight" or len(info.shape) != 2 or info.dtype not in FLOAT_DTYPES:
            continue
        if _KEPT_PARTS.search(module) or matches_skip(module, options.skip):
            kept.append(module)
        else:
            targets[key] = Target(key, quantize=True, transposed=transposed)
    return Structure(
        rule=RULE_BY_NAME,
        targets=targets,
        skip_modules=sorted({*kept, "lm_head", *options.skip}),
        warnings=[f"linear layers were chosen by {RULE_BY_NAME}: {reason}"],
    )


def matches_skip(module: str, patterns: Any) -> bool:
    """Whether a module is named by a skip list, as transformers reads it.

    A pattern matches from the start of the name up to the end of a part (a name or a regular
    expression), or as its end.
    """
    return any(
        re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(pattern) for pattern in patterns
    )
