"""Reading corpora: every record exactly once, in any cut, and nothing unreadable passed over."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tsumugu.data import corpus
from tsumugu.data.corpus import find_files, plan, read_records, texts
from tsumugu.errors import UserError

TEXTS = ["一つ目。", "", "二行の\n文章。", "emoji 👨‍👩‍👧", "半角ｶﾅ", "x" * 50, "最後。"]


def _read(*paths: Path, column: str = "text") -> list[str]:
    return list(texts(plan(find_files([str(path) for path in paths])), column))


def _lines(values: list[str]) -> list[bytes]:
    return [json.dumps({"id": number, "text": text}, ensure_ascii=False).encode() for number, text in enumerate(values)]


def _compress(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(content)
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def _refused(path: Path, *expected: str, column: str = "text") -> None:
    with pytest.raises(UserError) as caught:
        _read(path, column=column)
    assert len(str(caught.value).splitlines()) == 1
    for part in (str(path), *expected):
        assert part in str(caught.value)


# --- .jsonl ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", None])
@pytest.mark.parametrize("blank", [b"", b"\n", b" \r\n\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_are_read_once_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newline: bytes, last: bytes | None, blank: bytes, mark: bytes
):
    path = tmp_path / "a.jsonl"
    content = mark + (newline + blank).join(_lines(TEXTS)) + (newline if last is None else last)
    path.write_bytes(content)
    for size in [*range(1, 80), 200, len(content) - 1, len(content), len(content) + 1]:
        monkeypatch.setattr(corpus, "PIECE_BYTES", size)
        pieces = plan([str(path)])
        assert len(pieces) == -(-len(content) // size)
        assert list(texts(pieces, "text")) == TEXTS, size
        consumed = [record.consumed for piece in pieces for record in read_records(piece)]
        assert all(0 < count <= len(content) for count in consumed)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_compressed_lines_are_those_of_the_plain_file(tmp_path: Path, ending: str):
    content = b"\xef\xbb\xbf" + b"\r\n".join(_lines(TEXTS * 5000))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(_compress(content, ending) if ending else content)
    assert _read(path) == TEXTS * 5000


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_of_several_members_are_read_to_the_end(tmp_path: Path, ending: str):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(_compress(line + b"\n", ending) for line in _lines(TEXTS)))
    assert _read(path) == TEXTS


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["half", "last byte", "overwritten", "not compressed", "garbage behind", "empty"])
def test_damaged_compressed_files_are_refused(tmp_path: Path, ending: str, damage: str):
    content = b"\n".join(_lines([f"{number}番目の文書。{number * 7919 % 10007}" for number in range(20_000)]))
    whole = _compress(content, ending)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "last byte": whole[:-1],
            "overwritten": whole[:3000] + b"\xff" * (len(whole) - 3000),
            "not compressed": content,
            "garbage behind": whole + b"garbage",
            "empty": b"",
        }[damage]
    )
    _refused(path, "damaged")


def test_lines_that_are_no_object_name_their_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    good = _lines(["よい"])[0] + b"\n"
    for bad, reason in [
        (b'{"text": "a"', "not JSON"),
        (b"plain text", "not JSON"),
        (b'["a"]', "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),  # more digits than Python converts
        (b'{"text": ' + b"[" * 100_000 + b"}", "not JSON"),  # deeper than Python's stack
        ('{"text": "日本"}'.encode("shift_jis"), "not UTF-8"),
        ('{"text": "日本"}'.encode("utf-16"), "not UTF-8"),
    ]:
        path.write_bytes(good + b"\n" + bad + b"\n" + good)
        _refused(path, "line 3", reason)


def test_a_bad_line_behind_the_first_piece_names_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = _lines(["よい"])[0] + b"\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(good * 3 + b"bad\n")
    monkeypatch.setattr(corpus, "PIECE_BYTES", len(good))
    _refused(path, f"the line at byte {3 * len(good)}", "not JSON")


# --- columns ---------------------------------------------------------------------------------------------------------


def test_a_missing_or_wrong_column_lists_the_columns(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "題", "body": "本文", "n": 3, "tags": ["a"]}\n')
    _refused(path, "no column text", "it has: title, body, n, tags")
    _refused(path, "line 1", "column n holds int", "it has: title, body, n, tags", column="n")
    _refused(path, "column tags holds list", column="tags")
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"title": ["題"], "body": ["本文"], "n": [3]}), table)
    _refused(table, "row 1", "no column text", "it has: title, body, n")
    _refused(table, "row 1", "column n holds int", "it has: title, body, n", column="n")
    assert _read(table, column="body") == ["本文"]


def test_null_is_a_document_without_text(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "a"}\n')
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), table)
    assert _read(path, table) == ["", "a", "a", ""]


def test_half_a_character_is_refused_and_a_whole_one_read(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert _read(path) == ["😀"]
    path.write_text('{"text": "a\\ud83d"}\n')
    _refused(path, "line 1", "lone surrogate U+D83D at character 1")


# --- .parquet and .txt -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dictionary", [True, False])
def test_row_groups_are_read_once_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dictionary: bool
):
    values = [f"{number}番の文書{'。' * (number % 7)}" for number in range(100)]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"n": list(range(100)), "text": values})
    pyarrow.parquet.write_table(table, path, row_group_size=9, use_dictionary=dictionary)
    for size in (1, 7, 100, 333, 1000, 10**9):
        monkeypatch.setattr(corpus, "PIECE_BYTES", size)
        records = [record for piece in plan([str(path)]) for record in read_records(piece, ["text"])]
        assert [record.values["text"] for record in records] == values
        assert [record.place for record in records] == [f"{path}, row {number}" for number in range(1, 101)]


def test_other_columns_of_a_parquet_file_do_not_matter(tmp_path: Path):
    path = tmp_path / "a.parquet"  # a time that Python cannot hold
    moment = pyarrow.array([2**62 + 1], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["本文"], "moment": moment}), path)
    assert _read(path) == ["本文"]


def test_damaged_parquet_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS * 1000}), path, use_dictionary=False)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-100], whole[: len(whole) // 2], b"text" * 100):
        path.write_bytes(content)
        _refused(path, "not readable as parquet")
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])
    _refused(path, "not readable as parquet")


def test_parquet_with_bytes_that_are_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    text = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe"))
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    _refused(path, "utf-8")


def test_a_txt_file_is_one_document_as_it_stands(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一行目\r\n\r\n三行目　\n".encode())
    assert _read(path) == ["一行目\r\n\r\n三行目　\n"]
    path.write_bytes("日本語".encode("euc_jp"))
    _refused(path, "not UTF-8 at byte 0")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_at_any_depth_whatever_the_endings(tmp_path: Path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b" / "B.JSONL").write_text('{"text": "b"}\n')
    (tmp_path / "b" / "c" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c"}\n'))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["d"]}), tmp_path / "b" / "d.parquet")
    for name in ("README.md", "data.csv", ".hidden/x.txt", ".x.txt"):
        (tmp_path / name).write_text("not to be read")
    assert _read(tmp_path) == ["a", "b", "c", "d"]
    assert _read(tmp_path / "*" / "c") == ["c"]  # globs may name folders
    assert _read(tmp_path / "**" / "*.txt") == ["a"]


def test_a_file_may_be_called_like_a_glob(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("a")
    assert _read(tmp_path / "a[1].txt") == ["a"]


def test_empty_files(tmp_path: Path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.txt").touch()
    assert _read(tmp_path / "a.jsonl") == []
    assert _read(tmp_path / "a.txt") == [""]


def _named(tmp_path: Path, *names: str) -> Callable[[], list[str]]:
    return lambda: find_files([str(tmp_path / name) for name in names])


def test_paths_that_name_nothing_readable_are_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    os.symlink(tmp_path / "gone", tmp_path / "link.txt")
    os.symlink(tmp_path / "a.txt", tmp_path / "again.txt")
    for names, reason in [
        (["b.txt"], "no such file"),
        (["*.jsonl"], "no such file"),
        (["empty"], "holds no file that is read here"),
        (["a.csv"], "not a kind of file"),
        (["*.csv"], "not a kind of file"),
        (["link.txt"], "not a file that can be read"),
        (["a.txt", "a.txt"], "named twice"),
        (["a.txt", "a*.txt"], "named twice"),
        (["a.txt", "again.txt"], "named twice"),
    ]:
        with pytest.raises(UserError, match=reason):
            _named(tmp_path, *names)()
