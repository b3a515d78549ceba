"""Real text beside the repository, for tests that skip where it is absent."""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
AOZORA = SHARED / "aozora-public-domain.jsonl.gz"
