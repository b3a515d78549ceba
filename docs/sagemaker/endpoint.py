"""A SageMaker endpoint for an exported model that lies uncompressed in S3, served by AWS's vLLM image.

    python docs/sagemaker/endpoint.py NAME s3://BUCKET/tsumugu/RUN/output/JOB/output/model IMAGE ROLE INSTANCE_TYPE

It costs money until `aws sagemaker delete-endpoint --endpoint-name NAME`.
"""

import json
import sys


def requests(name: str, model: str, image: str, role: str, instance_type: str, longest: int = 2048) -> dict[str, dict]:
    """The three requests by operation, in their order.

    Args:
        name: Of model, configuration and endpoint.
        model: S3 URI of the Hugging Face folder.
        image: URI of a vLLM image for SageMaker, which makes flags of vLLM from variables SM_VLLM_…
        role: ARN of a role that may read the model and pull the image.
        instance_type: Such as ml.g5.xlarge.
        longest: Tokens of prompt and answer together.
    """
    source = {"S3Uri": f"{model.rstrip('/')}/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    variables = {"SM_VLLM_MODEL": "/opt/ml/model", "SM_VLLM_MAX_MODEL_LEN": str(longest)}
    container = {"Image": image, "ModelDataSource": {"S3DataSource": source}, "Environment": variables}
    variant = {
        "VariantName": "all",
        "ModelName": name,
        "InitialInstanceCount": 1,
        "InstanceType": instance_type,
        "ModelDataDownloadTimeoutInSeconds": 1800,
        "ContainerStartupHealthCheckTimeoutInSeconds": 1800,
    }
    return {
        "CreateModel": {"ModelName": name, "PrimaryContainer": container, "ExecutionRoleArn": role},
        "CreateEndpointConfig": {"EndpointConfigName": name, "ProductionVariants": [variant]},
        "CreateEndpoint": {"EndpointName": name, "EndpointConfigName": name},
    }


def main() -> None:
    import boto3

    name = sys.argv[1]
    made = requests(*sys.argv[1:])
    sagemaker = boto3.client("sagemaker")
    sagemaker.create_model(**made["CreateModel"])
    sagemaker.create_endpoint_config(**made["CreateEndpointConfig"])
    sagemaker.create_endpoint(**made["CreateEndpoint"])
    sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=name)
    asked = {"prompt": "日本の首都は", "max_tokens": 32, "temperature": 0}
    answer = boto3.client("sagemaker-runtime").invoke_endpoint(
        EndpointName=name, ContentType="application/json", Body=json.dumps(asked)
    )
    print(answer["Body"].read().decode())


if __name__ == "__main__":
    main()
