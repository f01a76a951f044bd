"""The fuzz target for token files: contiguous as they are written, and compressed as other tools make them."""

from __future__ import annotations

from pathlib import Path
from random import Random

import h5py
import numpy as np

from hpcmp.data import prepare
from hpcmp.errors import DataError
from tests.checkpoint.fuzz_base import Damage, refusal
from tests.checkpoint.mutations import bytes_changed, instead, length_changed
from tests.checkpoint.mutations_hdf5 import resealed, restructured
from tests.data.reading import everything

NAMES = ["train/tokens", "train/documents", "valid/tokens", "valid/documents", "tokenizer"]
KINDS = ("bytes", "length", "metadata", "metadata", "structure", "structure", "attribute", "instead")
#: A link is no damage: whoever names a token file may name a link to it.
INSTEAD = (
    "nothing",
    "a pipe",
    "a socket",
    "a device",
    "a link to itself",
    "a folder",
    "an empty file",
    "a sparse file",
)


class Tokens:
    """A token file of a few kilobytes."""

    def prepare(self, folder: Path, outside: Path) -> None:
        corpus, path = folder / "corpus", folder / "tokens.h5"
        corpus.mkdir()
        for i in range(12):
            (corpus / f"{i}.txt").write_text(f"document {i}\n" + "wörter und 文字 " * (i % 5 + 1))
        prepare([corpus], path, held_out=0.3)
        self.good = everything(path)
        self.bases = [path.read_bytes()]
        (outside / path.name).write_bytes(self.bases[0])
        with h5py.File(path, "r+") as file:
            for name in NAMES:
                data, attributes = file[name][()], dict(file[name].attrs)
                del file[name]
                made = file.create_dataset(
                    name, data=data, chunks=(min(5, data.size),), compression=9, shuffle=True, fletcher32=True
                )
                made.attrs.update(attributes)
        self.bases.append(path.read_bytes())
        assert all(resealed(base) == base for base in self.bases)

    def damage(self, draw: Random, run: Path, outside: Path) -> Damage:
        base, path, kind = draw.choice(self.bases), run / "tokens.h5", draw.choice(KINDS)
        run.mkdir(exist_ok=True)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        bad = {
            "bytes": lambda: bytes_changed(draw, base, [range(len(base))]),
            "length": lambda: length_changed(draw, base),
            "metadata": lambda: resealed(bytes_changed(draw, base, [range(len(base))])),
        }
        path.write_bytes(bad[kind]() if kind in bad else base)
        notes = [kind]
        if kind == "structure":
            notes.append(restructured(draw, path, NAMES, outside / path.name))
        elif kind == "attribute":
            notes.append(_another_attribute(draw, path))
        elif kind == "instead":
            notes.append(instead(draw, path, outside, INSTEAD))
        return Damage(notes, forged=kind in ("metadata", "structure", "attribute"))

    def read(self, run: Path) -> str:
        try:
            return "same" if everything(run / "tokens.h5") == self.good else "other"
        except DataError as error:
            return refusal(error)


def _another_attribute(draw: Random, path: Path) -> str:
    """Give some object's attribute another value, or none; says which."""
    values = [-1, 1.5, "text", "\x1b[2J", np.bytes_(b"\xff"), np.bytes_(b"x" * 60_000), [1, 2], np.zeros(0), None]
    values += [np.int8(3), np.uint64(2**63), 2**40, h5py.Empty("i8")]
    with h5py.File(path, "r+") as file:
        where = draw.choice(["/", "train", "valid", "train/tokens", "valid/documents", "tokenizer"])
        holder = file[where]
        name, value = draw.choice(sorted(holder.attrs)), draw.choice([*values, holder.ref])
        del holder.attrs[name]
        if value is not None:
            holder.attrs.create(name, value, dtype=h5py.ref_dtype if isinstance(value, h5py.Reference) else None)
    return f"{where}: {name}"
