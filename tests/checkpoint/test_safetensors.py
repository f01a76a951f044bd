"""The safetensors format: read and written byte for byte as it is published, and no header believed unchecked."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcmp.arrays import dtype_of
from hpcmp.checkpoint import safetensors
from hpcmp.checkpoint.safetensors import DTYPES, LIMIT, SafetensorsFile, write
from hpcmp.checkpoint.safetensors_model import SafetensorsModel
from hpcmp.checkpoint.slab import Region
from hpcmp.errors import CheckpointError

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of that header, an object or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def put(path: Path, arrays: dict[str, Any]) -> Path:
    write(path, {name: (a.shape, a.dtype) for name, a in arrays.items()}, lambda name: [arrays[name]])
    return path


def whole(shape: tuple[int, ...]) -> Region:
    return Region((0,) * len(shape), tuple(shape))


def numbers(dtype: str, shape: tuple[int, ...]) -> Any:
    values = np.random.default_rng(math.prod(shape)).integers(0, 2 if dtype == "bool" else 100, shape)
    return values.astype(dtype_of(dtype))


def test_a_published_example_is_read_and_written(tmp_path: Path) -> None:
    """The bytes, put together by hand."""
    data = np.array([[1, 2, 3], [4, 5, 6]], "<f4").tobytes() + bytes([0x80, 0x3F, 0x00, 0xC0])  # bfloat16 1 and -2
    header = {"__metadata__": {"format": "pt"}, "a": entry("F32", (2, 3), 0, 24), "b.c": entry("BF16", (2,), 24, 28)}
    (tmp_path / "x").write_bytes(raw(header, data))
    file = SafetensorsFile(tmp_path / "x")
    np.testing.assert_array_equal(file.read("a", whole((2, 3)), (2, 3)), [[1, 2, 3], [4, 5, 6]])
    b = file.read("b.c", whole((2,)), (2,))
    assert b.dtype.name == "bfloat16" and b.astype("f4").tolist() == [1, -2]
    tensors = {name: (t.shape, t.dtype) for name, t in file.tensors.items()}
    write(tmp_path / "y", tensors, lambda name: [file.read(name, whole(tensors[name][0]), tensors[name][0])])
    written = (tmp_path / "y").read_bytes()
    length = int.from_bytes(written[:8], "little")
    assert json.loads(written[8 : 8 + length]) == header and written[8 + length :] == data and length % 8 == 0
    file.close()


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    arrays = {f"x{i}": numbers(dtype, shape) for i, shape in enumerate([(3, 5), (), (0, 4), (7,), (2, 1, 3)])}
    file = SafetensorsFile(put(tmp_path / "x", arrays))
    for name, array in arrays.items():
        found = file.read(name, whole(array.shape), array.shape)
        assert found.dtype == array.dtype and found.tobytes() == array.tobytes()
    file.close()


def test_blocks_are_written_one_after_the_other(tmp_path: Path) -> None:
    array = np.arange(12.0).reshape(4, 3)
    tensors = {"x": (array.shape, array.dtype)}
    write(tmp_path / "x", tensors, lambda name: iter([array[:1], array[1:3].T.copy().T, array[3]]))
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "x").read("x", whole((4, 3)), (4, 3)), array)
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", tensors, lambda name: [array])
    for i, blocks in enumerate(([array[:3]], [array, array[:1]], [array.astype("f4")])):
        with pytest.raises(ValueError, match="x"):
            write(tmp_path / f"y{i}", tensors, lambda name, blocks=blocks: blocks)


@quick
@given(st.data())
def test_any_region_in_any_view_is_that_of_the_whole(tmp_path: Path, data: st.DataObject) -> None:
    view = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    array = np.arange(math.prod(view), dtype="i4")
    path = tmp_path / "x"
    path.unlink(missing_ok=True)
    put(path, {"before": np.zeros(3, "i1"), "x": array.reshape(-1, view[-1])})
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in view]
    region = Region(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
    file = SafetensorsFile(path)
    found = file.read("x", region, view)
    np.testing.assert_array_equal(found, array.reshape(view)[tuple(slice(a, b) for a, b in ends)])
    file.close()


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SafetensorsFile(put(tmp_path / "x", {"x": np.zeros((100, 50))}))
    sizes: list[int] = []
    readinto = type(file._file).readinto
    monkeypatch.setattr(type(file._file), "readinto", lambda s, b: sizes.append(len(b)) or readinto(s, b))
    file.read("x", Region((10, 7), (20, 3)), (100, 50))
    assert sizes == [24] * 20
    sizes.clear()
    file.read("x", Region((10, 0), (20, 50)), (100, 50))
    assert sizes == [8000]
    file.close()


def test_regions_outside_the_tensor_are_refused(tmp_path: Path) -> None:
    file = SafetensorsFile(put(tmp_path / "x", {"x": np.zeros((4, 3)), "y": np.ones(99)}))
    for region, view in (
        (Region((3, 0), (2, 3)), (4, 3)),
        (Region((0,), (12,)), (13,)),
        (Region((-1, 0), (1, 3)), (4, 3)),
    ):
        with pytest.raises(ValueError, match="x"):
            file.read("x", region, view)
    file.close()


TWO = b"\0" * 8
HOSTILE = {
    "empty": b"",
    "no header": b"\x10",
    "header beyond the file": raw({}, length=10**6),
    "huge header": raw(b" " * 64, length=2**63),
    "header longer than the limit": (LIMIT + 1).to_bytes(8, "little"),
    "not JSON": raw(b"hello"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "not an object": raw([1]),
    "a pickle": b"\x80\x04\x95" + b"\0" * 40,
    "deep": raw(b"[" * 100_000),
    "NaN": raw(b'{"x": NaN}'),
    "a key twice": raw(b'{"x": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "x": {}}', TWO),
    "an inner key twice": raw(b'{"x": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', TWO),
    "no table": raw({"x": 3}, TWO),
    "a key more": raw({"x": entry() | {"more": 1}}, TWO),
    "a key less": raw({"x": {"dtype": "F32", "shape": [2]}}, TWO),
    "unknown dtype": raw({"x": entry("F8_E4M3", (8,))}, TWO),
    "a list as dtype": raw({"x": entry(["F32"])}, TWO),
    "negative shape": raw({"x": entry(shape=(-2,))}, TWO),
    "true as shape": raw({"x": entry(shape=(True, 2))}, TWO),
    "float as shape": raw({"x": entry(shape=(2.0,))}, TWO),
    "vast shape": raw({"x": entry(shape=(2**55, 2**55))}, TWO),
    "shape that overflows": raw({"x": entry(shape=(2**33, 2**31))}, TWO),
    "digits without end": raw(b'{"x": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', TWO),
    "many axes": raw({"x": entry(shape=(1,) * 31 + (1, 2))}, TWO),
    "three offsets": raw({"x": entry() | {"data_offsets": [0, 4, 8]}}, TWO),
    "offsets backwards": raw({"x": entry(begin=8, end=0)}, TWO),
    "offsets beyond the file": raw({"x": entry(begin=8, end=16)}, TWO),
    "shape and offsets differ": raw({"x": entry(shape=(1,))}, TWO),
    "overlap": raw({"x": entry(), "y": entry()}, TWO),
    "a hole at the beginning": raw({"x": entry(begin=8, end=16)}, TWO * 2),
    "a hole": raw({"x": entry(), "y": entry(begin=12, end=20)}, b"\0" * 20),
    "bytes at the end": raw({"x": entry()}, TWO + b"\0"),
    "truncated": raw({"x": entry()}, b"\0" * 7),
    "a name with a line break": raw({"x\n": entry()}, TWO),
    "an empty name": raw({"": entry()}, TWO),
    "a long name": raw({"x" * 600: entry()}, TWO),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "x": entry()}, TWO),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_before_anything_is_made_of_them(tmp_path: Path, case: str) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert peak < 8 << 20


def test_what_is_no_plain_file_is_refused_and_a_link_is_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nowhere", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=str(path)):
            SafetensorsFile(path)
    real = put(tmp_path / "blob", {"x": np.ones(2)})
    (tmp_path / "link.safetensors").symlink_to(real)
    with SafetensorsModel(tmp_path / "link.safetensors") as model:
        assert model.tensors == {"x": ((2,), np.dtype("f8"))}


def opens(path: Path, data: bytes) -> None:
    """Either the file is refused, or every byte of its data is in exactly one tensor."""
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))
        return
    first = 8 + int.from_bytes(data[:8], "little")
    spans = sorted((t.offset, math.prod(t.shape) * t.dtype.itemsize) for t in file.tensors.values())
    assert all(type(n) is int and n >= 0 for t in file.tensors.values() for n in t.shape)
    for offset, size in spans:
        assert offset == first
        first += size
    assert first == len(data)
    file.close()


VALID = raw(
    {"__metadata__": {"format": "pt"}, "a": entry("F32", (2, 3), 0, 24), "b": entry("BF16", (), 24, 26)}, b"\7" * 26
)


@quick
@given(st.data())
def test_mutated_files_never_pass_for_others(tmp_path: Path, data: st.DataObject) -> None:
    mutated = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        if not mutated:
            break
        at = data.draw(st.integers(0, len(mutated) - 1))
        kind = data.draw(st.sampled_from(["flip", "digit", "delete", "insert", "cut"]))
        if kind == "flip":
            mutated[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "digit":
            mutated[at] = data.draw(st.sampled_from(b'0123456789-,[]{}":e.'))
        elif kind == "delete":
            del mutated[at]
        elif kind == "insert":
            mutated.insert(at, data.draw(st.integers(0, 255)))
        else:
            del mutated[at + 1 :]
    opens(tmp_path / "x", bytes(mutated))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F8"]) | values,
        "shape": st.lists(st.integers(-1, 2**70), max_size=4) | values,
        "data_offsets": st.lists(st.integers(-1, 2**70), min_size=2, max_size=2) | values,
    }
)


@quick
@given(st.dictionaries(st.text(max_size=8), entries | values, max_size=4) | values, st.binary(max_size=64))
def test_random_headers_never_pass_for_others(tmp_path: Path, header: Any, data: bytes) -> None:
    opens(tmp_path / "x", raw(header, data))


@quick
@given(st.binary(max_size=200))
def test_random_bytes_never_pass_for_a_file(tmp_path: Path, data: bytes) -> None:
    opens(tmp_path / "x", data)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = SafetensorsFile(put(tmp_path / "x", {"x": np.zeros(100)}))
    os.truncate(tmp_path / "x", 500)
    with pytest.raises(CheckpointError, match=str(tmp_path / "x")):
        file.read("x", whole((100,)), (100,))
    file.close()


def test_the_limit_holds_for_json_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert safetensors.read_json(tmp_path / "x.json") == {"a": 1}
    monkeypatch.setattr(safetensors, "LIMIT", 7)
    with pytest.raises(CheckpointError, match="7 bytes"):
        safetensors.read_json(tmp_path / "x.json")
