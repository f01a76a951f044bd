"""What no file may ever make hpcmp do: run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hpcmp

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "torch"}
CALLS = {"eval", "exec", "compile", "__import__", "numpy.load", "np.load", "h5py.special_dtype"}


def found(text: str) -> Iterator[str]:
    """What in a program turns data into objects or code."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES and not node.level:
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            yield ast.unparse(node.func)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle"


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    sources = sorted(Path(hpcmp.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    assert {path.name: words for path in sources if (words := list(found(path.read_text())))} == {}


def test_the_search_finds_them() -> None:
    program = "import pickle\nfrom marshal import loads\nx = eval('1')\nnp.load('x', allow_pickle=True)\nimport os\n"
    assert sorted(found(program)) == ["allow_pickle", "eval", "marshal", "np.load", "pickle"]
