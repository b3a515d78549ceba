"""`tsumugu launch sagemaker`: flags, and what is done in their order. Heavy imports wait until it runs."""

import argparse
import json
import math
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsumugu.errors import UserError
from tsumugu.launch.sagemaker import INTERRUPTED_REASON

if TYPE_CHECKING:
    from tsumugu.launch.sagemaker.request import Job
    from tsumugu.launch.sagemaker.service import Service

EPILOG = (
    "Afterwards: `tsumugu launch sagemaker status|logs|stop|download JOB`; download takes --output DIR, and with "
    "--run-dir DIR brings the run folder. Any --SECTION.KEY VALUE of the configuration is taken."
)
_PAUSE_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `launch sagemaker`; the recipe's own are left over for `run`."""
    parser.epilog = EPILOG
    parser.add_argument("--config", action="append", metavar="FILE", help="the recipe; may be given several times")
    parser.add_argument("--stage", choices=["train", "prepare"], default="train", help="default: train")
    parser.add_argument("--role", metavar="ARN", help="the role that the job has")
    parser.add_argument("--image", metavar="URI", help="the training image in ECR")
    parser.add_argument("--bucket", metavar="NAME", help="for code, checkpoints and the model")
    parser.add_argument("--instance-type", metavar="T", help="such as ml.p4d.24xlarge")
    parser.add_argument("--instance-count", type=_above_zero(int), default=1, metavar="N", help="default: 1")
    parser.add_argument("--max-hours", type=_above_zero(float), metavar="H", help="when SageMaker stops it; required")
    parser.add_argument("--run-name", metavar="NAME", help="of a run to begin or go on with; default: new, by the time")
    parser.add_argument("--channel", action="append", default=[], metavar="NAME=URI", help="s3://… or fsx://ID/MOUNT/…")
    parser.add_argument("--spot", action="store_true", help="on spare capacity, which may be taken away and come back")
    parser.add_argument(
        "--max-wait-hours", type=_above_zero(float), metavar="H", help="with --spot, waiting included (default: twice)"
    )
    parser.add_argument("--site", metavar="FILE", help="the platform team's file: VPC, keys, tags, prices …")
    parser.add_argument("--region", metavar="NAME", help="default: as of the AWS command line")
    parser.add_argument("--volume-gb", type=_above_zero(int), default=100, metavar="N", help="per host (default: 100)")
    parser.add_argument(
        "--keep-alive-minutes", type=_above_zero(int), metavar="N", help="hosts wait so long for the next job"
    )
    parser.add_argument(
        "--input-mode", choices=["File", "FastFile"], default="File", help="of S3 channels (default: File)"
    )
    parser.add_argument(
        "--price-per-hour", type=_above_zero(float), metavar="P", help="of an instance, to say the most"
    )
    parser.add_argument("--wheels", metavar="DIR", help="of what the image lacks, or none (default: by pip download)")
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the image, for them (default: 3.12)")
    parser.add_argument("--dry-run", action="store_true", help="print the request as JSON, or what would be done")
    parser.add_argument("--detach", action="store_true", help="do not wait and show the log")
    parser.add_argument("--output", metavar="DIR", help="with download (default: the name of the job)")
    parser.add_argument("--run-dir", metavar="DIR", help="with download: the run folder, to here")


def _above_zero(kind: type) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is no {'whole ' if kind is int else ''}number above 0")
        return value

    return parse


def run(options: argparse.Namespace, flags: list[str]) -> int:
    """Launches, or does what the first word of `flags` says about a job."""
    actions = {"status": _status, "logs": _logs, "stop": _stop, "download": _download}
    if not flags or flags[0].startswith("-") or options.config:
        return _launch(options, flags)
    action, *names = flags
    if action not in actions or len(names) != 1 or names[0].startswith("-"):
        raise UserError(
            f"launch sagemaker {' '.join(flags)}: is no command",
            "status, logs, stop and download take the name of a job",
        )
    from tsumugu.launch.sagemaker.service import Service
    from tsumugu.launch.sagemaker.site import load_site

    return actions[action](Service(options.region or load_site(options.site).region), names[0], options)


def _launch(options: argparse.Namespace, flags: list[str]) -> int:
    from tsumugu.launch.sagemaker import check, package, request, service

    job = _job(options, flags)
    region = options.region or job.site.region
    asked = request.request_of(job)
    if options.dry_run:
        request.check_job(job, region)
        check.check_request(request.OPERATIONS[job.stage], asked)
        print(json.dumps(asked, ensure_ascii=False, indent=1))
        return 0
    account = service.Service(region)
    request.check_job(job, account.region)
    check.check_request(request.OPERATIONS[job.stage], asked)
    for line in _terms(job):
        print(line)
    service.check_channels(account, job, request.channel_paths(job.recipe))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wheels = options.wheels or job.site.wheels
        none = folder / "none"  # of an image that has everything
        package.write_code(
            _made(folder / "code"),
            request.to_yaml(job.recipe),
            job.stage,
            request.extras(job.recipe),
            _made(none) if wheels == "none" else Path(wheels) if wheels else None,
            options.python,
        )
        claimed = service.claim(account, job, request.identity(job.recipe))
        size = service.upload(account, job, folder / "code")
    service.record(account, job, claimed)
    service.create(account, job, asked)
    does = "goes on with" if claimed.earlier else "begins"
    print(f"{job.name}: {does} {job.uri}/ ({size / 1e6:.1f} MB of code uploaded)")
    if options.detach:
        print(f"tsumugu launch sagemaker logs {job.name}")
        return 0
    return _logs(account, job.name, options)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _job(options: argparse.Namespace, flags: list[str]) -> "Job":
    """What flags, site file and recipe say together."""
    import dataclasses

    from tsumugu import config
    from tsumugu.launch.sagemaker import request
    from tsumugu.launch.sagemaker.site import load_site

    site = load_site(options.site)
    said = {name: getattr(options, name) or getattr(site, name) for name in ("role", "image", "bucket")}
    said |= {name: getattr(options, name) for name in ("config", "instance_type", "max_hours")}
    if missing := [f"--{name.replace('_', '-')}" for name, value in said.items() if not value]:
        raise UserError(f"{', '.join(missing)} missing", "see `tsumugu launch sagemaker --help`")
    if options.price_per_hour:
        site = dataclasses.replace(site, prices={options.instance_type: options.price_per_hour})
    channels = dict(config.split_channel(text) for text in options.channel)
    if len(channels) < len(options.channel):
        raise UserError("--channel has the same name twice", "name each channel")
    config_class = config.TrainingRun if options.stage == "train" else config.Preparation
    recipe = config.load_unresolved(config_class, options.config, flags)
    stamp = datetime.now(UTC).strftime("%y%m%d-%H%M%S")
    named = options.run_name or f"{request.as_name(Path(options.config[-1]).stem)}-{stamp}"
    return request.Job(
        stage=options.stage,
        run_name=named,
        name=f"{named}-{stamp}" if options.run_name else named,
        role=said["role"],
        image=said["image"],
        bucket=said["bucket"],
        instance_type=options.instance_type,
        instance_count=options.instance_count,
        recipe=request.adapt(recipe, channels, options.max_hours),
        channels=channels,
        max_hours=options.max_hours,
        spot=options.spot,
        max_wait_hours=options.max_wait_hours,
        volume_gb=options.volume_gb,
        keep_alive_minutes=options.keep_alive_minutes,
        input_mode=options.input_mode,
        site=site,
    )


def _terms(job: "Job") -> list[str]:
    """What the user should see before it costs anything."""
    from tsumugu.launch.sagemaker import request

    lines = [f"{job.instance_count} × {job.instance_type} for at most {job.max_hours:g} h"]
    if job.ceiling is not None:
        lines[0] += f": at most {job.ceiling:,.2f} {job.site.currency}"
        lines[0] += " (before the discount of spot)" if job.spot else ""
    if not job.spot and job.keep_alive_minutes:
        lines.append(f"afterwards the instances wait {job.keep_alive_minutes} min for another job, which is billed too")
    if job.site.volume_kms_key and not job.volume_key:
        lines.append(f"{job.instance_type} encrypts its disks by itself: sagemaker.volume_kms_key is not used")
    for name in request.downloads_from_hub(job.recipe):
        lines.append(f"the job downloads {name} from the hub, without a token; --channel model=s3://… does without")
    return lines


def _logs(account: "Service", name: str, options: argparse.Namespace) -> int:
    from tsumugu.launch.sagemaker import service

    service.describe(account, name)
    try:
        found = service.follow(account, name, lambda line: print(line, flush=True), _PAUSE_SECONDS)
    except UserError as error:  # such as credentials that have expired meanwhile
        hint = f"{error.hint}; the job goes on: tsumugu launch sagemaker logs {name}"
        raise UserError(error.message, hint) from None
    except KeyboardInterrupt:
        print(f"\nthe job goes on: tsumugu launch sagemaker logs {name}, or stop {name}", file=sys.stderr)
        return 130
    return _show(found, name, options)


def _status(account: "Service", name: str, options: argparse.Namespace) -> int:
    from tsumugu.launch.sagemaker import service

    return _show(service.describe(account, name), name, options)


def _show(found: dict[str, Any], name: str, options: argparse.Namespace) -> int:
    """How a job stands; 1 where it failed, 3 where it was stopped or ended itself with a checkpoint."""
    from tsumugu.launch.sagemaker.site import load_site

    job = found["all"]
    reason = " ".join((job.get("FailureReason") or job.get("ExitMessage") or "").split())
    print(f"{name}: {found['status']}" + (f" ({job['SecondaryStatus']})" if job.get("SecondaryStatus") else ""))
    if reason:
        print(f"  {reason}")
    for metric in job.get("FinalMetricDataList", []):
        print(f"  {metric['MetricName']} {metric['Value']:g}")
    if seconds := job.get("BillableTimeInSeconds"):
        resources = job["ResourceConfig"]
        site = load_site(options.site)
        price = options.price_per_hour or site.prices.get(resources["InstanceType"])
        cost = f", {price * resources['InstanceCount'] * seconds / 3600:,.2f} {site.currency}" if price else ""
        print(f"  billed {seconds / 3600:.2f} h × {resources['InstanceCount']} {resources['InstanceType']}{cost}")
    if artifacts := job.get("ModelArtifacts", {}).get("S3ModelArtifacts"):
        print(f"  model {artifacts}")
    if checkpoints := job.get("CheckpointConfig", {}).get("S3Uri"):
        print(f"  checkpoints {checkpoints}")
    return {"Failed": 3 if INTERRUPTED_REASON in reason else 1, "Stopped": 3}.get(found["status"], 0)


def _stop(account: "Service", name: str, options: argparse.Namespace) -> int:
    from tsumugu.launch.sagemaker import service

    found = service.describe(account, name)
    if found["status"] != "InProgress":
        raise UserError(f"{name} is {found['status']}: there is nothing to stop", "")
    if not options.dry_run:
        service.stop(account, name, found["stage"])
    then = {
        "train": "it has two minutes to save, and the same --run-name goes on from there",
        "prepare": "the same --run-name starts it over",
    }
    print(f"{name}: {'would be ' if options.dry_run else ''}asked to stop; {then[found['stage']]}")
    return 0


def _download(account: "Service", name: str, options: argparse.Namespace) -> int:
    from tsumugu.launch.sagemaker import service

    found = service.describe(account, name)
    job = found["all"]
    if options.run_dir:
        uri, output = job.get("CheckpointConfig", {}).get("S3Uri"), options.run_dir
    elif found["stage"] == "train":
        uri, output = job.get("ModelArtifacts", {}).get("S3ModelArtifacts"), options.output or name
    else:
        place = job["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]["S3Uri"]
        uri, output = f"{place}/store" if found["status"] == "Completed" else None, options.output or name
    if not uri or (found["status"] != "Completed" and not options.run_dir):
        raise UserError(
            f"{name} is {found['status']}: it has made nothing to download",
            "once it is Completed; what is there of its run folder: --run-dir DIR",
        )
    if options.dry_run:
        print(f"{output}: would get {uri}")
        return 0
    count = service.download(account, uri, Path(output))
    print(f"{output}: {count} files of {uri}")
    return 0
