"""Windows of a video's tokens: attention inside a window is attention over a batch of windows."""

from __future__ import annotations

from torch import Tensor

Window = tuple[int, int, int]


def to_windows(x: Tensor, window: Window) -> Tensor:
    """Cut [B, T, h, w, D] into tiles that do not overlap: [B * tiles, wt * wh * ww, D].

    The order is t, h, w both of the tiles of a clip and inside a tile. `window` (wt, wh, ww)
    divides (T, h, w).
    """
    b, t, h, w, d = x.shape
    wt, wh, ww = window
    nt, nh, nw = t // wt, h // wh, w // ww
    tiles = x.reshape(b, nt, wt, nh, wh, nw, ww, d).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return tiles.reshape(b * nt * nh * nw, wt * wh * ww, d)


def from_windows(windows: Tensor, size: tuple[int, int, int], window: Window) -> Tensor:
    """The inverse of `to_windows`, size = (T, h, w): [B * tiles, wt * wh * ww, D] -> [B, T, h, w, D]."""
    (t, h, w), (wt, wh, ww), d = size, window, windows.shape[-1]
    nt, nh, nw = t // wt, h // wh, w // ww
    b = windows.shape[0] // (nt * nh * nw)
    tiles = windows.reshape(b, nt, nh, nw, wt, wh, ww, d).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return tiles.reshape(b, t, h, w, d)
