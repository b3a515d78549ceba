"""Object stores on the loopback address, as far as the readers talk to them: a bucket of S3, the Hugging Face hub."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class _Handler(BaseHTTPRequestHandler):
    """Serves `server.objects` (key to content), and notes the ranges that are read in `server.reads`."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True  # else every answer takes 40 ms

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_object(self, key: str) -> None:
        content = self.server.objects[key]
        headers = {"ETag": f'"{_digest(content)}"', "Last-Modified": "Tue, 24 Nov 2026 00:00:00 GMT"}
        if self.command == "HEAD":
            self.send(200, b"", headers | {"Content-Length": str(len(content))})
            return
        if key in self.server.forbidden:
            self.send(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
            return
        start, stop = 0, len(content)
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.server.reads.append((key, start, stop))
        self.send(206 if asked else 200, content[start:stop], headers)


class _Bucket(_Handler):
    def answer(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).removeprefix("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if bucket != "bucket":
            self.send(404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")
        elif "list-type" in query:
            self.send(200, self.listing(query.get("prefix", ""), query.get("delimiter", "")))
        elif not key:
            self.send(200, b"")
        elif key in self.server.objects:
            self.send_object(key)
        else:
            self.send(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")

    def listing(self, prefix: str, delimiter: str) -> bytes:
        entries, folders = [], set()
        for key, content in sorted(self.server.objects.items()):
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                continue
            entries.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><ETag>{_digest(content)}</ETag>"
                "<LastModified>2026-11-24T00:00:00Z</LastModified></Contents>"
            )
        entries += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)]
        return (
            f"<ListBucketResult><Name>bucket</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
            f"<KeyCount>{len(entries)}</KeyCount>{''.join(entries)}</ListBucketResult>"
        ).encode()


class _Hub(_Handler):
    """Keys are `OWNER/NAME@REVISION/path`."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/datasets/"):
            owner, name, verb, revision, rest = path.removeprefix("/datasets/").split("/", 4)
            assert verb == "resolve"
            self.send_object(f"{owner}/{name}@{revision}/{rest}")
            return
        if not path.startswith("/api/datasets/"):
            self.send_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        owner, name, *rest = path.removeprefix("/api/datasets/").split("/", 4)
        verb, revision, *rest = rest or ["revision", "main"]
        root = f"{owner}/{name}@{revision}/"
        if not any(key.startswith(root) for key in self.server.objects):
            self.send_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif verb == "revision":
            self.send_json(200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": [], "tags": []})
        elif verb == "tree":
            recursive = "recursive=True" in self.path or "recursive=true" in self.path
            self.send_json(200, self.tree(root, "".join(f"{part}/" for part in rest), recursive))
        else:
            self.send(404, b"")

    def tree(self, root: str, folder: str, recursive: bool) -> list[dict]:
        entries: dict[str, dict] = {}
        for key, content in sorted(self.server.objects.items()):
            if not key.startswith(root + folder):
                continue
            path = key.removeprefix(root)
            parts = path.removeprefix(folder).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                inner = folder + "/".join(parts[:depth])
                entries[inner] = {"type": "directory", "oid": "0", "size": 0, "path": inner}
            if recursive or len(parts) == 1:
                entries[path] = {"type": "file", "oid": _digest(content), "size": len(content), "path": path}
        return list(entries.values())

    def send_json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))


def _digest(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Server(ThreadingHTTPServer):
    """A running store. `objects`: key to content; `forbidden`: keys that are not given; `reads`: (key, start, stop)."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.objects: dict[str, bytes] = {}
        self.forbidden: set[str] = set()
        self.reads: list[tuple[str, int, int]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def _serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[Server]:
    with Server(handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def bucket() -> contextlib.AbstractContextManager[Server]:
    """The bucket `bucket`."""
    return _serve(_Bucket)


def hub() -> contextlib.AbstractContextManager[Server]:
    """Data sets of a hub."""
    return _serve(_Hub)
