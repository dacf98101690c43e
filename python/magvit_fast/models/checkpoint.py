"""Presets and checkpoints: how a model is named, stored and found again.

On disk a model is a directory with `config.json` (what it is) and `model.safetensors` (its
weights); nothing is pickled. Weights may be stored in half precision; they are loaded as float32
unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from magvit_fast.data.atomic import atomic_directory, atomic_path, atomic_write_text
from magvit_fast.errors import FileFormatError, MissingExtraError
from magvit_fast.models.presets import preset

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "magvit_fast"
VERSION = 1

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class PretrainedMixin(nn.Module):
    """Presets and checkpoints for a model whose constructor takes one config dataclass.

    The config's fields are JSON values (tuples may come back as lists: the config makes them tuples
    again); every tensor of the model is in its state_dict.
    """

    config_class: ClassVar[type[Any]]
    config: Any

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A freshly initialized model of a named configuration, in training mode.

        Args:
            name: see models.presets.
            changes: config fields that differ from the preset.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown config field.
        """
        return cls(cls.config_class(**{**preset(cls.__name__, name), **changes}))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        subfolder: str = "",
    ) -> Self:
        """A stored model, in evaluation mode on the CPU.

        Args:
            source: a directory with config.json and model.safetensors, or a hub id "owner/name".
            dtype: of the parameters in memory, whatever they are stored in.
            revision: branch, tag or commit of a hub id.
            subfolder: where below the directory or hub repository the two files are.

        Raises:
            FileFormatError: a file is missing, unreadable, truncated, of another model or version,
                or does not fit its config. The message names the file.
            TypeError: dtype is no floating-point dtype.
            MissingExtraError: a hub id without huggingface_hub installed.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype!r}")
        directory = _resolve(source, revision, subfolder)
        config = _read_config(directory / CONFIG_NAME, cls)
        try:
            with torch.device("meta"):
                model = cls(config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise FileFormatError(
                f"{directory / CONFIG_NAME}: not a valid config: {error}"
            ) from error
        weights = _read_weights(directory / WEIGHTS_NAME, model.state_dict(), dtype)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None
    ) -> None:
        """Write config.json and model.safetensors into `directory`, which is made if needed.

        A new directory appears whole or not at all; in an existing one each of the two files is
        replaced whole and everything else stays.

        Args:
            directory: where to.
            dtype: store floating-point weights in this dtype (default: as they are).

        Raises:
            FileWriteError: the destination cannot be written.
            ValueError: a weight does not fit into `dtype`.
        """
        directory = Path(directory)
        tensors = _stored_tensors(self.state_dict(), dtype)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model": type(self).__name__,
            "config": dataclasses.asdict(self.config),
        }
        text = json.dumps(header, indent=2) + "\n"
        if directory.exists():
            with atomic_path(directory / WEIGHTS_NAME) as path:
                save_file(tensors, path, metadata={"format": "pt"})
            atomic_write_text(directory / CONFIG_NAME, text)
            return
        with atomic_directory(directory) as temporary:
            save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
            (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")


def _stored_tensors(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        value = tensor.detach().cpu()
        if dtype is not None and value.is_floating_point():
            small = value.to(dtype)
            if not torch.equal(small.isfinite(), value.isfinite()):
                raise ValueError(f"dtype: {name} has values beyond the range of {dtype}")
            value = small
        value = value.contiguous()
        # safetensors refuses two names for one storage (tied weights).
        if value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        tensors[name] = value
    return tensors


# ---- finding and reading -------------------------------------------------------------------------
def _resolve(source: str | os.PathLike[str], revision: str | None, subfolder: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path / subfolder
    if path.exists():
        raise FileFormatError(
            f"{path}: expected a directory with {CONFIG_NAME} and {WEIGHTS_NAME}, found a file"
        )
    name = os.fspath(source)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise FileFormatError(
            f"{path}: no such directory (and not a hub id of the form owner/name)"
        )
    return _download(name, revision, subfolder) / subfolder


def _download(name: str, revision: str | None, subfolder: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            "huggingface_hub", "hub", f"loading '{name}' from the hub"
        ) from error
    head = f"{subfolder}/" if subfolder else ""
    try:
        local = snapshot_download(
            name, revision=revision, allow_patterns=[head + CONFIG_NAME, head + WEIGHTS_NAME]
        )
    except Exception as error:  # network, authorization, unknown repository: the hub has many types
        reason = str(error).strip().splitlines()
        raise FileFormatError(
            f"{name}: no such directory here, and the hub could not deliver it: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    return Path(local)


def stored_model_name(
    source: str | os.PathLike[str], *, revision: str | None = None, subfolder: str = ""
) -> str:
    """The class of a stored model, by its config.json. Raises as `from_pretrained`."""
    path = _resolve(source, revision, subfolder) / CONFIG_NAME
    return str(_read_header(path).get("model"))


M = TypeVar("M", bound=PretrainedMixin)


def load_one_of(
    kinds: Sequence[type[M]],
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    **options: Any,
) -> M:
    """A stored model of whichever of `kinds` its files say; arguments as `from_pretrained`.

    Raises:
        FileFormatError: as from_pretrained, and for a model of another kind.
        MissingExtraError: as from_pretrained.
    """
    name = stored_model_name(source, revision=revision, subfolder=subfolder)
    for kind in kinds:
        if kind.__name__ == name:
            return kind.from_pretrained(source, revision=revision, subfolder=subfolder, **options)
    known = " or ".join(kind.__name__ for kind in kinds)
    raise FileFormatError(f"{os.fspath(source)}: holds a {name}, expected a {known}")


def _read_header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; expected a directory made by save_pretrained")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise FileFormatError(f"{path}: not a {FORMAT} checkpoint (a file of another project?)")
    if header.get("version") != VERSION:
        raise FileFormatError(
            f"{path}: format version {header.get('version')!r}, this release reads {VERSION}; "
            "update magvit_fast"
        )
    return header


def _read_config(path: Path, cls: type[PretrainedMixin]) -> Any:
    header = _read_header(path)
    if header.get("model") != cls.__name__:
        raise FileFormatError(
            f"{path}: holds a {header.get('model')}, expected a {cls.__name__}; "
            "load it with its own class"
        )
    fields = header.get("config")
    if not isinstance(fields, dict):
        raise FileFormatError(f"{path}: has no 'config' entry")
    try:
        return cls.config_class(**fields)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: not a valid config: {error}") from error


def _read_weights(
    path: Path, expected: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; expected a directory made by save_pretrained")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(path, shapes, expected)
            weights = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{path}: not a complete safetensors file ({error}); copy or download it again"
        ) from error
    for name, value in weights.items():
        if value.is_floating_point() != expected[name].is_floating_point():
            raise FileFormatError(f"{path}: {name} has the unexpected dtype {value.dtype}")
        if not torch.isfinite(value).all():
            raise FileFormatError(f"{path}: {name} holds NaN or infinity; the file is damaged")
        # A copy: what was read is a view of the mapped file, and a file may change or shrink.
        weights[name] = value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
    return weights


def _check_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]
) -> None:
    faults = [f"{name} is missing" for name in expected if name not in shapes]
    faults += [f"{name} is unknown" for name in shapes if name not in expected]
    faults += [
        f"{name} has shape {shapes[name]}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in shapes and shapes[name] != tuple(value.shape)
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise FileFormatError(
            f"{path}: does not fit its {CONFIG_NAME}: {'; '.join(faults[:3])}{more}"
        )
