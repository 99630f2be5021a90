"""The errors that a user can see, and helpers for their messages.

Every message names the key or file, the value found, and the accepted values. These classes are for problems that a
user can fix. `assert` checks our own invariants.
"""

import difflib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

# The end of messages about what stops a sweep from outside.
KEPT = "what is finished is kept, and the same command goes on from here"

# What stands before the host of a URI; a user name alone is no secret in a database's URI.
_USER_OF_URI = re.compile(r"(?<=://)(?!anonymous@)([^\s/'\"@:]*:(?!\d+/)[^\s'\"]*|[^\s/'\"]*)@")
_DATABASE_USER = re.compile(r"\b(?:postgresql|postgres|mysql|mssql|oracle)[\w+]*://[^\s/:'\"@]*@")
_SECRET_NAME = (
    r"[\w.-]*(?:passw|pwd|secret|token|credential|signature|api_?key|access_?key|auth)[\w.-]*|sig|key|pass|pw|jwt"
)
_SECRET_OF_QUERY = re.compile(rf"(?i)([?&;#](?:{_SECRET_NAME})=)[^&;\s'\"]+")
_BEARER = re.compile(r"(?i)\b(bearer +)[\w.~+/=-]{8,}")


class RaysweepError(Exception):
    """Base class of every error that raysweep raises on purpose.

    Its message never has a URI's credentials, nor characters that would steer a terminal.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(hide_secrets(str(message)), keep="\n"))


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


def one_line(error: object, max_length: int | None = None) -> str:
    """Returns the message of an error of another library, without its line breaks, for use in our messages."""
    return " ".join(str(error).split())[:max_length]


def hide_secrets(text: str) -> str:
    """Returns a text in which the credentials of each URI, and bearer tokens, are replaced by `...`."""
    kept = [match.span() for match in _DATABASE_USER.finditer(text)]
    hidden = _USER_OF_URI.sub(lambda match: match.group() if _is_within(match, kept) else "...@", text)
    return _BEARER.sub(r"\1...", _SECRET_OF_QUERY.sub(r"\1...", hidden))


def has_secrets(uri: str) -> bool:
    """Returns whether a URI holds credentials: a user with a password, a token, or a query that names a secret."""
    return hide_secrets(unquote(uri)) != unquote(uri)


def _is_within(match: re.Match[str], spans: list[tuple[int, int]]) -> bool:
    return any(start <= match.start() and match.end() <= end for start, end in spans)


def printable(text: str, keep: str = "") -> str:
    r"""Returns a text in which characters that steer a terminal, or are not seen on it, are written as `\x1b`.

    Names of files and classes may contain such characters: escape sequences, line breaks, and marks that reverse the
    direction of what follows.

    Args:
        text: any text.
        keep: characters that stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if character in keep or not _steers(character) else ascii(character)[1:-1] for character in text
    )


def _steers(character: str) -> bool:
    # Cc control, Cf format (without joiners, which scripts and emoji need), Cs lone surrogate, Zl and Zp line breaks.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def print_output(text: str) -> None:
    """Prints a result to stdout; characters that its encoding lacks are escaped.

    Raises:
        RaysweepError: nobody reads it any more, as of `| head`, or the disk is full.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        # What is left in the buffer goes nowhere, or Python would try again when it ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        raise RaysweepError(f"the output cannot be written to ({error.strerror})") from error


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """Returns `"did you mean 'x'?"` for the most similar accepted word, else the list of accepted words."""
    choices = sorted(str(choice) for choice in accepted)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"accepted: {', '.join(choices)}"
