"""Errors that are the user's to fix: the command line prints their one line and exits with code 2."""


class UserError(Exception):
    """A mistake in input or configuration; the message is one line that names the value and the fix."""


class MissingExtra(UserError):
    """An optional package is not installed.

    Args:
        package: the module that could not be imported.
        extra: the extra of videodit that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: run pip install 'videodit[{extra}]'")
