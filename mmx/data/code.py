"""Source code and its data flow: which value of which variable comes from where (GraphCodeBERT, arXiv 2009.08366)."""

import ast
import copy
import dataclasses
from typing import Any

import numpy as np

from mmx.errors import InputError


@dataclasses.dataclass
class DataFlow:
    """Occurrences of variables in the order in which they are evaluated, and from which others each gets its value.

    Attributes:
        names: of the variable at each occurrence, V of them.
        places: (line, column) of each, from (1, 0), `(V, 2)`.
        edges: `(V, V)` bool; `edges[i, j]`: the value of occurrence i comes from occurrence j.
    """

    names: list[str]
    places: np.ndarray
    edges: np.ndarray


def data_flow(source: str) -> DataFlow:
    """The data flow of a Python program: branches are joined, loops feed back, functions have a scope of their own."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise InputError(f"code: cannot be parsed as Python: {error}") from error
    visitor = _Visitor()
    visitor.block(tree.body)
    count = len(visitor.names)
    edges = np.zeros((count, count), bool)
    for i, j in visitor.edges:
        edges[i, j] = True
    return DataFlow(visitor.names, np.asarray(visitor.places, np.int32).reshape(-1, 2), edges)


class _Visitor:
    """Runs through statements with, for each name, the occurrences that may have set it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places: list[tuple[int, int]] = []
        self.edges: set[tuple[int, int]] = set()
        self.set_by: dict[str, set[int]] = {}
        self.seen: dict[tuple[str, int, int], int] = {}

    def occurrence(self, name: str, node: Any) -> int:
        key = (name, node.lineno, node.col_offset)
        if key not in self.seen:  # a loop's body is run through twice
            self.seen[key] = len(self.names)
            self.names.append(name)
            self.places.append((node.lineno, node.col_offset))
        return self.seen[key]

    def read(self, node: Any) -> set[int]:
        """The occurrences an expression reads."""
        found: set[int] = set()
        if isinstance(node, ast.NamedExpr):
            found = self.read(node.value)
            self.write(node.target, found)
            return found
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            outer, self.set_by = self.set_by, copy.deepcopy(self.set_by)
            for generator in node.generators:
                self.write(generator.target, self.read(generator.iter))
                for condition in generator.ifs:
                    found |= self.read(condition)
            values = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
            found = found.union(*(self.read(value) for value in values))
            self.set_by = outer
            return found
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            index = self.occurrence(node.id, node)
            self.edges |= {(index, source) for source in self.set_by.get(node.id, ())}
            return {index}
        for child in ast.iter_child_nodes(node):
            found |= self.read(child)
        return found

    def write(self, target: Any, sources: set[int], keep: bool = False) -> None:
        """Sets every name in a target from `sources`; with `keep` (x += 1, x[i] = 1) what it held stays a source too."""
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                index = self.occurrence(node.id, node)
                before = self.set_by.get(node.id, set()) if keep else set()
                self.edges |= {(index, source) for source in sources | before if source != index}
                self.set_by[node.id] = {index}
        if isinstance(target, ast.Subscript | ast.Attribute):  # the object is changed, not replaced
            read = self.read(target)
            self.edges |= {(i, source) for i in read for source in sources if source != i}

    def block(self, statements: list[Any]) -> None:
        for statement in statements:
            self.statement(statement)

    def branches(self, *blocks: list[Any]) -> None:
        """Runs blocks of which one happens, and joins what they set."""
        before = self.set_by
        joined: dict[str, set[int]] = {}
        for block in blocks:
            self.set_by = copy.deepcopy(before)
            self.block(block)
            for name, indices in self.set_by.items():
                joined.setdefault(name, set()).update(indices)
        self.set_by = joined

    def statement(self, s: Any) -> None:
        match s:
            case (target, sources):  # a loop's next value
                self.write(target, sources)
            case ast.Match():
                self.read(s.subject)
                self.branches([], *(case.body for case in s.cases))
            case ast.Assign():
                sources = self.read(s.value)
                for target in s.targets:
                    self.write(target, sources)
            case ast.AnnAssign() if s.value is not None:
                self.write(s.target, self.read(s.value))
            case ast.AugAssign():
                self.write(s.target, self.read(s.value), keep=True)
            case ast.For() | ast.AsyncFor():
                sources = self.read(s.iter)
                bind = (s.target, sources)
                self.branches([], [bind, *s.body, bind, *s.body])
                self.block(s.orelse)
            case ast.While():
                self.read(s.test)
                self.branches([], [*s.body, ast.Expr(s.test), *s.body])
                self.block(s.orelse)
            case ast.If():
                self.read(s.test)
                self.branches(s.body, s.orelse)
            case ast.With() | ast.AsyncWith():
                for item in s.items:
                    sources = self.read(item.context_expr)
                    if item.optional_vars is not None:
                        self.write(item.optional_vars, sources)
                self.block(s.body)
            case ast.Try():
                self.branches(s.body, *([*s.body, *handler.body] for handler in s.handlers))
                self.block([*s.orelse, *s.finalbody])
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                outer, self.set_by = self.set_by, copy.deepcopy(self.set_by)
                for argument in (*s.args.posonlyargs, *s.args.args, s.args.vararg, *s.args.kwonlyargs, s.args.kwarg):
                    if argument is None:
                        continue
                    self.set_by[argument.arg] = {self.occurrence(argument.arg, argument)}
                self.block(s.body)
                self.set_by = outer
            case ast.ClassDef():
                self.block(s.body)
            case _:
                for child in ast.iter_child_nodes(s):
                    self.read(child)
