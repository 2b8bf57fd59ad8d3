"""Mistakes that a parallel layout can really make, made on purpose: `verify` finds each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from phalanx.launch.ranks.start import launch
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config, Device, LaunchConfig, TrainingConfig, VerifyConfig
from phalanx.train.data.config import DataConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.verify import VerifyReport, verify


def no_decay() -> None:
    """Weight decay does not reach the optimizer."""
    from phalanx.train.optim.adamw import AdamW

    build = AdamW.__init__
    AdamW.__init__ = lambda self, named, config: build(  # type: ignore[method-assign]
        self, named, replace(config, weight_decay=0.0)
    )


def lr_off_by_a_percent() -> None:
    """Another learning rate."""
    from phalanx.train.optim.adamw import AdamW

    step = AdamW.step
    AdamW.step = lambda self, lr: step(self, lr * 1.01)  # type: ignore[method-assign]


def optimizer_state_not_saved() -> None:
    """A checkpoint without moments."""
    from phalanx.train.optim import adamw

    states = adamw.AdamW.state_tensors
    adamw.AdamW.state_tensors = lambda self: {  # type: ignore[method-assign]
        name: tensor if "exp_avg" not in name else tensor * 0
        for name, tensor in states(self).items()
    }


def dropped_microbatch() -> None:
    """The last microbatch of a step is not computed."""
    from phalanx.parallel.executor import Inputs

    split = Inputs.split
    Inputs.split = lambda self, count: split(self, count)[:-1]  # type: ignore[method-assign]


def norm_counts_replicas() -> None:
    """Replicated gradients are counted by every rank."""
    from phalanx.parallel import grad_norm

    grad_norm._counts_here = lambda grad: True


def tied_copies_not_added() -> None:
    """Embedding and head keep their own gradients."""
    from phalanx.parallel.pipeline.tied import TiedWeight

    TiedWeight.sync_gradient = lambda self, mesh: None  # type: ignore[method-assign]


def replicas_not_reduced() -> None:
    """Gradients never go across replicas."""
    from phalanx.parallel.zero.collectives import Hop

    def nothing(self: Hop, kind: str, values: Any) -> Any:
        yield from ()
        return values

    Hop.all_reduce = nothing  # type: ignore[method-assign]


def broken(ranks: Ranks, mistake: Callable[[], None], fn: Callable[..., Any], *args: Any) -> Any:
    """Run `fn` on a rank that makes the mistake, unless it is the reference."""
    if ranks.world_size > 1:
        mistake()
    return fn(ranks, *args)


def report_with(
    data: DataConfig, mistake: Callable[[], None], layout: dict[str, int]
) -> VerifyReport:
    """Verify a layout whose ranks make a mistake."""

    def launch_broken(fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        return launch(broken, mistake, fn, *args, **options)

    parallel = ParallelConfig(**{"dp_shard": 1, **layout})
    config = Config(
        model=ModelConfig(
            vocab_size=300,
            dim=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=48,
            tie_embeddings=mistake is tied_copies_not_added,
        ),
        data=data,
        parallel=parallel,
        training=TrainingConfig(seq_len=32, global_batch_size=16, microbatch_size=2),
        launch=LaunchConfig(device=Device.cpu, threads_per_rank=1, timeout_s=60),
        verify=VerifyConfig(resume_in={}),
    )
    return verify(config, launch_broken, world_size=parallel.fixed_degree * parallel.dp_shard)


@pytest.mark.parametrize(
    ("mistake", "layout", "named"),
    [
        (no_decay, {"dp_shard": 2}, "step 0: wrong update"),
        (lr_off_by_a_percent, {"dp_shard": 2}, "step 0: wrong update"),
        (optimizer_state_not_saved, {"dp_shard": 2}, "after resuming: step 1: wrong update"),
        (dropped_microbatch, {"dp_shard": 2}, "step 0: wrong gradient"),
        (tied_copies_not_added, {"pp": 2}, "copies of grad.embed.weight differ between ranks"),
        (replicas_not_reduced, {"dp_replicate": 2}, "differ between ranks"),
        (norm_counts_replicas, {"tp": 2}, None),
    ],
)
def test_a_mistake_is_found(
    demo_data: DataConfig, mistake: Callable[[], None], layout: dict[str, int], named: str | None
) -> None:
    report = report_with(demo_data, mistake, layout)
    assert not report.passed, report.table()
    if named is not None:
        assert named in report.findings[0], report.table()
    else:
        assert report.worst["grad_norm"].error > 10 * report.tolerance
