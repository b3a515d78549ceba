"""AWS on loopback: moto for S3, Logs and STS, and a SageMaker that keeps what it is asked and runs jobs without Docker.

A job's hosts are processes that see a folder in place of /opt/ml, and a Python of their own that has everything but
tsumugu and jsonargparse, and no network. What SageMaker does around a container is done here: channels come
from S3, checkpoints go there while training goes on and come back to every host, models and logs go there at the end.
"""

import base64
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3

from support.containers import HOSTS, free_ports, start, write_inputs
from tsumugu.launch.proof import _kill

REGION = "ap-northeast-1"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": REGION}
_LACKING = ("tsumugu", "__editable__", "jsonargparse", "torchao")  # the last one: transformers imports it where it is


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """moto's server; its URL."""
    port = free_ports()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/")
                break
            except OSError:
                assert process.poll() is None, "moto's server has ended"
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def client(service: str, url: str):
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": REGION}
    return boto3.client(service, endpoint_url=url, **keys)


def make_image(folder: Path) -> Path:
    """A virtual environment in which everything is installed that is installed here, but for _LACKING."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    installed = next(Path(place) for place in sys.path if place.endswith("site-packages"))
    for path in installed.iterdir():
        if not path.name.startswith(_LACKING) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    image = folder / "image"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(image)], check=True)
    [own] = image.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"{packages}\n")
    return image


def wheel_of(name: str, folder: Path) -> Path:
    """An installed pure Python package as a wheel again."""
    distribution = importlib.metadata.distribution(name)
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{distribution.version}-py3-none-any.whl"
    record = f"{name}-{distribution.version}.dist-info/RECORD"
    lines = []
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in distribution.files or []:
            if ".." in file.parts or "__pycache__" in file.parts or file.name in ("RECORD", "INSTALLER"):
                continue
            content = file.read_binary()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            archive.writestr(str(file), content)
            lines.append(f"{file},sha256={digest},{len(content)}")
        archive.writestr(record, "\n".join([*lines, f"{record},,", ""]))
    return wheel


def without_network(image: Path) -> dict[str, str]:
    """The environment of a container: its Python goes first, and pip knows no index and reaches nothing."""
    nowhere = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{nowhere}/simple", "PIP_FIND_LINKS": ""}
    return proxies | pip | {"PATH": f"{image}/bin:/usr/bin:/bin", "PYTHONPATH": ""}


class Bucket:
    """S3 as SageMaker uses it."""

    def __init__(self, url: str):
        self._s3 = client("s3", url)

    def keys(self, uri: str) -> dict[str, str]:
        """Names below a URI, and their keys."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        prefix = f"{prefix.rstrip('/')}/"
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {item["Key"].removeprefix(prefix): item["Key"] for page in pages for item in page.get("Contents", [])}

    def fetch(self, uri: str, folder: Path) -> None:
        bucket = uri.removeprefix("s3://").partition("/")[0]
        for name, key in self.keys(uri).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._s3.download_file(bucket, key, str(folder / name))

    def read(self, uri: str) -> bytes:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return self._s3.get_object(Bucket=bucket, Key=key)["Body"].read()

    def put(self, folder: Path, uri: str) -> None:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put_file(path, f"{uri.rstrip('/')}/{path.relative_to(folder)}")

    def put_file(self, path: Path, uri: str) -> None:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        with contextlib.suppress(FileNotFoundError):  # renamed since
            self._s3.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def delete(self, uri: str) -> None:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self._s3.delete_object(Bucket=bucket, Key=key)


class _Copy:
    """What SageMaker does with a folder of checkpoints on one host: restored once, then copied when files change."""

    def __init__(self, bucket: Bucket, uri: str, folder: Path):
        self._bucket, self._uri, self._folder = bucket, uri, folder
        bucket.fetch(uri, folder)
        self._seen = self._look()

    def _look(self) -> dict[str, tuple[int, int]]:
        seen = {}
        for folder, _, names in os.walk(self._folder):  # which passes over folders that are renamed meanwhile
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    seen[str(path.relative_to(self._folder))] = (stat.st_size, stat.st_mtime_ns)
        return seen

    def copy(self) -> None:
        now = self._look()
        for name in now.keys() - {name for name, mark in self._seen.items() if now.get(name) == mark}:
            self._bucket.put_file(self._folder / name, f"{self._uri}/{name}")
        for name in self._seen.keys() - now.keys():
            self._bucket.delete(f"{self._uri}/{name}")
        self._seen = now


class _Job:
    """One training or processing job, which a thread runs."""

    def __init__(
        self, kind: str, request: dict, folder: Path, bucket: Bucket, logs, image: Path, network: Sequence[str]
    ):
        self.kind, self.request, self.folder = kind, request, folder
        self.bucket, self.logs, self.image, self.network = bucket, logs, image, network
        self.status, self.secondary, self.reason, self.attempts = "InProgress", "Starting", "", 0
        self.metrics: dict[str, float] = {}
        self.started = time.time()
        self.stopping = threading.Event()
        self.interrupt_at: int | None = None  # the step whose checkpoint is in S3 when the hosts are taken away

    @property
    def name(self) -> str:
        return self.request[f"{self.kind}JobName"]

    def run(self) -> None:
        try:
            while not (self._attempt() if self.kind == "Training" else self._process()):
                self.secondary = "Interrupted"
        except Exception as error:
            self.reason, self.status = f"InternalServerError: {error!r}", "Failed"
            raise

    def _attempt(self) -> bool:
        """One start of all hosts; False when they were taken away."""
        self.attempts += 1
        request, hosts = self.request, HOSTS[: self.request["ResourceConfig"]["InstanceCount"]]
        inputs = {
            item["ChannelName"]: item["DataSource"]["S3DataSource"]["S3Uri"] for item in request["InputDataConfig"]
        }
        port, roots, copies = free_ports(), [], []
        self.secondary = "Downloading"
        for host in hosts:
            root = self.folder / str(self.attempts) / host
            write_inputs(root, host, hosts, list(inputs), request["HyperParameters"])
            for name, uri in inputs.items():
                self.bucket.fetch(uri, root / "input" / "data" / name)
            copies.append(_Copy(self.bucket, request["CheckpointConfig"]["S3Uri"], root / "checkpoints"))
            roots.append(root)
        self.secondary = "Training"
        processes = [self._start(root, request["AlgorithmSpecification"], port) for root in roots]
        asked_at = None
        while any(process.poll() is None for process in processes):
            marked = [int(path.parent.name[5:]) for path in roots[-1].glob("checkpoints/checkpoints/step-*/COMPLETE")]
            for copy in copies:
                copy.copy()
            if self.interrupt_at is not None and max(marked, default=0) >= self.interrupt_at:
                self.interrupt_at = None
                for process in processes:
                    _kill(process)
                return False
            if self.stopping.is_set() and asked_at is None:
                asked_at, self.secondary = time.monotonic(), "Stopping"
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            if asked_at is not None and time.monotonic() > asked_at + 120:
                for process in processes:
                    _kill(process)
            time.sleep(0.2)
        self.secondary = "Uploading"
        for copy, root in zip(copies, roots, strict=True):
            copy.copy()
            self.bucket.put(root / "model", self.model)
        self._finish([process.returncode for process in processes], roots)
        return True

    def _process(self) -> bool:
        """The one attempt of a processing job."""
        self.attempts += 1
        root = self.folder / "1" / "algo-1"
        for item in self.request["ProcessingInputs"]:
            place = item["S3Input"]["LocalPath"].removeprefix("/opt/ml/")
            self.bucket.fetch(item["S3Input"]["S3Uri"], root / place)
        [output] = (item["S3Output"] for item in self.request["ProcessingOutputConfig"]["Outputs"])
        made = root / output["LocalPath"].removeprefix("/opt/ml/")
        made.mkdir(parents=True)
        process = self._start(root, self.request["AppSpecification"], 0)
        process.wait()
        self.bucket.put(made, output["S3Uri"])
        self._finish([process.returncode], [root])
        return True

    @property
    def model(self) -> str:
        return f"{self.request['OutputDataConfig']['S3OutputPath']}/{self.name}/output/model"

    def _start(self, root: Path, specification: dict, port: int) -> subprocess.Popen:
        image = root.with_name(f"{root.name}-image")
        shutil.copytree(self.image, image, symlinks=True)
        command = [word.replace("/opt/ml", str(root)) for word in specification["ContainerEntrypoint"]]
        environment = without_network(image) | self.request["Environment"]
        command = [*self.network, *command]
        return start(root, port, command, keep=("HOME", "OMP_NUM_THREADS", "TMPDIR"), **environment)

    def _finish(self, codes: list[int], roots: list[Path]) -> None:
        for root in roots:
            lines = root.with_name(f"{root.name}.log").read_text().splitlines()
            self._write_log(root.name, lines)
            if self.kind == "Training":
                for item in self.request["AlgorithmSpecification"]["MetricDefinitions"]:
                    for line in lines:
                        for value in re.findall(item["Regex"], line):
                            self.metrics[item["Name"]] = float(value)
        failures = [root / "output" / "failure" for root in roots]
        said = next((path.read_text() for path in failures if path.exists()), "")
        self.status = "Stopped" if self.stopping.is_set() else "Failed" if any(codes) else "Completed"
        self.secondary = self.status
        self.reason = f"AlgorithmError: {said}, exit code: {max(codes)}" if self.status == "Failed" else ""

    def _write_log(self, host: str, lines: list[str]) -> None:
        group, stream = f"/aws/sagemaker/{self.kind}Jobs", f"{self.name}/{host}-{int(time.time())}"
        with contextlib.suppress(self.logs.exceptions.ResourceAlreadyExistsException):
            self.logs.create_log_group(logGroupName=group)
        self.logs.create_log_stream(logGroupName=group, logStreamName=stream)
        now = int(time.time() * 1000)
        events = [{"timestamp": now + index, "message": line or " "} for index, line in enumerate(lines)]
        if events:
            self.logs.put_log_events(logGroupName=group, logStreamName=stream, logEvents=events)

    def described(self) -> dict:
        answer = self.request | {f"{self.kind}JobStatus": self.status, "CreationTime": self.started}
        answer[f"{self.kind}JobArn"] = f"arn:aws:sagemaker:{REGION}:123456789012:{self.kind.lower()}-job/{self.name}"
        if self.kind == "Processing":
            return answer | ({"ExitMessage": self.reason} if self.reason else {})
        answer |= {"SecondaryStatus": self.secondary, "ModelArtifacts": {"S3ModelArtifacts": self.model}}
        answer["FinalMetricDataList"] = [
            {"MetricName": name, "Value": value, "Timestamp": self.started} for name, value in self.metrics.items()
        ]
        if self.status != "InProgress":
            answer["BillableTimeInSeconds"] = max(1, int(time.time() - self.started))
        return answer | ({"FailureReason": self.reason} if self.reason else {})


class SageMaker:
    """The service.

    Args:
        folder: Where jobs' hosts have their folders.
        url: Of moto's server.
        image: Of `make_image`; None: jobs are taken and never start.
        network: Of `containers.no_network`, for jobs to run in.

    Attributes:
        refusal: Code and message of the error that the next call gets.
    """

    def __init__(self, folder: Path, url: str, image: Path | None, network: Sequence[str] = ()):
        self.jobs: dict[str, _Job] = {}
        self.refusal: tuple[str, str] | None = None
        self._folder, self._image, self._network = folder, image, network
        self._bucket, self._logs = Bucket(url), client("logs", url)
        self._threads: list[threading.Thread] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = service.answer(self.headers["X-Amz-Target"].partition(".")[2], body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "SageMaker":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for job in self.jobs.values():
            job.stopping.set()
        for thread in self._threads:
            thread.join(timeout=130)

    def answer(self, operation: str, body: dict) -> tuple[int, dict]:
        if self.refusal:
            (code, words), self.refusal = self.refusal, None
            return 400, {"__type": code, "message": words}
        match = re.fullmatch(r"(Create|Describe|Stop)(Training|Processing)Job", operation)
        assert match, operation
        action, kind = match.groups()
        name = body[f"{kind}JobName"]
        if action == "Create":
            if name in self.jobs:
                return 400, {"__type": "ResourceInUse", "message": f"Job name must be unique: {name}"}
            folder, image = self._folder / name, self._image or Path()
            job = _Job(kind, body, folder, self._bucket, self._logs, image, self._network)
            self.jobs[name] = job
            if self._image:
                self._threads.append(threading.Thread(target=job.run, daemon=True))
                self._threads[-1].start()
            return 200, {f"{kind}JobArn": job.described()[f"{kind}JobArn"]}
        if name not in self.jobs or self.jobs[name].kind != kind:
            return 400, {"__type": "ValidationException", "message": "Requested resource not found."}
        if action == "Stop":
            self.jobs[name].stopping.set()
            return 200, {}
        return 200, self.jobs[name].described()
