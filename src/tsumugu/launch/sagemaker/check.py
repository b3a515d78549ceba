"""Requests against botocore's own model of the service: keys and types, and what botocore's validator leaves out.

That is: enumerations, patterns, and the most that strings, lists and numbers may have.
"""

import difflib
import functools
from collections.abc import Iterator
from typing import Any

import regex

from tsumugu.errors import UserError

# By what the user said it; the longest beginning counts.
_SAID_BY = {
    "RoleArn": "--role",
    "AlgorithmSpecification.TrainingImage": "--image",
    "AlgorithmSpecification.MetricDefinitions": "data.stores",
    "AppSpecification.ImageUri": "--image",
    "ResourceConfig.InstanceType": "--instance-type",
    "ResourceConfig.InstanceCount": "--instance-count",
    "ResourceConfig.VolumeSizeInGB": "--volume-gb",
    "ResourceConfig.VolumeKmsKeyId": "sagemaker.volume_kms_key",
    "ResourceConfig.KeepAlivePeriodInSeconds": "--keep-alive-minutes",
    "ResourceConfig.TrainingPlanArn": "sagemaker.training_plan",
    "ProcessingResources.ClusterConfig.InstanceType": "--instance-type",
    "ProcessingResources.ClusterConfig.InstanceCount": "--instance-count",
    "ProcessingResources.ClusterConfig.VolumeSizeInGB": "--volume-gb",
    "ProcessingResources.ClusterConfig.VolumeKmsKeyId": "sagemaker.volume_kms_key",
    "TrainingJobName": "--run-name",
    "ProcessingJobName": "--run-name",
    "HyperParameters": "--run-name",
    "CheckpointConfig": "--bucket",
    "OutputDataConfig.S3OutputPath": "--bucket",
    "OutputDataConfig.KmsKeyId": "sagemaker.output_kms_key",
    "InputDataConfig": "--channel",
    "ProcessingInputs": "--channel",
    "StoppingCondition.MaxRuntimeInSeconds": "--max-hours",
    "StoppingCondition.MaxWaitTimeInSeconds": "--max-wait-hours",
    "VpcConfig.Subnets": "sagemaker.subnets",
    "VpcConfig.SecurityGroupIds": "sagemaker.security_groups",
    "NetworkConfig.VpcConfig.Subnets": "sagemaker.subnets",
    "NetworkConfig.VpcConfig.SecurityGroupIds": "sagemaker.security_groups",
    "Environment": "sagemaker.environment",
    "Tags": "sagemaker.tags",
}


_TYPES = {"structure": dict, "map": dict, "list": list, "string": str, "integer": int, "long": int, "boolean": bool}


def check_request(operation: str, request: dict[str, Any]) -> None:
    """Refuses a request that the service would refuse for its form.

    Args:
        operation: Such as CreateTrainingJob.
        request: Its arguments.

    Raises:
        UserError: There is no boto3; or the first thing that is wrong, by the flag or the key of the site file.
    """
    try:
        from botocore.validate import ParamValidator
    except ImportError:
        raise UserError("boto3 is not installed", "pip install 'tsumugu[aws]'") from None
    shape = _service().operation_model(operation).input_shape
    for path, fault, hint in _faults(shape, request, ""):
        names = [name for name in _SAID_BY if path == name or path.startswith((f"{name}.", f"{name}["))]
        said_by = _SAID_BY[max(names, key=len)] if names else path
        raise UserError(f"{said_by}: {fault}{'' if said_by == path else f' ({path})'}", hint)
    report = ParamValidator().validate(request, shape)
    if report.has_errors():
        raise UserError(
            f"the request is not as {operation} wants it: {' '.join(report.generate_report().split())}",
            "a newer boto3 may know more: pip install --upgrade 'tsumugu[aws]'",
        )


@functools.cache
def _service() -> Any:
    from botocore.session import get_session

    return get_session().get_service_model("sagemaker")


def _faults(shape: Any, value: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Where, what and how to mend it, depth first."""
    if not isinstance(value, _TYPES.get(shape.type_name, object)):
        return  # which botocore's validator says
    bounds = shape.metadata
    if shape.type_name == "structure":
        for name, member in value.items():
            if name in shape.members:
                yield from _faults(shape.members[name], member, f"{path}.{name}" if path else name)
        return
    if shape.type_name == "string":
        if (choices := bounds.get("enum")) and value not in choices:
            near = difflib.get_close_matches(value, choices, n=3, cutoff=0.5)
            yield path, f"there is no {value}", f"did you mean {', '.join(near)}?" if near else ", ".join(choices[:8])
        if (pattern := bounds.get("pattern")) and not regex.fullmatch(pattern, value):
            yield path, f"{value!r} is not as SageMaker writes it", f"it must match {pattern}"
    sized = shape.type_name in ("string", "list", "map")
    size = len(value) if sized else value
    if isinstance(size, int) and not isinstance(size, bool):
        unit = {"string": " characters", "list": " items", "map": " items"}.get(shape.type_name, "")
        if "min" in bounds and size < bounds["min"]:
            yield path, f"{size}{unit} are too few" if sized else f"{size} is too small", f"{bounds['min']} at least"
        if "max" in bounds and size > bounds["max"]:
            yield path, f"{size}{unit} are too many" if sized else f"{size} is too large", f"{bounds['max']} at most"
    if shape.type_name == "list":
        for index, item in enumerate(value):
            yield from _faults(shape.member, item, f"{path}[{index}]")
    if shape.type_name == "map":
        for name, item in value.items():
            yield from _faults(shape.key, name, f"{path}.{name}")
            yield from _faults(shape.value, item, f"{path}.{name}")
