"""confidence_remask: one step of masked decoding, sampling every unknown token and keeping the surest.

Next hop: `_core.confidence_remask` / `_core_cuda.confidence_remask` (csrc/confidence_remask).
"""

from __future__ import annotations

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks

# --- contract ---------------------------------------------------------------------------------
# logits [B, N, G, V], tokens int64 [B, N] packed (sub-token g at bits g*log2(V)), unknown bool [B, N].
# For each unknown position and sub-token, logits in float32, w_v = exp((logit_v - max) / temperature):
#   value = the first v with w_0 + ... + w_v > u * (sum of all w), u = uniform(0, (b*N + n)*G + g); sums in float64.
#           noise given: argmax_v (logit / temperature + noise); temperature 0: argmax of the logits; ties: the first
#   log p = log_softmax(logits)[value]                                     (temperature 1)
# confidence = sum over g of log p + choice_temperature * gumbel(1, b*N + n).
# The num_unknown[b] least confident stay unknown (of equals the lower position), all if they are fewer.
# Every unknown position gets its sampled token, those that stay unknown too; known positions keep theirs.
# Word i of a stream is word i % 4 of Philox4x32-10 with counter (i // 4 low, high, step, stream) and key (seed low,
# high). gumbel(stream, i) = -log(-log((k + 1/2) * 2**-23)), k the top 23 bits of word i; uniform(stream, i) =
# (k + 1/2) * 2**-52, k the 52 bits of word 2 i and the top of word 2 i + 1.
# A NaN, a +inf, or no finite logit in a sub-token of an unknown position is an error: a ValueError where that
# can be known without waiting for a device, and the token -1 there in any case.

MAX_GROUPS = 8
VALUE_STREAM, CHOICE_STREAM = 0, 1


# --- reference --------------------------------------------------------------------------------
_WORD = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, both below 2**32, in int64 without overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox_words(index: Tensor, step: int, stream: int, seed: int) -> Tensor:
    """The 32 random bits of each element (int64), bit for bit those of csrc/common/philox.h."""
    group = index >> 2
    x = [group & _WORD, (group >> 32) & _WORD, torch.full_like(group, step)]
    x.append(torch.full_like(group, stream))
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(x[0], 0xD2511F53)
        high1, low1 = _multiply(x[2], 0xCD9E8D57)
        x = [high1 ^ x[1] ^ key0, low1, high0 ^ x[3] ^ key1, low0]
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    lane = index & 3
    return torch.where(
        lane < 2, torch.where(lane == 0, x[0], x[1]), torch.where(lane == 2, x[2], x[3])
    )


def gumbel(index: Tensor, step: int, stream: int, seed: int) -> Tensor:
    """Standard Gumbel numbers (float32) of the elements `index` (int64)."""
    bits = philox_words(index, step, stream, seed) >> 9
    u = (bits.float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def uniform(index: Tensor, step: int, stream: int, seed: int) -> Tensor:
    """Numbers in (0, 1), float64, of the elements `index` (int64)."""
    high = philox_words(2 * index, step, stream, seed) << 20
    low = philox_words(2 * index + 1, step, stream, seed) >> 12
    return ((high + low).double() + 0.5) * 2.0**-52


def draw_values(scores: Tensor, step: int, seed: int) -> Tensor:
    """Values [B, N, G] drawn from the softmax of scores [B, N, G, V]: those of the op, its scores given."""
    rows = torch.arange(scores[..., 0].numel(), device=scores.device).view(*scores.shape[:-1], 1)
    u = uniform(rows, step, VALUE_STREAM, seed)
    through = (scores - scores.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    whole = through[..., -1:]
    last = (through < whole).sum(-1)  # the last value with a weight, where rounding makes u 1
    return torch.minimum((through <= u * whole).sum(-1), last)


def reference(
    logits: Tensor,
    tokens: Tensor,
    unknown: Tensor,
    num_unknown: Tensor,
    value_noise: Tensor | None,
    choice_noise: Tensor | None,
    temperature: float,
    choice_temperature: float,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Plain torch. Float64 logits are sampled in float64."""
    batch, length, groups, values = logits.shape
    x = logits if logits.dtype == torch.float64 else logits.float()
    device = x.device
    scores = x
    if temperature > 0 and value_noise is None:
        picks = draw_values(x / temperature, step, seed)  # [B, N, G]
    else:
        if temperature > 0 and value_noise is not None:
            scores = x / temperature + value_noise
        picks = scores.argmax(-1)  # the first of equals
    confidence = x.log_softmax(-1).gather(-1, picks.unsqueeze(-1)).squeeze(-1).sum(-1)
    if choice_temperature > 0:
        if choice_noise is None:
            index = torch.arange(batch * length, device=device).view(batch, length)
            choice_noise = gumbel(index, step, CHOICE_STREAM, seed)
        confidence = confidence + choice_temperature * choice_noise
    shifts = (values.bit_length() - 1) * torch.arange(groups, device=device)
    sampled = torch.where(_bad(x, scores), -1, (picks << shifts).sum(-1))
    new_tokens = torch.where(unknown, sampled, tokens)
    order = torch.where(unknown, confidence, torch.inf).argsort(dim=-1, stable=True)
    positions = torch.arange(length, device=device).expand(batch, length)
    rank = torch.empty_like(order).scatter_(1, order, positions)
    return new_tokens, (rank < num_unknown.unsqueeze(1)) & unknown


def _bad(x: Tensor, scores: Tensor) -> Tensor:
    """Positions [B, N] whose logits (or noise) allow no sample."""
    top = x.amax(-1)  # NaN if any is
    return (~top.isfinite() | scores.isnan().any(-1)).any(-1)


def _complain(length: int, position: int) -> None:
    raise ValueError(
        "logits: expected no NaN, no +inf and at least one finite value per sub-token (and no NaN in "
        f"noise), got otherwise at the unknown position {divmod(position, length)}"
    )


# --- schema and fake --------------------------------------------------------------------------
_native.LIB.define(
    "confidence_remask(Tensor logits, Tensor tokens, Tensor unknown, Tensor num_unknown,"
    " Tensor? value_noise, Tensor? choice_noise, float temperature, float choice_temperature,"
    " int seed, int step) -> (Tensor, Tensor)"
)


def _fake(logits: Tensor, tokens: Tensor, unknown: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), unknown.new_empty(unknown.shape)


torch.library.register_fake("magvit_fast::confidence_remask", _fake, lib=_native.LIB)


# --- launch -----------------------------------------------------------------------------------
def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _launch(
    logits: Tensor, tokens: Tensor, unknown: Tensor, num_unknown: Tensor,
    value_noise: Tensor | None, choice_noise: Tensor | None, temperature: float,
    choice_temperature: float, seed: int, step: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, groups, values = logits.shape
    logits, tokens, unknown = logits.contiguous(), tokens.contiguous(), unknown.contiguous()
    num_unknown = num_unknown.contiguous()
    value_noise, choice_noise = _contiguous(value_noise), _contiguous(choice_noise)
    new_tokens, new_unknown = torch.empty_like(tokens), torch.empty_like(unknown)
    workspace = torch.empty(batch * length * 16, dtype=torch.uint8, device=logits.device)
    bad = _checks.no_bad_position(logits.device)
    _native.trace("confidence_remask", logits=tuple(logits.shape), dtype=logits.dtype,
                  device=logits.device, step=step)  # fmt: skip
    core, where, how = _native.launcher(logits.device)
    core.confidence_remask(
        logits.data_ptr(), tokens.data_ptr(), unknown.data_ptr(), num_unknown.data_ptr(),
        0 if value_noise is None else value_noise.data_ptr(),
        0 if choice_noise is None else choice_noise.data_ptr(),
        new_tokens.data_ptr(), new_unknown.data_ptr(), bad.data_ptr(), workspace.data_ptr(),
        batch, length, groups, values.bit_length() - 1, _native.dtype_code(logits.dtype),
        temperature, choice_temperature, seed, step, where, how,
    )  # fmt: skip
    _native.finish(logits.device)
    position = _checks.first_bad_position(bad)
    if position is not None:
        _complain(length, position)
    return new_tokens, new_unknown


_native.LIB.impl("confidence_remask", _launch, "CPU")
_native.LIB.impl("confidence_remask", _launch, "CUDA")
_OP = torch.ops.magvit_fast.confidence_remask.default


# --- autograd ---------------------------------------------------------------------------------
# None: a sample has no gradient.


# --- public -----------------------------------------------------------------------------------
def _check_shapes(logits: Tensor, tokens: Tensor, unknown: Tensor) -> None:
    _checks.check_tensor("logits", logits, ndim=4, floating=True)
    groups, values = logits.shape[2:]
    bits = values.bit_length() - 1
    if values < 1 or values & (values - 1):
        raise ValueError(f"logits: expected a power of two of values, got {tuple(logits.shape)}")
    if not 1 <= groups <= MAX_GROUPS or groups * bits > 62 or bits > 30:
        raise ValueError(
            f"logits: expected 1 to {MAX_GROUPS} sub-tokens, at most 30 bits each and 62 together, "
            f"got shape {tuple(logits.shape)}"
        )
    for name, x, dtype in (("tokens", tokens, torch.int64), ("unknown", unknown, torch.bool)):
        _checks.check_tensor(name, x)
        _checks.check_same(name, x, "logits", logits, dtype=False)
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")
        if x.shape != logits.shape[:2]:
            raise ValueError(
                f"{name}: expected shape {tuple(logits.shape[:2])} (of logits), got {tuple(x.shape)}"
            )


def _counts(num_unknown: int | Tensor, logits: Tensor) -> Tensor:
    """num_unknown as int64 [B] on the device of logits."""
    batch = logits.shape[0]
    if not isinstance(num_unknown, Tensor):
        _checks.check_int("num_unknown", num_unknown, least=0)
        return torch.full((batch,), num_unknown, dtype=torch.int64, device=logits.device)
    if num_unknown.is_floating_point() or num_unknown.dtype == torch.bool:
        raise TypeError(f"num_unknown: expected an int or an int tensor, got {num_unknown.dtype}")
    if num_unknown.dim() > 1 or num_unknown.numel() not in (1, batch):
        raise ValueError(
            f"num_unknown: expected shape () or ({batch},), got {tuple(num_unknown.shape)}"
        )
    if num_unknown.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
        least = int(num_unknown.min())
        if least < 0:
            raise ValueError(f"num_unknown: expected 0 or more, got {least}")
    return num_unknown.to(logits.device, torch.int64).expand(batch)


def _check_numbers(temperature: float, choice_temperature: float, seed: int, step: int) -> None:
    _checks.check_number("temperature", temperature, least=0.0)
    _checks.check_number("choice_temperature", choice_temperature, least=0.0)
    _checks.check_int("seed", seed)
    _checks.check_int("step", step)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
    if not 0 <= step < 2**32:
        raise ValueError(f"step: expected 0 <= step < 2**32, got {step}")


def _check_noise(
    noise: tuple[Tensor, Tensor] | None, logits: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if noise is None:
        return None, None
    if len(noise) != 2:
        raise ValueError(f"noise: expected (values, choice), got {len(noise)} tensors")
    for name, x, shape in (
        ("noise[0]", noise[0], logits.shape),
        ("noise[1]", noise[1], logits.shape[:2]),
    ):
        _checks.check_tensor(name, x, floating=True)
        _checks.check_same(name, x, "logits", logits, dtype=False)
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    return noise


@torch.no_grad()
def confidence_remask(
    logits: Tensor,
    tokens: Tensor,
    unknown: Tensor,
    *,
    num_unknown: int | Tensor,
    temperature: float = 1.0,
    choice_temperature: float = 0.0,
    seed: int = 0,
    step: int = 0,
    noise: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of masked decoding: sample every unknown token, keep the most confident.

    Args:
        logits: [B, N, G, V], V a power of two, G <= 8; any floating dtype, any strides; -inf forbids a
            value.
        tokens: int64 [B, N], sub-token g at bits g*log2(V); only known positions are read.
        unknown: bool [B, N].
        num_unknown: how many positions of each clip stay unknown: an int, or int [B]. min(num_unknown,
            unknown ones) stay, exactly.
        temperature: of sampling; 0 takes the likeliest value.
        choice_temperature: weight of the Gumbel noise on the confidence.
        seed, step: key of the random numbers; the same key, shape and position draw the same numbers on
            every device and in the reference.
        noise: (Gumbel [B, N, G, V] for the values, Gumbel [B, N] for the confidence) instead of the draws.
        impl: "auto", "native" or "reference".

    Returns:
        tokens int64 [B, N]: sampled where unknown was True, as before elsewhere; and unknown, bool [B, N].

    Raises:
        ValueError: shapes or numbers that do not fit; logits of an unknown position with a NaN, a +inf or no
            finite value (on CUDA only with MAGVIT_FAST_SYNC=1; the token is -1 there).
        TypeError: wrong dtypes.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: MAGVIT (arXiv 2212.05199) algorithm 1 and its released code: noise on the log-probability, confidence at
    temperature 1; exactly num_unknown where the code's threshold keeps ties. Sub-tokens are sampled
    independently, their log-probabilities add up (our choice; MAGVIT-v2 does not say).
    """
    _check_shapes(logits, tokens, unknown)
    _check_numbers(temperature, choice_temperature, seed, step)
    counts = _counts(num_unknown, logits)
    value_noise, choice_noise = _check_noise(noise, logits)
    arguments = (
        logits, tokens, unknown, counts, value_noise, choice_noise,
        float(temperature), float(choice_temperature), seed, step,
    )  # fmt: skip
    obstacle = _native.native_dtype_obstacle(logits.dtype) or _native.missing_core(logits.device)
    if _native.use_native("confidence_remask", impl, obstacle):
        return _OP(*arguments)  # type: ignore[no-any-return]
    new_tokens, new_unknown = reference(*arguments)
    if not torch.compiler.is_compiling() and logits.device.type == "cpu":
        bad = ((new_tokens == -1) & unknown).flatten().nonzero()
        if bad.numel():
            _complain(logits.shape[1], int(bad[0]))
    return new_tokens, new_unknown
