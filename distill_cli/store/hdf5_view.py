"""A shard as HDF5 sees it, against its first line: the two must tell every reader the same.

Only metadata is looked at, and only of files whose checksum was found right: no damaged file meets the HDF5 library.
"""

from pathlib import Path

import h5py
import numpy as np

from distill_cli.store.plan import FORMAT, VERSION
from distill_cli.store.shard import Array, Header


def check_hdf5(path: Path, header: Header) -> None:
    """
    Raises:
        ValueError: HDF5 finds another name, attribute, type, shape, layout or place than the header has.
    """
    try:
        with h5py.File(path, "r") as file:
            _check(file, header)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"HDF5 cannot read it ({' '.join(str(error).split())})") from error


def _check(file: h5py.File, header: Header) -> None:
    names = set(file)
    if names != set(header.arrays):
        raise ValueError(f"HDF5 finds {sorted(names)}, the first line names {sorted(header.arrays)}")
    expected = {"format": FORMAT, "version": VERSION, "plan_sha256": header.plan_sha256}
    expected |= {"view": header.view, "shard": header.shard}
    if set(file.attrs) != set(expected):
        raise ValueError(f"HDF5 finds the attributes {sorted(file.attrs)}, not {sorted(expected)}")
    for name, value in expected.items():
        attribute = h5py.h5a.open(file.id, name.encode())
        # Text of variable length is never read: see `store/shard.py`.
        if attribute.shape != () or attribute.dtype.kind not in "Siu":
            raise ValueError(f"its attribute {name} is neither a number nor text of fixed length")
        found = file.attrs[name]
        if (found.decode(errors="replace") if isinstance(found, bytes) else found) != value:
            raise ValueError(f"its attribute {name} is {found!r}, its first line says {value!r}")
    for name, array in header.arrays.items():
        _check_dataset(file, name, array)


def _check_dataset(file: h5py.File, name: str, array: Array) -> None:
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link in HDF5")
    dataset, (dtype, shape, first) = file[name], array
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{name} is no dataset in HDF5")
    if dataset.dtype != np.dtype(dtype) or dataset.shape != shape:
        raise ValueError(f"{name} is {dataset.dtype} {list(dataset.shape)} in HDF5, {dtype} {list(shape)} by its line")
    layout = dataset.id.get_create_plist()
    if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count():
        raise ValueError(f"{name} does not lie in one piece in the file")
    if dataset.size and dataset.id.get_offset() != first:
        raise ValueError(f"{name} lies at byte {dataset.id.get_offset()} in HDF5, at {first} by its line")
