"""Whatever the images lie in, they are the same data: what every kind of source must do."""

import csv
import io
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from distill_cli.data import absolute, open_train, open_val
from distill_cli.data.config import DataConfig
from distill_cli.data.sources import Source, check_classes, fingerprint, without_labels
from distill_cli.errors import MismatchError

Make = Callable[[Path, Path], DataConfig]
"""(class folders, empty folder) -> the same data in another form."""


def _samples(root: Path) -> list[tuple[Path, str, str]]:
    """(file, class, split), sorted by path."""
    return [(path, path.parts[-2], path.parts[-3]) for path in sorted(root.glob("*/*/*"))]


def _folders(root: Path, out: Path) -> DataConfig:
    return DataConfig(path=str(root))


def _csv(root: Path, out: Path) -> DataConfig:
    with (out / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "label", "path"])
        writer.writerows((split, name, path) for path, name, split in reversed(_samples(root)))
    return DataConfig(path=str(out / "list.csv"), root=str(root))


def _tsv(root: Path, out: Path) -> DataConfig:
    for split in ("train", "val"):
        lines = [f"{path.relative_to(root / split)}\t{name}" for path, name, of in _samples(root) if of == split]
        (root / split / f"{split}.tsv").write_text("\n".join(["image\tclass", *lines]) + "\n")
    return DataConfig(path=str(root / "train/train.tsv"), val=str(root / "val/val.tsv"))


def _parquet(root: Path, out: Path) -> DataConfig:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    paths, labels, splits = zip(*_samples(root), strict=True)
    table = pa.table({"file": list(map(str, paths)), "label": labels, "split": splits})
    pyarrow.parquet.write_table(table, out / "list.parquet")
    return DataConfig(path=str(out / "list.parquet"), root=str(root))


def _encoded_hdf5(root: Path, out: Path) -> DataConfig:
    with h5py.File(out / "images.h5", "w") as file:
        for split in ("train", "val"):
            chosen = [(path, name) for path, name, of in _samples(root) if of == split]
            images = file.create_dataset(f"{split}/images", len(chosen), h5py.vlen_dtype(np.uint8))
            for place, (path, _) in enumerate(chosen):
                images[place] = np.frombuffer(path.read_bytes(), np.uint8)
            file[f"{split}/labels"] = [name for _, name in chosen]
    return DataConfig(path=str(out / "images.h5"))


def _plain_hdf5(root: Path, out: Path) -> DataConfig:
    with h5py.File(out / "images.hdf5", "w") as file:
        for split in ("train", "val"):
            chosen = [(path, name) for path, name, of in _samples(root) if of == split]
            pixels = np.array([np.asarray(Image.open(path).convert("RGB")) for path, _ in chosen])
            file.create_dataset(f"{split}/images", data=pixels, chunks=True, compression="gzip")
            file[f"{split}/labels"] = [name for _, name in chosen]
    return DataConfig(path=str(out / "images.hdf5"))


def _tars(root: Path, out: Path) -> DataConfig:
    for split in ("train", "val"):
        chosen = [(path, name) for path, name, of in _samples(root) if of == split]
        for number, part in enumerate((chosen[:5], chosen[5:])):
            with tarfile.open(out / f"x-{split}-{number:03d}.tar", "w") as tar:
                for path, name in part:
                    for kind, content in ((path.suffix, path.read_bytes()), (".cls", name.encode())):
                        member = tarfile.TarInfo(f"{name}/{path.stem}{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return DataConfig(path=f"wds:{out}/x-train-{{000..001}}.tar", val=f"wds:{out}/x-val-*.tar")


def _tar_folder(root: Path, out: Path) -> DataConfig:
    _tars(root, out)
    return DataConfig(path=f"wds:{out}")


def _hf_dict(root: Path, out: Path) -> DataConfig:
    _hf(root).save_to_disk(str(out / "saved"))
    return DataConfig(path=f"hf:{out}/saved")


def _hf_parquet(root: Path, out: Path) -> DataConfig:
    for split, part in _hf(root).items():
        part.to_parquet(str(out / f"{split}-00000-of-00001.parquet"))
    return DataConfig(path=f"hf:{out}")


def _hf(root: Path):  # type: ignore[no-untyped-def]
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted({n for _, n, _ in _samples(root)}))}
    )
    parts = {}
    for split in ("train", "val"):
        chosen = [(path, name) for path, name, of in _samples(root) if of == split]
        column = {
            "image": [{"bytes": path.read_bytes(), "path": None} for path, _ in chosen],
            "label": [name for _, name in chosen],
        }
        parts["validation" if split == "val" else split] = datasets.Dataset.from_dict(column, features=features)
    return datasets.DatasetDict(parts)


def _timm_torch(root: Path, out: Path) -> DataConfig:
    return DataConfig(path="timm:torch/image_folder", root=str(root))


def _timm(root: Path, out: Path) -> DataConfig:
    return DataConfig(path="timm:", root=str(root))


MAKERS = (
    _folders,
    _csv,
    _tsv,
    _parquet,
    _encoded_hdf5,
    _plain_hdf5,
    _tars,
    _tar_folder,
    _hf_dict,
    _hf_parquet,
    _timm_torch,
    _timm,
)


@pytest.fixture(scope="module")
def folders(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, into which lists may be written."""
    return Path(shutil.copytree(image_folder, tmp_path_factory.mktemp("every") / "images"))


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__.strip("_"))
def config(request: pytest.FixtureRequest, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    found: DataConfig = request.param(folders, tmp_path_factory.mktemp("out"))
    return found


def _pixels(source: Source) -> dict[bytes, str]:
    assert source.labels is not None
    assert source.classes is not None
    return {source.read(i).tobytes(): source.classes[source.labels[i]] for i in range(len(source))}


def test_it_has_the_same_images_and_classes(config: DataConfig, folders: Path) -> None:
    expected = DataConfig(path=str(folders))
    for open_split in (open_train, open_val):
        found, known = open_split(config), open_split(expected)
        assert found is not None
        assert known is not None
        assert len(found) == len(found.keys) == len(known)
        assert found.classes == known.classes
        assert _pixels(found) == _pixels(known)


def test_its_listing_is_the_same_each_time(config: DataConfig) -> None:
    one, two = open_train(config), open_train(config)
    assert fingerprint(one) == fingerprint(two)
    assert len(set(one.keys)) == len(one)


def _read(source: Source, sample_id: int) -> bytes:
    return source.read(sample_id).tobytes()


def test_a_spawned_worker_reads_the_same(config: DataConfig, other_process: ProcessPoolExecutor) -> None:
    source = open_train(config)
    _read(source, 0)
    assert other_process.submit(_read, source, 3).result() == _read(source, 3)


def test_its_labels_can_be_left_out(config: DataConfig) -> None:
    source = open_train(config)
    bare = without_labels(source)
    assert (bare.labels, bare.classes, len(bare)) == (None, None, len(source))
    assert _read(bare, 1) == _read(source, 1)


def test_labels_out_of_the_models_range_are_refused(config: DataConfig) -> None:
    with pytest.raises(MismatchError, match="teacher x: has 2 classes, the data 3; give the data of these classes"):
        check_classes(open_train(config), "teacher x", 2, None)


def test_it_opens_from_another_folder(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fingerprint(open_train(config))
    assert config.path is not None
    moved = replace(config, path=absolute(config.path), root=config.root and absolute(config.root))
    monkeypatch.chdir(tmp_path)
    assert fingerprint(open_train(moved)) == expected


@pytest.mark.parametrize("make", [_tsv, _timm_torch, _timm])
def test_a_store_of_the_folders_fits_them_listed_otherwise(make: Make, folders: Path, tmp_path: Path) -> None:
    assert fingerprint(open_train(make(folders, tmp_path))) == fingerprint(open_train(DataConfig(path=str(folders))))
