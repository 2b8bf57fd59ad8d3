"""Slots that are on their way to storage, and so stay as they are until they are there."""

import threading

from phalanx.checkpoint.snapshot.request import Taken


class Pins:
    """Those of a node, known on its first rank; one thread takes snapshots, another writes them."""

    def __init__(self) -> None:
        self._pinned: list[tuple[str, int]] = []
        """Epoch and slot."""
        self._changed = threading.Condition()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._pinned)

    def add(self, taken: Taken) -> None:
        """Keep a snapshot's slot."""
        with self._changed:
            self._pinned.append((taken.epoch.name, taken.slot))

    def remove(self, taken: Taken) -> None:
        """Let a slot be used again that `add` kept."""
        with self._changed:
            self._pinned.remove((taken.epoch.name, taken.slot))
            self._changed.notify_all()

    def epochs(self) -> set[str]:
        """Of which there are any."""
        with self._changed:
            return {epoch for epoch, _ in self._pinned}

    def free_slot(self, num_slots: int, *, epoch: str, newest: int | None, wait: bool) -> int:
        """A slot of the epoch that is neither pinned nor the committed snapshot's (`newest`);
        `num_slots` where there is none and that is not to be waited for."""
        with self._changed:
            while True:
                used = {newest, *(slot for name, slot in self._pinned if name == epoch)}
                free = next((slot for slot in range(num_slots) if slot not in used), num_slots)
                if free < num_slots or not wait:
                    return free
                self._changed.wait()
