"""safetensors files: headers, slices of tensors, and a streaming writer."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from open_agentrl_jax.storage import read_text, retry_reads
from open_agentrl_jax.types import UserError

READABLE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WRITABLE = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}  # dtype -> name in the file, bytes


INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


class TensorFiles:
    """The tensors of a model folder, from the headers of its files.

    As in transformers, model.safetensors comes first, then the files of the index; other files are ignored. A complete
    set of shards without an index, or one file by another name, is also read.

    Raises:
      UserError: no weights, a missing or damaged file, an unsupported dtype.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.file: dict[str, pathlib.Path] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.dtype: dict[str, str] = {}
        self.stored: dict[str, str] = {}  # name -> the name in its file
        weight_map: dict[str, str] = {}
        if not (folder / "model.safetensors").exists() and (folder / INDEX).exists():
            weight_map = _weight_map(folder / INDEX)
        for path in sorted({folder / name for name in weight_map.values()}) or _files(folder):
            self._read_header(path)
        for name, file in weight_map.items():
            if name not in self.file:
                raise UserError(f"{folder / file}: {name}: missing, the index lists it; download the file again")

    @retry_reads
    def _read_header(self, path: pathlib.Path) -> None:
        if not path.exists():
            raise UserError(f"{path}: missing, {INDEX} lists it; download the file again")
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in self.file:
                        raise UserError(f"{path}: {name}: duplicate, also in {self.file[name].name}; keep one of them")
                    tensor = file.get_slice(name)
                    if tensor.get_dtype() not in READABLE:
                        raise UserError(
                            f"{path}: {name}: dtype {tensor.get_dtype()} is not supported; "
                            f"use weights in one of {', '.join(sorted(READABLE))}"
                        )
                    self.file[name], self.shape[name] = path, tuple(tensor.get_shape())
                    self.dtype[name] = READABLE[tensor.get_dtype()]
                    self.stored[name] = name
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({error}); download the file again") from None

    def rename(self, name: str, new: str) -> None:
        """Make a tensor available under another name, and no longer under its own."""
        self.file[new], self.shape[new] = self.file.pop(name), self.shape.pop(name)
        self.dtype[new], self.stored[new] = self.dtype.pop(name), self.stored.pop(name)

    @retry_reads
    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice of one tensor. Opens the file anew, so that its pages do not stay in memory."""
        with safe_open(self.file[name], "np") as file:
            return file.get_slice(self.stored[name])[index]


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        return dict(json.loads(read_text(index))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: weight_map: cannot be read; download the file again") from None


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files with the weights where no index lists them."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    sets: dict[str, list[pathlib.Path]] = {}
    for path in found:
        if match := _SHARD.fullmatch(path.name):
            sets.setdefault(match[1], []).append(path)
    whole = [paths for count, paths in sets.items() if len(paths) == int(count)]
    if len(whole) == 1:
        return whole[0]
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter, not a model; merge it into its base model first")
    if len(found) == 1 and not sets:
        return found
    if any(folder.glob("*.bin")):
        raise UserError(f"{folder}: holds .bin weights only; load and save it with transformers to get safetensors")
    if found:
        raise UserError(f"{folder}: {INDEX}: missing, and the weights cannot be told from other files; copy it again")
    raise UserError(f"{folder}: *.safetensors: none there; give a folder with safetensors weights")


def header(tensors: Mapping[str, tuple[int, ...]], dtype: str) -> tuple[bytes, int]:
    """The first bytes of a file, and the size in bytes of the data that follows.

    Args:
      tensors: name -> shape, in the order of the data.
      dtype: "float32" or "bfloat16".
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kind, item = WRITABLE[dtype]
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * item
        content[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def write_tensors(
    path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, arrays: Iterable[np.ndarray]
) -> None:
    """Write one file; `arrays`, in the order of `shapes`, may be produced one at a time."""
    with open(path, "wb") as file:
        file.write(header(shapes, dtype)[0])
        for array in arrays:
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
