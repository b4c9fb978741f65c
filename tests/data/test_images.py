"""Faulty and unusual image files: each is read, or named in one line."""

import contextlib
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill_cli.data import open_source
from distill_cli.data.idx import ArraySource
from distill_cli.data.images import LARGE_BYTES, Encoded, UnreadableImage, printable, read_file
from distill_cli.data.sources import Source


def _read(path: Path) -> Image.Image:
    return Encoded(read_file(path), path).decoded()


def _refused(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        _read(path)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith("replace it, or go on without it by --skip-unreadable")
    assert caught.value.exit_code == 1
    return said


def _png(width: int, height: int) -> bytes:
    """The start of a PNG of any size, with few of its pixels."""
    chunks = {b"IHDR": struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(10))}
    parts = (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_palette_with_transparency_is_read_without_a_warning(picture: Image.Image, tmp_path: Path) -> None:
    picture.convert("P").save(tmp_path / "a.png", transparency=bytes(range(10)))
    assert _read(tmp_path / "a.png").mode == "RGB"


@pytest.mark.parametrize("mode", ["LA", "I;16", "F"])
def test_grey_of_any_depth_is_read_as_rgb(images: ArraySource, tmp_path: Path, mode: str) -> None:
    grey = images.images[0]
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.tif")
    else:
        Image.fromarray(grey).convert(mode).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(_read(tmp_path / "a.tif"))[..., 2], grey)


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.tiff"])
def test_of_an_animation_the_first_frame_is_read(images: ArraySource, tmp_path: Path, name: str) -> None:
    frames = [images.read(place) for place in range(3)]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert _read(tmp_path / name).tobytes() == frames[0].tobytes()


def test_an_exif_rotation_is_not_applied(picture: Image.Image, tmp_path: Path) -> None:
    """Nor do timm and torchvision apply it, so their published accuracies are of images as they lie in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.resize((28, 14)).save(tmp_path / "a.jpg", exif=exif)
    assert _read(tmp_path / "a.jpg").size == (28, 14)


def test_a_wide_image_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (20_000, 30), (1, 2, 3)).save(tmp_path / "a.png")
    image = _read(tmp_path / "a.png")
    assert (image.size, image.getpixel((19_999, 29))) == ((20_000, 30), (1, 2, 3))


def test_a_decompression_bomb_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(20_000, 20_000))
    assert "a.png: cannot be decoded (Image size (400000000 pixels) exceeds limit" in _refused(tmp_path / "a.png")


def test_a_large_image_that_is_no_bomb_is_no_warning(tmp_path: Path) -> None:
    """Pillow warns from half the size that it refuses."""
    (tmp_path / "a.png").write_bytes(_png(10_000, 10_000))
    assert "Image size" not in _refused(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"not an image", b"\0" * 5000])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    assert "a.jpg: cannot be decoded (" in _refused(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_an_image_cut_anywhere_is_named(picture: Image.Image, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    picture.resize((64, 64)).save(path)
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        assert f"a.{kind}: cannot be decoded (" in _refused(path)


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_are_an_image_or_named(picture: Image.Image, tmp_path: Path, seed: int) -> None:
    path, draw = tmp_path / "a.tif", np.random.default_rng(seed)
    picture.save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    for place in draw.integers(0, len(content), 8):
        content[place] = draw.integers(256)
    path.write_bytes(content)
    with contextlib.suppress(UnreadableImage):
        assert _read(path).mode == "RGB"


@pytest.mark.parametrize(
    ("size", "said"), [(10 * 2**30, "it has 10,737,418,240 bytes, more than 1,073,741,824"), (2**29, "no image")]
)
def test_a_large_file_that_is_no_image_is_not_read(tmp_path: Path, size: int, said: str) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        assert said in _refused(tmp_path / "a.jpg")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_large_bomb_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(20_000, 20_000))
    os.truncate(tmp_path / "a.png", 2**29)
    assert "a.png: cannot be decoded (Image size (400000000 pixels) exceeds limit" in _refused(tmp_path / "a.png")


def test_a_large_image_is_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    assert (tmp_path / "a.bmp").stat().st_size > LARGE_BYTES
    assert np.array_equal(np.asarray(_read(tmp_path / "a.bmp")), pixels)


def test_a_jpeg_of_four_inks_is_read(picture: Image.Image, tmp_path: Path) -> None:
    """As ImageNet has some; Adobe's are inverted, which Pillow knows."""
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    off = np.abs(np.asarray(_read(tmp_path / "a.jpg")).astype(int) - np.asarray(picture))
    assert off.mean() < 8


def test_a_pipe_in_a_files_place_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    assert "a.jpg: cannot be decoded (it is no regular file)" in _refused(tmp_path / "a.jpg")


def test_a_device_without_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("/dev/zero")
    assert "a.jpg: cannot be decoded (it is no regular file)" in _refused(tmp_path / "a.jpg")


def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    assert "a.jpg: cannot be decoded (too many levels of symbolic links)" in _refused(tmp_path / "a.jpg")


def test_a_folder_in_a_files_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").mkdir()
    assert "a.jpg: cannot be decoded (is a directory)" in _refused(tmp_path / "a.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_named(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    assert "a.png: cannot be decoded (permission denied)" in _refused(tmp_path / "a.png")


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nothing.png")
    source = _open(tmp_path)
    with pytest.raises(UnreadableImage, match=r"a\.png: cannot be decoded \(no such file or directory\)"):
        source.read(0)


@pytest.mark.parametrize("name", [b"\xff\xfe.png", "äöü 猫.png".encode(), b"two\nlines.png", b" .png", b"%s{0}.png"])
def test_any_file_name_is_a_name(picture: Image.Image, tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    picture.save(path)
    source = _open(tmp_path)
    assert list(source.keys) == [os.fsdecode(name)]
    assert source.read(0).tobytes() == picture.tobytes()
    path.write_bytes(b"")
    _refused(path)


def test_a_name_is_shown_in_one_line() -> None:
    assert printable("a\nb\udcff\x1b[31m猫") == r"a\nb\udcff\x1b[31m猫"


def _open(folder: Path) -> Source:
    source = open_source(str(folder), "train")
    assert source is not None
    return source
