"""Names and signatures of the package against the record of upstream's 0.50.2.

``data/api-0.50.2.json`` is the record (``tools/record_api.py`` wrote it). A difference is allowed when
``data/api-deviations.txt`` lists it with a reason; a listed difference that no longer exists fails too.
"""

import importlib
import importlib.util
import json
from pathlib import Path

import record_api

DATA = Path(__file__).parent / "data"
RECORD = json.loads((DATA / "api-0.50.2.json").read_text())


def missing_parameters(recorded, actual):
    """Whether some call that fits the ``recorded`` parameters does not fit the ``actual`` ones.

    The recorded parameters must come first and unchanged; further ones need a default.
    """
    if recorded is None or actual is None:
        return recorded is not None
    extra = actual[len(recorded) :]
    return actual[: len(recorded)] != recorded or not all("=" in name or name.startswith("*") for name in extra)


def compare_class(path, recorded, actual, cls):
    ancestors = {ancestor.__name__ for ancestor in cls.__mro__}
    for base in set(recorded["bases"]) - ancestors:
        yield f"{path}<{base}>", "is not a base class"
    for name in recorded["attributes"]:
        if not hasattr(cls, name):
            yield f"{path}.{name}", "attribute is missing"
    for name, parameters in recorded["methods"].items():
        method = getattr(cls, name, None)
        if method is None:
            yield f"{path}.{name}", "method is missing"
            continue
        ours = actual["methods"].get(name) or record_api.describe_signature(getattr(method, "__func__", method))
        if missing_parameters(parameters, ours):
            yield f"{path}.{name}", f"{parameters} became {ours}"


def compare_member(path, recorded, module, name):
    if not hasattr(module, name):
        yield path, "is missing"
        return
    value = getattr(module, name)
    actual = record_api.describe(value)
    if actual is None or actual["kind"] != recorded["kind"]:
        yield path, f"{recorded['kind']} became {type(value).__name__}"
    elif recorded["kind"] == "class":
        yield from compare_class(path, recorded, actual, value)
    elif recorded["kind"] == "function" and missing_parameters(recorded["signature"], actual["signature"]):
        yield path, f"{recorded['signature']} became {actual['signature']}"
    elif recorded["kind"] == "value" and recorded["type"] != actual["type"]:
        yield path, f"{recorded['type']} became {actual['type']}"


def differences():
    """Pairs of a dotted path and what differs there."""
    for module_name, members in RECORD["modules"].items():
        if importlib.util.find_spec(module_name) is None:
            yield module_name, "module is missing"
            continue
        module = importlib.import_module(module_name)
        for name, recorded in members.items():
            yield from compare_member(f"{module_name}.{name}", recorded, module, name)
    ours = record_api.describe_ops()
    for op, arguments in RECORD["ops"].items():
        if ours.get(op) != arguments:
            yield op, f"{arguments} became {ours.get(op)}"


def listed_deviations():
    """Path -> reason. A reason is the comment block above its entries."""
    deviations, reason, in_comment = {}, "", False
    for line in (DATA / "api-deviations.txt").read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            reason = f"{reason} {text[1:].strip()}" if in_comment else text[1:].strip()
        elif text:
            deviations[text] = reason
        else:
            reason = ""
        in_comment = text.startswith("#")
    return deviations


def test_every_difference_is_listed():
    unlisted = {path: what for path, what in differences() if path not in listed_deviations()}
    assert not unlisted, "\n".join(f"{path}: {what}" for path, what in sorted(unlisted.items()))


def test_every_listed_difference_exists():
    stale = listed_deviations().keys() - dict(differences()).keys()
    assert not stale, f"these no longer differ; remove them from api-deviations.txt: {sorted(stale)}"


def test_every_listed_difference_has_a_reason():
    assert not [path for path, reason in listed_deviations().items() if len(reason) < 10]


def test_a_changed_parameter_is_noticed():
    assert not missing_parameters(["A", "out=None"], ["A", "out=None", "extra=1"])
    assert missing_parameters(["A", "out=None"], ["A", "out=None", "extra"])
    assert missing_parameters(["A", "out=None"], ["A", "result=None"])
    assert missing_parameters(["A", "out=None"], ["A"])
    assert missing_parameters(["A", "out=None"], ["out=None", "A=None"])
