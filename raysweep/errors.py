"""The errors a user can meet, and the wording they share.

Every message names the key or file, the value found, and what would be accepted. `assert` guards our own
invariants; these classes are for what a user can mend.
"""

import difflib
from collections.abc import Iterable


class RaysweepError(Exception):
    """Root of every error that raysweep raises on purpose."""


class ConfigError(RaysweepError):
    """The experiment file, or a command-line override of it, is wrong."""


class DataError(RaysweepError):
    """The images, labels or splits cannot be used as they are."""


class EncoderError(RaysweepError):
    """An encoder, its weights or its preprocessing cannot be loaded."""


class ResourceError(RaysweepError):
    """The machine or cluster lacks what the experiment asks for."""


class TrialError(RaysweepError):
    """Training failed in a way that leaves a study without a result."""


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """Returns `"did you mean 'x'?"` for the nearest accepted word, else the list of what is accepted."""
    choices = sorted(str(choice) for choice in accepted)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"accepted: {', '.join(choices)}"
