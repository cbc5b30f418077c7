"""What the kernel says that connections have carried."""

from __future__ import annotations

import socket
import threading

from vmferry.rpc.connections import Carried, Connections, End

SENT = 8 * 1024 * 1024


def swallow(connection: socket.socket, size: int) -> None:
    while size > 0:
        size -= len(connection.recv(1024 * 1024))


def found(connections: Connections, connection: socket.socket) -> Carried | None:
    return connections.look().get(End(str(connection.getsockname()), "127.0.0.1"))


def test_what_a_connection_has_carried_is_known() -> None:
    """Bytes that the other kernel acknowledged; files and sockets of other kinds are passed by and stay open."""
    connections = Connections()
    other, far = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server, other, far:
        with socket.create_connection(server.getsockname()) as sender:
            receiver, _ = server.accept()
            with receiver:
                before = found(connections, sender)
                assert before is not None
                taker = threading.Thread(target=swallow, args=(receiver, SENT))
                taker.start()
                sender.sendall(bytes(SENT))
                taker.join()
                after = found(connections, sender)
                assert after is not None
                assert after.acked_bytes - before.acked_bytes > SENT / 2  # the last are on their way
                assert after.carrying_s >= before.carrying_s
        other.send(b"open")
        assert far.recv(4) == b"open"


def test_connections_that_come_and_go_are_noticed() -> None:
    """One that was closed is not told of, and makes the next one be found."""
    connections = Connections()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as first:
            assert found(connections, first) is not None
            closed = End(str(first.getsockname()), "127.0.0.1")
        with socket.create_connection(server.getsockname()) as second:
            assert closed not in connections.look()
            assert found(connections, second) is not None
