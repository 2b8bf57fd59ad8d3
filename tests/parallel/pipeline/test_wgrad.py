"""Weight gradients from the store: autograd's numbers, the same bits early or late, nothing kept.

Shapes: B samples, S tokens, K width in, M width out, E experts.
"""

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from phalanx.parallel.config import ActivationCheckpoint
from phalanx.parallel.pipeline import wgrad_functions
from phalanx.parallel.pipeline.wgrad import WeightGradientStore, defer_weight_gradients
from phalanx.parallel.pipeline.wgrad_functions import (
    embedding,
    grouped_linear,
    linear,
    rms_norm,
)
from phalanx.parallel.recompute import checkpointed
from phalanx.train.model.transformer import Transformer
from tests.small_run import make_batch, make_config, reference_loss, reference_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def same_as_autograd(
    plain: Callable[..., Tensor], ours: Callable[..., Tensor], tensors: list[Tensor]
) -> None:
    """Output and gradients of `plain(*tensors)` and of `ours(*tensors, store)`, bit for bit."""
    grad_out = normal(*plain(*tensors).shape, dtype=tensors[0].dtype)
    expected = [t.clone().requires_grad_() for t in tensors]
    out = plain(*expected)
    out.backward(grad_out)
    for late in (False, True):
        store = WeightGradientStore()
        found = [t.clone().requires_grad_() for t in tensors]
        y = ours(*found, store)
        assert torch.equal(y, out)
        for number in range(2):
            with store.deferring() if late else nullcontext():
                y.backward(grad_out, retain_graph=True)
            if number == 0:
                weights = found[1:]
                assert all((t.grad is None) == late for t in weights)
            store.take()()  # the second time it adds to what is there
        for a, b in zip(found, expected, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert a.grad.dtype == b.dtype
            assert torch.equal(a.grad, b.grad + b.grad), f"late={late}, {tuple(b.shape)}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(3, 4), (5,), ()], ids=str)
def test_linear(dtype: torch.dtype, bias: bool, lead: tuple[int, ...]) -> None:
    tensors = [normal(*lead, 7, dtype=dtype), normal(6, 7, dtype=dtype)]
    tensors += [normal(6, dtype=dtype)] if bias else []
    if lead == ():
        # F.linear takes a vector another way, which sums in another order.
        tensors = [t.double() for t in tensors]
        x, weight = (t.clone().requires_grad_() for t in tensors[:2])
        store = WeightGradientStore()
        linear(x, weight, None, store).sum().backward()
        torch.testing.assert_close(weight.grad, tensors[0].expand(6, 7))
        torch.testing.assert_close(x.grad, tensors[1].sum(0))
        return

    def ours(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return linear(x, weight, rest[0] if bias else None, rest[-1])

    same_as_autograd(F.linear, ours, tensors)


def test_linear_of_strided_input() -> None:
    def transposed(x: Tensor, *rest: Any) -> Tensor:
        return F.linear(x.transpose(0, 1), *rest)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, store: WeightGradientStore) -> Tensor:
        return linear(x.transpose(0, 1), weight, bias, store)

    same_as_autograd(transposed, ours, [normal(3, 4, 7), normal(6, 7), normal(6)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 6)], ids=str)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    def ours(x: Tensor, weight: Tensor, store: WeightGradientStore) -> Tensor:
        return rms_norm(x, weight, 1e-5, store)

    same_as_autograd(plain, ours, [normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)])


def test_weight_of_a_norm_may_be_freed_before_w(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 3 does so. CUDA's kernel, for which torch's own stands here, refuses such a weight even
    where it does not read it."""

    def kernel(
        dy: Tensor, x: Tensor, shape: torch.Size, rstd: Tensor, weight: Tensor, wanted: list[bool]
    ) -> list[Tensor | None]:
        assert weight.shape == shape
        sizes.append(weight.untyped_storage().nbytes())
        grads = wgrad_functions._norm_grads
        return [
            grads(dy, x, rstd, weight, of_weight=of_weight) if wanted[of_weight] else None
            for of_weight in (False, True)
        ]

    x, dy, weight = normal(3, 8), normal(3, 8), normal(8)
    rstd = x.square().mean(-1, keepdim=True).rsqrt()
    expected = wgrad_functions._norm_grads(dy, x, rstd, weight, of_weight=True)
    monkeypatch.setattr(wgrad_functions.aten, "_fused_rms_norm_backward", kernel)
    sizes: list[int] = []
    size = weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    found = wgrad_functions._fused_norm_grads(dy, x, rstd, weight, of_weight=True)
    weight.untyped_storage().resize_(size)  # before a failed assertion shows it
    assert sizes == [size]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding_requires_grad_without_another_input(options: dict[str, Any]) -> None:
    tokens = torch.tensor([[1, 2, 2], [0, 1, 4]])
    weight, expected = (normal(5, 4).requires_grad_() for _ in range(2))
    expected.data.copy_(weight.data)
    grad_out, store = normal(2, 3, 4), WeightGradientStore()
    out = embedding(tokens, weight, store, **options)
    assert out.requires_grad
    plain = F.embedding(tokens, expected, **options)
    assert torch.equal(out, plain)
    plain.backward(grad_out)
    with store.deferring():
        out.backward(grad_out)
    assert weight.grad is None
    store.take()()
    assert torch.equal(weight.grad, expected.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_linear(dtype: torch.dtype) -> None:
    """Against one matmul an expert; the second expert gets no row."""
    ends = [5, 5, 16]
    offsets = torch.tensor(ends, dtype=torch.int32)
    x, weight = normal(16, 8, dtype=dtype), normal(3, 8, 16, dtype=dtype)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        parts = x.tensor_split(ends[:-1])
        return torch.cat([part @ weight[e] for e, part in enumerate(parts)])

    grad_out = normal(16, 16, dtype=dtype)
    results = []
    for late in (None, False, True):
        store = WeightGradientStore()
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = plain(a, b) if late is None else grouped_linear(a, b, offsets, store)
        with store.deferring() if late else nullcontext():
            y.backward(grad_out)
        assert (b.grad is None) == bool(late)
        store.take()()
        results.append([y.detach(), a.grad, b.grad])
    for expected, early, later in zip(*results, strict=True):
        assert torch.equal(early, later)
        assert early.dtype == dtype
        torch.testing.assert_close(early, expected)


def test_grouped_linear_takes_a_broadcast_gradient() -> None:
    x, weight = normal(8, 8).float().requires_grad_(), normal(2, 8, 4).float().requires_grad_()
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    grouped_linear(x, weight, offsets, WeightGradientStore()).sum().backward()
    expected = torch.stack([x.detach()[:3].sum(0), x.detach()[3:].sum(0)])
    torch.testing.assert_close(weight.grad, expected.unsqueeze(-1).expand(2, 8, 4))


def test_store_runs_at_once_or_in_order_when_asked() -> None:
    store, done = WeightGradientStore(), []
    store.defer(lambda: done.append("at once"))
    assert done == ["at once"]
    with store.deferring():
        store.defer(lambda: done.append("first"))
        store.defer(lambda: done.append("second"))
    later = store.take()
    with store.deferring():
        store.defer(lambda: done.append("other"))
    assert done == ["at once"]
    store.take()()
    later()
    assert done == ["at once", "other", "first", "second"]
    with pytest.raises(AssertionError, match="already"):
        later()
    store.take()()
    assert len(done) == 4


def test_store_is_not_left_deferring_by_an_error() -> None:
    store, done = WeightGradientStore(), []
    with pytest.raises(ZeroDivisionError), store.deferring():
        raise ZeroDivisionError
    store.defer(lambda: done.append(1))
    assert done == [1]
    with store.deferring(), pytest.raises(AssertionError), store.deferring():
        pass


def test_store_serves_backward_passes_of_other_threads() -> None:
    """CUDA's run in one."""
    store, weight = WeightGradientStore(), normal(3, 3).requires_grad_()
    out = linear(normal(2, 3), weight, None, store).sum()
    with store.deferring():
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
    assert weight.grad is None
    store.take()()
    assert weight.grad is not None


def test_store_says_where_nothing_is_deferred() -> None:
    store = WeightGradientStore()
    store.undeferred = "parallel.compile=true with parallel.tp=2"
    expected = pytest.warns(UserWarning, match=r"parallel.tp=2: the blocks' .* computed in B")
    with expected, store.deferring():
        pass


def gradients(model: Transformer, store: WeightGradientStore | None, late: bool) -> dict[str, Any]:
    """Loss and gradients over two microbatches, the weights' of both after both."""
    taken, losses = [], []
    for number in range(2):
        loss = reference_loss(model, make_batch(make_config(), number=number))
        losses.append(float(loss.detach()))
        if store is None:
            loss.backward()
            continue
        with store.deferring() if late else nullcontext():
            loss.backward()
        taken.append(store.take())
    if late:
        assert all(p.grad is None for p in model.parameters())
    for compute in taken:
        compute()
    return {"loss": losses} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", list(ActivationCheckpoint), ids=str)
def test_whole_model(tied: bool, mode: ActivationCheckpoint) -> None:
    config = make_config(tied=tied, num_layers=2)
    expected = gradients(reference_model(config), None, False)
    both = []
    for late in (False, True):
        model, store = reference_model(config), WeightGradientStore()
        defer_weight_gradients(model, store)
        for block in model.layers.values():
            block.forward = checkpointed(block.forward, mode)
        both.append(gradients(model, store, late))
    for name, value in expected.items():
        early, later = (found[name] for found in both)
        if name == "loss":
            assert early == later == value
            continue
        assert torch.equal(early, later), name
        torch.testing.assert_close(early, value, rtol=1e-12, atol=1e-14)


class Matmuls(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[op.__name__.split(".")[0]] += 1
        return op(*args, **(kwargs or {}))

    @property
    def matmuls(self) -> int:
        return self.count["mm"] + self.count["addmm"]


@pytest.mark.parametrize("mode", list(ActivationCheckpoint), ids=str)
def test_a_checkpointed_block_is_recomputed_once_and_in_b(mode: ActivationCheckpoint) -> None:
    config = make_config(num_layers=1)
    model, store = reference_model(config), WeightGradientStore()
    defer_weight_gradients(model, store)
    block = model.layers["0"]
    block.forward = checkpointed(block.forward, mode)
    with Matmuls() as forward:
        loss = reference_loss(model, make_batch(config))
    with Matmuls() as b, store.deferring():
        loss.backward()
    with Matmuls() as w:
        store.take()()
    recomputed = {"none": range(1), "selective": range(3, 5), "full": range(6, 8)}[mode.value]
    assert forward.matmuls == 8  # seven in the block, and the head
    assert b.matmuls - 8 in recomputed  # an early stop leaves out what no one asks for
    assert w.matmuls == 8


def alive(module: nn.Module, x: Tensor, late: bool) -> tuple[list[bool], list[bool]]:
    """Which of a two-layer net's activations live after B, and after W."""
    store, refs = WeightGradientStore(), []
    defer_weight_gradients(module, store)

    def remember(tensor: Tensor) -> Tensor:
        refs.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    hidden = remember(module[0](remember(x.clone())))
    loss = module[1](remember(hidden.sin())).square().sum()
    del hidden
    with store.deferring() if late else nullcontext():
        loss.backward()
    del loss
    gc.collect()
    after_b = [ref() is not None for ref in refs]
    store.take()()
    return after_b, [ref() is not None for ref in refs]


def test_only_what_weights_need_outlives_b() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    # Input, what `sin` needed, the second layer's input.
    assert alive(net, torch.randn(3, 4), False) == ([False] * 3, [False] * 3)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    assert alive(net, torch.randn(3, 4), True) == ([True, False, True], [False] * 3)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_modules_keep_names_values_and_their_own_forward() -> None:
    model = reference_model(make_config(num_layers=1))
    model.extra = nn.ModuleList([Scaled(3, 3), nn.Embedding(3, 3, max_norm=1.0), nn.Linear(3, 3)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    store = WeightGradientStore()
    defer_weight_gradients(model, store, leave=[model.extra[2]])
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(m) for m in model.extra] == [Scaled, nn.Embedding, nn.Linear]
    assert isinstance(model.head, nn.Linear)
    with torch.no_grad():
        assert not reference_loss(model, make_batch(make_config())).requires_grad


def test_frozen_weights_get_no_gradient() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.RMSNorm(4), nn.Linear(4, 3))
    store = WeightGradientStore()
    defer_weight_gradients(net, store)
    net[1].weight.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    with store.deferring():
        net(torch.tensor([1, 2])).sum().backward()
    store.take()()
    assert net[1].weight.grad is None
    assert net[2].weight.grad is None
    assert torch.equal(net[2].bias.grad, torch.full((3,), 2.0))
    assert net[0].weight.grad is not None


def test_norm_of_another_format_is_left_to_autograd() -> None:
    net, plain = nn.RMSNorm(4), nn.RMSNorm(4)
    store = WeightGradientStore()
    defer_weight_gradients(net, store)
    x = torch.randn(2, 3, 4).bfloat16()
    with store.deferring():
        net(x).sum().backward()
    plain(x).sum().backward()
    assert torch.equal(net.weight.grad, plain.weight.grad)
