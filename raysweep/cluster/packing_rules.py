"""Which files stay out of a package: hidden files, files that hold keys or passwords, and links out of a folder."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from fnmatch import translate
from pathlib import Path

from raysweep.images.formats import IMAGE_SUFFIXES

# Folders and files that a package never needs, and that .gitignore may not list.
UNNEEDED = frozenset({"venv", "__pycache__", "mlruns", "mlartifacts", "mlflow.db", "node_modules"})

# Lower-case patterns of names without a leading dot; a name with one is hidden, and stays out for that.
KEY_FILES = (
    "*secret*", "*credential*", "*creds*", "*passw*d*", "*passphrase*", "*apikey*", "*api_key*", "*api-key*",
    "*private_key*", "*private-key*", "*accesskey*", "*access_key*", "*access-key*",
    # keys and certificates with keys
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "ssh_host_*", "*.pem", "*.der", "*.key", "*.ppk", "*.p8", "*.p12",
    "*.pfx", "*.pk8", "*.jks", "*.jceks", "*.bks", "*.keystore", "*.kdb", "*.kdbx", "*.keychain*", "*.keytab",
    "krb5cc*", "*_rsa", "*-rsa", "*_ed25519", "*-ed25519", "*.gpg", "*.pgp", "*.asc", "secring*", "*.age", "*.jwk",
    "*.jwks", "*.ovpn", "wallet.dat", "*_key", "*-key", "*_key.json", "*-key.json", "*_key.txt", "*-key.txt",
    "key.json", "key.txt", "keys.json", "keys.txt", "keys.y*ml", "keys.toml", "keyfile*", "rootkey*",
    # tokens; weights have tokenizer.json and added_tokens.json
    "token", "token.*", "tokens", "tokens.*", "*_token", "*-token", "*_token.*", "*-token.*", "*.token", "cookie*.txt",
    "cookies.json", "cookies.sqlite", "auth.json", "auth.toml", "oauth*.json", "client_id*.json", "*_pat.txt",
    "pat.txt", "pass.txt", "pw.txt", "pwd.txt", "login.txt", "logins.json", "*_history",
    # clouds, clusters and infrastructure
    "*service-account*", "*service_account*", "*serviceaccount*", "*firebase-adminsdk*", "accesstokens.json",
    "access_tokens.db", "azureauth*", "*.publishsettings", "msal_token_cache*", "boto", "boto.cfg", "s3cfg*",
    "aws_config", "rclone.conf*", "azureprofile.json", "google-services.json", "connection_string*", "kaggle.json",
    "*kubeconfig*", "*kube.config", "admin.conf", "vault.json", "vault.y*ml", "docker-config.json",
    "registry-auth.json", "kube_config*", "kube-config*", "k3s.yaml", "*dockercfg*", "*dockerconfig*", "*.tfstate",
    "*.tfstate.*", "*.tfvars", "*.tfvars.*", "*vault*pass*", "htpasswd*", "shadow",
    # settings of programs, without the dot that hides them
    "env", "*.env", "*.env.*", "env.local", "*netrc*", "*pgpass*", "*npmrc", "*yarnrc*", "*pypirc", "my.cnf",
    "database.ini", "db.ini", "wp-config.php", "local_settings.py", "settings_local.py",
)  # fmt: skip
KEY_FILE = re.compile("|".join(translate(pattern) for pattern in KEY_FILES))
KEY_FOLDERS = frozenset({"secret", "secrets", "credentials", "private_keys", "private-keys", "keys.d"})
MAX_SEARCHED = 2**16  # bytes: a file with a key or token is small
# Private keys, and tokens that begin as no other text does: those of AWS, GitHub, GitLab, Hugging Face, Google, Slack,
# PyPI, npm and OpenAI.
KEY_TEXT = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----|PuTTY-User-Key-File-|AGE-SECRET-KEY-1[A-Z0-9]"
    rb"|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{22}|\bglpat-[\w-]{20}"
    rb"|\bhf_[A-Za-z0-9]{30}|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10}|\bpypi-AgE[\w-]{30}|\bnpm_[A-Za-z0-9]{36}"
    rb"|\bsk-(proj|ant)-[\w-]{40}|\bsk-[A-Za-z0-9]{40}|(?i:aws_secret_access_key\"?\s*[=:]\s*\"?[A-Za-z0-9/+]{40})"
    rb"|\"type\":\s*\"(service_account|authorized_user)\""
)
# Of images, tables and weights: a link may lead out of a folder that the experiment names to files of these kinds only.
LINKED = (*IMAGE_SUFFIXES, ".csv", ".tsv", ".jsonl", ".parquet", ".json", ".safetensors", ".bin")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

HIDDEN, KEYS, NOT_NEEDED = "hidden", "may hold keys or passwords", "results, caches and environments"
OUTSIDE, OTHER_LINK = "links out of the folder", "links to what is not packed"


def reason_to_leave_out(name: str, path: Path) -> str | None:
    """Returns why a file stays out of the package, by its name in the folder and its content, or None."""
    if reason := reason_of_name(name.split("/")):
        return reason
    return KEYS if not _is_image(name) and _holds_key(path) else None


def reason_of_name(parts: list[str]) -> str | None:
    """Returns why a file stays out of the package, by the parts of its name, or None."""
    if UNNEEDED & set(parts):
        return NOT_NEEDED
    if any(part.startswith(".") for part in parts):
        return HIDDEN
    if _is_image(parts[-1]):  # a picture of a class called "token" is data
        return None
    is_key = KEY_FILE.match(parts[-1].lower()) is not None
    return KEYS if is_key or KEY_FOLDERS & {part.lower() for part in parts[:-1]} else None


def reason_in_named_folder(path: Path, folder: Path) -> str | None:
    """Returns why a file below a folder that the user has named stays out of the package, or None.

    A link may lead out of such a folder, to where the images or weights lie. It may not lead to a file of another kind:
    whoever wrote the folder chose the target, as in `cat/1.png -> ~/.aws/credentials`.
    """
    if not path.is_relative_to(folder):  # a table names it, which is checked elsewhere
        return None
    name = path.relative_to(folder).as_posix()
    reason = None if _is_image(name) else reason_to_leave_out(name, path)
    if reason or not is_reached_by_link(folder, name):
        return reason
    root, real = os.path.realpath(folder), Path(os.path.realpath(path))
    parts = [part for part in Path(os.path.relpath(real, root)).parts if part != ".."]
    if real.parent.name == "blobs" and HASH.fullmatch(real.name):  # of the Hugging Face cache: weights without suffix
        return None
    suffix = real.suffix.lower()
    is_other_kind = suffix != path.suffix.lower() or (suffix not in LINKED and not real.is_relative_to(root))
    return OTHER_LINK if is_other_kind or (not _is_image(real.name) and reason_of_name(parts)) else None


def follow_links(folder: Path, links: Iterable[str], kept: Collection[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Follows links to files and folders that are packed themselves.

    Args:
        folder: The folder that is packed.
        links: Relative names of links, and of files that are reached by links.
        kept: Relative names of the files that are packed, which are no links.

    Returns:
        Files to pack by name, and reasons by name of the links that stay out.
    """
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    ordered = sorted(kept)
    root = os.path.realpath(folder)
    for name in links:
        real = Path(os.path.realpath(folder / name))
        if not real.is_relative_to(root):
            left_out[name] = OUTSIDE
            continue
        target = real.relative_to(root).as_posix()
        # In this order, all names below a folder lie between its name with "/" and with "0", the next character.
        within = ordered[bisect_left(ordered, f"{target}/") : bisect_left(ordered, f"{target}0")]
        if target in kept:
            files[name] = real
        elif within:
            files |= {f"{name}/{inner[len(target) + 1 :]}": folder / inner for inner in within}
        else:
            left_out[name] = OTHER_LINK
    return files, left_out


def is_reached_by_link(folder: Path, name: str) -> bool:
    """Returns whether a file, or a folder above it within `folder`, is a symbolic link."""
    return os.path.realpath(folder / name) != os.path.join(os.path.realpath(folder), *name.split("/"))


def grouped(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the names that stay out by reason. Of a hidden folder, only the folder is named."""
    groups: dict[str, set[str]] = {}
    for name, reason in left_out.items():
        parts = name.split("/")
        cut = next((n for n, part in enumerate(parts[:-1]) if part.startswith(".") or part in UNNEEDED), None)
        shown = name if cut is None or reason not in (HIDDEN, NOT_NEEDED) else "/".join([*parts[: cut + 1], ""])
        groups.setdefault(reason, set()).add(shown)
    return {reason: sorted(names) for reason, names in sorted(groups.items())}


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _holds_key(path: Path) -> bool:
    try:
        if path.stat().st_size > MAX_SEARCHED or not path.is_file():
            return False
        return KEY_TEXT.search(path.read_bytes()) is not None
    except OSError:  # it cannot be packed either, which is said then
        return False
