"""What looks like a credential is shown nowhere, and nothing else is hidden."""

import pickle

import pytest

from tsumugu.errors import UserError, redact

SECRETS = [
    "hf_" + "aB3" * 11,
    "AKIA" + "ABCDEFGH12345678",
    "sk-proj-" + "x1Y2" * 10,
    "ghp_" + "0a1B" * 9,
    "github_pat_" + "11AA_bb22" * 4,
]


@pytest.mark.parametrize("secret", SECRETS)
def test_tokens_are_recognised_wherever_they_stand(secret: str):
    for text in ("{}", "path/{}/file", "the key '{}', which", "x={}\n"):
        assert secret not in redact(text.format(secret))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa55@host/path", "https://[redacted]@host/path"),
        ("s3://bucket/a?X-Amz-Signature=abc&part=1", "s3://bucket/a?X-Amz-Signature=[redacted]&part=1"),
        ("https://host/a?sig=abc%2F&sv=1", "https://host/a?sig=[redacted]&sv=1"),
        ("https://host/a?token=t0p, next", "https://host/a?token=[redacted], next"),
        ("client_secret=abc api_key=def", "client_secret=[redacted] api_key=[redacted]"),
    ],
)
def test_of_urls_and_pairs_only_the_secret_goes(text: str, shown: str):
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "--train.max_tokens=1000 --tokenizer.path=tokens/ja",
        "hf://datasets/someone/corpus",
        "rows/task-with-a-long-name-that-is-only-a-name-0123456789",
        "s3://bucket/prefix@v2/data",
        "RUN@100",
        "https://host/a?sort=key",
    ],
)
def test_what_is_no_credential_stays(text: str):
    assert redact(text) == text


def test_an_error_shows_none_and_travels_between_processes():
    error = UserError(f"no model {SECRETS[0]}", "try https://me:secret@host")
    for shown in (error, pickle.loads(pickle.dumps(error))):
        assert str(shown) == "no model [redacted] (try https://[redacted]@host)"
