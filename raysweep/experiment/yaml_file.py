"""A YAML file that remembers its lines, command-line overrides of it, and the error that lists its problems."""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from raysweep.errors import ConfigError, did_you_mean, one_line

KeyPath = tuple[str | int, ...]

# YAML 1.1 reads 1e-4 as text, because it has no dot. A user who writes 1e-4 means a number.
_EXPONENT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
_RESOLVERS = {
    first: [*yaml.SafeLoader.yaml_implicit_resolvers.get(first, []), ("tag:yaml.org,2002:float", _EXPONENT)]
    for first in "-+0123456789"
}

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"

# An experiment file has a few hundred values. Without limits, a few anchors within anchors fill the memory.
MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_DIGITS = 1_000_000, 20_000, 50, 100


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {**yaml.SafeLoader.yaml_implicit_resolvers, **_RESOLVERS}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._num_nodes, self._depth = self._num_nodes + 1, self._depth + 1
        _check_size(self._num_nodes, self._depth)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    # The loader's resolvers: the dumper then quotes a revision such as 12345e6, and it stays text.
    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, **_RESOLVERS}  # noqa: RUF012


@dataclass(frozen=True)
class Problem:
    """One thing to correct: its place in the YAML, and what is wrong there."""

    path: KeyPath
    message: str
    line: int | None = None


@dataclass(frozen=True)
class YamlFile:
    """The values of a YAML file and the line of each.

    Attributes:
        name: The path of the file, for messages.
        data: The values, with overrides and defaults.
        root: The parsed file, which knows the lines.
        problems: What is wrong with the file so far.
        origins: For each path whose value is not from the file, where the value is from.
    """

    name: str
    data: Any
    root: yaml.Node | None = None
    problems: tuple[Problem, ...] = ()
    origins: Mapping[KeyPath, str] = field(default_factory=dict)

    def lines(self, path: KeyPath) -> list[int]:
        """Returns the line of each step of the path that the file has; the first line is 1."""
        node, found = self.root, []
        for step in path:
            entry = _entry(node, step)
            if entry is None:
                break
            found.append(entry[0].start_mark.line + 1)
            node = entry[1]
        return found

    def found(self, path: KeyPath) -> str:
        """Describes the value at a path; a number is spelt as in the file."""
        node, value = self.root, self.data
        for step in path:
            entry = _entry(node, step)
            node = entry[1] if entry else None
            value = child(value, step)
        in_file = not any(path[: len(changed)] == changed for changed in self.origins)
        if in_file and isinstance(node, yaml.ScalarNode) and not isinstance(value, str | bool | None):
            return str(node.value)
        return _described(value)


def read_yaml(path: Path) -> YamlFile:
    """Reads one YAML mapping; keys that are wrong become problems, which are shown with all others.

    Raises:
        ConfigError: the file is missing, unreadable, empty, not YAML, or not a mapping.
    """
    try:
        text = _read_text(path)
    except FileNotFoundError:
        nearby = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = f"; {did_you_mean(str(path), nearby)}".replace("accepted:", "there are") if nearby else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    root, data, problems = _parsed(str(path), text)
    if data is None:
        raise ConfigError(f"{path}: empty; an experiment needs at least data.source and encoders")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values (name: ..., data: ...), found {_described(data)}")
    return YamlFile(str(path), data, root, tuple(problems))


def with_overrides(file: YamlFile, overrides: Sequence[str]) -> YamlFile:
    """Applies overrides `a.b.c=value` in order, each value read as YAML; an override that fails becomes a problem."""
    data, problems, origins = file.data, list(file.problems), dict(file.origins)
    for override in overrides:
        key, equals, text = override.partition("=")
        path: KeyPath = tuple(key.strip().split("."))
        if not equals or "" in path:
            problems.append(Problem((), f"--set {override}: expected a.b.c=value"))
            continue
        try:
            _, value, bad_keys = _parsed(f"--set {override}", text)
            data = _with_value(data, path, value)
        except ConfigError as error:
            problems.append(Problem((), str(error)))
            continue
        steps = tuple(int(step) if _is_index(step) else step for step in path)
        problems.extend(replace(problem, path=(*steps, *problem.path)) for problem in bad_keys)
        origins[steps] = "--set"
    return replace(file, data=data, problems=tuple(problems), origins=origins)


def with_defaults(file: YamlFile, defaults: Mapping[str, tuple[Any, str]]) -> YamlFile:
    """Sets the keys `a.b` that the file does not set, each to a value with the name of its origin."""
    data, origins = file.data, dict(file.origins)
    for key, (value, origin) in defaults.items():
        *sections, leaf = key.split(".")
        section = data
        for step in sections:
            section = section.get(step, {})
        if isinstance(section, dict) and leaf not in section:
            data = _with_value(data, (*sections, leaf), value)
            origins[(*sections, leaf)] = origin
    return replace(file, data=data, origins=origins)


def dump_yaml(data: dict[str, Any]) -> str:
    """Writes a mapping as YAML that `read_yaml` reads back: in its own order, innermost mappings on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def config_error(file: YamlFile, problems: Sequence[Problem]) -> ConfigError:
    """Returns one error with all problems, one on each line, in the order of the file."""
    in_order = sorted(problems, key=lambda problem: problem.line or (file.lines(problem.path) or [0])[-1])
    lines = dict.fromkeys(f"  {_place(file, problem)}{problem.message}" for problem in in_order)
    return ConfigError(f"{file.name}: {len(lines)} problem{'s' * (len(lines) > 1)}\n" + "\n".join(lines))


def _read_text(path: Path) -> str:
    # O_NONBLOCK: opening a FIFO would wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: not a regular file; an experiment file is a text file in YAML")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: has {status.st_size:,} bytes; an experiment file has {MAX_BYTES:,} or fewer")
    return content.decode("utf-8-sig")


def _check_size(num_nodes: int, depth: int) -> None:
    if num_nodes > MAX_NODES:
        raise yaml.YAMLError(f"more than {MAX_NODES:,} values, those of anchors counted wherever they are used")
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"lists and mappings within each other more than {MAX_DEPTH} deep")


def _measure(node: yaml.Node | None, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Returns the number of values below a node with its aliases written out, and how deep they lie.

    A node that contains itself counts as one value within itself: pydantic refuses it later, with its place.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        if node is not None and node.tag != _TEXT and len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} has a value of more than {MAX_DIGITS} digits")
        return 1, 1
    if id(node) not in known:
        known[id(node)] = (1, 1)
        inner = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        measured = [_measure(part, known) for part in inner]
        known[id(node)] = (1 + sum(num for num, _ in measured), 1 + max((depth for _, depth in measured), default=0))
        _check_size(*known[id(node)])
    return known[id(node)]


def _parsed(name: str, text: str) -> tuple[yaml.Node | None, Any, list[Problem]]:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        _measure(root, {})
        problems = list(_bad_keys(root, (), set()))  # before merged keys (<<) are put among a mapping's own
        return root, None if root is None else loader.construct_document(root), problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{name}: {where}not valid YAML: {_syntax_problem(error)}") from None
    except Exception as error:  # a tag such as !!int before text that is none raises almost any error
        raise ConfigError(f"{name}: not valid YAML: {one_line(error, 300)}") from None


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    if "another document" in str(error.problem):
        return "a second document starts here; an experiment file holds one"
    if "'\\t'" in str(error.problem):
        return f"{error.problem}; indent with spaces"
    started = f" from line {error.context_mark.line + 1}" if error.context_mark else ""
    return f"{error.problem}" + (f" ({error.context}{started})" if error.context else "")


def _bad_keys(node: yaml.Node | None, path: KeyPath, seen: set[int]) -> Iterator[Problem]:
    # An anchored node is checked once, even when the file refers to it often: it may contain itself.
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _bad_keys(child, (*path, index), seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                pass  # a list or mapping as a key is refused when the data are built; each merge counts
            elif key.value in first:
                yield Problem((*path, key.value), f"given twice, first on line {first[key.value]}", line)
            elif key.tag != _TEXT:
                yield Problem((*path, key.value), "YAML does not read this key as text; put it in quotes", line)
            name = str(key.value)
            first.setdefault(name, line)
            yield from _bad_keys(child, (*path, name), seen)


def _entry(node: yaml.Node | None, step: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """Returns the key node and the value node of a mapping's entry; for a sequence, both are the entry itself."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step]
    if isinstance(node, yaml.MappingNode):
        # When a key is given twice, the last one counts, as in the data.
        return next(((key, value) for key, value in reversed(node.value) if key.value == str(step)), None)
    return None


def _with_value(data: Any, path: KeyPath, value: Any, done: KeyPath = ()) -> Any:
    """Returns a copy of nested `data` with one value replaced; the original stays, because anchors may share it."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(data, list):
        if not _is_index(step) or int(step) >= len(data):
            raise ConfigError(
                f"--set {_dotted((*done, *path))}: {_dotted(done)} is a list of {len(data)}, counted from 0"
            )
        index = int(step)
        return [*data[:index], _with_value(data[index], rest, value, (*done, step)), *data[index + 1 :]]
    if not isinstance(data, dict | None):
        raise ConfigError(f"--set {_dotted((*done, *path))}: {_dotted(done)} is {_described(data)} and has no keys")
    return {**(data or {}), step: _with_value((data or {}).get(step), rest, value, (*done, step))}


def _is_index(step: str | int) -> bool:
    # Not isdigit: it accepts digits that int() does not, and any number of them.
    return re.fullmatch(r"[0-9]{1,6}", str(step)) is not None


def _place(file: YamlFile, problem: Problem) -> str:
    """Returns the place of a problem as `a.b (line 3): `; an empty text for a problem with the whole file."""
    path, lines = problem.path, file.lines(problem.path)
    if not path:
        return ""
    notes = [f"line {problem.line or lines[-1]}"] if lines else []
    above = [origin for changed, origin in file.origins.items() if path[: len(changed)] == changed]
    below = [origin for changed, origin in file.origins.items() if changed[: len(path)] == path]
    if above:
        notes = above[-1:]
    elif below:
        notes = [*(notes if len(lines) == len(path) else []), *dict.fromkeys(below)]
    return _dotted(path) + (f" ({' and '.join(notes)}): " if notes else ": ")


def child(value: Any, step: str | int) -> Any:
    """Returns the value one step below a value, or None when there is none."""
    if isinstance(value, dict):
        return value.get(step)
    return value[step] if isinstance(value, list | tuple) and isinstance(step, int) and step < len(value) else None


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
