"""The request of a job: a pure function of the recipe, the flags and the site file. Nothing is asked of AWS here."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tsumugu import config
from tsumugu.config import Preparation, SlurmConfig, TrainingRun
from tsumugu.data.batches import check_batch
from tsumugu.distributed.mesh import degrees
from tsumugu.errors import UserError
from tsumugu.launch.sagemaker.site import SageMakerConfig, refuse_credentials
from tsumugu.plan.instances import facts
from tsumugu.training.metrics import metric_definitions

MODEL_CHANNEL = "model"
CODE_CHANNEL = "code"
OPERATIONS = {"train": "CreateTrainingJob", "prepare": "CreateProcessingJob"}
INPUTS = {"train": "/opt/ml/input/data", "prepare": "/opt/ml/processing/input"}  # channels lie below
OUTPUT = "/opt/ml/processing/output"  # of preparation: the store is the folder `store` in it

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BUCKET = re.compile(r"(?!xn--)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")  # S3's user guide, "bucket naming rules"
_IMAGE = re.compile(r"(?P<account>\d{12})\.dkr\.ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/\S+[:@]\S+")
_RUN_NAME = re.compile(r"[A-Za-z0-9](-*[A-Za-z0-9]){0,46}")
_FSX = re.compile(r"fsx://(?P<id>fs-[0-9a-f]+)(?P<path>/[^/].*)")
_METRICS = 40
_LONGEST_HOURS = 28 * 24  # botocore's words on StoppingCondition; its model has no bound
# Families that have disks of their own, whose encryption is theirs: a request that names a key for them is refused
# (botocore's words on VolumeKmsKeyId; EC2's user guide, "instance store volumes")
_OWN_DISKS = re.compile(r"ml\.([a-z]+\d\w*dn?|p4de|g[5-9]\w*|p[5-9][\w-]*|gr6\w*|trn\w+)\.\w+")
_SECTIONS_OF_A_RUN = ("model", "tokenizer", "data", "train", "optimizer", "schedule")
_MAY_CHANGE = {
    "data.audit",
    *(f"train.{key}" for key in ("micro_batch_size", "max_hours", "stop_after", "profile_steps", "memory_snapshot")),
    "prepare.workers",
    *(f"train.{key}" for key in ("log_every", "log_norms", "log_to", "hang_timeout")),
}
_KEPT = 3  # checkpoints at least
_RETRIES = 3  # after the service's own errors


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be started.

    Attributes:
        stage: train or prepare.
        run_name: Whose folder in the bucket it uses.
        name: Of the job, unique in the account and region.
        role, image, bucket, instance_type, instance_count: As the flags say.
        recipe: The configuration, in which `channel:NAME/…` stands as it was written.
        channels: S3 or FSx URI by name.
        max_hours: After which SageMaker stops the job.
        spot: Whether on spare capacity that may be taken away, for at most max_wait_hours in all.
        volume_gb: Of each host's volume (hosts with disks of their own use those, and refuse more than they have).
        keep_alive_minutes: For which hosts wait for the next job of the same kind.
        input_mode: File, or FastFile: S3 channels are read while training goes on.
        site: The platform team's file.
    """

    stage: str
    run_name: str
    name: str
    role: str
    image: str
    bucket: str
    instance_type: str
    instance_count: int
    recipe: TrainingRun | Preparation
    channels: dict[str, str]
    max_hours: float
    spot: bool = False
    max_wait_hours: float | None = None
    volume_gb: int = 100
    keep_alive_minutes: int | None = None
    input_mode: str = "File"
    site: SageMakerConfig = dataclasses.field(default_factory=SageMakerConfig)

    @property
    def prefix(self) -> str:
        """Where in the bucket the run lies, with / at its end."""
        return f"{self.site.prefix.strip('/')}/{self.run_name}/".lstrip("/")

    @property
    def uri(self) -> str:
        """The same as URI, without / at its end."""
        return f"s3://{self.bucket}/{self.prefix.rstrip('/')}"

    @property
    def code_prefix(self) -> str:
        """That of the code of this job, which later jobs of the run leave as it is."""
        return f"{self.prefix}code/{self.name}/"

    @property
    def volume_key(self) -> str | None:
        """The key of the hosts' volumes, where they have any that take one."""
        return None if _OWN_DISKS.fullmatch(self.instance_type) else self.site.volume_kms_key

    @property
    def ceiling(self) -> float | None:
        """What it costs at most, where the price is known."""
        price = self.site.prices.get(self.instance_type)
        return None if price is None else price * self.instance_count * self.max_hours


def check_job(job: Job, region: str | None) -> None:
    """Refuses what botocore's model of the service does not know to be wrong.

    Args:
        job: The job.
        region: Where it is to run; None: not known.
    """
    if not _RUN_NAME.fullmatch(job.run_name):
        raise UserError(
            f"--run-name {job.run_name}: is no name of a job", "use at most 47 letters, digits and - between them"
        )
    if not _BUCKET.fullmatch(job.bucket):
        raise UserError(f"--bucket {job.bucket}: is no name of a bucket", "give its name alone, without s3:// and /")
    image = _IMAGE.fullmatch(job.image)
    if not image:
        raise UserError(
            f"--image {job.image}: is no image in ECR",
            "it looks like ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG (docs/sagemaker.md names AWS's own)",
        )
    if region and image["region"] != region:
        raise UserError(
            f"--image {job.image}: lies in {image['region']}, the job would run in {region}",
            "name the image of that region, or set --region",
        )
    if job.site.network_isolation and (names := downloads_from_hub(job.recipe)):
        raise UserError(
            f"the job would download {names[0]}, and sagemaker.network_isolation is set",
            "download it once, upload it to S3, and add --channel model=s3://…",
        )
    if job.keep_alive_minutes and job.spot:
        raise UserError("--keep-alive-minutes is set with --spot, whose hosts do not wait", "leave one of them out")
    if job.spot and isinstance(job.recipe, TrainingRun) and job.recipe.checkpoint.every is None:
        raise UserError(
            "--spot without checkpoint.every: every interruption would start the run over",
            "set it to some minutes' steps, such as --checkpoint.every 100",
        )
    if job.max_wait_hours is not None and (not job.spot or job.max_wait_hours < job.max_hours):
        raise UserError(
            f"--max-wait-hours {job.max_wait_hours:g} is below --max-hours, or without --spot",
            "it counts waiting and running with --spot",
        )
    if job.max_hours > _LONGEST_HOURS:
        raise UserError(f"--max-hours {job.max_hours:g}: SageMaker takes {_LONGEST_HOURS}", "go on in another job")
    if job.stage == "prepare" and (job.instance_count > 1 or job.spot or job.keep_alive_minutes):
        raise UserError(
            "--stage prepare runs on one instance, without --spot and --keep-alive-minutes",
            "take one with more cores, or prepare on a Slurm cluster",
        )
    instances = facts()["instances"]
    if isinstance(job.recipe, TrainingRun) and job.instance_type in instances:
        train, parallel = job.recipe.train, job.recipe.parallel
        processes = job.instance_count * instances[job.instance_type]["gpus"]
        degrees(parallel, processes)
        check_batch(train.global_batch_size, train.micro_batch_size, processes // parallel.tensor_degree)
    for name, uri in job.channels.items():
        _check_channel(job, name, uri)


def _check_channel(job: Job, name: str, uri: str) -> None:
    if name == CODE_CHANNEL:
        raise UserError("--channel code: tsumugu brings its own code by that name", "choose another name")
    if uri.startswith("fsx://"):
        if not _FSX.fullmatch(uri):
            raise UserError(f"--channel {name}={uri}: is no folder", "fsx://fs-0123456789abcdef0/MOUNT_NAME/FOLDER")
        if job.stage == "prepare":
            raise UserError(f"--channel {name}={uri}: a processing job has no FSx", "give its S3 URI")
        if not job.site.subnets:
            raise UserError(
                f"--channel {name}={uri}: FSx is reached from within its VPC alone",
                "give subnets and security_groups in the --site file",
            )
    elif not re.fullmatch(r"s3://[^/]+/?.*", uri):
        raise UserError(f"--channel {name}={uri}: is neither s3:// nor fsx://", "upload it: aws s3 sync FOLDER URI")


def adapt(recipe: Any, channels: dict[str, str], max_hours: float) -> Any:
    """The recipe as the container reads it: `model` in place of a hub's model, an end in time, and enough checkpoints;
    of a preparation, the container's folder for the store.

    Raises:
        UserError: It has paths of this machine, or a credential, or channels that are not given.
    """
    if config.redacted(dataclasses.asdict(recipe)) != dataclasses.asdict(recipe):
        raise UserError("the recipe holds what looks like a credential", "leave it out: it would lie in the bucket")
    if isinstance(recipe, TrainingRun):
        pretrained = recipe.model.pretrained
        if pretrained and MODEL_CHANNEL in channels and not pretrained.startswith("channel:"):
            recipe = dataclasses.replace(
                recipe, model=dataclasses.replace(recipe.model, pretrained=f"channel:{MODEL_CHANNEL}")
            )
        # what is deleted here is deleted in S3, where the one after it may not have arrived yet
        kept = max(_KEPT, recipe.checkpoint.keep)
        recipe = dataclasses.replace(recipe, checkpoint=dataclasses.replace(recipe.checkpoint, keep=kept))
        if recipe.train.max_hours is None:
            hours = round(max(max_hours - 0.25, 0.9 * max_hours), 4)  # the rest: wheels, the last upload, an export
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_hours=hours))
    else:  # where it would be written here, and by which cluster, is nobody's business in the bucket
        prepare = dataclasses.replace(recipe.prepare, output=f"{OUTPUT}/store", executor="local", slurm=SlurmConfig())
        recipe = dataclasses.replace(recipe, prepare=prepare)
    for key, path in _paths(recipe):
        if not path.startswith("channel:"):
            folder = Path(path).name
            raise UserError(
                f"{key} is {path}, which the container does not have",
                f"upload it (aws s3 sync {path} s3://BUCKET/{folder}), add --channel {folder}=s3://BUCKET/{folder}, "
                f"and write channel:{folder} in its place",
            )
    config.resolve_channels(recipe, dict.fromkeys(channels, "/"))
    return recipe


def downloads_from_hub(recipe: Any) -> list[str]:
    """What a job would download from the Hugging Face hub."""
    if isinstance(recipe, TrainingRun):
        name = recipe.model.pretrained
        return [name] if name and not name.startswith("channel:") else []
    return [path for _, path in _sources(recipe) if path.startswith("hf://")]


def channel_paths(recipe: Any) -> list[str]:
    """What of its paths is `channel:NAME/…`."""
    names = [recipe.model.pretrained] if isinstance(recipe, TrainingRun) else []
    return [path for path in [*names, *(path for _, path in _paths(recipe))] if path and path.startswith("channel:")]


def extras(recipe: Any) -> set[str]:
    """Which of tsumugu's extras a job needs."""
    if isinstance(recipe, TrainingRun):
        used = {"lora": recipe.model.lora.rank, "fp8": recipe.parallel.fp8}
    else:
        used = {"aws": any(path.startswith("s3://") for _, path in _sources(recipe))}
    return {name for name, value in used.items() if value}


def to_yaml(recipe: Any) -> str:
    """With every default, as `config.load` reads it."""
    return yaml.safe_dump(dataclasses.asdict(recipe), allow_unicode=True, sort_keys=False)


def identity(recipe: Any) -> dict[str, Any]:
    """Keys and values that may not change while a run goes on; what they stand for is checked in the container."""
    stage, names = ("train", _SECTIONS_OF_A_RUN) if isinstance(recipe, TrainingRun) else ("prepare", ("prepare",))
    sections = _flat({name: dataclasses.asdict(getattr(recipe, name)) for name in names})
    return {"stage": stage} | {key: value for key, value in sections.items() if key not in _MAY_CHANGE}


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def as_name(text: str) -> str:
    """Of a file's name what may stand in the name of a run, with room for the time behind it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:33].rstrip("-") or "run"


def _paths(recipe: Any) -> list[tuple[str, str]]:
    """Key and value of every path that must be there in the container, but for URLs and names on a hub."""
    if isinstance(recipe, TrainingRun):
        found: list[tuple[str, str | None]] = [
            ("tokenizer.path", recipe.tokenizer.path),
            ("model.config", recipe.model.config),
            ("train.start_from", recipe.train.start_from),
            ("data.store", recipe.data.store),
            *((f"data.stores[{index}].path", store.path) for index, store in enumerate(recipe.data.stores)),
        ]
        name = recipe.model.pretrained
        if name and (Path(name).exists() or not _HUB_NAME.fullmatch(name)):
            found.append(("model.pretrained", name))
    else:
        prepare = recipe.prepare
        found = [("prepare.tokenizer", prepare.tokenizer), *_sources(recipe)]
        found += [("prepare.contamination", path) for path in prepare.contamination]
        found += [("prepare.template", prepare.template)] if prepare.template.endswith(".yaml") else []
        found += [("prepare.clean.ng_words", prepare.clean.ng_words)]
    return [(key, path) for key, path in found if path and "://" not in path]


def _sources(recipe: Preparation) -> list[tuple[str, str]]:
    return [
        (f"prepare.sources[{index}].path", path)
        for index, source in enumerate(recipe.prepare.sources)
        for path in ([source.path] if isinstance(source.path, str) else source.path)
    ]


def request_of(job: Job) -> dict[str, Any]:
    """The arguments of the operation that OPERATIONS names for the job's stage."""
    request = _training(job) if job.stage == "train" else _processing(job)
    refuse_credentials(request["Environment"], "Environment")
    return request


def _training(job: Job) -> dict[str, Any]:
    assert isinstance(job.recipe, TrainingRun)
    site, run = job.site, job.recipe
    stores = [store.name for store in run.data.stores] if len(run.data.stores) > 1 else []
    metrics = [{"Name": name, "Regex": pattern} for name, pattern in metric_definitions(stores).items()]
    request: dict[str, Any] = {
        "TrainingJobName": job.name,
        "RoleArn": job.role,
        "AlgorithmSpecification": {
            "TrainingImage": job.image,
            "TrainingInputMode": job.input_mode,
            "ContainerEntrypoint": ["bash", f"{INPUTS['train']}/{CODE_CHANNEL}/start.sh"],
            "MetricDefinitions": metrics[:_METRICS],
        },
        "HyperParameters": {"recipe": "recipe.yaml", "run_name": job.run_name},
        "InputDataConfig": [
            _s3_channel(CODE_CHANNEL, f"s3://{job.bucket}/{job.code_prefix}") | {"InputMode": "File"},
            *(_channel(name, uri) for name, uri in job.channels.items()),
        ],
        "OutputDataConfig": {"S3OutputPath": f"{job.uri}/output", "CompressionType": "NONE"},
        "CheckpointConfig": {"S3Uri": f"{job.uri}/checkpoints", "LocalPath": "/opt/ml/checkpoints"},
        "ResourceConfig": {
            "InstanceType": job.instance_type,
            "InstanceCount": job.instance_count,
            "VolumeSizeInGB": job.volume_gb,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": _seconds(job.max_hours)},
        "RetryStrategy": {"MaximumRetryAttempts": _RETRIES},
        "Environment": _environment(job),
        "Tags": _tags(job),
        "EnableNetworkIsolation": site.network_isolation,
        "EnableInterContainerTrafficEncryption": site.encrypt_traffic,
        "EnableManagedSpotTraining": job.spot,
    }
    if job.spot:
        wait = job.max_hours * 2 if job.max_wait_hours is None else job.max_wait_hours
        request["StoppingCondition"]["MaxWaitTimeInSeconds"] = _seconds(wait)
    if job.keep_alive_minutes:
        request["ResourceConfig"]["KeepAlivePeriodInSeconds"] = job.keep_alive_minutes * 60
    if site.training_plan:
        request["ResourceConfig"]["TrainingPlanArn"] = site.training_plan
    if job.volume_key:
        request["ResourceConfig"]["VolumeKmsKeyId"] = job.volume_key
    if site.output_kms_key:
        request["OutputDataConfig"]["KmsKeyId"] = site.output_kms_key
    if site.subnets:
        request["VpcConfig"] = {"Subnets": site.subnets, "SecurityGroupIds": site.security_groups}
    return request


def _processing(job: Job) -> dict[str, Any]:
    site, inputs = job.site, {CODE_CHANNEL: f"s3://{job.bucket}/{job.code_prefix}"} | job.channels
    cluster: dict[str, Any] = {
        "InstanceType": job.instance_type,
        "InstanceCount": 1,
        "VolumeSizeInGB": job.volume_gb,
    }
    output: dict[str, Any] = {
        "Outputs": [
            {
                "OutputName": "store",
                "S3Output": {"S3Uri": f"{job.uri}/output", "LocalPath": OUTPUT, "S3UploadMode": "EndOfJob"},
            }
        ]
    }
    network: dict[str, Any] = {
        "EnableNetworkIsolation": site.network_isolation,
        "EnableInterContainerTrafficEncryption": site.encrypt_traffic,
    }
    if job.volume_key:
        cluster["VolumeKmsKeyId"] = job.volume_key
    if site.output_kms_key:
        output["KmsKeyId"] = site.output_kms_key
    if site.subnets:
        network["VpcConfig"] = {"Subnets": site.subnets, "SecurityGroupIds": site.security_groups}
    return {
        "ProcessingJobName": job.name,
        "RoleArn": job.role,
        "AppSpecification": {
            "ImageUri": job.image,
            "ContainerEntrypoint": ["bash", f"{INPUTS['prepare']}/{CODE_CHANNEL}/start.sh", "prepare"],
        },
        "ProcessingInputs": [
            {
                "InputName": name,
                "S3Input": {
                    "S3Uri": _folder(uri),
                    "LocalPath": f"{INPUTS['prepare']}/{name}",
                    "S3DataType": "S3Prefix",
                    "S3InputMode": "File",
                    "S3DataDistributionType": "FullyReplicated",
                },
            }
            for name, uri in inputs.items()
        ],
        "ProcessingOutputConfig": output,
        "ProcessingResources": {"ClusterConfig": cluster},
        "StoppingCondition": {"MaxRuntimeInSeconds": _seconds(job.max_hours)},
        "Environment": _environment(job),
        "NetworkConfig": network,
        "Tags": _tags(job),
    }


def _channel(name: str, uri: str) -> dict[str, Any]:
    return _fsx_channel(name, uri) if uri.startswith("fsx://") else _s3_channel(name, uri)


def _s3_channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": _folder(uri), "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def _folder(uri: str) -> str:
    """With / at its end: a prefix without it also has what begins likewise."""
    return f"{uri.rstrip('/')}/"


def _fsx_channel(name: str, uri: str) -> dict[str, Any]:
    match = _FSX.fullmatch(uri)
    assert match
    source = {
        "FileSystemId": match["id"],
        "FileSystemType": "FSxLustre",
        "FileSystemAccessMode": "ro",
        "DirectoryPath": match["path"],
    }
    return {"ChannelName": name, "DataSource": {"FileSystemDataSource": source}, "InputMode": "File"}


def _environment(job: Job) -> dict[str, str]:
    offline = {} if downloads_from_hub(job.recipe) else {"HF_HUB_OFFLINE": "1"}
    return offline | ({"MLFLOW_TRACKING_URI": job.site.mlflow} if job.site.mlflow else {}) | job.site.environment


def _tags(job: Job) -> list[dict[str, str]]:
    tags = {"tsumugu:run": job.run_name} | job.site.tags
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _seconds(hours: float) -> int:
    return round(hours * 3600)
