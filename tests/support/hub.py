"""A hub on 127.0.0.1 that keeps what is uploaded: repositories, small files in commits, large ones by Git LFS."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "a" * 34


class Hub:
    """What it holds.

    Attributes:
        url: Its HF_ENDPOINT.
        repositories: Names to whether they are private.
        files: By repository and path.
    """

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}


@contextmanager
def serving() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(server.server_address[1])  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        hub, name = self.server.hub, self.path.removeprefix("/api/models/").partition("/revision/")[0].partition("?")[0]
        if name not in hub.repositories:
            return self._answer({"error": "Repository not found"}, 404)
        siblings = [{"rfilename": path} for path in hub.files[name]]
        self._answer({"id": name, "private": hub.repositories[name], "sha": "0" * 40, "siblings": siblings})

    def do_PUT(self) -> None:
        self.server.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        hub, body = self.server.hub, self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in self.path:
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repositories:
                return self._answer({"url": f"{hub.url}/{name}", "error": "exists"}, 409)
            hub.repositories[name], hub.files[name] = asked["visibility"] == "private", {}
            return self._answer({"url": f"{hub.url}/{name}"})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{hub.url}/objects/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        name = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")[0]
        if "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                hub.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                hub.files[name][entry["value"]["path"]] = hub.objects[entry["value"]["oid"]]
        self._answer({"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
