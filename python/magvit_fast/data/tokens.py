"""Token files and shards: what the tokenizer writes once and the transformer reads many times.

A token file is safetensors: "ids" [N, T', H', W'] in the narrowest integer type that holds the
tokenizer's bits, for COMMIT where they differ from "ids" also "condition_ids.<name>" (tokens of the
padded condition clip of a task, see tasks.Task.condition_name), with labels "class_ids" [N], with
actions "actions" float32 [N, T, A]. Its metadata carries a checksum and a header that says which
tokenizer made the ids. A data set of tokens is a folder of such shards and index.json, which is written
last: no index, no data set.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from magvit_fast.data.atomic import atomic_path, atomic_write_text
from magvit_fast.data.order import Draw
from magvit_fast.errors import FileFormatError

FORMAT = "magvit_fast.tokens"
VERSION = 1
INDEX = "index.json"
_CONDITION = "condition_ids."


@dataclass(frozen=True)
class VideoSource:
    """The video file that one clip of tokens was made from, so that it can be written back.

    frames: its true length, before the last frame was repeated to fill the last latent slot.
    height, width: of the file, before cropping. fps: frames per second.
    """

    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class TokenHeader:
    """Where ids come from and what they mean.

    fingerprint: `tokenizer_fingerprint` of the model that made them.
    num_bits: ids are in [0, 2**num_bits).
    grid: (T', H', W') of one clip. video: (T, H, W) of the clip in frames and pixels.
    source: for the tokens of one whole video file; None for clips of a data set.
    clip: frames of each of the clips that were encoded one by one and joined along time, by a
        tokenizer whose tokens depend on all of their clip; None where the whole is one piece.
    """

    fingerprint: str
    num_bits: int
    grid: tuple[int, int, int]
    video: tuple[int, int, int]
    source: VideoSource | None = None
    clip: int | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenHeader:
        return cls(
            str(data["fingerprint"]),
            int(data["num_bits"]),
            _three(data["grid"]),
            _three(data["video"]),
            _source(data.get("source")),
            None if data.get("clip") is None else int(data["clip"]),
        )


def _source(data: Mapping[str, Any] | None) -> VideoSource | None:
    if data is None:
        return None
    height, width = int(data["height"]), int(data["width"])
    return VideoSource(int(data["frames"]), height, width, float(data["fps"]))


def _three(values: Iterable[Any]) -> tuple[int, int, int]:
    first, second, third = (int(v) for v in values)
    return first, second, third


def tokenizer_fingerprint(tokenizer: nn.Module) -> str:
    """32 hex digits over the config, and over names, shapes and values (as float32) of all weights."""
    digest = hashlib.sha256(_settings(getattr(tokenizer, "config", None)).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _settings(config: Any) -> str:
    """What of a config dataclass is not at its default: fields that come later change nothing then."""
    if not is_dataclass(config) or isinstance(config, type):
        return ""
    values = {f.name: json.dumps(getattr(config, f.name)) for f in fields(config)}
    defaults = {f.name: json.dumps(f.default) for f in fields(config) if f.default is not MISSING}
    return json.dumps({k: v for k, v in sorted(values.items()) if v != defaults.get(k)})


def id_dtype(num_bits: int) -> torch.dtype:
    """The narrowest integer type for ids of so many bits."""
    for bits, dtype in ((8, torch.uint8), (15, torch.int16), (31, torch.int32), (63, torch.int64)):
        if num_bits <= bits:
            return dtype
    raise ValueError(f"num_bits: expected at most 63, got {num_bits}")


def save_tokens(
    path: str | os.PathLike[str],
    header: TokenHeader,
    ids: Tensor,
    *,
    condition_ids: Mapping[str, Tensor] | None = None,
    class_ids: Tensor | None = None,
    actions: Tensor | None = None,
    job: str = "",
) -> str:
    """Write one token file, whole or not at all; returns its checksum.

    ids: int64 [N, T', H', W'] on header.grid. condition_ids: the same by the name of a condition.
    class_ids: int64 [N]. actions: [N, T, A], one row a frame. job: see `write_shard`.
    Raises ValueError for ids of another grid or outside the header's range.
    """
    tensors = {"ids": _packed("ids", ids, header)}
    for condition, value in (condition_ids or {}).items():
        name = condition_tensor(condition)
        tensors[name] = _packed(name, value, header)
    if class_ids is not None:
        tensors["class_ids"] = class_ids.to("cpu", torch.int64).contiguous()
    if actions is not None:
        if actions.dim() != 3 or actions.shape[1] != header.video[0]:
            raise ValueError(
                f"actions: expected [N, {header.video[0]}, A], got {tuple(actions.shape)}"
            )
        tensors["actions"] = actions.to("cpu", torch.float32).contiguous()
    if any(len(t) != len(ids) for t in tensors.values()):
        raise ValueError(
            f"class_ids, condition_ids, actions: expected {len(ids)} entries, as many as ids"
        )
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "header": json.dumps(asdict(header)),
        "job": job,
    }
    checksum = metadata["checksum"] = _checksum(metadata, tensors)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)
    return checksum


def load_tokens(
    path: str | os.PathLike[str], *, fingerprint: str | None = None
) -> tuple[TokenHeader, dict[str, Tensor]]:
    """Read a token file: its header and its tensors (ids as int64), checksum verified.

    fingerprint: of the tokenizer that will decode the ids; tokens of any other are refused.
    Raises FileFormatError for a missing, damaged or foreign file.
    """
    path = Path(path)
    header, metadata = read_header(path)
    if fingerprint is not None and header.fingerprint != fingerprint:
        raise FileFormatError(
            f"{path}: its tokens were made by another tokenizer (fingerprint {header.fingerprint}, "
            f"expected {fingerprint}); tokenize the videos again with this one"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if _checksum(metadata, tensors) != metadata["checksum"]:
        raise _damaged(path, "its checksum does not match")
    ids = tensors.get("ids")
    if ids is None or tuple(ids.shape[1:]) != header.grid:
        raise _damaged(path, f"expected ids on the grid {header.grid}")
    return header, _widened(tensors)


def read_header(path: str | os.PathLike[str]) -> tuple[TokenHeader, dict[str, str]]:
    """Header and raw metadata of a token file, without reading its ids."""
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path}: no such token file; tokenize the videos first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if metadata.get("format") != FORMAT:
        raise FileFormatError(
            f"{path}: is a safetensors file but holds no tokens of this project (or is damaged); "
            "tokenize the videos with `magvit-fast tokenize`"
        )
    if metadata.get("version") != str(VERSION):
        raise FileFormatError(
            f"{path}: token format version {metadata.get('version')}, this release reads "
            f"{VERSION}; tokenize the videos again"
        )
    try:
        header = TokenHeader.from_json(json.loads(metadata["header"]))
        metadata["checksum"]
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"its header is incomplete: {error}") from error
    return header, metadata


def condition_tensor(condition: str) -> str:
    """The name, in files and batches, of the tokens of one condition."""
    return _CONDITION + condition


def write_shard(
    path: str | os.PathLike[str], header: TokenHeader, job: str, **tensors: Any
) -> dict[str, Any]:
    """`save_tokens` for one shard of a set; returns its entry for `write_index`.

    job: says what the shard was made from, so that an interrupted run can take it up again.
    """
    path = Path(path)
    checksum = save_tokens(path, header, job=job, **tensors)
    return {"file": path.name, "count": len(tensors["ids"]), "checksum": checksum}


def finished_shard(
    path: str | os.PathLike[str], header: TokenHeader, job: str
) -> dict[str, Any] | None:
    """The entry of a shard that an interrupted run has left whole, None if it is missing, damaged or
    of another job."""
    path = Path(path)
    try:
        found, metadata = read_header(path)
        if found != header or metadata.get("job") != job:
            return None
        count = len(load_tokens(path)[1]["ids"])
    except FileFormatError:
        return None
    return {"file": path.name, "count": count, "checksum": metadata["checksum"]}


def write_index(
    folder: str | os.PathLike[str],
    header: TokenHeader,
    shards: list[dict[str, Any]],
    *,
    class_names: tuple[str, ...] = (),
) -> None:
    """Declare the shards (entries of `write_shard`, in order) a complete data set."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "header": asdict(header),
        "class_names": list(class_names),
        "shards": shards,
    }
    atomic_write_text(Path(folder) / INDEX, json.dumps(content, indent=1) + "\n")


def read_class_names(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """The classes of a set of tokens in the order of their numbers; none of one without labels.

    Raises FileFormatError where the folder is no finished set.
    """
    path = Path(folder) / INDEX
    try:
        return tuple(str(name) for name in _read_index(path)["class_names"])
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"bad entry: {error}") from error


class TokenClips:
    """Reader of a folder of shards, addressed by draws as in clips.py (epoch plays no part).

    A shard is verified and kept in memory when first touched (5 kB a clip of 1,280 18-bit ids).
    fingerprint: refuse tokens of any other tokenizer. Raises FileFormatError.
    """

    num_stills = 0

    def __init__(self, folder: str | os.PathLike[str], *, fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder / INDEX)
        try:
            self.header = TokenHeader.from_json(index["header"])
            self.class_names = tuple(str(name) for name in index["class_names"])
            self._shards = [
                (self.folder / str(s["file"]), int(s["count"]), s["checksum"])
                for s in index["shards"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.folder / INDEX, f"bad entry: {error}") from error
        if fingerprint is not None and self.header.fingerprint != fingerprint:
            raise FileFormatError(
                f"{self.folder}: its tokens were made by another tokenizer (fingerprint "
                f"{self.header.fingerprint}, expected {fingerprint}); tokenize the videos again"
            )
        self._ends = list(itertools.accumulate(count for _, count, _ in self._shards))
        if not self._ends:
            raise FileFormatError(f"{self.folder}: holds no tokens; tokenize at least one video")
        for path, _, checksum in self._shards:
            header, metadata = read_header(path)
            if header != self.header or metadata["checksum"] != checksum:
                raise FileFormatError(
                    f"{path}: does not belong to {self.folder / INDEX} (it comes from another "
                    "run); tokenize the videos again into an empty folder"
                )
        self._loaded: dict[int, dict[str, Tensor]] = {}

    @property
    def num_clips(self) -> int:
        return self._ends[-1]

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        """ids int64 [T', H', W'], where the data set has them condition_ids.<name>,
        class_ids (scalar), actions float32 [T, A]."""
        if not 0 <= draw.index < self.num_clips:
            raise IndexError(f"index: expected 0 to {self.num_clips - 1}, got {draw.index}")
        number = bisect.bisect_right(self._ends, draw.index)
        row = draw.index - (self._ends[number - 1] if number else 0)
        return _widened({name: value[row] for name, value in self._shard(number).items()})

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._loaded:
            path, count, _ = self._shards[number]
            _, tensors = load_tokens(path)
            if len(tensors["ids"]) != count:
                raise _damaged(path, f"expected {count} clips, found {len(tensors['ids'])}")
            narrow = id_dtype(self.header.num_bits)
            self._loaded[number] = {
                name: value.to(narrow) if name == "ids" or name.startswith(_CONDITION) else value
                for name, value in tensors.items()
            }
        return self._loaded[number]


def _widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Integers of any width as int64; actions as they are."""
    return {k: v if v.is_floating_point() else v.long() for k, v in tensors.items()}


def _packed(name: str, ids: Tensor, header: TokenHeader) -> Tensor:
    if tuple(ids.shape[1:]) != header.grid:
        raise ValueError(f"{name}: expected [N, {header.grid}], got {tuple(ids.shape)}")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= 1 << header.num_bits):
        raise ValueError(
            f"{name}: expected values in [0, 2**{header.num_bits}), "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    return ids.to("cpu", id_dtype(header.num_bits)).contiguous()


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything a token file says: its metadata but the checksum, and its tensors."""
    digest = hashlib.sha256()
    for name, text in sorted(metadata.items()):
        if name != "checksum":
            digest.update(f"{name}={text};".encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileFormatError(
            f"{path}: no such file, so {path.parent} is no finished set of tokens; "
            "run the tokenization (again, if it was interrupted)"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise FileFormatError(f"{path}: is no index of token shards of this project")
    if index.get("version") != VERSION:
        raise FileFormatError(
            f"{path}: token format version {index.get('version')}, this release reads {VERSION}; "
            "tokenize the videos again"
        )
    return index


def _damaged(path: Path, reason: object) -> FileFormatError:
    return FileFormatError(f"{path}: is damaged ({reason}); tokenize the videos again")
