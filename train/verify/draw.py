"""Layouts, shapes and options drawn at random, as overrides of the command line. Torch-free.

An axis is one choice; what may stand together is not known here: the checks that every command
meets refuse what cannot be, and another is drawn. A later capability joins with a line of AXES.

`parallel.compile` is not drawn: compiling takes minutes a layout.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

MOST_RANKS = 8

AXES: Mapping[str, Sequence[object]] = {
    "parallel.pp": (1, 1, 2, 2, 3, 4),
    "parallel.tp": (1, 1, 2),
    "parallel.dp_shard": (1, 2, 2, 3, 4),
    "parallel.dp_replicate": (1, 1, 2),
    "launch.nodes": (1, 1, 2),
    "parallel.activation_checkpoint": ("none", "none", "selective", "full"),
    "pipeline.schedule": (
        *("gpipe", "1f1b", "interleaved", "zb_h1", "zb_h2"),
        *("zb_v", "v_half", "v_min", "dualpipe_v", "auto"),
    ),
    "pipeline.stages_per_rank": ("null", "null", 2, 3),
    "pipeline.post_validation": ("false", "false", "true"),
    "zero.stage": (0, 1, 2, 3, 3),
    "zero.partition.params": ("null", "null", "null", "none", "node", "all"),
    "zero.partition.grads": ("null", "null", "null", "none", "node", "all"),
    "zero.partition.states": ("null", "null", "null", "none", "node", "all"),
    "zero.secondary_shard": (0, 0, 0, 2),
    "model.num_layers": (2, 3, 4, 5, 8),
    "model.dim": (24, 36, 37),
    "model.ffn_dim": (50, 54, 64),
    "model.head_dim": (6, 10),
    "model.num_heads": (4,),
    "model.num_kv_heads": (1, 2, 4),
    "model.tie_embeddings": ("false", "true"),
    "model.qk_norm": ("false", "true"),
    "model.attention_bias": ("false", "true"),
    "training.seq_len": (16, 24, 34),
    "training.global_batch_size": (8, 12, 16),
    "training.microbatch_size": (1, 2),
    "training.seed": (1, 2, 3),
    "data.document_mask": ("true", "true", "false"),
    "optim.name": ("adamw", "adamw", "adamw8bit", "adamw4bit"),
    "optim.max_grad_norm": (1.0, 0.05, 0.0),
    "verify.resume_in": (
        *("{}", "{tp: 2}", "{pp: 2}", "{dp_shard: 2}", "{dp_shard: 3}"),
        *("{dp_replicate: 2, dp_shard: 2}", "{pp: 2, tp: 2}"),
    ),
}
"""Values by key; what stands twice is drawn twice as often."""

SMALL = (
    "verify.dtype=fp64",
    "verify.steps=2",
    "launch.threads_per_rank=1",
    "checkpoint.snapshot.every=0",
    "monitor.sample.tokens=0",
    "training.eval_batches=0",
)
"""Overrides of every drawn layout."""


def draws(seed: int, fixed: Sequence[str]) -> Iterator[list[str]]:
    """Overrides of one layout after the other, for ever; what the user fixed stands last in each.

    Whether they may be is not checked, but for the number of ranks.
    """
    chance = random.Random(seed)
    given = {text.lstrip("+~").partition("=")[0] for text in fixed}
    while True:
        drawn = {key: chance.choice(values) for key, values in AXES.items()}
        ranks = 1
        for axis in ("pp", "tp", "dp_shard", "dp_replicate"):
            ranks *= int(str(drawn[f"parallel.{axis}"]))
        nodes = int(str(drawn["launch.nodes"]))
        if ranks > MOST_RANKS or ranks % nodes:
            continue
        if nodes > 1:
            drawn |= {"launch.emulate_nodes": "true", "launch.ranks_per_node": ranks // nodes}
        kept = [f"{key}={value}" for key, value in drawn.items() if key not in given]
        yield [*SMALL, *kept, *fixed]
