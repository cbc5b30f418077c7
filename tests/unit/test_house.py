"""The rules of the house that a reader relies on: who may import whom, what is pure, how large things may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vmferry", "source_svc", "dest_svc")
PYTHON_FOLDERS = (*PACKAGES, "models", "tests", "scripts", "benchmarks", "examples")
TEXT_SUFFIXES = {
    ".cfg",
    ".inc",
    ".md",
    ".proto",
    ".pml",
    ".py",
    ".S",
    ".sh",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
    "",
}
TEXT_FOLDERS = (*PYTHON_FOLDERS, "protos", "docs", "deploy", ".ci")

MAX_MODULE_LINES = 450
MAX_TEST_MODULE_LINES = 600
MAX_FUNCTION_LINES = 60

SERVICES = {"source_svc", "dest_svc"}
INNER = {"vmferry.handoff", "vmferry.memory", "vmferry.negotiation"}
MIDDLE = {
    "vmferry.drain",
    "vmferry.transfer",
    "vmferry.machines",
    "vmferry.events",
    "vmferry.recovery",
    "vmferry.rpc",
    "vmferry.telemetry",
    "vmferry.security",
    "vmferry.web",
}
OUTER = {"vmferry.cli", "vmferry.bench", "vmferry.client", "vmferry.fleet", *SERVICES}

MAY_NOT_IMPORT = {
    **dict.fromkeys(INNER, MIDDLE | OUTER),
    **dict.fromkeys(MIDDLE, OUTER),
    "vmferry.client": SERVICES | {"vmferry.cli", "vmferry.bench", "vmferry.fleet"},
    "vmferry.fleet": SERVICES | {"vmferry.cli", "vmferry.bench"},
    "vmferry.cli": SERVICES,
    "vmferry.bench": SERVICES,
    "source_svc": {"dest_svc", "vmferry.cli", "vmferry.bench", "vmferry.client", "vmferry.fleet"},
    "dest_svc": {"source_svc", "vmferry.cli", "vmferry.bench", "vmferry.client", "vmferry.fleet"},
}

PURE = (
    "vmferry.handoff.states",
    "vmferry.handoff.arriving",
    "vmferry.handoff.source",
    "vmferry.handoff.destination",
    "vmferry.handoff.rights",
    "vmferry.handoff.gate",
    "vmferry.handoff.updating",
    "vmferry.handoff.blocked",
    "vmferry.handoff.choices",
    "vmferry.negotiation",
    "vmferry.transfer.numbering",
    "vmferry.transfer.convergence",
    "vmferry.transfer.prediction",
    "vmferry.transfer.patience",
    "vmferry.fleet.plan",
    "vmferry.fleet.rollout",
    "vmferry.events.states",
    "vmferry.events.document",
    "vmferry.events.policy",
    "vmferry.events.instance",
    "vmferry.events.protocol",
    "vmferry.events.records",
    "source_svc.queue_policy",
    "vmferry.drain.planner",
)
IMPURE = {
    "asyncio",
    "grpc",
    "io",
    "mmap",
    "os",
    "pathlib",
    "random",
    "socket",
    "subprocess",
    "threading",
    "time",
}

LEFTOVER = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|\bbreakpoint\(\)|\bpdb\.set_trace\b")
SOMEBODYS_MACHINE = re.compile(r"(?<![\w.*-])/(?:home|root|work|Users)/\w")
NAMES_AN_INDEX = re.compile(
    r"--(?:extra-)?index-url|--registry|--trusted-host|PIP_INDEX_URL|https?://\S*simple\b"
)


def module_name(path: Path) -> str:
    """The dotted name under which ``path`` is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def hand_written(folders: tuple[str, ...]) -> Iterator[Path]:
    """Every Python file in ``folders`` that is not generated."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.is_relative_to(ROOT / "vmferry/v1"):
                yield path


def text_files() -> Iterator[Path]:
    """Every text file of the repository that people write, except this one, which holds what it looks for."""
    folders = [path for folder in TEXT_FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    for path in [*ROOT.iterdir(), *folders]:
        written = path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts
        # In a worktree of git, .git is a file, and says where the repository lies.
        if (
            written
            and path.name != ".git"
            and path != Path(__file__).resolve()
            and not path.is_relative_to(ROOT / "vmferry/v1")
        ):
            yield path


def matches(pattern: re.Pattern[str], paths: Iterator[Path]) -> list[str]:
    """``file:line: text`` for every line of ``paths`` in which ``pattern`` is found."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def imported_by(path: Path) -> set[str]:
    """The dotted names that a module imports anywhere in it: of ``from a.b import c`` both ``a.b`` and ``a.b.c``."""
    package = path.relative_to(ROOT).parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def within(name: str, package: str) -> bool:
    """Whether ``name`` is ``package`` or something in it."""
    return name == package or name.startswith(f"{package}.")


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What every hand-written module of the packages imports, by the module's name."""
    return {module_name(path): imported_by(path) for path in hand_written(PACKAGES)}


@pytest.mark.parametrize("importer", sorted(MAY_NOT_IMPORT))
def test_imports_point_inwards(importer: str, imports: dict[str, set[str]]) -> None:
    """No module imports from a ring outside its own, and the two services do not know each other."""
    offences = [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in sorted(names)
        if within(module, importer) and any(within(name, package) for package in MAY_NOT_IMPORT[importer])
    ]
    assert offences == []


def test_every_package_has_a_place_in_the_order() -> None:
    """A new package under vmferry/ cannot arrive without a rule about what it may import."""
    found = {module_name(path) for path in (ROOT / "vmferry").glob("*/__init__.py")}
    assert found - {"vmferry.v1"} <= set(MAY_NOT_IMPORT)


def test_the_pure_core_is_pure(imports: dict[str, set[str]]) -> None:
    """What decides reaches no I/O, no clock and no gRPC, neither by itself nor through modules of ours it imports."""
    offences = []
    for start in [module for module in imports if any(within(module, pure) for pure in PURE)]:
        reached, todo = {start}, [start]
        while todo:
            module = todo.pop()
            offences += [
                f"{start} reaches {name} through {module}"
                for name in sorted(imports[module])
                if name.split(".")[0] in IMPURE
            ]
            news = {name for name in imports[module] if name in imports} - reached
            reached |= news
            todo += news
    assert offences == []


def test_every_module_says_what_it_promises() -> None:
    """Every module opens with a docstring; an empty ``__init__`` needs none in the tests."""
    offences = [
        str(path.relative_to(ROOT))
        for path in hand_written(PYTHON_FOLDERS)
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(ast.parse(path.read_bytes()))
    ]
    assert offences == []


def test_modules_stay_short() -> None:
    """A module holds one concept, which fits into few lines; a module of tests may list more cases."""
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for path in hand_written(PYTHON_FOLDERS)
    }
    limits = {
        path: MAX_TEST_MODULE_LINES if path.parts[0] == "tests" else MAX_MODULE_LINES for path in lengths
    }
    assert [f"{path}: {lines}" for path, lines in lengths.items() if lines > limits[path]] == []


def test_functions_stay_short() -> None:
    """A function fits on a screen."""
    offences = []
    for path in hand_written(PYTHON_FOLDERS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    offences.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert offences == []


def test_nothing_is_left_for_later() -> None:
    """No file carries a marker of unfinished work or a debugger's call; what is to be done is an issue."""
    assert matches(LEFTOVER, text_files()) == []


def test_no_file_knows_somebodys_machine() -> None:
    """No file names a directory that exists on one developer's machine only."""
    assert matches(SOMEBODYS_MACHINE, text_files()) == []


def test_setup_names_no_package_index() -> None:
    """Set-up asks the index that the user configured: a mirror, a cache, a directory."""
    assert matches(NAMES_AN_INDEX, text_files()) == []
