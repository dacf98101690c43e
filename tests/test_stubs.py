"""The stubs of the compiled cores say what the bindings define: names, arguments, kinds, results."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "magvit_fast"

# (argument names, their kinds, kind of the result) of every function
Signatures = dict[str, tuple[list[str], list[str], str]]


def _stub(module: str) -> Signatures:
    found: Signatures = {}
    for node in ast.parse((PACKAGE / f"{module}.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert node.name not in found, f"{node.name} is there twice"
            kinds = [ast.unparse(a.annotation) if a.annotation else "?" for a in node.args.args]
            result = ast.unparse(node.returns) if node.returns else "?"
            found[node.name] = ([a.arg for a in node.args.args], kinds, result)
    return found


def _built(module: str) -> Any:
    return pytest.importorskip(
        f"magvit_fast.{module}", reason=f"{module} is not built", exc_type=ImportError
    )


def _kind(text: str) -> str:
    """A type in pybind11's words (they differ between its releases) -> the stub's."""
    for word, kind in (
        ("Sequence", "Sequence[int]"),
        ("FixedSize", "Sequence[int]"),
        ("SupportsInt", "int"),
        ("SupportsFloat", "float"),
    ):
        if word in text:
            return kind
    return text


def _docstring(function: Any) -> tuple[list[str], str]:
    """Kinds of the arguments and of the result, as the built module states them."""
    match = re.match(r"\w+\((.*)\) -> (\w+)", function.__doc__)
    assert match, function.__doc__
    arguments = re.split(r",? ?arg\d+: ", match[1])[1:]
    return [_kind(argument) for argument in arguments], match[2]


# Functions that answer a question and run nothing.
NOT_KERNELS = (
    "causal_conv3d_source_index",
    "causal_conv3d_readers",
    "causal_conv3d_sm90_walk",
    "causal_conv3d_sm90_weight_walk",
    "causal_conv3d_wgmma_descriptor",
    "causal_conv3d_swizzle",
    "group_norm_silu_takes_planes",
)


@pytest.mark.parametrize("module", ["_core", "_core_cuda"])
def test_stub_and_built_module_agree(module: str) -> None:
    core, stub = _built(module), _stub(module)
    built = {name for name in dir(core) if not name.startswith("_")}
    assert built == set(stub)
    for name, (_, kinds, result) in stub.items():
        built_kinds, built_result = _docstring(getattr(core, name))
        assert kinds == built_kinds, name
        assert result.split("[")[0] == built_result, name


def _as_compiled(text: str, cuda: bool) -> str:
    """Without what the preprocessor leaves out for one of the two modules."""
    pattern = r"^#(ifn?def) MAGVIT_FAST_CUDA_MODULE\n(.*?)(?:^#else\n(.*?))?^#endif\n"

    def keep(match: re.Match[str]) -> str:
        return match[2] if (match[1] == "ifdef") == cuda else match[3] or ""

    return re.sub(pattern, keep, text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("module", ["_core", "_core_cuda"])
def test_stub_names_the_arguments_of_the_bindings(module: str) -> None:
    """pybind11 calls them arg0, arg1, ...; the names are those of the lambdas in bindings.cpp."""
    stub = _stub(module)
    for path in sorted((ROOT / "csrc").glob("*/bindings.cpp")):
        text = path.read_text()
        text = _as_compiled(text, cuda=module == "_core_cuda")
        functions = re.findall(r'm\.def\(\s*"(\w+)",\s*\[\]\((.*?)\)\s*\{', text, re.DOTALL)
        assert len(functions) == text.count("m.def("), path
        for name, arguments in functions:
            assert stub[name][0] == [a.split()[-1].lstrip("&") for a in arguments.split(",")], name
            assert stub[name][0][-2:] == ["where", "how"] or name.startswith(NOT_KERNELS)
