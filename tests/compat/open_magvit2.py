"""Open-MAGVIT2's tokenizers as functions of a state_dict, in plain PyTorch: what ours must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
GROUPS, EPS = 32, 1e-6


@dataclass(frozen=True)
class Peer:
    """One of their models. `flat`: that of images, with 2D convolutions."""

    filters: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 1
    bits: int = 6
    conv_shortcut: bool = False
    flat: bool = False

    # ---- keys and shapes ------------------------------------------------------------------------
    def _conv(self, name: str, size: tuple[int, int], kernel: int = 3, *, bias: bool) -> dict:
        name += "" if self.flat else ".conv_1"
        taps = (kernel,) * (2 if self.flat else 3)
        shapes = {f"{name}.weight": (*size, *taps)}
        return shapes | ({f"{name}.bias": size[:1]} if bias else {})

    def _block(self, name: str, given: int, made: int) -> dict[str, tuple[int, ...]]:
        shapes = {f"{name}.norm1.{p}": (given,) for p in ("weight", "bias")}
        shapes |= {f"{name}.norm2.{p}": (made,) for p in ("weight", "bias")}
        shapes |= self._conv(f"{name}.conv1", (made, given), bias=False)
        shapes |= self._conv(f"{name}.conv2", (made, made), bias=False)
        if given != made:
            kind, kernel = ("conv", 3) if self.conv_shortcut else ("nin", 1)
            shapes |= self._conv(f"{name}.{kind}_shortcut", (made, given), kernel, bias=False)
        return shapes

    def temporal(self, level: int) -> bool:
        """Time is kept at levels of the base width."""
        return not self.flat and self.multipliers[level] != 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        widths = [self.filters * m for m in self.multipliers]
        deep, last = widths[-1], len(widths) - 1
        shapes = self._conv("encoder.conv_in", (self.filters, 3), bias=False)
        width = self.filters
        for i, made in enumerate(widths):
            for j in range(self.blocks):
                shapes |= self._block(f"encoder.down.{i}.block.{j}", width, made)
                width = made
            if i < last:
                shapes |= self._conv(f"encoder.down.{i}.downsample", (made, made), bias=True)
        shapes |= self._conv("encoder.conv_out", (self.bits, deep), 1, bias=True)
        shapes |= self._conv("decoder.conv_in", (deep, self.bits), bias=True)
        for half, out in (("encoder", deep), ("decoder", widths[0])):
            for j in range(self.blocks):
                shapes |= self._block(f"{half}.mid_block.{j}", deep, deep)
            shapes |= {f"{half}.norm_out.{p}": (out,) for p in ("weight", "bias")}
        for i in reversed(range(len(widths))):
            for part in ("gamma", "beta"):
                shapes[f"decoder.adaptive.{i}.{part}.weight"] = (width, self.bits)
                shapes[f"decoder.adaptive.{i}.{part}.bias"] = (width,)
            for j in range(self.blocks):
                shapes |= self._block(f"decoder.up.{i}.block.{j}", width, widths[i])
                width = widths[i]
            if i:
                made = width * (8 if self.temporal(i - 1) else 4)
                shapes |= self._conv(f"decoder.up.{i}.upsample.conv1", (made, width), bias=True)
        return shapes | self._conv("decoder.conv_out", (3, widths[0]), bias=True)

    def state(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> State:
        """Random values of a size that keeps activations near one."""
        g = torch.Generator().manual_seed(seed)
        state = {}
        for name, shape in self.shapes().items():
            noise = torch.randn(shape, generator=g, dtype=torch.float64)
            fan = max(1, noise[0].numel()) if noise.dim() > 1 else 16
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            state[name] = (around + noise / fan**0.5).to(dtype)
        return state

    # ---- the networks ---------------------------------------------------------------------------
    def conv(self, s: State, name: str, x: Tensor, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        if self.flat:
            weight, bias = s[f"{name}.weight"], s.get(f"{name}.bias")
            return F.conv2d(x, weight, bias, stride[1:], weight.shape[-1] // 2)
        weight, bias = s[f"{name}.conv_1.weight"], s.get(f"{name}.conv_1.bias")
        side = weight.shape[-1] // 2
        padded = F.pad(x, (side, side, side, side, weight.shape[2] - 1, 0))
        return F.conv3d(padded, weight, bias, stride)

    def norm(self, s: State, name: str, x: Tensor) -> Tensor:
        y = F.group_norm(x, GROUPS, s[f"{name}.weight"], s[f"{name}.bias"], EPS)
        return y * torch.sigmoid(y)

    def block(self, s: State, name: str, x: Tensor) -> Tensor:
        y = self.conv(s, f"{name}.conv1", self.norm(s, f"{name}.norm1", x))
        y = self.conv(s, f"{name}.conv2", self.norm(s, f"{name}.norm2", y))
        if x.shape[1] != y.shape[1]:
            kind = "conv" if self.conv_shortcut else "nin"
            x = self.conv(s, f"{name}.{kind}_shortcut", x)
        return x + y

    def _stride(self, level: int) -> tuple[int, int, int]:
        return (2 if self.temporal(level) else 1, 2, 2)

    def encode(self, s: State, x: Tensor) -> Tensor:
        x = self.conv(s, "encoder.conv_in", x)
        for i in range(len(self.multipliers)):
            for j in range(self.blocks):
                x = self.block(s, f"encoder.down.{i}.block.{j}", x)
            if i < len(self.multipliers) - 1:
                x = self.conv(s, f"encoder.down.{i}.downsample", x, self._stride(i))
        for j in range(self.blocks):
            x = self.block(s, f"encoder.mid_block.{j}", x)
        return self.conv(s, "encoder.conv_out", self.norm(s, "encoder.norm_out", x))

    def decode(self, s: State, latent: Tensor) -> Tensor:
        x = self.conv(s, "decoder.conv_in", latent)
        for j in range(self.blocks):
            x = self.block(s, f"decoder.mid_block.{j}", x)
        for i in reversed(range(len(self.multipliers))):
            x = self.adapt(s, f"decoder.adaptive.{i}", x, latent)
            for j in range(self.blocks):
                x = self.block(s, f"decoder.up.{i}.block.{j}", x)
            if i:
                y = self.conv(s, f"decoder.up.{i}.upsample.conv1", x)
                x = self.spread(y, self._stride(i - 1))
        return self.conv(s, "decoder.conv_out", self.norm(s, "decoder.norm_out", x))

    def adapt(self, s: State, name: str, x: Tensor, latent: Tensor) -> Tensor:
        values = latent.flatten(2)
        deviation = (values.var(2, unbiased=True) + EPS).sqrt()
        gamma = F.linear(deviation, s[f"{name}.gamma.weight"], s[f"{name}.gamma.bias"])
        beta = F.linear(values.mean(2), s[f"{name}.beta.weight"], s[f"{name}.beta.bias"])
        shape = (*gamma.shape, *[1] * (x.dim() - 2))
        return F.group_norm(x, GROUPS, eps=EPS) * gamma.view(shape) + beta.view(shape)

    def spread(self, y: Tensor, factor: tuple[int, int, int]) -> Tensor:
        """Channels (s_t, s_h, s_w, C) to positions; where time doubles, frame 1 goes."""
        y = y.unsqueeze(2) if self.flat else y
        frames = [None] * (y.shape[2] * factor[0])
        width = y.shape[1] // (factor[0] * 4)
        for t in range(y.shape[2]):
            for i in range(factor[0]):
                places = y[:, i * 4 * width : (i + 1) * 4 * width, t].unflatten(1, (2, 2, width))
                rows = places.permute(0, 3, 4, 1, 5, 2)  # B, C, H, 2, W, 2
                frames[t * factor[0] + i] = rows.flatten(2, 3).flatten(3, 4)
        if factor[0] == 2:
            del frames[1]
        return frames[0] if self.flat else torch.stack(frames, 2)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(signs with a straight-through gradient, ids flat and least significant first)."""
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        places = 2 ** torch.arange(self.bits).view(-1, *[1] * (z.dim() - 2))
        return z + (signs - z).detach(), ((z > 0) * places).sum(1).flatten()
