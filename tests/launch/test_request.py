"""`launch sagemaker --dry-run`: the request, checked against botocore's own model, and what is refused before it."""

import dataclasses
import importlib.util
import inspect
import json
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from botocore.session import get_session
from support.runs import run_config

from tsumugu.cli import main
from tsumugu.config import LoraConfig, Preparation, PrepareConfig, SlurmConfig, Source
from tsumugu.errors import UserError
from tsumugu.launch.sagemaker import check, package, request, service
from tsumugu.launch.sagemaker.site import SageMakerConfig, load_site
from tsumugu.training.metrics import metric_definitions

DOCUMENTS = Path(__file__).parents[2] / "docs" / "sagemaker"
ROLE = "arn:aws:iam::123456789012:role/service-role/tsumugu"
IMAGE = "763104351884.dkr.ecr.ap-northeast-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker"
RECIPE = {
    "model": {"pretrained": "rinna/japanese-gpt-neox-3.6b"},
    "tokenizer": {"path": "channel:data/tokenizer"},
    "data": {"store": "channel:data/store"},
    "train": {"max_steps": 1000},
    "checkpoint": {"every": 100},
}
SITE = {
    "region": "ap-northeast-1",
    "role": ROLE,
    "image": IMAGE,
    "bucket": "our-bucket",
    "prefix": "models/",
    "subnets": ["subnet-0a1b2c3d"],
    "security_groups": ["sg-0a1b2c3d"],
    "volume_kms_key": "alias/volumes",
    "output_kms_key": "alias/models",
    "encrypt_traffic": True,
    "network_isolation": True,
    "tags": {"team": "言語"},
    "environment": {"HTTPS_PROXY": "http://proxy.example.com:3128"},
    "mlflow": "arn:aws:sagemaker:ap-northeast-1:123456789012:mlflow-tracking-server/ours",
    "training_plan": "arn:aws:sagemaker:ap-northeast-1:123456789012:training-plan/march",
    "prices": {"ml.p4d.24xlarge": 32.5},
}


@pytest.fixture
def dry_run(tmp_path, capsys, monkeypatch):
    """The request that flags make, or the line by which they are refused."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "TSUMUGU_CHANNELS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "rinna_3.6b.yaml").write_text(yaml.safe_dump(RECIPE))
    defaults = {"role": ROLE, "image": IMAGE, "bucket": "our-bucket", "instance-type": "ml.p4d.24xlarge"}
    defaults |= {"max-hours": "12", "channel": "data=s3://our-bucket/data", "config": str(tmp_path / "rinna_3.6b.yaml")}

    def run(*flags: str, site: dict | None = None, **changes: str | None):
        given = defaults | {name if "." in name else name.replace("_", "-"): value for name, value in changes.items()}
        arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
        if site is not None:
            (tmp_path / "site.yaml").write_text(yaml.safe_dump({"sagemaker": site}, allow_unicode=True))
            arguments.append(f"--site={tmp_path / 'site.yaml'}")
        capsys.readouterr()
        code = main(["launch", "sagemaker", *arguments, *flags, "--dry-run"])
        output = capsys.readouterr()
        if code == 0:
            return json.loads(output.out)
        assert code == 2
        assert output.out == ""
        [line] = output.err.splitlines()
        return line

    return run


def test_the_request_has_what_the_flags_say(dry_run):
    made = dry_run(run_name="rinna", instance_count="2", keep_alive_minutes="30")
    assert re.fullmatch(r"rinna-\d{6}-\d{6}", made["TrainingJobName"])
    algorithm = made["AlgorithmSpecification"]
    assert (made["RoleArn"], algorithm["TrainingImage"]) == (ROLE, IMAGE)
    assert algorithm["ContainerEntrypoint"] == ["bash", "/opt/ml/input/data/code/start.sh"]
    assert made["HyperParameters"] == {"recipe": "recipe.yaml", "run_name": "rinna"}
    channels = {item["ChannelName"]: item["DataSource"]["S3DataSource"]["S3Uri"] for item in made["InputDataConfig"]}
    assert channels["data"] == "s3://our-bucket/data/"
    assert channels["code"] == f"s3://our-bucket/tsumugu/rinna/code/{made['TrainingJobName']}/"
    assert made["CheckpointConfig"]["S3Uri"] == "s3://our-bucket/tsumugu/rinna/checkpoints"
    assert made["OutputDataConfig"]["CompressionType"] == "NONE"
    resources = made["ResourceConfig"]
    assert (resources["InstanceCount"], resources["KeepAlivePeriodInSeconds"]) == (2, 1800)
    assert made["StoppingCondition"] == {"MaxRuntimeInSeconds": 12 * 3600}
    assert made["EnableManagedSpotTraining"] is False


def test_channels_may_be_read_while_training_goes_on_but_the_code_is_there_before(dry_run):
    made = dry_run(input_mode="FastFile")
    assert made["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    assert {item["ChannelName"]: item.get("InputMode") for item in made["InputDataConfig"]} == {
        "code": "File",
        "data": None,
    }


def test_every_field_is_one_that_the_service_knows(dry_run):
    given, channel = SITE | {"network_isolation": False}, "data=fsx://fs-0123456789abcdef0/mount/corpora"
    changes = {"instance_type": "ml.p3.16xlarge", "bucket": None, "role": None, "image": None}
    made = dry_run("--spot", site=given, channel=channel, **changes)
    members = get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape.members
    assert made.keys() <= members.keys()
    [_, data] = made["InputDataConfig"]
    assert data["DataSource"]["FileSystemDataSource"] == {
        "FileSystemId": "fs-0123456789abcdef0",
        "FileSystemType": "FSxLustre",
        "FileSystemAccessMode": "ro",
        "DirectoryPath": "/mount/corpora",
    }
    assert made["VpcConfig"] == {"Subnets": SITE["subnets"], "SecurityGroupIds": SITE["security_groups"]}
    assert made["ResourceConfig"]["VolumeKmsKeyId"] == "alias/volumes"
    assert made["ResourceConfig"]["TrainingPlanArn"] == SITE["training_plan"]
    assert made["OutputDataConfig"]["KmsKeyId"] == "alias/models"
    assert made["OutputDataConfig"]["S3OutputPath"].startswith("s3://our-bucket/models/")
    assert {"Key": "team", "Value": "言語"} in made["Tags"]
    assert made["Environment"] == SITE["environment"] | {"MLFLOW_TRACKING_URI": SITE["mlflow"]}
    assert made["EnableInterContainerTrafficEncryption"] is True
    assert made["StoppingCondition"] == {"MaxRuntimeInSeconds": 12 * 3600, "MaxWaitTimeInSeconds": 24 * 3600}


@pytest.mark.parametrize(
    ("instance_type", "takes_a_key"),
    [
        *((f"ml.{name}", True) for name in ("p3.16xlarge", "c5.xlarge", "m5.24xlarge", "r6i.large")),
        *((f"ml.{name}", False) for name in ("p3dn.24xlarge", "p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge")),
        *(
            (f"ml.{name}", False)
            for name in ("p6-b200.48xlarge", "g4dn.xlarge", "g5.xlarge", "g6e.xlarge", "r5d.large")
        ),
    ],
)
def test_hosts_with_disks_of_their_own_are_asked_for_without_a_key(instance_type, takes_a_key, dry_run):
    """Amazon: "You can't request a VolumeKmsKeyId when using an instance type with local storage"."""
    made = dry_run(site={"volume_kms_key": "alias/volumes"}, instance_type=instance_type)
    assert ("VolumeKmsKeyId" in made["ResourceConfig"]) == takes_a_key


def test_the_prefix_of_a_site_may_be_empty(dry_run):
    made = dry_run(run_name="rinna", site={"prefix": ""})
    assert made["CheckpointConfig"]["S3Uri"] == "s3://our-bucket/rinna/checkpoints"


def test_preparation_is_a_processing_job(dry_run, tmp_path):
    sources = [{"name": "a", "path": "channel:text/a"}, {"name": "b", "path": "s3://other/b/*.jsonl"}]
    prepare = {"sources": sources, "tokenizer": "channel:tok", "output": "stores/mine"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"prepare": prepare}))
    flags = ["--channel=tok=s3://our-bucket/tok", "--stage=prepare", "--prepare.workers", "90"]
    site = SITE | {"training_plan": None}
    changes = {"config": str(tmp_path / "p.yaml"), "channel": "text=s3://our-bucket/text"}
    changes["instance_type"] = "ml.m5.24xlarge"
    made = dry_run(*flags, site=site, **changes)
    members = get_session().get_service_model("sagemaker").operation_model("CreateProcessingJob").input_shape.members
    assert made.keys() <= members.keys()
    places = {item["InputName"]: item["S3Input"]["LocalPath"] for item in made["ProcessingInputs"]}
    assert places == {name: f"/opt/ml/processing/input/{name}" for name in ("code", "text", "tok")}
    entrypoint = made["AppSpecification"]["ContainerEntrypoint"]
    assert entrypoint == ["bash", "/opt/ml/processing/input/code/start.sh", "prepare"]
    assert made["NetworkConfig"]["EnableNetworkIsolation"] is True
    assert "one instance" in dry_run(*flags, instance_count="2", **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"role": "arn:aws:iam::1234:role/x"}, ["--role", "arn:aws:iam::1234:role/x", r"\d{12}"]),
        ({"role": None, "max_hours": None}, ["--role, --max-hours missing"]),
        ({"bucket": "Our_Bucket"}, ["--bucket Our_Bucket", "name of a bucket"]),
        ({"bucket": "s3://our-bucket"}, ["--bucket s3://our-bucket", "without s3://"]),
        ({"image": "pytorch:2.13"}, ["--image pytorch:2.13", "dkr.ecr"]),
        ({"region": "us-west-2"}, ["--image", "ap-northeast-1", "us-west-2"]),
        ({"instance_type": "ml.p4.24xlarge"}, ["--instance-type", "no ml.p4.24xlarge", "did you mean ml.p4d.24xlarge"]),
        ({"instance_count": "0"}, ["--instance-count", "0 is no whole number above 0"]),
        ({"max_hours": "673"}, ["--max-hours 673", "SageMaker takes 672"]),
        ({"max_hours": "nan"}, ["--max-hours", "nan is no number above 0"]),
        ({"run_name": "my_run"}, ["--run-name my_run", "letters, digits and -"]),
        ({"run_name": "a" * 48}, ["--run-name", "at most 47"]),
        ({"channel": "dta=s3://our-bucket/data"}, ["tokenizer.path is channel:data/tokenizer", "--channel data="]),
        ({"channel": "data=/fsx/data"}, ["--channel data=/fsx/data", "neither s3:// nor fsx://"]),
        ({"channel": "data=fsx://fs-01/m/x"}, ["FSx", "subnets and security_groups"]),
        ({"keep_alive_minutes": "361"}, ["--keep-alive-minutes", "21600 at most"]),
        ({"max_wait_hours": "30"}, ["--max-wait-hours 30", "--spot"]),
        ({"data.store": "stores/mine"}, ["data.store is stores/mine", "aws s3 sync", "channel:mine"]),
        ({"train.global_batch_size": "12"}, ["train.global_batch_size 12", "use a multiple of 8"]),
        ({"parallel.shard_degree": "16"}, ["parallel.shard_degree 16", "is not the world size 8"]),
        ({"train.max_stps": "3"}, ["unknown flag --train.max_stps", "max_steps"]),
    ],
)
def test_what_is_wrong_is_one_line(changes, words, dry_run):
    line = dry_run(**changes)
    assert isinstance(line, str), line
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({"subnets": ["subnet-1"]}, ["security_groups is empty"]),
        ({"environment": {"HF_TOKEN": "x"}}, ["environment.HF_TOKEN", "credential"]),
        ({"environment": {"HTTPS_PROXY": "http://me:word@proxy:3128"}}, ["environment.HTTPS_PROXY", "credential"]),
        ({"tags": {"owner": "hf_abcdefghijklmnopqrstuvwxyz"}}, ["sagemaker.tags.owner", "credential"]),
        ({"subnet": ["x"]}, ["unknown key sagemaker.subnet", "subnets"]),
        ({"subnets": ["no/slash"], "security_groups": ["sg-1"]}, ["sagemaker.subnets", "no/slash"]),
        ({"training_plan": "march"}, ["sagemaker.training_plan", "'march'", "training-plan/"]),
        ({"tags": {f"t{number}": "x" for number in range(50)}}, ["sagemaker.tags", "50 at most"]),
        ({"network_isolation": True}, ["rinna/japanese-gpt-neox-3.6b", "--channel model=s3://"]),
    ],
)
def test_so_is_what_is_wrong_with_the_site_file(site, words, dry_run):
    line = dry_run(site=site)
    assert isinstance(line, str), line
    assert all(word in line for word in words), line
    assert "word@" not in line


def test_the_model_channel_takes_the_place_of_a_name_on_the_hub(dry_run):
    assert dry_run()["Environment"] == {}
    made = dry_run("--channel=model=s3://our-bucket/rinna", site={"network_isolation": True})
    assert made["Environment"] == {"HF_HUB_OFFLINE": "1"}
    recipe = run_config("channel:data/store", {"train.max_steps": 3, "model.pretrained": "rinna/x"})
    adapted = request.adapt(recipe, {"model": "s3://b/m", "data": "s3://b/d"}, 1)
    assert adapted.model.pretrained == "channel:model"
    assert request.adapt(recipe, {"data": "s3://b/d"}, 1).model.pretrained == "rinna/x"


@pytest.mark.parametrize(("hours", "given", "then"), [(12, None, 11.75), (1, None, 0.9), (12, 3, 3)])
def test_training_ends_itself_before_sagemaker_ends_it(hours, given, then):
    recipe = run_config("channel:d", {"train.max_steps": 3, "model.preset": "tiny", "train.max_hours": given})
    assert request.adapt(recipe, {"d": "s3://b/d"}, hours).train.max_hours == then


def test_a_checkpoint_more_stays_than_here():
    """SageMaker deletes in S3 what is deleted in the container, where the next one may not be uploaded yet."""
    for given, then in ((2, 3), (5, 5)):
        recipe = run_config("channel:d", {"train.max_steps": 3, "model.preset": "tiny", "checkpoint.keep": given})
        assert request.adapt(recipe, {"d": "s3://b/d"}, 1).checkpoint.keep == then


def test_spot_without_checkpoints_is_refused(dry_run):
    assert "checkpoint.every" in dry_run("--spot", "--checkpoint.every=null")


def test_a_recipe_with_a_credential_is_refused():
    changes = {"train.max_steps": 3, "model.preset": "tiny", "tokenizer.path": "https://me:word@host/run"}
    with pytest.raises(UserError, match="credential"):
        request.adapt(run_config("channel:d", changes), {"d": "s3://b/d"}, 1)


def test_metrics_of_many_stores_stay_within_what_sagemaker_takes(dry_run):
    stores = json.dumps([{"name": f"s{number}", "path": f"channel:data/{number}", "weight": 1} for number in range(12)])
    made = dry_run("--data.store=null", f"--data.stores={stores}")
    definitions = made["AlgorithmSpecification"]["MetricDefinitions"]
    assert len(definitions) == 40
    assert len(metric_definitions([f"s{number}" for number in range(12)])) > 40
    line = "step 20/100  loss 2.31  learning_rate 0.0003  mfu 0.41"
    found = {item["Name"]: re.findall(item["Regex"], line) for item in definitions}
    assert {name: values for name, values in found.items() if values} == {
        "step": ["20"],
        "loss": ["2.31"],
        "learning_rate": ["0.0003"],
        "mfu": ["0.41"],
    }


def test_the_ceiling_in_money(tmp_path):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"sagemaker": SITE}, allow_unicode=True))
    site = load_site(str(tmp_path / "site.yaml"))
    common = {"stage": "train", "run_name": "r", "name": "r-1", "role": ROLE, "image": IMAGE}
    recipe = run_config("channel:d", {"train.max_steps": 3, "model.preset": "tiny"})
    common |= {"instance_type": "ml.p4d.24xlarge", "instance_count": 4, "max_hours": 10}
    common |= {"bucket": "b", "channels": {}, "recipe": recipe}
    assert request.Job(**common, site=site).ceiling == 4 * 10 * 32.5
    assert request.Job(**common, site=SageMakerConfig()).ceiling is None


def test_what_decides_whether_it_is_the_same_run():
    changes = {"train.max_steps": 3, "model.preset": "tiny"}
    first = request.identity(run_config("channel:d", changes))
    again = changes | {"train.micro_batch_size": 8, "parallel.shard_degree": 4, "checkpoint.every": 7}
    assert request.identity(run_config("channel:d", again)) == first
    other = request.identity(run_config("channel:d", changes | {"train.seed": 7}))
    assert {key for key in first if first[key] != other[key]} == {"train.seed"}


def test_a_preparation_takes_no_path_of_this_machine_along_and_may_have_other_workers():
    def preparation(**changes) -> Preparation:
        source = Source(name="a", path="channel:text/a")
        return Preparation(prepare=PrepareConfig(sources=[source], tokenizer="channel:tok", **changes))

    channels = {"text": "s3://b/t", "tok": "s3://b/tok"}
    slurm = SlurmConfig(setup="source /home/me/venv/bin/activate")
    first = request.adapt(preparation(output="/home/me/a", executor="slurm", slurm=slurm), channels, 1)
    assert "/home/me" not in request.to_yaml(first)
    again = request.adapt(preparation(output="stores/b", workers=3), channels, 1)
    assert request.identity(again) == request.identity(first)
    other = request.adapt(preparation(output="stores/b", deduplicate="exact"), channels, 1)
    assert request.identity(other) != request.identity(first)


def test_the_checker_finds_what_botocores_does_not():
    good = {"TrainingJobName": "a", "RoleArn": ROLE, "OutputDataConfig": {"S3OutputPath": "s3://b"}}
    check.check_request("CreateTrainingJob", good)
    wrong = {
        "TrainingJobName": ["a b", 3],
        "RoleArn": ["x", "arn:aws:iam::123456789012:user/me"],
        "Environment": [{"1 x": "y"}, {"x": "y" * 513}],
        "OutputDataConfig": [{"S3OutputPath": "s3://b", "CompressionType": "None"}, {"S3Output": "s3://b"}],
        "HyperParameters": [{f"{number}": "x" for number in range(101)}],
        "StoppingCondition": [{"MaxPendingTimeInSeconds": 60}],
    }
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(UserError, match=key):
                check.check_request("CreateTrainingJob", good | {key: value})


def test_the_name_of_the_code_channel_is_taken(dry_run):
    assert "choose another name" in dry_run("--channel=code=s3://our-bucket/code")


def test_the_wheel_is_what_is_installed(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    wheel = package.build_wheel(first)
    assert wheel.read_bytes() == package.build_wheel(second).read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    assert {"tsumugu/cli.py", "tsumugu/sample/japanese.jsonl", "tsumugu/launch/sagemaker/start.sh"} <= set(names)
    assert not any("__pycache__" in name for name in names)


def test_wheels_of_what_the_image_lacks_are_asked_for_without_torch(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        found = [{"metadata": {"name": name, "version": "1"}} for name in ("peft", "torch", "nvidia-cublas", "triton")]
        return subprocess.CompletedProcess(command, 0, json.dumps({"install": found}), "")

    monkeypatch.setattr(package.subprocess, "run", run)
    package.download_wheels(package.requirements("train", {"lora"}), tmp_path, "3.12")
    resolve, download = commands
    assert any(word.startswith("peft") for word in resolve)
    assert not any(re.match(r"(torch|datatrove)\b", word) for word in resolve)
    assert "--dry-run" in resolve
    assert [word for word in download if word.endswith("==1")] == ["peft==1"]


def test_what_a_recipe_needs_beside_goes_along(monkeypatch):
    """As pyproject.toml declares it: what is installed for tests may be older."""
    project = tomllib.loads((DOCUMENTS.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [f'{line}; extra == "{name}"' for name, of in project["optional-dependencies"].items() for line in of]
    monkeypatch.setattr(package.metadata, "requires", lambda _: [*project["dependencies"], *declared])

    def needs(stage: str, recipe) -> set[str]:
        lines = set(package.requirements(stage, request.extras(recipe))) - set(package.requirements(stage))
        return {re.split(r"[^\w-]", line)[0] for line in lines}

    changes = {"train.max_steps": 3, "model.preset": "tiny"}
    assert needs("train", run_config("channel:d", changes)) == set()
    assert needs("train", run_config("channel:d", changes | {"parallel.fp8": "rowwise"})) == {"torchao"}
    adapters = {"train.max_steps": 3, "model.pretrained": "rinna/x", "model.lora": LoraConfig(rank=8)}
    assert needs("train", run_config("channel:d", adapters)) == {"peft", "bitsandbytes"}
    for path, found in (("s3://bucket/a", {"boto3", "s3fs"}), ("channel:a", set())):
        prepare = PrepareConfig(sources=[Source(name="a", path=path)], tokenizer="channel:t", output="x")
        assert needs("prepare", Preparation(prepare=prepare)) == found


def test_the_site_file_of_the_documentation_has_every_key_and_is_accepted(dry_run):
    site = yaml.safe_load((DOCUMENTS / "site.yaml").read_text())["sagemaker"]
    assert site.keys() == {field.name for field in dataclasses.fields(SageMakerConfig)}
    changes = {"channel": "data=s3://our-models/data", "role": None, "image": None, "bucket": None}
    changes["instance_type"] = "ml.p3.16xlarge"
    made = dry_run("--channel=model=s3://our-models/rinna", site=site, **changes)
    assert made["ResourceConfig"]["VolumeKmsKeyId"] == site["volume_kms_key"]


def test_the_policies_of_the_documentation_allow_what_is_called():
    allowed: dict[str, set[str]] = {}
    for path in DOCUMENTS.glob("*.json"):
        allowed[path.stem] = set()
        for statement in json.loads(path.read_text())["Statement"]:
            assert statement["Effect"] == "Allow"
            actions = statement["Action"]
            allowed[path.stem] |= {actions} if isinstance(actions, str) else set(actions)
        assert not any("*" in action for action in allowed[path.stem])
    called = set(re.findall(r"\.((?:create|describe|stop)_(?:training|processing)_job)\b", inspect.getsource(service)))
    assert len(called) == 6
    assert {f"sagemaker:{xform_back(name)}" for name in called} <= allowed["user"]
    also = {"iam:PassRole", "sagemaker:AddTags", "logs:GetLogEvents", "logs:DescribeLogStreams"}
    assert also | {"s3:ListBucket", "s3:GetObject", "s3:PutObject"} <= allowed["user"]
    assert allowed["trust"] == {"sts:AssumeRole"}
    assert {"s3:DeleteObject", "logs:PutLogEvents", "cloudwatch:PutMetricData"} <= allowed["job"]
    assert not any(action.startswith(("iam:", "sagemaker:")) for action in allowed["job"])


def xform_back(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def test_the_endpoint_of_the_documentation_is_one_that_the_service_knows():
    specification = importlib.util.spec_from_file_location("endpoint", DOCUMENTS / "endpoint.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    made = module.requests("mine", "s3://our-bucket/m", IMAGE, ROLE, "ml.g5.xlarge")
    for operation, asked in made.items():
        check.check_request(operation, asked)
    wrong = module.requests("mine", "/m", IMAGE, ROLE, "ml.g5.xlarge")["CreateModel"]
    with pytest.raises(UserError, match="S3Uri"):
        check.check_request("CreateModel", wrong)
