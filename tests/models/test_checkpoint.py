"""Checkpoints: what is saved comes back; what is damaged or foreign is refused in one clear line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from magvit_fast.errors import FileFormatError, FileWriteError, MissingExtraError
from magvit_fast.models import MagvitTokenizer, MagvitV2Config, MagvitV2Tokenizer, checkpoint
from magvit_fast.models.tokenizers import tokenizer_from_preset

CONFIG = MagvitV2Config(
    filters=4,
    channel_multipliers=(1, 2),
    temporal_downsample=(True,),
    num_res_blocks=1,
    num_bits=4,
)


def make(seed: int = 0) -> MagvitV2Tokenizer:
    torch.manual_seed(seed)
    return MagvitV2Tokenizer(CONFIG)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    model, original = MagvitV2Tokenizer.from_pretrained(saved), make()
    assert model.config == original.config
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    video = torch.rand(1, 3, 3, 4, 4)
    assert torch.equal(model.encode(video), original.encode(video))


def test_a_loaded_model_trains(saved: Path) -> None:
    model = MagvitV2Tokenizer.from_pretrained(saved).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(1, 3, 3, 4, 4)).losses["quantizer"].backward()
    before = model.encoder.conv_in.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.encoder.conv_in.weight, before)
    # The file is not mapped into the model: it still holds the old weights.
    again = MagvitV2Tokenizer.from_pretrained(saved)
    assert torch.equal(again.encoder.conv_in.weight, before)


def test_half_precision_storage(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16}
    loaded = MagvitV2Tokenizer.from_pretrained(tmp_path / "half")
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value.half().float())
    low = MagvitV2Tokenizer.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert low.encoder.conv_in.weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point dtype, got torch\.int8"):
        MagvitV2Tokenizer.from_pretrained(tmp_path / "half", dtype=torch.int8)


def test_a_weight_beyond_half_precision_is_refused(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.encoder.conv_in.weight.fill_(1e6)
    with pytest.raises(ValueError, match=r"encoder.conv_in.weight has values beyond the range"):
        model.save_pretrained(tmp_path / "x", dtype=torch.float16)
    assert not (tmp_path / "x").exists()


def test_the_random_state_is_left_alone(saved: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    MagvitV2Tokenizer.from_pretrained(saved)
    assert torch.equal(torch.rand(3), expected)


def test_saving_again_keeps_what_else_is_there(saved: Path) -> None:
    (saved / "README.md").write_text("notes")
    other = make(seed=1)
    other.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "notes"
    loaded = MagvitV2Tokenizer.from_pretrained(saved)
    assert torch.equal(loaded.encoder.conv_in.weight, other.encoder.conv_in.weight)
    assert len(list(saved.iterdir())) == 3


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_the_old_model(
    tmp_path: Path, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    if existing:
        make().save_pretrained(target)

    def full_disk(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(FileWriteError, match="No space left"):
        make(seed=1).save_pretrained(target)
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(left) == (["config.json", "model.safetensors"] if existing else [])
    if existing:
        loaded = MagvitV2Tokenizer.from_pretrained(target)
        assert torch.equal(loaded.encoder.conv_in.weight, make().encoder.conv_in.weight)


def test_tied_weights_are_stored(tmp_path: Path) -> None:
    class Tied(checkpoint.PretrainedMixin):
        config_class = MagvitV2Config

        def __init__(self, config: MagvitV2Config) -> None:
            super().__init__()
            self.config = config
            self.a = torch.nn.Linear(3, 3)
            self.b = torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

    model = Tied(CONFIG)
    model.save_pretrained(tmp_path / "tied")
    loaded = Tied.from_pretrained(tmp_path / "tied")
    assert torch.equal(loaded.b.weight, model.a.weight)


# ---- damaged and foreign files -------------------------------------------------------------------
def refuse(path: Path, message: str) -> None:
    with pytest.raises(FileFormatError, match=message) as caught:
        MagvitV2Tokenizer.from_pretrained(path)
    assert "\n" not in str(caught.value)


def edit(saved: Path, **changes: Any) -> None:
    header = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**header, **changes}))


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", r"nowhere: no such directory \(and not a hub id")
    refuse(saved / "config.json", "expected a directory with config.json")
    (saved / "model.safetensors").unlink()
    refuse(saved, r"model.safetensors: no such file")
    (saved / "config.json").unlink()
    refuse(saved, r"config.json: no such file")


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", "nul\0"])
def test_a_config_that_is_no_json(saved: Path, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    refuse(saved, r"config.json: not readable as JSON")


def test_foreign_configs(saved: Path) -> None:
    (saved / "config.json").write_text('{"_class_name": "AutoencoderKL", "layers": 2}')
    refuse(saved, r"config.json: not a magvit_fast checkpoint \(a file of another project\?\)")
    (saved / "config.json").write_text("[1, 2]")
    refuse(saved, "not a magvit_fast checkpoint")


def test_configs_of_another_model_or_release(saved: Path) -> None:
    edit(saved, model="Discriminator3D")
    refuse(saved, "holds a Discriminator3D, expected a MagvitV2Tokenizer")
    edit(saved, model="MagvitV2Tokenizer", version=2)
    refuse(saved, "format version 2, this release reads 1; update magvit_fast")
    edit(saved, version=1, config=None)
    refuse(saved, "has no 'config' entry")


@pytest.mark.parametrize(
    "config",
    [
        {"depth": 3},
        {"filters": 0},
        {"filters": "many"},
        {"filters": 2.5},
        {"channel_multipliers": 3},
        {"temporal_downsample": [True, True]},
    ],
)
def test_configs_that_make_no_model(saved: Path, config: dict[str, Any]) -> None:
    header = json.loads((saved / "config.json").read_text())
    edit(saved, config={**header["config"], **config})
    refuse(saved, r"config.json: not a valid config")


def test_a_config_that_does_not_fit_the_weights(saved: Path) -> None:
    header = json.loads((saved / "config.json").read_text())
    edit(saved, config={**header["config"], "filters": 8})
    refuse(saved, r"model.safetensors: does not fit its config.json: .* expected \(8, .*more\)")
    edit(saved, config={**header["config"], "num_res_blocks": 2})
    refuse(saved, "does not fit its config.json: .* is missing")
    edit(saved, config={**header["config"], "filters": 10**9})
    refuse(saved, "not a valid config|does not fit")


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.999])
def test_truncated_weights(saved: Path, keep: float) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    refuse(saved, r"model.safetensors: not a complete safetensors file")


def test_weights_of_something_else(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    refuse(saved, "not a complete safetensors file")
    save_file({"head.weight": torch.zeros(2, 2)}, path)
    refuse(saved, "does not fit its config.json: .* is missing")
    tensors = make().state_dict()
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    refuse(saved, "does not fit its config.json: extra is unknown$")
    name = "decoder.conv_out.bias"
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, path)
    refuse(saved, "decoder.conv_out.bias holds NaN or infinity; the file is damaged")
    save_file({**tensors, name: tensors[name].long()}, path)
    refuse(saved, r"decoder.conv_out.bias has the unexpected dtype torch.int64")


# ---- the hub -------------------------------------------------------------------------------------
def test_a_hub_id_is_downloaded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = ModuleType("huggingface_hub")
    asked: list[tuple[Any, ...]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        if name == "some/missing":
            raise RuntimeError("404 Client Error\nwith many\nlines")
        return str(tmp_path)

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = MagvitV2Tokenizer.from_pretrained("some/model", revision="v1", subfolder="model")
    assert torch.equal(model.encoder.conv_in.weight, make().encoder.conv_in.weight)
    assert asked == [("some/model", "v1", ["model/config.json", "model/model.safetensors"])]
    with pytest.raises(FileFormatError, match=r"hub could not deliver it: 404 Client Error$"):
        MagvitV2Tokenizer.from_pretrained("some/missing")


def test_a_hub_id_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"magvit_fast\[hub\]"):
        MagvitV2Tokenizer.from_pretrained("some/model")


@pytest.mark.parametrize("name", ["../up", "a/b/c", "/etc", "plain", "sp ace/x", ""])
def test_what_is_no_hub_id_asks_no_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileFormatError, match=r"config.json: no such file|no such directory"):
        MagvitV2Tokenizer.from_pretrained(name)


def test_tokenizer_presets_by_name_alone() -> None:
    assert isinstance(tokenizer_from_preset("magvit-v2-demo"), MagvitV2Tokenizer)
    with torch.device("meta"):
        assert isinstance(tokenizer_from_preset("magvit-b-64"), MagvitTokenizer)
    with pytest.raises(ValueError, match=r"no preset 'magvit-l-v2' .* there are .*magvit-b-64"):
        tokenizer_from_preset("magvit-l-v2")
