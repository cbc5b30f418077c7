"""Removes each guard and each wait for the disk from the hand-off's core, one at a time: some suite must notice.

A mutant is one edit in a scratch copy of the tree, never in the tree itself: a condition negated, dropped or
narrowed, a ``raise`` or a sync left out, a durable record made lazy. The fast suites run on each, the nearest first,
until one fails. What survives is a missing test, or stands in ``EQUIVALENT`` with why nobody can tell.

    python scripts/mutants.py                  all of them
    python scripts/mutants.py --sample 40      as many, by the seed that is printed
    python scripts/mutants.py --only journal   of one module, or by part of a name
"""

from __future__ import annotations

import argparse
import ast
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
CORE: Final = (
    "states",
    "source",
    "destination",
    "rights",
    "gate",
    "records",
    "journal",
    "register",
    "ledger",
)
_COPIED: Final = ("vmferry", "source_svc", "dest_svc", "tests", "models", "pyproject.toml")
_SYNCS: Final = {"sync", "sync_data", "sync_folder", "_note", "note", "add"}
_FLAGS: Final = {"durable", "settled", "wait"}
_TIME_LIMIT_S: Final = 900
_SLOW_IMPORTS: Final = (
    "cryptography.x509",
    "google.protobuf.message",
    "grpc.aio",
    "opentelemetry.sdk.trace",
    "rich",
    "structlog",
    "typer",
    "unicorn",
)
_STRICTER: Final = {ast.Gt: ">=", ast.GtE: ">", ast.Lt: "<=", ast.LtE: "<", ast.Eq: "!=", ast.NotEq: "=="}

SUITES: Final = {
    "unit": "tests/unit/handoff",
    "faults": "tests/simulation/test_faults.py",
    "explored": "tests/simulation/test_two_hosts.py",
    "conformance": "tests/simulation/test_conformance.py",
}
"""What runs, in this order; what does not exist (yet) is left out."""
NEAREST: Final = {
    "source": "test_source.py",
    "destination": "test_destination.py test_destination_rules.py",
    "journal": "test_journal.py test_journal_disk.py",
    "register": "test_register.py",
    "ledger": "test_ledger.py test_register.py",
    "records": "test_records.py",
    "gate": "test_gate.py",
    "rights": "test_rights.py test_gate.py",
    "states": "test_source.py",
}
"""The tests of the unit suite that are the most likely to notice, and run before the others."""

EQUIVALENT: Final[dict[str, str]] = {
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
        self.found.append(Mutant(self._module, where, shown, start, end, replacement))

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
        elif name == "_append" and not lazy and self._module == "source" and node not in self._lazy:
            self._add(node, f"lazily {text}", f"replace({text}, durable=False)")
        for keyword in node.keywords:
            if (
                keyword.arg in _FLAGS
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
            ):
                self._add(keyword.value, f"not {keyword.arg}: {text}", "False")
        self.generic_visit(node)


def mutants() -> Iterator[Mutant]:
    """All there are; two edits of the same kind in the same place are told apart by a number."""
    for module in CORE:
        source = _path(ROOT, module).read_bytes()
        finder = Finder(module, source)
        finder.visit(ast.parse(source))
        seen: dict[str, int] = {}
        for mutant in finder.found:
            seen[mutant.name] = seen.get(mutant.name, 0) + 1
            times = f" ({seen[mutant.name]})" if seen[mutant.name] > 1 else ""
            yield Mutant(
                module,
                mutant.where,
                mutant.what + times,
                mutant.start,
                mutant.end,
                mutant.replacement,
            )


def _path(root: Path, module: str) -> Path:
    return root / "vmferry/handoff" / f"{module}.py"


def _commands(scratch: Path, module: str) -> Iterator[tuple[str, list[str]]]:
    nearest = [f"{SUITES['unit']}/{name}" for name in NEAREST[module].split()]
    yield "unit", [name for name in nearest if (scratch / name).exists()]
    for name, folder in SUITES.items():
        if (scratch / folder).exists():
            yield name, [folder]


def noticed_by(mutant: Mutant, scratch: Path) -> str:
    """The suite that notices, or nothing."""
    path = _path(scratch, mutant.module)
    source = path.read_bytes()
    path.write_bytes(mutant.applied(source))
    try:
        for name, targets in _commands(scratch, mutant.module):
            if not _passes(targets, scratch):
                return name
        return ""
    finally:
        path.write_bytes(source)


def _passes(targets: Sequence[str], scratch: Path) -> bool:
    """Whether tests pass in a scratch copy: in a child of this process, which has imported what is slow to import."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(_TIME_LIMIT_S)
            os.chdir(scratch)
            sys.path.insert(0, str(scratch))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            code = pytest.main(
                ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--timeout=60", *targets]
            )
            os._exit(0 if code == pytest.ExitCode.OK else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def _scratch(folder: Path, number: int) -> Path:
    scratch = folder / str(number)
    scratch.mkdir()
    for name in _COPIED:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif origin.exists():
            shutil.copy(origin, scratch / name)
    return scratch


def _prepare() -> None:
    """Import what the tests need and is nobody's mutant, and say what they read from the environment."""
    for name in _SLOW_IMPORTS:
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", VMFERRY_SEED="7", GRPC_ENABLE_FORK_SUPPORT="0")
    os.environ.setdefault("VMFERRY_STRIDE", "120")


def _work(mutant: Mutant) -> tuple[Mutant, str]:
    scratch = _SCRATCH[0]
    os.environ["PYTHONPATH"] = str(scratch)
    return mutant, noticed_by(mutant, scratch)


_SCRATCH: Final[list[Path]] = []


def _take_scratch(folder: Path, numbers: SimpleQueue[int]) -> None:
    _SCRATCH.append(_scratch(folder, numbers.get()))


def judge(chosen: Sequence[Mutant], jobs: int) -> dict[Mutant, str]:
    """Which suite notices each mutant; prints them as they come."""
    verdicts: dict[Mutant, str] = {}
    _prepare()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        numbers = context.SimpleQueue()
        for number in range(jobs):
            numbers.put(number)
        untouched = _scratch(Path(folder), jobs)
        os.environ["PYTHONPATH"] = str(untouched)
        for name, folder_of_tests in SUITES.items():
            if (ROOT / folder_of_tests).exists() and not _passes([folder_of_tests], untouched):
                raise SystemExit(f"the suite {name} fails without any mutant")
        with context.Pool(jobs, _take_scratch, (Path(folder), numbers)) as pool:
            for mutant, suite in pool.imap_unordered(_work, chosen):
                verdicts[mutant] = suite
                print(f"{suite or 'SURVIVED':12} {mutant.name}", flush=True)
    return verdicts


def main() -> int:
    """Make mutants and print what became of them; the exit code is 1 if one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=0, help="only so many, chosen by the seed")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))  # noqa: S311 - no secret
    parser.add_argument("--only", default="", help="only those with this in their name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="only say which there are")
    given = parser.parse_args()
    made = [mutant for mutant in mutants() if given.only in mutant.name]
    stale = set(EQUIVALENT) - {mutant.name for mutant in mutants()}
    equivalent = [mutant for mutant in made if mutant.name in EQUIVALENT]
    chosen = [mutant for mutant in made if mutant.name not in EQUIVALENT]
    if given.sample and given.sample < len(chosen):
        chosen = random.Random(given.seed).sample(chosen, given.sample)  # noqa: S311 - no secret
        print(f"seed {given.seed}")
    if given.list:
        for mutant in chosen:
            print(mutant.name)
        return 0
    started = time.monotonic()
    verdicts = judge(chosen, given.jobs)
    for mutant in equivalent:
        print(f"{'equivalent':12} {mutant.name}: {EQUIVALENT[mutant.name]}")
    survivors = [mutant for mutant, suite in verdicts.items() if not suite]
    by_suite = {name: sum(suite == name for suite in verdicts.values()) for name in SUITES}
    print(
        f"mutants: {len(verdicts) - len(survivors)} of {len(verdicts)} noticed ({by_suite}), "
        f"{len(equivalent)} equivalent with a reason, {len(survivors)} survive, {time.monotonic() - started:.0f} s"
    )
    for mutant in survivors:
        print(f"  SURVIVED {mutant.name}")
    for name in sorted(stale):
        print(f"  EQUIVALENT names a mutant that there is not: {name}")
    return int(bool(survivors or stale))


if __name__ == "__main__":
    sys.exit(main())
