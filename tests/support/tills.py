"""What limits clients, in tests of parts that need it and are not about it."""

from __future__ import annotations

from realtime.access.admission import Admission, Most
from realtime.access.audit import Audit
from realtime.access.door import Door
from realtime.access.keeper import Keeper
from realtime.access.ledger_memory import MemoryLedger
from realtime.access.rates import MemoryRates, Rate
from realtime.access.revocations import MemoryRegister, Revocations
from realtime.access.till import Allowances, Till
from realtime.connections import Connections
from tests.support.limits import MANY


def open_till(keeper: Keeper | None = None) -> Till:
    """A till where nothing is limited that a test could reach."""
    ledger = MemoryLedger(lease_s=60.0)
    return Till(ledger, keeper or Keeper(ledger), Allowances(responses=MANY))


def open_admission() -> Admission:
    """The same, for everything."""
    ledger = MemoryLedger(lease_s=60.0)
    keeper = Keeper(ledger)
    rate = Rate(MANY, 1.0)
    most = Most(
        connections_per_user=MANY,
        connections_per_address=MANY,
        responses=rate,
        oneshots=rate,
        tasks=rate,
        sessions=rate,
        messages=rate,
    )
    return Admission(most, MemoryRates(), keeper, open_till(keeper))


def open_connections() -> Connections:
    """Connections, none of which is ever revoked."""
    return Connections(max_connections=MANY, send_timeout_s=60.0)


def open_door() -> Door:
    """A door where everybody is anonymous."""
    return Door(
        None, Revocations(MemoryRegister(keep_s=60.0), lambda: None), Audit(hides_sessions=True), open_admission()
    )
