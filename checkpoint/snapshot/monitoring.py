"""What a run shows of its snapshots and checkpoints, step by step."""

import time
from collections.abc import Sequence
from typing import Any

from phalanx.checkpoint.config import SnapshotConfig
from phalanx.checkpoint.nodes.survival import survival
from phalanx.checkpoint.snapshot.durable import Saved
from phalanx.checkpoint.snapshot.request import Taken


class Monitor:
    """Adds up what happened since the last line."""

    def __init__(self, config: SnapshotConfig) -> None:
        self._config = config
        self._stalled_s = 0.0
        self._taken: list[Taken] = []
        self._saved: list[Saved] = []
        self._newest: Taken | None = None
        self._durable: Saved | None = None

    def stalled(self, seconds: float) -> None:
        """The loop was blocked."""
        self._stalled_s += seconds

    def taken(self, taken: Taken) -> None:
        """A snapshot was committed."""
        self._taken.append(taken)
        self._newest = taken

    def saved(self, saved: Saved) -> None:
        """A checkpoint was committed."""
        self._saved.append(saved)
        self._durable = saved

    def take(self) -> dict[str, Any]:
        """Figures since the last call, this rank's; empty where nothing was ever snapshotted.

        Seconds stalled, copied, encoded, sent and drained; bytes; step and age of the newest
        snapshot and checkpoint; the probability that the newest snapshot outlives an hour of node
        failures at the rate of checkpoint.snapshot.node_mtbf_h.
        """
        if self._newest is None and not self._stalled_s:
            return {}
        taken, self._taken = self._taken, []
        saved, self._saved = self._saved, []
        stalled, self._stalled_s = self._stalled_s, 0.0
        now = time.time()
        figures: dict[str, Any] = {
            "stalled_s": stalled,
            "copied_s": _total(taken, "copy_s"),
            "encoded_s": _total(taken, "encode_s"),
            "sent_s": _total(taken, "sent_s"),
            "sent_bytes": _total(taken, "sent_bytes"),
            "bytes": _total(taken, "bytes"),
            "drained_s": _total(saved, "seconds"),
        }
        if self._newest is not None:
            figures["memory_step"] = self._newest.step
            figures["memory_age_s"] = now - self._newest.time
            figures["survival_1h"] = self._survival(self._newest)
        if self._durable is not None:
            figures["durable_step"] = self._durable.step
            figures["durable_age_s"] = now - self._durable.time
        return figures

    def _survival(self, taken: Taken) -> float:
        groups = taken.epoch.groups
        parity = self._config.num_parity if self._config.every else 0
        return survival(
            [len(group) for group in groups],
            parity=parity,
            hours=1.0,
            node_mtbf_h=self._config.node_mtbf_h,
        )


def _total(items: Sequence[Any], name: str) -> Any:
    return sum(getattr(item, name) for item in items)
