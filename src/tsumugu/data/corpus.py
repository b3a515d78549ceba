"""Reading corpora: .txt (a document a file), .jsonl, .jsonl.gz, .jsonl.zst and .parquet, in pieces.

The pieces are planned from the files alone, so that what is read, and in which order, does not depend on the number of
processes. A line that cannot be read is an error that names its place; nothing is skipped.
"""

import glob
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tsumugu.errors import UserError

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file: the records whose first byte lies there."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Record:
    """One record with its place, for messages, and how far into the piece it lies."""

    place: str
    values: dict
    consumed: int


def find_files(paths: str | list[str]) -> list[str]:
    """The files that paths, folders and globs name, sorted within each.

    Raises:
        UserError: A path that names nothing, or a file of an unknown kind.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if Path(path).is_dir():
            files = sorted(str(file) for file in Path(path).rglob("*") if file.name.endswith(ENDINGS))
        elif Path(path).is_file():
            files = [path]
        else:
            files = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
        if not files:
            raise UserError(f"{path}: no such file", f"give files, folders or globs of {', '.join(ENDINGS)}")
        found += files
    for file in found:
        if not file.endswith(ENDINGS):
            raise UserError(f"{file}: not a kind of file that is read here", f"known: {', '.join(ENDINGS)}")
    return found


def plan(files: Iterable[str]) -> list[Piece]:
    """Cuts plain .jsonl files into byte ranges; every other file is one piece."""
    pieces = []
    for file in files:
        size = Path(file).stat().st_size
        step = PIECE_BYTES if file.endswith(".jsonl") else max(size, 1)
        pieces += [Piece(file, start, min(start + step, size)) for start in range(0, size, step)]
    return pieces


def read_records(piece: Piece) -> Iterator[Record]:
    """The records of a piece, in order.

    Raises:
        UserError: Bytes that are not UTF-8, a line that is not a JSON object, a damaged file.
    """
    if piece.path.endswith(".parquet"):
        yield from _read_parquet(piece)
    elif piece.path.endswith(".txt"):
        text = _decode(Path(piece.path).read_bytes(), piece.path).removeprefix("\ufeff")
        yield Record(piece.path, {"text": text}, piece.stop)
    else:
        yield from _read_lines(piece)


def texts(pieces: Iterable[Piece], column: str) -> Iterator[str]:
    """The text column of every record of the pieces."""
    for piece in pieces:
        for record in read_records(piece):
            yield column_of(record, column)


def column_of(record: Record, column: str) -> str:
    """The string in one column of a record, or a UserError that lists the columns."""
    if column not in record.values:
        raise UserError(f"{record.place}: no column {column}", f"it has: {', '.join(map(str, record.values))}")
    value = record.values[column]
    if not isinstance(value, str):
        raise UserError(f"{record.place}: column {column} holds {type(value).__name__}, not text", "name a text column")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{record.place}: column {column} holds half a character (a lone surrogate) at {error.start}",
            "mend or remove that record",
        ) from None
    return value


def _read_lines(piece: Piece) -> Iterator[Record]:
    opener: Callable[..., IO[bytes]] = {".gz": gzip.open, "zst": _open_zstd}.get(piece.path[-3:], open)
    with open(piece.path, "rb") as file:
        plain = opener is open
        stream = file if plain else opener(file)
        if piece.start > 0:  # the line that crosses the border belongs to the piece before
            file.seek(piece.start - 1)
            file.readline()
        number = 0
        while not plain or file.tell() < piece.stop:
            offset = file.tell()
            try:
                line = stream.readline()
            except (OSError, EOFError, RuntimeError, ValueError) as error:
                raise UserError(f"{piece.path}, after line {number}: damaged ({error})", "copy the file anew") from None
            if not line:
                break
            number += 1
            if not line.strip():
                continue
            place = f"{piece.path}, line {number}" if piece.start == 0 else f"{piece.path}, the line at byte {offset}"
            if offset == 0 and number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                values = json.loads(_decode(line, place))
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: not JSON ({error.msg})", "mend or remove that line") from None
            if not isinstance(values, dict):
                raise UserError(f"{place}: not a JSON object", "every line must hold one object")
            yield Record(place, values, file.tell() - piece.start)


def _open_zstd(file: IO[bytes]) -> IO[bytes]:
    import zstandard

    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))


def _read_parquet(piece: Piece) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(piece.path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for values in batch.to_pylist():
                number += 1
                consumed = piece.stop * number // file.metadata.num_rows
                yield Record(f"{piece.path}, row {number}", values, consumed)
    except pyarrow.ArrowException as error:
        raise UserError(f"{piece.path}: not a readable parquet file ({error})", "copy the file anew") from None


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}", "convert it to UTF-8") from None
