"""Files are written whole or not at all, and errors name the file the user knows."""

import errno
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.errors import InputError
from fastcifar.files import atomic_path, read_json, write_bytes, write_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_bytes_arrive_in_new_folders_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_bytes(path, b"a long first content")
    with open(path, "rb") as reader:
        write_bytes(path, b"second")
        assert reader.read() == b"a long first content"  # who had it open sees no mixture
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["file"]


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


def test_nothing_has_the_name_before_the_block_ends_and_left_overs_of_a_killed_process_are_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as partial:
        partial.write_bytes(b"new")
        assert not path.exists()
        assert partial.parent == path.parent  # a rename is atomic only within one file system
    assert path.read_bytes() == b"new"
    partial.write_bytes(b"what a killed process leaves")
    write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert names(tmp_path) == ["file"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as first:
        first.write_bytes(b"first, slowly")
        write_bytes(path, b"second")
        assert first.exists()  # its writer lives
    assert path.read_bytes() == b"first, slowly"
    assert names(tmp_path) == ["file"]


def test_a_link_in_the_way_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    for name in ("file", "file.partial", "file.x.partial"):
        (tmp_path / name).symlink_to("precious")
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").stat().st_mode & 0o777 == (tmp_path / "precious").stat().st_mode & 0o777


def test_errors_of_the_operating_system_name_the_final_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space") as caught, atomic_path(path) as partial:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))
    assert caught.value.filename == str(path)
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for below in ("folder", "plain/file", "plain/folder/file", "n" * 300):
        with pytest.raises(OSError) as caught:  # noqa: PT011  # which one is the operating system's choice
            write_bytes(tmp_path / below, b"new")
        assert caught.value.filename == str(tmp_path / below)
    assert names(tmp_path) == ["folder", "plain"]


@settings(max_examples=50)
@given(value=json_values)
def test_json_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(path, value)
    assert read_json(path, remedy="none") == value


def test_numbers_that_json_lacks_are_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"loss": 1.0})
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"loss": number})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert names(tmp_path) == ["file.json"]


NOT_JSON = {
    "missing": None,
    "empty": b"",
    "unclosed": b"{",
    "single quotes": b"{'a': 1}",
    "two values": b'{"a": 1} extra',
    "not text": b"\xff\xfe",
    "endless number": b'{"count": ' + b"9" * 5000 + b"}",
    "endless nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("content", NOT_JSON)
def test_what_is_not_json_is_named_with_the_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.json"
    if NOT_JSON[content] is not None:
        path.write_bytes(NOT_JSON[content])
    with pytest.raises(InputError, match="write it again") as caught:
        read_json(path, remedy="write it again")
    assert str(path) in str(caught.value)
