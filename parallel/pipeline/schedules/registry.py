"""Schedules by name."""

from collections.abc import Callable
from dataclasses import dataclass

from phalanx.parallel.pipeline.graph import Schedule, loop_placement, v_placement
from phalanx.parallel.pipeline.schedules.dualpipe_v import dualpipe_v
from phalanx.parallel.pipeline.schedules.interleaved import interleaved
from phalanx.parallel.pipeline.schedules.simple import gpipe, one_f_one_b, zb_h1, zb_h2
from phalanx.parallel.pipeline.schedules.v import v_half, v_min, zb_v
from phalanx.parallel.pipeline.simulate import Costs


@dataclass(frozen=True)
class Generator:
    """How a named schedule is made."""

    build: Callable[[int, int, int, Costs], Schedule]
    """From ranks, microbatches, stages per rank and costs by stage."""
    chunks: int = 1
    """Stages per rank where nothing else is asked for."""
    any_chunks: bool = False
    """Whether more stages per rank may be asked for."""
    placement: Callable[[int, int], tuple[int, ...]] = loop_placement
    """Rank of each stage, from ranks and stages per rank."""


def _v(num_ranks: int, chunks: int) -> tuple[int, ...]:
    assert chunks == 2
    return v_placement(num_ranks)


GENERATORS: dict[str, Generator] = {
    "gpipe": Generator(lambda p, m, chunks, costs: gpipe(p, m)),
    "1f1b": Generator(lambda p, m, chunks, costs: one_f_one_b(p, m)),
    "interleaved": Generator(
        lambda p, m, chunks, costs: interleaved(p, m, chunks), chunks=2, any_chunks=True
    ),
    "zb_h1": Generator(lambda p, m, chunks, costs: zb_h1(p, m)),
    "zb_h2": Generator(lambda p, m, chunks, costs: zb_h2(p, m)),
    "zb_v": Generator(lambda p, m, chunks, costs: zb_v(p, m, costs), 2, placement=_v),
    "v_half": Generator(lambda p, m, chunks, costs: v_half(p, m, costs), 2, placement=_v),
    "v_min": Generator(lambda p, m, chunks, costs: v_min(p, m, costs), 2, placement=_v),
    "dualpipe_v": Generator(lambda p, m, chunks, costs: dualpipe_v(p, m), 2, placement=_v),
}
"""By the field's names."""


def make_schedule(
    name: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    chunks: int | None = None,
    costs: Costs | None = None,
) -> Schedule:
    """Make a named schedule.

    `chunks` is the number of stages per rank, the schedule's own by default. `costs` are by stage;
    only the schedules of two stages a rank in a V order by them, as if F, B and W took equal time
    where there are none.

    Raises:
        ValueError: there is no such schedule, or not for these numbers.
    """
    generator, chunks = _generator(name), _chunks(name, chunks)
    if num_ranks < 2:
        raise ValueError(
            f"schedule {name} over {num_ranks} ranks: a pipeline needs at least 2; "
            "without one, use no schedule"
        )
    fewest = fewest_microbatches(name, num_ranks, chunks)
    if num_microbatches < fewest:
        raise ValueError(
            f"schedule {name} over {num_ranks} ranks with {num_microbatches} microbatches: "
            f"it needs at least {fewest}"
        )
    num_stages = num_ranks * chunks
    if costs is None:
        costs = Costs.uniform(1, 1, 1, num_stages=num_stages)
    elif {len(costs.f), len(costs.b), len(costs.w)} != {num_stages}:
        raise ValueError(
            f"schedule {name}: costs of {len(costs.f)} F, {len(costs.b)} B and {len(costs.w)} W "
            f"stages; give those of {num_stages}, {chunks} a rank"
        )
    return generator.build(num_ranks, num_microbatches, chunks, costs)


def chunks_of(name: str) -> int:
    """Stages per rank where nothing else is asked for.

    Raises:
        ValueError: there is no such schedule.
    """
    return _generator(name).chunks


def placement_of(name: str, num_ranks: int, chunks: int | None = None) -> tuple[int, ...]:
    """Rank of each stage.

    Raises:
        ValueError: there is no such schedule, or not with so many stages per rank.
    """
    return _generator(name).placement(num_ranks, _chunks(name, chunks))


def fewest_microbatches(name: str, num_ranks: int, chunks: int | None = None) -> int:
    """Fewest microbatches that a schedule can be made for: 1, for all that there are now.

    Raises:
        ValueError: there is no such schedule, or not with so many stages per rank.
    """
    _chunks(name, chunks)
    return 1


def _generator(name: str) -> Generator:
    if name not in GENERATORS:
        raise ValueError(f"schedule {name}: unknown; choose one of {', '.join(GENERATORS)}")
    return GENERATORS[name]


def _chunks(name: str, chunks: int | None) -> int:
    """Stages per rank, the default filled in."""
    generator = _generator(name)
    if chunks is None or chunks == generator.chunks:
        return generator.chunks
    if not generator.any_chunks:
        raise ValueError(
            f"schedule {name} with {chunks} stages per rank: it has {generator.chunks}"
            + ("; use interleaved for more" if generator.chunks == 1 else "")
        )
    if chunks < generator.chunks:
        raise ValueError(
            f"schedule {name} with {chunks} stages per rank: it needs at least {generator.chunks}; "
            "use 1f1b for one"
        )
    return chunks
