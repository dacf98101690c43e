"""What a planner asks of a video model, and MaskViT as one.

An action belongs to the frame at which it is taken: action t leads from frame t to frame t + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from magvit_fast.decoding._inputs import Tokenizer, evaluation
from magvit_fast.decoding.maskvit import (
    FramePredictor,
    MaskViTDecoding,
    decode_frames,
    frame_geometry,
)
from magvit_fast.ops._checks import check_int, check_tensor


@dataclass(frozen=True)
class History:
    """What was seen and done up to now.

    frames: float [C, K, H, W] in [0, 1], oldest first; the last one is the present.
    actions: float [K - 1, A], action k was taken at frame k.
    """

    frames: Tensor
    actions: Tensor

    def __post_init__(self) -> None:
        check_tensor("frames", self.frames, ndim=4, floating=True)
        check_tensor("actions", self.actions, ndim=2, floating=True)
        if self.frames.shape[1] < 1 or len(self.actions) != self.frames.shape[1] - 1:
            raise ValueError(
                f"actions: expected one fewer than the {self.frames.shape[1]} frames, "
                f"got {len(self.actions)}"
            )

    def last(self, frames: int) -> History:
        """The last `frames` frames; a shorter past is filled with its first frame and no motion.

        No motion is an action of zeros.
        """
        lack = frames - self.frames.shape[1]
        if lack <= 0:
            start = -lack
            return History(self.frames[:, start:], self.actions[start:])
        still = self.frames[:, :1].expand(-1, lack, -1, -1)
        idle = self.actions.new_zeros(lack, self.actions.shape[1])
        return History(torch.cat([still, self.frames], 1), torch.cat([idle, self.actions]))


class VideoModel(Protocol):
    """Predicts frames from a history and actions."""

    @property
    def context(self) -> int:
        """Frames of history that it looks at."""

    def predict(self, history: History, actions: Tensor) -> Tensor:
        """The frames after each of actions [P, H, A]: float [P, C, H, h, w] in [0, 1].

        history has `context` frames; the first action is taken at its last one.
        """


class TokenModel(VideoModel, Protocol):
    """A video model that predicts tokens."""

    def encode(self, frame: Tensor) -> Tensor:
        """Frame [C, H, W] -> int64 [h, w]."""

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [...] -> the codes that they stand for, [..., D]."""

    def predict_ids(self, history: History, actions: Tensor) -> Tensor:
        """As predict: int64 [P, H, h, w]."""

    def log_likelihood(
        self, history: History, actions: Tensor, goal: Tensor, scored: Tensor
    ) -> Tensor:
        """Log p of the goal's tokens [h, w] at the frames of `scored` (bool [H]), mean over tokens.

        Returns [P, H], 0 at the other frames, which are predicted first and then taken as known.
        """


class MaskViTModel:
    """FrameTokenizer and MaskViTTransformer (with actions) as the model of a planner.

    Args:
        tokenizer, transformer: a pair that fits, on one device; the transformer has actions.
        context: frames of history (RoboNet: 2).
        decoding: how predictions are made; None = five passes without noise, as VP2 plans.

    Observations and actions may be on any device; predictions are on the models'.
    A prediction spans context + H frames, at most the transformer's. The action at its last frame
    has no effect inside the clip; it is zero. Draws (a decoding with temperature) are keyed by the
    place of a candidate in its batch; without them a prediction depends on its actions alone.

    Raises:
        ValueError: models that do not fit each other or have no actions, too long a context.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: FramePredictor,
        *,
        context: int = 2,
        decoding: MaskViTDecoding | None = None,
    ) -> None:
        self.geometry = frame_geometry(tokenizer, transformer)
        if not transformer.config.action_dim:
            raise ValueError("transformer: expected one with actions, got action_dim 0")
        check_int("context", context, least=1)
        if context >= self.geometry.frames:
            raise ValueError(
                f"context: expected fewer frames than the transformer's {self.geometry.frames}, "
                f"got {context}"
            )
        self.tokenizer, self.transformer = tokenizer, transformer
        self.decoding = decoding or MaskViTDecoding.for_planning()
        self._context = context
        weights = transformer.parameters() if isinstance(transformer, nn.Module) else iter(())
        self.device = next(weights, torch.empty(0)).device

    @property
    def context(self) -> int:
        return self._context

    def encode(self, frame: Tensor) -> Tensor:
        """Frame [C, H, W] in [0, 1] -> int64 [h, w]."""
        return self._encode(frame[:, None])[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [...] -> codes of the tokenizer's quantizer [..., D]."""
        tokenizer: Any = self.tokenizer
        codes: Tensor = tokenizer.quantizer.codes(ids.reshape(1, -1)).detach()  # [1, D, n]
        return codes[0].T.reshape(*ids.shape, -1)

    def predict(self, history: History, actions: Tensor) -> Tensor:
        """Frames [P, C, H, h, w] after each of actions [P, H, A]."""
        with evaluation(self.tokenizer, self.transformer):
            return self.tokenizer.decode(self.predict_ids(history, actions))

    def predict_ids(self, history: History, actions: Tensor) -> Tensor:
        """Tokens int64 [P, H, h, w] after each of actions [P, H, A]."""
        ids, rows, known = self._clips(history, actions)
        with evaluation(self.transformer):
            ids = decode_frames(self.transformer, ids, known, self.decoding, actions=rows)
        return ids[:, self.context :]

    def log_likelihood(
        self, history: History, actions: Tensor, goal: Tensor, scored: Tensor
    ) -> Tensor:
        """See TokenModel: one more pass, with the scored frames masked and all others known."""
        ids, rows, known = self._clips(history, actions)
        future = torch.zeros_like(known)
        future[self.context :] = scored.to(known.device)
        with evaluation(self.transformer):
            if not (known | future).all():
                ids = decode_frames(self.transformer, ids, known, self.decoding, actions=rows)
            unknown = future.view(1, -1, 1, 1).expand(ids.shape)
            logits = self.transformer(ids, unknown, actions=rows)[:, self.context :]
        logs = logits.float().log_softmax(-1)
        at_goal = logs.gather(-1, goal.expand(logs.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return at_goal.mean((2, 3)) * scored.to(at_goal.device)

    def _encode(self, frames: Tensor) -> Tensor:
        """[C, K, H, W] -> int64 [K, h, w]."""
        size = (self.geometry.height, self.geometry.width)
        if tuple(frames.shape[2:]) != size:
            raise ValueError(
                f"frames: expected {size[0]}x{size[1]} pixels (the transformer's grid through this "
                f"tokenizer), got {frames.shape[2]}x{frames.shape[3]}"
            )
        with evaluation(self.tokenizer):
            ids: Tensor = self.tokenizer.encode(frames.unsqueeze(0).to(self.device))
        return ids[0]

    def _clips(self, history: History, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [P, K + H, h, w], their actions [P, K + H, A], which frames are known, bool [K + H]."""
        width, most = self.transformer.config.action_dim, self.geometry.frames - self.context
        if actions.dim() != 3 or actions.shape[2] != width or not 1 <= actions.shape[1] <= most:
            raise ValueError(
                f"actions: expected [P, H, {width}] with H in 1..{most} (the transformer's "
                f"{self.geometry.frames} frames less {self.context} of context), "
                f"got {tuple(actions.shape)}"
            )
        if history.frames.shape[1] != self.context or history.actions.shape[1] != width:
            raise ValueError(
                f"history: expected {self.context} frames and actions of {width} numbers, "
                f"got {history.frames.shape[1]} and {history.actions.shape[1]}"
            )
        population, horizon = actions.shape[:2]
        actions = actions.to(self.device)
        given = self._encode(history.frames)
        ids = given.new_zeros(population, self.context + horizon, *given.shape[1:])
        ids[:, : self.context] = given
        past = history.actions.to(actions).expand(population, -1, -1)
        rows = torch.cat([past, actions, torch.zeros_like(actions[:, :1])], dim=1)
        known = torch.arange(ids.shape[1], device=ids.device) < self.context
        return ids, rows, known
