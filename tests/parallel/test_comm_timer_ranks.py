"""Waits in collectives are seen wherever the host blocks in Python, and only while asked for."""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from phalanx.parallel.comm_timer import CommTimer
from phalanx.parallel.ranks import Ranks, process_group

LATE_S = 0.3


def late(ranks: Ranks, work: Callable[[], Any]) -> float:
    """Seconds that this rank waits in `work`, to which rank 1 comes late."""
    dist.barrier()
    with CommTimer(device_type="cpu") as timer:
        if ranks.rank == 1:
            time.sleep(LATE_S)
        work()
    return timer.seconds


def waits_by_kind(ranks: Ranks) -> dict[str, float]:
    with process_group(ranks):
        mesh = init_device_mesh("cpu", (2,))
        sharded = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        layer = fully_shard(torch.nn.Linear(8, 8), mesh=mesh)

        def point_to_point() -> None:
            x = torch.ones(2)
            kind = dist.isend if ranks.rank == 1 else dist.irecv
            for work in dist.batch_isend_irecv([dist.P2POp(kind, x, 1 - ranks.rank)]):
                work.wait()

        return {
            "all_reduce": late(ranks, lambda: dist.all_reduce(torch.ones(2))),
            "point_to_point": late(ranks, point_to_point),
            "dtensor": late(
                ranks, lambda: sharded.redistribute(placements=[Replicate()]).to_local() + 1
            ),
            "fsdp2": late(ranks, lambda: layer(torch.ones(1, 8)).sum().backward()),
        }


def test_the_rank_on_time_waits_for_the_late_one(run_ranks: Callable[..., list[Any]]) -> None:
    on_time, late_one = run_ranks(waits_by_kind, world_size=2)
    for kind in ("all_reduce", "point_to_point", "dtensor", "fsdp2"):
        assert on_time[kind] > LATE_S / 2, kind
        assert late_one[kind] < on_time[kind] / 2, kind


def waits_elsewhere(ranks: Ranks) -> dict[str, Any]:
    """Waits in another thread, and after exit; whether torch is as it was."""
    before = (dist.Work.wait, functional.wait_tensor)
    with process_group(ranks):
        beside = dist.new_group()
        with CommTimer(device_type="cpu") as timer:
            thread = threading.Thread(
                target=lambda: dist.all_reduce(torch.ones(2), group=beside), daemon=True
            )
            if ranks.rank == 1:
                time.sleep(LATE_S)
            thread.start()
            thread.join()
        other_thread = timer.seconds
        restored = (dist.Work.wait, functional.wait_tensor) == before
        dist.barrier()
        return {"thread": other_thread, "after": timer.seconds, "restored": restored}


def test_other_threads_and_other_times_do_not_count(run_ranks: Callable[..., list[Any]]) -> None:
    for found in run_ranks(waits_elsewhere, world_size=2):
        assert found == {"thread": 0.0, "after": 0.0, "restored": True}


def test_torch_is_restored_after_an_error() -> None:
    before = (dist.Work.wait, functional.wait_tensor)
    try:
        with CommTimer(device_type="cpu"):
            assert dist.Work.wait is not before[0]
            raise KeyError
    except KeyError:
        pass
    assert (dist.Work.wait, functional.wait_tensor) == before


def test_no_number_where_the_host_does_not_wait() -> None:
    before = dist.Work.wait
    with CommTimer(device_type="cuda") as timer:
        assert dist.Work.wait is before
    assert timer.seconds != timer.seconds  # NaN
