"""Pipeline stages run by a schedule: each rank takes its operations in order, one after the other.

Stages and shapes are declared up front, so that no shape is ever negotiated between ranks. Losses
are summed, never averaged, in the microbatches' order; so are gradients, whatever the schedule.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phalanx.parallel.comm_meter import CommMeter
from phalanx.parallel.executor import Inputs, LossFn
from phalanx.parallel.pipeline.channels import Channels
from phalanx.parallel.pipeline.forwards_first import forwards_before_backward
from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.traffic import needed_by, result_of, sent_by, traffic
from phalanx.parallel.pipeline.wgrad import WeightGradientStore
from phalanx.parallel.zero.shard import Sharding


class PipelineExecutor:
    """The stages that one pipeline rank holds, under a schedule.

    `store` is the one that the stages' weight gradients go to; `group` the pipeline ranks. One
    microbatch's tokens, what passes between stages and the last stage's output have the shapes and
    dtypes of `tokens`, `boundary` and `output` (meta tensors).
    """

    def __init__(
        self,
        stages: dict[int, nn.Module],
        *,
        shardings: dict[int, Sharding],
        schedule: Schedule,
        store: WeightGradientStore,
        group: dist.ProcessGroup,
        meter: CommMeter,
        device: torch.device,
        tokens: Tensor,
        boundary: Tensor,
        output: Tensor,
    ) -> None:
        """Collective over `group`."""
        self.rank = group.rank()
        assert tuple(stages) == schedule.stages_of(self.rank), "stages of another placement"
        self.stages = stages
        self.store = store
        self.shardings = shardings
        self.device = device
        self.tokens, self.boundary, self.output = tokens, boundary, output
        self.recorder: Callable[[Op], AbstractContextManager[None]] = _no_record
        """Put around each operation's computing."""
        self.before_backward: Callable[[], bool] | None = None
        """Called once a step, after the forwards that `forwards_before_backward` counts and before
        anything else. True: they are void, and the step begins anew. The same on every rank."""
        self._channels = Channels(group, schedule.placement, device, meter)
        self._schedule = schedule
        self._traffic = traffic(schedule.placement, schedule.orders, self.rank)
        self._cut: tuple[int, ...] | None = None

    @property
    def schedule(self) -> Schedule:
        """What `backward` runs; between steps it may be replaced by another order of the same."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        before = self._schedule
        assert schedule.placement == before.placement, "stages cannot move"
        assert schedule.num_microbatches == before.num_microbatches
        self._schedule = schedule
        self._traffic = traffic(schedule.placement, schedule.orders, self.rank)
        self._cut = None

    @property
    def forwards_before_backward(self) -> tuple[int, ...]:
        """By rank, the operations that come before `before_backward` is called."""
        if self._cut is None:
            self._cut = forwards_before_backward(self._schedule)
        return self._cut

    def backward(self, inputs: Inputs, loss_fn: LossFn) -> Tensor:
        """See `Executor.backward`."""
        parts = inputs.split(self._schedule.num_microbatches)
        assert parts[0].tokens_BS.shape == self.tokens.shape, "another microbatch size"
        self._channels.begin(self._traffic, self.boundary)
        step, begin = _Step(self, parts, loss_fn), 0
        if self.before_backward is not None:
            begin = self.forwards_before_backward[self.rank]
            step.run(0, begin)
            if self.before_backward():
                step, begin = _Step(self, parts, loss_fn), 0
                self._restart()
        step.run(begin, len(self._schedule.orders[self.rank]))
        self._channels.end()
        return step.loss()

    @torch.no_grad()
    def forward(self, inputs: Inputs, num_microbatches: int) -> Iterator[tuple[Inputs, Tensor]]:
        """See `Executor.forward`. Microbatches follow each other through the stages."""
        parts = inputs.split(num_microbatches)
        placement = self._schedule.placement
        orders = _forward_orders(placement, num_microbatches)
        boundary = self.boundary.new_empty(
            (parts[0].tokens_BS.shape[0], *self.boundary.shape[1:]), requires_grad=False
        )
        self._channels.begin(traffic(placement, orders, self.rank), boundary)
        for place, op in enumerate(orders[self.rank]):
            self._channels.advance(place)
            part = parts[op.microbatch]
            message = needed_by(op, len(placement))
            x = part.tokens_BS if message is None else self._channels.receive(message)
            y = self.stages[op.stage](x, **part.extra)
            result = result_of(op, len(placement))
            if result is None:
                yield part, y
            else:
                self._channels.send(result, y)
        self._channels.end()

    def _restart(self) -> None:
        """Discard the forwards so far, here and on their way."""
        void: dict[int, int] = {}
        for sender, order in enumerate(self._schedule.orders):
            sent = sent_by(order[: self.forwards_before_backward[sender]], self._schedule.placement)
            void[sender] = sum(self._schedule.placement[m.stage] == self.rank for m in sent)
        self._channels.restart(void)
        # Parameters may have changed since they were gathered.
        for sharding in self.shardings.values():
            sharding.forget()


class _Step:
    """One step's operations on one rank, and what they keep for each other."""

    def __init__(self, executor: PipelineExecutor, parts: list[Inputs], loss_fn: LossFn) -> None:
        self.executor = executor
        self.channels = executor._channels
        self.order = executor.schedule.orders[executor.rank]
        self.num_stages = executor.schedule.num_stages
        self.parts = parts
        self.loss_fn = loss_fn
        self.losses: dict[int, Tensor] = {}
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Input and output, or loss, by stage and microbatch, from F to B."""
        self.deferred: dict[tuple[int, int], Callable[[], None]] = {}
        """Weight gradients to compute, from B to W."""

    def run(self, begin: int, end: int) -> None:
        """Run the operations from place `begin` up to `end`."""
        for place in range(begin, end):
            self.channels.advance(place)
            op = self.order[place]
            if op.kind is Kind.F:
                self._forward(op)
            elif op.kind is Kind.W:
                self._weight_gradient(op)
            else:
                self._backward(op)

    def loss(self) -> Tensor:
        """Sum of the microbatches' losses, 0 where there is no head."""
        assert not self.kept, "forwards without a backward"
        assert not self.deferred, "weight gradients that were never computed"
        if not self.losses:
            return torch.zeros((), device=self.executor.device)
        return torch.stack([self.losses[i] for i in range(len(self.parts))]).sum()

    def _forward(self, op: Op) -> None:
        module, part = self.executor.stages[op.stage], self.parts[op.microbatch]
        x = self._receive(op)
        if x is None:
            x = part.tokens_BS
        else:
            x.requires_grad_()
        with self.executor.recorder(op):
            y = module(x, **part.extra)
            if op.stage == self.num_stages - 1:
                self._check(y, self.executor.output, op)
                y = self.loss_fn(y, part.target_BS)
                self.losses[op.microbatch] = y.detach()
        self.kept[op.stage, op.microbatch] = x, y
        self._send(op, y)

    def _backward(self, op: Op) -> None:
        executor, sharding = self.executor, self.executor.shardings[op.stage]
        x, y = self.kept.pop((op.stage, op.microbatch))
        grad = self._receive(op)
        with executor.recorder(op):
            if op.kind is Kind.B:
                sharding.before_input_gradient()
                with executor.store.deferring():
                    torch.autograd.backward(y, grad)
                self.deferred[op.stage, op.microbatch] = executor.store.take()
            else:
                sharding.before_backward(last=self._is_last(op))
                torch.autograd.backward(y, grad)
        # Weight gradients that are put off may keep `x`, and with it its gradient.
        grad, x.grad = x.grad, None
        self._send(op, grad)

    def _weight_gradient(self, op: Op) -> None:
        executor = self.executor
        with executor.recorder(op):
            self.deferred.pop((op.stage, op.microbatch))()
            executor.shardings[op.stage].after_weight_gradient(last=self._is_last(op))

    def _is_last(self, op: Op) -> bool:
        """Whether an operation is the last of its kind on its stage; all take microbatches in
        order."""
        return op.microbatch == len(self.parts) - 1

    def _receive(self, op: Op) -> Tensor | None:
        message = needed_by(op, self.num_stages)
        return None if message is None else self.channels.receive(message)

    def _send(self, op: Op, tensor: Tensor | None) -> None:
        message = result_of(op, self.num_stages)
        if message is None:
            return
        assert tensor is not None, f"{op}: the output does not depend on the input"
        self._check(tensor, self.executor.boundary, op)
        self.channels.send(message, tensor)

    def _check(self, tensor: Tensor, like: Tensor, op: Op) -> None:
        found, wanted = (tensor.shape, tensor.dtype), (like.shape, like.dtype)
        assert found == wanted, f"{op}: {found} instead of {wanted}"


def _forward_orders(placement: tuple[int, ...], num_microbatches: int) -> list[list[Op]]:
    """Orders of forwards alone, every rank with one operation a time slot but for ties.

    All ranks keep to one order of all operations, in which none comes before what it needs.
    """
    num_ranks = max(placement) + 1
    chunks = -(-len(placement) // num_ranks)
    ops = sorted(
        (
            Op(stage, Kind.F, microbatch)
            for stage in range(len(placement))
            for microbatch in range(num_microbatches)
        ),
        key=lambda op: (op.stage + chunks * op.microbatch, op.stage),
    )
    return [[op for op in ops if placement[op.stage] == rank] for rank in range(num_ranks)]


def _no_record(op: Op) -> AbstractContextManager[None]:
    return nullcontext()
