"""Tensors on disk: safetensors files whose bytes depend on what is in them alone."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from distill_cli.files import write_atomic


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and text metadata as safetensors, atomically; equal contents are equal bytes."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    # safetensors writes its metadata in the order of a hash map, which is another one in each process.
    header = {"__metadata__": {"format": "pt", **dict(sorted(metadata.items()))}, **json.loads(content[8 : 8 + length])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(path, len(text).to_bytes(8, "little") + text + content[8 + length :])
