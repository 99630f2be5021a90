"""Prints the table of licences of raysweep's requirements, from the metadata of the installed packages."""

from importlib.metadata import distribution
from pathlib import Path

from raysweep.cluster.package import requirements

HEADER = """# Licences of the requirements

Made by `make licences` from the metadata of the installed packages: raysweep's direct and indirect requirements, with
the versions of constraints.txt. raysweep itself is under the MIT licence. On Linux with a GPU, torch also installs
NVIDIA's CUDA libraries, which are under NVIDIA's own licence, and triton (MIT).

| package | version | licence |
|---|---|---|
"""
MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"
LONGEST = 60  # characters: some packages give the whole text of their licence


def licence(name: str) -> str:
    """Returns the licence of a package: as an expression, by its classifiers, a short name, or the text of a file."""
    package = distribution(name)
    metadata = package.metadata
    classified = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") or () if "License ::" in text]
    classified = [text for text in classified if text != "OSI Approved"]
    short = (metadata.get("License") or "").strip()
    if named := metadata.get("License-Expression") or ", ".join(classified):
        return named.replace("|", "/")
    if short and len(short) <= LONGEST and "\n" not in short:
        return short.replace("|", "/")
    texts = [file.read_text() for file in package.files or () if file.name.upper().startswith(("LICENSE", "LICENCE"))]
    return "MIT, by its text" if any(MIT in " ".join(text.split()) for text in texts) else "not named"


def table() -> str:
    """Returns the page."""
    pinned = requirements(Path(__file__).parents[1] / "constraints.txt")
    names = sorted([*(line.partition("==")[::2] for line in pinned), ("ray", distribution("ray").version)])
    return HEADER + "".join(f"| {name} | {version} | {licence(name)} |\n" for name, version in names)


if __name__ == "__main__":
    print(table(), end="")
