"""Pydantic's errors in the words of the YAML file: one problem for each place, with what is accepted there."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from raysweep.errors import did_you_mean
from raysweep.experiment.yaml_file import KeyPath, Problem, YamlFile, child

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "scalar_type": "a number or text",
    "string_type": "text",
    "bool_type": "true or false",
    "invalid-json-value": "text",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
_QUOTED = {
    "a whole number": _NUMBER,
    "a number": _NUMBER,
    "true or false": re.compile("(?i)true|false"),
}
_LIMITS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be {le:g} or less",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_too_long": "must have {max_length} characters or fewer",
    "too_short": "needs at least one entry",
}


def problems_at(*found: tuple[tuple[str | int, ...], str]) -> ValidationError:
    """Returns one pydantic error with several problems, each `(path below the current value, message)`."""
    details = [
        InitErrorDetails(type=PydanticCustomError("problem", "{message}", {"message": text}), loc=path, input=None)
        for path, text in found
    ]
    return ValidationError.from_exception_data("experiment", details)


def explain(error: ValidationError, file: YamlFile, schema: dict[str, Any]) -> list[Problem]:
    """Translates pydantic's errors into the words of the YAML, one problem for each place.

    Args:
        error: What the validation of `file.data` raised.
        file: The file, for the values found.
        schema: The JSON schema of the model, for the keys and words accepted.
    """
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":
            continue  # the default depends on another key, which has its own error
        path = _yaml_path(detail["loc"], file.data, schema)
        if detail["type"] == "too_short" and _at(file.data, path):
            continue  # pydantic counts only the valid entries
        # read_yaml has found the keys that are not text, and knows their lines.
        if detail["type"] != "invalid_key" and detail["loc"][-1] != "[key]":
            grouped.setdefault(path, []).append(detail)
    return [Problem(path, _message(path, details, file, schema)) for path, details in grouped.items()]


def _message(path: KeyPath, details: list[ErrorDetails], file: YamlFile, schema: dict[str, Any]) -> str:
    kinds = {detail["type"]: detail for detail in details}
    if "extra_forbidden" in kinds:
        return f"unknown key; {did_you_mean(str(path[-1]), _keys_at(schema, path[:-1]))}"
    if "recursion_loop" in kinds:
        return "an anchor (&) may not contain itself"
    required = any(path[-1] in node.get("required", []) for node in _nodes_at(schema, path[:-1])) if path else False
    if "missing" in kinds or (required and _at(file.data, path) is None):
        words = _words_at(schema, path)
        return "required, but not given" + (f"; one of {', '.join(words)}" if words else "")
    for kind in _LIMITS.keys() & kinds.keys():
        text = _LIMITS[kind].format(**kinds[kind].get("ctx", {}))
        return text if kind in ("too_short", "string_too_short") else f"{text}, found {file.found(path)}"
    for kind in ("problem", "value_error"):
        if kind in kinds:
            return kinds[kind]["msg"].removeprefix("Value error, ")
    return _unexpected(path, kinds, file, schema)


def _unexpected(path: KeyPath, kinds: dict[str, ErrorDetails], file: YamlFile, schema: dict[str, Any]) -> str:
    """Says what is accepted instead of a value of the wrong kind, with all alternatives in one sentence."""
    value, found = _at(file.data, path), file.found(path)
    words = _words_at(schema, path)
    expected = [_EXPECTED[kind] for kind in kinds if kind in _EXPECTED and not (kind == "scalar_type" and words)]
    if not expected and words:
        if value is None or isinstance(value, list | dict):
            return f"expected one of {', '.join(words)}, found {found}"
        return f"unknown value {found}; {did_you_mean(str(value), words)}"
    expected += [f"'{word}'" for word in words]
    expected += ["null"] if any(node.get("type") == "null" for node in _nodes_at(schema, path)) else []
    if not expected:
        return f"{next(iter(kinds.values()))['msg']}, found {found}"
    return f"expected {' or '.join(expected)}, found {found}{_hint(value, expected[0], _keys_at(schema, path))}"


def _hint(value: Any, expected: str, keys: list[str]) -> str:
    """Says how to correct the value; an empty text when it is not clear what was meant."""
    hint = ""
    if value is None:
        hint = "leave the key out for its default"
    elif expected == "text" and not isinstance(value, dict | list):
        hint = "put it in quotes"
    elif expected == "a list":
        hint = "start each entry with '- '" if isinstance(value, dict) else f"write [{value}]"
    elif isinstance(value, str) and expected in _QUOTED and _QUOTED[expected].fullmatch(value):
        hint = "leave out the quotes"
    elif expected == "keys and values" and keys:
        hint = (
            f"write {{type: {value}}}"
            if "type" in keys and isinstance(value, str)
            else f"its keys are {', '.join(keys)}"
        )
    return f"; {hint}" if hint else ""


def _yaml_path(loc: Sequence[str | int], data: Any, schema: dict[str, Any]) -> KeyPath:
    """Drops pydantic's union tags from a location: the steps that neither the file nor the schema has."""
    path: KeyPath = ()
    for step in loc:
        in_mapping = isinstance(data, dict) and (step in data or step in _keys_at(schema, path))
        in_list = isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)
        if in_mapping or in_list:
            path, data = (*path, step), child(data, step)
    return path


def _nodes_at(schema: dict[str, Any], path: KeyPath) -> list[dict[str, Any]]:
    """Returns every alternative of the JSON schema at a path; references are resolved."""
    nodes = _alternatives(schema, schema)
    for step in path:
        below = [node.get("items") if isinstance(step, int) else node.get("properties", {}).get(step) for node in nodes]
        nodes = [found for node in below if node for found in _alternatives(node, schema)]
    return nodes


def _alternatives(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return _alternatives(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
    return [found for child in node["anyOf"] for found in _alternatives(child, schema)] if "anyOf" in node else [node]


def _keys_at(schema: dict[str, Any], path: KeyPath) -> list[str]:
    return [key for node in _nodes_at(schema, path) for key in node.get("properties", {})]


def _words_at(schema: dict[str, Any], path: KeyPath) -> list[str]:
    nodes = _nodes_at(schema, path)
    words = [word for node in nodes for word in [*node.get("enum", []), *([node["const"]] if "const" in node else [])]]
    return [word for word in words if isinstance(word, str)]


def _at(value: Any, path: KeyPath) -> Any:
    for step in path:
        value = child(value, step)
    return value
