"""Record names and signatures of the installed ``bitsandbytes``, for the compatibility test.

    python tools/record_api.py > tests/data/api-0.50.2.json

The file in the tree was written with the PyPI release of that version installed. The test describes
this project's package with the same functions and compares.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from types import ModuleType
from typing import Any

import torch

PACKAGE = "bitsandbytes"
#: Modules that code outside of the package imports from.
MODULES = (
    "bitsandbytes",
    "bitsandbytes.autograd._functions",
    "bitsandbytes.cextension",
    "bitsandbytes.cuda_specs",
    "bitsandbytes.diagnostics.cuda",
    "bitsandbytes.diagnostics.main",
    "bitsandbytes.functional",
    "bitsandbytes.nn",
    "bitsandbytes.nn.modules",
    "bitsandbytes.nn.parametrize",
    "bitsandbytes.optim",
    "bitsandbytes.optim.optimizer",
    "bitsandbytes.utils",
)
#: Types of module-level constants that are recorded.
_VALUES = (str, int, float, bool, tuple, set)


def describe_signature(function: Any) -> list[str] | None:
    """Parameters as ``name``, ``name=default``, ``*args``, ``**kwargs``, with ``*`` and ``/`` where they stand.

    Annotations are left out: they do not decide whether a call works.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return _split(text[1:-1])


def _split(parameters: str) -> list[str]:
    """Split at the commas that are not inside brackets or quotes."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(parameters):
        depth += character in "([{<"
        depth -= character in ")]}>"
        if character == "," and depth == 0:
            parts.append(parameters[start:position].strip())
            start = position + 1
    return [*parts, parameters[start:].strip()] if parameters else []


def describe_class(cls: type) -> dict[str, Any]:
    """Bases, constructor, methods and class attributes that the class itself defines."""
    methods, attributes = {}, []
    for name, member in vars(cls).items():
        if name.startswith("__"):
            continue
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function):
            methods[name] = describe_signature(function)
        else:
            attributes.append(name)
    described: dict[str, Any] = {"kind": "class", "bases": [base.__name__ for base in cls.__bases__]}
    for dunder in ("__init__", "__new__"):
        if inspect.isfunction(getattr(cls, dunder)):
            methods[dunder] = describe_signature(getattr(cls, dunder))
    return {**described, "methods": dict(sorted(methods.items())), "attributes": sorted(attributes)}


def describe(value: Any) -> dict[str, Any] | None:
    """Description of a module's member, or ``None`` when it is not the package's own."""
    own = str(getattr(value, "__module__", "")).startswith(PACKAGE)
    if inspect.isclass(value):
        return describe_class(value) if own else None
    # A function may be wrapped in an object, such as functools.lru_cache's.
    if inspect.isfunction(inspect.unwrap(value) if callable(value) else value):
        return {"kind": "function", "signature": describe_signature(value)} if own else None
    if isinstance(value, _VALUES):
        return {"kind": "value", "type": type(value).__name__}
    return None


def describe_module(module: ModuleType) -> dict[str, Any]:
    """Descriptions of the members of a module, by name."""
    names = [name for name in vars(module) if not name.startswith("__")]
    described = {name: describe(getattr(module, name)) for name in sorted(names)}
    return {name: entry for name, entry in described.items() if entry is not None}


def describe_ops() -> dict[str, list[str]]:
    """Arguments and results of ``torch.ops.bitsandbytes`` by op and overload; ``!`` marks one that is written to."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{PACKAGE}::")]
    described = {}
    for schema in sorted(schemas, key=lambda s: (s.name, s.overload_name)):
        arguments = [_describe_argument(argument) for argument in schema.arguments]
        results = [f"-> {result.type}" for result in schema.returns]
        described[f"{schema.name}.{schema.overload_name or 'default'}"] = arguments + results
    return described


def _describe_argument(argument: Any) -> str:
    written = "!" if argument.alias_info is not None and argument.alias_info.is_write else ""
    default = f"={argument.default_value!r}" if argument.has_default_value() else ""
    return f"{argument.type}{written} {argument.name}{default}"


def main() -> None:
    """Write the record to standard output."""
    record = {name: describe_module(importlib.import_module(name)) for name in MODULES}
    json.dump({"modules": record, "ops": describe_ops()}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
