"""Files are written whole or not at all, and errors name the file the user knows."""

import errno
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcifar.errors import InputError
from fastcifar.files import atomic_path, read_json, write_bytes, write_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_bytes_arrive_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_bytes(path, b"content")
    assert path.read_bytes() == b"content"
    assert names(path.parent) == ["file"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"a long first content")
    with open(path, "rb") as reader:
        write_bytes(path, b"second")
        assert reader.read() == b"a long first content"  # who had it open sees no mixture
    assert path.read_bytes() == b"second"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failing_block_changes_nothing(tmp_path: Path, error: BaseException, old: bytes | None) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def fail_halfway() -> None:
        with atomic_path(path) as partial:
            partial.write_bytes(b"half of the new cont")
            raise error

    with pytest.raises(type(error)):
        fail_halfway()
    assert (path.read_bytes() if path.exists() else None) == old
    assert names(tmp_path) == ([] if old is None else ["file"])


def test_nothing_stands_under_the_name_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as partial:
        partial.write_bytes(b"new")
        assert not path.exists()
        assert partial.parent == path.parent  # a rename is atomic only within one file system
    assert path.read_bytes() == b"new"


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as left_over:
        left_over.write_bytes(b"first")
    left_over.write_bytes(b"a long left-over of a killed process")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_an_error_of_the_disk_names_the_final_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space") as caught, atomic_path(path) as partial:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))
    assert caught.value.filename == str(path)


def test_a_block_that_writes_nothing_is_an_error_with_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError) as caught, atomic_path(path):
        pass
    assert caught.value.filename == str(path)


def test_a_folder_under_the_name_is_an_error_with_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_bytes(path, b"new")
    assert caught.value.filename == str(path)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("below", ["file", "folder/file"])
def test_a_file_where_a_folder_should_be_is_an_error_with_the_final_name(tmp_path: Path, below: str) -> None:
    (tmp_path / "plain").write_bytes(b"")
    path = tmp_path / "plain" / below
    with pytest.raises(OSError) as caught:  # noqa: PT011  # which one is the operating system's choice
        write_bytes(path, b"new")
    assert caught.value.filename == str(path)


def test_a_name_that_is_too_long_is_an_error_with_that_name(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 300)
    with pytest.raises(OSError, match="too long") as caught:
        write_bytes(path, b"new")
    assert caught.value.filename == str(path)


@given(value=json_values)
def test_json_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(path, value)
    assert read_json(path, remedy="none") == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_without_a_number_for_it_is_refused_and_the_old_file_stays(tmp_path: Path, number: float) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": number})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert names(tmp_path) == ["file.json"]


def test_missing_json_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "absent.json", remedy="write it again")
    assert str(tmp_path / "absent.json") in str(caught.value)
    assert "write it again" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{'a': 1}", b'{"a": 1} extra', b"\xff\xfe", b'{"count": ' + b"9" * 5000 + b"}", b"[" * 100_000],
    ids=["empty", "unclosed", "single quotes", "two values", "not text", "endless number", "endless nesting"],
)
def test_what_is_not_json_is_named_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path, remedy="write it again")
    assert str(path) in str(caught.value)
    assert "write it again" in str(caught.value)
