import io
import pickle

import pytest

from raysweep.errors import ConfigError, DataError, RaysweepError, has_secrets, hide_secrets, print_output, printable

SECRETS = {
    "s3://KEY:SEC/RET@bucket/x": "s3://...@bucket/x",
    "found s3://KEY:SECRET@b, and more": "found s3://...@b, and more",
    "http://TOKEN@host/x": "http://...@host/x",
    "https://:TOKEN@host:5000": "https://...@host:5000",
    "postgresql://user:pass@word@host/db": "postgresql://...@host/db",
    "postgresql+psycopg://user:pw@host/db": "postgresql+psycopg://...@host/db",
    "postgresql://host/db?user=a&passwd=x&sslmode=require": "postgresql://host/db?user=a&passwd=...&sslmode=require",
    "s3://b/k?region=eu&secret_key=abc": "s3://b/k?region=eu&secret_key=...",
    "http://h/callback#access_token=abc": "http://h/callback#access_token=...",
    "http://h/x?user=a&pass=abc;jwt=def": "http://h/x?user=a&pass=...;jwt=...",
    "header Authorization: Bearer abcdefgh.1": "header Authorization: Bearer ...",
    "https://account.blob/x?sv=1&sig=abc": "https://account.blob/x?sv=1&sig=...",
}
NO_SECRETS = [
    "s3://anonymous@bucket/x", "gs://bucket/a@b.jpg", "http://host:5000/a@b", "postgresql://user@host:5432/db",
    "postgresql://h/d?sslmode=require&passfile=/home/u/.pgpass", "s3://b/x?endpoint_override=h:90&scheme=http",
    "sqlite:///mlflow.db", "the bearer of bad news", "mail a@b.org about x?y=1", "accepted: postgresql://user@host:port/name",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_the_credentials_of_a_uri_are_hidden(text):
    assert hide_secrets(text) == SECRETS[text]
    assert has_secrets(text)


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_is_shown(text):
    assert hide_secrets(text) == text
    assert not has_secrets(text)


def test_a_secret_spelt_with_percent_signs_is_one():
    assert has_secrets("s3://b/x?%73ecret_key=abc")


def test_no_error_shows_credentials_and_errors_travel():
    error = pickle.loads(pickle.dumps(DataError("s3://KEY:SECRET@b: no such bucket")))
    assert str(error) == "s3://...@b: no such bucket"
    assert str(ConfigError(ValueError("http://u:p@h"))) == "http://...@h"


STEERING = ["\x1b[31m", "\x07", "\r", "\t", "\x00", "\x9b", "\u202e", "\u2066", "\u200f", "\u2028", "\ufeff", "\udcff"]


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_what_would_steer_a_terminal_is_written_out(text):
    shown = printable(f"a{text}b")
    assert shown == f"a{ascii(text)[1:-1]}b"
    assert shown.isprintable()
    assert str(RaysweepError(f"label 'a{text}b'")) == f"label 'a{ascii(text)[1:-1]}b'"


@pytest.mark.parametrize("text", ["", "cat", "Müsli 日本語", "[red]", ":smile:", "👩‍🚀", "نه‌خواه", "a\\nb"])
def test_what_can_be_read_stays(text):
    assert printable(text) == text


def test_an_error_keeps_its_lines():
    assert str(RaysweepError("two problems:\n  one\n  two\x1b")) == "two problems:\n  one\n  two\\x1b"


def test_output_is_escaped_where_an_encoding_lacks_its_characters(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    print_output("caf\u00e9 \u65e5")
    assert written.getvalue() == b"caf\\xe9 \\u65e5\n"


def test_output_on_a_full_disk_is_an_error(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(RaysweepError, match=r"the output cannot be written to \(No space left"):
            print_output("result")
