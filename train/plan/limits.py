"""How many bytes of activations a pipeline's ranks may hold, and what 1F1B would. Torch-free."""

from dataclasses import replace

from phalanx.parallel.pipeline.graph import Kind, Op, loop_placement
from phalanx.parallel.pipeline.schedules.registry import make_schedule
from phalanx.parallel.pipeline.simulate import Memory
from phalanx.train.config import Config
from phalanx.train.plan.costs import estimated_memory
from phalanx.train.plan.cuts import cuts_by_cost


def over_limit(config: Config, least: float, known: str) -> str:
    """Why a memory limit cannot be met; `known` says where the least that would do comes from."""
    return (
        f"pipeline.memory_limit={config.pipeline.memory_limit}: no schedule keeps to it; the least "
        f"that would do is {least:.0f} bytes a rank ({least / 2**20:.1f} MiB), {known}; raise it, "
        "lower training.microbatch_size, or use parallel.activation_checkpoint"
    )


def memory_of_1f1b(num_ranks: int, num_microbatches: int, memory: Memory) -> float:
    """Most that 1F1B holds on any rank with its backward in two parts; one stage a rank."""
    schedule = make_schedule("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches)
    return memory.peak(replace(schedule, orders=tuple(map(_split, schedule.orders))))


def memory_limit(config: Config, num_microbatches: int) -> float:
    """Bytes of activations that a rank may hold under `auto`: as configured, or 1F1B's."""
    given = config.pipeline.memory_limit_bytes
    return estimated_memory_of_1f1b(config, num_microbatches) if given is None else given


def estimated_memory_of_1f1b(config: Config, num_microbatches: int) -> float:
    """What pipeline.schedule=1f1b would hold, with layers placed by cost."""
    pp = config.parallel.pp
    memory = estimated_memory(config, cuts_by_cost(config, loop_placement(pp)))
    return memory_of_1f1b(pp, num_microbatches, memory)


def _split(order: tuple[Op, ...]) -> tuple[Op, ...]:
    """Every backward in its two parts, one after the other."""
    return tuple(
        part
        for op in order
        for part in (
            (op._replace(kind=Kind.B), op._replace(kind=Kind.W)) if op.kind is Kind.BW else (op,)
        )
    )
