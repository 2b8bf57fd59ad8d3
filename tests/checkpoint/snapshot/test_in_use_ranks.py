"""A snapshot that ranks of the start before still overwrite, while a new start loads it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.checkpoint.config import SnapshotConfig
from phalanx.checkpoint.load import finding
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import LINGER_S, Events, Run, manager_of


def load_while_it_is_overwritten(ranks: Ranks, root: Path) -> tuple[int, float, Events]:
    config = SnapshotConfig(every=1, linger_s=LINGER_S)
    with process_group(ranks):
        old = manager_of(ranks, root, snapshot=config)

        def take(*steps: int) -> None:
            for step in steps:
                old.snapshot(step, lambda: {"x": state}, {"step": step})
                old.before_update()
                state.add_(1)
            old.wait()

        state = torch.full((1000,), 1.0)
        take(1, 2)
        events: Events = []
        new = manager_of(ranks, root, events=events, snapshot=config)
        load, later = finding.load, [(3, 4)]

        def late_load(*args: Any, **named: Any) -> Any:
            if later:
                take(*later.pop())
            return load(*args, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finding, "load", late_load)
            loaded = torch.zeros(1000)
            resumed = new.resume(lambda step, names, meta: {"x": loaded})
        new.close(finished=False)
        old.close()
        assert resumed is not None
        return resumed.step, float(loaded.mean()), events


def test_what_was_overwritten_while_it_was_read_is_not_taken(
    run_ranks: Run, tmp_path: Path
) -> None:
    [(step, value, events)] = run_ranks(load_while_it_is_overwritten, tmp_path, world_size=1)
    assert (step, value) == (4, 4.0)
    [(name, facts)] = events
    assert (name, facts["step"]) == ("snapshot_rejected", 2)
