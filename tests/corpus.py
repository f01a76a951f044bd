"""A small token file, made once for a test session."""

from __future__ import annotations

from pathlib import Path

from hpcmp.data.prepare import prepare

CONFIG = """\
[model]
layers = 3
hidden = 16
heads = 4
kv_heads = 2
ffn = 33
sequence = 24
dropout = 0.1
[data]
path = "{data}"
[train]
steps = 6
batch = 5
microbatch = 2
[optimizer]
warmup = 2
decay_steps = 8
[run]
directory = "{run}"
"""


def corpus(folder: Path) -> Path:
    """Some text with structure, as ``folder/tokens.h5``."""
    text = folder / "text"
    text.mkdir()
    for i in range(40):
        lines = (f"def f{i}_{j}(x):\n    return x * {i + j} + {j}\n" for j in range(30))
        (text / f"{i}.py").write_text("".join(lines))
    prepare([text], folder / "tokens.h5", held_out=0.2)
    return folder / "tokens.h5"


def config(folder: Path, data: Path) -> Path:
    """A configuration of a tiny model over ``data``, whose run directory is ``folder/run``."""
    path = folder / "tiny.toml"
    path.write_text(CONFIG.format(data=data, run=folder / "run"))
    return path
