"""What the README shows works as it stands: its Python runs, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from magvit_fast.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert tuple(names["ids"].shape) == (1, 5, 8, 8)  # type: ignore[attr-defined]
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
