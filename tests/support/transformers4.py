"""Where transformers 4.57 is, which must read what this version writes."""

import os
from pathlib import Path

import pytest


def transformers4() -> str:
    """The python of an environment with transformers 4.57."""
    here = Path(__file__).parents[2] / ".venv-transformers4" / "bin" / "python"
    python = os.environ.get("TSUMUGU_TRANSFORMERS4") or (str(here) if here.exists() else None)
    if python is None:
        pytest.skip(
            "no transformers 4.57: `make .venv-transformers4` makes it, or name a python in TSUMUGU_TRANSFORMERS4"
        )
    return python
