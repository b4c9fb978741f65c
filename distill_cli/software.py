"""Versions of the libraries that decide pixels and logits."""

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Library -> installed version; one that is not installed is left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
