"""Calls of AWS by boto3: S3, SageMaker, CloudWatch Logs. What they raise becomes one line that says how to mend it."""

import contextlib
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tsumugu.errors import UserError
from tsumugu.launch.sagemaker.request import Job

RUN = "run.json"  # at the run's prefix: which run it is, and the jobs that it had
ENDED = ("Completed", "Failed", "Stopped")

_LOGS = {"train": "/aws/sagemaker/TrainingJobs", "prepare": "/aws/sagemaker/ProcessingJobs"}
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_REFUSED = ("InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_DENIED = ("AccessDenied", "AccessDeniedException", "403", "UnauthorizedOperation")
_LOGIN = "log in again: aws sso login, or aws configure"


class Service:
    """The account's services in one region.

    Args:
        region: Default: as of the AWS command line.

    Raises:
        UserError: boto3 is not installed, or no region is set.
    """

    def __init__(self, region: str | None):
        try:
            import boto3
            import botocore.exceptions
        except ImportError:
            raise UserError("boto3 is not installed", "pip install 'tsumugu[aws]'") from None
        try:
            self._session = boto3.Session(region_name=region)
        except botocore.exceptions.BotoCoreError as error:
            raise UserError(f"AWS: {error}", "look at AWS_PROFILE and ~/.aws/config") from None
        if not self._session.region_name:
            raise UserError("no AWS region is set", "give --region, such as ap-northeast-1, or set AWS_REGION")
        self.region: str = self._session.region_name
        self._clients: dict[str, Any] = {}

    def client(self, name: str) -> Any:
        if name not in self._clients:
            self._clients[name] = self._session.client(name)
        return self._clients[name]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What botocore raises as a UserError."""
    import botocore.exceptions as exceptions
    from boto3.exceptions import Boto3Error

    try:
        yield
    except exceptions.ClientError as error:
        raise _explain(error.response["Error"], error.operation_name) from None
    except Boto3Error as error:  # of transfers, which say the same in words
        raise UserError(f"AWS: {error}", "look at the bucket, and at the rights of your role") from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise UserError(f"AWS: {error}", _LOGIN) from None
    except exceptions.BotoCoreError as error:
        words = " ".join(str(error).split())
        signed_out = "token" in words.lower() or "credential" in words.lower()
        hint = _LOGIN if signed_out else "look at the network, the proxy, and the region"
        raise UserError(f"AWS: {words}", hint) from None


def _explain(error: dict[str, str], operation: str) -> UserError:
    code, words = error.get("Code", ""), " ".join(error.get("Message", "").split())
    if code in _EXPIRED:
        return UserError("the AWS credentials have expired", _LOGIN)
    if code in _REFUSED:
        return UserError("AWS does not know these credentials", _LOGIN)
    if code in _DENIED:
        return UserError(
            f"AWS denies {operation}: {words}", "ask for the rights that docs/sagemaker.md lists, for you or for --role"
        )
    if code in ("ResourceLimitExceeded", "LimitExceededException"):
        return UserError(
            f"the account's quota does not allow it: {words}",
            "have it raised in Service Quotas → Amazon SageMaker → INSTANCE TYPE for training job usage (or spot)",
        )
    if code in ("NoSuchBucket", "PermanentRedirect", "301", "404"):
        return UserError(
            f"bucket {error.get('BucketName', '')}: {words or code}",
            "name one of this region that exists: aws s3 mb s3://NAME makes one",
        )
    if code == "ResourceInUse":
        return UserError(f"there is a job of that name: {words}", "wait a second and start it again")
    if "role" in words.lower() and code == "ValidationException":
        return UserError(f"--role: {words}", "its trust policy must name sagemaker.amazonaws.com: docs/sagemaker.md")
    return UserError(f"AWS refuses {operation}: {words or code}", "docs/sagemaker.md says what it needs")


@dataclasses.dataclass(frozen=True)
class Claim:
    """run.json as a launch has left it.

    Attributes:
        earlier: Names of the jobs that the run had before.
        identity: What makes two recipes the same run.
        version: Of the file: what S3 calls its ETag.
    """

    earlier: list[str]
    identity: dict[str, Any]
    version: str


def claim(service: Service, job: Job, identity: dict[str, Any]) -> Claim:
    """Makes the run's prefix this run's, or finds that it is.

    Args:
        service: The account.
        job: Whose prefix it is.
        identity: What makes two recipes the same run: keys and values.

    Raises:
        UserError: It holds another run, or something else, or a job of this run still goes on, or is being launched.
    """
    with explained():
        client = service.client("s3")
        found = client.list_objects_v2(Bucket=job.bucket, Prefix=job.prefix, MaxKeys=1)
        known, version = _read_run(client, job)
        if known is None and found["KeyCount"]:
            raise UserError(
                f"--run-name {job.run_name}: {job.uri}/ holds something that no launch has left there", "choose another"
            )
        earlier = known["jobs"] if known else []
        if known:
            _compare(job, known["identity"], identity)
            if earlier and (described := _described(service, earlier[-1])) and described["status"] not in ENDED:
                raise UserError(
                    f"--run-name {job.run_name}: its job {earlier[-1]} is {described['status']}",
                    f"wait for it, or stop it: tsumugu launch sagemaker stop {earlier[-1]}",
                )
    return Claim(earlier, identity, _write_run(service, job, identity, earlier, version))


def record(service: Service, job: Job, claimed: Claim) -> None:
    """Notes the job in the run before it is created; between `claim` and this its code is uploaded.

    Raises:
        UserError: Another launch has claimed the run since.
    """
    _write_run(service, job, claimed.identity, [*claimed.earlier, job.name], claimed.version)


def _write_run(service: Service, job: Job, identity: dict[str, Any], jobs: list[str], version: str | None) -> str:
    """Replaces run.json where it still has that version (None: where there is none); returns the new one."""
    content = {"run_name": job.run_name, "identity": identity, "jobs": jobs}
    text = json.dumps(content, ensure_ascii=False, indent=1).encode()
    only = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    with explained():
        client = service.client("s3")
        try:
            made = client.put_object(Bucket=job.bucket, Key=job.prefix + RUN, Body=text, **only, **_encryption(job))
        except client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            raise UserError(
                f"--run-name {job.run_name}: somebody else launches it at this moment",
                "look at what comes of that, or choose another",
            ) from None
    return made["ETag"]


def _read_run(client: Any, job: Job) -> tuple[dict | None, str | None]:
    """run.json and its version."""
    try:
        found = client.get_object(Bucket=job.bucket, Key=job.prefix + RUN)
    except client.exceptions.NoSuchKey:
        return None, None
    return json.loads(found["Body"].read()), found["ETag"]


def _compare(job: Job, before: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"--run-name {job.run_name}: {job.uri}/ holds another run: its {key} was {before.get(key)}, "
                f"this one's is {now.get(key)}",
                "choose another --run-name, or go on with that run's recipe",
            )


def check_channels(service: Service, job: Job, used: list[str]) -> None:
    """Refuses channels, and paths in them that the recipe names, where S3 holds nothing.

    Args:
        service: The account.
        job: Whose channels they are.
        used: What the recipe says, such as channel:data/store.
    """
    paths = {f"channel:{name}": (uri, "") for name, uri in job.channels.items()}
    for text in used:
        name, slash, rest = text.removeprefix("channel:").partition("/")
        if slash and name in job.channels:
            paths[text] = (job.channels[name], re.sub(r"@\d+$", "", rest))  # RUN@STEP
    for text, (uri, path) in paths.items():
        if uri.startswith("s3://") and not _holds(service, f"{uri.rstrip('/')}/", path):
            place = f"{uri.rstrip('/')}/{path}" if path else uri
            raise UserError(f"{text}: {place} holds nothing", f"upload it: aws s3 sync FOLDER {place}")


def _holds(service: Service, folder: str, path: str) -> bool:
    """Whether a folder in S3 holds anything at a path: the name of a file, of a folder, or a glob."""
    certain = re.split(r"[*?\[]", path, maxsplit=1)[0]
    if certain != path:
        return _first(service, folder + certain) is not None
    path = path.rstrip("/")
    is_file = bool(path) and _first(service, folder + path) == folder + path
    return is_file or _first(service, f"{folder}{path}/" if path else folder) is not None


def _first(service: Service, uri: str) -> str | None:
    """The first URI, in their order, that begins so; one that begins with another comes after it."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    with explained():
        found = service.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
    return next((f"s3://{bucket}/{item['Key']}" for item in found.get("Contents", [])), None)


def upload(service: Service, job: Job, folder: Path) -> int:
    """Uploads a folder to the code prefix of the job; returns how many bytes it has."""
    size = 0
    with explained():
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            key = job.code_prefix + file.relative_to(folder).as_posix()
            service.client("s3").upload_file(str(file), job.bucket, key, ExtraArgs=_encryption(job))
            size += file.stat().st_size
    return size


def _encryption(job: Job) -> dict[str, str]:
    key = job.site.output_kms_key
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}


def create(service: Service, job: Job, request: dict[str, Any]) -> None:
    """Starts the job."""
    with explained():
        client = service.client("sagemaker")
        (client.create_training_job if job.stage == "train" else client.create_processing_job)(**request)


def describe(service: Service, name: str) -> dict[str, Any]:
    """What SageMaker says about a training or processing job.

    Returns:
        `stage` and `status`, and its answer as `all`.

    Raises:
        UserError: There is none of that name.
    """
    with explained():
        if found := _described(service, name):
            return found
    raise UserError(f"there is no job {name} in {service.region}", "look at the name and the region")


def _described(service: Service, name: str) -> dict[str, Any] | None:
    from botocore.exceptions import ClientError

    client = service.client("sagemaker")
    asked = (
        ("train", lambda: client.describe_training_job(TrainingJobName=name), "TrainingJobStatus"),
        ("prepare", lambda: client.describe_processing_job(ProcessingJobName=name), "ProcessingJobStatus"),
    )
    for stage, ask, key in asked:
        try:
            found = ask()
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("ValidationException", "ResourceNotFound"):
                raise
            continue
        return {"stage": stage, "status": found[key], "all": found}
    return None


def stop(service: Service, name: str, stage: str) -> None:
    """Asks the containers of a job to stop."""
    client = service.client("sagemaker")
    with explained():
        if stage == "train":
            client.stop_training_job(TrainingJobName=name)
        else:
            client.stop_processing_job(ProcessingJobName=name)


def follow(service: Service, name: str, show: Callable[[str], None], pause: float) -> dict[str, Any]:
    """Shows a job's log lines, and how it stands, until it has ended.

    Args:
        service: The account.
        name: Of the job.
        show: Gets line after line.
        pause: Seconds between two looks.

    Returns:
        As `describe`.
    """
    read: dict[str, str | None] = {}
    stood = ""
    while True:
        found = describe(service, name)
        stands = found["all"].get("SecondaryStatus", found["status"])
        if stands != stood:
            stood = stands
            show(f"[{stands}]")
        ended = found["status"] in ENDED
        if ended:
            time.sleep(pause)  # the last lines come late
        with explained():
            _show_lines(service, found, name, read, show)
        if ended:
            return found
        time.sleep(pause)


def _show_lines(
    service: Service, found: dict[str, Any], name: str, read: dict[str, str | None], show: Callable[[str], None]
) -> None:
    """Of every host what is new; `read` has the place in its stream."""
    client, group = service.client("logs"), _LOGS[found["stage"]]
    several = found["all"].get("ResourceConfig", {}).get("InstanceCount", 1) > 1
    try:
        pages = client.get_paginator("describe_log_streams").paginate(
            logGroupName=group, logStreamNamePrefix=f"{name}/"
        )
        names = sorted(stream["logStreamName"] for page in pages for stream in page["logStreams"])
    except client.exceptions.ResourceNotFoundException:
        return
    for stream in names:
        host = f"{stream.removeprefix(f'{name}/').rpartition('-')[0]}| " if several else ""
        while True:
            token = {"nextToken": read[stream]} if read.get(stream) else {}
            events = client.get_log_events(logGroupName=group, logStreamName=stream, startFromHead=True, **token)
            for event in events["events"]:
                show(host + event["message"])
            if not events["events"] or events["nextForwardToken"] == read.get(stream):
                break
            read[stream] = events["nextForwardToken"]


def _safe(name: str) -> str:
    """The name of an object below a prefix, which as a path must lie below a folder."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UserError(f"the object {name!r} would be written outside of the folder", "somebody else has put it there")
    return name


def download(service: Service, uri: str, output: Path) -> int:
    """Everything below an S3 URI as a folder, which appears when it is whole.

    Returns:
        How many files.

    Raises:
        UserError: There is nothing, or the folder is there already, or a name leads out of it.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is there already", "name another folder: --output DIR")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = f"{prefix.rstrip('/')}/"
    with explained():
        client = service.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]
    if not keys:
        raise UserError(f"{uri} holds nothing", "look at how the job stands: tsumugu launch sagemaker status JOB")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / "folder"
        for key in keys:
            file = folder / _safe(key.removeprefix(prefix))
            file.parent.mkdir(parents=True, exist_ok=True)
            with explained():
                client.download_file(bucket, key, str(file))
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return len(keys)
