"""One tree of errors; each carries its exit code and three lines: what, why, what to do.

A library call raises one of these for everything a user can cure; anything else is an internal
error (exit code 1).
"""

from __future__ import annotations


class SlimportError(Exception):
    """Base of every error shown to a user.

    Args:
        what: the thing that failed, with its name and numbers.
        why: the reason.
        cure: what to do or run instead.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, cure: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.what}\n{self.why}\n{self.cure}"

    def __reduce__(self) -> tuple[type[SlimportError], tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.cure)


class UsageError(SlimportError):
    """A wrong flag, a wrong recipe key, or a path that does not exist."""

    exit_code = 2


class BudgetExceeded(SlimportError):
    """A measured value is over its budget."""

    exit_code = 3


class ValidationFailed(SlimportError):
    """Accuracy floor, tokenizer conformance or read-back did not hold."""

    exit_code = 4


class Unsupported(SlimportError):
    """A combination that a container or runtime cannot hold exactly."""

    exit_code = 5


class DependencyMissing(SlimportError):
    """A library or SDK is absent or has another version than the one it needs."""

    exit_code = 6


class BadInput(SlimportError):
    """Input that is unreadable, corrupt, unsafe or inconsistent with itself."""

    exit_code = 7


class EnvironmentFailed(SlimportError):
    """The machine refused: disk full, read-only folder, network."""

    exit_code = 8


def worst(codes: list[int]) -> int:
    """The exit code for several failures together: 7 > 5 > 4 > 3, then any other, then 0."""
    for code in (7, 5, 4, 3):
        if code in codes:
            return code
    return max(codes, default=0)
