"""One lane: a stream on a connection of its own, reopened as often as it takes.

::

    thread of the lane      connect ──> hear acknowledgements ──> ended, or lost: connect again
    gRPC's thread           fetch a frame, number it, send it  ──> the next one

Promise: a frame is numbered in the thread that sends it and kept until it is acknowledged, so that a connection that
breaks in any moment loses none; of two connections of a lane only the newer one takes frames; a lane that was told to
close leaves no thread behind.

gRPC's asyncio interface would encrypt and send on the event loop, with Python's lock held, and wake the loop for each
frame and each acknowledgement; its other interface, used here, does so in the lane's own threads without that lock.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from xxhash import xxh3_128, xxh3_128_digest

from vmferry.errors import PeerUnreachableError, StreamBrokenError
from vmferry.rpc.status import translated
from vmferry.rpc.tracing import start_client_span
from vmferry.transfer.frames import BuiltChunk
from vmferry.transfer.numbering import SendingLane, Totals
from vmferry.transfer.wire import PieceFrame, encode_piece, stream_bytes
from vmferry.v1 import transfer_pb2

if TYPE_CHECKING:
    from vmferry.transfer.lanes import Lanes, Supply

_FIRST_BACKOFF_S: Final = 0.05
_LONGEST_BACKOFF_S: Final = 2.0
_GOODBYE_S: Final = 1.0
_TRANSFER: Final = "/vmferry.v1.DestinationService/Transfer"

Frame = BuiltChunk | PieceFrame | transfer_pb2.DeviceState


@dataclass
class _Session:
    """One connection of a lane."""

    call: Any = None
    """The stream; gRPC has no type for what it is."""
    welcomed: bool = False
    over: bool = False
    """It takes nothing more."""
    blocked_s: float = 0.0
    """How long it could not take a chunk, since the last one was made for it."""


class Lane:
    """One lane. Its state is guarded by the lock of all lanes; what numbers frames, by the one to fetch them."""

    def __init__(self, number: int, lanes: Lanes) -> None:
        self.number = number
        self.welcomed = False
        self.finishing = False
        """Its end is to follow what waits."""
        self.ended = False
        """The destination has agreed to its end."""
        self.changed = threading.Condition(lanes.lock)
        self._fetching = threading.Lock()
        """Held by the connection that fetches and numbers a frame."""
        self._lanes = lanes
        self._numbering: SendingLane[bytes] = SendingLane(lanes.settings.window.lane_bytes)
        self._digest = xxh3_128()
        self._different_pages = 0
        self._connection = 0
        self._session: _Session | None = None
        self._thread: threading.Thread | None = None

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of frames that are not acknowledged."""
        return self._numbering.in_flight_bytes

    def start(self) -> None:
        """Connect, and carry frames until the lane has ended in band."""
        # What it tells belongs to the span in which it was started.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name=f"lane-{self.number}", daemon=True
        )
        self._thread.start()

    def cut(self) -> None:
        """Break its connection off, unless it has ended; without the lock, as gRPC tells others about it."""
        session = self._session
        if session is not None and not self.ended:
            session.call.cancel()

    def join(self) -> None:
        """Wait until its thread has ended, and gRPC's asks for nothing more: what is read may be closed then."""
        if self._thread is not None:
            self._thread.join()
        with self._fetching:
            pass

    # The thread of the lane

    def _run(self) -> None:
        backoff_s, lanes = _FIRST_BACKOFF_S, self._lanes
        while not self.ended and not lanes.closing.is_set():
            before = self._numbering.acknowledged
            try:
                self._connect()
            except PeerUnreachableError as error:
                if self._numbering.acknowledged > before:
                    backoff_s = _FIRST_BACKOFF_S
                with lanes.lock:
                    lanes.lost(self.number, error)
                lanes.closing.wait(backoff_s)
                backoff_s = min(backoff_s * 2, _LONGEST_BACKOFF_S)
            except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits for the lanes must hear of it
                with lanes.lock:
                    lanes.fail(error)
                return

    def _connect(self) -> None:
        """One connection's life; raises PeerUnreachableError when it may be tried again."""
        session = _Session()
        channel = self._lanes.settings.open_channel()
        try:
            # Frames are kept as bytes, to be sent again as they are; so the call takes bytes.
            method = channel.stream_stream(
                _TRANSFER,
                request_serializer=None,
                response_deserializer=transfer_pb2.TransferResponse.FromString,
            )
            self._connection += 1
            headers, end_span = start_client_span(_TRANSFER)
            session.call = method(self._requests(session), metadata=headers)
            session.call.add_done_callback(end_span)
            self._session = session
            if self._lanes.closing.is_set():  # whoever closes may have looked before
                self.cut()
            self._listen(session)
        finally:
            self._hang_up(session)
            channel.close()

    def _listen(self, session: _Session) -> None:
        """Take acknowledgements in until the lane has ended."""
        with translated():
            for response in session.call:
                self._hear(session, response)
                if self.ended:
                    # To part can wait: the guest may be paused, and others need the processor.
                    self._lanes.closing.wait()
                    return
        if not self._lanes.closing.is_set():
            raise PeerUnreachableError(f"lane {self.number} was closed by the destination before its end")

    def _hang_up(self, session: _Session) -> None:
        """Part in good order if the lane has ended: the destination sees an end and not a cancellation."""
        with self._lanes.lock:
            session.over = True
            self.changed.notify_all()
        if self.ended:
            parted = threading.Event()
            session.call.add_done_callback(lambda _call: parted.set())
            parted.wait(_GOODBYE_S)
        if session.call is not None:
            session.call.cancel()

    def _hear(self, session: _Session, response: transfer_pb2.TransferResponse) -> None:
        lanes = self._lanes
        with lanes.lock:
            match response.WhichOneof("message"):
                case "welcome":
                    lanes.back(self.number, again=self.welcomed, idle=self._numbering.idle)
                    self._acknowledge(response.welcome.acknowledged)
                    self.welcomed = session.welcomed = True
                case "ack":
                    # The count is cumulative per lane, so a repeated acknowledgement changes nothing.
                    more = response.ack.different_pages - self._different_pages
                    self._different_pages = response.ack.different_pages
                    lanes.traffic.different_pages += more
                    self._acknowledge(response.ack.acknowledged)
                case "ended":
                    if response.ended.frames != self._numbering.totals.frames:
                        raise StreamBrokenError(
                            f"lane {self.number}: the ends disagree about the number of frames"
                        )
                    self.ended = True
            self.changed.notify_all()
            lanes.notify()

    def _acknowledge(self, sequence: int) -> None:
        before = self._numbering.acknowledged
        self._lanes.traffic.acknowledged_bytes += self._numbering.acknowledge(sequence)
        if sequence > before:
            self._lanes.acknowledged(self.number, sequence - before)

    # gRPC's thread, one for each connection

    def _requests(self, session: _Session) -> Iterator[bytes]:
        """Open the lane, send again what was not acknowledged, then new frames, then the end."""
        yield self._opening()
        # A reopened lane learns first how far the destination got, so nothing is sent twice needlessly.
        self._wait(lambda: session.welcomed or session.over)
        for message in self._unacknowledged():
            with self._lanes.lock:
                self._lanes.traffic.repeated_bytes += len(message)
            self._admit(session, message)
            yield message
        while (following := self._following(session)) is not None:
            self._admit(session, following)
            began = time.monotonic()
            yield following
            session.blocked_s += time.monotonic() - began
        if self.finishing and not session.over:
            yield self._ending()
        # Whoever listens ends the stream: left now, it would end before its answers.
        self._wait(lambda: session.over)

    def _opening(self) -> bytes:
        settings = self._lanes.settings
        return transfer_pb2.TransferRequest(
            open=transfer_pb2.LaneOpen(
                migration_id=settings.migration_id,
                transfer_token=settings.transfer_token,
                lane=self.number,
                connection=self._connection,
            )
        ).SerializeToString()

    def _unacknowledged(self) -> Iterator[bytes]:
        # An older connection may still be making a frame, which is then one of these.
        with self._fetching, self._lanes.lock:
            return self._numbering.unacknowledged()

    def _following(self, session: _Session) -> bytes | None:
        """The next message, with its number; ``None`` if the connection takes no more."""
        with self._fetching:
            while True:
                with self._lanes.lock:
                    frame, supply = self._await_work(session)
                    self._lanes.building += supply is not None
                if supply is not None:
                    frame = self._made(session, supply)
                    if frame is None:
                        continue
                return None if frame is None else self._number(frame, made=supply is not None)

    def _await_work(self, session: _Session) -> tuple[Frame | None, Supply | None]:
        """A frame that waits, or else a supply to ask; neither if there will be none."""
        lanes = self._lanes
        while not session.over and not lanes.closing.is_set():
            has_room = lanes.settings.window.has_room(self._numbering)
            if has_room:
                frame = lanes.waiting_frame()
                if frame is not None or lanes.supply is not None:
                    return frame, None if frame is not None else lanes.supply
                if self.finishing:
                    break
            began = time.monotonic()
            self.changed.wait()
            session.blocked_s += 0.0 if has_room else time.monotonic() - began
        return None, None

    def _made(self, session: _Session, supply: Supply) -> BuiltChunk | None:
        """A chunk of a supply; ``None`` if it has no more, or failed, which ends the transfer."""
        blocked_s, session.blocked_s = session.blocked_s, 0.0
        try:
            chunk = supply.next(blocked_s)
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits for the lanes must hear of it
            chunk = None
            with self._lanes.lock:
                self._lanes.fail(error)
        if chunk is None:
            with self._lanes.lock:
                self._lanes.exhausted(supply)
        return chunk

    def _number(self, frame: Frame, *, made: bool) -> bytes:
        """A frame as it goes out; from then on it is kept until it is acknowledged."""
        sequence = self._numbering.next_sequence
        lanes, held_bytes = self._lanes, 0
        if isinstance(frame, BuiltChunk):
            data_bytes = frame.data_bytes
            self._digest.update(frame.frame.head.data_hash)
            message = frame.numbered(sequence)
        elif isinstance(frame, PieceFrame):
            # The destination puts pieces in order, so that its window is of the stream's bytes.
            data_bytes = held_bytes = stream_bytes(frame)
            self._digest.update(xxh3_128_digest(frame.data))
            frame.head.sequence = sequence
            message = encode_piece(frame)
        else:
            data_bytes = len(frame.data)
            frame.sequence = sequence
            message = transfer_pb2.TransferRequest(device_state=frame).SerializeToString()
        with lanes.lock:
            lanes.traffic.wire_bytes += len(message)
            lanes.traffic.data_bytes += data_bytes
            self._numbering.sent(
                message, frame_bytes=len(message), data_bytes=data_bytes, held_bytes=held_bytes
            )
            if made:
                lanes.made()
        return message

    def _ending(self) -> bytes:
        with self._lanes.lock:
            totals: Totals = self._numbering.totals
        end = transfer_pb2.LaneEnd(
            frames=totals.frames, data_bytes=totals.data_bytes, digest=self._digest.digest()
        )
        return transfer_pb2.TransferRequest(end=end).SerializeToString()

    def _admit(self, session: _Session, message: bytes) -> None:
        """Return when a message may go out."""
        closing = self._lanes.closing
        self._lanes.settings.pacer.admit(len(message), lambda: session.over or closing.is_set())

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._lanes.lock:
            self.changed.wait_for(condition)
