"""The options that say how far a migration may go: read, passed on, and changed on the way."""

from __future__ import annotations

import json

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_source import HOST_B, MIGRATION_ID, FakeSource, migration
from vmferry.cli.units import bytes_per_second
from vmferry.errors import ExitCode, InvalidArgumentError
from vmferry.v1 import migration_pb2 as pb

MOVE = ("migrate", "web-1", "--to-host", HOST_B, "--to-address", "127.0.0.1:7602")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("300000", 300_000),
        ("100M", 100_000_000),
        ("100MB", 100_000_000),
        ("100 MB/s", 100_000_000),
        ("1.5G", 1_500_000_000),
        ("64Mi", 64 << 20),
        ("64MiB", 64 << 20),
        ("512k", 512_000),
        ("800Mbit", 100_000_000),
        ("10Gbit/s", 1_250_000_000),
    ],
)
def test_rates_are_read(text: str, value: int) -> None:
    """Decimal and binary prefixes, bytes and bits, each with one meaning."""
    assert bytes_per_second(text, field="--max-bandwidth") == value


@pytest.mark.parametrize("text", ["", "fast", "-1M", "10X", "10i", "10iB", "1e9", "10M/h", "10mbit", "1,5G"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    """The error names the option."""
    with pytest.raises(InvalidArgumentError) as caught:
        bytes_per_second(text, field="--max-bandwidth")
    assert caught.value.field == "--max-bandwidth"


@pytest.mark.parametrize("command", [MOVE, ("plan", *MOVE[1:])], ids=["migrate", "plan"])
def test_bounds_are_passed_on(call: Run, source: FakeSource, command: tuple[str, ...]) -> None:
    """Each option arrives in its field."""
    source.script = [migration(outcome=pb.MIGRATION_OUTCOME_COMPLETED)]
    rates = ("--max-bandwidth", "100M", "--switchover-bandwidth", "1Gbit")
    efforts = ("--max-downtime-ms", 900, "--max-throttle-percent", 60, "--on-no-convergence", "switch")
    assert call(*command, *rates, *efforts).code == ExitCode.OK
    options = source.requests[-1].options
    assert (options.max_bandwidth, options.switchover_bandwidth) == (100_000_000, 125_000_000)
    assert options.max_downtime.ToMilliseconds() == 900
    assert options.max_throttle_percent == 60
    assert options.on_no_convergence == pb.ON_NO_CONVERGENCE_SWITCH
    assert not options.HasField("downtime_limit")


def test_set_changes_what_is_given(call: Run, source: FakeSource) -> None:
    """What is not given is absent in the request, and so is left as it is; 0 is something that was given."""
    ran = call("set", MIGRATION_ID, "--max-bandwidth", "0", "--total-timeout-s", 1.5, "--json")
    assert ran.code == ExitCode.OK, ran.err
    assert json.loads(ran.out)["id"] == MIGRATION_ID
    request = source.requests[-1]
    assert request.HasField("max_bandwidth")
    assert request.max_bandwidth == 0
    assert request.total_timeout.ToMilliseconds() == 1500
    for name in ("switchover_bandwidth", "max_throttle_percent", "downtime_limit", "max_downtime"):
        assert not request.HasField(name)
    assert request.on_no_convergence == pb.ON_NO_CONVERGENCE_UNSPECIFIED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "nothing to change"), (("--max-bandwidth", "fast"), "is no rate")],
)
def test_set_refuses_what_cannot_be_meant(
    call: Run, source: FakeSource, arguments: tuple[str, ...], words: str
) -> None:
    """Before anybody is asked."""
    ran = call("set", MIGRATION_ID, *arguments)
    assert ran.code == ExitCode.USAGE
    assert words in ran.err
    assert source.requests == []
