"""The program that runs the evidence: what fails is told, and keeps nothing else from being run and told."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import proof

COUNTS = "import json; print(json.dumps({'runs': 7}))"
FILE_OF_TESTS = """
import pytest


@pytest.mark.parametrize("number", [1, 2])
def test_counts(number, record_property):
    record_property("cases", 10 * number)


def test_left_out():
    pytest.skip("there is no disk")
"""


def counting(name: str, code: str = COUNTS, *, alone: bool = False) -> proof.Part:
    """A part that runs this code, and whose figure is the number of runs it tells."""
    return proof.Part(name, ("-c", code), lambda document: {"runs": str(document["runs"])}, alone=alone)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (f"{COUNTS}; import sys; sys.stderr.write('promise broken'); sys.exit(1)", "7"),
        ("raise SystemExit('promise broken')", ""),
        ("import sys; sys.stderr.write('promise broken'); print('nothing')", ""),
        ("import sys; sys.stderr.write('promise broken'); print('{}')", ""),
    ],
    ids=["with figures", "without", "no document", "no figures in it"],
)
async def test_a_part_that_fails_is_told_and_the_others_run(code: str, told: str) -> None:
    """The table has the figures of all parts, says which failed, and the end of what that one said is kept."""
    results = await proof.run_all(
        [counting("broken", code), counting("whole"), counting("last", alone=True)], 2
    )
    assert [result.ok for result in results] == [False, True, True]
    assert results[0].figures.get("runs", "") == told
    assert "promise broken" in results[0].log
    assert [result.figures for result in results[1:]] == [{"runs": "7"}] * 2
    table = proof.table(results, 60.0)
    assert table.endswith("FAILED: broken; 1.0 minutes")
    assert table.count("runs") == 2 + bool(told)
    assert proof.table(results[1:], 60.0).endswith("all 2 parts hold; 1.0 minutes")


@pytest.mark.parametrize(("code", "exit_code"), [(COUNTS, 0), ("raise SystemExit(3)", 1)])
def test_the_exit_code_says_whether_all_holds(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    code: str,
    exit_code: int,
) -> None:
    """One part that fails is enough, and the figures are printed and written all the same."""
    file = tmp_path / "figures.json"
    monkeypatch.setattr(proof, "parts", lambda _: [counting("first", code), counting("second")])
    monkeypatch.setattr(sys, "argv", ["proof", "--json", str(file)])
    assert proof.main() == exit_code
    assert "second" in capsys.readouterr().out
    first, second = json.loads(file.read_text(encoding="utf-8"))["parts"]
    assert first["ok"] == (exit_code == 0)
    assert second["figures"] == {"runs": "7"}


async def test_a_part_that_waits_runs_beside_those_that_compute(tmp_path: Path) -> None:
    """Its place is none of the processors': one that computes on the only one hears of it before it ends."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    hears = f"import json; print(json.dumps({{'runs': open({str(pipe)!r}).read()}}))"
    tells = f"import os; open({str(pipe)!r}, 'w').write(os.environ['WORD']); {COUNTS}"
    waiting = replace(counting("waits", tells), waits=True, environment={"WORD": "said"})
    async with asyncio.timeout(60):
        results = await proof.run_all([counting("computes", hears), waiting], 1)
    assert [result.figures["runs"] for result in results] == ["said", "7"]


def test_which_suite_noticed_how_many_mutants_is_told() -> None:
    """Survivors are named, and count for no suite."""
    (part,) = [one for one in proof.parts(proof.FULL) if one.name == "mutants"]
    document = {
        "made": 5,
        "equivalent": 1,
        "killers": {"a": "t::x", "b": "t::y", "c": "s::z", "d": ""},
        "suites": {"a": "unit", "b": "unit", "c": "faults", "d": ""},
    }
    assert part.figures(document) == {
        "mutants killed": "3 of 4",
        "by the suites": "unit 2, faults 1",
        "mutants made": "5 (1 that nobody can tell)",
        "survivor 1": "d",
    }


async def test_what_tests_count_and_leave_out_is_told(tmp_path: Path) -> None:
    """A test that is left out is neither passed nor silent; what tests count themselves is added up."""
    file = tmp_path / "test_counting.py"
    file.write_text(FILE_OF_TESTS, encoding="utf-8")
    seen: list[proof.Tested] = []

    def figures(tested: proof.Tested) -> dict[str, str]:
        seen.append(tested)
        return {"cases": str(tested.noted["cases"])}

    (result,) = await proof.run_all([proof.tests("tests", str(file), figures=figures)], 1)
    assert result.ok, result.log
    assert result.figures == {"cases": "30"}
    assert seen[0].passed == {"test_counts": 2}
    assert result.left_out == ["test_left_out: there is no disk"]
    assert "LEFT OUT" in proof.table([result], 1.0)


@pytest.mark.parametrize("sizes", [proof.FULL, proof.QUICK])
def test_every_part_names_what_there_is(sizes: proof.Sizes) -> None:
    """No part points to a file that was moved, and each takes part in the table once."""
    chosen = proof.parts(sizes)
    assert len({part.name for part in chosen}) == len(chosen)
    for part in chosen:
        files = [argument for argument in part.arguments if "/" in argument and "{" not in argument]
        assert all((proof.ROOT / file).exists() for file in files), files


def test_a_search_that_is_missing_is_left_out_aloud() -> None:
    """Without Spin there are no figures of it, and the table says why."""
    whole = {"variants": 2, "ok": 2, "states": 10, "edges": 20}
    document: dict[str, Any] = {
        "missing": [],
        **dict.fromkeys(("safe", "broken", "spin", "spin_broken"), whole),
    }
    (part,) = [one for one in proof.parts(proof.QUICK) if one.name == "specification"]
    assert "Spin: states" in part.figures(document)
    assert part.left_out(document) == []
    document["missing"] = ["spin"]
    assert "Spin: states" not in part.figures(document)
    assert part.left_out(document) == ["Spin: missing here: spin"]
