#!/usr/bin/env python3
"""Builds deploy/docker/Dockerfile without Docker and tries what comes out, as a runtime would run it. Needs root.

    check-image.py              build, then try
    check-image.py --try ROOT   try the files of an image that were unpacked to ROOT

The commands, copies and settings are read from the Dockerfile, so that what is tried is what it says; an instruction that is
not understood is an error. Commands run in a Debian made by mmdebstrap that has what the image `rust` has of it and the host's
Rust. What is compiled stays below the target folder.
"""

import ctypes
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
from trial import ROOT, again_in_namespaces, ask, end, run, wait_for

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve() / "image"
# What the build uses of what is in the image `rust`.
DEBIAN_PACKAGES = "gcc,libc6-dev,ca-certificates"
# What the image may contain.
FILES = {"pathmeter", "etc/passwd", "etc/group", "etc/ssl/certs/ca-certificates.crt", "licenses/LICENSE-APACHE", "licenses/LICENSE-MIT"}
UID = GID = 65532
# A reload is looked for every 10 s; everything else is quicker.
PATIENCE = 30
HTTP = "http://127.0.0.1:9862"


def fail(text):
    sys.exit(f"error: {text}")


# --- What the Dockerfile says


def instructions(text):
    """Its instructions as (name, flags, rest), lines joined and comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, rest = line.strip().split(None, 1)
        flags = []
        while match := re.match(r"--(\S+)\s+", rest):
            flags.append(match[1])
            rest = rest[match.end():]
        yield name.upper(), flags, rest.strip()


def stages(text):
    """Stages in order: name, base, instructions. ARG before the first one is replaced in FROM."""
    arguments, found = {}, []
    for name, flags, rest in instructions(text):
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
            found.append({"name": alias.strip() or str(len(found)), "base": base, "steps": []})
        elif name == "ARG" and not found:
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif not found:
            fail(f"{name} before the first FROM")
        else:
            found[-1]["steps"].append((name, flags, rest))
    return found


def context():
    """What .dockerignore lets through, of the form that ours has: all is ignored but what is named."""
    lines = [line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if lines[0] != "*" or not all(re.fullmatch(r"![\w.-]+", line) for line in lines[1:]):
        fail(".dockerignore is not of the form that is understood here: * and then !NAME")
    return [ROOT / line[1:] for line in lines[1:]]


# --- Building


def make_debian(suite, root):
    """A Debian to build in, from an archive that is made once."""
    archive = TARGET / f"{suite}-{DEBIAN_PACKAGES.replace(',', '-')}.tar"
    if not archive.exists():
        print(f"making a Debian {suite} with {DEBIAN_PACKAGES}")
        part = archive.with_suffix(".part.tar")
        run("mmdebstrap", "--quiet", "--mode=root", "--variant=apt", f"--include={DEBIAN_PACKAGES}", suite, part)
        part.rename(archive)
    run("tar", "-xf", archive, "-C", root, "--numeric-owner")


def build(stage, root):
    """A stage of the image `rust`, in a folder."""
    match = re.fullmatch(r"rust:([\d.]+)-(\w+)", stage["base"])
    if not match:
        fail(f"FROM {stage['base']}: only rust:VERSION-SUITE can be made here")
    version, suite = match.groups()
    make_debian(suite, root)
    sysroot = pathlib.Path(run("rustc", "--print", "sysroot", cwd=ROOT, capture_output=True, text=True).stdout.strip())
    ours = run("rustc", "--version", cwd=ROOT, capture_output=True, text=True).stdout.split()[1]
    if ours != version and not ours.startswith(version + "."):
        print(f"note: built with this host's Rust {ours}, the Dockerfile says {version}")
    mounts = [(sysroot, "/usr/local/rust"), ("/etc/resolv.conf", "/etc/resolv.conf"), ("/dev", "/dev")]
    for file in ("/etc/resolv.conf",):
        (root / file[1:]).unlink(missing_ok=True)
        (root / file[1:]).touch()
    cargo_home = pathlib.Path(os.environ.get("CARGO_HOME") or pathlib.Path.home() / ".cargo")
    folder = "/"
    for name, flags, rest in stage["steps"]:
        if name == "WORKDIR":
            folder = rest
            (root / folder[1:]).mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and rest == ". ." and not flags:
            for source in context():
                run("cp", "-a", source, root / folder[1:])
        elif name == "RUN":
            caches = []
            for flag in flags:
                cache = dict(part.partition("=")[::2] for part in flag.removeprefix("mount=").split(","))
                if not flag.startswith("mount=") or cache.get("type") != "cache":
                    fail(f"RUN --{flag} is not understood here")
                caches.append(cache["target"])
            step(root, folder, rest, mounts + [(cache_of(target, cargo_home), target) for target in caches])
        else:
            fail(f"{' '.join([name, *flags, rest])}: not understood here")


def cache_of(target, cargo_home):
    """Where a cache is kept. Crates are the host's, so that they are not fetched again."""
    own = cargo_home / "registry" if target == "/usr/local/cargo/registry" else TARGET / "cache" / target.strip("/").replace("/", "-")
    own.mkdir(parents=True, exist_ok=True)
    return own


def step(root, folder, command, mounts):
    script = ["set -e"]
    for source, place in mounts:
        place = root / place[1:]
        if pathlib.Path(source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        script.append(f"mount --rbind {shlex.quote(str(source))} {shlex.quote(str(place))}")
    script += [f"mount -t proc proc {shlex.quote(str(root / 'proc'))}", 'exec chroot "$@"']
    environment = {
        "PATH": "/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "CARGO_HOME": "/usr/local/cargo",
    }
    environment |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    run("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(script), "-",
        root, "/bin/sh", "-c", f"cd {shlex.quote(folder)} && {command}", env=environment)


def assemble(stage, roots, root):
    """The files of the stage that is FROM scratch."""
    for name, flags, rest in stage["steps"]:
        if name == "COPY":
            origin = [flag.removeprefix("from=") for flag in flags]
            source, destination = rest.split()
            if len(origin) != 1 or origin[0] not in roots or not (source.endswith("/") and destination.endswith("/")):
                fail(f"COPY {' '.join(flags)} {rest}: not understood here")
            place = root / destination[1:]
            place.mkdir(parents=True, exist_ok=True)
            run("cp", "-a", f"{roots[origin[0]]}{source}.", place)


def how_to_start(stage):
    """What the stage that is FROM scratch says besides its files."""
    settings = {}
    for name, _, rest in stage["steps"]:
        if name in ("ENTRYPOINT", "CMD"):
            settings[name] = json.loads(rest)
        elif name == "HEALTHCHECK":
            settings[name] = json.loads(rest.removeprefix("CMD"))
        elif name in ("USER", "EXPOSE"):
            settings[name] = rest
        elif name not in ("ARG", "LABEL", "COPY"):
            fail(f"{name} {rest}: not understood here")
    return settings


# --- Trying


def check_files(root, settings):
    found = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    if found != FILES:
        fail(f"the image has {sorted(found - FILES)} and lacks {sorted(FILES - found)}")
    binary = root / "pathmeter"
    headers = run("readelf", "--wide", "--program-headers", "--dynamic", binary, capture_output=True, text=True).stdout
    for mark in ("INTERP", "(NEEDED)"):
        if mark in headers:
            fail(f"the binary is not static: it has {mark}")
    if settings["USER"] != f"{UID}:{GID}":
        fail(f"USER is {settings['USER']}")
    if set(settings["EXPOSE"].split()) != {"9862/tcp", "9862/udp", "9863/tcp", "9863/udp"}:
        fail(f"EXPOSE is {settings['EXPOSE']}")
    for name in ("ENTRYPOINT", "HEALTHCHECK"):
        if settings[name][0] != "/pathmeter":
            fail(f"{name} starts {settings[name][0]}")
    print(f"static: no interpreter, no library; {binary.stat().st_size / 1e6:.1f} MB, {len(found)} files")


def enter(root, *command):
    """Becomes what a runtime makes of the image: read-only root, /proc, no capability, no way to get one. We are in mount and
    pid namespaces of our own."""
    libc = ctypes.CDLL(None, use_errno=True)
    run("mount", "--make-rprivate", "/")
    run("mount", "--bind", root, root)
    run("mount", "-t", "proc", "-o", "nosuid,noexec,nodev", "proc", f"{root}/proc")
    run("mount", "-o", "remount,bind,ro", root)
    os.chroot(root)
    os.chdir("/")
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    os.setgroups([])
    os.setresgid(GID, GID, GID)
    os.setresuid(UID, UID, UID)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: unshare's --kill-child, which another user has not
    os.execve(command[0], command, dict(os.environ))


class Container:
    """A running image with a configuration of its own, the first process of its pid namespace."""

    def __init__(self, image, work, settings, name, config, hosts=""):
        self.root = work / name
        run("cp", "-a", image, self.root)
        # What a runtime adds.
        for folder in ("proc", "dev", "sys", "etc/pathmeter"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        # Random numbers come from there: a static program does not find getrandom() at run time.
        for device, minor in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
            os.mknod(self.root / "dev" / device, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
            (self.root / "dev" / device).chmod(0o666)
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n" + hosts)
        (self.root / "etc/resolv.conf").write_text(
            "search measuring.svc.cluster.local svc.cluster.local cluster.local\nnameserver 127.0.0.1\noptions ndots:5\n"
        )
        # As Kubernetes mounts a ConfigMap: what changes is a link to a folder.
        self.write("1", config)
        (self.root / "etc/pathmeter/config.yaml").symlink_to("..data/config.yaml")
        self.log = open(work / f"{name}.log", "w+")
        self.process = self.start(settings["ENTRYPOINT"] + settings["CMD"], name, stdout=self.log, stderr=self.log)

    def write(self, version, config):
        folder = self.root / "etc/pathmeter" / f"..{version}"
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        link = folder.parent / "..new"
        link.symlink_to(folder.name)
        link.rename(folder.parent / "..data")

    def start(self, command, name="", **options):
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PATHMETER_NAME": name}
        return subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, __file__, "--enter", str(self.root), *command],
            env=environment, **options,
        )

    def first(self):
        """The pid of its first process, as we see it."""
        pid = self.process.pid
        return int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def succeeds(self, command):
        return self.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait() == 0

    def said(self):
        self.log.seek(0)
        return self.log.read()


def measured():
    """Peers and targets with the number of echoes that came back."""
    paths = json.loads(ask(HTTP + "/api/v1/paths"))["paths"]
    return {path["peer"]: path["counts"]["ok"] for path in paths if path["state"] == "measured"}


def attempt(image, settings):
    """In a network namespace of our own."""
    run("ip", "link", "set", "lo", "up")
    # As deploy/kubernetes asks for it.
    pathlib.Path("/proc/sys/net/ipv4/ping_group_range").write_text(f"{GID} {GID}")
    listen = "listen: {{http: '{0}:9862', stamp: '{0}:9862', agent: '{0}:9863'}}\n"
    answer = "responder: {open: true}\n"
    config = listen.format("127.0.0.1") + answer + """
peers:
  - {name: in-hosts, address: in-hosts.test}
  - {name: in-dns, address: in-dns.test}
  - dns: agents.test
  - kubernetes: {service: pathmeter}
targets:
  - {name: host, address: 127.0.0.1}
probes:
  - {name: fast, interval: 100ms}
  - {name: ping, protocol: icmp, targets: [host], interval: 100ms}
"""
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        dns = subprocess.Popen([
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
            "--listen-address=127.0.0.1", "--bind-interfaces", "--log-facility=/dev/null",
            # What is not below does not exist.
            "--address=/#/",
            "--host-record=in-dns.test,127.0.0.12", "--host-record=agents.test,127.0.0.13",
            "--host-record=pathmeter.measuring.svc.cluster.local,127.0.0.14",
        ])
        others = [
            Container(image, work, settings, name, listen.format(address) + answer)
            for name, address in [("in-hosts", "127.0.0.11"), ("in-dns", "127.0.0.12"), ("of-name", "127.0.0.13"), ("of-service", "127.0.0.14")]
        ]
        agent = Container(image, work, settings, "agent", config, "127.0.0.11 in-hosts.test\n")
        everybody = [agent, *others]
        try:
            def until(what, condition):
                wait_for(what, condition, PATIENCE, lambda: "".join(container.said() for container in everybody))

            until(f"healthcheck: {' '.join(settings['HEALTHCHECK'])} exits 0", lambda: agent.succeeds(settings["HEALTHCHECK"]))
            status = dict(line.split(":\t", 1) for line in pathlib.Path(f"/proc/{agent.first()}/status").read_text().splitlines())
            if any(int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")):
                fail("it has capabilities")
            if set(status["Uid"].split() + status["Gid"].split()) != {str(UID)} or status["NSpid"].split()[-1] != "1":
                fail("it is somebody else, or not the first process")
            print(f"it runs as {UID}:{GID}, process 1, without any capability, on a read-only root")
            names = {"in-hosts", "in-dns", "of-name", "of-service"}
            until(
                "names: found in /etc/hosts, in the DNS, as dns: and as kubernetes: peers; all answer, and so does a host to ICMP",
                lambda: {name for name, ok in measured().items() if ok > 5} == names | {"host"},
            )
            until("/metrics has the series", lambda: 'pathmeter_echo_requests_total{probe="fast",peer="in-dns"' in ask(HTTP + "/metrics"))
            agent.write("2", config.replace("name: fast", "name: changed"))
            until("a configuration that was swapped as Kubernetes does it is in force", lambda: 'probe="changed"' in ask(HTTP + "/metrics"))
            os.kill(agent.first(), signal.SIGTERM)
            code = agent.process.wait(PATIENCE)
            if code != 0:
                fail(f"after SIGTERM it exits {code}: {agent.said()}")
            if agent.succeeds(settings["HEALTHCHECK"]):
                fail("the healthcheck of an agent that is gone succeeds")
            print("SIGTERM: it drains and exits 0; the healthcheck fails then")
        finally:
            for container in everybody:
                # unshare heeds nothing less, and takes what it has started with it.
                container.process.kill()
                container.process.wait()
            end([dns])


def main():
    if os.geteuid() != 0:
        fail("this needs root")
    TARGET.mkdir(parents=True, exist_ok=True)
    first, last = stages(DOCKERFILE.read_text())
    if last["base"] != "scratch":
        fail(f"the last stage is FROM {last['base']}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=TARGET) as work:
        work = pathlib.Path(work)
        image, root = work / "image", work / first["name"]
        image.mkdir()
        root.mkdir()
        # mkdtemp's folder is root's only; what is below must be seen by whom the image runs as.
        work.chmod(0o755)
        if sys.argv[1:2] == ["--try"]:
            run("cp", "-a", f"{sys.argv[2]}/.", image)
        else:
            build(first, root)
            assemble(last, {first["name"]: root}, image)
            kept = TARGET / "root"
            shutil.rmtree(kept, ignore_errors=True)
            run("cp", "-a", image, kept)
            print(f"built in {time.monotonic() - begun:.0f} s; the files are in {kept}")
        settings = how_to_start(last)
        check_files(image, settings)
        settings_file = work / "settings.json"
        settings_file.write_text(json.dumps(settings))
        # ip's changes must not be the host's.
        again_in_namespaces("--attempt", image, settings_file)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--enter"]:
        enter(*sys.argv[2:])
    elif sys.argv[1:2] == ["--attempt"]:
        attempt(pathlib.Path(sys.argv[2]), json.loads(pathlib.Path(sys.argv[3]).read_text()))
    elif sys.argv[1:] and not (len(sys.argv) == 3 and sys.argv[1] == "--try"):
        sys.exit(__doc__)
    else:
        main()
