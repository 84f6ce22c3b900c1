"""A worker's own account of the blocks it can serve: what snapshots are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from services.wire.messages import Events, Snapshot, Tier


class HeldBlocks:
    """Blocks held per tier, kept by the stream of changes and numbered with it.

    Because changes and snapshots come from the same object, a snapshot is always exactly "everything up to
    event `seq`", whatever the engine does meanwhile.
    """

    def __init__(self) -> None:
        self.seq = 0
        self._held: dict[Tier, set[bytes]] = {}

    def apply(
        self, stored: Mapping[Tier, Collection[bytes]], removed: Mapping[Tier, Collection[bytes]]
    ) -> Events | None:
        """Take in one step's changes, `removed` first. Returns the event to send, None for no change."""
        gone = {tier: hashes for tier, hashes in removed.items() if hashes}
        new = {tier: hashes for tier, hashes in stored.items() if hashes}
        if not gone and not new:
            return None
        for tier, hashes in gone.items():
            self._held.setdefault(tier, set()).difference_update(hashes)
        for tier, hashes in new.items():
            self._held.setdefault(tier, set()).update(hashes)
        self.seq += 1
        return Events(
            self.seq,
            stored={tier: b"".join(hashes) for tier, hashes in new.items()},
            removed={tier: b"".join(hashes) for tier, hashes in gone.items()},
        )

    def snapshot(self) -> Snapshot:
        """Everything held as of event `seq`."""
        return Snapshot(self.seq, {tier: b"".join(hashes) for tier, hashes in self._held.items()})

    def count(self, tier: Tier) -> int:
        return len(self._held.get(tier, ()))
