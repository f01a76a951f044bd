"""The fuzz target for safetensors: two files and their index, without any digest, so that all numbers may be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random

import ml_dtypes  # noqa: F401  (imported now, not while opening is watched)
import numpy as np

from hpcmp.checkpoint.safetensors_model import INDEX, SafetensorsModel
from hpcmp.checkpoint.slab import Region
from hpcmp.errors import CheckpointError
from tests.checkpoint.fuzz_base import LARGE, Damage, Folder, refusal
from tests.checkpoint.mutations import bytes_changed, json_changed, length_changed, text_changed

CODES = {"F32": "f4", "U8": "u1", "F16": "f2", "BOOL": "?"}
KINDS = ("bytes", "length", "text", "json", "json", "json")


class Safetensors:
    """Each file has a tensor of each of CODES."""

    def prepare(self, folder: Path, outside: Path) -> None:
        weight_map = {}
        for i in range(2):
            header, body = {}, b""
            for code, dtype in CODES.items():
                data = np.arange(12).astype(dtype).tobytes()
                offsets = [len(body), len(body) + len(data)]
                header[f"{i}.{code}"] = {"dtype": code, "shape": [3, 4], "data_offsets": offsets}
                weight_map[f"{i}.{code}"] = f"model-{i}.safetensors"
                body += data
            (folder / f"model-{i}.safetensors").write_bytes(_file(json.dumps(header).encode(), body))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        self.base = Folder(folder)
        self.base.restore(outside, clear=False)

    def damage(self, draw: Random, run: Path, outside: Path) -> Damage:
        self.base.restore(run)
        path, kind = run / draw.choice(sorted(self.base.files)), draw.choice(KINDS)
        data = path.read_bytes()
        header = 0 if path.name == INDEX else 8 + int.from_bytes(data[:8], "little")
        text, body = data[8:header] if header else data, data[header:] if header else b""
        if kind == "text":
            text = text_changed(draw, text)
        elif kind == "json":
            content = json.loads(text)
            json_changed(draw, content, (str(outside / path.name), "../outside/" + path.name, "F64", "BF16", "BOOL"))
            text = json.dumps(content).encode()
        changed = {
            "bytes": lambda: bytes_changed(draw, data, [range(header or len(data))]),
            "length": lambda: length_changed(draw, data),
        }
        path.write_bytes(changed[kind]() if kind in changed else _file(text, body) if header else text)
        return Damage([kind, path.name], forged=True)

    def read(self, run: Path) -> str:
        outcome = "other"
        for path in (run, run / "model-0.safetensors"):
            try:
                with SafetensorsModel(path) as model:
                    for name, (shape, dtype) in model.tensors.items():
                        if math.prod(shape) * dtype.itemsize <= LARGE:
                            model.read(name, Region((0,) * len(shape), shape), shape)
            except CheckpointError as error:
                outcome = refusal(error)
        return outcome


def _file(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body
