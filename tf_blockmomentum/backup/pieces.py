"""One worker's part of a backup on disk: an npz file, and the checksum that says it is whole."""

import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_PIECE = re.compile(r"worker-(\d+)-of-(\d+)\.npz")


class Damaged(Exception):
    """A piece is not there, or not as it was written."""


class Piece(dict[str, Any]):
    """The arrays of one worker's file, read when asked for, whose checksum was right."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            expected = path.with_suffix(".npz.sha256").read_text().split()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise Damaged(f"{path.name} is missing or was not finished") from error
        except (OSError, UnicodeDecodeError) as error:
            raise Damaged(f"{path.name} cannot be read ({error})") from error
        if expected[:1] != [digest]:
            raise Damaged(f"{path.name} is torn or changed: its SHA-256 is not the one noted")
        with np.load(path, allow_pickle=False) as file:
            super().__init__(dict.fromkeys(file.files))
        self.meta = json.loads(self["meta"].tobytes())
        if self.meta.get("format") != 1:
            raise Damaged(f"{path.name} is of a format this version does not know")

    def __getitem__(self, name: str) -> np.ndarray:
        with np.load(self.path, allow_pickle=False) as file:  # none is left open
            return file[name]


def write(path: pathlib.Path, members: Iterable[tuple[str, np.ndarray | np.generic]]) -> None:
    """Writes an npz and then its checksum, each under another name first: the checksum's
    presence says that the file is whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb+") as file:
        with zipfile.ZipFile(file, "w") as archive:  # np.savez, but one array at a time
            for name, array in members:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(temporary, path)
    temporary.write_text(f"{digest}  {path.name}\n")
    os.replace(temporary, path.with_suffix(".npz.sha256"))


def worker_counts(directory: pathlib.Path) -> list[int]:
    """Of how many workers there are pieces in a backup's directory."""
    matches = (_PIECE.fullmatch(path.name) for path in directory.iterdir())
    return sorted({int(match[2]) for match in matches if match})


def to_bytes(array: np.ndarray | np.generic) -> np.ndarray | np.generic:
    """NumPy's format does not know bfloat16 and its like."""
    return array if array.dtype.kind in "biuf" else np.frombuffer(array.tobytes(), np.uint8)


def from_bytes(array: np.ndarray, shape: Sequence[int], dtype: str) -> np.ndarray:
    wanted = tf.as_dtype(dtype).as_numpy_dtype
    if array.dtype == wanted:
        return array
    return np.frombuffer(array.tobytes(), wanted).reshape(shape)
