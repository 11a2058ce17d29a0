#!/usr/bin/env python3
"""Builds deploy/docker/Dockerfile and runs deploy/docker/compose.yaml with Docker. Needs root.

    check-containers.py           build the image, check it, run the compose file without Grafana, wait for an alert
    check-containers.py --config  check only that docker-compose can read the compose file

Needs Debian's docker.io, docker-compose, iptables, mmdebstrap, busybox-static and dnsmasq-base. The Docker daemon runs in network, mount and
process namespaces of its own, so it neither sees nor changes a Docker that this machine already runs, and it ends with this script.

No image is pulled. The images that the files name are made here: busybox from busybox-static, Prometheus and Alertmanager from
Debian's packages (older versions than the compose file names), rust from Debian and from this machine's toolchain. The build
has no network: its crates come from `cargo vendor`. Everything is kept in the cache folder.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

sys.dont_write_bytecode = True
import yaml

from trial import CACHE, ROOT, ask, end, run, wait_for

FOLDER = ROOT / "deploy/docker"
DOCKERFILE = FOLDER / "Dockerfile"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
AGENTS = [name for name, service in COMPOSE["services"].items() if "build" in service]
# Debian has no package of Grafana.
SERVICES = [name for name in COMPOSE["services"] if name != "grafana"]
# Packages that the build uses of the image `rust`, and programs that run beside the agents.
DEBIAN_PACKAGES = "ca-certificates,gcc,libc6-dev,prometheus,prometheus-alertmanager"
FILES = {"pathmeter", "etc/passwd", "etc/group", "etc/ssl/certs/ca-certificates.crt", "licenses/LICENSE-APACHE", "licenses/LICENSE-MIT"}
USER = "65532:65532"
# Prometheus scrapes every 15 s, the agents look for a changed configuration every 10 s.
TIMEOUT_S = 40
# The alert has a window of three minutes and waits 30 s; rules are evaluated every 30 s.
ALERT_TIMEOUT_S = 360
# Debian's client first: a newer one in /usr/local has no builder for this daemon.
ENVIRONMENT = os.environ | {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "DOCKER_HOST": "unix:///run/docker.sock",
    "DOCKER_BUILDKIT": "1",
    "BUILDKIT_PROGRESS": "plain",
    "COMPOSE_PROJECT_NAME": COMPOSE["name"],
}


def fail(text):
    sys.exit(f"error: {text}")


def docker(*arguments, **options):
    return run("docker", *arguments, env=ENVIRONMENT, **options)


def output(*arguments):
    return docker(*arguments, stdout=subprocess.PIPE, text=True).stdout.strip()


def compose(*arguments, **options):
    """docker-compose 1.29 refuses the key `name`; it takes the name from the environment. Paths in a file that comes from its
    standard input are relative to the current folder, whatever --project-directory says."""
    text = yaml.safe_dump({key: value for key, value in COMPOSE.items() if key != "name"})
    return run("docker-compose", "--file", "-", *arguments, input=text.encode(), env=ENVIRONMENT, cwd=FOLDER, **options)


def inspect(container):
    return json.loads(output("inspect", container))[0]


def address(container):
    return next(iter(inspect(container)["NetworkSettings"]["Networks"].values()))["IPAddress"]


# --- Images


def base_of(name):
    """The base image of the Dockerfile's stage `name`, with the values of ARG."""
    text = DOCKERFILE.read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    base = re.search(rf"^FROM (\S+) AS {name}$", text, re.MULTILINE)
    return re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base[1])


def rust_version_and_suite():
    base = base_of("build")
    match = re.fullmatch(r"rust:([\d.]+)-(\w+)", base)
    if not match:
        fail(f"{DOCKERFILE}: builds FROM {base}; only rust:VERSION-SUITE is supported here")
    version, suite = match.groups()
    ours = run("rustc", "--version", cwd=ROOT, capture_output=True, text=True).stdout.split()[1]
    if ours != version and not ours.startswith(f"{version}."):
        fail(f"{DOCKERFILE}: builds with Rust {version}, this machine has {ours}; set RUST_VERSION there as in rust-toolchain.toml")
    return version, suite


def debian_archive(suite):
    packages = hashlib.sha256(DEBIAN_PACKAGES.encode()).hexdigest()[:12]
    return CACHE / f"debian-{suite}-{packages}.tar"


def vendor_folder():
    lock = hashlib.sha256((ROOT / "Cargo.lock").read_bytes()).hexdigest()[:12]
    return CACHE / f"crates-{lock}"


def fetch():
    """Downloads what needs the network, once: Debian packages and crates."""
    _, suite = rust_version_and_suite()
    archive, vendor = debian_archive(suite), vendor_folder()
    CACHE.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        print(f"fetching Debian {suite}", flush=True)
        part = archive.with_suffix(".part.tar")
        run("mmdebstrap", "--quiet", "--mode=root", "--variant=essential", f"--include={DEBIAN_PACKAGES}", suite, part)
        part.rename(archive)
    if not vendor.exists():
        for older in CACHE.glob("crates-*"):
            shutil.rmtree(older)
        part = CACHE / "crates-part"
        run("cargo", "vendor", "--quiet", "--locked", "--versioned-dirs", part, cwd=ROOT, stdout=subprocess.DEVNULL)
        part.rename(vendor)


def make_image(tag, dockerfile, context):
    docker("build", "--quiet", "--tag", tag, "--file", "-", context, input=dockerfile.encode(), stdout=subprocess.DEVNULL)


def make_base_images():
    _, suite = rust_version_and_suite()
    archive = debian_archive(suite)
    debian = f"pathmeter-base:{archive.stem}"
    if not output("images", "--quiet", debian):
        docker("import", archive, debian, stdout=subprocess.DEVNULL)
    sysroot = run("rustc", "--print", "sysroot", cwd=ROOT, capture_output=True, text=True).stdout.strip()
    make_image("pathmeter-base:rust", f"""FROM {debian}
COPY bin /usr/local/rust/bin
COPY lib /usr/local/rust/lib
ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
""", sysroot)
    make_image(base_of("build"), """FROM pathmeter-base:rust
COPY . /usr/local/crates
RUN mkdir /usr/local/cargo && printf '[source.crates-io]\\nreplace-with = "local"\\n[source.local]\\ndirectory = "/usr/local/crates"\\n' \
    > /usr/local/cargo/config.toml
""", vendor_folder())
    with tempfile.TemporaryDirectory() as empty:
        for service, program in (("prometheus", "prometheus"), ("alertmanager", "prometheus-alertmanager")):
            make_image(COMPOSE["services"][service]["image"], f"""FROM {debian}
RUN install -d -o nobody -g nogroup /{service}
USER nobody
WORKDIR /{service}
ENTRYPOINT ["/usr/bin/{program}"]
""", empty)
    with tempfile.TemporaryDirectory() as busybox:
        shutil.copy("/bin/busybox", busybox)
        make_image(COMPOSE["services"]["key"]["image"], """FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
CMD ["sh"]
""", busybox)


def check_image(work):
    """Checks the files of the image `pathmeter`, and that its binary is static."""
    archive = work / "image.tar"
    docker("save", "--output", archive, "pathmeter")
    found = set()
    with tarfile.open(archive) as image:
        manifest = json.load(image.extractfile("manifest.json"))[0]
        for layer in manifest["Layers"]:
            with tarfile.open(fileobj=image.extractfile(layer)) as files:
                found |= {file.name for file in files if not file.isdir()}
                if "pathmeter" in files.getnames():
                    files.extract("pathmeter", work)
    if found != FILES:
        fail(f"image pathmeter: unexpected files {sorted(found - FILES)} missing files {sorted(FILES - found)}; see COPY in {DOCKERFILE}")
    binary = work / "pathmeter"
    headers = run("readelf", "--wide", "--program-headers", "--dynamic", binary, capture_output=True, text=True).stdout
    for mark in ("INTERP", "(NEEDED)"):
        if mark in headers:
            fail(f"image pathmeter: the binary is not static, its headers have {mark}; see RUSTFLAGS in {DOCKERFILE}")
    config = inspect("pathmeter")["Config"]
    if config["User"] != USER:
        fail(f"image pathmeter: its user is {config['User']}, not {USER}")
    if set(config["ExposedPorts"]) != {"9862/tcp", "9862/udp", "9863/tcp", "9863/udp"}:
        fail(f"image pathmeter: exposes {sorted(config['ExposedPorts'])}")
    print(f"image: {len(found)} files, a static binary of {binary.stat().st_size / 1e6:.1f} MB, user {USER}", flush=True)


# --- One container, with a configuration that the compose file does not use


NETWORK = "pathmeter-names"
CONFIG = """
key_file: /etc/pathmeter/mesh.key
peers:
  - {name: in-hosts, address: in-hosts.test}
  - {name: in-dns, address: in-dns}
  - dns: agents.test
  - kubernetes: {service: pathmeter}
targets:
  - {name: host, address: in-dns}
probes:
  - {name: fast, interval: 100ms}
  - {name: ping, protocol: icmp, targets: [host], interval: 100ms}
"""


def write_config(folder, version, config):
    """The layout of a ConfigMap in Kubernetes: files are links to links, and the inner link is replaced."""
    versioned = folder / f"..{version}"
    versioned.mkdir()
    (versioned / "config.yaml").write_text(config)
    (versioned / "mesh.key").write_text("0f" * 32)
    link = folder / "..new"
    link.symlink_to(versioned.name)
    link.rename(folder / "..data")


def start_agent(name, folder, *options):
    folder.mkdir()
    for file in ("config.yaml", "mesh.key"):
        (folder / file).symlink_to(f"..data/{file}")
    write_config(folder, 1, CONFIG if name == "agent" else "key_file: /etc/pathmeter/mesh.key\nresponder: {open: true}\n")
    docker("run", "--detach", "--name", name, "--network", NETWORK, "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges",
           "--volume", f"{folder}:/etc/pathmeter:ro", "--env", f"PATHMETER_NAME={name}", *options, "pathmeter", stdout=subprocess.DEVNULL)


def answered(url):
    """The number of replies of each peer and target, over all probes."""
    paths = json.loads(ask(f"{url}/api/v1/paths"))["paths"]
    return {path["peer"]: path["counts"]["ok"] for path in paths if path["state"] == "measured"}


def check_container(work):
    docker("network", "create", NETWORK, stdout=subprocess.DEVNULL)
    gateway = json.loads(output("network", "inspect", NETWORK))[0]["IPAM"]["Config"][0]["Gateway"]
    start_agent("in-hosts", work / "in-hosts")
    start_agent("in-dns", work / "in-dns")
    start_agent("of-name", work / "of-name", "--network-alias=agents.test")
    start_agent("of-service", work / "of-service", "--network-alias=pathmeter.measuring.svc.cluster.local")
    start_agent("agent", work / "agent", "--add-host", f"in-hosts.test:{address('in-hosts')}", "--dns", gateway,
                "--dns-search=measuring.svc.cluster.local", "--dns-search=svc.cluster.local", "--dns-search=cluster.local", "--dns-option=ndots:5")
    url = f"http://{address('agent')}:9862"

    def logs():
        return docker("logs", "agent", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def until(what, condition):
        wait_for(what, condition, TIMEOUT_S, logs)

    until("container: its health check succeeds", lambda: inspect("agent")["State"]["Health"]["Status"] == "healthy")
    status = dict(line.split(":\t", 1) for line in pathlib.Path(f"/proc/{inspect('agent')['State']['Pid']}/status").read_text().splitlines())
    if any(int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")):
        fail("container: the process has capabilities")
    if set(status["Uid"].split() + status["Gid"].split()) != set(USER.split(":")) or status["NSpid"].split()[-1] != "1":
        fail(f"container: the program does not run as {USER} and process 1")
    print(f"container: runs as {USER}, process 1, without capabilities, on a read-only root", flush=True)
    names = {"in-hosts", "in-dns", "of-name", "of-service", "host"}
    until(
        "container: peers from /etc/hosts, from the DNS, from dns: and from kubernetes: answer, and a host answers ICMP",
        lambda: (seen := {name for name, ok in answered(url).items() if ok > 5}) == names or seen,
    )
    write_config(work / "agent", 2, CONFIG.replace("name: fast", "name: changed"))
    until("container: a configuration that was replaced as Kubernetes does it is used", lambda: 'probe="changed"' in ask(f"{url}/metrics"))
    docker("kill", "--signal=TERM", "agent", stdout=subprocess.DEVNULL)
    until("container: after SIGTERM it exits", lambda: inspect("agent")["State"]["Status"] == "exited")
    if code := inspect("agent")["State"]["ExitCode"]:
        fail(f"container: exit code {code} after SIGTERM: {logs()}")
    docker("rm", "--force", "agent", "in-hosts", "in-dns", "of-name", "of-service", stdout=subprocess.DEVNULL)
    docker("network", "rm", NETWORK, stdout=subprocess.DEVNULL)


# --- The compose file


def container_of(service):
    return compose("ps", "--all", "--quiet", service, stdout=subprocess.PIPE).stdout.decode().strip()


def logs_of_services():
    return compose("logs", "--no-color", "--tail=30", stdout=subprocess.PIPE).stdout.decode()


def check_compose():
    def until(what, condition, timeout_s=TIMEOUT_S):
        wait_for(f"compose: {what}", condition, timeout_s, logs_of_services)

    compose("up", "--detach", "--no-build", *SERVICES)
    prometheus, alertmanager = ("http://127.0.0.1:9090/api/v1", "http://127.0.0.1:9093/api/v2")
    containers = {name: container_of(name) for name in SERVICES}
    probes = [probe["name"] for probe in yaml.safe_load((FOLDER / "agents/config.yaml").read_text())["probes"]]
    names = set(AGENTS)
    for name in AGENTS:
        url = f"http://{address(containers[name])}:9862"
        wanted = {(probe, peer) for probe in probes for peer in names - {name}}

        def measured():
            paths = json.loads(ask(f"{url}/api/v1/paths"))["paths"]
            seen = {(path["probe"], path["peer"]) for path in paths if path["state"] == "measured" and path["counts"]["ok"] > 2}
            return seen == wanted or f"{len(wanted - seen)} of {len(wanted)} paths have no answers: {paths}"

        until(f"{name} measures the other agents by {', '.join(probes)}", measured)
        until(f"{name} is healthy", lambda: inspect(containers[name])["State"]["Health"]["Status"] == "healthy")

    def scraped():
        found = json.loads(ask(f"{prometheus}/query?query=pathmeter_peer_info"))["data"]["result"]
        seen = {(one["metric"]["instance"], one["metric"]["zone"], one["metric"]["peer"], one["metric"].get("label_zone")) for one in found}
        zones = {name: COMPOSE["services"][name]["environment"]["PATHMETER_LABELS"].removeprefix("zone=") for name in names}
        return seen == {(a, zones[a], b, zones[b]) for a in names for b in names - {a}} or seen

    until("Prometheus has the peers of each agent, with the zones of both", scraped)
    until("Prometheus has found Alertmanager", lambda: "alertmanager:9093" in ask(f"{prometheus}/alertmanagers"))
    silenced = AGENTS[-1]
    docker("pause", containers[silenced], stdout=subprocess.DEVNULL)

    def alerted():
        seen = {(alert["labels"]["alertname"], alert["labels"].get("peer")) for alert in json.loads(ask(f"{alertmanager}/alerts"))}
        return ("PathmeterPeerUnreachableFromMany", silenced) in seen or seen

    until(f"Alertmanager has the alert that {silenced}, which is paused, is unreachable", alerted, ALERT_TIMEOUT_S)
    docker("unpause", containers[silenced], stdout=subprocess.DEVNULL)
    compose("stop")
    for name in AGENTS:
        if code := inspect(containers[name])["State"]["ExitCode"]:
            fail(f"compose: {name} exits with {code} when stopped; log: {logs_of_services()}")
    print("compose: the agents exit with 0 when stopped", flush=True)
    # A second start must keep the key: other agents would refuse an agent with another key.
    made = key_of(containers["key"])
    compose("up", "--detach", "--no-build", "key")
    until("the key is made once", lambda: inspect(containers["key"])["State"]["Status"] == "exited" and key_of(containers["key"]) == made)


def key_of(container):
    """The mesh key in the volume of the container `key`."""
    folder = pathlib.Path(inspect(container)["Mounts"][0]["Source"])
    key = folder / "mesh.key"
    if not re.fullmatch(r"[0-9a-f]{64}", key.read_text()) or key.stat().st_mode & 0o777 != 0o444:
        fail(f"compose: the generated key has {key.stat().st_size} bytes and mode {key.stat().st_mode & 0o777:o}, not 64 and 444")
    return key.read_text()


# --- Docker


def start_docker():
    """The daemon, with its state below the cache folder and its sockets on a /run of its own. Beside it a DNS server to which
    Docker's forwards the names that it does not know, as those with a search domain; it answers that they do not exist."""
    run("ip", "link", "set", "lo", "up")
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    dns = subprocess.Popen([
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
        "--log-facility=/dev/null", "--address=/#/",
    ])
    log = CACHE / "dockerd.log"
    daemon = subprocess.Popen(
        ["dockerd", "--data-root", CACHE / "docker", "--exec-root", "/run/docker", "--pidfile", "/run/docker.pid", "--host", ENVIRONMENT["DOCKER_HOST"]],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log.open("w"), stderr=subprocess.STDOUT,
    )

    def ready():
        if daemon.poll() is not None:
            fail(f"dockerd exited with {daemon.returncode}; its log is {log}")
        return subprocess.run(["docker", "version"], env=ENVIRONMENT, capture_output=True).returncode == 0

    wait_for("docker: the daemon answers", ready, 60, log.read_text)
    return [dns, daemon]


def remove_containers():
    compose("down", "--volumes", "--remove-orphans", stderr=subprocess.DEVNULL)
    if left := output("ps", "--all", "--quiet").split():
        docker("rm", "--force", *left, stdout=subprocess.DEVNULL)
    if NETWORK in output("network", "ls", "--format", "{{.Name}}").split():
        docker("network", "rm", NETWORK, stdout=subprocess.DEVNULL)


def run_here():
    processes = start_docker()
    try:
        # A killed run leaves its containers in the daemon's state.
        remove_containers()
        started = time.monotonic()
        make_base_images()
        print(f"images: base images built in {time.monotonic() - started:.0f} s", flush=True)
        started = time.monotonic()
        compose("build", AGENTS[0])
        print(f"images: pathmeter built in {time.monotonic() - started:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as work:
            work = pathlib.Path(work)
            # The agent in the container runs as another user.
            work.chmod(0o755)
            check_image(work)
            check_container(work)
        check_compose()
        remove_containers()
        docker("image", "prune", "--force", stdout=subprocess.DEVNULL)
    finally:
        end(processes)


def main():
    if sys.argv[1:] == ["--config"]:
        compose("config", "--quiet")
        print("deploy/docker/compose.yaml: docker-compose can read it")
    elif sys.argv[1:] == ["--run-here"]:
        # Clean up when interrupted.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: interrupted"))
        run_here()
    elif sys.argv[1:]:
        sys.exit(__doc__)
    elif os.geteuid() != 0:
        fail("check-containers.py: the Docker daemon needs root; run it with sudo")
    else:
        fetch()
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, __file__, "--run-here"]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
