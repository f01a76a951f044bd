"""Damage to HDF5 files that HDF5 itself would call sound: datasets of other kinds in the place of good ones, and
checksums of its metadata that fit what was changed under them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

Make = Callable[[Any, str, Any, Path], object]  # (file, name of the dataset, its old numbers, a file outside)


def _low(file: Any, name: str, shape: tuple[int, ...], dtype: Any, change: Callable[[Any], object]) -> Any:
    """A dataset by HDF5's low-level functions; ``change`` is given the property list."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    change(plist)
    kind = dtype if isinstance(dtype, h5py.h5t.TypeID) else h5py.h5t.py_create(np.dtype(dtype), logical=True)
    parent, _, last = name.rpartition("/")
    return h5py.h5d.create(
        (file[parent] if parent else file).id, last.encode(), kind, h5py.h5s.create_simple(shape), plist
    )


def _chunked(
    deflate: bool, data: Callable[[Any], bytes] | None, chunk: int = 16, *, mask: int = 0, claimed: int = 0
) -> Make:
    """Chunks of one dimension, each with the bytes ``data`` makes of its numbers."""

    def make(file: Any, name: str, old: Any, outside: Path) -> None:
        flat = np.ravel(old)
        options = {"compression": "gzip"} if deflate else {}
        made = file.create_dataset(name, (max(claimed, flat.size),), flat.dtype, chunks=(chunk,), **options)
        for at in range(0, flat.size if data else 0, chunk):
            piece = np.resize(flat[at : at + chunk], chunk)
            made.id.write_direct_chunk((at,), data(piece), mask)  # type: ignore[misc]

    return make


def _virtual(file: Any, name: str, old: Any, outside: Path, source: str = "") -> None:
    layout = h5py.VirtualLayout(old.shape, old.dtype)
    layout[...] = h5py.VirtualSource(source or str(outside), name, old.shape)
    file.create_virtual_dataset(name, layout)


def _group_elsewhere(file: Any, name: str, old: Any, outside: Path) -> None:
    parent = name.rpartition("/")[0]
    if parent:
        del file[parent]
        file[parent] = h5py.ExternalLink(str(outside), f"/{parent}")


def _cycle(file: Any, name: str, old: Any, outside: Path) -> None:
    file.create_group(name)["a"] = file["/"]
    file[f"{name}/b"] = file[name]


def _attributes(file: Any, name: str, old: Any, outside: Path) -> None:
    made = file.create_dataset(name, data=old)
    for i in range(300):
        made.attrs[f"a{i}"] = i
    made.attrs["digest"] = "variable"
    made.attrs["start"] = np.zeros(4000)
    made.attrs["shape"] = made.ref


def _named_type(file: Any, name: str, old: Any, outside: Path) -> None:
    file[name + "_type"] = old.dtype
    file.create_dataset(name, data=old, dtype=file[name + "_type"])


def _float(bits: Callable[[Any], object]) -> Any:
    kind = h5py.h5t.IEEE_F32LE.copy()
    bits(kind)
    return kind


def _filtered(file: Any, name: str, old: Any, outside: Path) -> None:
    file.create_dataset(name, data=np.atleast_1d(old), compression="gzip", shuffle=True, fletcher32=True)


def _unknown_filter(file: Any, name: str, old: Any, outside: Path) -> None:
    _low(file, name, (64,), old.dtype, lambda plist: (plist.set_chunk((8,)), plist.set_filter(32015, 1)))


def _deflate_twice(file: Any, name: str, old: Any, outside: Path) -> None:
    _low(file, name, (64,), old.dtype, lambda p: (p.set_chunk((8,)), p.set_deflate(9), p.set_deflate(9)))


def _petabyte(file: Any, name: str, old: Any, outside: Path) -> None:
    _low(file, name, (2**50,), old.dtype, lambda plist: plist.set_layout(h5py.h5d.CONTIGUOUS))


def _short_float(file: Any, name: str, old: Any, outside: Path) -> None:
    _low(file, name, (5,), _float(lambda kind: kind.set_fields(20, 12, 8, 0, 12)), lambda plist: None)


#: What comes in the place of a dataset whose numbers were ``o``.
STRUCTURES: dict[str, Make] = {
    "external link": lambda f, n, o, x: f.__setitem__(n, h5py.ExternalLink(str(x), n)),
    "external link beside": lambda f, n, o, x: f.__setitem__(n, h5py.ExternalLink("../../outside/" + x.name, n)),
    "external group": _group_elsewhere,
    "soft link": lambda f, n, o, x: f.__setitem__(n, h5py.SoftLink("/")),
    "soft link to itself": lambda f, n, o, x: f.__setitem__(n, h5py.SoftLink("/" + n)),
    "virtual": _virtual,
    "virtual, of itself": lambda f, n, o, x: _virtual(f, n, o, x, "."),
    "external storage": lambda f, n, o, x: f.create_dataset(n, o.shape, o.dtype, external=[(str(x), 0, o.nbytes + 1)]),
    "chunked": lambda f, n, o, x: f.create_dataset(n, data=np.atleast_1d(o), chunks=True),
    "filters": _filtered,
    "a filter of a plug-in": lambda f, n, o, x: f.create_dataset(n, data=np.atleast_1d(o), compression="lzf"),
    "an unknown filter": _unknown_filter,
    "deflate twice": _deflate_twice,
    "chunks not written": lambda f, n, o, x: f.create_dataset(n, (max(1, o.size),), o.dtype, chunks=(16,)),
    "a petabyte of chunks": lambda f, n, o, x: f.create_dataset(n, (2**50,), o.dtype, chunks=(2**20,)),
    "chunks without end": lambda f, n, o, x: f.create_dataset(n, (2**62,), o.dtype, chunks=(1,)),
    "a huge chunk": lambda f, n, o, x: f.create_dataset(n, (2**29,), o.dtype, chunks=(2**28,)),
    "a petabyte in one piece": _petabyte,
    "a size that overflows": lambda f, n, o, x: _low(f, n, (2**31, 2**31, 4), "<f8", lambda p: p.set_chunk((2, 2, 2))),
    "a bomb": _chunked(True, lambda piece: zlib.compress(bytes(1 << 24), 9)),
    "a bomb in a chunk that claims more": _chunked(True, lambda piece: zlib.compress(bytes(1 << 22)), claimed=10**6),
    "deflate that is none": _chunked(True, lambda piece: b"\x00\xff" * 40),
    "deflate cut off": _chunked(True, lambda piece: zlib.compress(piece.tobytes())[:-3]),
    "deflate left out": _chunked(True, lambda piece: piece.tobytes(), mask=1),
    "long chunks": _chunked(False, lambda piece: piece.tobytes() * 3),
    "short chunks": _chunked(False, lambda piece: piece.tobytes()[:-1]),
    "not written": lambda f, n, o, x: f.create_dataset(n, o.shape, o.dtype),
    "compact": lambda f, n, o, x: _low(f, n, (3,), o.dtype, lambda p: p.set_layout(h5py.h5d.COMPACT)),
    "resizable": lambda f, n, o, x: f.create_dataset(n, data=np.atleast_1d(o), maxshape=(None,) * max(1, o.ndim)),
    "texts": lambda f, n, o, x: f.create_dataset(n, o.shape, h5py.string_dtype()),
    "fixed texts": lambda f, n, o, x: f.create_dataset(n, o.shape, "S7"),
    "sequences": lambda f, n, o, x: f.create_dataset(n, (3,), h5py.vlen_dtype("f4")),
    "references": lambda f, n, o, x: f.create_dataset(n, o.shape, h5py.ref_dtype),
    "regions": lambda f, n, o, x: f.create_dataset(n, o.shape, h5py.regionref_dtype),
    "compound": lambda f, n, o, x: f.create_dataset(n, data=np.zeros(o.shape, [("a\n\x1b[2J", o.dtype), ("b", "S9")])),
    "arrays": lambda f, n, o, x: f.create_dataset(n, data=np.zeros(3, [("a", "f4", (2, 3))])),
    "enumeration": lambda f, n, o, x: f.create_dataset(n, o.shape, h5py.enum_dtype({"a": 1}, "i4")),
    "booleans": lambda f, n, o, x: f.create_dataset(n, data=np.zeros(o.shape, bool)),
    "opaque": lambda f, n, o, x: f.create_dataset(n, o.shape, h5py.opaque_dtype(np.dtype("M8[s]"))),
    "complex": lambda f, n, o, x: f.create_dataset(n, data=np.zeros(o.shape, complex)),
    "another float": lambda f, n, o, x: _low(f, n, (5,), _float(lambda t: t.set_ebias(100)), lambda p: None),
    "a short float": _short_float,
    "another dtype": lambda f, n, o, x: f.create_dataset(n, data=o.astype("i2")),
    "big-endian": lambda f, n, o, x: f.create_dataset(n, data=o.astype(o.dtype.newbyteorder(">"))),
    "another shape": lambda f, n, o, x: f.create_dataset(n, data=np.ravel(o)[::-1].reshape(o.shape[::-1])),
    "flat": lambda f, n, o, x: f.create_dataset(n, data=np.ravel(o)),
    "no numbers": lambda f, n, o, x: f.create_dataset(n, data=h5py.Empty(o.dtype)),
    "a scalar": lambda f, n, o, x: f.create_dataset(n, data=o.dtype.type(3)),
    "shape zero": lambda f, n, o, x: f.create_dataset(n, (0,), o.dtype),
    "a group": lambda f, n, o, x: f.create_group(n),
    "a cycle": _cycle,
    "a named type": _named_type,
    "a type": lambda f, n, o, x: f.__setitem__(n, o.dtype),
    "strange attributes": _attributes,
    "the same": lambda f, n, o, x: f.create_dataset(n, data=o),
    "nothing": lambda f, n, o, x: None,
}  # fmt: skip


def restructured(draw: Random, path: Path, names: list[str], outside: Path) -> str:
    """Put something else in the place of one of the datasets ``names`` of a file; says what."""
    name, kind = draw.choice(names), draw.choice(list(STRUCTURES))
    with h5py.File(path, "r+") as file:
        old, attributes = file[name][()], dict(file[name].attrs)
        del file[name]
        STRUCTURES[kind](file, name, np.asarray(old), outside)
        if file.get(name, getlink=True, getclass=True) is h5py.HardLink and draw.random() < 0.9:
            for key, value in attributes.items():
                if key not in file[name].attrs:
                    file[name].attrs[key] = value
    return f"{name}: {kind}"


def resealed(data: bytes) -> bytes:
    """``data`` with right checksums in the superblock and in every object header of HDF5's newer formats."""
    changed = bytearray(data)
    if changed[8:9] in (b"\2", b"\3") and len(changed) > 48:
        struct.pack_into("<I", changed, 44, lookup3(bytes(changed[:44])))
    at = changed.find(b"OHDR\2")
    while at >= 0:
        end = _end_of_header(changed, at)
        if end + 4 <= len(changed):
            struct.pack_into("<I", changed, end, lookup3(bytes(changed[at:end])))
        at = changed.find(b"OHDR\2", at + 4)
    return bytes(changed)


def _end_of_header(data: bytearray, at: int) -> int:
    """Where the checksum of an object header's first chunk lies (HDF5 File Format Specification 3.0, IV.A.1.b)."""
    flags = data[at + 5] if at + 5 < len(data) else 0
    start = at + 6 + 16 * bool(flags & 32) + 4 * bool(flags & 16)
    width = 1 << (flags & 3)
    return start + width + int.from_bytes(data[start : start + width], "little")


def lookup3(data: bytes) -> int:
    """Jenkins' hash, which is HDF5's checksum of metadata (http://burtleburtle.net/bob/c/lookup3.c, hashlittle)."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask
    for at in range(0, len(data), 12):
        x, y, z = struct.unpack("<3I", data[at : at + 12].ljust(12, b"\0"))
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        if at + 12 < len(data):
            for shift in (4, 6, 8, 16, 19, 4):
                a, b, c = b, (c + b) & mask, ((a - c) & mask) ^ _turned(c, shift)
    for shift in (14, 11, 25, 16, 4, 14, 24) if data else ():
        a, b, c = b, ((c ^ b) - _turned(b, shift)) & mask, a
    return b if data else c


def _turned(x: int, shift: int) -> int:
    return (x << shift | x >> (32 - shift)) & 0xFFFFFFFF
