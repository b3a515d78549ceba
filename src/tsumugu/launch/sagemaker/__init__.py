"""SageMaker: on the user's machine a request and what follows from it; in the container the way to torchrun.

Of the user's machine: command.py (flags), site.py (the platform team's file), request.py (from both and the recipe),
check.py (the request against botocore's own model), package.py (code for the container), service.py (calls of AWS).
In the container: start.sh, container.py, gather.py.
"""

INTERRUPTED_REASON = "interrupted before its end"  # begins the failure reason of a run that goes on from a checkpoint
