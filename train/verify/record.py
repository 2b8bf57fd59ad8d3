"""Running steps while keeping everything that they computed, whole, on disk.

A record is a folder: `steps.json` with each step's loss, norm and the samples it used, and
`step{n}.rank{r}.safetensors` with rank r's part of every gradient (before clipping) and of every
parameter (after the update), and where it lies in the whole. The parameters before the first step
stand under the number before it.
"""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from phalanx.checkpoint.chunks import Chunk, chunk_of
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config, Defect
from phalanx.train.data.source import Batch
from phalanx.train.engine.build import batch_source
from phalanx.train.engine.step import Engine
from phalanx.train.optim.schedule import learning_rate
from phalanx.train.resume.state import describe
from phalanx.train.verify.defects import StaleShard, inject, swapped


def record(ranks: Ranks, config: Config, folder: Path, *, first: int, save_at: int | None) -> None:
    """Run steps `first` to verify.steps - 1 on every rank and write their record to `folder`.

    From step `first` > 0 the state comes from the checkpoint of that step. `save_at`: take a
    checkpoint after so many steps.
    """
    with process_group(ranks):
        mesh = build_mesh(
            config.parallel,
            world_size=ranks.world_size,
            device_type=ranks.device_type,
            ranks_per_node=ranks.ranks_per_node,
        )
        engine = Engine(config, mesh, ranks.device)
        defect = config.verify.inject
        engine.model = replace(engine.model, executor=inject(engine.model, defect))
        source = batch_source(config, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
        checkpoints = CheckpointManager(
            config.checkpoint,
            ranks=ranks,
            on_event=lambda event, fields: None,
        )
        if first:
            checkpoints.load(first, engine.state_tensors())
        _write(_parameters(engine), engine, folder, first - 1)
        recorder = _Recorder(engine, folder)
        for step in range(first, config.verify.steps):
            batch = source.batch(swapped(step) if defect is Defect.reorder_batch else step)
            recorder.step(batch, step)
            if step + 1 == save_at:
                recorder.settle()
                checkpoints.save(step + 1, engine.state_tensors(), describe(config, mesh, step + 1))
        recorder.settle()
        checkpoints.close()
        if ranks.rank == 0:
            (folder / "steps.json").write_text(json.dumps(recorder.steps))


def read_step(folder: Path, step: int) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a recorded step, put together from the ranks' parts, by name
    ("grad.<parameter>", "param.<parameter>"); and the names whose copies differ between ranks.

    Elements that no rank holds are NaN.
    """
    whole: dict[str, Tensor] = {}
    differing: dict[str, None] = {}
    for path in sorted(folder.glob(f"step{step}.rank*.safetensors")):
        with safe_open(path, framework="pt") as file:
            boxes = json.loads(file.metadata()["boxes"])
            for name, (size, offsets) in boxes.items():
                part = file.get_tensor(name)
                if name not in whole:
                    whole[name] = torch.full(size, torch.nan, dtype=part.dtype)
                place = whole[name]
                for dim, (start, length) in enumerate(zip(offsets, part.shape, strict=True)):
                    place = place.narrow(dim, start, length)
                filled = ~place.isnan()
                if not torch.equal(place[filled], part[filled]):
                    differing[name] = None
                place.copy_(part)
    return whole, list(differing)


class _Open(NamedTuple):
    """A step whose update is not final yet."""

    step: int
    samples: list[tuple[int, int]]
    gradients: dict[str, Chunk | None]
    stale: StaleShard


class _Recorder:
    """Steps like the trainer's, recorded. Under post-validation that, too, is the trainer's: a step
    becomes final during the next one's gradients."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.steps: list[dict[str, Any]] = []
        self._engine = engine
        self._folder = folder
        self._open: _Open | None = None

    def step(self, batch: Batch, step: int) -> None:
        """One step; collective."""
        engine, config = self._engine, self._engine.config
        gradients = engine.gradients(batch)
        self._write_settled()
        parts = {
            f"grad.{name}": _part(name, p.grad)
            for name, p in engine.model.parameters.items()
            if p.grad is not None
        }
        stale = StaleShard(engine.model, config.verify.inject, engine.mesh)
        self._open = _Open(step, _samples(batch, engine), parts, stale)
        engine.update(gradients, learning_rate(config.optim.lr, step, config.training.steps))
        self._write_settled()

    def settle(self) -> None:
        """Have every step so far final and on disk."""
        self._engine.settle()
        self._write_settled()

    def _write_settled(self) -> None:
        for gradients in self._engine.take_settled():
            assert self._open is not None
            step, samples, parts, stale = self._open
            self._open = None
            stale.restore()
            _write(parts | _parameters(self._engine), self._engine, self._folder, step)
            self.steps.append(
                {
                    "step": step,
                    "loss": gradients.loss,
                    "grad_norm": gradients.norm,
                    "samples": samples,
                }
            )


def _parameters(engine: Engine) -> dict[str, Chunk | None]:
    """This rank's part of every parameter."""
    return {f"param.{name}": _part(name, p) for name, p in engine.model.parameters.items()}


def _part(name: str, tensor: Tensor) -> Chunk | None:
    """A copy, on the CPU, of this rank's part of a tensor."""
    chunk = chunk_of(name, tensor.detach())
    return chunk and replace(chunk, local=chunk.local.cpu().contiguous().clone())


def _write(parts: dict[str, Chunk | None], engine: Engine, folder: Path, step: int) -> None:
    held = {name: chunk for name, chunk in parts.items() if chunk is not None}
    boxes = {name: (list(chunk.size), list(chunk.offsets)) for name, chunk in held.items()}
    save_file(
        {name: chunk.local for name, chunk in held.items()},
        folder / f"step{step}.rank{engine.mesh.world.get_rank()}.safetensors",
        metadata={"boxes": json.dumps(boxes)},
    )


def _samples(batch: Batch, engine: Engine) -> list[tuple[int, int]]:
    """Global (number, fingerprint) of each sample of the step, in the order of the batch."""
    rows = zip(batch.tokens_BS, batch.labels_BS, strict=True)
    prints = [zlib.crc32(torch.stack(row).numpy().tobytes()) for row in rows]
    mesh = engine.mesh
    mine = (mesh.dp_rank, list(zip(batch.sample_ids, prints, strict=True)))
    everyone: list[Any] = [None] * mesh.world.size()
    dist.all_gather_object(everyone, mine)
    return [sample for _, part in sorted(dict(everyone).items()) for sample in part]
