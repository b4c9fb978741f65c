import sys
from pathlib import Path

import pytest
import torchvision

from distill_cli import __version__, doctor
from distill_cli.doctor import Finding, examine


def findings(folder: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(folder)}


def test_this_machine_can_run_the_tests(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert found["distill"].found == __version__
    for what in ("python", "torch + torchvision", "file locks", "hdf5", *doctor.LIBRARIES):
        assert found[what].advice == "", what


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    findings(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_still_to_be_made_is_judged_by_where_it_will_be(tmp_path: Path) -> None:
    found = findings(tmp_path / "stores" / "in1k")
    assert found["file locks"].found == "work"
    assert list(tmp_path.iterdir()) == []


def test_torchvision_for_another_torch_is_told_to_be_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    found = findings(tmp_path)["torch + torchvision"]
    assert found.found == "operator torchvision::nms does not exist"
    assert found.advice.endswith("pip install --force-reinstall torch torchvision")


@pytest.mark.parametrize("name", ["torch", "torchvision", "timm", "h5py"])
def test_a_library_that_does_not_import_is_a_finding_and_not_a_crash(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert [finding for finding in examine(tmp_path) if finding.advice]


def test_a_library_that_is_not_installed_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "versions", lambda names: dict.fromkeys(set(names) - {"timm"}, "1.0"))
    assert findings(tmp_path)["timm"] == Finding("timm", "missing", "pip install timm")


def test_little_disk_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda _: 2**30)
    found = findings(tmp_path)["disk"]
    assert found.found.startswith("1.0 GiB free")
    assert "--dry-run" in found.advice


def test_a_file_system_without_locks_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("distill_cli.locks.fcntl.lockf", refuse)
    found = findings(tmp_path)["file locks"]
    assert found.found == "fail ([Errno 95] Operation not supported)"
    assert "a file system with locks" in found.advice
