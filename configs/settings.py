"""What a user sets, key by key: from a YAML file and from KEY VALUE words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from quadmamba.configs.values import ConfigError, Word, shown

_MAX_BYTES = 1 << 20
_YAML = "tag:yaml.org,2002:"
_MERGE, _NULL = f"{_YAML}merge", f"{_YAML}null"
_TAGS = {
    ScalarNode: {
        f"{_YAML}{name}"
        for name in ("bool", "int", "float", "null", "str", "timestamp", "value", "merge")
    },
    SequenceNode: {f"{_YAML}seq"},
    MappingNode: {f"{_YAML}map"},
}


@dataclass(frozen=True)
class Setting:
    """One key and the value that a user gave it. where: its place, for messages."""

    key: str
    value: object
    where: str


def read_yaml(path: Path, known: Collection[str]) -> list[Setting]:
    """The settings of a YAML file by dotted key; `known` are the keys that there are.

    Raises ConfigError for a file that cannot be read or is no YAML of sections and values, and for
    a key or section that is given twice, however it is written.
    """
    sections = sections_of(known)
    try:
        tree = yaml.compose(_read_text(path), Loader=yaml.SafeLoader)
        if not isinstance(tree, MappingNode):
            got = "nothing" if tree is None else f"a {tree.id}"
            raise ConfigError(f"--cfg: expected KEY: value lines in {path}, got {got}")
        found = list(_settings(tree, "", {*known, *sections}, sections, path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--cfg: {path} is not a YAML file: {_problem(error)}") from error
    places: dict[str, str] = {}
    for key, _, place in found:
        if key in places:
            both = f"{places[key]} and {place}" if places[key] != place else place
            raise ConfigError(f"{key}: given twice in {path}, {both}; keep one")
        places[key] = place
    return [Setting(k, v, f"in {path}, {place}") for k, v, place in found if k not in sections]


def sections_of(known: Collection[str]) -> set[str]:
    """The sections of dotted keys."""
    return {key.rpartition(".")[0] for key in known} - {""}


def read_opts(words: Sequence[str]) -> list[Setting]:
    """The settings of KEY VALUE words. Raises ConfigError for a word that is left over."""
    if len(words) % 2:
        raise ConfigError(
            f"--opts: expected KEY VALUE pairs, got {len(words)} words: {' '.join(words)}"
        )
    return [Setting(key, _parse(key, word), "in --opts") for key, word in zip(*[iter(words)] * 2)]


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--cfg: cannot read {path}: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(
            f"--cfg: expected a YAML file, got more than {_MAX_BYTES} bytes in {path}"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"--cfg: {path} is not a YAML file: expected UTF-8 text, got the byte "
            f"{content[error.start]:#04x} in line {line}"
        ) from error


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    hint = "; indent with spaces" if "\\t" in str(error) else ""
    parts = (getattr(error, "context", None), getattr(error, "problem", None))
    return f"{', '.join(filter(None, parts))}, {_line(mark)}, column {mark.column + 1}{hint}"


def _line(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}"


def _settings(
    tree: MappingNode, prefix: str, known: Collection[str], sections: Collection[str], path: Path
) -> Iterator[tuple[str, object, str]]:
    """Key, value and line of what is in `tree`; a section stands for itself too.

    The value of a key that there is not is None.
    """
    _check_tag(tree, prefix, path)
    for name, node in tree.value:
        place = _line(name.start_mark)
        if not isinstance(name, ScalarNode):
            raise ConfigError(f"--cfg: expected a name as key in {path}, {place}, got a {name.id}")
        if name.tag == _MERGE:
            raise ConfigError(
                f"--cfg: {path}, {place}: the merge key << is not taken, as it hides which value "
                "counts; write the keys out"
            )
        key = f"{prefix}{name.value}"
        is_value = key in known and key not in sections
        yield key, _value(node, key, path) if is_value else None, place
        if key in sections and isinstance(node, MappingNode):
            yield from _settings(node, f"{key}.", known, sections, path)
        elif key in sections and node.tag != _NULL:  # an empty section sets nothing
            raise ConfigError(
                f"{key}: expected a section of KEY: value lines in {path}, {place}, "
                f"got {shown(_value(node, key, path))}"
            )


def _value(node: Node, key: str, path: Path | str) -> object:
    """The value of a node: a Word, a text in quotes, or a list of them."""
    _check_tag(node, key, path)
    if isinstance(node, ScalarNode):
        return str(node.value) if node.style else Word(node.value)
    if isinstance(node, SequenceNode) and all(isinstance(v, ScalarNode) for v in node.value):
        return [_value(item, key, path) for item in node.value]
    raise ConfigError(
        f"{key}: expected a value or a plain list in {path}, {_line(node.start_mark)}, "
        f"got {'a section' if isinstance(node, MappingNode) else 'a list of lists'}"
    )


def _check_tag(node: Node, key: str, path: Path | str) -> None:
    if node.tag not in _TAGS[type(node)]:
        raise ConfigError(
            f"{key or '--cfg'}: expected a value without a tag in {path}, "
            f"{_line(node.start_mark)}, got {node.tag.replace(_YAML, '!!')}"
        )


def _parse(key: str, word: str) -> object:
    """A value on the command line: a list or a text in quotes as in YAML, else the word itself."""
    if not word.startswith(("[", '"', "'")):
        return Word(word)
    try:
        return _value(yaml.compose(word, Loader=yaml.SafeLoader), key, "--opts")
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"--opts {key}: expected a YAML value, got {shown(Word(word))}: {_problem(error)}"
        ) from error
