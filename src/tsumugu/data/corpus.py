"""Reading corpora, local or remote, in pieces: .txt (a document a file), JSON lines (also packed), .parquet, .arrow.

The pieces are planned from the files alone, so that what is read, and in which order, does not depend on the number of
processes. Every record belongs to exactly one piece. What cannot be read comes out as a `BadRecord` with its place, for
the caller to stop at or to set aside; nothing is passed over. A failure of the disk or the network is no bad record but
an error.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tsumugu.data import storage
from tsumugu.errors import UserError
from tsumugu.tokenizer.load import check_unicode

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet", ".arrow")
TEXT_COLUMNS = ("content", "raw_content", "body", "document", "article", "passage", "code", "本文")  # besides text

PIECE_BYTES = 64 * 2**20
# Every piece of a compressed file decompresses it from the start, at some ten times the speed of the rest of the work.
COMPRESSED_PIECE_BYTES = 16 * 2**20
MOST_COMPRESSED_PIECES = 8
ENOUGH_PIECES = 32  # as many compressed files keep the processes busy uncut

# A document of so many bytes takes up to 1.5 GiB of memory on its way into a store, 3.5 GiB if its n-grams are counted.
LONGEST_TEXT = 2**27  # bytes of a .txt file, which is one document
LONGEST_LINE = 2**27  # bytes of a JSON line: what is longer is no JSON lines file

_BLOCK_BYTES = 2**18
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 1000

_CODECS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file: the records that begin there.

    Of .parquet the row groups and of .arrow the record batches that begin there. Of a compressed file the lines that
    begin in the blocks of decompressed bytes before which so many compressed bytes had been read.
    """

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
        values: What the columns hold; of .parquet and .arrow, those that were asked for.
        consumed: How many bytes of the piece were read when this record was.
    """

    place: str
    columns: Sequence[str]
    values: dict
    consumed: int


@dataclass(frozen=True)
class BadRecord:
    """A record, or the rest of a file, that cannot be read.

    Attributes:
        error: What is wrong with it; names the place.
        raw: The line, where it is one, with bytes that are not UTF-8 written as \\xNN; the values, where they were
            read; else "".
        consumed: As of Record.
    """

    place: str
    error: UserError
    raw: str
    consumed: int


class _DamageError(Exception):
    """A file, or what is left of it, cannot be read."""


# --- which files -----------------------------------------------------------------------------------------------------


def find_files(paths: str | list[str]) -> list[str]:
    """The files that paths, folders and globs name, sorted within each. Hidden files in folders are left out.

    Args:
        paths: Local, or URLs that fsspec reads: `s3://BUCKET/...`, `hf://datasets/OWNER/NAME[@REVISION]/...`.

    Raises:
        UserError: A path that names nothing, a file of an unknown kind, or a file named twice.
    """
    found: dict[str, str] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        files = storage.files_at(path, lambda file: _kind(file) is not None)
        if not files:
            raise UserError(f"{path} holds no file that is read here", f"known: {', '.join(ENDINGS)}")
        for file in files:
            if not _kind(file):
                raise UserError(f"{file}: not a kind of file that is read here", f"known: {', '.join(ENDINGS)}")
            check_unicode(file, f"the file name {file!a}")
            if not storage.is_remote(file) and not os.path.isfile(file):
                raise UserError(f"{file}: not a file that can be read", "a link may point to nothing")
            if identity(file) in found:
                raise UserError(f"{file} is named twice", "name each file of a source once")
            found[identity(file)] = file
    return list(found.values())


def identity(file: str) -> str:
    """What two names of one file have in common."""
    return file if storage.is_remote(file) else os.path.realpath(file)


def fingerprints(files: Iterable[str]) -> list[list]:
    """[path, size, mark] of each file; the mark changes when the content does (time of change, ETag, blob id)."""
    return [[file, *storage.size_and_mark(file)] for file in files]


def _kind(path: str) -> str | None:
    return next((ending for ending in ENDINGS if path.lower().endswith(ending)), None)


# --- in which pieces -------------------------------------------------------------------------------------------------


def plan(files: Iterable[str], piece_bytes: int | None = None) -> list[Piece]:
    """Cuts files into pieces, by their kinds, sizes and number alone.

    .jsonl, .parquet and local .arrow are cut into ranges of `piece_bytes`, by default PIECE_BYTES. Compressed files are
    cut into at most MOST_COMPRESSED_PIECES of COMPRESSED_PIECE_BYTES or more, as long as there are fewer than
    ENOUGH_PIECES files. Every other file is one piece.

    Raises:
        UserError: A .txt file too large for one document.
    """
    files = list(files)
    pieces = []
    for file in files:
        size, _ = storage.size_and_mark(file)
        kind = _kind(file)
        step = max(size, 1)
        if kind == ".txt" and size > LONGEST_TEXT:
            raise UserError(
                f"{file} has {size / 2**20:,.0f} MiB, and a .txt file is one document, of {LONGEST_TEXT >> 20} at most",
                'cut it, or make it a .jsonl file, {"text": ...} a line for each document',
            )
        if kind in (".jsonl", ".parquet") or (kind == ".arrow" and not storage.is_remote(file)):
            step = piece_bytes or PIECE_BYTES
        elif _codec(file):
            most = min(MOST_COMPRESSED_PIECES, math.ceil(ENOUGH_PIECES / len(files)))
            step = max(math.ceil(size / max(1, min(most, size // COMPRESSED_PIECE_BYTES))), 1)
        # an empty file is a piece too: a document without text, or damaged
        pieces += [Piece(file, start, min(start + step, size)) for start in range(0, max(size, 1), step)]
    return pieces


def _codec(path: str) -> str | None:
    return _CODECS.get(os.path.splitext(path.lower())[1])


# --- records ---------------------------------------------------------------------------------------------------------


def read_records(piece: Piece, columns: Sequence[str] | None = None) -> Iterator[Record | BadRecord]:
    """The records of a piece, in order; those that cannot be read among them.

    After a bad line or row the next one follows. A damaged file gives one bad record, from the piece in which the
    damage lies, and ends there. (The line that is cut off by damage counts too, where it begins in the piece before.)

    Args:
        piece: Of `plan`.
        columns: The columns that the caller needs, where they are there; default: all.

    Raises:
        UserError: The file cannot be opened, or the disk or the network fails.
    """
    kind = _kind(piece.path)
    if kind == ".txt":
        yield _read_text(piece)
    elif kind == ".parquet":
        yield from _read_parquet(piece, columns)
    elif kind == ".arrow":
        yield from _read_arrow(piece, columns)
    else:
        yield from _read_lines(piece)


def records(pieces: Iterable[Piece], columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of the pieces; the first that cannot be read raises its error."""
    for piece in pieces:
        for record in read_records(piece, columns):
            if isinstance(record, BadRecord):
                raise record.error
            yield record


def texts(pieces: Iterable[Piece], column: str | None = None) -> Iterator[str]:
    """The text column of every record of the pieces; by default the one that `find_text_column` finds."""
    pieces = list(pieces)
    column = column or find_text_column(pieces)
    for record in records(pieces, [column]):
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


def unusable(record: Record, reason: UserError) -> BadRecord:
    """A record that was read, but of which the caller can make nothing, as a bad one; its error names the place."""
    message = reason.message if reason.message.startswith(record.place) else f"{record.place}: {reason.message}"
    raw = json.dumps(record.values, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    return BadRecord(record.place, UserError(message, reason.hint), raw, record.consumed)


def find_text_column(pieces: Iterable[Piece]) -> str:
    """The column that holds the text, by the first record that can be read.

    That is `text`, else the one that is called as one of TEXT_COLUMNS, else the only one with strings.

    Raises:
        UserError: None, or several; lists the columns. No record can be read.
    """
    bad: BadRecord | None = None
    for piece in pieces:
        found = _columns(piece)
        if isinstance(found, BadRecord):
            bad = bad or found
        elif found:
            known = [name for name in found if name in TEXT_COLUMNS]
            strings = [name for name, holds_strings in found.items() if holds_strings]
            for candidates in (["text"] if "text" in found else [], known, strings):
                if len(candidates) == 1:
                    return candidates[0]
            raise UserError(
                f"{piece.path}: which column holds the text?", f"name it as text; it has: {', '.join(found)}"
            )
    if bad:
        raise bad.error
    return "text"


def _columns(piece: Piece) -> dict[str, bool] | BadRecord:
    """The columns of the first record that can be read, and whether they hold strings; {} of a piece without any."""
    kind = _kind(piece.path)
    if kind == ".txt":
        return {"text": True}
    if kind in (".parquet", ".arrow"):
        with storage.File(piece.path) as file:
            try:
                schema = _open_parquet(file).schema_arrow if kind == ".parquet" else _open_arrow(file).schema
            except _DamageError as error:
                return _damaged(piece, error, piece.path)
            return {field.name: _holds_strings(field.type) for field in schema}
    bad: BadRecord | None = None
    for record in read_records(piece):
        if isinstance(record, Record):
            return {str(name): isinstance(value, str) for name, value in record.values.items()}
        bad = bad or record
    return bad or {}


def _holds_strings(type: Any) -> bool:
    from pyarrow import types

    return types.is_string(type) or types.is_large_string(type) or types.is_string_view(type)


def _damaged(piece: Piece, damage: _DamageError, place: str) -> BadRecord:
    """What is left of a piece."""
    error = UserError(f"{place}: damaged ({' '.join(str(damage).split())})", "copy or make the file anew")
    return BadRecord(place, error, "", piece.size)


def _read_text(piece: Piece) -> Record | BadRecord:
    with storage.File(piece.path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return BadRecord(piece.path, _not_utf8(piece.path, error), "", piece.size)
    return Record(piece.path, ["text"], {"text": text}, piece.size)


def _not_utf8(place: str, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{place}: not UTF-8 at byte {error.start}", "convert it to UTF-8")


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _read_lines(piece: Piece) -> Iterator[Record | BadRecord]:
    codec = _codec(piece.path)
    number = 0
    with storage.File(piece.path) as file:
        stop = math.inf if codec and piece.stop >= file.size() else piece.stop  # the last piece has all that follows
        read = _decompressed_blocks(file, codec, piece) if codec else _plain_blocks(file, piece)
        try:
            for number, offset, line in _lines(file.tell, read, piece.start, stop):
                place = f"{piece.path}, line {number}"
                if piece.start > 0 and not codec:
                    place = f"{piece.path}, the line at byte {offset}"
                if number == 1 and piece.start == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line or line.isspace():
                    continue
                consumed = min(file.tell(), piece.stop) - piece.start
                try:
                    values = _parse(line, place)
                except UserError as error:
                    yield BadRecord(place, error, line.decode("utf-8", "backslashreplace"), consumed)
                else:
                    yield Record(place, list(values), values, consumed)
        except _DamageError as damage:
            yield _damaged(piece, damage, f"{piece.path}, after line {number}" if number else piece.path)


def _parse(line: bytes, place: str) -> dict:
    # json: with a faster library (orjson) the whole preparation would gain 2 to 5 %
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})", "mend or remove that line") from None
    if not isinstance(values, dict):
        raise UserError(f"{place}: not a JSON object", "every line must hold one object")
    return values


def _plain_blocks(file: storage.File, piece: Piece) -> Callable[[], bytes]:
    """Reads block by block from the byte before the piece on; blocks begin at both borders of the piece."""
    file.seek(max(piece.start - 1, 0))

    def read() -> bytes:
        position = file.tell()
        border = next((border for border in (piece.start, piece.stop) if position < border), math.inf)
        return file.read(int(min(_BLOCK_BYTES, border - position)))

    return read


def _decompressed_blocks(file: storage.File, codec: str, piece: Piece) -> Callable[[], bytes]:
    """Reads decompressed blocks, all of one size, so that the positions before them are the same for every piece.

    At damage before the piece, which the piece that it lies in reports, there are no more of them.
    """
    # pyarrow's decompression, because zstandard's takes a file that is cut short for a whole one
    import pyarrow

    stream = pyarrow.CompressedInputStream(file, codec)  # pyright: ignore[reportArgumentType]

    def read() -> bytes:
        position = file.tell()
        try:
            block = stream.read(_BLOCK_BYTES)
        except (pyarrow.ArrowException, OSError) as error:
            if position < piece.start:
                return b""
            raise _DamageError(error) from None
        if file.tell() == 0:
            raise _DamageError("it has no bytes")
        return block

    return read


def _lines(
    tell: Callable[[], int], read: Callable[[], bytes], start: int, stop: float
) -> Iterator[tuple[int, int, bytes]]:
    """The lines that begin in blocks before which the position was in [start, stop).

    Args:
        tell: The position.
        read: The next block; nothing at the end. The first block begins the file, or lies before `start`.

    Yields:
        The number of the line among all lines of the blocks, the offset of its first byte (where positions count the
        bytes of the blocks), and the line without its newline.
    """
    line: list[bytes] | None = []  # what is there of the line that is being read; None in a line of the piece before
    number = begin = 0
    while True:
        position = tell()
        if position >= stop and not line:
            return
        if not (block := read()):
            break
        if position < start:
            number += block.count(b"\n")
            begin = position + len(block)
            line = [] if block.endswith(b"\n") else None
            continue
        *ends, rest = block.split(b"\n")
        end_offset = position
        for end in ends:
            number += 1
            if line is not None:
                yield number, begin, b"".join([*line, end])
            if position >= stop:
                return
            line = []
            end_offset += len(end) + 1
            begin = end_offset
        if line is not None and rest:
            line.append(rest)
            if sum(map(len, line)) > LONGEST_LINE:
                raise _DamageError(f"line {number + 1} is longer than {LONGEST_LINE} bytes: not JSON lines")
    if line:
        yield number + 1, begin, b"".join(line)


# --- .parquet and .arrow ---------------------------------------------------------------------------------------------


def _read_parquet(piece: Piece, columns: Sequence[str] | None) -> Iterator[Record | BadRecord]:
    import pyarrow

    number = 0
    with storage.File(piece.path) as file:
        try:
            parquet = _open_parquet(file)
            names = parquet.schema_arrow.names
            wanted = [name for name in names if columns is None or name in columns]
            groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        except _DamageError as damage:
            if piece.start == 0:  # what is damaged is the end of the file, without which no piece can be read
                yield _damaged(piece, damage, piece.path)
            return
        mine = [i for i, group in enumerate(groups) if piece.start <= group.column(0).data_page_offset < piece.stop]
        if not mine:
            return
        first = number = sum(group.num_rows for group in groups[: mine[0]])
        rows = sum(groups[i].num_rows for i in mine)
        chunks = [groups[i].column(j) for i in mine for j in range(groups[i].num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in wanted)
        try:
            for batch in parquet.iter_batches(_batch_rows(size, rows), mine, wanted, use_threads=False):
                for values in _rows(batch):
                    number += 1
                    yield _row(piece, number, names, values, piece.size * (number - first) // rows)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            yield _damaged(piece, _DamageError(error), f"{piece.path}, after row {number}")


def _open_parquet(file: storage.File) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(
            file,  # pyright: ignore[reportArgumentType]
            buffer_size=2**20,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _DamageError(f"not readable as parquet: {error}") from None
    _check_columns(parquet.schema_arrow.names)
    return parquet


def _read_arrow(piece: Piece, columns: Sequence[str] | None) -> Iterator[Record | BadRecord]:
    """A stream of record batches, as datasets' save_to_disk writes it."""
    import pyarrow

    number, position = 0, 0
    with storage.File(piece.path) as file:
        size = file.size()
        # mapped, so that what belongs to other pieces is not even read; what is remote is one piece
        source = file if storage.is_remote(piece.path) or size == 0 else pyarrow.memory_map(piece.path)
        try:
            stream = _open_arrow(source)
            names = stream.schema.names
            wanted = [name for name in names if columns is None or name in columns]
            while True:
                position = source.tell()
                if position >= piece.stop < size:
                    return
                try:
                    batch = stream.read_next_batch()
                except StopIteration:
                    break
                if position < piece.start:
                    number += batch.num_rows
                    continue
                batch = batch.select(wanted)
                rows = _batch_rows(batch.nbytes, batch.num_rows)
                consumed = min(source.tell(), piece.stop) - piece.start
                for start in range(0, batch.num_rows, rows):
                    for values in _rows(batch.slice(start, rows)):
                        number += 1
                        yield _row(piece, number, names, values, consumed)
            if source.tell() == position or source.tell() < size:
                raise _DamageError("it is cut short" if source.tell() == position else "there is more behind its end")
        except (_DamageError, pyarrow.ArrowException, OSError, ValueError) as error:
            if position >= piece.start:
                place = f"{piece.path}, after row {number}" if number else piece.path
                yield _damaged(piece, _DamageError(error), place)


def _open_arrow(source: Any) -> Any:
    import pyarrow

    try:
        stream = pyarrow.ipc.open_stream(source)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _DamageError(f"not readable as a stream of Arrow record batches: {error}") from None
    _check_columns(stream.schema.names)
    return stream


def _check_columns(names: list[str]) -> None:
    if not names:
        raise _DamageError("it has no columns")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _DamageError(f"it has more than one column {twice}")


def _batch_rows(size: int, rows: int) -> int:
    """How many rows to turn into Python objects at a time."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))


def _rows(batch: Any) -> Iterator[dict | Exception]:
    """The rows of a record batch as dictionaries; in place of those that hold no valid values, the error."""
    import pyarrow

    try:
        batch.validate(full=True)
        yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # dates that Python has no room for
        if batch.num_rows == 1:
            yield error
            return
        for index in range(batch.num_rows):
            yield from _rows(batch.slice(index, 1))


def _row(piece: Piece, number: int, names: list[str], values: dict | Exception, consumed: int) -> Record | BadRecord:
    place = f"{piece.path}, row {number}"
    if isinstance(values, dict):
        return Record(place, names, values, consumed)
    error = UserError(f"{place}: not readable ({' '.join(str(values).split())})", "mend or remove that row")
    return BadRecord(place, error, "", consumed)
