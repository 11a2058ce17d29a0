"""Shared functions of the scripts that run agents in namespaces."""

import os
import pathlib
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Downloads and build results shared by all working copies. Names below it contain versions.
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pathmeter"


def program():
    """Path of a built pathmeter."""
    found = os.environ.get("PATHMETER")
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    for path in [pathlib.Path(found)] if found else [target / "debug/pathmeter", target / "release/pathmeter"]:
        if path.exists():
            return path
    sys.exit("error: no pathmeter binary: run cargo build, or set PATHMETER")


def run(*command, **options):
    """Runs a command that must succeed."""
    return subprocess.run([str(part) for part in command], check=True, **options)


def again_in_namespaces(*arguments):
    """Runs this script again in new network and mount namespaces, and exits with its exit code."""
    if os.geteuid() != 0:
        sys.exit("error: needs root")
    command = ["unshare", "--net", "--mount", sys.executable, sys.argv[0], *map(str, arguments)]
    sys.exit(subprocess.run(command).returncode)


def ask(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def wait_for(what, condition, timeout_s, output=lambda: ""):
    """Waits until a condition returns True, and prints `what`. On timeout, exits with its last value."""
    end, last = time.monotonic() + timeout_s, None
    while time.monotonic() < end:
        try:
            last = condition()
            if last is True:
                print(what, flush=True)
                return
        except (OSError, KeyError) as error:
            last = error
        time.sleep(0.2)
    sys.exit(f"{output()}error: timed out after {timeout_s} s: {what}: {last}")


def end(processes):
    """Terminates processes and waits for them."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
