"""The machine description: what it accepts, how it refuses, how it travels, what command it becomes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import ConfigError, InvalidArgumentError
from vmferry.machines.command import render_command
from vmferry.machines.microvm.spec import MAX_PARAM_CHARS, MicrovmSpec
from vmferry.machines.paths import MAX_SOCKET_PATH_BYTES, MachinePaths
from vmferry.machines.spec import MAX_MEMORY_MIB, MachineSpec, new_spec

UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
VALID: dict[str, Any] = {
    "name": "web-1",
    "uuid": UUID,
    "memory_mib": 64,
}
PART: dict[str, Any] = {"program": "canary", "params": {"rate": "10"}, "mac": "52:54:00:12:34:56"}


def make(**changes: Any) -> MachineSpec:
    """A micro-VM, with some values changed: those of its part are named ``microvm.KEY``."""
    part = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith("microvm.")}
    common = {key: value for key, value in changes.items() if "." not in key}
    return MachineSpec(**{**VALID, "microvm": MicrovmSpec(**{**PART, **part}), **common})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("name", "Web"),
        ("name", "1web"),
        ("name", "web-"),
        ("name", "web\n"),
        ("name", "a" * 64),
        ("name", "../web"),
        ("name", 7),
        ("microvm", None),
        ("microvm", {}),
        ("qemu", 7),
        ("uuid", UUID.upper()),
        ("uuid", "0f8fad5b"),
        ("kind", "bhyve"),
        ("memory_mib", 0),
        ("memory_mib", MAX_MEMORY_MIB + 1),
        ("memory_mib", 1.5),
        ("memory_mib", True),
        ("vcpus", 0),
        ("vcpus", 2),
        ("microvm.program", ""),
        ("microvm.program", "--qmp"),
        ("microvm.params", []),
        ("microvm.params.Rate", {"Rate": "1"}),
        ("microvm.params.-x", {"-x": "1"}),
        ("microvm.params.rate", {"rate": 1}),
        ("microvm.params.rate", {"rate": "1\n2"}),
        ("microvm.params.rate", {"rate": "x" * (MAX_PARAM_CHARS + 1)}),
        ("microvm.mac", "52:54:00:AA:BB:CC"),
        ("microvm.mac", "53:54:00:aa:bb:cc"),
        ("microvm.mac", "52:54:00:aa:bb"),
        ("microvm.netdev", "tap0"),
        ("microvm.netdev", "dgram:unix:relative"),
        ("microvm.netdev", "dgram:unix:/a b"),
        ("microvm.netdev", "dgram:host"),
        ("microvm.netdev", "dgram:host:0"),
        ("microvm.netdev", "dgram:host:65536"),
        ("microvm.self_track", 1),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(key: str, value: object) -> None:
    """Each field refuses what is outside its range, and the error names it, the fault and the way out."""
    with pytest.raises(InvalidArgumentError) as caught:
        make(**{key.removesuffix(key.partition("params")[2]): value})
    assert caught.value.field == key
    assert key in caught.value.message
    assert key in caught.value.instance_remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a"),
        ("name", "a" * 63),
        ("memory_mib", 1),
        ("memory_mib", MAX_MEMORY_MIB),
        ("microvm.netdev", "dgram:unix:/run/net.sock"),
        ("microvm.netdev", "dgram:127.0.0.1:9000"),
        ("microvm.netdev", "dgram:[::1]:65535"),
        ("microvm.params", {}),
        ("microvm.params", {"a": ""}),
    ],
)
def test_values_at_the_edge_of_their_range_are_accepted(key: str, value: object) -> None:
    """The limits themselves are legal."""
    spec = make(**{key: value})
    assert getattr(spec.microvm if "." in key else spec, key.rpartition(".")[2]) == value


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("name = ", "spec"),
        ('extra = "-device vfio-pci"', "extra"),
        ('name = "web-1"', "uuid"),
        (f'name = "web-1"\nuuid = "{UUID}"\nmemory_mib = "64"', "memory_mib"),
    ],
)
def test_toml_that_is_no_description_is_refused(text: str, field: str) -> None:
    """Broken TOML, unknown keys, missing keys and wrong types are told apart by the field they name."""
    with pytest.raises(InvalidArgumentError) as caught:
        MachineSpec.from_toml(text)
    assert caught.value.field == field


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_refused_by_its_path(tmp_path: Path, content: bytes | None) -> None:
    """Loading names the file that is missing or is not text."""
    path = tmp_path / "spec.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"spec\.toml"):
        MachineSpec.load(path)


parts = st.builds(
    MicrovmSpec,
    program=st.from_regex(r"[a-z][a-z0-9-]{0,31}", fullmatch=True),
    params=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_-]{0,62}", fullmatch=True),
        st.text(max_size=MAX_PARAM_CHARS).filter(str.isprintable),
        max_size=4,
    ),
    mac=st.from_regex(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", fullmatch=True),
    netdev=st.sampled_from(["", "dgram:unix:/run/é.sock", "dgram:peer.example:9000"]),
    self_track=st.booleans(),
)
specs = st.builds(
    MachineSpec,
    name=st.from_regex(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True),
    uuid=st.uuids().map(str),
    memory_mib=st.integers(1, MAX_MEMORY_MIB),
    microvm=parts,
)


@given(specs)
def test_a_description_survives_toml(spec: MachineSpec) -> None:
    """Whatever is valid reads back equal, with the same digest."""
    again = MachineSpec.from_toml(spec.to_toml())
    assert again == spec
    assert again.digest() == spec.digest()
    assert hash(again) == hash(spec)


def test_the_digest_tells_every_difference_and_no_other() -> None:
    """Changing any field changes the digest; the order in which parameters were given does not."""
    base = make()
    other: dict[str, Any] = {
        "name": "web-2",
        "uuid": UUID.replace("0f", "1f"),
        "memory_mib": 65,
        "microvm.program": "writer",
        "microvm.params": {"rate": "11"},
        "microvm.mac": "52:54:00:12:34:57",
        "microvm.netdev": "dgram:a:1",
        "microvm.self_track": False,
    }
    digests = {make(**{key: value}).digest() for key, value in other.items()}
    assert len(digests | {base.digest()}) == len(other) + 1
    one, two = ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    assert make(**{"microvm.params": one}).digest() == make(**{"microvm.params": two}).digest()


def test_new_machines_have_identities_of_their_own() -> None:
    """Two fresh descriptions differ in UUID and network address, and the address is locally administered."""
    one, two = (new_spec("web", 8, "canary", {"rate": "1"}) for _ in range(2))
    assert one.uuid != two.uuid
    assert one.microvm is not None
    assert two.microvm is not None
    assert one.microvm.mac != two.microvm.mac
    assert int(one.microvm.mac[:2], 16) & 0b11 == 0b10
    assert one.microvm.params == {"rate": "1"}


PATHS = MachinePaths(home=Path("/m/web-1"), ram=Path("/r/u.ram"))
COMMON = [
    *(sys.executable, "-P", "-m", "vmferry.machines.microvm", "--name", "web-1", "--uuid", UUID),
    *("--memory-mib", "64", "--ram-file", "/r/u.ram"),
    *("--qmp", "/m/web-1/qmp.sock", "--serial-file", "/m/web-1/serial.log", "--mac", "52:54:00:12:34:56"),
]


@pytest.mark.parametrize(
    ("changes", "incoming", "tail"),
    [
        (
            {},
            False,
            ["--program", "canary", "--param", "rate=10", "--self-track", "on", "-S"],
        ),
        (
            {"microvm.params": {}, "microvm.self_track": False},
            False,
            ["--program", "canary", "--self-track", "off", "-S"],
        ),
        (
            {"microvm.netdev": "dgram:unix:/n", "microvm.params": {"b": "2 2", "a": "-S"}},
            True,
            [
                *("--netdev", "dgram:unix:/n", "--program", "canary", "--param", "a=-S", "--param", "b=2 2"),
                *("--self-track", "on", "-S", "--incoming", "defer"),
            ],
        ),
    ],
)
def test_the_command_line_by_example(changes: dict[str, Any], incoming: bool, tail: list[str]) -> None:
    """A description becomes exactly this command line; parameters cannot become options."""
    spec = make(**changes)
    assert render_command(spec, PATHS, incoming=incoming) == COMMON + tail


def test_a_socket_path_may_be_as_long_as_linux_allows_and_no_longer() -> None:
    """107 bytes pass; one more is refused, naming the setting and both lengths."""
    fixed = len(str(MachinePaths(home=Path("/x/web-1"), ram=Path("/r")).state_socket)) - 1
    root = "r" * (MAX_SOCKET_PATH_BYTES - fixed)
    fits = MachinePaths.of(Path("/" + root), Path("/r"), name="web-1", uuid=UUID)
    assert len(bytes(fits.state_socket)) == MAX_SOCKET_PATH_BYTES
    with pytest.raises(ConfigError, match="108 bytes") as caught:
        MachinePaths.of(Path("/r" + root), Path("/r"), name="web-1", uuid=UUID)
    assert caught.value.field == "run_dir"
