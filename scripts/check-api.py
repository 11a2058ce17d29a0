#!/usr/bin/python3
# Debian's interpreter: python3-jsonschema is for it.
"""Checks the HTTP API against docs/reference/http-api.md: the examples of the page and the responses of a running agent match the
JSON schemas, and contain no field that the page does not have.

    check-api.py PROGRAM
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

import jsonschema

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs/reference/http-api.md"
AGENT, PEER, SILENT = "127.63.0.1", "127.63.0.2", "127.63.0.3"
DEADLINE_SECONDS = 60


def documented():
    """For each endpoint its example and its schema, in the order of the page."""
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]:
        blocks = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", section, flags=re.M | re.S)]
        schemas = [block for block in blocks if "$schema" in block]
        if schemas:
            (schema,) = schemas
            yield schema["title"], [block for block in blocks if block is not schema], schema


def undocumented(value, schema, root, where="response"):
    """Fields of a value that its schema does not name."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", False)
        for key, inner in value.items():
            if key in known:
                yield from undocumented(inner, known[key], root, f"{where}.{key}")
            elif rest is False:
                yield f"{where}.{key} is not in the schema"
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from undocumented(inner, schema.get("items", {}), root, f"{where}[{index}]")


def problems(title, what, value, schema):
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        yield f"{title}: {what}: {'.'.join(map(str, error.path))}: {error.message}"
    yield from (f"{title}: {what}: {text}" for text in undocumented(value, schema, schema))


def configuration(folder, name, own, peer, other):
    (folder / f"{name}.yaml").write_text(
        f"""agent: {{name: {name}, labels: {{zone: a}}}}
listen: {{http: "{own}:9862", stamp: "{own}:9862", agent: "{own}:9863"}}
responder: {{allow: ["127.0.0.0/8"]}}
peers:
  - {{name: {other}, address: {peer}}}
  - {{name: silent, address: {SILENT}}}
  - {{name: gone, address: no-such-host.invalid}}
  - {{files: {folder}/none.yaml, refresh: 1s}}
targets: [{{name: reflector, address: {SILENT}, port: 9}}]
probes:
  - {{name: fast, interval: 50ms, peers: all, targets: all, late_after: 100ms, lost_after: 200ms, path_mtu: "on"}}
  - {{name: routes, kind: trace, follows: fast, interval: 2s}}
  - {{name: capacity, kind: bandwidth, interval: 10s, bytes: 1MB, peers: [{other}]}}
  - {{name: chat, protocol: tcp, interval: 50ms, connect_interval: 1s, late_after: 100ms, lost_after: 200ms}}
"""
    )
    return folder / f"{name}.yaml"


def get(path):
    with urllib.request.urlopen(f"http://{AGENT}:9862{path}", timeout=5) as response:
        return json.load(response)


def is_ready():
    """Whether paths were answered, lost, traced and loaded in both directions and not started, and events happened."""
    try:
        paths, events = get("/api/v1/paths")["paths"], get("/api/v1/events")["events"]
    except OSError:
        return False
    counts = [path["counts"] for path in paths if "counts" in path]
    is_lost = any(sum(count["lost"].values()) for count in counts)
    is_not_started = any(path["state"] == "not_measured" for path in paths)
    flows = [flow for path in paths for flow in path.get("flows", [])]
    is_traced = any(all(flow[way]["trace"] and flow[way]["route"] for way in ("forward", "reverse")) for flow in flows)
    is_loaded = any(len(path.get("bandwidth", [])) == 2 for path in paths)
    is_measured = any(count["ok"] for count in counts) and is_traced and is_loaded
    return is_lost and is_measured and is_not_started and len(events) > 0


def responses(program):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        files = [configuration(folder, "a", AGENT, PEER, "b"), configuration(folder, "b", PEER, AGENT, "a")]
        agents = [subprocess.Popen([program, "run", "--config", file], stderr=subprocess.DEVNULL) for file in files]
        try:
            end = time.monotonic() + DEADLINE_SECONDS
            while not is_ready():
                if time.monotonic() > end:
                    sys.exit("error: no path with replies, one with losses and one not started within the deadline")
                time.sleep(0.1)
            return {title: get(title) for title, _, _ in documented()}
        finally:
            for agent in agents:
                agent.terminate()
            for agent in agents:
                agent.wait()


def main():
    program = sys.argv[1]
    answers = responses(program)
    found = []
    for title, examples, schema in documented():
        for example in examples:
            found += problems(title, "the example", example, schema)
        found += problems(title, "the agent's response", answers[title], schema)
    print(*found, sep="\n", end="\n" if found else "")
    if found or len(answers) < 5:
        sys.exit(f"error: {len(answers)} endpoints, {len(found)} problems")
    print(f"the responses of {len(answers)} endpoints match their schemas")


if __name__ == "__main__":
    main()
