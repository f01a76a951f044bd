"""The fuzz target for checkpoints: two of a run, of which the second is damaged."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from hpcmp.checkpoint import checkpoints, digest, manifest, open_checkpoint, reader
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError
from hpcmp.plain import PlainFile
from tests.checkpoint.cases import TENSORS, assert_untouched, targets, value, write
from tests.checkpoint.fuzz_base import LARGE, Damage, Folder, refusal
from tests.checkpoint.mutations import bytes_changed, instead, json_changed, length_changed, text_changed
from tests.checkpoint.mutations_hdf5 import resealed, restructured

KINDS = ("bytes", "length", "text", "folder", "metadata", "metadata", "structure", "structure", "json")


class Checkpoints:
    """In storage "files" and "shared", and in HDF5's newest format. Digests find all damage but a forger's."""

    def prepare(self, folder: Path, outside: Path) -> None:
        self.values = {(name, step): value(name, step) for name in TENSORS for step in (1, 2)}
        self.bases = []
        for storage, newest in (("files", False), ("shared", False), ("files", True)):
            run = folder / f"{storage}-{newest}"
            for step in (1, 2):
                path = write(run, step, storage=storage)
                if newest:
                    _as_newest_format(path)
            self.bases.append(Folder(run))
        self.bases[0].restore(outside, clear=False)
        Folder(outside / "step_00000002").restore(outside, clear=False)

    def damage(self, draw: Random, run: Path, outside: Path) -> Damage:
        draw.choice(self.bases).restore(run)
        step, kind = run / "step_00000002", draw.choice(KINDS)
        content = json.loads((step / manifest.NAME).read_bytes())
        pieces = [piece for tensor in content["tensors"].values() for piece in tensor["pieces"]]
        data = step / draw.choice(pieces)["file"]
        notes = [kind]
        if kind == "folder":
            return Damage(notes + [_rearranged(draw, run, outside) for _ in range(draw.choice((1, 1, 2)))])
        if kind in ("bytes", "length", "text"):
            path = draw.choice([*([data] * 2 if kind != "text" else []), step / manifest.NAME, run / "latest"])
            good = path.read_bytes()
            bad = {
                "bytes": lambda: bytes_changed(draw, good, [range(len(good))]),
                "length": lambda: length_changed(draw, good),
                "text": lambda: text_changed(draw, good),
            }
            path.write_bytes(bad[kind]())
            return Damage([*notes, path.name])
        if kind == "metadata":
            good = data.read_bytes()
            bad_places = _around(content["files"][data.name]["extents"], good)
            data.write_bytes(resealed(bytes_changed(draw, good, bad_places)))
        elif kind == "structure":
            names = [piece["dataset"] for piece in pieces if piece["file"] == data.name]
            notes.append(restructured(draw, data, names, outside / data.name))
        else:
            notes += json_changed(draw, content, (str(outside / data.name), data.name, manifest.NAME))
        if kind != "json":
            _seal(step, content, deep=draw.random() < 0.5)
        _publish(step, content)
        return Damage(notes, forged=True)

    def read(self, run: Path) -> str:
        outcomes = []
        checkpoints(run)
        step = run / "step_00000002"
        for path in (run, *([] if step.is_symlink() else [step])):  # whoever names a link means where it leads
            slabs = targets(Mesh())
            try:
                found = open_checkpoint(path)
                found.load(slabs)
            except CheckpointError as error:
                outcomes.append(refusal(error))
                assert_untouched(slabs)
                continue
            same = all(np.array_equal(slab.data, self.values.get((slab.name, found.step))) for slab in slabs)
            outcomes.append("same" if same else "other")
        if not step.is_symlink():
            self._look_closer(step)
        return "other" if "other" in outcomes else "refused" if "refused" in outcomes else "same"

    def _look_closer(self, path: Path) -> None:
        """Every tensor and every byte."""
        try:
            found = open_checkpoint(path)
            for problem in found.verify():
                refusal(CheckpointError(problem))
            for name, (shape, dtype) in found.tensors.items():
                if math.prod(shape) * dtype.itemsize <= LARGE:
                    found.read(name)
        except CheckpointError as error:
            refusal(error)


def _seal(step: Path, content: dict[str, Any], deep: bool) -> None:
    """Give a manifest the digests that fit the files; ``deep``: those of all numbers too."""
    for name, entry in content["files"].items():
        with PlainFile(step / name) as plain:
            entry["bytes"] = plain.size
            if not entry["extents"] or sum(entry["extents"][-1]) <= plain.size:
                entry["digest"] = reader.rest(plain, entry["extents"], content["algorithm"])
    for piece in (piece for tensor in content["tensors"].values() for piece in tensor["pieces"] if deep):
        try:
            with h5py.File(step / piece["file"]) as file:
                found = file[piece["dataset"]]
                itself = found.is_virtual and found.virtual_sources()[0].file_name == "."  # HDF5 2.0 crashes over it
                if itself or math.prod(found.shape) > LARGE:
                    continue
                running = digest.running(content["algorithm"])
                running.update(np.ascontiguousarray(found[()]))
                piece["digest"] = running.hexdigest()
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError):
            continue  # HDF5 itself cannot read it


def _publish(step: Path, content: dict[str, Any]) -> None:
    """Write a manifest, and the pointer to it."""
    content.pop("sha256", None)
    text = manifest._render(content)
    (step / manifest.NAME).write_bytes(text)
    (step.parent / "latest").write_text(f"{step.name} {hashlib.sha256(text).hexdigest()}\n")


def _around(extents: list[tuple[int, int]], data: bytes) -> list[range]:
    """Where a file has no numbers."""
    edges = [0, *(edge for offset, length in extents for edge in (offset, offset + length)), len(data)]
    return [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _as_newest_format(step: Path) -> None:
    """A checkpoint whose file has the same datasets, but is in HDF5's newest format: its metadata have checksums."""
    path = step / "rank_00000.h5"
    names: list[str] = []
    with h5py.File(path) as old, h5py.File(path.with_suffix(".new"), "w", libver="latest") as new:

        def copy(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                names.append(name)
                new.create_dataset(name, data=item[()]).attrs.update(item.attrs)

        old.visititems(copy)
    path.with_suffix(".new").replace(path)
    content = json.loads((step / manifest.NAME).read_bytes())
    content["files"][path.name] = asdict(reader.measure(path, names))
    assert resealed(path.read_bytes()) == path.read_bytes()
    _publish(step, content)


def _rearranged(draw: Random, run: Path, outside: Path) -> str:
    """Change what is where in a run's folder; says what."""
    steps = [run / "step_00000001", run / "step_00000002"]
    paths = sorted(steps[1].glob("*")) if steps[1].is_dir() else []
    match draw.randrange(5):
        case 0 if paths and all((steps[0] / path.name).is_file() and path.is_file() for path in paths):
            mine = draw.choice(paths)
            theirs = steps[0] / mine.name
            mine_was, theirs_was = mine.read_bytes(), theirs.read_bytes()
            mine.write_bytes(theirs_was)
            if draw.random() < 0.5:
                theirs.write_bytes(mine_was)
            return f"{mine.name} of another step"
        case 1 if all(step.is_dir() for step in steps):
            steps[0].rename(run / "swap")
            steps[1].rename(steps[0])
            (run / "swap").rename(steps[1])
            return "steps swapped"
        case 2:
            names = ("step_99999999", ".step_00000009.old-1@x-00000000", "step_00000003", "a\nb\x1b")
            return instead(draw, run / draw.choice(names), outside)
        case 3 if steps[1].is_dir():
            return instead(draw, steps[1] / draw.choice(("stranger", "rank_00001.h5", ".hidden")), outside)
        case _:
            return instead(draw, draw.choice([*paths, *paths, run / "latest", steps[1]]), outside)
