"""The one kind of error that is the user's: what is wrong, where, and how to mend it.

Everything else that goes wrong is a defect or the machine, and shows its traceback.
"""


class UserError(Exception):
    """Input that cannot be used. The command line prints it as one line and exits with 2.

    Args:
        message: What is wrong and where (the file, the key, the value).
        hint: How to mend it.
    """

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
