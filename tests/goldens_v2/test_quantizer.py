"""Lookup-free quantization against Google's port: ids, sub-tokens, entropies, losses, gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from magvit_fast.compat.praxis import praxis_config, to_channels_first, to_channels_last
from magvit_fast.nn.quantize import LFQ

Arrays = dict[str, NDArray[Any]]
Golden = Callable[[str], Arrays]

CASES = [
    "d10_normal",
    "d10_small",
    "d10_small_balance05_ratio1",
    "d10_small_temp1",
    "d10_small_argmax",
    "d10_small_groups2",
    "d10_small_groups5",
    "d10_small_groups10",
    "d18_normal",
    "d18_small",
    "d18_small_groups2",
    "d18_small_groups3",
    "d18_normal_groups2",
    "d16_small",
    "d36_small_groups4",
    "d8_image",
]
ID_CASES = [
    "d10_g1",
    "d10_g2",
    "d10_g3",
    "d18_g1",
    "d18_g2",
    "d18_g3",
    "d18_g4",
    "d36_g4",
    "d14_g2",
    "d9_g1",
]


def quantizer(arrays: Arrays, case: str, **changes: Any) -> LFQ:
    config = praxis_config(str(arrays[f"{case}/settings_json"]), **changes)
    return LFQ(
        config.num_bits,
        num_token_groups=config.num_token_groups,
        entropy_groups=config.entropy_groups,
        entropy_weight=config.entropy_weight,
        entropy_balance=config.entropy_balance,
        commitment_weight=config.commitment_weight,
        temperature=config.temperature,
        entropy_eps=config.entropy_eps,
        entropy_kind=config.entropy_kind,
    )


def number(value: Tensor) -> float:
    return float(value.detach())


def test_the_case_lists_are_complete(golden: Golden) -> None:
    assert golden("lfq")["cases"].tolist() == CASES
    names = {k.split("/")[0] for k in golden("token_ids")}
    assert sorted(names) == sorted([*ID_CASES, "special"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients(
    golden: Golden, case: str, dtype: torch.dtype, device: torch.device
) -> None:
    arrays = golden("lfq")
    lfq = quantizer(arrays, case)
    z = to_channels_first(arrays[f"{case}/z"]).to(device).to(dtype).requires_grad_()
    out = lfq(z)

    np.testing.assert_array_equal(to_channels_last(out.quantized), arrays[f"{case}/quantized"])
    ids = out.ids if lfq.num_token_groups == 1 else lfq.split_ids(out.ids)
    np.testing.assert_array_equal(ids.cpu().numpy(), arrays[f"{case}/ids"].astype(np.int64))

    # The stored float32 z is what the float64 run of the port saw, too.
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    for ours, theirs in {
        "commitment": "commitment_loss",
        "entropy": "entropy_loss",
        "quantizer": "quantizer_loss",
        "sample_entropy": "sample_entropy",
        "codebook_entropy": "batch_entropy",
    }.items():
        expected = float(arrays[f"{case}/{theirs}.f64"])
        assert abs(number(out.losses[ours]) - expected) < bound, ours
        # What the port computed in float32 is as far off as float32 is.
        assert abs(number(out.losses[ours]) - float(arrays[f"{case}/{theirs}"])) < 1e-5, ours
    assert arrays[f"{case}/straight_through_max_dev"] == (out.quantized.abs() - 1).abs().max() == 0

    for name in ("commitment", "quantizer"):
        (dz,) = torch.autograd.grad(out.losses[name], z, retain_graph=True)
        difference = to_channels_last(dz) - arrays[f"{case}/dz_{name}_loss"]
        assert np.abs(difference).max() < 2e-5, name


@pytest.mark.parametrize("case", [c for c in CASES if "groups" not in c and "argmax" not in c])
def test_exact_entropies_without_the_guard(golden: Golden, case: str, device: torch.device) -> None:
    arrays = golden("lfq")
    z = to_channels_first(arrays[f"{case}/z"]).to(device).double()
    losses = quantizer(arrays, case, entropy_eps=0.0)(z).losses
    for ours, theirs in (("sample_entropy", "sample"), ("codebook_entropy", "batch")):
        expected = float(arrays[f"{case}/unguarded_{theirs}_entropy_f64"])
        assert abs(number(losses[ours]) - expected) < 1e-9


@pytest.mark.parametrize("case", [c for c in CASES if "groups" not in c and "argmax" not in c])
def test_the_guarded_entropy_is_the_analytic_one(
    golden: Golden, case: str, device: torch.device
) -> None:
    arrays = golden("lfq")
    z = to_channels_first(arrays[f"{case}/z"]).to(device).double()
    value = number(quantizer(arrays, case)(z).losses["codebook_entropy"])
    assert abs(value - float(arrays[f"{case}/guarded_batch_entropy_f64_analytic"])) < 1e-9


@pytest.mark.parametrize("case", [c for c in CASES if "groups" in c])
def test_entropy_of_each_group(golden: Golden, case: str, device: torch.device) -> None:
    """A group is a quantizer of its own over its channels."""
    arrays = golden("lfq")
    settings = json.loads(str(arrays[f"{case}/settings_json"]))
    groups, bits = settings["entropy_loss_groups"], settings["embedding_dim"]
    z = to_channels_first(arrays[f"{case}/z"]).to(device).double()
    single = LFQ(bits // groups, entropy_eps=1e-5, temperature=settings["entropy_temperature"])
    layouts = {
        "contiguous": list(z.chunk(groups, 1)),
        "strided": [z[:, j::groups] for j in range(groups)],
    }
    for layout, parts in layouts.items():
        name = f"{case}/batch_entropy_per_{layout}_group.f64"
        if name not in arrays:
            assert bits == groups
            assert layout == "strided"
            continue
        ours = [number(single(part).losses["codebook_entropy"]) for part in parts]
        np.testing.assert_allclose(ours, arrays[name], atol=1e-9, rtol=0)
        np.testing.assert_allclose(ours, arrays[name.removesuffix(".f64")], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [c for c in CASES if "d10" in c or "d8" in c])
def test_mean_probabilities(golden: Golden, case: str, device: torch.device) -> None:
    """The mean distribution, by its definition: a product of Bernoullis per position."""
    arrays = golden("lfq")
    if f"{case}/mean_probs" not in arrays:
        assert "groups" in case
        return
    settings = json.loads(str(arrays[f"{case}/settings_json"]))
    bits = settings["embedding_dim"]
    z = torch.from_numpy(arrays[f"{case}/z"]).to(device).double().reshape(-1, bits)
    plus = torch.sigmoid(4 * z / settings["entropy_temperature"])
    codes = LFQ(bits).codes(torch.arange(2**bits, device=device).view(1, -1, 1, 1))[0, :, :, 0, 0].T
    joint = torch.where(codes > 0, plus[:, None], 1 - plus[:, None]).prod(-1).mean(0)
    np.testing.assert_allclose(joint.cpu().numpy(), arrays[f"{case}/mean_probs"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ID_CASES)
def test_token_ids_and_sub_tokens(golden: Golden, case: str, device: torch.device) -> None:
    arrays = golden("token_ids")
    groups = int(case.split("_g")[1])
    z = to_channels_first(arrays[f"{case}/z"]).to(device)
    lfq = LFQ(z.shape[1], num_token_groups=groups)
    assert lfq.group_bits == int(arrays[f"{case}/group_size"])
    out = lfq(z, with_losses=False)
    assert out.losses == {}

    # The port sends exact zeros to +1, the paper (and we) to -1.
    zeros = arrays[f"{case}/z"] == 0
    assert zeros.any()
    theirs = arrays[f"{case}/quantized"]
    ours = to_channels_last(out.quantized)
    np.testing.assert_array_equal(ours[~zeros], theirs[~zeros])
    assert (theirs[zeros] == 1).all()
    assert (ours[zeros] == -1).all()

    positions = ~zeros.any(-1)
    expected = arrays[f"{case}/ids"][positions]
    assert str(arrays[f"{case}/ids_dtype"]) == "uint32"  # which limits a group to 32 bits there
    assert out.ids.dtype == torch.int64
    split = lfq.split_ids(out.ids)
    np.testing.assert_array_equal(split.cpu().numpy()[positions].reshape(expected.shape), expected)
    torch.testing.assert_close(lfq.merge_ids(split), out.ids, rtol=0, atol=0)
    np.testing.assert_array_equal(to_channels_last(lfq.codes(out.ids)), ours)
    if f"{case}/single_id" in arrays:
        np.testing.assert_array_equal(
            out.ids.cpu().numpy()[positions], arrays[f"{case}/single_id"][positions]
        )


def test_special_values(golden: Golden, device: torch.device) -> None:
    arrays = golden("token_ids")
    z = torch.from_numpy(arrays["special/z"]).to(device)
    out = LFQ(10)(z, with_losses=False)
    zeros = arrays["special/z"] == 0
    expected = np.where(zeros, -1, arrays["special/quantized"])
    np.testing.assert_array_equal(out.quantized.cpu().numpy(), expected)
    theirs = int(arrays["special/ids"][0])
    assert int(out.ids[0]) == theirs - int((zeros[0] * 2 ** np.arange(10)).sum())
