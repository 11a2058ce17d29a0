#!/usr/bin/env python3
"""Checks that the Rust versions named in the project agree with each other and with the requirements of its dependencies.

`rust-version` in Cargo.toml must be at least that of every dependency that is part of the program, and not newer than the
toolchain in rust-toolchain.toml. Clippy's incompatible_msrv checks pathmeter's own code.
"""

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def version(text):
    """A version as three numbers; missing ones are 0."""
    numbers = [int(number) for number in text.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


def first_match(file, pattern):
    match = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    if not match:
        sys.exit(f"error: {file}: no match for {pattern!r}; correct the pattern in scripts/check-rust-version.py")
    return match[1]


def packages_of_program(metadata):
    """IDs of all packages that the program contains or is built with: everything but development dependencies."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    found, queue = set(), [metadata["resolve"]["root"]]
    while queue:
        package = queue.pop()
        if package in found:
            continue
        found.add(package)
        for dependency in nodes[package]["deps"]:
            if any(kind["kind"] != "dev" for kind in dependency["dep_kinds"]):
                queue.append(dependency["pkg"])
    return found


def problems():
    wanted = first_match("Cargo.toml", r'^rust-version = "([\d.]+)"')
    toolchain = first_match("rust-toolchain.toml", r'^channel = "([\d.]+)"')
    image = first_match("deploy/docker/Dockerfile", r"^ARG RUST_VERSION=([\d.]+)")
    readme = first_match("README.md", r"Rust ([\d.]+) or newer")
    if version(toolchain) < version(wanted):
        yield f"rust-toolchain.toml: {toolchain} is older than rust-version {wanted} of Cargo.toml; use a newer toolchain"
    if not f"{toolchain}.".startswith(f"{image}."):
        yield f"deploy/docker/Dockerfile: RUST_VERSION is {image}; use that of rust-toolchain.toml, {toolchain}"
    if readme != wanted:
        yield f"README.md: names Rust {readme}, but Cargo.toml has rust-version {wanted}"
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--all-features"]
    metadata = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    program = packages_of_program(metadata)
    for package in metadata["packages"]:
        needed = package["rust_version"]
        if package["id"] in program and needed and version(needed) > version(wanted):
            yield (
                f"Cargo.toml: rust-version is {wanted}, and {package['name']} {package['version']} needs {needed}; "
                "raise it, or use an older version of that package"
            )


def main():
    found = list(problems())
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if found:
        sys.exit(1)
    print("the Rust versions agree with each other and with the dependencies")


if __name__ == "__main__":
    main()
