"""How the ranks of some layout would hold a saved run's tensors, without starting a rank.

What a run does with meshes and DTensors is done here with numbers: layers by pipeline stage, then
tensor parallelism by the model's plan, then ZeRO's slices along dim 0. A test holds it to real
ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from phalanx.checkpoint.boxes import Box, TensorInfo, whole
from phalanx.checkpoint.chunks import sizes_and_offsets
from phalanx.checkpoint.snapshot.shares import RankBoxes
from phalanx.parallel.pipeline.files import load_schedule
from phalanx.parallel.pipeline.schedules.registry import placement_of
from phalanx.parallel.zero.places import place_of
from phalanx.train.config import Config
from phalanx.train.model.plan import plan_for
from phalanx.train.model.transformer import Transformer, parameter_name
from phalanx.train.plan.cuts import stage_cuts
from phalanx.train.plan.pipeline import auto_placements

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""What a layout names, outermost first; those that it does not name are 1."""


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How one parameter is cut by tensor parallelism."""

    dim: int | None
    """None: not at all."""
    shape: tuple[int, ...]


def layout_config(meta: Mapping[str, Any], wanted: Mapping[str, str]) -> Config:
    """The saved run's configuration, in another layout.

    Args:
        meta: of the checkpoint.
        wanted: degrees by axis, and other keys by their full names, as zero.stage.

    Raises:
        ValueError: an unknown axis or key, or a value that it does not take.
    """
    values = {f"parallel.{axis}": "1" for axis in AXES}
    for key, value in wanted.items():
        if "." not in key and key not in AXES:
            raise ValueError(
                f"--layout {key}={value}: unknown axis; name {', '.join(AXES)}, or a key in full, "
                "as zero.stage"
            )
        values[key if "." in key else f"parallel.{key}"] = value
    try:
        settings = OmegaConf.merge(OmegaConf.structured(Config), dict(meta.get("config", {})))
        settings = OmegaConf.merge(
            settings, OmegaConf.from_dotlist([f"{key}={value}" for key, value in values.items()])
        )
        config = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--layout {_text(wanted)}: {reason}") from error
    except ValueError as error:
        raise ValueError(f"--layout {_text(wanted)}: {error}") from error
    assert isinstance(config, Config)
    if config.parallel.dp_shard < 1:
        raise ValueError(f"--layout {_text(wanted)}: give the number of ranks, as dp_shard=4")
    return config


def held_by_ranks(config: Config, tensors: Mapping[str, TensorInfo]) -> list[RankBoxes]:
    """The box that each rank holds of each tensor.

    Parameters and optimizer states follow the model; what else is there (random states, roundings
    that gradients are owed) is whole, on the rank that its name tells, or rank 0.

    Raises:
        ValueError: the model cannot be divided so, or is not the tensors' model.
    """
    world = prod(getattr(config.parallel, axis) for axis in AXES)
    degrees = config.parallel.sized(world)
    per_node = config.launch.ranks_per_node or world
    if world % per_node:  # the saved run's, which had another number of ranks
        per_node = world
    config.check_nodes(world, per_node)
    stages, placement = _stages(config)
    held: list[RankBoxes] = [{} for _ in range(world)]
    for rank in range(world):
        place = place_of(rank, degrees, per_node, config.zero)
        slice_index = place.across.index(rank) * len(place.local) + place.local.index(rank)
        pp = rank // (world // degrees["pp"])
        sizes, coordinate = (place.num_slices, degrees["tp"]), (slice_index, rank % degrees["tp"])
        for stage, cuts in enumerate(stages):
            if placement[stage] != pp:
                continue
            for name, info in tensors.items():
                cut = cuts.get(_parameter_of(name))
                if cut is not None:
                    part = _box(name, info, cut, mesh_sizes=sizes, coordinate=coordinate)
                    if part.numel:
                        held[rank][name] = info, part
    known = {name for boxes in held for name in boxes}
    for name, info in tensors.items():
        if name not in known:
            held[_owner(name, world)][name] = info, whole(info.shape)
    return held


def _stages(config: Config) -> tuple[list[dict[str, _Cut]], tuple[int, ...]]:
    """Parameters of each stage, by name, and the pipeline rank of each."""
    pp, wanted = config.parallel.pp, config.pipeline
    if pp == 1:
        return [_cuts(config, range(config.model.num_layers))], (0,)
    if wanted.is_file:
        placement = load_schedule(Path(wanted.schedule)).placement
    elif wanted.schedule == "auto":
        placement = auto_placements(config)[0]
    else:
        placement = placement_of(wanted.schedule, pp, wanted.chunks)
    return [_cuts(config, layers) for layers in stage_cuts(config, placement)], placement


def _cuts(config: Config, layers: range) -> dict[str, _Cut]:
    """How tensor parallelism cuts the parameters of a stage."""
    with torch.device("meta"):
        stage = Transformer(config.model, layers=layers)
    styles = plan_for(stage).tensor
    found: dict[str, _Cut] = {}
    for fqn, parameter in stage.named_parameters():
        owner, _, leaf = fqn.rpartition(".")
        dim: int | None = None
        style = styles.get(owner)
        if isinstance(style, ColwiseParallel):
            dim = 0
        elif isinstance(style, RowwiseParallel):
            if isinstance(stage.get_submodule(owner), nn.Embedding):
                dim = 0
            elif leaf == "weight":
                dim = 1
        name = parameter_name(fqn, config.model)
        found[name] = _Cut(dim=dim, shape=tuple(parameter.shape))
    return found


def _box(
    name: str,
    info: TensorInfo,
    cut: _Cut,
    *,
    mesh_sizes: tuple[int, int],
    coordinate: tuple[int, int],
) -> Box:
    """What the rank at (slice, tensor-parallel rank) holds of a parameter or a state of it."""
    if not info.shape:
        return whole(())
    if info.shape[0] != cut.shape[0]:
        raise ValueError(
            f"{name} {list(info.shape)}: does not fit its parameter {list(cut.shape)}; the "
            "checkpoint's configuration describes another model"
        )
    slices: Placement = Shard(0)
    inner: Placement = Replicate()
    if cut.dim is not None and mesh_sizes[1] > 1:
        inner = Shard(cut.dim)
        if cut.dim == 0:
            slices = _StridedShard(0, split_factor=mesh_sizes[1])
    sizes, offsets = sizes_and_offsets(
        name, info.shape, (slices, inner), mesh_sizes=mesh_sizes, coordinate=coordinate
    )
    return Box(offsets, sizes)


def _parameter_of(name: str) -> str:
    """The parameter that a tensor is, or is a state of; "" for what follows none."""
    kind, _, rest = name.partition(".")
    if kind == "model":
        return rest
    return rest.partition(".")[2] if kind == "optim" else ""


def _owner(name: str, world: int) -> int:
    """The rank in a name such as rng.cpu.3 or residual.3.w, as far as there are so many."""
    words = name.split(".")
    places = {"rng": 2, "residual": 1}
    place = places.get(words[0])
    if place is not None and len(words) > place and words[place].isdigit():
        return int(words[place]) % world
    return 0


def _text(wanted: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in wanted.items())
