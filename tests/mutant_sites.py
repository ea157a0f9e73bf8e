"""Where a small fault can be put into the sources, and what it looks like there.

The operators are mutmut's and a few of our own. Values that become None are left out, as what uses
them fails at once; so are types, decorators, imports, and words to people.
"""

from __future__ import annotations

import contextlib
import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_if_exp

PAIRS = [("min", "max"), ("floor", "ceil"), ("any", "all"), ("argmax", "argmin"), ("amin", "amax")]
PAIRS += [("zeros", "ones"), ("zeros_like", "ones_like"), ("round", "int"), ("mean", "sum")]
OTHER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1]) if a != "int"}


@dataclass
class Mutant:
    """One fault. scopes: names around it; spans: lines of its statement, of these, of the file."""

    path: str
    line: int
    before: str
    after: str
    scopes: list[str]
    spans: list[tuple[int, int]]

    def changed(self) -> tuple[list[str], list[str]]:
        """The lines that go and those that come."""
        lines = list(difflib.ndiff(self.before.splitlines(), self.after.splitlines()))
        return tuple([x[2:].strip() for x in lines if x.startswith(mark)] for mark in "-+")


def other_number(node: cst.BaseNumber) -> Iterator[cst.BaseNumber]:
    """One less, or twice as much."""
    if isinstance(node, cst.Integer) and node.evaluated_value > 0:
        yield node.with_changes(value=str(node.evaluated_value - 1))
    if isinstance(node, cst.Float):
        yield node.with_changes(value=repr(2 * node.evaluated_value))


def other_call(node: cst.Call) -> Iterator[cst.Call]:
    """min for max and the like, and two neighbouring arguments that change places."""
    name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    if isinstance(name, cst.Name) and name.value in OTHER:
        yield node.with_deep_changes(name, value=OTHER[name.value])
    for i, (a, b) in enumerate(zip(node.args, node.args[1:])):
        if not (a.keyword or b.keyword or a.star or b.star):
            pair = [a.with_changes(value=b.value), b.with_changes(value=a.value)]
            yield node.with_changes(args=[*node.args[:i], *pair, *node.args[i + 2 :]])


def no_call(node: cst.SimpleStatementLine) -> Iterator[cst.SimpleStatementLine]:
    """A call for its effect, left out."""
    if isinstance(node.body[0], cst.Expr) and isinstance(node.body[0].value, cst.Call):
        yield node.with_changes(body=[cst.Pass()])


OWN = [(cst.BaseNumber, other_number), (cst.Call, other_call), (cst.SimpleStatementLine, no_call)]
OWN += [(cst.If, operator_if_exp), (cst.CompIf, operator_if_exp)]


class Sites(cst.CSTVisitor):
    """Places that can be mutated: (node, line, what it can become, scopes, spans)."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple] = []
        self.around: list[tuple[cst.CSTNode, int, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Note a place, but none in types, decorators and imports, and no text for people."""
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom):
            return False
        if isinstance(node, cst.Assign) and "__all__" in repr(node.targets[0].target):
            return False
        place = self.get_metadata(PositionProvider, node, None)
        if place and isinstance(node, cst.BaseCompoundStatement | cst.SimpleStatementLine):
            self.around.append((node, place.start.line, place.end.line))
        if self.around and place and (forms := list(_forms(node))):
            inner, first, last = self.around[-1]
            own = (first, last if isinstance(inner, cst.SimpleStatementLine) else place.end.line)
            outer = [a for a in self.around if isinstance(a[0], cst.FunctionDef | cst.ClassDef)]
            spans = [own, *(a[1:] for a in reversed(outer)), (1, 10**6)]
            scopes = [a[0].name.value for a in outer]
            self.found.append((node, place.start.line, forms, scopes, spans))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        """Go on behind a statement."""
        if self.around and self.around[-1][0] is original_node:
            self.around.pop()


def _forms(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, operator in [*mutation_operators, *OWN]:
        with contextlib.suppress(cst.CSTValidationError):
            if isinstance(node, kind):
                found = [form for form in operator(node) if not _becomes_none(node, form)]
                words = isinstance(node, cst.SimpleString) and " " in node.raw_value
                yield from () if words else found[:1] if isinstance(node, cst.BaseString) else found


def _becomes_none(node: cst.CSTNode, form: cst.CSTNode) -> bool:
    none = [sum(name.value == "None" for name in m.findall(n, m.Name())) for n in (node, form)]
    return none[0] < none[1]


def sample(root: Path, only: list[str], seed: int) -> Iterator[Mutant]:
    """Mutants of folders and files of a tree in random order, each place once."""
    paths = [p for name in only for p in sorted((root / name).rglob("*.py")) or [root / name]]
    rng, sites = random.Random(seed), []
    for path in paths:
        wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
        visitor = Sites()
        wrapper.visit(visitor)
        sites += [(path, wrapper.module, *site) for site in visitor.found]
    rng.shuffle(sites)
    for path, module, node, line, forms, scopes, spans in sites:
        after = module.deep_replace(node, rng.choice(forms)).code
        if after != module.code:
            name = str(path.relative_to(root))
            yield Mutant(name, line, module.code, after, scopes, spans)
