"""The one kind of error that is the user's: what is wrong, where, and how to mend it; and what no text may show.

Everything else that goes wrong is a defect or the machine, and shows its traceback.
"""

import re

# Formats that their issuers document: Hugging Face, AWS, GitHub, OpenAI and Anthropic (sk-), Slack, Google
_TOKENS = (
    r"hf_[A-Za-z0-9]{20,}",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    r"gh[pousr]_[A-Za-z0-9]{20,}",
    r"github_pat_[A-Za-z0-9_]{20,}",
    r"sk-[A-Za-z0-9_-]{32,}",
    r"xox[abeprs]-[A-Za-z0-9-]{10,}",
    r"AIza[A-Za-z0-9_-]{35}",
)
_CREDENTIAL = re.compile(
    rf"(?P<before>://)[^\s/@?#]+(?=@)"  # user:password@ in a URL
    rf"|(?P<key>[\w-]*(?:token|secret|password|passwd|signature|credential|(?:api|access|secret)[_-]?key)=)[^\s&;,'\"]+"
    rf"|(?P<query>[?&](?:sig|key)=)[^\s&;,'\"]+"
    rf"|(?<![A-Za-z0-9])(?:{'|'.join(_TOKENS)})(?![A-Za-z0-9])",
    re.IGNORECASE,
)
REDACTED = "[redacted]"


def redact(text: str) -> str:
    """`text` with whatever looks like a credential replaced.

    That is: tokens in the formats of Hugging Face, AWS, GitHub, OpenAI, Anthropic, Slack and Google; the user part of a
    URL; and the values of what is called token, secret, password, signature, credential or key in `name=value`.
    """
    return _CREDENTIAL.sub(lambda found: next(filter(None, found.groups()), "") + REDACTED, text)


class UserError(Exception):
    """Input that cannot be used. The command line prints it as one line and exits with 2.

    Args:
        message: What is wrong and where (the file, the key, the value); credentials in it are redacted.
        hint: How to mend it.
    """

    def __init__(self, message: str, hint: str = ""):
        self.message, self.hint = redact(message), redact(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
