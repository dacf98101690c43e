"""Large results in the memory of earlier ones: only when nobody holds those any more, in any way."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast import _native, _recycled

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One MiB is large here, and four are remembered."""
    monkeypatch.setattr(_recycled, "FROM_BYTES", SIZE)
    monkeypatch.setattr(_recycled, "MOST_BYTES", 4 * SIZE)
    _recycled.forget()
    yield
    _recycled.forget()


def _take(size: int = SIZE) -> Tensor:
    x = torch.empty(size, dtype=torch.uint8)
    _recycled.take(x)
    return x


def test_free_memory_is_taken_again() -> None:
    first = torch.empty(SIZE // 4)
    assert not _recycled.take(first)
    address = first.data_ptr()
    second = torch.empty(2, SIZE // 16, 2, dtype=torch.int32).transpose(0, 2)
    assert not _recycled.take(second)
    assert second.data_ptr() != address
    del first
    third = torch.empty(SIZE // 2, dtype=torch.bfloat16)
    assert _recycled.take(third)
    assert (third.data_ptr(), third.dtype) == (address, torch.bfloat16)
    assert third.untyped_storage().nbytes() == SIZE
    assert second.shape == (2, SIZE // 16, 2)
    assert second.stride() == (1, 2, SIZE // 8)


HOLDERS = {
    "a view": lambda x: x[5:6],
    "a detached tensor": lambda x: x.detach(),
    "the storage": lambda x: x.untyped_storage(),
    "the typed storage": lambda x: x._typed_storage(),
    "an array": lambda x: x.numpy(),
    "a list of arrays": lambda x: [x[3:].numpy()],
    "a capsule": lambda x: torch.utils.dlpack.to_dlpack(x),
    "a function": lambda x: lambda: x,
    "a graph": lambda x: (x.view(torch.float32).view(-1) * torch.ones(1, requires_grad=True)).sum(),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_anybody_holds_is_not_taken(name: str) -> None:
    x = _take()
    address = x.data_ptr()
    holder = HOLDERS[name](x)
    del x
    again = _take()
    assert again.data_ptr() != address
    del holder
    assert _take().data_ptr() == address


def test_a_storage_that_was_moved_or_resized_is_not_taken() -> None:
    x = _take()
    x.share_memory_()
    shared = x.data_ptr()
    del x
    x = _take()
    assert x.data_ptr() != shared
    x.untyped_storage().resize_(10)
    del x
    assert _take().untyped_storage().nbytes() == SIZE


def test_the_memory_remembered_is_limited() -> None:
    for count in range(1, 7):
        kept = [_take() for _ in range(count)]
        assert _recycled.held_bytes() <= 4 * SIZE
        assert len({x.data_ptr() for x in kept}) == count
    assert _recycled.held_bytes() == 4 * SIZE
    for size in (SIZE - 1, 4 * SIZE + 1):  # too small, too large
        assert not _recycled.take(torch.empty(size, dtype=torch.uint8))
        assert _recycled.held_bytes() == 4 * SIZE
    _recycled.forget()
    assert _recycled.held_bytes() == 0


def test_another_size_is_not_taken_and_frees_what_is_free() -> None:
    used = _take()
    _take(2 * SIZE)
    assert _recycled.held_bytes() == 3 * SIZE
    x = torch.empty(SIZE + 64, dtype=torch.uint8)
    assert not _recycled.take(x)
    assert _recycled.held_bytes() == used.nbytes + x.nbytes


def test_in_inference_mode_and_back() -> None:
    with torch.inference_mode():
        x = _take()
        address = x.data_ptr()
        assert x.is_inference()
        del x
    x = _take()
    assert x.data_ptr() == address
    assert not x.is_inference()
    assert (x.float().requires_grad_() * 2).sum().requires_grad


def test_several_threads_never_share() -> None:
    wrong = []

    def work(value: int) -> None:
        for _ in range(50):
            x = _take()
            x.fill_(value)
            if not bool((x == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_results_of_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "HUGE_PAGES_FROM", SIZE)
    x = torch.randn(1, 16, 4, 64, 64).contiguous(memory_format=torch.channels_last_3d)

    def norm(x: Tensor) -> Tensor:
        return mf.group_norm_silu(x, 4, impl="native")

    expected = norm(x).clone()
    first, second = norm(x), norm(x + 1)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, expected)
    address = first.data_ptr()
    del first
    third = norm(x)
    assert third.data_ptr() == address
    assert torch.equal(third, expected)
    assert third.is_contiguous(memory_format=torch.channels_last_3d)
    fourth = copy.deepcopy(third)
    leaf = x.clone().requires_grad_()
    norm(norm(leaf)).sum().backward()  # what the graph holds is in nobody else's hands
    assert torch.equal(third, fourth)
    reference = x.clone().requires_grad_()
    once = mf.group_norm_silu(reference, 4, impl="reference")
    mf.group_norm_silu(once, 4, impl="reference").sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad, rtol=1e-4, atol=1e-4)
