"""What any gRPC client finds at the two listeners of a running service."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.buf import find_buf
from tests.integration.hosts import World
from tests.integration.services import Host, Service, eventually_async, refusal
from tests.support import require
from vmferry.security.tls import open_channel
from vmferry.v1 import handoff_pb2
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.handoff_pb2_grpc import DestinationServiceStub
from vmferry.v1.migration_pb2_grpc import SourceServiceStub

pytestmark = pytest.mark.usefixtures("tidy")

SOURCE, DESTINATION = "vmferry.v1.SourceService", "vmferry.v1.DestinationService"


def both(world: World) -> list[tuple[Host, Service, str]]:
    return [(world.a, world.a.source, SOURCE), (world.b, world.b.dest, DESTINATION)]


def admin_channel(host: Host, service: Service) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(host.config.admin_target(service.role))


async def listed(channel: grpc.aio.Channel) -> set[str]:
    """The services that reflection lists."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    answer = await call.read()
    call.cancel()
    return {service.name for service in answer.list_services_response.service}


@pytest.mark.parametrize("who", ["a", "controller", "admin"])
async def test_everybody_with_a_certificate_may_ask_for_health(world: World, who: str) -> None:
    """On the data port the service says SERVING, by its name and for the whole, to every kind of identity."""
    for host, service, name in both(world):
        async with open_channel(service.address, host.identity, world.material(who)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for asked in ("", name):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=asked), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(service="vmferry.v1.Nothing"), timeout=5)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_tells_the_contract(world: World) -> None:
    """Over mutual TLS, reflection lists exactly what is served, and gives the descriptors."""
    for host, service, name in both(world):
        async with open_channel(service.address, host.identity, world.material("admin")) as channel:
            found = await listed(channel)
            assert name in found
            of_roles = {"source": ("Drain", "Events", "Update"), "dest": ("Clock",)}
            of_one = {
                role: {f"vmferry.v1.{one}Service" for one in services} for role, services in of_roles.items()
            }
            assert found & set.union(*of_one.values()) == of_one[service.role]
            assert found - {name} - of_one[service.role] <= {
                "vmferry.v1.RecoveryService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
                "grpc.reflection.v1.ServerReflection",
            }
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
            call: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([request])
            )
            answer = await call.read()
            call.cancel()
            assert answer.file_descriptor_response.file_descriptor_proto


async def test_the_admin_socket_shows_the_inside_and_serves_nothing_of_ours(world: World) -> None:
    """Channelz, health and reflection are there, for the socket's owner only; our methods are not."""
    for host, service, name in both(world):
        path = Path(host.config.admin_target(service.role).removeprefix("unix:"))
        assert mode(path) == 0o600
        async with admin_channel(host, service) as channel:
            channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)
            servers = (await channelz.GetServers(channelz_pb2.GetServersRequest(), timeout=5)).server
            assert servers
            assert not await listed(channel) & {SOURCE, DESTINATION}
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            calls: tuple[Awaitable[object], ...] = (
                SourceServiceStub(channel).ListMachines(pb.ListMachinesRequest(), timeout=5),
                DestinationServiceStub(channel).Negotiate(handoff_pb2.NegotiateRequest(), timeout=5),
            )
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_the_data_port_hides_the_inside(world: World) -> None:
    """Channelz, and any method that is not in the table, is refused to everybody, by name."""
    for host, service, _ in both(world):
        async with open_channel(service.address, host.identity, world.material("admin")) as channel:
            channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)
            error = await refusal(channelz.GetServers(channelz_pb2.GetServersRequest(), timeout=5))
            assert error.reason == "PERMISSION_DENIED"
            call: Any = channel.unary_unary
            made_up = call("/vmferry.v1.SourceService/Reboot")
            assert (await refusal(made_up(b"", timeout=5))).reason == "PERMISSION_DENIED"


async def test_no_connection_outlives_its_migration(world: World) -> None:
    """After migrations to and fro the services have no channel to each other any more: none leaks."""
    guest = await world.run()
    await world.assert_crosses(guest, world.a, world.b)
    await world.assert_crosses(guest, world.b, world.a)
    async with world.source(world.a) as stub:
        plan = pb.PlanMigrationRequest(
            machine=guest.id,
            destination=pb.Destination(host=world.b.identity.uri, address=world.b.dest.address),
        )
        await stub.PlanMigration(plan)
    async with admin_channel(world.a, world.a.source) as channel:
        channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)

        async def closed() -> bool:
            answer = await channelz.GetTopChannels(channelz_pb2.GetTopChannelsRequest(), timeout=5)
            return not [one for one in answer.channel if world.b.dest.address in one.data.target]

        await eventually_async(closed, "all channels to the destination are closed")


async def test_a_service_that_stops_says_so_first(world: World) -> None:
    """A watcher of health hears NOT_SERVING, and the process ends with 0; the socket goes with it."""
    service = world.a.dest
    async with open_channel(service.address, world.a.identity, world.material("controller")) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest(service=DESTINATION))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(service.stop())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await stopping == 0
        watching.cancel()
    assert not exists(world.a.config.admin_target("dest").removeprefix("unix:"))
    await service.start()


def exists(path: str) -> bool:
    return Path(path).exists()


async def test_any_client_calls_by_reflection_alone(world: World) -> None:
    """Without a line of ours, a generic client lists the services, reads machines, and is refused by name."""
    buf = find_buf()
    require(buf, "buf (npm @bufbuild/buf), on the PATH or named by VMFERRY_BUF")
    guest = await world.run()

    async def call(method: str, request: object = None) -> tuple[int | None, str, str]:
        tls = world.tls_dir("controller")
        process = await asyncio.create_subprocess_exec(
            *(str(buf), "curl", "--protocol", "grpc", "--reflect", "--data", json.dumps(request or {})),
            *("--cacert", str(tls / "ca.pem"), "--cert", str(tls / "tls.crt"), "--key", str(tls / "tls.key")),
            *("--servername", world.a.identity.server_name, f"https://{world.a.source.address}/{method}"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=world.root,
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, out.decode(), err.decode()

    code, out, err = await call(f"{SOURCE}/ListMachines")
    assert code == 0, err
    (machine,) = json.loads(out)["machines"]
    assert machine["uuid"] == guest.id
    assert machine["right"] == "MACHINE_RIGHT_OWNED"
    code, out, err = await call(f"{SOURCE}/GetMachine", {"machine": "nobody"})
    assert code != 0
    refused = json.loads(err)
    assert refused["code"] == "not_found"
    (info,) = [detail for detail in refused["details"] if detail["type"] == "google.rpc.ErrorInfo"]
    told = ErrorInfo.FromString(base64.b64decode(info["value"] + "=="))
    assert (told.reason, told.domain) == ("MACHINE_NOT_FOUND", "vmferry")
