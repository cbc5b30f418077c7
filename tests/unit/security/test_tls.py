"""Real handshakes over loopback: who gets in, who does not, and what happens when files change."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.security.crafting import (
    ADMIN,
    CONTROLLER,
    HOST_A,
    HOST_B,
    SIGNING,
    Authority,
    key_pem,
    pem,
    write_folder,
)
from tests.unit.security.tls_server import STREAM, UNARY
from vmferry.errors import ConfigError, PeerIdentityError
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity, Kind
from vmferry.security.tls import (
    CHANNEL_OPTIONS,
    SERVER_OPTIONS,
    TlsFiles,
    TlsMaterial,
    is_identity_mismatch,
    open_channel,
    server_credentials,
)
from vmferry.security.tls13 import RSA_ONLY_SUITE, VARIABLE

ROOT = Path(__file__).parents[3]
DEADLINE = 60.0
DATA, HEADERS, SETTINGS = 0, 1, 4
AUTHORITY = Authority()
KEY = ec.generate_private_key(ec.SECP256R1())


@dataclass
class Server:
    """The server of tls_server.py, seen from outside."""

    process: asyncio.subprocess.Process
    port: int
    directory: Path
    log: Path

    @property
    def address(self) -> str:
        """Where to connect."""
        return f"127.0.0.1:{self.port}"

    async def next_call(self) -> dict[str, str]:
        """What the server says about the next call it was asked for."""
        assert self.process.stdout is not None
        found: dict[str, str] = json.loads(await asyncio.wait_for(self.process.stdout.readline(), DEADLINE))
        return found


@asynccontextmanager
async def running(directory: Path, *flags: str) -> AsyncIterator[Server]:
    """Serve ``directory`` in a process of its own, which ends with this context."""
    log = directory.parent / f"{directory.name}.log"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.unit.security.tls_server", str(directory), *flags,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=stderr, cwd=ROOT, env=environment,
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE)
        assert line, log.read_text()
        yield Server(process, int(line), directory, log)
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), DEADLINE)
        except TimeoutError:
            process.kill()
            await process.wait()


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """Host b, as it should be."""
    directory = tmp_path_factory.mktemp("tls") / "b"
    async with running(write_folder(directory, AUTHORITY.pem, AUTHORITY.host(HOST_B, key=KEY), KEY)) as found:
        yield found


def material(
    certificate: x509.Certificate, *, identity: Identity = CONTROLLER, ca_pem: bytes = AUTHORITY.pem
) -> TlsMaterial:
    """Material that nothing has checked, as an attacker has it."""
    return TlsMaterial(
        ca_pem, pem(certificate), key_pem(KEY), identity, datetime.now(UTC) + timedelta(days=1)
    )


def controller() -> TlsMaterial:
    return material(AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY))


async def call(channel: grpc.aio.Channel, request: bytes = b"", **arguments: Any) -> dict[str, str]:
    """Ask the server who is calling, once, on a channel that is closed afterwards."""
    async with channel:
        answer: Awaitable[bytes] = channel.unary_unary(UNARY)(request, timeout=DEADLINE, **arguments)
        found: dict[str, str] = json.loads(await answer)
        return found


async def refused(channel: grpc.aio.Channel, **arguments: Any) -> grpc.aio.AioRpcError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, **arguments)
    return caught.value


def client_context(directory: Path, *, certificate: bool = True) -> ssl.SSLContext:
    """A client that is not gRPC, with the files of a folder."""
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return context


def shake_hands(port: int, context: ssl.SSLContext, request: bytes = b"") -> tuple[str | None, int]:
    """Connect, send the HTTP/2 preface, and wait for the server's answer: version, serial of its certificate.

    The answer matters: a TLS 1.3 client has finished its handshake before the server looks at its certificate.
    """
    with (
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as plain,
        context.wrap_socket(plain, server_hostname=HOST_B.server_name) as secure,
        secure.makefile("rb") as answer,
    ):
        secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS) + request)
        wanted = HEADERS if request else SETTINGS
        kind = None
        while kind != wanted:
            head = answer.read(9)
            if not head:
                raise ConnectionResetError("the server closed the connection without an answer")
            kind = head[3]
            answer.read(int.from_bytes(head[:3], "big"))
        certificate = secure.getpeercert(binary_form=True)
        assert certificate is not None
        return secure.version(), x509.load_der_x509_certificate(certificate).serial_number


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A controller's folder."""
    return write_folder(tmp_path / "c", AUTHORITY.pem, AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY), KEY)


async def test_a_controller_gets_in(server: Server) -> None:
    """Mutual TLS 1.3 with the right certificates works, and the server knows who called."""
    answer = await call(open_channel(server.address, HOST_B, controller()))
    assert (answer["caller"], answer["tls"]) == (CONTROLLER.uri, "TLSv1.3")


async def test_each_channel_has_its_own_connection(server: Server) -> None:
    """Two channels to one host with the same arguments do not share a connection."""
    first = open_channel(server.address, HOST_B, controller())
    async with first:
        peers = {json.loads(await first.unary_unary(UNARY)(b"", timeout=DEADLINE))["peer"] for _ in range(2)}
        assert len(peers) == 1
        peers.add((await call(open_channel(server.address, HOST_B, controller())))["peer"])
    assert len(peers) == 2


async def test_plaintext_is_refused(server: Server) -> None:
    """A client without TLS gets no answer of any method."""
    error = await refused(grpc.aio.insecure_channel(server.address))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_tls_13_is_accepted_and_less_is_not(server: Server, folder: Path) -> None:
    """A client that differs in nothing but the version of TLS is refused in the handshake."""
    context = client_context(folder)
    assert (await asyncio.to_thread(shake_hands, server.port, context))[0] == "TLSv1.3"
    context = client_context(folder)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.to_thread(shake_hands, server.port, context)


async def test_tls_12_is_refused_by_the_second_line_too(tmp_path: Path, folder: Path) -> None:
    """Without the lock-out a TLS 1.2 handshake succeeds (so it is the lock-out that refuses), but no call does."""
    certificate = AUTHORITY.host(HOST_B, key=KEY)
    headers = {
        ":method": "POST", ":scheme": "https", ":path": UNARY, ":authority": HOST_B.server_name,
        "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    request = frame(HEADERS, 0x4, 1, block) + frame(DATA, 0x1, 1, bytes(5))
    async with running(
        write_folder(tmp_path / "b", AUTHORITY.pem, certificate, KEY), "--let-tls12-in"
    ) as server:
        context = client_context(folder)
        await asyncio.to_thread(shake_hands, server.port, context, request)
        seen = await server.next_call()
        assert (seen["tls"], seen["reason"]) == ("TLSv1.3", "")
        context = client_context(folder)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        version, _ = await asyncio.to_thread(shake_hands, server.port, context, request)
        seen = await server.next_call()
    assert (version, seen["tls"], seen["reason"]) == ("TLSv1.2", "TLSv1.2", "UNAUTHENTICATED")


async def test_no_client_certificate(server: Server, folder: Path) -> None:
    """A client that trusts the server but shows no certificate is refused in the handshake."""
    credentials = grpc.ssl_channel_credentials(AUTHORITY.pem)
    options = [("grpc.ssl_target_name_override", HOST_B.server_name)]
    error = await refused(grpc.aio.secure_channel(server.address, credentials, options=options))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.to_thread(shake_hands, server.port, client_context(folder, certificate=False))


EXPIRED = timedelta(hours=-1)


@pytest.mark.parametrize(
    ("certificate", "code"),
    [
        (Authority().leaf(uris=[CONTROLLER.uri], key=KEY), "UNAVAILABLE"),
        (AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY, end=EXPIRED), "UNAVAILABLE"),
        (AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY, start=-EXPIRED), "UNAVAILABLE"),
        (AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY, purposes=SIGNING), "UNAVAILABLE"),
        (AUTHORITY.leaf(uris=["spiffe://other.org/controller/scheduler"], key=KEY), "UNAUTHENTICATED"),
        (AUTHORITY.leaf(uris=[CONTROLLER.uri, ADMIN.uri], key=KEY), "UNAUTHENTICATED"),
        (AUTHORITY.leaf(uris=[], key=KEY, common_name=CONTROLLER.uri), "UNAUTHENTICATED"),
        (AUTHORITY.leaf(uris=[], dns=[HOST_A.server_name], key=KEY), "UNAUTHENTICATED"),
        (AUTHORITY.leaf(uris=[HOST_A.uri], dns=["*.vmhost.example.org"], key=KEY), "UNAUTHENTICATED"),
        (
            AUTHORITY.leaf(
                uris=[CONTROLLER.uri], key=KEY, constraints=x509.BasicConstraints(ca=True, path_length=None)
            ),
            "UNAUTHENTICATED",
        ),
        (AUTHORITY.host(HOST_A, key=KEY), "PERMISSION_DENIED"),
    ],
    ids=[
        "other CA", "expired", "not yet valid", "ticket certificate", "other trust domain", "two identities",
        "common name only", "DNS name only", "wildcard", "CA as leaf", "host",
    ],
)  # fmt: skip
async def test_unfit_callers(server: Server, certificate: x509.Certificate, code: str) -> None:
    """Each is refused, by TLS where TLS can tell and by the authorisation where it cannot."""
    error = await refused(open_channel(server.address, HOST_B, material(certificate)))
    assert error.code().name == code
    assert not is_identity_mismatch(error)


async def test_another_host_is_refused_by_the_client(server: Server) -> None:
    """A trusted host that is not the expected one is refused before a byte of the call is sent, and recognised."""
    error = await refused(open_channel(server.address, HOST_A, controller()))
    assert is_identity_mismatch(error)


async def test_options_cannot_change_whom_a_channel_trusts(server: Server) -> None:
    """The expected identity stands whatever options the opener gives."""
    options = [
        ("grpc.ssl_target_name_override", HOST_B.server_name),
        ("grpc.default_authority", HOST_B.server_name),
    ]
    error = await refused(open_channel(server.address, HOST_A, controller(), options=options))
    assert is_identity_mismatch(error)


async def test_a_server_of_another_authority(server: Server) -> None:
    """A server whose authority the client does not trust is unreachable, not a wrong host."""
    stranger = material(AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY), ca_pem=Authority().pem)
    error = await refused(open_channel(server.address, HOST_B, stranger))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert not is_identity_mismatch(error)


async def test_nobody_there() -> None:
    """A port where nobody listens is unreachable, not a wrong host."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        error = await refused(open_channel(f"127.0.0.1:{reserved.getsockname()[1]}", HOST_B, controller()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert not is_identity_mismatch(error)


@pytest.mark.parametrize("expected", [ADMIN, CONTROLLER, Identity("other.org", Kind.VMHOST, "b")], ids=str)
def test_only_hosts_of_the_own_domain_can_be_expected(expected: Identity) -> None:
    """A channel to what cannot be a server for us is never opened."""
    with pytest.raises(PeerIdentityError):
        open_channel("127.0.0.1:1", expected, controller())


@pytest.mark.parametrize(
    "arguments",
    [{"request": b"x" * (4 * 1024 * 1024 + 1)}, {"metadata": (("x-long", "x" * 16_384),)}],
    ids=["message", "metadata"],
)
async def test_sizes_are_bounded(server: Server, arguments: dict[str, Any]) -> None:
    """A message or header beyond its limit is refused, always, and the port goes on serving."""
    for _ in range(4):
        big = open_channel(
            server.address, HOST_B, controller(), options=[("grpc.max_send_message_length", -1)]
        )
        assert (await refused(big, **arguments)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await call(open_channel(server.address, HOST_B, controller()))


def test_the_server_permits_the_clients_pings() -> None:
    """A client that pings as often as it is told must not be sent away for it."""
    client, host = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    assert client["grpc.keepalive_time_ms"] >= 2 * host["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_permit_without_calls"] == host["grpc.keepalive_permit_without_calls"] == 1


@pytest.fixture
async def rotating(tmp_path: Path) -> AsyncIterator[tuple[Server, Path]]:
    """Host b with files of a real authority, whose folder comes along."""
    init_authority(tmp_path / "ca", "example.org")
    issue(tmp_path / "ca", HOST_B, tmp_path / "b")
    issue(tmp_path / "ca", HOST_A, tmp_path / "a")
    async with running(tmp_path / "b") as found:
        yield found, tmp_path


def serial(directory: Path) -> int:
    return x509.load_pem_x509_certificate((directory / "tls.crt").read_bytes()).serial_number


async def test_renewed_files_are_used_by_the_next_handshake(rotating: tuple[Server, Path]) -> None:
    """After a renewal new connections see the new certificate, and a stream that was open goes on."""
    server, folders = rotating
    context = client_context(folders / "a")
    before = serial(server.directory)
    async with open_channel(server.address, HOST_B, TlsFiles(folders / "a").load()) as channel:
        stream = channel.stream_stream(STREAM)(timeout=60)
        await stream.write(b"before")
        assert await stream.read() == b"before"
        assert (await asyncio.to_thread(shake_hands, server.port, context))[1] == before

        issue(folders / "ca", HOST_B, server.directory, force=True)
        after = serial(server.directory)
        assert after != before
        assert (await asyncio.to_thread(shake_hands, server.port, context))[1] == after

        await stream.write(b"after")
        assert await stream.read() == b"after"
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK


def _break_certificate(directory: Path) -> None:
    (directory / "tls.crt").write_bytes(b"nothing")


def _break_pair(directory: Path) -> None:
    (directory / "tls.key").write_bytes(key_pem(ec.generate_private_key(ec.SECP256R1())))


def _remove_authorities(directory: Path) -> None:
    (directory / "ca.pem").unlink()


def _open_key(directory: Path) -> None:
    (directory / "tls.key").chmod(0o644)


@pytest.mark.parametrize("damage", [_break_certificate, _break_pair, _remove_authorities, _open_key])
async def test_unusable_files_leave_the_old_ones_in_use(
    rotating: tuple[Server, Path], damage: Callable[[Path], None]
) -> None:
    """A renewal that went wrong is logged once, does not end the service, and is healed by the next one."""
    server, folders = rotating
    context = client_context(folders / "a")
    before = serial(server.directory)
    damage(server.directory)
    for _ in range(3):
        assert (await asyncio.to_thread(shake_hands, server.port, context))[1] == before
    log = server.log.read_text()
    assert log.count("certificate files unusable") == 1
    assert str(server.directory) in log
    issue(folders / "ca", HOST_B, server.directory, force=True)
    assert (await asyncio.to_thread(shake_hands, server.port, context))[1] == serial(server.directory)


async def test_a_withdrawn_authority_is_not_trusted_by_the_next_handshake(
    rotating: tuple[Server, Path],
) -> None:
    """Replacing ca.pem shuts the old authority's clients out, without a restart."""
    server, folders = rotating
    old = TlsFiles(folders / "a").load()
    await call_stream(open_channel(server.address, HOST_B, old))
    init_authority(folders / "new", "example.org")
    issue(folders / "new", HOST_B, server.directory, force=True)
    trusting_both = TlsMaterial(
        old.ca_pem + (folders / "new" / "ca.pem").read_bytes(),
        old.cert_pem, old.key_pem, old.identity, old.not_after,
    )  # fmt: skip
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_stream(open_channel(server.address, HOST_B, trusting_both))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def call_stream(channel: grpc.aio.Channel) -> None:
    """Send one message through a stream and get it back."""
    async with channel:
        stream = channel.stream_stream(STREAM)(timeout=DEADLINE)
        await stream.write(b"hello")
        assert await stream.read() == b"hello"


def test_a_service_needs_a_hosts_files(tmp_path: Path) -> None:
    """A controller's certificate cannot be served with, and the error says so at the start."""
    certificate = AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY)
    files = TlsFiles(write_folder(tmp_path / "c", AUTHORITY.pem, certificate, KEY))
    with pytest.raises(ConfigError, match="a service needs a host's"):
        server_credentials(files)
    with pytest.raises(ConfigError, match="No such file"):
        server_credentials(TlsFiles(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("first", "inherited", "outcome"),
    [
        ("", None, "set"),
        ("", "HIGH", "set"),
        ("import grpc", None, "InternalError"),
        ("import grpc", "HIGH", "InternalError"),
        ("import grpc", RSA_ONLY_SUITE, "set"),
    ],
)
def test_enforcing_tls_13(first: str, inherited: str | None, outcome: str) -> None:
    """The lock-out is set before gRPC is loaded; coming too late is an error, not a silent gap."""
    code = (
        f"{first}\nimport os, sys\nfrom vmferry.security.tls13 import enforce_tls13\n"
        f"loaded = 'grpc' in sys.modules\ntry:\n    enforce_tls13()\n"
        f"except Exception as error:\n    print(type(error).__name__)\n"
        f"else:\n    assert ('grpc' in sys.modules) == loaded\n"
        f"    print('set' if os.environ[{VARIABLE!r}] == {RSA_ONLY_SUITE!r} else 'not set')"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if inherited is not None:
        environment[VARIABLE] = inherited
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout.strip() == outcome
