"""Feature maps stay channels_last_3d from pixels to codes and back: no layer copies or pads them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor, nn

import magvit_fast as mf

COPIES = ("aten::copy_", "aten::clone", "aten::cat", "aten::constant_pad_nd")
PADS = ("aten::replication_pad3d", "aten::reflection_pad3d")


def _v2() -> tuple[nn.Module, Tensor]:
    config = mf.models.MagvitV2Config(
        filters=16,
        channel_multipliers=(1, 2, 2),
        temporal_downsample=(False, True),
        num_res_blocks=1,
        num_bits=8,
    )
    return mf.models.MagvitV2Tokenizer(config), torch.rand(1, 3, 5, 32, 32)


def _v1() -> tuple[nn.Module, Tensor]:
    config = mf.models.MagvitConfig(
        filters=16,
        channel_multipliers=(1, 2, 2),
        temporal_downsample=(False, True),
        num_res_blocks=1,
    )
    return mf.models.MagvitTokenizer(config), torch.rand(1, 3, 4, 32, 32)


def _discriminator() -> tuple[nn.Module, Tensor]:
    config = mf.models.DiscriminatorConfig(clip=(5, 32, 32), filters=16, channel_multipliers=(2, 2))
    return mf.models.Discriminator3D(config), torch.rand(1, 3, 5, 32, 32)


def _copies(run: Callable[[], object], larger_than: int) -> list[tuple[str, list[int]]]:
    """Copies of tensors of more than so many elements, wherever they happen.

    The repetition of an up-sampling by nearest neighbors (8 axes) writes new values and is none;
    nor is what the losses do with codes in rows (2 axes).
    """
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    found = []
    for event in profile.events() or ():
        shape = event.input_shapes[0] if event.input_shapes else []
        if (
            event.name in COPIES + PADS
            and prod(shape or [0]) > larger_than
            and len(shape) not in (2, 8)
        ):
            found.append((event.name, shape))
    return found


@pytest.mark.parametrize("make", [_v2, _v1], ids=["magvit_v2", "magvit"])
def test_no_copies_in_encode_and_decode(
    make: Callable[[], tuple[mf.models.MagvitV2Tokenizer, Tensor]],
) -> None:
    tokenizer, video = make()
    with torch.no_grad():
        ids = tokenizer.encode(video)
        assert _copies(lambda: tokenizer.encode(video), video.numel()) == []
        assert _copies(lambda: tokenizer.decode(ids), video.numel()) == []


@pytest.mark.parametrize("make", [_v2, _v1, _discriminator], ids=["magvit_v2", "magvit", "disc"])
def test_no_copies_in_training(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, video = make()

    def step() -> None:
        out = model(video)
        (out if isinstance(out, Tensor) else out.reconstruction).square().mean().backward()

    step()  # gradients have their memory then
    assert _copies(step, video.numel()) == []


def test_what_a_copy_is() -> None:
    """The tests above would see a layer that works in the other memory format."""
    x = torch.randn(1, 8, 3, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        assert _copies(lambda: torch.nn.functional.avg_pool3d(x, 2), 1000)
        scale = torch.zeros(1, 8, 1, 1, 1)
        planes = x.contiguous()
        assert _copies(lambda: mf.group_norm_silu(planes, 2, scale=scale, impl="native"), 1000)
        assert _copies(lambda: mf.group_norm_silu(planes, 2, impl="native"), 1000) == []


@pytest.mark.parametrize("size", [(4, 8, 6), (5, 7, 3), (1, 1, 1), (2, 3, 9)])
@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 2)])
def test_average_pool_in_both_formats(
    size: tuple[int, int, int], factor: tuple[int, int, int]
) -> None:
    from magvit_fast.nn.resample import average_pool

    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    plain = average_pool(x, factor)
    last = average_pool(x.contiguous(memory_format=torch.channels_last_3d), factor)
    torch.testing.assert_close(last, plain)
    dy = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(last, x, dy), torch.autograd.grad(plain, x, dy), strict=True
    ):
        torch.testing.assert_close(a, b)
