"""The peer of `phalanx bench zero`: the same training through DeepSpeed's ZeRO-3 engine.

DeepSpeed joins the process group that is there. Its settings are its defaults, so parameters of
less than 100,000 elements stay gathered between uses; the optimizer is torch's AdamW.
"""

import importlib.util
import os
import sys
import warnings
from contextlib import redirect_stdout
from typing import Any

from torch import Tensor

from phalanx.bench.peers.peer import Peer, adamw
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.model.init import init_weights
from phalanx.train.model.transformer import Transformer


def installed() -> bool:
    """Whether the peer can run here."""
    return importlib.util.find_spec("deepspeed") is not None


def settings(config: Config, *, num_microbatches: int) -> dict[str, Any]:
    """DeepSpeed's configuration of the run: ZeRO-3 in fp32, as it is by default."""
    return {
        "train_micro_batch_size_per_gpu": config.training.microbatch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }


class DeepSpeedLoop(Peer):
    """Same model, data, microbatches and learning rates in fp32; all ranks are data-parallel."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """In the ranks' process group; collective."""
        super().__init__(config, ranks)
        deepspeed = _imported(ranks)
        model = Transformer(config.model).to(ranks.device)
        init_weights(model, config.model, seed=config.training.seed)
        self.optimizer = adamw(model.parameters(), config.optim)
        with redirect_stdout(sys.stderr):  # it prints; a bench's output is a table
            self.model = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=settings(config, num_microbatches=self.num_microbatches),
                dist_init_required=False,
            )[0]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Peer.backward`; DeepSpeed counts microbatches itself, and updates after the last."""
        self.model.backward(loss, scale_wrt_gas=False)
        self.model.step()

    def update(self) -> None:
        """Done by `backward`."""

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.model.destroy()


def _imported(ranks: Ranks) -> Any:
    """The package, told in its way who this rank is."""
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)
    if ranks.device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # It calls functions that torch has renamed since; at each step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with redirect_stdout(sys.stderr):
        import deepspeed

        backend = "gloo" if ranks.device_type == "cpu" else "nccl"
        deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    return deepspeed
