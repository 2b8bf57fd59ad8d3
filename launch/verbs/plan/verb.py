"""`phalanx plan`: what each way to divide the configured model costs a rank, before it is run.

Torch-free, and no rank is started.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from phalanx.launch.bad_input import user_input
from phalanx.launch.config.app import Job, run
from phalanx.launch.config.compose import ranks_per_node, world_size
from phalanx.launch.verbs.json_file import write_json
from phalanx.launch.verbs.plan.flags import Flags, parse
from phalanx.launch.verbs.plan.table import table
from phalanx.train.config import Config
from phalanx.train.plan.zero import Setting, Way, setting_of, ways


def plan(argv: Sequence[str]) -> None:
    """Print the table, and write it with --json.

    Raises:
        BadInput: a flag or the configuration is wrong.
    """
    flags = parse(argv)
    run("plan", flags.rest, partial(_plan, flags=flags), starts_ranks=False)


def _plan(job: Job, *, flags: Flags) -> None:
    with user_input():
        setting = _setting(job.config)
    found = ways(setting)
    print(table(setting, found, flags.memory))
    write_json(flags.json_file, figures(setting, found, flags.memory))


def _setting(config: Config) -> Setting:
    size = world_size(config)
    return setting_of(config, world_size=size, ranks_per_node=ranks_per_node(config) or size)


def figures(setting: Setting, found: Sequence[Way], memory: float | None) -> dict[str, Any]:
    """What --json writes; bytes of one rank."""
    return {
        "world_size": setting.world_size,
        "ranks_per_node": setting.ranks_per_node,
        "degrees": setting.degrees,
        "microbatches": setting.microbatches,
        "pipeline_rank": setting.part.rank,
        "parameters": setting.part.num_parameters,
        "activations": setting.part.activations,
        "memory": memory,
        "ways": [_figures_of(way, memory) for way in found],
    }


def _figures_of(way: Way, memory: float | None) -> dict[str, Any]:
    point = way.zero.extents
    return {
        "name": way.name,
        "partition": {part: extent.name for part, extent in vars(point).items()},
        "secondary_shard": way.zero.secondary_shard,
        "quantize_weights": way.zero.quantize_weights.name,
        "quantize_gradients": way.zero.quantize_gradients.name,
        "configured": way.configured,
        "held": asdict(way.held) | {"on_device": way.held.on_device},
        "sent": {kind: asdict(traffic) for kind, traffic in way.sent.items()},
        "needed": way.needed,
        "fits": None if memory is None else way.needed <= memory,
    }
