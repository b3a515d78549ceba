"""The platform team's file: what is the same for everybody who launches on SageMaker from one account."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tsumugu import config
from tsumugu.errors import UserError, redact


@dataclass(frozen=True, kw_only=True)
class SageMakerConfig:
    """What the flags do not say, or say otherwise."""

    region: str | None = None
    """AWS region; default: as of the AWS command line."""
    role: str | None = None
    """ARN of the role that jobs have; --role goes before it."""
    image: str | None = None
    """URI of the training image; --image goes before it."""
    bucket: str | None = None
    """Bucket for code, checkpoints and models; --bucket goes before it."""
    prefix: str = "tsumugu"
    """Where in the bucket: runs lie at PREFIX/RUN_NAME/."""
    subnets: list[str] = field(default_factory=list)
    """Subnets of a VPC that jobs run in, with security_groups."""
    security_groups: list[str] = field(default_factory=list)
    """Security groups of jobs; with several hosts and EFA each must allow all traffic to itself."""
    volume_kms_key: str | None = None
    """KMS key of the hosts' volumes."""
    output_kms_key: str | None = None
    """KMS key of models in S3, and of uploaded code."""
    encrypt_traffic: bool = False
    """Encrypt what hosts send to one another (slower; not over EFA)."""
    network_isolation: bool = False
    """Containers reach nothing but one another: everything comes from channels."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of jobs; nothing secret."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of containers, such as HTTPS_PROXY; nothing secret."""
    mlflow: str | None = None
    """Tracking server for train.log_to: [mlflow]: a URL, or the ARN of a SageMaker one."""
    training_plan: str | None = None
    """ARN of a training plan, whose reserved instances jobs use."""
    wheels: str | None = None
    """Folder of wheels of what the image lacks, or none; --wheels goes before it."""
    prices: dict[str, float] = field(default_factory=dict)
    """Price of an instance and hour by instance type, so that the ceiling of a job can be said."""
    currency: str = "USD"
    """Of the prices."""

    def __post_init__(self):
        if bool(self.subnets) != bool(self.security_groups):
            missing = "subnets" if self.security_groups else "security_groups"
            raise UserError(f"sagemaker.{missing} is empty", "give subnets and security_groups, or neither")
        refuse_credentials(self.environment, "sagemaker.environment")
        refuse_credentials(self.tags, "sagemaker.tags")


@dataclass(frozen=True, kw_only=True)
class Site:
    """The file: one section."""

    sagemaker: SageMakerConfig


def load_site(file: str | None) -> SageMakerConfig:
    """What the file says, or every default without one."""
    return config.load(Site, [file], channels={}).sagemaker if file else SageMakerConfig()


def refuse_credentials(values: Mapping[str, str], place: str) -> None:
    """Refuses names and values that look like credentials: a request can be read by everybody who may describe jobs."""
    for name, value in values.items():
        if redact(f"{name}={value}") != f"{name}={value}":
            raise UserError(
                f"{place}.{name} looks like a credential, and everybody who may describe jobs can read it",
                "leave it out: the job's role opens S3, and the channel `model` replaces downloads from a hub",
            )
