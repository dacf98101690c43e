"""What the README shows works as it stands: its Python runs, its commands and files exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from magvit_fast.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a model
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert tuple(names["ids"].shape) == (1, 5, 8, 8)  # type: ignore[attr-defined]
    assert tuple(names["clip"].shape) == (1, 3, 17, 64, 64)  # type: ignore[attr-defined]
    assert tuple(names["again"].shape) == (1, 3, 17, 64, 64)  # type: ignore[attr-defined]
    assert "ISA" in capsys.readouterr().out


def test_commands_and_files_exist() -> None:
    commands = set(re.findall(r"^magvit-fast (\w+)", README, re.MULTILINE))
    assert {"demo", "tokenize", "generate", "train"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0, command
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for goal in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^[\w -]*\b{goal}\b[\w -]*:", makefile, re.MULTILINE), goal


def test_dotted_names_exist() -> None:
    """As a user reads them: a module is imported by its name, what follows is an attribute."""
    names = set(re.findall(r"\b(?:magvit_fast|mf)((?:\.[A-Za-z_]\w*)+)", README))
    assert {".causal_conv3d", "._native.sm90a_kernels"} <= names
    for name in names:
        parts, found = name[1:].split("."), importlib.import_module("magvit_fast")
        for i, part in enumerate(parts):
            if not hasattr(found, part):
                importlib.import_module(".".join(["magvit_fast", *parts[: i + 1]]))
            found = getattr(found, part)
    assert not re.search(r"(?<![.\w])compat\.\w", README), "names of compat stand whole"


def test_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = {}
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known[command] = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    checked = 0
    for line in README.splitlines():
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", line))
        command = re.search(r"magvit-fast (\w+)", line)
        allowed = known[command[1]] if command else set().union(*known.values())
        assert options <= allowed, f"{line}: {options - allowed}"
        checked += len(options)
    assert checked > 5


def test_presets_and_extras_exist() -> None:
    for name in re.findall(r'from_preset\(\s*"([\w-]+)"', README):
        assert f'"{name}"' in (ROOT / "python/magvit_fast/models/presets.py").read_text(), name
    offered = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    named = re.search(r"with extras as you need them(.*?)The CUDA kernels", README, re.DOTALL)
    assert named
    extras = re.findall(r"`([a-z]+)`", named[1])
    assert "video" in extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", offered, re.MULTILINE), extra
