#!/usr/bin/env python3
"""Checks deploy/docker/compose.yaml without Docker.

    check-compose.py              what it says, against the specification of compose files and against what it mounts
    check-compose.py --run        the agents, Prometheus and Alertmanager with what they would get, in a network namespace; needs root
    check-compose.py --self-test  plants mistakes in a copy and expects each to be found

Needs what scripts/install-test-peers.sh --only kubernetes installs, and runs in that Python by itself; promtool and
amtool; and a pathmeter: one that is built, or $PATHMETER.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
import trial

HERE = trial.ROOT
PYTHON = HERE / "target/peers/kubernetes/bin/python3"

try:
    import compose_spec
    import yaml
except ImportError:
    if PYTHON.exists() and sys.executable != str(PYTHON):
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    sys.exit("error: run first: scripts/install-test-peers.sh --only kubernetes")

# A scrape may be 15 s away.
PATIENCE = 40


class Stack:
    """A compose file, with what its services see of the files here."""

    def __init__(self, root):
        self.folder = root / "deploy/docker"
        self.text = yaml.safe_load((self.folder / "compose.yaml").read_text())
        self.services = self.text["services"]
        self.agents = {name: service for name, service in self.services.items() if "build" in service}

    def mounts(self, service):
        """What is mounted, as (source, place, mode): sources are a path here, or the name of a volume."""
        for mount in service.get("volumes", []):
            source, place, *mode = mount.split(":")
            yield (self.folder / source).resolve() if source.startswith(".") else source, place, mode

    def unpack(self, service, folder):
        """The files that a service gets from here, below a folder."""
        for source, place, _ in self.mounts(service):
            if isinstance(source, pathlib.Path) and source.exists():
                target = folder / place[1:]
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                else:
                    shutil.copy(source, target)


def says(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    return f"{command[0]}: {done.stdout}{done.stderr}" if done.returncode else None


def problems(root):
    stack = Stack(root)
    try:
        # It does not know the merges of YAML 1.1.
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(stack.text)).validate()
    except ValueError as error:
        yield str(error)
    for name, service in stack.services.items():
        yield from (f"{name}: {problem}" for problem in confined(stack, service))
    yield from of_agents(stack)
    with tempfile.TemporaryDirectory() as folder:
        yield from of_prometheus(stack, pathlib.Path(folder))
        yield from of_alertmanager(stack, pathlib.Path(folder))
        yield from of_grafana(stack, pathlib.Path(folder))


def confined(stack, service):
    if service.get("read_only") is not True or service.get("cap_drop") != ["ALL"]:
        yield "it may write to its image, or has capabilities"
    if service.get("security_opt") != ["no-new-privileges:true"]:
        yield "it may get privileges"
    if "build" in service:
        build = service["build"]
        if not (stack.folder / build["context"] / build["dockerfile"]).exists():
            yield f"there is no {build['dockerfile']}"
    elif not re.search(r":v?\d+\.\d+\.\d+$", service["image"]):
        yield f"{service['image']} is no version"
    for port in service.get("ports", []):
        if not port.startswith("127.0.0.1:"):
            yield f"port {port} is open to other machines"
    for source, place, mode in stack.mounts(service):
        if isinstance(source, str):
            if source not in stack.text["volumes"]:
                yield f"the volume {source} is not declared"
        elif not source.exists():
            yield f"{place}: there is no {source}"
        elif mode != ["ro"]:
            yield f"{place}: it may change {source}"
    for needed in service.get("depends_on", {}):
        if needed not in stack.services:
            yield f"it depends on {needed}"


def of_agents(stack):
    listed = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name, service in stack.agents.items():
            stack.unpack(service, folder / name)
            variables = service["environment"]
            if variables["PATHMETER_NAME"] != name:
                yield f"{name}: its name among the agents is {variables['PATHMETER_NAME']}"
            file = folder / name / "etc/pathmeter/config.yaml"
            if problem := says(trial.program(), "check", file, env=variables):
                yield f"{name}: {problem}"
                continue
            config = yaml.safe_load(file.read_text())
            for peers in config["peers"]:
                for path in peers["files"]:
                    path = folder / name / path[1:]
                    if not path.exists():
                        yield f"{name}: there is no {path.name}"
                        continue
                    listed = {entry["labels"]["instance"]: entry for entry in yaml.safe_load(path.read_text())}
            places = [place for source, place, _ in stack.mounts(service) if source == "key"]
            if str(pathlib.PurePath(config["key_file"]).parent) not in places:
                yield f"{name}: the key is not at {config['key_file']}"
            if pathlib.PurePath(config["key_file"]).name not in " ".join(stack.services["key"]["command"]):
                yield f"{name}: nobody makes {config['key_file']}"
            if listed.get(name, {}).get("targets") != [f"{name}:9862"]:
                yield f"{name}: it is not in the list of agents"
            elif variables["PATHMETER_LABELS"] != f"zone={listed[name]['labels']['zone']}":
                yield f"{name}: its zone is another in the list of agents"
    if listed.keys() != stack.agents.keys():
        yield f"listed are {sorted(listed)}, and there are {sorted(stack.agents)}"


def address_of(stack, address):
    """Whether a service listens there; its ports are those that are published."""
    name, _, port = address.partition(":")
    return any(mapping.endswith(f":{port}") for mapping in stack.services.get(name, {}).get("ports", []))


def argument(service, name):
    return next(part.split("=", 1)[1] for part in service["command"] if part.startswith(f"--{name}="))


def of_prometheus(stack, folder):
    service = stack.services["prometheus"]
    stack.unpack(service, folder)
    file = folder / argument(service, "config.file")[1:]
    if problem := says("promtool", "check", "config", file):
        yield f"prometheus: {problem}"
        return
    config = yaml.safe_load(file.read_text())
    if not list(file.parent.glob(config["rule_files"][0])):
        yield "prometheus: there are no rules"
    for manager in config["alerting"]["alertmanagers"]:
        for target in manager["static_configs"][0]["targets"]:
            if not address_of(stack, target):
                yield f"prometheus: nobody listens at {target}"
    listed = [
        target
        for pattern in config["scrape_configs"][0]["file_sd_configs"][0]["files"]
        for entry in yaml.safe_load((file.parent / pattern).read_text())
        for target in entry["targets"]
    ]
    if sorted(listed) != sorted(f"{name}:9862" for name in stack.agents):
        yield f"prometheus: it scrapes {listed}"


def of_alertmanager(stack, folder):
    service = stack.services["alertmanager"]
    stack.unpack(service, folder)
    if problem := says("amtool", "check-config", folder / argument(service, "config.file")[1:]):
        yield f"alertmanager: {problem}"


def of_grafana(stack, folder):
    stack.unpack(stack.services["grafana"], folder)
    provisioning = folder / "etc/grafana/provisioning"
    for path in provisioning.glob("datasources/*.yaml"):
        for source in yaml.safe_load(path.read_text())["datasources"]:
            if not address_of(stack, source["url"].removeprefix("http://")):
                yield f"grafana: nobody listens at {source['url']}"
    places = [
        folder / provider["options"]["path"][1:]
        for path in provisioning.glob("dashboards/*.yaml")
        for provider in yaml.safe_load(path.read_text())["providers"]
    ]
    if not places or not all(list(place.glob("*.json")) for place in places):
        yield "grafana: where it looks for dashboards there are none"
    home = stack.services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    if not (folder / home[1:]).exists():
        yield f"grafana: there is no {home}"


# --- Running it


def run_here():
    """In namespaces of our own. Services are addresses of loopback, and what is in the key's volume is made by its command."""
    stack = Stack(HERE)
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        addresses = {name: f"127.0.0.{number}" for number, name in enumerate(stack.services, 11)}
        hosts = folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
        for command in (["ip", "link", "set", "lo", "up"], ["mount", "--bind", str(hosts), "/etc/hosts"]):
            trial.run(*command)
        key = folder / "key"
        key.mkdir()
        for _ in range(2):
            script = stack.services["key"]["command"][-1].replace("/key/", f"{key}/")
            trial.run("sh", "-c", script)
        made = (key / "mesh.key").read_text()
        if not re.fullmatch(r"[0-9a-f]{64}", made) or (key / "mesh.key").stat().st_mode & 0o777 != 0o444:
            sys.exit(f"error: the key that is made is {len(made)} bytes, or not for all to read")
        print("a key is made, once")
        try:
            for name, service in stack.agents.items():
                root = folder / name
                stack.unpack(service, root)
                config = root / "etc/pathmeter/config.yaml"
                text = config.read_text().replace("/etc/pathmeter/", f"{config.parent}/").replace("/run/pathmeter/", f"{key}/")
                listen = f"\nlisten: {{http: '{addresses[name]}:9862', stamp: '{addresses[name]}:9862', agent: '{addresses[name]}:9863'}}\n"
                config.write_text(text + listen)
                log = open(folder / f"{name}.log", "w")
                processes.append(subprocess.Popen([trial.program(), "run", "--config", config], env=service["environment"], stderr=log, stdout=log))
            for name, command in (("alertmanager", "prometheus-alertmanager"), ("prometheus", "prometheus")):
                root = folder / name
                service = stack.services[name]
                stack.unpack(service, root)
                arguments = [re.sub(r"=(/.*)", lambda match: f"={root}{match[1]}", part) for part in service["command"]]
                port = service["ports"][0].rsplit(":", 1)[1]
                log = open(folder / f"{name}.log", "w")
                processes.append(subprocess.Popen([command, *arguments, f"--web.listen-address={addresses[name]}:{port}"], stderr=log, stdout=log))

            names = set(stack.agents)
            for name in names:
                probes = [probe["name"] for probe in yaml.safe_load((folder / name / "etc/pathmeter/config.yaml").read_text())["probes"]]
                wanted = {(probe, peer) for probe in probes for peer in names - {name}}

                def measured():
                    paths = json.loads(trial.ask(f"http://{addresses[name]}:9862/api/v1/paths"))["paths"]
                    answered = {(path["probe"], path["peer"]) for path in paths if path["state"] == "measured" and path["counts"]["ok"] > 2}
                    return answered == wanted or f"{len(wanted - answered)} of {len(wanted)} paths have no answers: {paths}"

                trial.wait_for(f"{name} measures all others by all probes", measured, PATIENCE)
            prometheus = f"http://{addresses['prometheus']}:9090/api/v1"

            def scraped():
                found = json.loads(trial.ask(f"{prometheus}/query?query=pathmeter_peer_info"))["data"]["result"]
                seen = {(one["metric"]["instance"], one["metric"]["zone"], one["metric"]["peer"], one["metric"].get("label_zone")) for one in found}
                zones = {name: stack.agents[name]["environment"]["PATHMETER_LABELS"].removeprefix("zone=") for name in names}
                return seen == {(a, zones[a], b, zones[b]) for a in names for b in names - {a}} or seen

            trial.wait_for("Prometheus has each agent's peers, with the zones of both", scraped, PATIENCE)
            trial.wait_for("Prometheus knows of Alertmanager", lambda: "alertmanager:9093" in trial.ask(f"{prometheus}/alertmanagers"), PATIENCE)
            trial.wait_for("Prometheus has the rules", lambda: "PathmeterPeerUnreachable" in trial.ask(f"{prometheus}/rules"), PATIENCE)
        finally:
            trial.end(processes)


PLANTED = [
    ("compose.yaml", "read_only: true", "readonly: true", r"extension key `readonly`"),
    ("compose.yaml", "cap_drop: [ALL]", "cap_drop: [NET_RAW]", r"has capabilities"),
    ("compose.yaml", "stop_grace_period: 15s", "stop_grace_period: 15 s", r"valid duration"),
    ("compose.yaml", "prom/prometheus:v3.5.0", "prom/prometheus:latest", r"latest is no version"),
    ("compose.yaml", "127.0.0.1:3000:3000", "3000:3000", r"open to other machines"),
    ("compose.yaml", "../prometheus/rules:", "../prometheus/rule:", r"there is no .*/rule"),
    ("compose.yaml", "- grafana:/var/lib/grafana", "- data:/var/lib/grafana", r"volume data is not declared"),
    ("compose.yaml", "PATHMETER_NAME: ams-2", "PATHMETER_NAME: ams-1", r"its name among the agents is ams-1"),
    ("compose.yaml", "zone=fra", "zone=ams", r"its zone is another"),
    ("compose.yaml", "key:/run/pathmeter:ro", "key:/run/keys:ro", r"the key is not at"),
    ("compose.yaml", "grafana/dashboards:/var/lib/grafana/dashboards", "grafana/dashboards:/dashboards", r"dashboards there are none"),
    ("agents/config.yaml", "flows: 4", "flows: 40", r"pathmeter: |flows"),
    ("agents/agents.yaml", "ams-2:9862", "ams-2:9863", r"ams-2: it is not in the list"),
    ("prometheus.yml", "alertmanager:9093", "alertmanager:9094", r"nobody listens at alertmanager:9094"),
    ("prometheus.yml", "scrape_interval", "scrape_intervall", r"promtool: .*scrape_intervall"),
    ("../prometheus/alertmanager.yml", "receiver: tickets", "receiver: ticket", r"amtool: .*ticket"),
    ("../../grafana/provisioning/datasources/prometheus.yaml", "prometheus:9090", "prometheus:9091", r"nobody listens at http://prometheus:9091"),
]


def self_test():
    missed = 0
    with tempfile.TemporaryDirectory() as work:
        for number, (file, old, new, wanted) in enumerate(PLANTED):
            root = pathlib.Path(work) / str(number)
            for folder in ("deploy/docker", "deploy/prometheus", "grafana"):
                shutil.copytree(HERE / folder, root / folder)
            path = root / "deploy/docker" / file
            text = path.read_text()
            if old not in text:
                sys.exit(f"error: {file} has no {old!r} to plant a mistake in")
            path.write_text(text.replace(old, new))
            found = list(problems(root))
            if not any(re.search(wanted, problem, re.DOTALL) for problem in found):
                missed += 1
                print(f"not found: {file}: {old!r} → {new!r}; found were {found}")
            shutil.rmtree(root)
    if missed:
        sys.exit(f"error: {missed} of {len(PLANTED)} planted mistakes were not found")
    print(f"all {len(PLANTED)} planted mistakes were found")


def main():
    if sys.argv[1:] == ["--run"]:
        trial.again_in_namespaces("--run-here")
    elif sys.argv[1:] == ["--run-here"]:
        run_here()
    elif sys.argv[1:] == ["--self-test"]:
        self_test()
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        found = list(problems(HERE))
        for problem in found:
            print(f"error: {problem}", file=sys.stderr)
        if found:
            sys.exit(1)
        print("compose.yaml fits the specification, what it mounts is there, and what is mounted is right")


if __name__ == "__main__":
    main()
