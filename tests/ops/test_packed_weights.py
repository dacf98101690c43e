"""Packed weights of causal_conv3d: kept for one state of a tensor, never stale, bounded."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from tests.ops.conv_problems import fp32_precision
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from magvit_fast import _native, ops
from magvit_fast.ops import _packed_weights
from magvit_fast.testing.budgets import assert_equal


@pytest.fixture(autouse=True)
def _empty() -> None:
    _packed_weights._entries.clear()


def _weight(c_in: int = 16, c_out: int = 24) -> Tensor:
    return torch.randn(c_out, c_in, 3, 3, 3) / 20


X = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(3))


def _conv(weight: Tensor, x: Tensor = X) -> Tensor:
    return ops.causal_conv3d(x, weight, impl="native")


def _fresh(weight: Tensor) -> Tensor:
    """What a tensor that was never seen gives."""
    return _conv(weight.detach().clone())


def test_kept_from_the_second_time_on() -> None:
    weight = _weight()
    first = _conv(weight)
    assert _packed_weights.held_bytes() == 0
    assert_equal(_conv(weight), first)
    held = _packed_weights.held_bytes()
    assert held >= weight.nbytes
    assert_equal(_conv(weight), first)
    assert _packed_weights.held_bytes() == held
    del weight
    gc.collect()
    assert _packed_weights.held_bytes() == 0


@pytest.mark.parametrize(("words", "dtype"), [
    (12, torch.float32), (27, torch.float32), (64, torch.float32), (27, torch.bfloat16),
    (1, torch.bfloat16), (1024, torch.float32), (10_000, torch.float32), (10_001, torch.bfloat16),
])  # fmt: skip
def test_the_mark_sees_all_of_a_small_weight_and_both_ends_of_any(words, dtype) -> None:
    core, where, how = _native.launcher(torch.device("cpu"))
    weight = torch.randn(words).to(dtype)

    def mark() -> int:
        return core.causal_conv3d_weight_mark(weight.data_ptr(), weight.nbytes, where, how)

    small = weight.nbytes <= 4096
    for i in range(0, words, 1 if words < 100 else 31) if small else (0,):
        for at in (i, words - 1 - i):
            before = mark()
            weight.data[at] += 1
            assert mark() != before, at


def test_a_storage_that_was_replaced_is_let_go() -> None:
    weight = torch.nn.Parameter(_weight())
    for _ in range(2):
        _conv(weight)
    assert _packed_weights.held_bytes() > 0
    storage = StorageWeakRef(weight.untyped_storage())
    weight.data = weight.data.clone()
    assert storage.expired()
    assert _packed_weights.held_bytes() == 0
    assert_equal(_conv(weight).detach(), _fresh(weight))


def test_weights_may_go_while_their_bytes_are_counted(monkeypatch) -> None:
    weights = [_weight() for _ in range(4)]
    for weight in weights * 2:
        _conv(weight)
    of_one, kept = _packed_weights.held_bytes() // 4, _packed_weights._Entry.nbytes

    def collected(entry: _packed_weights._Entry) -> int:
        weights.clear()  # as a garbage collection might, which any allocation may begin
        return kept(entry)

    del weight
    monkeypatch.setattr(_packed_weights._Entry, "nbytes", collected)
    assert _packed_weights.held_bytes() >= of_one
    assert _packed_weights.held_bytes() == 0


def _step(kind: Callable[..., torch.optim.Optimizer], **options: object) -> Callable:
    def change(weight: Tensor) -> None:
        weight.grad = torch.ones_like(weight)
        kind([weight], lr=0.1, **options).step()

    return change


def _load(weight: Tensor) -> None:
    module = torch.nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": torch.randn(weight.shape)})


def _swap_storage(weight: Tensor) -> None:
    weight.data = torch.randn(weight.shape)


def _write_through_data(weight: Tensor) -> None:
    weight.data.mul_(1.5)


CHANGES = {
    "sgd": _step(torch.optim.SGD),
    "adam_foreach": _step(torch.optim.Adam, foreach=True),
    "adam_fused": _step(torch.optim.Adam, fused=True),
    "load_state_dict": _load,
    "new_data": _swap_storage,
    "through_data": _write_through_data,
    "in_place": lambda w: torch.no_grad()(w.add_)(1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_never_stale(name) -> None:
    weight = torch.nn.Parameter(_weight())
    for _ in range(3):
        before = _conv(weight).detach()
        assert_equal(_conv(weight).detach(), before)
        CHANGES[name](weight)
        after = _conv(weight).detach()
        assert not torch.equal(after, before)
        assert_equal(after, _fresh(weight))
        assert_equal(_conv(weight).detach(), after)


def test_storage_swapped_back_and_forth_is_not_confused() -> None:
    weight = torch.nn.Parameter(_weight())
    for _ in range(20):  # freed memory is handed out again at the same address
        weight.data = torch.randn(weight.shape) / 20
        assert_equal(_conv(weight).detach(), _fresh(weight))
        assert_equal(_conv(weight).detach(), _fresh(weight))


def test_one_tensor_in_every_role(isa_level) -> None:
    weight = _weight(16, 16).requires_grad_()
    x = X.clone().requires_grad_()
    for _ in range(3):
        for precision in ("none", "ieee"):
            with fp32_precision(precision):
                y = _conv(weight, x)
                (dx,) = torch.autograd.grad(y.sum(), x)
                other = weight.detach().clone().requires_grad_()
                again = _conv(other, x)
                assert_equal(y.detach(), again.detach())
                assert_equal(dx, torch.autograd.grad(again.sum(), x)[0])
        narrow = ops.causal_conv3d(x[..., :2, :2], weight, stride=2, impl="native")
        copy = weight.detach().clone()
        assert_equal(
            narrow.detach(),
            ops.causal_conv3d(x[..., :2, :2], copy, stride=2, impl="native").detach(),
        )


def test_levels_do_not_share_forms() -> None:
    weight = _weight()
    for level in _native.ISA_LEVELS * 2:
        with _native.max_isa(level):
            for _ in range(3):
                assert_equal(_conv(weight), _fresh(weight))


def test_groups_do_not_share_forms() -> None:
    weight = torch.randn(144, 64, 1, 1, 1)
    whole, halves = torch.randn(1, 64, 2, 4, 4), torch.randn(1, 128, 2, 4, 4)
    for _ in range(3):
        assert_equal(_conv(weight, whole), _conv(weight.clone(), whole))
        y = ops.causal_conv3d(halves, weight, groups=2, impl="native")
        assert_equal(y, ops.causal_conv3d(halves, weight.clone(), groups=2, impl="native"))


def test_views_and_inference_tensors() -> None:
    whole = torch.randn(24, 32, 3, 3, 3) / 20
    view = whole[:, :16]
    for _ in range(3):
        assert_equal(_conv(view), _fresh(view))
    with torch.inference_mode():
        weight = _weight()
        for _ in range(3):
            y = _conv(weight)
            weight.mul_(1.01)
            assert not torch.equal(_conv(weight), y)
    assert _packed_weights.held_bytes() == 0


def test_bounded(monkeypatch) -> None:
    monkeypatch.setattr(_packed_weights, "CACHE_BYTES", 100_000)
    weights = [_weight() for _ in range(6)]
    for _ in range(3):
        for weight in weights:
            assert_equal(_conv(weight), _fresh(weight))
    assert 0 < _packed_weights.held_bytes() <= 100_000


def test_compiled() -> None:
    torch._dynamo.reset()
    weight = torch.nn.Parameter(_weight())
    compiled = torch.compile(lambda x: _conv(weight, x), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        for _ in range(2):
            assert_equal(compiled(X).detach(), _fresh(weight))
        with torch.no_grad():
            weight.mul_(0.5)
