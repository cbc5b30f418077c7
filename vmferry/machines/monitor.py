"""A machine's command socket: one QMP connection to one process, opened when needed.

Promise: a command goes to the process and the machine it is meant for, or fails. A connection that was lost
is opened again once; a command whose answer was lost is sent again only if the caller says that twice is as
good as once. Whatever goes wrong comes out as MachineDeadError (the process is gone) or MachineFailedError,
in the words of the hypervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qemu.qmp import ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate

from vmferry.errors import MachineDeadError, MachineFailedError
from vmferry.machines.paths import MachinePaths
from vmferry.machines.process import ProcessIdentity
from vmferry.machines.spec import MachineSpec

_DYING_S: Final = 1.0
"""A process that is being killed closes its sockets before it counts as ended; so long we wait to tell."""
_START_POLL_S: Final = 0.01
_UCRED: Final = struct.Struct("3i")


class _LineClient(QMPClient):
    """Ends each command with a line break, which the micro-VM waits for and QEMU skips as white space."""

    def _do_send(self, msg: Message) -> None:
        super()._do_send(msg)
        assert self._writer is not None
        self._writer.write(b"\n")


class Monitor:
    """Sends commands to one machine's process, one at a time (callers take turns)."""

    def __init__(
        self,
        spec: MachineSpec,
        paths: MachinePaths,
        process: ProcessIdentity,
        address: Path,
        *,
        qmp_timeout_s: float,
    ) -> None:
        self._spec = spec
        self._paths = paths
        self._process = process
        self._address = address
        self._timeout_s = qmp_timeout_s
        self._client: QMPClient | None = None

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        repeatable: bool = False,
        then: str = "",
    ) -> Any:
        """Send a command and return its answer.

        Args:
            command: its name in QMP.
            arguments: its arguments.
            repeatable: whether to send it again when the connection was lost before the answer came.
            then: a question that is sent right behind it, whose answer is returned instead; the hypervisor comes to
                it when it is through with the command. For when the guest's pause waits: it spares a round trip.

        Raises:
            MachineFailedError: the hypervisor answered with an error (the metadata's ``error_class`` is then
                QMP's class), not in time, or cannot be reached, or the answer was lost and may not be asked
                for again.
            MachineDeadError: the process has ended.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    return await self._send(command, arguments, then)
                except (ExecInterruptedError, EOFError) as error:
                    await self.close()
                    if not repeatable or not self._process.alive():
                        raise await self._lost(command, error) from error
                    return await self._send(command, arguments, then)
        except TimeoutError as error:
            # A late answer must not be met by a later command, so the connection goes.
            await self.close()
            raise self._failure(command, f"no answer within {self._timeout_s:g} s") from error
        except ExecuteError as error:
            raise self._failure(command, str(error), error_class=error.error_class) from error
        except (QMPError, OSError, EOFError) as error:
            await self.close()
            raise await self._lost(command, error) from error

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until a process that was just started answers.

        Raises:
            MachineFailedError: it ended, or did not answer in time; with the last lines of its log.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._answers():
                    if not self._process.alive():
                        raise self._failure(
                            "start", f"the process ended; its log ends with:\n{self._paths.log_tail()}"
                        )
                    await asyncio.sleep(_START_POLL_S)
        except TimeoutError as error:
            words = f"no answer within {timeout_s:g} s; its log ends with:\n{self._paths.log_tail()}"
            raise self._failure("start", words) from error

    async def close(self) -> None:
        """Close the connection, if there is one."""
        client, self._client = self._client, None
        if client is not None:
            # It raises what ended the connection, which whoever lost a command by it was told already.
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()

    async def _answers(self) -> bool:
        try:
            await self._connected()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (QMPError, OSError, EOFError) as error:
            if await self._process.wait_ended(_DYING_S):
                return False
            raise self._failure("start", str(error)) from error
        return True

    async def _send(self, command: str, arguments: Mapping[str, Any] | None, then: str) -> Any:
        client = await self._connected()
        if not then:
            return await client.execute(command, arguments)
        # Both answers are waited for, whatever the first one is, so that no later command meets the second.
        done, answer = await asyncio.gather(
            client.execute(command, arguments), client.execute(then), return_exceptions=True
        )
        for one in (done, answer):
            if isinstance(one, BaseException):
                raise one
        return answer

    async def _connected(self) -> QMPClient:
        if self._client is not None:
            if self._client.runstate is Runstate.RUNNING:
                return self._client
            await self.close()
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.setblocking(False)
            await asyncio.get_running_loop().sock_connect(link, str(self._address))
            self._check_peer(link)
            client = _LineClient()
            # The client keeps every event for a listener that nobody reads here.
            client.events.event_filter = lambda _event: False
            await client.connect(link)
        except BaseException:
            link.close()
            raise
        self._client = client
        await self._check_identity(client)
        return client

    def _check_peer(self, link: socket.socket) -> None:
        """Refuse to talk to any process but the recorded one."""
        credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, _, _ = _UCRED.unpack(credentials)
        if pid != self._process.pid:
            words = f"process {pid} answers at its socket, but the machine is process {self._process.pid}"
            raise self._failure("connect", words)

    async def _check_identity(self, client: QMPClient) -> None:
        """Refuse to talk to any machine but the described one."""
        answer = await client.execute("query-uuid")
        found = answer.get("UUID") if isinstance(answer, dict) else None
        if found != self._spec.uuid:
            await self.close()
            raise self._failure("query-uuid", f"it says it is {found}, not {self._spec.uuid}")

    async def _lost(self, command: str, error: Exception) -> MachineFailedError | MachineDeadError:
        if await self._process.wait_ended(_DYING_S):
            return MachineDeadError(
                f"machine {self._spec.name}: its process {self._process.pid} has ended",
                **self._facts(command),
            )
        return self._failure(command, f"the connection was lost ({error or type(error).__name__})")

    def _failure(self, command: str, words: str, *, error_class: str = "") -> MachineFailedError:
        return MachineFailedError(
            f"machine {self._spec.name}: {command} failed: {words}",
            error_class=error_class,
            **self._facts(command),
        )

    def _facts(self, command: str) -> dict[str, str]:
        return {"machine": self._spec.uuid, "command": command, "pid": str(self._process.pid)}
