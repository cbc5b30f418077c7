"""Removes each guard and each wait for the disk from the hand-off's core, one at a time: some suite must notice.

Every mutant (``mutations.py``) is made in a scratch copy of the tree, never in the tree itself. Tests run on it
until one fails: first the one that noticed the last time (``mutants.toml``), then the suites, the nearest and
quickest first. A test that fails counts only if it passes without the mutant. What survives is a missing test, or
stands in ``EQUIVALENT`` with why nobody can tell.

    python scripts/mutants.py                        all of them
    python scripts/mutants.py --sample 40            as many, by the seed that is printed
    python scripts/mutants.py --only journal.        of one module, or by part of a name
    python scripts/mutants.py --changed-since HEAD~3 those in lines that were changed since
    python scripts/mutants.py --remember             note in mutants.toml which test noticed which
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import py_compile
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Final

import mutations
import pytest
from mutations import EQUIVALENT, ROOT, Mutant

REMEMBERED: Final = ROOT / "scripts/mutants.toml"
_COPIED: Final = ("vmferry", "source_svc", "dest_svc", "tests", "models", "docs", "pyproject.toml")
_TIME_LIMIT_S: Final = 900
_SLOW_IMPORTS: Final = (
    "cryptography.x509",
    "google.protobuf.message",
    "grpc.aio",
    "hypothesis.strategies",
    "opentelemetry.sdk.trace",
    "pytest_asyncio.plugin",
    "rich",
    "structlog",
    "typer",
    "unicorn",
)

_OPTIONS: Final = (
    *("-q", "-p", "no:cacheprovider", "--no-header", "--assert=plain", "--timeout=60"),
    *("-p", "no:tests.integration.hosts"),  # it imports all there is, and no suite here uses it
)

SUITES: Final = {
    "unit": "tests/unit/handoff",
    "faults": "tests/simulation/test_faults.py",
    "explored": "tests/simulation/test_two_hosts.py",
    "conformance": "tests/simulation/test_conformance.py",
    "updates": "tests/simulation/test_update_conformance.py",
}
"""What runs, in this order."""
NEAREST: Final = {
    "source": "test_source.py test_source_rules.py",
    "arriving": "test_destination.py test_destination_rules.py",
    "destination": "test_destination.py test_destination_rules.py",
    "journal": "test_journal.py test_journal_disk.py",
    "register": "test_register.py test_registered_journals.py test_journal_directory.py",
    "ledger": (
        "test_ledger_disk.py test_ledger.py test_registered_journals.py test_journal_directory.py test_updating.py"
    ),
    "records": "test_records.py",
    "gate": "test_gate.py test_updating.py",
    "rights": "test_rights.py test_gate.py test_updating.py",
    "states": "test_source.py",
    "updating": "test_updating.py",
    "disk": "test_disk.py test_journal_disk.py test_journal_directory.py test_ledger_disk.py test_ledger.py",
    "rolelock": "test_ledger.py",
}
"""The tests of the unit suite that are the most likely to notice, and run before the others."""


def _targets(mutant: Mutant, remembered: str) -> Iterator[list[str]]:
    """What to try, in order."""
    if remembered:
        yield [remembered]
    yield [f"{SUITES['unit']}/{name}" for name in NEAREST[mutant.module].split()]
    yield from ([suite] for suite in SUITES.values())


def suite_of(test: str) -> str:
    """The suite that a test belongs to; empty if there is no test."""
    return next((name for name, place in SUITES.items() if test.startswith(place)), "")


class _Witness:
    """Tells which tests fail, through a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test failed."""
        if report.failed:
            self._tell(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file of tests could not be read."""
        if report.failed:
            self._tell(report.nodeid)

    def _tell(self, test: str) -> None:
        os.write(self._pipe, f"{test}\n".encode())


class _Chosen(_Witness):
    """Runs some tests only, and tells which of them pass instead."""

    def __init__(self, pipe: int, wanted: frozenset[str]) -> None:
        super().__init__(pipe)
        self._wanted = wanted
        self._failed: set[str] = set()
        self._ran: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what was not chosen."""
        items[:] = [item for item in items if self._wanted.intersection(_names(item.nodeid))]
        self._ran.update(name for item in items for name in _names(item.nodeid))

    def pytest_sessionfinish(self) -> None:
        """Tell which passed."""
        for test in self._wanted & self._ran - self._failed:
            super()._tell(test)

    def _tell(self, test: str) -> None:
        self._failed.update(_names(test))


def _names(test: str) -> tuple[str, str]:
    """A test, and the file that it is in."""
    return test, test.partition("::")[0]


def _run(
    arguments: Sequence[str], scratch: Path, plugin: Callable[[int], _Witness]
) -> tuple[bool, list[str]]:
    """Whether tests pass in a scratch copy, and what was told; in a child of this process, which imported a lot."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(_TIME_LIMIT_S)
            os.close(reading)
            os.chdir(scratch)
            sys.path.insert(0, str(scratch))
            os.environ["PYTHONPATH"] = str(scratch)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            os._exit(pytest.main([*_OPTIONS, *arguments], plugins=[plugin(writing)]))
        finally:
            os._exit(pytest.ExitCode.INTERNAL_ERROR)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        told = pipe.read().splitlines()
    return os.waitpid(child, 0)[1] == 0, told


def _first_failure(targets: Sequence[str], scratch: Path) -> str | None:
    """The test that fails, or ``None``."""
    passed, failed = _run(["-x", *targets], scratch, _Witness)
    return None if passed else (*failed, targets[0])[0]


def _passing(tests: frozenset[str], scratch: Path) -> set[str]:
    """Those of some tests that there are, and that pass without any mutant."""
    files = sorted({file for _, file in map(_names, tests) if (scratch / file).exists()})
    return set(_run(files, scratch, lambda pipe: _Chosen(pipe, tests))[1]) if files else set()


class Judge:
    """Tries mutants in one scratch copy of the tree."""

    def __init__(self, scratch: Path, remembered: dict[str, str]) -> None:
        self._scratch = scratch
        self._remembered = remembered
        self._passes = dict.fromkeys(remembered.values(), True)

    def noticed_by(self, mutant: Mutant) -> str:
        """The test that notices, or nothing.

        Raises:
            RuntimeError: a test of a suite fails without any mutant, too.
        """
        for targets in _targets(mutant, self._remembered.get(mutant.name, "")):
            failed = self._with(mutant, targets)
            if failed is None:
                continue
            if not self._passes_untouched(failed):
                raise RuntimeError(f"{failed} fails without any mutant")
            return failed
        return ""

    def _with(self, mutant: Mutant, targets: Sequence[str]) -> str | None:
        path = mutations.path(self._scratch, mutant.module)
        source = path.read_bytes()
        path.write_bytes(mutant.applied(source))
        try:
            return _first_failure(targets, self._scratch)
        finally:
            path.write_bytes(source)

    def _passes_untouched(self, test: str) -> bool:
        if test not in self._passes:
            self._passes[test] = _first_failure([test], self._scratch) is None
        return self._passes[test]


def _copy(scratch: Path) -> None:
    """Copy the tree; what is compiled is told from a mutant by its content, as edits may be faster than clocks."""
    scratch.mkdir()
    for name in _COPIED:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, scratch / name)
    by_content = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(scratch, quiet=1, invalidation_mode=by_content)


def _prepare() -> None:
    """Import what the tests need and is nobody's mutant, and say what they read from the environment."""
    for name in _SLOW_IMPORTS:
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", VMFERRY_SEED="7", GRPC_ENABLE_FORK_SUPPORT="0")
    os.environ.setdefault("VMFERRY_STRIDE", "120")
    gc.collect()
    gc.freeze()  # a child looks for garbage when its tests end: what it got from here is none


_JUDGE: Final[list[Judge]] = []


def _become_judge(original: Path, numbers: SimpleQueue[int], remembered: dict[str, str]) -> None:
    scratch = original.with_name(f"mutant{numbers.get()}")
    shutil.copytree(original, scratch)
    _JUDGE.append(Judge(scratch, remembered))


def _work(mutant: Mutant) -> tuple[Mutant, str]:
    return mutant, _JUDGE[0].noticed_by(mutant)


def judge(chosen: Sequence[Mutant], jobs: int) -> dict[Mutant, str]:
    """Which test notices each mutant; prints them as they come."""
    verdicts: dict[Mutant, str] = {}
    _prepare()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        numbers = context.SimpleQueue()
        for number in range(jobs):
            numbers.put(number)
        original = Path(folder) / "original"
        _copy(original)
        names = {mutant.name for mutant in chosen}
        remembered = {name: test for name, test in recall().items() if name in names}
        passing = _passing(frozenset(remembered.values()), original)
        remembered = {name: test for name, test in remembered.items() if test in passing}
        print(f"remembered: a test for {len(remembered)} of {len(chosen)}", flush=True)
        with context.Pool(jobs, _become_judge, (original, numbers, remembered)) as pool:
            for mutant, test in pool.imap_unordered(_work, chosen):
                verdicts[mutant] = test
                print(f"{suite_of(test) or 'SURVIVED':12} {mutant.name}  [{test}]", flush=True)
    return verdicts


def recall() -> dict[str, str]:
    """Which test noticed which mutant the last time; it only decides what is tried first."""
    return dict(tomllib.loads(REMEMBERED.read_text(encoding="utf-8"))) if REMEMBERED.exists() else {}


def remember(verdicts: dict[Mutant, str]) -> None:
    """Note which test noticed which mutant, and forget mutants that are no more."""
    noticed = recall() | {mutant.name: test for mutant, test in verdicts.items()}
    lines = [
        "# Which test noticed a mutant the last time: it is tried first. Written by scripts/mutants.py --remember.",
        *(
            f"{json.dumps(mutant.name)} = {json.dumps(noticed[mutant.name])}"
            for mutant in mutations.mutants()
            if noticed.get(mutant.name)
        ),
    ]
    REMEMBERED.write_text("\n".join(lines) + "\n", encoding="utf-8")


def selected(given: argparse.Namespace) -> list[Mutant]:
    """The mutants that the command line asks for."""
    found = [mutant for mutant in mutations.mutants() if given.only in mutant.name]
    if given.changed_since:
        changed = {module: mutations.changed_since(given.changed_since, module) for module in mutations.CORE}
        found = [mutant for mutant in found if changed[mutant.module].intersection(mutant.lines)]
    return found


def report(verdicts: dict[Mutant, str], made: int, equivalent: Sequence[Mutant], seconds: float) -> int:
    """Print what became of the mutants; the number of things that are not as they should be."""
    for mutant in equivalent:
        print(f"{'equivalent':12} {mutant.name}: {EQUIVALENT[mutant.name]}")
    survivors = [mutant.name for mutant, test in verdicts.items() if not test]
    by_suite = {name: sum(suite_of(test) == name for test in verdicts.values()) for name in SUITES}
    print(
        f"mutants: {len(verdicts) - len(survivors)} of {len(verdicts)} noticed ({by_suite}), {made} made, "
        f"{len(equivalent)} equivalent with a reason, {len(survivors)} survive, {seconds:.0f} s"
    )
    for name in survivors:
        print(f"  SURVIVED {name}")
    stale = sorted(set(EQUIVALENT) - {mutant.name for mutant in mutations.mutants()})
    for name in stale:
        print(f"  EQUIVALENT names a mutant that there is not: {name}")
    return len(survivors) + len(stale)


def main() -> int:
    """Make mutants and print what became of them; the exit code is 1 if one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=0, help="only so many, chosen by the seed")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))  # noqa: S311 - no secret
    parser.add_argument("--only", default="", help="only those with this in their name")
    parser.add_argument("--changed-since", default="", metavar="COMMIT", help="only those in changed lines")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="only say which there are")
    parser.add_argument("--remember", action="store_true", help="note in mutants.toml which test noticed")
    parser.add_argument("--json", action="store_true", help="print one JSON document; the rest on stderr")
    given = parser.parse_args()
    made = selected(given)
    equivalent = [mutant for mutant in made if mutant.name in EQUIVALENT]
    chosen = [mutant for mutant in made if mutant.name not in EQUIVALENT]
    with contextlib.redirect_stdout(sys.stderr if given.json else sys.stdout):
        if given.sample and given.sample < len(chosen):
            chosen = random.Random(given.seed).sample(chosen, given.sample)  # noqa: S311 - no secret
            print(f"seed {given.seed}")
        if given.list:
            print("\n".join(mutant.name for mutant in chosen))
            return 0
        started = time.monotonic()
        verdicts = judge(chosen, given.jobs)
        if given.remember:
            remember(verdicts)
        wrong = report(verdicts, len(made), equivalent, time.monotonic() - started)
    if given.json:
        killers = {mutant.name: test for mutant, test in verdicts.items()}
        suites = {name: suite_of(test) for name, test in killers.items()}
        document = {"made": len(made), "equivalent": len(equivalent), "killers": killers, "suites": suites}
        print(json.dumps(document))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
