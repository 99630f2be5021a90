"""The errors that a user can see, and a helper for their messages.

Every message names the key or file, the value found, and the accepted values. These classes are for problems that a
user can fix. `assert` checks our own invariants.
"""

import difflib
from collections.abc import Iterable


class RaysweepError(Exception):
    """Base class of every error that raysweep raises on purpose."""


class ConfigError(RaysweepError):
    """The experiment file, or a command-line override of it, is wrong."""


class DataError(RaysweepError):
    """The images, labels or splits cannot be used."""


class EncoderError(RaysweepError):
    """An encoder, its weights or its preprocessing cannot be loaded."""


class ResourceError(RaysweepError):
    """The machine or cluster does not have what the experiment needs."""


class TrialError(RaysweepError):
    """Training failed, and the study has no result."""


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """Returns `"did you mean 'x'?"` for the most similar accepted word, else the list of accepted words."""
    choices = sorted(str(choice) for choice in accepted)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"accepted: {', '.join(choices)}"
