"""Routing: what modules compute with functional convolutions and group norms runs on our kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.compat.peers import diffusers
from tests.compat.test_patch import Calls, assert_close
from torch import Tensor, nn

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.compat import routing

pytestmark = pytest.mark.filterwarnings("ignore")  # the third parties' own


class OwnCall(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), self.weight * 2, self.bias, stride=(1, 2, 1))


class OwnConvForward(nn.Conv3d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class OwnNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2) + 1


class Modulated(nn.Module):
    """A convolution of its own for each clip of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        weights = self.weight * x.mean((2, 3, 4)).view(b, 1, c, 1, 1, 1)
        y = F.conv3d(x.view(1, b * c, *size), weights.flatten(0, 1), padding="same", groups=b)
        return y.view(b, c, *size)


class Wavelet(nn.Module):
    """Two taps along each axis in turn, there and back; values that need not be wavelets."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", torch.tensor([0.3, -1.2]))

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        for shape, stride in (((2, 1, 1), (2, 1, 1)), ((1, 2, 1), (1, 2, 1))):
            weight = self.taps.view(1, 1, *shape).repeat(c, 1, 1, 1, 1)
            y = F.conv3d(x, weight, torch.ones(c, dtype=x.dtype), stride=stride, groups=c)
            x = x[..., : y.shape[2] * stride[0], : y.shape[3] * stride[1], :]
            x = x + F.conv_transpose3d(y, weight, stride=stride, groups=c)
        return x


MODULES = {
    "own call": (OwnCall(4, 6, 3), "causal_conv3d"),
    "own _conv_forward": (OwnConvForward(4, 6, 3), "causal_conv3d"),
    "own norm": (OwnNorm(2, 4), "group_norm_silu"),
    "modulated": (Modulated(), "causal_conv3d"),
    "wavelet": (Wavelet(), "causal_conv3d"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_functional_calls_are_native_with_gradients(kind: str) -> None:
    torch.manual_seed(0)
    module, op = copy.deepcopy(MODULES[kind][0]), MODULES[kind][1]
    x = torch.randn(2, 4, 5, 7, 6)

    def run(m: nn.Module, values: Tensor) -> list[Tensor]:
        values = values.clone().requires_grad_()
        y = m(values)
        y.square().sum().backward()
        return [y.detach(), values.grad, *(p.grad for p in m.parameters())]

    exact = run(copy.deepcopy(module).double(), x.double())
    plain = run(copy.deepcopy(module), x)
    report = mf.patch(module, verify=True)
    assert [(entry.op, entry.note) for entry in report.swapped] == [
        (op, "its functional calls are native")
    ]
    for impl in ("native", "auto"):  # which may find PyTorch faster
        with _native.default_impl(impl), Calls() as calls:
            actual = run(module, x)
        assert calls.torch == 0 or impl == "auto"
        for a, p, e in zip(actual, plain, exact, strict=True):
            assert_close(a, p, e, kind)
        module.zero_grad()
    assert mf.unpatch(module) == 1
    with torch.no_grad():
        assert torch.equal(module(x), plain[0])


def test_other_transposed_convolutions_and_dtypes_stay_with_torch() -> None:
    class Upsample(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose3d(x, torch.ones(4, 4, 3, 3, 3, dtype=x.dtype), stride=2)

    module = Upsample()
    x = torch.randn(1, 4, 3, 3, 3)
    plain, double = module(x), MODULES["own call"][0]
    mf.patch(module)
    assert torch.equal(module(x), plain)
    twin = copy.deepcopy(double).double()
    expected = twin(x.double())
    mf.patch(twin)
    assert torch.equal(twin(x.double()), expected)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(x), plain)


def test_a_name_is_not_yet_a_call() -> None:
    """`self.conv3d(x)` calls a module."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv3d = nn.Conv3d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv3d(x)

    assert not routing.calls_functions(Named())
    assert not routing.calls_functions(nn.Conv3d(2, 2, 1))
    assert [entry.name for entry in mf.patch(Named()).swapped] == ["conv3d"]


def test_verification_refuses_what_disagrees_and_what_it_cannot_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NeedsTwo(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return F.conv3d(x, weight)

    report = mf.patch(NeedsTwo(), verify=True)
    assert "no input was found" in report.left[0].note
    wrong = {torch.conv3d: lambda *args, **more: torch.zeros(1) + 7}
    monkeypatch.setattr(routing, "_ROUTES", wrong)
    module = copy.deepcopy(MODULES["own call"][0])
    report = mf.patch(module, verify=True)
    assert "its error is" in report.left[0].note
    assert type(module) is OwnCall


def test_minimax_h3s_encoder() -> None:
    """Its convolutions call F.conv3d, its norms fold frames into the batch."""
    diffusers()
    from diffusers.models.autoencoders import autoencoder_kl_minimax_h3 as h3

    torch.manual_seed(0)
    model = h3.MiniMaxH3VideoEncoder3d(
        out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2,
        spatial_downsample_factors=(2, 1), temporal_downsample_factors=(1, 2),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 5, 16, 16)
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double()(x.double()), model(x)
        report = mf.patch(model, verify=True)
        assert not report.left, report
        with Calls() as calls:
            assert_close(model(x), plain, exact, "latent")
    assert calls.torch == 0
    assert calls.native > 0
