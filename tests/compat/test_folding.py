"""Folding: convolutions that pad and cache by themselves become one native call, or stay as they are."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tests.compat.test_patch import Calls
from torch import Tensor, nn

import magvit_fast as mf
from magvit_fast.compat import folding


def _conv(**more) -> nn.Conv3d:
    return nn.Conv3d(2, 3, 3, padding=(0, 1, 1), **more)


class FrameByFrame(nn.Conv3d):
    """One convolution a frame; the last frames stay on the module."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__(2, 3, 3, padding=(0, 1, 1), stride=(stride, 1, 1))
        self.earlier: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        front = x[:, :, :1].repeat(1, 1, 2, 1, 1) if self.earlier is None else self.earlier
        x = torch.cat([front, x], 2)
        self.earlier = x[:, :, -2:].clone()
        return torch.cat([super(FrameByFrame, self).forward(x[:, :, t : t + 3])
                          for t in range(x.shape[2] - 2)], 2)  # fmt: skip


class EverySecondFrame(FrameByFrame):
    """The same at stride 2: of the kept frames one is needed."""

    def forward(self, x: Tensor) -> Tensor:
        if self.earlier is None:
            x = F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate")
        else:
            x = torch.cat([self.earlier[:, :, -1:], x], 2)
        self.earlier = x[:, :, -2:].clone()
        windows = [x[:, :, t : t + 3] for t in range(0, x.shape[2] - 2, 2)]
        return torch.cat([nn.Conv3d.forward(self, window) for window in windows], 2)


class Wrapper(nn.Module):
    def __init__(self, conv: nn.Conv3d | None = None) -> None:
        super().__init__()
        self.conv = conv or _conv()


class CacheHandedOn(Wrapper):
    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.cat([x[:, :, :1]] * 2 + [x] if cache is None else [cache, x], 2)
        return self.conv(x), x[:, :, -2:].clone()


class ZerosInFront(Wrapper):
    """What the cache leaves is filled up with zeros."""

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        missing = 2
        if cache is not None:
            x, missing = torch.cat([cache, x], 2), 2 - cache.shape[2]
        return self.conv(F.pad(x, (0, 0, 0, 0, missing, 0)))


class AllSides(Wrapper):
    def __init__(self, mode: str) -> None:
        super().__init__(nn.Conv3d(2, 3, 3))
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1, 0, 0), mode=self.mode)
        return self.conv(torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2))


class Mirrored(Wrapper):
    """The frames in front are the clip's own, mirrored: any frames will do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x[:, :, 1:3].flip(2), x], 2))


class TimeInside(Wrapper):
    """The convolution's own padding in time is counted."""

    def __init__(self) -> None:
        super().__init__(nn.Conv3d(2, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1, 1, 0)))


FOLDED = {
    "frame by frame": FrameByFrame(),
    "every second frame": EverySecondFrame(2),
    "cache handed on": CacheHandedOn(),
    "zeros in front": ZerosInFront(),
    "replicate": AllSides("replicate"),
    "reflect": AllSides("reflect"),
    "mirrored in time": Mirrored(),
    "time inside": TimeInside(),
}


def _plans(module: nn.Module) -> list[folding.Plan | None]:
    return list(folding._plans.get(module, {}).values())


def _stream(module: nn.Module, chunks: list[Tensor], with_cache: bool) -> list[Tensor]:
    """Chunk after chunk, with what the module hands on, or the last frames, as cache."""
    results, cache = [], None
    for chunk in chunks:
        y = module(chunk, cache) if with_cache else module(chunk)
        if isinstance(y, tuple):
            y, cache = y
        elif with_cache:
            cache = chunk[:, :, -2:]
        results.append(y)
    return results


@pytest.mark.parametrize("kind", FOLDED)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
def test_one_call_gives_what_the_module_gave(kind: str, order: torch.memory_format) -> None:
    torch.manual_seed(0)
    module = copy.deepcopy(FOLDED[kind])
    plain = copy.deepcopy(module)
    with_cache = kind in ("cache handed on", "zeros in front")
    lengths = (5, 4, 1, 4) if with_cache or "frame" in kind else (5, 4, 6)
    lengths = (5, 4, 2, 4) if kind == "every second frame" else lengths
    chunks = [torch.randn(2, 2, t, 6, 7).contiguous(memory_format=order) for t in lengths]
    mf.patch(module)
    with torch.no_grad():
        expected = _stream(plain, chunks, with_cache)
        with Calls() as calls:
            actual = _stream(module, chunks, with_cache)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)
    assert (calls.torch, calls.native) == (0, len(chunks))
    plans = _plans(module)
    assert plans
    assert None not in plans
    if hasattr(plain, "earlier"):
        assert torch.equal(module.earlier, plain.earlier)
        assert module.earlier.data_ptr() != chunks[-1].data_ptr()


@pytest.mark.parametrize("kind", ["frame by frame", "cache handed on", "replicate"])
def test_gradients_through_a_stream(kind: str) -> None:
    torch.manual_seed(0)
    plain = copy.deepcopy(FOLDED[kind])
    module = copy.deepcopy(plain)
    mf.patch(module)
    chunks = [torch.randn(1, 2, t, 5, 6, requires_grad=True) for t in (4, 3)]
    found = []
    for m in (plain, module):
        results = _stream(m, chunks, kind == "cache handed on")
        loss = sum((y * y).sum() for y in results)
        found.append(torch.autograd.grad(loss, [*chunks, *m.parameters()]))
    for p, a in zip(*found, strict=True):
        torch.testing.assert_close(a, p, atol=2e-4, rtol=1e-4)


# --- what is no plan --------------------------------------------------------------------------
class Rectified(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x))


class Shifted(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 1


class Reversed(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flip(2))


class Interleaved(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x[:, :, 1:]), self.conv(x[:, :, :-1])], 2)


class KeepsTheInput(Wrapper):
    """What it keeps is the caller's own memory, which the caller may write to."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.conv(x)


class WritesItsInput(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x.zero_()
        return y


class LongClips(Wrapper):
    """Folded for short clips, something else for long ones."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if x.shape[2] < 6 else 2 * x)


class Counts(Wrapper):
    """A setting that every call changes is part of what a plan depends on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x if self.calls % 2 else x.roll(1, 2))


class _Standardized(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class StandardizedWeights(Wrapper):
    """The frames follow a plan, the weights of the call are not the convolution's parameters."""

    def __init__(self) -> None:
        super().__init__(_Standardized(2, 3, 3, padding=(0, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, 2, 0)))


@pytest.mark.parametrize(
    "kind",
    [
        Rectified,
        Shifted,
        Reversed,
        Interleaved,
        KeepsTheInput,
        WritesItsInput,
        LongClips,
        Counts,
        StandardizedWeights,
    ],
)
def test_what_is_no_plan_runs_as_it_is(kind: type[Wrapper]) -> None:
    torch.manual_seed(0)
    plain = kind()
    module = copy.deepcopy(plain)
    mf.patch(module)
    with torch.no_grad():
        for frames in (5, 7, 5):
            x = torch.randn(1, 2, frames, 6, 6)
            again = x.clone()
            torch.testing.assert_close(module(again), plain(x), atol=1e-5, rtol=1e-5)
            assert torch.equal(again, x)
    assert None in _plans(module)
    assert {k: v for k, v in vars(module).items() if k in ("seen", "calls")}.keys() == {
        k for k in vars(plain) if k in ("seen", "calls")
    }


def test_hooks_on_a_wrapped_convolution_are_called() -> None:
    module, seen = ZerosInFront(), []
    mf.patch(module)
    x = torch.randn(1, 2, 4, 5, 5)
    handle = module.conv.register_forward_hook(lambda m, args, y: seen.append(args[0].shape[2]))
    hooked = module(x)
    assert seen == [6]
    handle.remove()
    torch.testing.assert_close(module(x), hooked, atol=1e-6, rtol=1e-5)
    assert seen == [6]


def test_float64_autocast_and_compile_take_the_modules_own_way() -> None:
    torch.manual_seed(0)
    module = ZerosInFront()
    plain, x = copy.deepcopy(module), torch.randn(1, 2, 4, 5, 5)
    mf.patch(module)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x), plain(x), atol=0.05, rtol=0.05)
    assert not _plans(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, plain(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(copy.deepcopy(module).double()(x.double()), plain.double()(x.double()))


def test_a_changed_setting_is_looked_at_again() -> None:
    module = AllSides("replicate")
    plain, x = copy.deepcopy(module), torch.randn(1, 2, 4, 6, 6)
    mf.patch(module)
    with torch.no_grad():
        for mode in ("replicate", "reflect", "constant"):
            module.mode = plain.mode = mode
            if mode == "constant":  # zeros in the plane, the edge in time
                assert module(x).shape == plain(x).shape
            torch.testing.assert_close(module(x), plain(x), atol=1e-5, rtol=1e-5)
    assert len(_plans(module)) == 3


class PadsByMode(Wrapper):
    """Other frames in training, and again others where gradients are wanted."""

    def forward(self, x: Tensor) -> Tensor:
        mode = "replicate" if self.training else "constant"
        return self.conv(F.pad(x, (0, 0, 0, 0, 2 + torch.is_grad_enabled(), 0), mode=mode))


def test_training_and_gradients_are_settings_too() -> None:
    torch.manual_seed(0)
    module = PadsByMode()
    plain, x = copy.deepcopy(module), torch.randn(1, 2, 4, 6, 6)
    mf.patch(module)
    for training in (True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                ours, theirs = module.train(training)(x), plain.train(training)(x)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(_plans(module)) == 4
    assert None not in _plans(module)


def test_plans_are_bounded_and_go_with_their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MAX_PLANS", 2)
    module = ZerosInFront()
    mf.patch(module)
    with torch.no_grad():
        for frames in (3, 4, 5, 6):
            module(torch.randn(1, 2, frames, 5, 5))
    assert len(_plans(module)) == 2
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None


def test_wrappers_come_back() -> None:
    module = ZerosInFront()
    assert len(mf.patch(module).swapped) == 1
    assert isinstance(module, folding.FoldedWrapper)
    assert mf.unpatch(module) == 1
    assert type(module) is ZerosInFront
    assert type(module.conv) is nn.Conv3d
