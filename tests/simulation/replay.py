"""Do one schedule of the simulation again, and show it: ``python -m tests.simulation.replay move/74=eio``."""

from __future__ import annotations

import argparse
import sys

from tests.simulation.cluster.schedules import Schedule, quiet, run


def main() -> int:
    """Run the schedule; the exit code is 1 if a promise broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schedule", help="as a failing test prints it")
    schedule = Schedule.parse(parser.parse_args().schedule)
    with quiet():
        outcome = run(schedule)
    struck = dict(one.partition("=")[::2] for one in outcome.struck)
    for number, boundary in enumerate(outcome.boundaries):
        print(f"{number:5} {boundary}", f"   <== {struck[str(number)]}" if str(number) in struck else "")
    print(outcome.failure or "every promise was kept")
    return 1 if outcome.failure else 0


if __name__ == "__main__":
    sys.exit(main())
