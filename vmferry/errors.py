"""The one catalogue of everything that can go wrong and be told to a caller.

Promise: every error a user can meet is one class here, and each class fixes four things for ever: the gRPC
status code, the stable ``reason`` (``google.rpc.ErrorInfo``), the command line's exit code, and a remedy.
Nothing in this module knows gRPC: codes are named by their canonical spelling so that the pure core may raise
these errors. ``vmferry.rpc.status`` translates them at the edge, in both directions.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class ExitCode(enum.IntEnum):
    """Exit codes of the ``vmferry`` command; documented in docs/cli.md and never reused."""

    OK = 0
    FAILED = 1
    """The operation failed; the machine still runs where it ran before."""
    USAGE = 2
    CANCELLED = 3
    PRECONDITION = 4
    UNREACHABLE = 5
    UNKNOWN = 6
    """The outcome of a hand-off is not known yet; do nothing by hand, see docs/handoff.md."""
    INTEGRITY = 7


class VmferryError(Exception):
    """Base of every error that crosses an API of vmferry.

    Attributes:
        metadata: every changing part of the message, as strings, for programs.
        field: the request field or option at fault, when the input was bad.
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    remedy: ClassVar[str] = "This is a bug in vmferry: please report it with the service's log."

    def __init__(self, message: str, *, field: str = "", remedy: str = "", **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.metadata = {key: str(value) for key, value in metadata.items()}
        self.instance_remedy = remedy or self.remedy

    def __str__(self) -> str:
        return self.message


class InternalError(VmferryError):
    """A promise inside vmferry was broken."""

    reason = "INTERNAL"


class InvalidArgumentError(VmferryError):
    """A request field or command-line option has a value that can never be right."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"
    exit_code = ExitCode.USAGE
    remedy = "Correct the named field and call again."


class UnauthenticatedError(VmferryError):
    """The caller has no identity this host accepts (certificate without a usable URI SAN, wrong domain)."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"
    exit_code = ExitCode.PRECONDITION
    remedy = "Use a certificate of this trust domain with one spiffe:// URI SAN (vmferry certs issue)."


class PermissionDeniedError(VmferryError):
    """The caller is known but may not call this method."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"
    exit_code = ExitCode.PRECONDITION
    remedy = "Call with an identity that docs/security.md lists for this method."


class TicketInvalidError(VmferryError):
    """The migration ticket is malformed, badly signed, or made out for something else."""

    code = "PERMISSION_DENIED"
    reason = "TICKET_INVALID"
    exit_code = ExitCode.PRECONDITION
    remedy = "Issue a new ticket for exactly this machine, source and destination (vmferry ticket)."


class TicketExpiredError(VmferryError):
    """The ticket's time to start is over, or has not come yet."""

    code = "PERMISSION_DENIED"
    reason = "TICKET_EXPIRED"
    exit_code = ExitCode.PRECONDITION
    remedy = "Issue a new ticket, and check that the clocks of the hosts agree."


class TicketUsedError(VmferryError):
    """The ticket was used before; a ticket is good for one migration."""

    code = "PERMISSION_DENIED"
    reason = "TICKET_USED"
    exit_code = ExitCode.PRECONDITION
    remedy = "Issue a new ticket for each migration."


class MachineNotFoundError(VmferryError):
    """No machine of this name or id is on this host."""

    code = "NOT_FOUND"
    reason = "MACHINE_NOT_FOUND"
    exit_code = ExitCode.PRECONDITION
    remedy = "List the machines of this host (vmferry list --machines, ListMachines) and check the name."


class MigrationNotFoundError(VmferryError):
    """No migration of this id is known to this host."""

    code = "NOT_FOUND"
    reason = "MIGRATION_NOT_FOUND"
    exit_code = ExitCode.PRECONDITION
    remedy = "List the migrations of this host (ListMigrations) and check the id."


class TraceNotFoundError(VmferryError):
    """No span of this trace is in the folders that were searched."""

    code = "NOT_FOUND"
    reason = "TRACE_NOT_FOUND"
    exit_code = ExitCode.PRECONDITION
    remedy = "Name the trace folders of both hosts (--dir), and check the id (trace_id of the migration)."


class UpdateNotFoundError(VmferryError):
    """The source service does not know this update in place."""

    code = "NOT_FOUND"
    reason = "UPDATE_NOT_FOUND"
    exit_code = ExitCode.PRECONDITION
    remedy = "Check the id; ended updates are remembered until the service is restarted."


class UpdateUndoneError(VmferryError):
    """An update in place was given up; the guest goes on in the process it was in."""

    code = "ABORTED"
    reason = "UPDATE_UNDONE"
    exit_code = ExitCode.FAILED
    remedy = "Try again; the machine was not harmed."


class AttemptNotFoundError(VmferryError):
    """The destination has no such attempt in memory or in its journal."""

    code = "NOT_FOUND"
    reason = "ATTEMPT_NOT_FOUND"
    exit_code = ExitCode.PRECONDITION
    remedy = "Begin the attempt first."


class MachineBusyError(VmferryError):
    """The machine already has an open migration, or is being stopped."""

    code = "ABORTED"
    reason = "MACHINE_BUSY"
    exit_code = ExitCode.PRECONDITION
    remedy = "Wait for the open migration or cancel it (vmferry watch, vmferry cancel)."


class MachineExistsError(VmferryError):
    """A machine of this name or id is already here."""

    code = "ALREADY_EXISTS"
    reason = "MACHINE_EXISTS"
    exit_code = ExitCode.PRECONDITION
    remedy = "Choose another name, or stop the machine that has it."


class MachineNotOwnedError(VmferryError):
    """This host does not have the right to run (or to send away) this machine."""

    code = "FAILED_PRECONDITION"
    reason = "MACHINE_NOT_OWNED"
    exit_code = ExitCode.PRECONDITION
    remedy = "Call the host that owns the machine (vmferry status shows what the journal says)."


class MachineDeadError(VmferryError):
    """The machine's process is gone."""

    code = "FAILED_PRECONDITION"
    reason = "MACHINE_DEAD"
    exit_code = ExitCode.PRECONDITION
    remedy = "Look at the machine's log file; remove it (vmferry machine stop), then start a new one."


class MachineFailedError(VmferryError):
    """The hypervisor refused a command or gave an answer that makes no sense."""

    code = "INTERNAL"
    reason = "MACHINE_FAILED"
    exit_code = ExitCode.FAILED
    remedy = "Look at the machine's log file and at the hypervisor's answer in the message."


class IncompatibleError(VmferryError):
    """The destination cannot take this machine; the compatibility report says why."""

    code = "FAILED_PRECONDITION"
    reason = "INCOMPATIBLE"
    exit_code = ExitCode.PRECONDITION
    remedy = "Ask for the whole report (PlanMigration) and remove what blocks."


class InsufficientMemoryError(VmferryError):
    """The destination has not enough free memory for the machine."""

    code = "RESOURCE_EXHAUSTED"
    reason = "INSUFFICIENT_MEMORY"
    exit_code = ExitCode.PRECONDITION
    remedy = "Free memory on the destination or choose another one."


class TooManyMigrationsError(VmferryError):
    """The host already carries as many migrations as its configuration allows."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_MIGRATIONS"
    exit_code = ExitCode.PRECONDITION
    remedy = "Wait for a running migration to end, or raise the limit in the configuration."


class HostDrainingError(VmferryError):
    """The host is being emptied and takes no newcomers."""

    code = "FAILED_PRECONDITION"
    reason = "HOST_DRAINING"
    exit_code = ExitCode.PRECONDITION
    remedy = "Choose another destination, or undo it there (vmferry undrain; draining = false in its configuration)."


class TrackerUnavailableError(VmferryError):
    """No tracker that sees every write works for this machine on this host."""

    code = "FAILED_PRECONDITION"
    reason = "TRACKER_UNAVAILABLE"
    exit_code = ExitCode.PRECONDITION
    remedy = "See 'vmferry probe' for what was found; the 'hash' tracker works on any kernel."


class WrongPhaseError(VmferryError):
    """The call does not fit the state of the attempt or migration."""

    code = "FAILED_PRECONDITION"
    reason = "WRONG_PHASE"
    exit_code = ExitCode.PRECONDITION
    remedy = "Ask for the current state (GetMigration, GetAttempt) and act on that."


class PointOfNoReturnError(VmferryError):
    """The hand-off has begun; the migration can no longer be cancelled."""

    code = "FAILED_PRECONDITION"
    reason = "POINT_OF_NO_RETURN"
    exit_code = ExitCode.PRECONDITION
    remedy = "Wait for the outcome (vmferry watch); migrate back afterwards if needed."


class ForcedByOperatorError(VmferryError):
    """An operator ended the wait for the destination's answer and took the machine back here."""

    code = "ABORTED"
    reason = "FORCED_BY_OPERATOR"
    exit_code = ExitCode.FAILED
    remedy = "Keep the other host off until its copy is ended (docs/handoff.md, Forcing)."


class StaleAttemptError(VmferryError):
    """A message of an attempt that a newer one, or the journal, has already closed."""

    code = "ABORTED"
    reason = "STALE_ATTEMPT"
    exit_code = ExitCode.FAILED
    remedy = "Nothing needs to be done: the newer state stands."


class ChunkRejectedError(VmferryError):
    """A chunk lies outside the machine's memory, or is malformed."""

    code = "INVALID_ARGUMENT"
    reason = "CHUNK_REJECTED"
    exit_code = ExitCode.INTEGRITY
    remedy = "Source and destination disagree about the machine's memory: this is a bug or a hostile source."


class HashMismatchError(VmferryError):
    """Memory or device state arrived with a content other than its hash says."""

    code = "DATA_LOSS"
    reason = "HASH_MISMATCH"
    exit_code = ExitCode.INTEGRITY
    remedy = "Check both hosts' memory and network hardware; the machine runs on at the source."


class DeviceStateError(VmferryError):
    """A machine's saved device state is damaged, or not for this machine."""

    code = "DATA_LOSS"
    reason = "DEVICE_STATE_INVALID"
    exit_code = ExitCode.INTEGRITY
    remedy = "Capture the device state again; both machines must be of the same specification."


class StreamBrokenError(VmferryError):
    """A lane ended without its End message, or sequence numbers do not fit."""

    code = "ABORTED"
    reason = "STREAM_BROKEN"
    exit_code = ExitCode.FAILED
    remedy = "Check the network between the hosts and migrate again."


class PeerUnreachableError(VmferryError):
    """The other host does not answer."""

    code = "UNAVAILABLE"
    reason = "PEER_UNREACHABLE"
    exit_code = ExitCode.UNREACHABLE
    remedy = "Check address, network and that the service runs there; then call again."


class PeerIdentityError(VmferryError):
    """The host that answers at the address is not the one the ticket names."""

    code = "FAILED_PRECONDITION"
    reason = "PEER_IDENTITY"
    exit_code = ExitCode.PRECONDITION
    remedy = "Check the destination's address and its certificate (vmferry certs show)."


class TimedOutError(VmferryError):
    """A phase took longer than its limit."""

    code = "DEADLINE_EXCEEDED"
    reason = "TIMED_OUT"
    exit_code = ExitCode.FAILED
    remedy = "Raise the limit named in the message, or reduce the guest's load or memory."


class NotConvergingError(VmferryError):
    """The guest writes faster than its memory can be sent within the downtime limit."""

    code = "FAILED_PRECONDITION"
    reason = "NOT_CONVERGING"
    exit_code = ExitCode.FAILED
    remedy = "Raise downtime_limit, add bandwidth or lanes, or reduce the guest's load."


class CancelledByCallerError(VmferryError):
    """Somebody cancelled the migration before the hand-off."""

    code = "CANCELLED"
    reason = "CANCELLED"
    exit_code = ExitCode.CANCELLED
    remedy = "Nothing needs to be done: the machine runs at the source."


class ServiceStoppingError(VmferryError):
    """The service is shutting down and takes nothing new."""

    code = "UNAVAILABLE"
    reason = "SERVICE_STOPPING"
    exit_code = ExitCode.UNREACHABLE
    remedy = "Call again when the service is back."


class OutcomeUnknownError(VmferryError):
    """The hand-off was begun and its answer is missing: the machine is paused here until it is known."""

    code = "UNKNOWN"
    reason = "OUTCOME_UNKNOWN"
    exit_code = ExitCode.UNKNOWN
    remedy = "Do not start the machine by hand. It resolves itself when the hosts reach each other again."


class JournalDamagedError(VmferryError):
    """A journal cannot be trusted; nothing is resumed automatically."""

    code = "DATA_LOSS"
    reason = "JOURNAL_DAMAGED"
    exit_code = ExitCode.UNKNOWN
    remedy = "Do not start the machine by hand; compare with the other host's journal (docs/handoff.md)."


class ConfigError(VmferryError):
    """The configuration or a file it names is wrong."""

    code = "INVALID_ARGUMENT"
    reason = "CONFIG_INVALID"
    exit_code = ExitCode.USAGE
    remedy = "Correct the named setting and start again."


def catalogue() -> dict[str, type[VmferryError]]:
    """Every error class by its reason; raises if two classes claim the same reason."""
    found: dict[str, type[VmferryError]] = {}
    todo = [VmferryError]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if "reason" not in vars(cls) or cls is VmferryError:
            continue  # a finer class of an error that the outside knows by its parent's reason
        assert found.setdefault(cls.reason, cls) is cls, f"reason {cls.reason} is claimed twice"
    return found
