"""Tensors on disk: safetensors files whose bytes depend on what is in them alone."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from distill_cli.files import sha256, write_atomic

CHECKSUM = "sha256"
"""Of all bytes behind the header, in the metadata."""


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is without ranks; one in parts is put together, for which all ranks have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_there(tensor: Tensor, there: Tensor | None) -> Tensor:
    """A whole tensor, which every rank has, dealt to the ranks as another one of its shape is."""
    if not isinstance(there, DTensor):
        return tensor
    # None: each rank cuts its own part.
    return distribute_tensor(tensor.to(there.device), there.device_mesh, there.placements, src_data_rank=None)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], checksum: bool = False
) -> None:
    """Write tensors and text metadata as safetensors, atomically; equal contents are equal bytes."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    payload = memoryview(content)[8 + length :]
    described = {"format": "pt", **metadata, **({CHECKSUM: sha256(payload)} if checksum else {})}
    # safetensors writes its metadata in the order of a hash map, which is another one in each process.
    header = {"__metadata__": dict(sorted(described.items())), **json.loads(content[8 : 8 + length])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(path, b"".join([len(text).to_bytes(8, "little"), text, payload]))


def check_tensors(path: Path) -> None:
    """Compare the bytes of a file with the checksum that it was written with.

    Raises:
        ValueError: it has none, or another.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("cut short")
        expected = json.loads(file.read(length)).get("__metadata__", {}).get(CHECKSUM)
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise ValueError("its bytes are not those that were written")
