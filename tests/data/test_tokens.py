"""Token shards: what was written comes back, and every kind of damage is told apart and named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import (
    TokenClips,
    TokenHeader,
    finished_shard,
    id_dtype,
    load_tokens,
    save_tokens,
    tokenizer_fingerprint,
    write_index,
    write_shard,
)
from magvit_fast.errors import FileFormatError
from magvit_fast.models import MagvitV2Config, MagvitV2Tokenizer

HEADER = TokenHeader("ab" * 16, 18, (2, 3, 4), (5, 24, 32))


def some_ids(n: int, bits: int = 18) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 1 << bits, (n, *HEADER.grid), generator=generator)


@pytest.fixture
def shards(tmp_path):
    ids = some_ids(10)
    entries = [
        write_shard(
            tmp_path / f"tokens-000-{i:05d}.safetensors",
            HEADER,
            f"job {i}",
            ids=ids[4 * i : 4 * i + 4],
            class_ids=torch.arange(10)[4 * i : 4 * i + 4],
        )
        for i in range(3)
    ]
    write_index(tmp_path, HEADER, entries, class_names=("x", "y"))
    return tmp_path, ids


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40))
def test_extreme_ids_survive_the_narrow_type(tmp_path_factory, bits):
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    header = TokenHeader("f", bits, (1, 1, 2), (1, 8, 8))
    ids = torch.tensor([[[[0, (1 << bits) - 1]]]])
    save_tokens(path, header, ids)
    loaded_header, tensors = load_tokens(path, fingerprint="f")
    assert loaded_header == header
    assert torch.equal(tensors["ids"], ids)
    assert tensors["ids"].dtype == torch.int64


def test_shards_read_back_in_order(shards):
    folder, ids = shards
    clips = TokenClips(folder, fingerprint=HEADER.fingerprint)
    assert clips.num_clips == 10
    assert clips.header == HEADER
    assert clips.class_names == ("x", "y")
    for i in range(10):
        item = clips[Draw(7, i)]
        assert torch.equal(item["ids"], ids[i])
        assert int(item["class_ids"]) == i
    assert sorted(p.name for p in folder.iterdir()) == [
        "index.json",
        *(f"tokens-000-{n:05d}.safetensors" for n in range(3)),
    ]


def test_condition_ids_are_kept(tmp_path):
    entry = write_shard(
        tmp_path / "t.safetensors",
        HEADER,
        "",
        ids=some_ids(2),
        condition_ids={"first1": some_ids(2) ^ 1},
    )
    write_index(tmp_path, HEADER, [entry])
    clips = TokenClips(tmp_path)
    assert torch.equal(clips[Draw(0, 1)]["condition_ids.first1"], some_ids(2)[1] ^ 1)
    kept = clips._loaded[0]  # in memory they are as narrow as on disk
    assert {name: value.dtype for name, value in kept.items()} == {
        "ids": torch.int32,
        "condition_ids.first1": torch.int32,
    }


def test_without_an_index_there_is_no_data_set(shards):
    folder, _ = shards
    (folder / "index.json").unlink()
    with pytest.raises(FileFormatError, match="no finished set of tokens"):
        TokenClips(folder)


def test_only_whole_shards_of_the_same_job_are_taken_up_again(shards):
    folder, _ = shards
    path = folder / "tokens-000-00001.safetensors"
    index = json.loads((folder / "index.json").read_text())
    assert finished_shard(path, HEADER, "job 1") == index["shards"][1]
    assert finished_shard(path, HEADER, "job 2") is None
    assert finished_shard(path, dataclasses.replace(HEADER, fingerprint="x"), "job 1") is None
    assert finished_shard(folder / "absent.safetensors", HEADER, "job 1") is None
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert finished_shard(path, HEADER, "job 1") is None


def test_damage_anywhere_is_found(tmp_path):
    """Each byte of a file in turn: its header's keys stand in another order in every run."""
    path = tmp_path / "t.safetensors"
    save_tokens(path, HEADER, some_ids(2), class_ids=torch.tensor([1, 2]), job="a job")
    whole = path.read_bytes()
    for where in range(len(whole)):
        data = bytearray(whole)
        data[where] ^= 0x5A
        path.write_bytes(data)
        with pytest.raises(FileFormatError, match=r"t\.safetensors.*tokenize the videos"):
            load_tokens(path)


def test_a_damaged_shard_is_named(shards):
    folder, _ = shards
    shard = folder / "tokens-000-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x5A
    shard.write_bytes(data)
    clips = TokenClips(folder)
    with pytest.raises(
        FileFormatError, match=r"tokens-000-00001\.safetensors.*tokenize the videos"
    ):
        [clips[Draw(0, i)] for i in range(10)]


def test_truncated_missing_and_foreign_shards_are_named(shards):
    folder, _ = shards
    shard = folder / "tokens-000-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match=r"00002.*damaged"):
        TokenClips(folder)
    shard.unlink()
    with pytest.raises(FileFormatError, match=r"00002.*no such token file"):
        TokenClips(folder)
    save_file({"ids": torch.zeros(2)}, shard)
    with pytest.raises(FileFormatError, match=r"00002.*no tokens of this project"):
        TokenClips(folder)
    save_tokens(shard, TokenHeader("other", 18, (2, 3, 4), (5, 24, 32)), some_ids(2))
    with pytest.raises(FileFormatError, match=r"00002.*does not belong"):
        TokenClips(folder)


def test_tokens_of_another_tokenizer_are_refused(shards):
    folder, _ = shards
    with pytest.raises(FileFormatError, match="another tokenizer"):
        TokenClips(folder, fingerprint="00")
    with pytest.raises(FileFormatError, match="another tokenizer"):
        load_tokens(folder / "tokens-000-00000.safetensors", fingerprint="00")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": "else"}', '{"format": "magvit_fast.tokens", "version": 99}']
)
def test_bad_index(shards, content):
    folder, _ = shards
    (folder / "index.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"index\.json"):
        TokenClips(folder)


def test_index_without_shards(tmp_path):
    write_index(tmp_path, HEADER, [])
    with pytest.raises(FileFormatError, match="holds no tokens"):
        TokenClips(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["header"]["grid"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match="grid"):
        TokenClips(tmp_path)


def test_bad_ids_are_refused_by_the_writer(tmp_path):
    with pytest.raises(ValueError, match=r"ids: expected \[N"):
        save_tokens(tmp_path / "t.safetensors", HEADER, torch.zeros(2, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"2\*\*18"):
        save_tokens(tmp_path / "t.safetensors", HEADER, some_ids(2, bits=20))
    with pytest.raises(ValueError, match="as many as ids"):
        save_tokens(tmp_path / "t.safetensors", HEADER, some_ids(2), class_ids=torch.zeros(3))
    with pytest.raises(ValueError, match="num_bits"):
        id_dtype(64)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_follows_values_not_storage():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).half()
    same = nn.Linear(3, 2)
    same.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    assert tokenizer_fingerprint(model) == tokenizer_fingerprint(same)
    with torch.no_grad():
        same.bias[0] += 1e-3
    assert tokenizer_fingerprint(model) != tokenizer_fingerprint(same)


def test_fingerprint_follows_the_config():
    """Networks of equal weights make other tokens with another padding, or norms over the clip."""
    config = MagvitV2Config(
        filters=8, channel_multipliers=(1, 2), temporal_downsample=(True,), num_res_blocks=1,
        num_bits=6,
    )  # fmt: skip
    model = MagvitV2Tokenizer(config)
    found = {tokenizer_fingerprint(model)}
    for changes in ({}, {"clip_norms": True}, {"pad_mode": "zeros"}):
        other = MagvitV2Tokenizer(dataclasses.replace(config, **changes))
        other.load_state_dict(model.state_dict())
        found.add(tokenizer_fingerprint(other))
    assert len(found) == 3
