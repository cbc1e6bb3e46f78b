"""Expected failures: each is one `error:` line, one `hint:` line and an exit code."""

import difflib
from collections.abc import Iterable


class LtnormError(Exception):
    """A failure that a user can mend. `message` says what is wrong, `hint` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # From a worker: an exception is made anew of what its own constructor was given.
        return type(self), (self.message, self.hint)


class UsageError(LtnormError):
    """A wrong flag, recipe or path, found before work starts."""

    exit_code = 2


class NothingFound(LtnormError):
    """There is nothing to compare or to evaluate."""

    exit_code = 3


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint that lists `choices`, led by the one nearest to `word`."""
    choices = list(choices)
    if not choices:
        return "there is nothing to choose from here"
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    known = f"choose from {', '.join(choices)}"
    return f"did you mean '{near[0]}'? {known}" if near else known
