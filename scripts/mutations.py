"""Which mutants the hand-off's core has: each guard and each wait for the disk taken away, one at a time.

A mutant is one edit of one module: a condition negated, dropped or narrowed, a ``raise`` or a sync left out, a
durable record made lazy. Whoever tries one does so in a copy of the tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
CORE: Final = (
    "states",
    "source",
    "arriving",
    "destination",
    "rights",
    "gate",
    "records",
    "journal",
    "register",
    "ledger",
    "updating",
    "disk",
    "rolelock",
)
_SYNCS: Final = {"sync", "sync_data", "sync_folder", "_note", "note", "add", "fsync", "fdatasync", "flock"}
_FLAGS: Final = {"durable", "settled", "wait"}
_STRICTER: Final = {ast.Gt: ">=", ast.GtE: ">", ast.Lt: "<=", ast.LtE: "<", ast.Eq: "!=", ast.NotEq: "=="}

EQUIVALENT: Final[dict[str, str]] = {
    "source._force_reclaim: "
    "lazily _append(RecordKind.FORCED, attempt, epoch=attempt.epoch_from + 2, note=event.evidence)": (
        "only its record is used, in an action that is durable"
    ),
    "destination._overruled: drop isinstance(now, Empty)": (
        "a right that was taken here is of an attempt that was seen, which a checker of types cannot know"
    ),
    "rights.Rights.proved_gone_by: drop isinstance(self.outgoing, source.HandedOff)": (
        "awaits_word has looked already, which a checker of types cannot know"
    ),
    "rights.Rights.superseded: drop not self.owner": (
        "a right that was superseded counts as left, so no host that has a later one fits the rest"
    ),
    "ledger.HostLedger.goodbyes: drop record.attempt is not None": (
        "every record of a source is about an attempt, which a checker of types cannot know"
    ),
    "disk.HostFile.read: wanted > 0 as >=": "who asks a file for no bytes gets none, and stops",
    "register.Register.note: first <= second as <": "of two equal marks either may be overwritten",
}
"""Mutants that nothing can notice, by name, with the reason."""


@dataclass(frozen=True)
class Mutant:
    """One edit."""

    module: str
    where: str
    what: str
    start: int
    end: int
    replacement: str
    lines: range

    @property
    def name(self) -> str:
        """The same as long as the code around it is the same."""
        return f"{self.module}.{self.where}: {self.what}"

    def applied(self, source: bytes) -> bytes:
        """The module with the edit."""
        return source[: self.start] + self.replacement.encode() + source[self.end :]


class Finder(ast.NodeVisitor):
    """Finds every edit of a module."""

    def __init__(self, module: str, source: bytes) -> None:
        self.found: list[Mutant] = []
        self._module = module
        self._source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._inside: list[str] = []
        self._lazy: set[ast.expr] = set()

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._lines[node.lineno - 1] + node.col_offset
        return start, self._lines[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self._span(node)
        return self._source[start:end].decode()

    def _add(self, node: ast.expr | ast.stmt, what: str, replacement: str) -> None:
        start, end = self._span(node)
        shown = " ".join(what.split())
        where = ".".join(self._inside) or "module"
        assert node.end_lineno is not None
        lines = range(node.lineno, node.end_lineno + 1)
        self.found.append(Mutant(self._module, where, shown, start, end, replacement, lines))

    def _scope(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Descend."""
        self._scope(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Descend."""
        self._scope(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        """Descend."""
        self._scope(node)

    def visit_If(self, node: ast.If) -> None:
        """A condition: negated."""
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """A condition: negated."""
        self._condition(node.test)
        self.generic_visit(node)

    def _condition(self, test: ast.expr) -> None:
        text = self._text(test)
        self._add(test, f"negate {text}", f"not ({text})")

    def visit_match_case(self, node: ast.match_case) -> None:
        """The guard of a case: dropped."""
        if node.guard is not None:
            self._add(node.guard, f"drop the guard {self._text(node.guard)}", "True")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Several conditions: one dropped."""
        nothing = "True" if isinstance(node.op, ast.And) else "False"
        for value in node.values:
            self._add(value, f"drop {self._text(value)}", nothing)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """A comparison: its bound moved, or turned round."""
        other = _STRICTER.get(type(node.ops[0])) if len(node.ops) == 1 else None
        if other is not None:
            left, right = self._text(node.left), self._text(node.comparators[0])
            self._add(node, f"{self._text(node)} as {other}", f"{left} {other} {right}")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """An error: not raised."""
        self._add(node, f"no {self._text(node)}", "pass")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """A sync, or a note of one: left out."""
        call = node.value
        if isinstance(call, ast.Call):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in _SYNCS:
                self._add(node, f"no {self._text(node)}", "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """A durable record: made lazy."""
        name = getattr(node.func, "id", "")
        if name == "replace" and any(keyword.arg == "durable" for keyword in node.keywords):
            self._lazy.update(node.args)  # lazy already, on purpose
        lazy = any(keyword.arg == "durable" for keyword in node.keywords)
        text = self._text(node)
        if name == "Append" and not lazy:
            self._add(node, f"lazily {text}", f"{text[:-1].rstrip().rstrip(',')}, durable=False)")
        elif (
            name == "_append"
            and not lazy
            and self._module in {"source", "updating"}
            and node not in self._lazy
        ):
            self._add(node, f"lazily {text}", f"replace({text}, durable=False)")
        for keyword in node.keywords:
            if (
                keyword.arg in _FLAGS
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
            ):
                self._add(keyword.value, f"not {keyword.arg}: {text}", "False")
        self.generic_visit(node)


def path(root: Path, module: str) -> Path:
    """Where a module of the core is in a copy of the tree."""
    return root / "vmferry/handoff" / f"{module}.py"


def mutants() -> Iterator[Mutant]:
    """All there are; two edits of the same kind in the same place are told apart by a number."""
    for module in CORE:
        source = path(ROOT, module).read_bytes()
        finder = Finder(module, source)
        finder.visit(ast.parse(source))
        seen: dict[str, int] = {}
        for mutant in finder.found:
            seen[mutant.name] = seen.get(mutant.name, 0) + 1
            times = f" ({seen[mutant.name]})" if seen[mutant.name] > 1 else ""
            yield replace(mutant, what=mutant.what + times)


_HUNK: Final = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", re.MULTILINE)


def changed_since(commit: str, module: str) -> set[int]:
    """The lines of a module that a commit has not, or has otherwise."""
    command = ["git", "diff", "-U0", "--no-ext-diff", commit, "--", str(path(ROOT, module))]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines: set[int] = set()
    for start, count in _HUNK.findall(told):
        lines.update(range(int(start), int(start) + int(count or 1)))
    return lines
