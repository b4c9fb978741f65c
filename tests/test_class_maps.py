import json
from pathlib import Path

import pytest

from distill_cli.class_maps import read_class_map
from distill_cli.errors import UsageError


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("map.txt", "0 one", "cannot be read (invalid literal"),
        ("map.json", "{", "cannot be read ("),
        ("map.json", '{"a": 1}', "is no list of class ids; give one for each class, -1 for a new one"),
        ("map.json", "[0, true]", "is no list of class ids"),
        ("map.json", "[0, 1.5]", "is no list of class ids"),
        ("map.txt", "0 -2", "is no list of class ids"),
        ("map.txt", "", "is no list of class ids"),
        ("map.txt", None, "cannot be read ([Errno 2]"),
    ],
)
def test_a_file_that_is_no_map_is_refused(name: str, text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        read_class_map(tmp_path / name, "student.class_map")
    assert str(caught.value).startswith(f"student.class_map {tmp_path / name}: {said}")


def test_a_json_map_may_have_any_length(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(list(range(21841))))
    assert read_class_map(tmp_path / "map.json", "student.class_map") == list(range(21841))
