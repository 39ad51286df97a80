"""Reading PyTorch's distributed checkpoints without running code that a prepared one may hold.

`torch.distributed.checkpoint` unpickles a folder's `.metadata`, and whatever in it is no tensor, as it stands. Here
both may build what such a checkpoint is made of, and nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.planner import ReadItem

from vapi_fast.runtime.errors import CheckpointError

HARMLESS = {("collections", "OrderedDict"), ("torch", "Size"), ("torch.serialization", "_get_layout")}


class MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of a checkpoint's metadata; anything else raises UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath", "WindowsPath"):
            return Path
        if module in (metadata.__name__, filesystem.__name__):
            found = getattr(metadata if module == metadata.__name__ else filesystem, name, None)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


class RestrictedReader(dcp.FileSystemReader):
    """Reads a folder's files of the given names alone."""

    def __init__(self, folder: Path, files: Collection[str]) -> None:
        super().__init__(folder)
        self.folder, self.files = folder, files

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Raises CheckpointError for a `.metadata` that is none, or that names other files."""
        path = self.folder / ".metadata"
        try:
            found = MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            names = {info.relative_path for info in found.storage_data.values()}
        except Exception as error:  # on damaged bytes an unpickler raises whatever its next step happens to
            reason = str(error).partition("\n")[0][:160] or type(error).__name__
            raise CheckpointError(f"{path}: {reason}; it is not read") from error
        if not isinstance(found, metadata.Metadata) or not names <= set(self.files):
            raise CheckpointError(f"{path}: names files that are not the checkpoint's; it is not read")
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class RestrictedPlanner(dcp.DefaultLoadPlanner):
    """Takes numbers, text and containers of them beside the tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # what follows would build anything
        value.seek(0)
        super().load_bytes(read_item, value)
