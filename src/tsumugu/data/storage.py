"""Files, local or remote (a URL that fsspec reads): listed, measured, opened; what fails is one line for the user."""

import glob
import io
import os
import re
from collections.abc import Callable
from typing import Any

from tsumugu.errors import UserError

# Remote files are read in blocks of so many bytes, the next one being fetched while this one is worked on.
BLOCK_BYTES = 8 * 2**20
_BLOCKS_KEPT = 4


def is_remote(path: str) -> bool:
    return "://" in path


def files_at(path: str, is_known: Callable[[str], bool]) -> list[str]:
    """What a path or glob names, sorted: files as they are; of folders, at any depth, those that are known.

    Raises:
        UserError: It names nothing, or cannot be looked up.
    """
    return _remote_files(path, is_known) if is_remote(path) else _local_files(path, is_known)


def _local_files(path: str, is_known: Callable[[str], bool]) -> list[str]:
    matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
    if not matches:
        raise UserError(f"{path}: no such file", "give files, folders or globs")
    files = []
    for match in matches:
        if not os.path.isdir(match):
            files.append(match)
            continue
        inside = glob.glob(os.path.join(glob.escape(match), "**"), recursive=True)
        files += sorted(file for file in inside if is_known(file) and not os.path.isdir(file))
    return files


def _remote_files(path: str, is_known: Callable[[str], bool]) -> list[str]:
    filesystem, name = _filesystem(path)
    try:
        filesystem.invalidate_cache()
        try:
            matches = {name: filesystem.info(name)}
        except FileNotFoundError:
            matches = filesystem.glob(name, detail=True) if glob.has_magic(name) else {}
        files = []
        for match, info in sorted(matches.items()):
            inside = filesystem.find(match) if info["type"] == "directory" else []
            files += [match] if info["type"] != "directory" else sorted(file for file in inside if is_known(file))
        if "/." not in name:  # hidden, as for local globs and folders
            files = [file for file in files if "/." not in file]
    except Exception as error:  # whatever the library of that kind of storage raises
        raise _unreadable(path, error) from None
    if not matches:
        raise UserError(
            f"{path}: no such file",
            "check the name (Hugging Face: hf://datasets/OWNER/NAME/..., and `hf auth login` for a private one)",
        )
    return [filesystem.unstrip_protocol(file) for file in files]


def size_and_mark(path: str) -> tuple[int, Any]:
    """The size of a file, and what changes when its content does: time of change, ETag or blob id."""
    try:
        if not is_remote(path):
            stat = os.stat(path)
            return stat.st_size, stat.st_mtime_ns
        filesystem, name = _filesystem(path)
        info = filesystem.info(name)
        marks = (str(info[key]).strip('"') for key in ("ETag", "blob_id", "created") if key in info)
        return info["size"], next(marks, None)
    except UserError:
        raise
    except Exception as error:  # as in _remote_files
        raise _unreadable(path, error) from None


def _filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    protocol, _, rest = path.partition("://")
    if "@" in (host := rest.split("/")[0]):
        raise UserError(
            f"{protocol}://…{host[host.rindex('@') :]}: holds a password", "give it as the library of that storage asks"
        )
    try:
        return url_to_fs(path)
    except ImportError as error:
        hint = "pip install 'tsumugu[aws]'" if protocol in ("s3", "s3a") else " ".join(str(error).split())
        raise UserError(f"{path}: {protocol}:// needs a package that is not installed", hint) from None
    except Exception as error:  # as in _remote_files
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    """What a library says about a file that it cannot read, without what its URLs were signed with."""
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = re.sub(r"(://)[^/\s@]*@", r"\1", re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", reason))
    return UserError(f"{path}: cannot be read ({reason})", "check its permissions, the network, the credentials")


class File:
    """An open file, local or remote, as far as pyarrow and we need it.

    What fails in reading bytes is a UserError, and so never taken for damage in what the bytes mean.
    """

    def __init__(self, path: str):
        self.path = path
        self._file = self._guard(self._open)

    def _open(self) -> Any:
        if not is_remote(self.path):
            return open(self.path, "rb")
        filesystem, name = _filesystem(self.path)
        options = {"cache_type": "background", "cache_options": {"maxblocks": _BLOCKS_KEPT}}
        return filesystem.open(name, "rb", block_size=BLOCK_BYTES, **options)

    def _guard(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError:
            raise
        except Exception as error:  # as in _remote_files
            raise _unreadable(self.path, error) from None

    def read(self, size: int = -1) -> bytes:
        return self._guard(self._file.read, size)

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        return self._guard(self._file.seek, position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def size(self) -> int:
        """Its length; goes back to the start."""
        end = self.seek(0, io.SEEK_END)
        self.seek(0)
        return end

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
