"""`tsumugu launch sagemaker` without AWS: a real S3 client and real containers' processes around stand-ins.

One job of two hosts is stopped by a user, goes on as another job, loses its hosts in the middle, and ends with what an
uninterrupted run on one machine makes, bit for bit.
"""

import contextlib
import functools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import botocore.loaders
import pytest
import yaml
from botocore.exceptions import ClientError
from safetensors.torch import load_file
from support.aws import CREDENTIALS, REGION, Bucket, SageMaker, client, make_image, moto, wheel_of
from support.containers import no_network, write_data
from support.ranks import run_ranks
from support.runs import figures

from tsumugu import config
from tsumugu.cli import main
from tsumugu.errors import UserError
from tsumugu.export import export
from tsumugu.launch.sagemaker import command
from tsumugu.launch.sagemaker import service as service_module
from tsumugu.training.checkpoint import complete_steps
from tsumugu.training.trainer import train

ROLE = "arn:aws:iam::123456789012:role/tsumugu"
STEPS = 180
IMAGE = f"123456789012.dkr.ecr.{REGION}.amazonaws.com/tsumugu:1"


@pytest.fixture(scope="module", autouse=True)
def models_read_once():
    """Every session of boto3 reads its services' models for itself otherwise: a second each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.loaders, "create_loader", functools.cache(botocore.loaders.create_loader))
        yield


@pytest.fixture(scope="module")
def s3():
    """moto's URL, with a bucket."""
    with moto() as url:
        client("s3", url).create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
        yield url


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tokenizer_folder, s3) -> Path:
    """A recipe of STEPS steps, whose channel `data` lies in the bucket too."""
    path = write_data(tmp_path_factory.mktemp("recipe") / "made", tokenizer_folder)
    content = yaml.safe_load(path.read_text())
    content["train"]["max_steps"], content["checkpoint"] = STEPS, {"every": 10, "keep": 4}
    content["evaluate"] = {"every": 50}
    path.write_text(yaml.safe_dump(content))
    Bucket(s3).put(path.parent / "data", "s3://bucket/data")
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """What the image lacks."""
    folder = tmp_path_factory.mktemp("wheels")
    wheel_of("jsonargparse", folder)
    return folder


@pytest.fixture(scope="module")
def network() -> Iterator[list[str]]:
    """In which jobs run: their hosts reach one another and nothing else, where the kernel allows that."""
    with no_network() as entering:
        yield entering


@pytest.fixture
def aws(s3, monkeypatch, tmp_path):
    """The environment of a user, whose SageMaker is yet to be named."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "TSUMUGU_CHANNELS"):
        monkeypatch.delenv(name, raising=False)
    nowhere = {"AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    urls = {"AWS_ENDPOINT_URL": s3, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in (CREDENTIALS | nowhere | urls).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "_PAUSE_SECONDS", 0.5)
    return s3


def flags(recipe: Path, **changes: str) -> list[str]:
    """Of a launch on two hosts."""
    given = {"config": str(recipe), "role": ROLE, "image": IMAGE, "bucket": "bucket", "max-hours": "1"}
    given |= {"instance-type": "ml.g5.xlarge", "instance-count": "2", "channel": "data=s3://bucket/data"}
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["launch", "sagemaker", *(f"--{name}={value}" for name, value in given.items())]


def wait_for(happens, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def saved(bucket: Bucket, run: str) -> list[int]:
    """Steps of which S3 has whole checkpoints."""
    uri = f"s3://bucket/tsumugu/{run}/checkpoints"
    names = bucket.keys(uri)
    marked = [name.removesuffix("COMPLETE") for name in names if name.endswith("/COMPLETE")]
    whole = []
    for at in marked:
        with contextlib.suppress(ClientError):  # deleted since
            files = json.loads(bucket.read(f"{uri}/{at}COMPLETE"))
            whole += [at] * all(at + file in names for file in files)
    return sorted(int(at.split("/")[1].removeprefix("step-")) for at in whole)


def test_jobs_run_without_a_network(s3, network):
    """So that the tests of whole jobs prove that they need none."""
    if not network:
        pytest.skip("the kernel allows no network namespace here, or util-linux and iproute2 are not installed")
    connect = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"
    host, port = s3.removeprefix("http://").split(":")
    assert subprocess.run([sys.executable, "-c", connect, host, port], check=False).returncode == 0
    for place, says in (([host, port], "Connection refused"), (["192.0.2.1", "443"], "Network is unreachable")):
        command = [*network, sys.executable, "-c", connect, *place]
        assert says in subprocess.run(command, check=False, capture_output=True, text=True).stderr


def test_stopped_and_interrupted_it_ends_as_an_undisturbed_run(
    recipe, image, wheels, aws, network, tmp_path, monkeypatch, capsys
):
    bucket, launch = Bucket(aws), flags(recipe, run_name="night", wheels=str(wheels), price_per_hour="2.5")
    with SageMaker(tmp_path / "hosts", aws, image, network) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", service.url)
        assert main([*launch, "--detach"]) == 0
        [first] = service.jobs.values()
        wait_for(lambda: saved(bucket, "night") or first.status != "InProgress")
        assert main(["launch", "sagemaker", "stop", first.name]) == 0
        assert main(["launch", "sagemaker", "logs", first.name]) == 3
        said = capsys.readouterr().out
        assert "2 × ml.g5.xlarge for at most 1 h: at most 5.00 USD" in said
        assert f"{first.name}: begins s3://bucket/tsumugu/night/" in said
        assert "127.0.0.1| " in said, said
        assert "interrupted, checkpoint saved at step" in said
        stopped_at = saved(bucket, "night")[-1]
        assert stopped_at < STEPS - 20
        assert not bucket.keys(first.model)

        time.sleep(1.1)  # jobs are named by the second
        launching = threading.Thread(target=lambda: codes.append(main([*launch, "--spot"])))
        codes: list[int] = []
        launching.start()
        wait_for(lambda: len(service.jobs) == 2)
        second = list(service.jobs.values())[1]
        second.interrupt_at = stopped_at + 10
        launching.join(timeout=300)
        assert codes == [0]
        assert (second.status, second.attempts) == ("Completed", 2)
        assert f"{second.name}: goes on with s3://bucket/tsumugu/night/" in capsys.readouterr().out

        assert main(["launch", "sagemaker", "status", second.name]) == 0
        said = capsys.readouterr().out
        last = figures_of(bucket, "night", tmp_path / "downloaded")[-2]
        assert f"  loss {last['loss']:.6g}\n" in said
        assert f"  model {second.model}\n" in said
        for name, target in (("--output", "model"), ("--run-dir", "run")):
            assert main(["launch", "sagemaker", "download", second.name, name, str(tmp_path / target)]) == 0
    run_ranks(undisturbed, 2, recipe, tmp_path / "local")
    assert figures(tmp_path / "run") == figures(tmp_path / "local")
    assert complete_steps(tmp_path / "run")[-1] == STEPS
    export(str(tmp_path / "local"), tmp_path / "exported")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "exported"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert json.loads((tmp_path / "model" / "certificate.json").read_text())["verified"]


def undisturbed(recipe: Path, run_dir: Path) -> None:
    train(config.load(config.TrainingRun, [str(recipe)], channels={"data": str(recipe.parent / "data")}), run_dir)


def figures_of(bucket: Bucket, run: str, folder: Path) -> list[dict]:
    bucket.fetch(f"s3://bucket/tsumugu/{run}/checkpoints", folder)
    return figures(folder)


@pytest.fixture
def service(aws, monkeypatch, tmp_path):
    """A SageMaker that takes jobs and does not start them."""
    with SageMaker(tmp_path / "hosts", aws, None) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", service.url)
        yield service


@pytest.fixture
def line(capsys):
    """The one line by which a command is refused."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        output = capsys.readouterr()
        [said] = [line for line in output.err.splitlines() if line.startswith("tsumugu: ")]
        assert "Traceback" not in output.err
        assert "testing" not in output.err
        return said

    return run


@pytest.fixture
def short(tmp_path) -> Path:
    """A recipe that needs nothing but the channel."""
    content = {"model": {"preset": "tiny"}, "data": {"store": "channel:data/store"}, "train": {"max_steps": 9}}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "short.yaml"


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (
            ("ResourceLimitExceeded", "The account-level service limit 'ml.g5.xlarge for training job usage' is 0"),
            ["quota", "ml.g5.xlarge for training job usage", "Service Quotas"],
        ),
        (("ValidationException", "Could not assume role arn:x. Please ensure"), ["--role: Could not assume role"]),
        (("AccessDeniedException", "not authorized: sagemaker:CreateTrainingJob"), ["AWS denies", "docs/sagemaker.md"]),
        (("ExpiredTokenException", "The security token is expired"), ["credentials have expired", "aws sso login"]),
        (("UnrecognizedClientException", "The security token is invalid"), ["does not know these credentials"]),
        (("ValidationException", "No S3 objects found under x"), ["AWS refuses CreateTrainingJob: No S3 objects"]),
    ],
)
def test_what_the_service_refuses_is_one_line(refusal, words, service, recipe, short, line):
    service.refusal = refusal
    said = line([*flags(short, wheels="none"), "--detach"])
    assert all(word in said for word in words), said
    assert not service.jobs


def test_what_is_missing_in_s3_is_one_line_before_anything_is_started(service, recipe, short, line):
    assert "channel:data: s3://bucket/dta holds nothing" in line(flags(short, channel="data=s3://bucket/dta"))
    said = line([*flags(short), "--data.store=channel:data/nothing"])
    assert "channel:data/nothing: s3://bucket/data/nothing holds nothing" in said
    said = line([*flags(short), "--data.store=channel:data/stor"])  # what begins likewise is something else
    assert "channel:data/stor: s3://bucket/data/stor holds nothing" in said
    assert "channel:data: s3://bucket/dat holds nothing" in line(flags(short, channel="data=s3://bucket/dat"))
    for changes in ({"channel": "data=s3://nobodys-bucket/data"}, {"bucket": "nobodys-bucket"}):
        assert "bucket nobodys-bucket: " in line(flags(short, wheels="none", **changes))
    assert not service.jobs


def test_what_a_recipe_may_name_in_a_channel(recipe, aws):
    """A file, a folder, a glob, a step of a run, the channel itself."""
    there = service_module.Service(REGION)
    names = ("manifest.json", "", "/", "*/00000.bin", "train", "train/", "train/0[0-9]*.bin")
    assert all(service_module._holds(there, "s3://bucket/data/store/", name) for name in names)
    assert not any(service_module._holds(there, "s3://bucket/data/store/", name) for name in ("trai", "x*", "train/1"))
    bucket = Bucket(aws)
    bucket.put_file(recipe, "s3://bucket/runs/base/config.yaml")
    job = SimpleNamespace(channels={"runs": "s3://bucket/runs", "lustre": "fsx://fs-01/m/x"})
    service_module.check_channels(there, job, ["channel:runs/base@8000", "channel:lustre/y"])
    with pytest.raises(UserError, match=r"channel:runs/bas@8000: s3://bucket/runs/bas holds nothing"):
        service_module.check_channels(there, job, ["channel:runs/bas@8000"])


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside"])
def test_no_object_is_downloaded_to_outside_of_the_folder(name, aws, tmp_path):
    key = f"crafted-{name.count('/')}-{name[0] == '/'}/{name}"
    client("s3", aws).put_object(Bucket="bucket", Key=key, Body=b"x")
    with pytest.raises(UserError, match="outside of the folder"):
        service_module.download(
            service_module.Service(REGION), f"s3://bucket/{key.split('/')[0]}", tmp_path / "a" / "b"
        )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_of_two_launches_at_a_time_one_is_refused(service, recipe, short, line, monkeypatch):
    """The other one claims the run while this one uploads its code: for a new run, and for one that goes on."""
    launch = [*flags(short, run_name="both", wheels="none"), "--detach"]
    upload = service_module.upload

    def meanwhile(*arguments):
        monkeypatch.setattr(service_module, "upload", upload)
        assert main(launch) == 0
        return upload(*arguments)

    for jobs in (1, 2):
        time.sleep(1.1)  # jobs are named by the second
        monkeypatch.setattr(service_module, "upload", meanwhile)
        assert "--run-name both: somebody else launches it" in line(launch)
        assert len(service.jobs) == jobs
        for job in service.jobs.values():
            job.status = "Failed"


def test_without_credentials_region_or_network(service, recipe, short, line, monkeypatch):
    launch = flags(short, wheels="none")
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert "look at the network" in line(["launch", "sagemaker", "status", "job"])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "aws sso login" in line(launch)
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert "no AWS region is set" in line(launch)
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert "pip install 'tsumugu[aws]'" in line(launch)
    monkeypatch.setitem(sys.modules, "botocore.validate", None)
    assert "pip install 'tsumugu[aws]'" in line([*launch, "--dry-run"])


def test_a_prefix_that_holds_another_run_is_refused(service, recipe, short, line, aws):
    launch = [*flags(short, run_name="mine", wheels="none"), "--detach"]
    assert main(launch) == 0
    [job] = service.jobs.values()
    assert f"its job {job.name} is InProgress" in line(launch)
    job.status = "Failed"
    said = line([*launch, "--train.seed=7"])
    assert "s3://bucket/tsumugu/mine/ holds another run: its train.seed was 1234, this one's is 7" in said
    client("s3", aws).put_object(Bucket="bucket", Key="tsumugu/theirs/checkpoints/x", Body=b"")
    assert "theirs/ holds something" in line([*flags(short, run_name="theirs", wheels="none"), "--detach"])
    assert len(service.jobs) == 1


def test_nothing_secret_is_uploaded_or_asked(service, recipe, short, aws):
    assert main([*flags(short, run_name="open", wheels="none"), "--detach"]) == 0
    [job] = service.jobs.values()
    bucket = Bucket(aws)
    uploaded = {
        name: bucket.read(f"s3://bucket/{key}") for name, key in bucket.keys("s3://bucket/tsumugu/open").items()
    }
    code = f"code/{job.name}"
    wheel = f"{code}/wheels/tsumugu-0.1.0-py3-none-any.whl"
    names = (f"{code}/recipe.yaml", f"{code}/requirements.txt", f"{code}/start.sh", wheel, "run.json")
    assert uploaded.keys() == set(names)
    assert "max_hours: 0.9" in uploaded[f"{code}/recipe.yaml"].decode()
    for content in [json.dumps(job.request).encode(), *uploaded.values()]:
        assert b"testing" not in content


def test_how_a_job_stands(service, recipe, short, line, capsys):
    for action in ("status", "logs", "stop", "download"):
        assert "there is no job nobodys" in line(["launch", "sagemaker", action, "nobodys"])
    assert main([*flags(short, run_name="standing", wheels="none"), "--detach"]) == 0
    [job] = service.jobs.values()
    assert main(["launch", "sagemaker", "status", job.name]) == 0
    capsys.readouterr()
    assert main(["launch", "sagemaker", "stop", job.name, "--dry-run"]) == 0
    assert "would be asked to stop; it has two minutes to save" in capsys.readouterr().out
    assert not job.stopping.is_set()
    assert main(["launch", "sagemaker", "stop", job.name]) == 0
    assert job.stopping.is_set()
    assert "made nothing to download" in line(["launch", "sagemaker", "download", job.name])
    job.status, job.reason = "Failed", "AlgorithmError: no space left"
    capsys.readouterr()
    assert main(["launch", "sagemaker", "status", job.name, "--price-per-hour=2"]) == 1
    said = capsys.readouterr().out
    assert "AlgorithmError: no space left" in said
    assert "2 ml.g5.xlarge, 0.0" in said
    job.reason = "AlgorithmError: interrupted before its end, the checkpoint of step 7 is saved, exit code: 3"
    assert main(["launch", "sagemaker", "status", job.name]) == 3
    assert "there is nothing to stop" in line(["launch", "sagemaker", "stop", job.name])
    assert "is no command" in line(["launch", "sagemaker", "restart", job.name])


def test_when_the_log_can_no_longer_be_read_it_says_that_the_job_goes_on(service, recipe, short, line, monkeypatch):
    assert main([*flags(short, run_name="long", wheels="none"), "--detach"]) == 0
    [job] = service.jobs.values()

    def expire(*_):
        raise UserError("the AWS credentials have expired", "log in again")

    monkeypatch.setattr(service_module, "_show_lines", expire)
    said = line(["launch", "sagemaker", "logs", job.name])
    assert said.endswith(f"(log in again; the job goes on: tsumugu launch sagemaker logs {job.name})")


def test_an_image_that_lacks_more_says_so(recipe, image, aws, network, tmp_path, monkeypatch):
    with SageMaker(tmp_path / "hosts", aws, image, network) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", service.url)
        assert main(flags(recipe, run_name="lacking", wheels="none", instance_count="1")) == 1
        [job] = service.jobs.values()
    assert "the image lacks what training needs" in job.reason
    assert "jsonargparse" in job.reason


def test_a_processing_job_makes_the_store_that_prepare_makes_here(
    recipe, image, wheels, aws, network, tmp_path, monkeypatch, capsys
):
    local = recipe.parent / "data" / "store"
    bucket = Bucket(aws)
    bucket.put_file(recipe.parent / "text.jsonl", "s3://bucket/text/text.jsonl")
    bucket.put(local / "tokenizer", "s3://bucket/tokenizer")
    source = {"name": "text", "path": "channel:text/text.jsonl"}
    prepare = {"sources": [source], "tokenizer": "channel:tokenizer", "output": "x", "validation_share": 0.2}
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump({"prepare": prepare}))
    changes = {"run_name": "store", "wheels": str(wheels), "instance_count": "1", "stage": "prepare"}
    launch = flags(tmp_path / "prepare.yaml", channel="text=s3://bucket/text", **changes)
    launch += ["--channel=tokenizer=s3://bucket/tokenizer", "--prepare.workers=1"]
    with SageMaker(tmp_path / "hosts", aws, image, network) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", service.url)
        assert main(launch) == 0
        [name] = service.jobs
        assert re.search(r"train \d+ documents", capsys.readouterr().out)
        assert main(["launch", "sagemaker", "download", name, "--output", str(tmp_path / "store")]) == 0
    made = tmp_path / "store"
    files = sorted(path.relative_to(local) for path in local.rglob("*.bin"))
    assert files == sorted(path.relative_to(made) for path in made.rglob("*.bin"))
    assert all((made / file).read_bytes() == (local / file).read_bytes() for file in files)
