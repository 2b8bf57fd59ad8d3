"""A peer of the benches: a training loop as one writes it by hand over FSDP2."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from phalanx.bench.peers.peer import Peer, adamw
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.engine.build import torch_dtypes
from phalanx.train.model.init import init_weights
from phalanx.train.model.transformer import Transformer


class PeerLoop(Peer):
    """Same model, data, precision, microbatches and ZeRO stage (gradients are reduced at the same
    moments); torch's own sharding, clipping and AdamW."""

    def __init__(self, config: Config, ranks: Ranks, *, root_stays: bool = False) -> None:
        """`root_stays`: what no block holds (embedding, last norm, head) is gathered once a
        microbatch and not freed before its backward, torch's default."""
        super().__init__(config, ranks)
        dtypes = torch_dtypes(config.precision)
        with torch.device("meta"):
            self.model = Transformer(config.model).to(dtypes.params)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(ranks.device_type, (ranks.world_size,)),
            "reshard_after_forward": config.zero.stage == 3,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=dtypes.compute, reduce_dtype=dtypes.reduce, cast_forward_inputs=False
            ),
        }
        for block in self.model.layers.values():
            fully_shard(block, **options)
        if root_stays:
            options["reshard_after_forward"] = None
        fully_shard(self.model, **options)
        self.model.to_empty(device=ranks.device)
        self.model.tie_weights()
        init_weights(self.model, config.model, seed=config.training.seed)
        self.optimizer = adamw(self.model.parameters(), config.optim)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Peer.backward`."""
        if self.config.zero.stage < 2:
            cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        loss.backward()

    def update(self) -> None:
        """See `Peer.update`."""
        if self.config.optim.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Nothing is held open."""
