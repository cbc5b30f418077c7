"""What every migration of this host is made with: journal, connection to the destination, and plan."""

from __future__ import annotations

from source_svc.departure import Departure
from source_svc.peer import Destination
from source_svc.planning import Plan
from vmferry.machines.directory import MachineRecord
from vmferry.machines.fileidentity import Contents
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity
from vmferry.security.renewal import CurrentMaterial
from vmferry.transfer.window import Budget


class Means:
    """Makes them, from what the host has."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._contents = Contents()
        self._budget = Budget(host.config.shared_window_bytes)

    def departure(self, machine_id: str) -> Departure:
        """A machine's journal at this source; it has one holder at a time."""
        host = self._host
        return Departure(machine_id, host.ledger, host.directory, on_broken_journal=host.journal_broken)

    def peer(self, address: str, host: Identity) -> Destination:
        """A destination service, over connections of its own."""
        material = CurrentMaterial(self._host.tls)
        return Destination(address, host, material, rpc_timeout_s=self._host.config.rpc_timeout_s)

    def plan(self, record: MachineRecord, host: Identity) -> Plan:
        """What judges whether a machine may move to a host."""
        config = self._host.config
        return Plan(
            record.spec,
            self._host.ledger,
            self._host.trackers,
            self._host.own.uri,
            host.uri,
            self._host.tls.load().not_after.timestamp(),
            config.switch_timeout_s,
            config.negotiate_timeout_s,
            self._contents,
            budget=self._budget,
        )

    def name_of(self, machine_id: str) -> str:
        """A machine's name, or its identity if nothing is here of it but journals."""
        records = self._host.directory.list()
        return next((one.spec.name for one in records if one.spec.uuid == machine_id), machine_id)
