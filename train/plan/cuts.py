"""Which layers each stage of a pipeline has. Torch-free."""

from collections.abc import Sequence

from phalanx.parallel.pipeline.stages import cut, stage_layers
from phalanx.train.config import Config
from phalanx.train.plan.costs import layer_and_head


def stage_cuts(config: Config, placement: Sequence[int]) -> list[range]:
    """The layers of each stage: as configured, or by cost.

    Raises:
        ValueError: there are more stages than layers, or other stages than configured.
    """
    given, num_layers = config.pipeline.layers_per_stage, config.model.num_layers
    if given is not None:
        if len(given) != len(placement):
            raise ValueError(
                f"pipeline.layers_per_stage={given}: {len(given)} stages, but "
                f"pipeline.schedule={config.pipeline.schedule} has {len(placement)}"
            )
        return cut(given)
    if len(placement) > num_layers:
        raise ValueError(
            f"pipeline.schedule={config.pipeline.schedule}: {len(placement)} stages, more than "
            f"model.num_layers={num_layers}; use fewer stages"
        )
    return cuts_by_cost(config, placement)


def cuts_by_cost(config: Config, placement: Sequence[int]) -> list[range]:
    """The layers of each stage so that stages cost as nearly the same as whole layers allow."""
    layer, head = layer_and_head(config)
    return stage_layers(config.model.num_layers, placement, layer=layer, head=head)
