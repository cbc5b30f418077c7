"""The listeners of a service: who gets in, and who does not."""

from __future__ import annotations

import hashlib
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support import require
from vmferry.errors import ConfigError, InternalError, PermissionDeniedError, UnauthenticatedError
from vmferry.rpc.interceptors import current_caller, current_caller_key
from vmferry.rpc.server import RunningServers, start_server
from vmferry.rpc.status import from_rpc_error
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity
from vmferry.security.tls import TlsFiles, TlsMaterial, open_channel, server_credentials

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SOURCE_SERVICE = "vmferry.v1.SourceService"
HOST = Identity.parse("spiffe://example.org/vmhost/a")
PEER = Identity.parse("spiffe://example.org/vmhost/b")
ADMIN = Identity.parse("spiffe://example.org/admin/eve")


def _who_services(server: grpc.aio.Server) -> Sequence[str]:
    """A service under a real service's name, as only those are allowed, that answers who calls."""

    async def who(_request: bytes, _context: Any) -> bytes:
        return f"{current_caller()} {current_caller_key().hex()}".encode()

    async def crash(_request: bytes, _context: Any) -> bytes:
        raise RuntimeError("swordfish")

    handlers = {
        "GetMachine": grpc.unary_unary_rpc_method_handler(who),
        "ListMachines": grpc.unary_unary_rpc_method_handler(crash),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SOURCE_SERVICE, handlers),))
    return [SOURCE_SERVICE]


@dataclass
class Site:
    """Certificates of one trust domain, and servers to be stopped."""

    directory: Path
    stack: AsyncExitStack

    def material(self, identity: Identity) -> TlsMaterial:
        """The certificate of an identity."""
        return TlsFiles(self.directory / identity.name).load()

    async def serve(self, **overrides: Any) -> RunningServers:
        """Start the servers of HOST."""
        arguments: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "credentials": server_credentials(TlsFiles(self.directory / HOST.name)),
            "own": HOST,
            "services": _who_services,
            "admin_target": f"unix:{self.directory}/admin.sock",
            "role": "source",
        }
        servers = await start_server(**(arguments | overrides))
        self.stack.push_async_callback(servers.stop, 0)
        return servers

    @asynccontextmanager
    async def channel(self, servers: RunningServers, caller: Identity) -> AsyncIterator[grpc.aio.Channel]:
        """A channel of a caller to HOST."""
        async with open_channel(f"127.0.0.1:{servers.port}", HOST, self.material(caller)) as channel:
            yield channel


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    init_authority(directory / "ca", "example.org")
    for identity in (HOST, PEER, ADMIN):
        issue(directory / "ca", identity, directory / identity.name)
    return directory


@pytest.fixture
async def site(certificates: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(certificates, stack)


async def _refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_handler_learns_the_caller_from_the_certificate(site: Site) -> None:
    """The identity and the key hash a handler sees are those of the client's certificate."""
    servers = await site.serve()
    async with site.channel(servers, ADMIN) as channel:
        answer = await channel.unary_unary(f"/{SOURCE_SERVICE}/GetMachine")(b"", timeout=10)
    key = x509.load_pem_x509_certificate(site.material(ADMIN).cert_pem).public_key()
    digest = hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
    assert answer.decode() == f"{ADMIN} {digest}"


@pytest.mark.parametrize("method", [f"/{SOURCE_SERVICE}/GetMachine", f"/{SOURCE_SERVICE}/Nonsense", "/x.Y/Z"])
async def test_caller_without_permission_is_denied_for_known_and_unknown_methods(
    site: Site, method: str
) -> None:
    """A host may not call the scheduler's methods, and does not learn which methods exist."""
    servers = await site.serve()
    async with site.channel(servers, PEER) as channel:
        error = await _refusal(channel.unary_unary(method)(b"", timeout=10))
    assert type(from_rpc_error(error)) is PermissionDeniedError


async def test_unserved_method_of_the_table_is_unimplemented_for_those_allowed(site: Site) -> None:
    """Who is allowed to call a method is told that this service has it not."""
    servers = await site.serve()
    async with site.channel(servers, ADMIN) as channel:
        error = await _refusal(channel.unary_unary(f"/{SOURCE_SERVICE}/PlanMigration")(b"", timeout=10))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_foreign_trust_domain_is_unauthenticated(site: Site) -> None:
    """A certificate that TLS accepts but that is of no identity this host knows is refused before the method."""
    servers = await site.serve(own=Identity.parse("spiffe://example.net/vmhost/a"))
    async with site.channel(servers, ADMIN) as channel:
        error = await _refusal(channel.unary_unary(f"/{SOURCE_SERVICE}/GetMachine")(b"", timeout=10))
    assert type(from_rpc_error(error)) is UnauthenticatedError


@pytest.mark.parametrize("client", ["plaintext", "no certificate"])
async def test_data_port_speaks_mutual_tls_only(site: Site, client: str) -> None:
    """Without TLS, or without a certificate, not even health answers on the data port."""
    servers = await site.serve()
    address = f"127.0.0.1:{servers.port}"
    if client == "plaintext":
        channel = grpc.aio.insecure_channel(address)
    else:
        credentials = grpc.ssl_channel_credentials(site.material(HOST).ca_pem)
        options = (("grpc.ssl_target_name_override", HOST.server_name),)
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    async with channel:
        error = await _refusal(
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        )
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_crash_is_internal_through_all_interceptors(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole chain turns a crash into an InternalError without its text; the log says who called what."""
    servers = await site.serve()
    async with site.channel(servers, ADMIN) as channel:
        error = await _refusal(channel.unary_unary(f"/{SOURCE_SERVICE}/ListMachines")(b"", timeout=10))
    assert type(from_rpc_error(error)) is InternalError
    assert "swordfish" not in repr(error)
    (event,) = [record.msg for record in caplog.records if record.name == "vmferry.rpc.interceptors"]
    assert (event["method"], event["caller"]) == (f"/{SOURCE_SERVICE}/ListMachines", str(ADMIN))


async def test_health_watch_through_all_interceptors(site: Site) -> None:
    """Watch on the data port says SERVING, and NOT_SERVING when the service stops."""
    servers = await site.serve()
    async with site.channel(servers, PEER) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SOURCE_SERVICE), timeout=20
        )
        assert (await watch.read()).status == SERVING
        await servers.stop(0.5)
        assert (await watch.read()).status == NOT_SERVING


async def test_reflection_lists_the_services(site: Site) -> None:
    """A tool such as grpcurl can list what the data port serves."""
    servers = await site.serve()
    async with site.channel(servers, ADMIN) as channel:
        assert SOURCE_SERVICE in await _listed(channel)


async def _listed(channel: grpc.aio.Channel) -> set[str]:
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    responses = [response async for response in stub.ServerReflectionInfo(requests, timeout=10)]
    return {service.name for service in responses[0].list_services_response.service}


async def test_admin_socket_is_private_and_has_the_tools(site: Site) -> None:
    """The admin socket is 0600, offers health, reflection and channelz and no service, and goes away at the end."""
    path = site.directory / "admin.sock"
    servers = await site.serve()
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(service=SOURCE_SERVICE), timeout=10)
        assert answer.status == SERVING
        found = await channelz_pb2_grpc.ChannelzStub(channel).GetServers(
            channelz_pb2.GetServersRequest(), timeout=10
        )
        assert found.server
        assert await _listed(channel) == {
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "grpc.channelz.v1.Channelz",
        }
        error = await _refusal(channel.unary_unary(f"/{SOURCE_SERVICE}/GetMachine")(b"", timeout=10))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    await servers.stop(0)
    assert not path.exists()


async def test_stale_admin_socket_is_replaced(site: Site) -> None:
    """The socket that a killed service left behind does not stop the next start."""
    path = site.directory / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    await site.serve()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)


async def test_live_admin_socket_is_not_taken_away(site: Site) -> None:
    """A second service on the same socket is refused, and the first one goes on answering."""
    path = site.directory / "admin.sock"
    await site.serve()
    with pytest.raises(ConfigError, match="another process listens") as caught:
        await site.serve()
    assert caught.value.field == "source_admin_listen"
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)


async def test_file_in_the_way_of_the_admin_socket_is_kept(site: Site, tmp_path: Path) -> None:
    """A path that is no socket is refused, not removed."""
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match="not a socket"):
        await site.serve(admin_target=f"unix:{path}")
    assert path.read_text() == "data"


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
async def test_loopback_admin_port_is_allowed(site: Site, address: str) -> None:
    """A loopback port may stand in for the socket."""
    require("::1" not in address or _has_ipv6(), "no IPv6 loopback")
    await site.serve(admin_target=address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:0",
        "[::]:0",
        "192.0.2.1:7611",
        "example.org:7611",
        "dns:///127.0.0.1:0",
        "unix-abstract:x",
        "127.0.0.1",
    ],
)
async def test_admin_listener_that_others_could_reach_is_refused(site: Site, address: str) -> None:
    """An admin listener that is not loopback or a socket file stops the start, naming the setting."""
    with pytest.raises(ConfigError, match="not allowed") as caught:
        await site.serve(admin_target=address)
    assert caught.value.field == "source_admin_listen"


async def test_too_long_socket_path_is_refused(site: Site) -> None:
    """A path that does not fit a socket address is named as the reason."""
    with pytest.raises(ConfigError, match="too long"):
        await site.serve(admin_target=f"unix:/tmp/{'x' * 120}")


async def test_port_in_use_is_refused(site: Site) -> None:
    """Two services never share a port, and the error names the setting and leaves nothing behind."""
    servers = await site.serve()
    with pytest.raises(ConfigError, match="cannot listen") as caught:
        await site.serve(
            listen=f"127.0.0.1:{servers.port}", admin_target=f"unix:{site.directory}/second.sock"
        )
    assert caught.value.field == "source_listen"
    assert not (site.directory / "second.sock").exists()
