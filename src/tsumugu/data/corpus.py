"""Reading corpora: .txt (a document a file), .jsonl, .jsonl.gz, .jsonl.zst and .parquet, in pieces.

The pieces are planned from the files alone, so that what is read, and in which order, does not depend on the number of
processes. A line that cannot be read is an error that names its place; nothing is skipped.
"""

import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tsumugu.errors import UserError
from tsumugu.tokenizer.load import check_unicode

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PIECE_BYTES = 64 * 2**20

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file: the records (of .parquet: the row groups) that begin there."""

    path: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Record:
    """One record with its place and the names of all its columns, for messages.

    Attributes:
        values: What the columns hold; of .parquet, those that were asked for.
        consumed: How many bytes of the piece were read when this record was.
    """

    place: str
    columns: Sequence[str]
    values: dict
    consumed: int


def find_files(paths: str | list[str]) -> list[str]:
    """The files that paths, folders and globs name, sorted within each. Hidden files in folders are left out.

    Raises:
        UserError: A path that names nothing, a file of an unknown kind, or a file named twice.
    """
    found: dict[str, str] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f"{path}: no such file", f"give files, folders or globs of {', '.join(ENDINGS)}")
        files = [file for match in matches for file in _files_at(match)]
        if not files:
            raise UserError(f"{path} holds no file that is read here", f"known: {', '.join(ENDINGS)}")
        for file in files:
            if not _kind(file):
                raise UserError(f"{file}: not a kind of file that is read here", f"known: {', '.join(ENDINGS)}")
            check_unicode(file, f"the file name {file!a}")
            if not os.path.isfile(file):
                raise UserError(f"{file}: not a file that can be read", "a link may point to nothing")
            if os.path.realpath(file) in found:
                raise UserError(f"{file} is named twice", "name each file of a source once")
            found[os.path.realpath(file)] = file
    return list(found.values())


def _files_at(path: str) -> list[str]:
    """The path itself, or what a folder holds at any depth, of kinds that are read."""
    if not os.path.isdir(path):
        return [path]
    inside = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
    return sorted(file for file in inside if _kind(file) and not os.path.isdir(file))


def _kind(path: str) -> str | None:
    return next((ending for ending in ENDINGS if path.lower().endswith(ending)), None)


def plan(files: Iterable[str]) -> list[Piece]:
    """Cuts .jsonl and .parquet files into byte ranges of PIECE_BYTES; every other file is one piece."""
    pieces = []
    for file in files:
        size = Path(file).stat().st_size
        step = PIECE_BYTES if _kind(file) in (".jsonl", ".parquet") else max(size, 1)
        # an empty file is a piece too: a document without text, or damaged
        pieces += [Piece(file, start, min(start + step, size)) for start in range(0, max(size, 1), step)]
    return pieces


def read_records(piece: Piece, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a piece, in order.

    Args:
        piece: Of `plan`.
        columns: The columns that the caller needs, where they are there; default: all.

    Raises:
        UserError: Bytes that are not UTF-8, a line that is not a JSON object, a damaged file.
    """
    kind = _kind(piece.path)
    if kind == ".parquet":
        yield from _read_parquet(piece, columns)
    elif kind == ".txt":
        text = _decode(Path(piece.path).read_bytes(), piece.path).removeprefix("\ufeff")
        yield Record(piece.path, ["text"], {"text": text}, piece.size)
    else:
        yield from _read_lines(piece)


def texts(pieces: Iterable[Piece], column: str) -> Iterator[str]:
    """The text column of every record of the pieces."""
    for piece in pieces:
        for record in read_records(piece, [column]):
            yield column_of(record, column)


def column_of(record: Record, column: str) -> str:
    """The string in one column of a record, "" for null, or a UserError that lists the columns."""
    hint = f"it has: {', '.join(map(str, record.columns))}"
    if column not in record.values:
        raise UserError(f"{record.place}: no column {column}", hint)
    value = record.values[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{record.place}: column {column} holds {type(value).__name__}, not text", hint)
    check_unicode(value, f"{record.place}: column {column}")
    return value


def _read_lines(piece: Piece) -> Iterator[Record]:
    with open(piece.path, "rb") as file:
        compression = _COMPRESSIONS.get(os.path.splitext(piece.path.lower())[1])
        stream = _decompress(file, compression, piece) if compression else file
        if piece.start > 0:  # the line that crosses the border belongs to the piece before
            file.seek(piece.start - 1)
            file.readline()
        number = 0
        while compression or file.tell() < piece.stop:
            offset = file.tell()
            try:
                line = stream.readline()
            except OSError as error:
                raise UserError(f"{piece.path}, after line {number}: damaged ({error})", "copy the file anew") from None
            if not line:
                break
            number += 1
            place = f"{piece.path}, line {number}" if piece.start == 0 else f"{piece.path}, the line at byte {offset}"
            if piece.start == 0 and number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                values = json.loads(_decode(line, place))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not JSON ({error})", "mend or remove that line") from None
            if not isinstance(values, dict):
                raise UserError(f"{place}: not a JSON object", "every line must hold one object")
            yield Record(place, list(values), values, file.tell() - piece.start)


def _decompress(file: IO[bytes], compression: str, piece: Piece) -> IO[bytes]:
    # pyarrow's reader, because zstandard's takes a file that is cut short for a whole one
    import pyarrow

    if piece.stop == 0:
        raise UserError(f"{piece.path}: damaged (it has no bytes)", "copy the file anew")
    return io.BufferedReader(pyarrow.CompressedInputStream(file, compression), 2**20)  # pyright: ignore[reportArgumentType]


def _read_parquet(piece: Piece, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(piece.path)
        names = file.schema_arrow.names
        wanted = [name for name in names if columns is None or name in columns]
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        mine = [i for i, group in enumerate(groups) if piece.start <= group.column(0).data_page_offset < piece.stop]
        number = sum(group.num_rows for group in groups[: mine[0]]) if mine else 0
        first, rows = number, sum(groups[i].num_rows for i in mine)
        for batch in file.iter_batches(batch_size=1000, row_groups=mine, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{piece.path}, row {number}", names, values, piece.size * (number - first) // rows)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        place = f"{piece.path}, after row {number}" if number else piece.path
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: not readable as parquet ({reason})", "copy or make the file anew") from None


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}", "convert it to UTF-8") from None
