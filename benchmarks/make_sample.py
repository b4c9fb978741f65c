"""Make `distill_cli/data/sample.npz` from Debian's package `dataset-fashion-mnist`.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .
    python benchmarks/make_sample.py usr/share/datasets/fashion-mnist

The first 1,000 training and 200 test images of each of the ten classes, in their order in the original files.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from distill_cli.data.idx import open_idx

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def main(folder: Path, out: Path) -> None:
    arrays = {"classes": np.array(CLASSES)}
    for split, per_class in (("train", 1000), ("val", 200)):
        source = open_idx(folder, split)
        assert source is not None
        assert source.labels is not None
        ids = np.sort(np.concatenate([np.flatnonzero(source.labels == c)[:per_class] for c in range(10)]))
        arrays[f"{split}_images"] = np.asarray(source.images)[ids]
        arrays[f"{split}_labels"] = source.labels[ids].astype(np.uint8)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            # A fixed date in the archive: the same images are the same bytes.
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (2017, 8, 25, 0, 0, 0)),
                buffer.getvalue(),
                zipfile.ZIP_DEFLATED,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent.parent / "distill_cli" / "data" / "sample.npz")
