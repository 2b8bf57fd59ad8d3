"""Settings that do something else than their name says in a layout, or nothing. Torch-free."""

from phalanx.parallel.zero.config import Offload, ZeroConfig
from phalanx.parallel.zero.partition import Extent
from phalanx.train.config import Config, Device, Precision, PrecisionConfig


def notes(config: Config, *, num_nodes: int | None = None) -> list[str]:
    """One line for each, with key and value.

    `num_nodes`: that a model's shards lie on; None where nobody knows yet.
    """
    parallel = config.parallel
    sharded = parallel.dp_shard != 1 or parallel.dp_replicate != 1
    return [
        *_of_schedules(config),
        *_of_zero(config, sharded, num_nodes),
        *_of_precision(config, sharded),
        *_of_snapshots(config),
    ]


def _of_schedules(config: Config) -> list[str]:
    found = []
    warmup, steps = config.optim.lr.warmup_steps, config.training.steps
    if warmup >= steps:
        when = "never" if warmup > steps else "only in the last step"
        found.append(
            f"optim.lr.warmup_steps={warmup}: with training.steps={steps} the learning rate "
            f"{when} reaches its peak"
        )
    found += config.pipeline.notes(config.parallel.pp, steps)
    if config.pipeline.post_validation and config.model.tie_embeddings:
        found.append(
            "pipeline.post_validation=true: with model.tie_embeddings=true the first and the "
            "last pipeline rank still wait for each other at each step, for the tied gradient"
        )
    return found


def _of_zero(config: Config, sharded: bool, num_nodes: int | None) -> list[str]:
    found, zero = [], config.zero
    if not sharded and zero.stage != ZeroConfig().stage:
        found.append(f"zero.stage={zero.stage}: no effect with one data-parallel rank")
    if zero.offload is Offload.cpu and config.launch.device is Device.cpu:
        found.append("zero.offload=cpu: no effect with launch.device=cpu")
    if config.parallel.dp_shard == 1:
        return found + [
            f"{setting}: no effect with parallel.dp_shard=1, which divides nothing"
            for setting in zero.settings_beside_stage()
        ]
    return found + zero.notes(num_nodes)


def _of_precision(config: Config, sharded: bool) -> list[str]:
    reduce = config.precision.reduce
    if not sharded and reduce is not PrecisionConfig().reduce:
        return [f"precision.reduce={reduce.name}: no effect with one data-parallel rank"]
    held = config.zero.extents.grads is not Extent.all or config.parallel.dp_replicate != 1
    if sharded and held and reduce is Precision.bf16:
        return [
            "precision.reduce=bf16: gradients that wait for a step's last microbatch are also "
            "added up in bf16 here; with many microbatches use fp32"
        ]
    return []


def _of_snapshots(config: Config) -> list[str]:
    found, snapshot = [], config.checkpoint.snapshot
    if snapshot.num_parity and not snapshot.every:
        found.append(
            f"checkpoint.snapshot.parity={snapshot.parity}: no effect with "
            "checkpoint.snapshot.every=0; checkpoints in storage have no parity then"
        )
    if config.launch.racks and not (snapshot.every and snapshot.num_parity):
        found.append(f"launch.racks={config.launch.racks}: no effect without snapshots' parity")
    if snapshot.every and config.pipeline.post_validation:
        found.append(
            f"checkpoint.snapshot.every={snapshot.every}: with pipeline.post_validation=true "
            "every snapshot waits until its step is final, which gives up what that gained"
        )
    return found
