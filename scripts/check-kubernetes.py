#!/usr/bin/env python3
"""Checks deploy/kubernetes: the output of kustomize against the schemas of Kubernetes and of the Prometheus operator, and
against itself.

    check-kubernetes.py              checks everything
    check-kubernetes.py --write      generates the PrometheusRules from deploy/prometheus/rules
    check-kubernetes.py --run        runs four pods of base in two zones, with their environment and files, in a network namespace; needs root
    check-kubernetes.py --self-test  plants errors in a copy and expects each to be found

Needs what scripts/install-test-peers.sh --only kubernetes installs, and runs in its Python by itself; promtool; and a
pathmeter: one that is built, or $PATHMETER.
"""

import concurrent.futures
import functools
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
PEERS = HERE / "target/peers"
PYTHON = PEERS / "kubernetes/bin/python3"
KUBECTL = PEERS / "kubectl/kubectl"

try:
    import jsonschema
    import kubernetes_validate
    import yaml
    from cloudcoil.models.prometheus_operator import v1 as operator
except ImportError:
    if PYTHON.exists() and sys.executable != str(PYTHON):
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    sys.exit("error: run first: scripts/install-test-peers.sh --only kubernetes")

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# The oldest maintained version has every feature that is used here; the newest is the newest that the
# validator knows.
KUBERNETES_VERSIONS = ["1.30", "1.33", "1.37"]
OVERLAYS = ["host-network", "minimal", "prometheus-operator"]
# Created by hand, with the command in docs/how-to/kubernetes.md.
BY_HAND = {("Secret", "pathmeter-mesh-key")}
# kubectl apply without --server-side stores the whole object in an annotation.
ANNOTATION_BYTES_MAX = 262144
PORTS = {("http", 9862, "TCP"), ("stamp", 9862, "UDP"), ("agent", 9863, "UDP"), ("echo", 9863, "TCP")}
GENERATED = "# Generated from deploy/prometheus/rules/{}: scripts/check-kubernetes.py --write\n"


class Tree:
    """A working copy: this one, or a copy with planted errors."""

    def __init__(self, root):
        self.root = root
        self.kubernetes = root / "deploy/kubernetes"
        self.rules = root / "deploy/prometheus/rules"
        self.generated = self.kubernetes / "components/prometheus-operator/rules"

    def kustomize(self, folder):
        done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
        if done.returncode:
            raise Problem(f"kubectl kustomize: {done.stderr.strip()}")
        # Its warnings are errors, too.
        if done.stderr:
            raise Problem(f"kubectl kustomize: {done.stderr.strip()}")
        return [entry for entry in yaml.load_all(done.stdout, Loader=LOADER) if entry]


class Problem(Exception):
    pass


# --- Generated rules


def rendered(tree):
    """The generated rule files, by name."""
    files, names = {}, []
    for path in sorted(tree.rules.glob("*.rules.yaml")):
        name = path.name.removesuffix(".rules.yaml").replace("_", "-")
        names.append(f"{name}.yaml")
        # The unchanged text with its comments, indented by one level.
        text = "".join(f"  {line}" if line.strip() else line for line in path.read_text().splitlines(True))
        files[f"{name}.yaml"] = (
            GENERATED.format(path.name)
            + "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n"
            + f"  name: pathmeter-{name}\n  namespace: pathmeter\n"
            + "  labels: {app.kubernetes.io/name: pathmeter}\nspec:\n"
            + text
        )
    files["kustomization.yaml"] = (
        GENERATED.format("")
        + "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n"
        + "".join(f"  - {name}\n" for name in names)
    )
    return files


def write(tree):
    shutil.rmtree(tree.generated, ignore_errors=True)
    tree.generated.mkdir(parents=True)
    for name, text in rendered(tree).items():
        (tree.generated / name).write_text(text)


def drift(tree):
    wanted = rendered(tree)
    there = {path.name: path.read_text() for path in tree.generated.iterdir()}
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            yield f"{(tree.generated / name).relative_to(tree.root)} is not the output of --write"


# --- Schemas


def closed(schema):
    """The schema with unknown fields forbidden."""
    if isinstance(schema, dict):
        changed = {key: closed(value) for key, value in schema.items()}
        if "properties" in schema and "additionalProperties" not in schema:
            changed["additionalProperties"] = False
        return changed
    return [closed(entry) for entry in schema] if isinstance(schema, list) else schema


OPERATOR = {
    kind: jsonschema.Draft202012Validator(closed(getattr(operator, kind).model_json_schema(by_alias=True)))
    for kind in ("PodMonitor", "PrometheusRule")
}


# Cached: a schema is megabytes, and most objects are in every overlay.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def fits(entry):
    return misfits(json.dumps(entry))


@functools.cache
def misfits(text):
    return list(look_up_misfits(json.loads(text)))


def look_up_misfits(entry):
    if entry["apiVersion"] == "monitoring.coreos.com/v1":
        for error in OPERATOR[entry["kind"]].iter_errors(entry):
            yield f"{'.'.join(str(step) for step in error.absolute_path)}: {error.message}"
        return
    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(entry, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"Kubernetes {version}: {'.'.join(str(step) for step in error.absolute_path)}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield error.message


# --- Consistency


def within(labels, selector):
    return selector and all(labels.get(key) == value for key, value in selector.items())


def pods(entries):
    """Pod templates, with the objects that contain them."""
    return [(entry, entry["spec"]["template"]) for entry in entries if "template" in entry.get("spec", {})]


def references(template):
    """Objects that a pod needs, as (kind, name)."""
    spec = template["spec"]
    for volume in spec.get("volumes", []):
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        for source in sources:
            if "configMap" in source:
                yield "ConfigMap", source["configMap"]["name"]
            if "secret" in source:
                yield "Secret", source["secret"].get("name") or source["secret"]["secretName"]
    for container in spec["containers"]:
        for variable in container.get("env", []):
            for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if key in variable.get("valueFrom", {}):
                    yield kind, variable["valueFrom"][key]["name"]
    yield "ServiceAccount", spec["serviceAccountName"]
    if not spec["priorityClassName"].startswith("system-"):
        yield "PriorityClass", spec["priorityClassName"]


def projected(spec):
    """The volumes with the configuration; the others are written by the agent."""
    return [volume for volume in spec["volumes"] if "projected" in volume]


def consistent(entries):
    """Problems that a schema cannot detect."""
    there = {(entry["kind"], entry["metadata"]["name"]) for entry in entries}
    if len(there) != len(entries):
        yield "two objects of the same kind have the same name"
    namespaces = {entry["metadata"].get("namespace") for entry in entries if entry["kind"] not in ("Namespace", "PriorityClass")}
    if len(namespaces) != 1 or ("Namespace", *namespaces) not in there:
        yield f"the namespaces are {namespaces}, exactly one of which must be created here"
    templates = pods(entries)
    if len(templates) != 1:
        yield f"there are {len(templates)} pod templates"
        return
    owner, template = templates[0]
    labels, spec = template["metadata"]["labels"], template["spec"]
    container = spec["containers"][0]
    ports = {port["name"]: (port["containerPort"], port["protocol"]) for port in container["ports"]}
    if {(name, *rest) for name, rest in ports.items()} != PORTS:
        yield f"the container's ports are {ports}"
    if not within(labels, owner["spec"]["selector"]["matchLabels"]):
        yield f"{owner['kind']}: its selector does not match its pods"
    for needed in references(template):
        if needed not in there and needed not in BY_HAND:
            yield f"the pod needs {needed[0]} {needed[1]}, which does not exist"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    if mounted != {volume["name"] for volume in spec["volumes"]}:
        yield f"mounted are {mounted}, which are not the volumes"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        if ports.get(container[kind]["httpGet"]["port"]) != (9862, "TCP"):
            yield f"{kind} uses port {container[kind]['httpGet']['port']}"
    yield from unprivileged(spec, container, entries)

    for entry in entries:
        name = f"{entry['kind']} {entry['metadata']['name']}"
        if entry["kind"] == "Service":
            if not within(labels, entry["spec"]["selector"]):
                yield f"{name}: its selector does not match the pods"
            for port in entry["spec"]["ports"]:
                if ports.get(port["targetPort"]) != (port["port"], port["protocol"]):
                    yield f"{name}: port {port['name']} is {port['port']}/{port['protocol']}, the container's is another"
            if len(entry["spec"]["ports"]) != len(ports):
                yield f"{name} has {len(entry['spec']['ports'])} of {len(ports)} ports"
        elif entry["kind"] == "NetworkPolicy":
            if not within(labels, entry["spec"]["podSelector"]["matchLabels"]):
                yield f"{name}: its selector does not match the pods"
            yield from policed(name, entry["spec"], labels, set(ports.values()))
        elif entry["kind"] == "PodMonitor":
            if not within(labels, entry["spec"]["selector"]["matchLabels"]):
                yield f"{name}: its selector does not match the pods"
            for endpoint in entry["spec"]["podMetricsEndpoints"]:
                if ports.get(endpoint["port"]) != (9862, "TCP"):
                    yield f"{name} scrapes port {endpoint['port']}"
                made = {rule.get("targetLabel") for rule in endpoint["relabelings"]}
                if not {"job", "instance", "zone"} <= made:
                    yield f"{name} makes the labels {made} only"
        elif entry["kind"] == "ConfigMap" and entry["metadata"]["labels"].get("grafana_dashboard"):
            if len(json.dumps(entry)) > ANNOTATION_BYTES_MAX:
                yield f"{name} is too large for kubectl apply without --server-side"


def policed(name, policy, labels, ports):
    """All ports must be open between agents in both directions, and one to Prometheus."""
    def open_to(rules, key):
        return {
            (port["port"], port["protocol"])
            for rule in rules
            for peer in rule.get(key, [])
            if within(labels, peer.get("podSelector", {}).get("matchLabels", {})) and "namespaceSelector" not in peer
            for port in rule["ports"]
        }
    for key, rules in (("from", policy["ingress"]), ("to", policy["egress"])):
        if open_to(rules, key) != ports:
            yield f"{name}: {key} agents {open_to(rules, key)} are open, not the container's ports"
    for rule in policy["ingress"]:
        for port in rule["ports"]:
            if (port["port"], port["protocol"]) not in ports:
                yield f"{name}: {port} is not a port of the container"
    if not any({(port["port"], port["protocol"]) for port in rule["ports"]} == {(53, "UDP"), (53, "TCP")} for rule in policy["egress"]):
        yield f"{name} does not open DNS"


def unprivileged(spec, container, entries):
    pod, own = spec["securityContext"], container["securityContext"]
    wanted = {
        "runAsNonRoot": pod.get("runAsNonRoot") is True,
        "runAsUser": pod.get("runAsUser") == 65532,
        "fsGroup": pod.get("fsGroup") == 65532,
        "seccompProfile": pod.get("seccompProfile") == {"type": "RuntimeDefault"},
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        "capabilities": own.get("capabilities") == {"drop": ["ALL"]},
        "automountServiceAccountToken": spec.get("automountServiceAccountToken") is False,
    }
    for what in [what for what, is_so in wanted.items() if not is_so]:
        yield f"the pod's {what} is not as required"
    # The mode must let the group, which is fsGroup, read the file.
    for volume in projected(spec):
        if volume["projected"].get("defaultMode", 0o644) & 0o447 != 0o440:
            yield f"volume {volume['name']}: its mode {volume['projected'].get('defaultMode'):o} is not 0440"
    namespace = next(entry for entry in entries if entry["kind"] == "Namespace")
    level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    on_host = spec.get("hostNetwork", False)
    if level != ("privileged" if on_host else "restricted"):
        yield f"the namespace enforces {level}"
    if on_host:
        if spec.get("dnsPolicy") != "ClusterFirstWithHostNet":
            yield "on the host's network names of services are not found with this dnsPolicy"
        if pod.get("sysctls"):
            yield "on the host's network the kubelet refuses sysctls"
        if any(entry["kind"] == "NetworkPolicy" for entry in entries):
            yield "on the host's network a NetworkPolicy has no effect"


# --- Checks with other programs


@functools.cache
def failure_output(*command, text="", **environment):
    """The output of a failed program; nothing if it succeeded."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, env={**os.environ, **environment})
    return f"{' '.join(command[:2])}: {done.stdout}{done.stderr}" if done.returncode else None


def configured(entries, agent):
    """The configuration must be valid with the pod's environment, with zones and without."""
    template = pods(entries)[0][1]
    keys = {source["secret"]["name"] for volume in projected(template["spec"]) for source in volume["projected"]["sources"] if "secret" in source}
    services = {entry["metadata"]["name"] for entry in entries if entry["kind"] == "Service"}
    for entry in entries:
        text = entry.get("data", {}).get("config.yaml")
        if entry["kind"] != "ConfigMap" or text is None:
            continue
        config = yaml.safe_load(text)
        if ("key_file" in config) != bool(keys):
            yield "the configuration has a key and the pod none, or vice versa"
        for peer in config["peers"]:
            if peer["kubernetes"]["service"] not in services:
                yield f"the configuration names the service {peer['kubernetes']['service']}"
        for zone in ("a", ""):
            problem = failure_output(str(agent), "check", "/dev/stdin", text=text, PATHMETER_NAME="node-1", PATHMETER_LABELS=label_of(template, zone))
            if problem:
                yield problem


def label_of(template, zone):
    variables = {variable["name"]: variable.get("value") for variable in template["spec"]["containers"][0]["env"]}
    return variables["PATHMETER_LABELS"].replace("$(ZONE)", zone)


def ruled(tree, entries):
    """The rules must equal those of deploy/prometheus, and promtool must accept them."""
    found = {entry["metadata"]["name"]: entry["spec"] for entry in entries if entry["kind"] == "PrometheusRule"}
    for rules in found.values():
        if problem := failure_output("promtool", "check", "rules", "/dev/stdin", text=yaml.safe_dump(rules)):
            yield problem
    wanted = {
        "pathmeter-" + path.name.removesuffix(".rules.yaml").replace("_", "-"): yaml.load(path.read_text(), Loader=LOADER)
        for path in tree.rules.glob("*.rules.yaml")
    }
    if found != wanted:
        yield "the PrometheusRules differ from deploy/prometheus/rules"


def shown(tree, entries):
    """Every dashboard must be included unchanged."""
    found = {
        name: text
        for entry in entries
        if entry["kind"] == "ConfigMap" and entry["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in entry["data"].items()
    }
    wanted = {path.name: path.read_text() for path in (tree.root / "grafana/dashboards").glob("*.json")}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            yield f"the dashboard {name} is not in grafana/kustomization.yaml, or not as it is"


def example(tree, agent):
    """The example Secret must fit the schema, be the mounted one, and be refused as a key."""
    entry = yaml.safe_load((tree.kubernetes / "base/mesh-key.example.yaml").read_text())
    yield from fits(entry)
    if (entry["kind"], entry["metadata"]["name"]) not in BY_HAND:
        yield f"{entry['metadata']['name']} is not the Secret that the pod needs"
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "mesh.key").write_text(entry["stringData"]["mesh.key"])
        (folder / "config.yaml").write_text(f"key_file: {folder}/mesh.key\nlisten: {{http: '127.0.0.1:0', stamp: '127.0.0.1:0', agent: '127.0.0.1:0'}}\n")
        try:
            done = subprocess.run([agent, "run", "--config", folder / "config.yaml"], capture_output=True, text=True, timeout=5)
        except subprocess.TimeoutExpired:
            yield "the key of the example is accepted: every installation would have the same"
        else:
            if "mesh.key" not in done.stderr + done.stdout:
                yield f"the key of the example is refused for another reason: {done.stderr}"
    command = f"create secret generic {entry['metadata']['name']}"
    if command not in (tree.root / "docs/how-to/kubernetes.md").read_text():
        yield f"docs/how-to/kubernetes.md does not contain the command for the Secret: {command}"


def versions(tree):
    """All files must name the same version."""
    ours = re.search(r'^version = "(.*)"$', (tree.root / "Cargo.toml").read_text(), re.MULTILINE)[1]
    base = yaml.load((tree.kubernetes / "base/kustomization.yaml").read_text(), Loader=LOADER)
    if str(base["images"][0]["newTag"]) != ours:
        yield f"base names image version {base['images'][0]['newTag']} but this is {ours}"
    if f"ARG VERSION={ours}\n" not in (tree.root / "deploy/docker/Dockerfile").read_text():
        yield f"the Dockerfile's VERSION is not {ours}"


def problems(tree, agent):
    yield from drift(tree)
    yield from versions(tree)
    yield from example(tree, agent)
    for folder in ["base", *(f"overlays/{name}" for name in OVERLAYS)]:
        try:
            entries = tree.kustomize(tree.kubernetes / folder)
        except Problem as problem:
            yield f"{folder}: {problem}"
            continue
        for entry in entries:
            for problem in fits(entry):
                yield f"{folder}: {entry['kind']} {entry['metadata']['name']}: {problem}"
        try:
            for problem in [*consistent(entries), *configured(entries, agent)]:
                yield f"{folder}: {problem}"
        except KeyError as error:
            yield f"{folder}: {error} is missing"
        if folder.endswith("operator"):
            for problem in [*ruled(tree, entries), *shown(tree, entries)]:
                yield f"{folder}: {problem}"
    missed = {path.name for path in (tree.kubernetes / "overlays").iterdir()} ^ set(OVERLAYS)
    if missed:
        yield f"the overlays {missed} differ from those that are checked"


# --- Running it


def run_here():
    """Runs pods in new namespaces: each has a loopback address, the user of the pod, and files as the kubelet creates them."""
    entries = Tree(HERE).kustomize(Tree(HERE).kubernetes / "base")
    template = pods(entries)[0][1]
    security = template["spec"]["securityContext"]
    text = next(entry["data"]["config.yaml"] for entry in entries if entry["kind"] == "ConfigMap")
    service = next(entry["metadata"] for entry in entries if entry["kind"] == "Service")
    addresses = {f"node-{number}": f"127.0.0.{number}" for number in range(11, 15)}
    zones = {name: "ab"[number % 2] for number, name in enumerate(addresses)}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        folder.chmod(0o755)
        domain = f"{service['namespace']}.svc.cluster.local"
        (folder / "resolv.conf").write_text(f"search {domain} svc.cluster.local cluster.local\nnameserver 127.0.0.1\noptions ndots:5\n")
        trial.run("ip", "link", "set", "lo", "up")
        trial.run("mount", "--bind", folder / "resolv.conf", "/etc/resolv.conf")
        program = folder / "pathmeter"
        shutil.copy(trial.program(), program)
        try:
            processes.append(subprocess.Popen([
                "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
                "--listen-address=127.0.0.1", "--bind-interfaces", "--log-facility=/dev/null", "--address=/#/",
                *(f"--address=/{service['name']}.{domain}/{address}" for address in addresses.values()),
            ]))
            for name, address in addresses.items():
                home = folder / name
                home.mkdir()
                # One folder, owned by root, with the group and mode of the pod.
                listen = f"\nlisten: {{http: '{address}:9862', stamp: '{address}:9862', agent: '{address}:9863'}}\n"
                (home / "config.yaml").write_text(text.replace("/etc/pathmeter/", f"{home}/") + listen)
                (home / "mesh.key").write_text("0" * 64)
                for file in home.iterdir():
                    os.chown(file, 0, security["fsGroup"])
                    file.chmod(projected(template["spec"])[0]["projected"]["defaultMode"])
                environment = {"PATHMETER_NAME": name, "PATHMETER_LABELS": label_of(template, zones[name])}
                user, group = security["runAsUser"], security["runAsGroup"]
                processes.append(subprocess.Popen(
                    ["setpriv", f"--reuid={user}", f"--regid={group}", f"--groups={security['fsGroup']}", "--bounding-set=-all",
                     "--no-new-privs", program, "run", "--config", home / "config.yaml"],
                    env=environment, stdout=open(folder / f"{name}.log", "w"), stderr=subprocess.STDOUT,
                ))
            for name, address in addresses.items():
                # A zone has no more pods than are selected.
                wanted = {("mesh", peer) for peer in addresses if peer != name}

                def measured():
                    paths = json.loads(trial.ask(f"http://{address}:9862/api/v1/paths"))["paths"]
                    answered = {(path["probe"], path["peer"]) for path in paths if path["state"] == "measured" and path["counts"]["ok"] > 2}
                    others = {peer for probe, peer in answered if probe == "tcp" and zones[peer] != zones[name]}
                    return (wanted <= answered and len(others) == 1) or f"{answered}: {paths}"

                trial.wait_for(
                    f"{name} found the others by the service, and measures them over UDP, and one of the other zone over TCP",
                    measured, 60, lambda: (folder / f"{name}.log").read_text(),
                )
        finally:
            trial.end(processes)


# --- Planted errors: file, original text, changed text, expected message

PLANTED = [
    ("base/daemonset.yaml", "readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true", r"Additional properties are not allowed.*readOnlyRootFileSystem"),
    ("base/daemonset.yaml", "terminationGracePeriodSeconds: 75", "terminationGracePeriodSeconds: 75s", r"'75s' is not of type"),
    ("base/daemonset.yaml", "containerPort: 9863, protocol: UDP", "containerPort: 9864, protocol: UDP", r"the container's ports are"),
    ("base/daemonset.yaml", "configMap: {name: pathmeter}", "configMap: {name: pathmetre}", r"needs ConfigMap pathmetre"),
    ("base/daemonset.yaml", "secret: {name: pathmeter-mesh-key}", "secret: {name: mesh-key}", r"needs Secret mesh-key"),
    ("base/daemonset.yaml", "defaultMode: 0440", "defaultMode: 0400", r"mode 400 is not 0440"),
    ("base/daemonset.yaml", "labels: {app.kubernetes.io/name: pathmeter}", "labels: {app.kubernetes.io/name: pathmeters}", r"selector does not match"),
    ("base/daemonset.yaml", "priorityClassName: pathmeter", "priorityClassName: high", r"needs PriorityClass high"),
    ("base/daemonset.yaml", "drop: [ALL]", "add: [NET_RAW]", r"capabilities is not as required"),
    ("base/daemonset.yaml", "httpGet: {path: /-/ready, port: http}", "httpGet: {path: /-/ready, port: agent}", r"readinessProbe uses port agent"),
    ("base/service.yaml", "port: 9862, targetPort: stamp", "port: 9863, targetPort: stamp", r"port stamp is 9863/UDP"),
    ("base/service.yaml", "selector: {app.kubernetes.io/name: pathmeter}", "selector: {app: pathmeter}", r"Service pathmeter: its selector"),
    ("base/networkpolicy.yaml", "- {port: 9863, protocol: TCP}", "- {port: 9864, protocol: TCP}", r"not the container's ports"),
    ("base/networkpolicy.yaml", "- {port: 53, protocol: UDP}", "- {port: 5353, protocol: UDP}", r"does not open DNS"),
    ("base/config.yaml", "interval: 1s", "intervall: 1s", r"pathmeter check.*intervall"),
    ("base/config.yaml", "service: pathmeter", "service: pathmeter-agents", r"names the service pathmeter-agents"),
    ("base/mesh-key.example.yaml", "mesh.key: not a key", "mesh.key: a key that is long enough to be taken", r"example is accepted"),
    ("base/kustomization.yaml", "- networkpolicy.yaml", "- network-policy.yaml", r"kubectl kustomize: "),
    ("base/kustomization.yaml", "newTag: 0.1", "newTag: 9.9", r"names image version 9\.9"),
    ("../docker/Dockerfile", "ARG VERSION=", "ARG VERSION=9", r"the Dockerfile's VERSION"),
    ("overlays/host-network/kustomization.yaml", "dnsPolicy: ClusterFirstWithHostNet", "dnsPolicy: ClusterFirst", r"names of services are not found"),
    ("overlays/host-network/kustomization.yaml", "sysctls: null", "runAsUser: 65532", r"refuses sysctls"),
    ("overlays/minimal/config.yaml", "peers:\n  - kubernetes", "key_file: /etc/pathmeter/mesh.key\npeers:\n  - kubernetes", r"has a key and the pod none"),
    ("components/prometheus-operator/podmonitor.yaml", "podMetricsEndpoints", "podMetricEndpoints", r"podMetricEndpoints"),
    ("components/prometheus-operator/podmonitor.yaml", "sourceLabels: [__meta_kubernetes_pod_node_name]", "source_labels: [__meta_kubernetes_pod_node_name]", r"source_labels"),
    ("components/prometheus-operator/podmonitor.yaml", "port: http", "port: metrics", r"scrapes port metrics"),
    ("components/prometheus-operator/podmonitor.yaml", "targetLabel: zone", "targetLabel: az", r"makes the labels"),
    ("components/prometheus-operator/rules/agent.yaml", "for: 5m", "for: 6m", r"is not the output of --write"),
    ("components/prometheus-operator/rules/kustomization.yaml", "  - echo.yaml\n", "", r"is not the output of --write"),
    ("../../grafana/kustomization.yaml", "files: [dashboards/pair.json]", "files: [dashboards/node.json]", r"the dashboard pair.json is not in"),
    ("../prometheus/rules/agent.rules.yaml", "rate(", "rat(", r"promtool check rules: |is not the output of --write"),
]


def is_found(planted, agent):
    """Checks that a planted error is found, in a copy of its own; returns what was found otherwise."""
    file, old, new, wanted = planted
    with tempfile.TemporaryDirectory() as work:
        tree = Tree(pathlib.Path(work))
        for folder in ("deploy/kubernetes", "deploy/docker", "deploy/prometheus/rules", "grafana", "docs"):
            shutil.copytree(HERE / folder, tree.root / folder)
        shutil.copy(HERE / "Cargo.toml", tree.root)
        path = tree.kubernetes / file
        text = path.read_text()
        if old not in text:
            return f"{file} has no {old!r} to plant a mistake in"
        path.write_text(text.replace(old, new))
        found = list(problems(tree, agent))
    if any(re.search(wanted, problem, re.DOTALL) for problem in found):
        return None
    return f"{file}: {old!r} → {new!r} is not found; found are {found}"


def self_test(agent):
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        missed = [problem for problem in pool.map(is_found, PLANTED, [agent] * len(PLANTED), chunksize=4) if problem]
    for problem in missed:
        print(f"error: {problem}", file=sys.stderr)
    if missed:
        sys.exit(1)
    print(f"all {len(PLANTED)} planted errors are found")


def main():
    tree = Tree(HERE)
    if sys.argv[1:] == ["--write"]:
        write(tree)
    elif sys.argv[1:] == ["--self-test"]:
        self_test(trial.program())
    elif sys.argv[1:] == ["--run"]:
        trial.again_in_namespaces("--run-here")
    elif sys.argv[1:] == ["--run-here"]:
        run_here()
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        found = list(problems(tree, trial.program()))
        for problem in found:
            print(f"error: {problem}", file=sys.stderr)
        if found:
            sys.exit(1)
        print(f"base and {len(OVERLAYS)} overlays match Kubernetes {', '.join(KUBERNETES_VERSIONS)} and each other")


if __name__ == "__main__":
    main()
