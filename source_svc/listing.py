"""Pages of lists, and where a watch goes on: tokens that callers get and bring back.

Promise: a page of migrations begins behind the last one of the page before, whatever began, ended or was forgotten
meanwhile: none is shown twice, and none is left out that was there all the time. A token that was not made here, or
was made for another question, is refused by name.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from source_svc.history import ALL, Filter, History, Key, key_of
from source_svc.migrations import Migrations
from vmferry.errors import InvalidArgumentError, MachineNotFoundError
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.v1 import migration_pb2 as pb

_DEFAULT_PAGE: Final = 50
_LARGEST_PAGE: Final = 500
_INDEX: Final = re.compile(r"[0-9]{0,9}")
_BEHIND: Final = re.compile(r"([0-9]{1,19})\.([0-9a-f]{32})\.([0-9a-f]{16})")
_RESUME: Final = re.compile(r"([0-9a-f]{32})\.([0-9]{1,20})")


async def list_migrations(
    request: pb.ListMigrationsRequest, migrations: Migrations, history: History
) -> pb.ListMigrationsResponse:
    """One page, newest first.

    Raises:
        InvalidArgumentError: the size, the token or a filter cannot be meant.
    """
    wanted, size, before = _read_filter(request), _page_size(request.page_size), _read_token(request)
    page = await newest(migrations, history, wanted, before=before, limit=size + 1)
    token = _token(request, key_of(page[size - 1])) if len(page) > size else ""
    return pb.ListMigrationsResponse(migrations=page[:size], next_page_token=token)


async def newest(
    migrations: Migrations,
    history: History,
    wanted: Filter = ALL,
    *,
    before: Key | None = None,
    limit: int,
) -> list[pb.Migration]:
    """What is wanted of memory and history together, newest first; with ``before``, only what stands behind it."""
    found = {one.id: one for one in await history.select(wanted, before=before, limit=limit)}
    # Asked last, and believed: what is in memory is newer.
    found |= {one.id: one for one in migrations.select(wanted) if before is None or key_of(one) < before}
    return sorted(found.values(), key=key_of, reverse=True)[:limit]


async def find_machine(
    machine: str, directory: MachineDirectory, migrations: Migrations, history: History
) -> MachineRecord:
    """A machine of this host, by name or identity.

    Raises:
        MachineNotFoundError: it is not here; says where it went, if it went from here.
    """
    try:
        return directory.find(machine)
    except MachineNotFoundError as error:
        moved = Filter(machine=machine, outcomes=(pb.MIGRATION_OUTCOME_COMPLETED,))
        gone = await newest(migrations, history, moved, limit=1)
        if not gone:
            raise
        last = gone[0]
        when = f"{last.end_time.ToDatetime():%Y-%m-%d %H:%M:%SZ}"
        raise MachineNotFoundError(
            f"{error.message}: it was moved to {last.destination.host} at {when}",
            field=error.field,
            remedy=f"Ask that host for it; how it went: vmferry status {last.id} (GetMigration).",
        ) from error


def page_bounds(page_size: int, page_token: str, total: int) -> tuple[int, int, str]:
    """Start and end of a page in a list that has a fixed order, and the token of the next one.

    Raises:
        InvalidArgumentError: the size is negative or the token is not one of ours.
    """
    size = _page_size(page_size)
    if not _INDEX.fullmatch(page_token):
        raise _bad_token("page_token")
    start = min(int(page_token or "0"), total)
    end = min(start + size, total)
    return start, end, str(end) if end < total else ""


def resume_token(migration: pb.Migration) -> str:
    """What a watcher that was sent this state brings back."""
    return f"{migration.id}.{migration.revision}"


def seen_revision(request: pb.WatchMigrationRequest) -> int | None:
    """The revision that a watcher knows already; None if it knows none.

    Raises:
        InvalidArgumentError: the token is not one of ours, or of another migration.
    """
    if not request.resume_token:
        return None
    match = _RESUME.fullmatch(request.resume_token)
    if match is None or match[1] != request.id:
        raise _bad_token("resume_token")
    return int(match[2])


def _read_filter(request: pb.ListMigrationsRequest) -> Filter:
    for field, values, known in (
        ("phases", request.phases, pb.MigrationPhase.values()),
        ("outcomes", request.outcomes, pb.MigrationOutcome.values()),
    ):
        if unknown := [value for value in values if value not in known]:
            raise InvalidArgumentError(f"there is no {field[:-1]} {unknown[0]}", field=field)
    return Filter(
        machine=request.machine,
        destination=request.destination,
        phases=tuple(request.phases),
        outcomes=tuple(request.outcomes),
        open_only=request.open_only,
        since_ns=request.created_since.ToNanoseconds() if request.HasField("created_since") else None,
        before_ns=request.created_before.ToNanoseconds() if request.HasField("created_before") else None,
    )


def _page_size(asked: int) -> int:
    if asked < 0:
        raise InvalidArgumentError("page_size must not be negative", field="page_size")
    return min(asked or _DEFAULT_PAGE, _LARGEST_PAGE)


def _token(request: pb.ListMigrationsRequest, last: Key) -> str:
    return f"{last[0]}.{last[1]}.{_question(request)}"


def _read_token(request: pb.ListMigrationsRequest) -> Key | None:
    if not request.page_token:
        return None
    match = _BEHIND.fullmatch(request.page_token)
    if match is None:
        raise _bad_token("page_token")
    if match[3] != _question(request):
        raise InvalidArgumentError(
            "the token is of a list with other filters",
            field="page_token",
            remedy="Ask for all pages of a list with the same filters.",
        )
    return int(match[1]), match[2]


def _question(request: pb.ListMigrationsRequest) -> str:
    """What is asked for, whatever the page."""
    bare = pb.ListMigrationsRequest()
    bare.CopyFrom(request)
    bare.ClearField("page_size")
    bare.ClearField("page_token")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()[:16]


def _bad_token(field: str) -> InvalidArgumentError:
    return InvalidArgumentError("the token is not one of this service's", field=field)
