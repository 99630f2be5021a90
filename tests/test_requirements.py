"""The lists of requirements agree with each other, and none of them allows a version with a known advisory."""

import re
import tomllib
from importlib import util
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from raysweep.cluster.package import requirements

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def pins(name):
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (REPOSITORY / name).read_text(), re.M)
    return {canonicalize_name(package): Version(version) for package, version in lines}


def advisories():
    page = (REPOSITORY / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| ([\w./-]+) \| ([<>=\d.,]+) \| ((?:CVE|PYSEC|GHSA)-.*) \|$", page, re.M)
    assert len(rows) > 10
    return [(package, SpecifierSet(affected)) for package, affected, _ in rows]


def images():
    """The images of compose.yaml and their versions."""
    services = yaml.safe_load((REPOSITORY / "cluster" / "mlflow" / "compose.yaml").read_text())["services"]
    named = [
        re.search(r":-(.+):(.+)\}", service["image"]).groups() for service in services.values() if "image" in service
    ]
    return {image: Version(tag) for image, tag in named}


def floors():
    """The lowest versions that pyproject.toml takes."""
    found = {}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        (floor,) = requirement.specifier
        assert floor.operator == ">=", text
        found[canonicalize_name(requirement.name)] = Version(floor.version)
    return found


VERSIONS = {
    "pins": pins("constraints.txt"),
    "lock": pins("requirements.lock"),
    "lowest": floors(),
    "images": images(),
}


@pytest.mark.parametrize("versions", VERSIONS.values(), ids=VERSIONS)
def test_no_version_has_an_advisory(versions):
    affected = [
        (name, str(found)) for name, range_ in advisories() if (found := versions.get(name)) and found in range_
    ]
    assert affected == []


def test_the_list_knows_what_was_affected():
    """The versions that were here before."""
    before = {"torch": "2.6", "pillow": "11", "pyarrow": "20", "gunicorn": "26.2.0", "postgres": "16.4",
              "chrislusf/seaweedfs": "3.80"}  # fmt: skip
    known = {name for name, range_ in advisories() if name in before and Version(before[name]) in range_}
    assert known == set(before)
    named = {name for name, _ in advisories()}
    assert named <= {*pins("constraints.txt"), *images()}, "and of everything else nothing is said"


def test_pins_are_what_pyproject_takes():
    pinned = pins("constraints.txt")
    assert {name for name, floor in floors().items() if pinned[name] < floor} == set()


def test_the_lock_has_the_pins_with_their_hashes():
    locked, pinned = pins("requirements.lock"), pins("constraints.txt")
    assert {name: version for name, version in locked.items() if pinned.get(name, version) != version} == {}
    needed = {line.partition("==")[0] for line in requirements(REPOSITORY / "constraints.txt")} | {"ray"}
    assert needed <= set(locked), "make lock"
    blocks = re.split(r"^(?=[\w.-]+==)", (REPOSITORY / "requirements.lock").read_text(), flags=re.M)[1:]
    assert len(blocks) == len(locked)
    assert [block.partition("\n")[0] for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}", block)] == []


def test_the_table_of_licences_is_that_of_the_pins():
    spec = util.spec_from_file_location("licences", REPOSITORY / "docs" / "licences.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (REPOSITORY / "docs" / "licences.md").read_text()
    listed = dict(re.findall(r"^\| ([\w.-]+) \| ([^|]+) \| [^|]+ \|$", page, re.M))
    needed = dict(line.split("==") for line in requirements(REPOSITORY / "constraints.txt"))
    assert {name: version for name, version in needed.items() if listed.get(name) != version} == {}, "make licences"
    assert "not named" not in page
    assert module.licence("pytest") == "MIT"
