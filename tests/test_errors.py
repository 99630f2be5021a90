import pickle

import pytest

from raysweep.errors import ConfigError, DataError, has_secrets, hide_secrets

SECRETS = {
    "s3://KEY:SEC/RET@bucket/x": "s3://...@bucket/x",
    "found s3://KEY:SECRET@b, and more": "found s3://...@b, and more",
    "http://TOKEN@host/x": "http://...@host/x",
    "https://:TOKEN@host:5000": "https://...@host:5000",
    "postgresql://user:pass@word@host/db": "postgresql://...@host/db",
    "postgresql+psycopg://user:pw@host/db": "postgresql+psycopg://...@host/db",
    "postgresql://host/db?user=a&passwd=x&sslmode=require": "postgresql://host/db?user=a&passwd=...&sslmode=require",
    "s3://b/k?region=eu&secret_key=abc": "s3://b/k?region=eu&secret_key=...",
    "https://account.blob/x?sv=1&sig=abc": "https://account.blob/x?sv=1&sig=...",
}
NO_SECRETS = [
    "s3://anonymous@bucket/x", "gs://bucket/a@b.jpg", "http://host:5000/a@b", "postgresql://user@host:5432/db",
    "postgresql://h/d?sslmode=require&passfile=/home/u/.pgpass", "s3://b/x?endpoint_override=h:90&scheme=http",
    "sqlite:///mlflow.db", "mail a@b.org about x?y=1", "accepted: postgresql://user@host:port/name",
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
