#!/usr/bin/python3
"""Checks the inhibition rules of the shipped configuration with a real Alertmanager.

    check-inhibitions.py             runs the cases below, and checks that each rule is needed for one of them

Needs Debian's prometheus-alertmanager and python3-yaml.
"""

import datetime
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "deploy/prometheus/alertmanager.yml"


def alert(name, **labels):
    return {"alertname": f"Pathmeter{name}", "job": "pathmeter", "severity": "warning", **labels}


def loss(instance, peer, **labels):
    return alert("LossHigh", scope="pair", instance=instance, peer=peer, probe="fast", **labels)


def jitter(instance, peer):
    return alert("JitterHigh", scope="pair", about="latency", instance=instance, peer=peer, probe="fast")


def bandwidth(name, peer, **labels):
    return alert(f"Bandwidth{name}", scope="pair", instance="a", peer=peer, probe="capacity", family="ipv4", **labels)


def unreachable(instance, peer):
    return alert("PeerUnreachable", scope="pair", instance=instance, peer=peer)


def down(name):
    return alert("AgentDown", scope="agent", instance=name, peer=name)


def from_many(peer):
    return alert("PeerUnreachableFromMany", scope="peer", severity="critical", peer=peer, instance=peer)


def unreliable(instance, reason):
    return alert("MeasurementUnreliable", scope="agent", instance=instance, reason=reason)


def draining(peer, state):
    return alert("PeerDraining", scope="peer", severity="info", peer=peer, state=state)


ZONE = alert("ZonePairLossHigh", scope="zone", severity="critical", zone="x", peer_zone="y", probe="fast")
MANY_DOWN = alert("ManyAgentsDown", scope="agent", severity="critical")

# Source alert, target alert, and whether the target is notified while both fire.
CASES = [
    ("an agent without processor time inhibits its path alerts", unreliable("a", "loop_lag"), loss("a", "b"), False),
    ("an agent with accounting errors inhibits its alerts", unreliable("a", "accounting"), jitter("a", "b"), False),
    ("an unreliable agent does not inhibit alerts of others", unreliable("a", "loop_lag"), loss("b", "a"), True),
    ("unreliable timestamps do not inhibit loss", unreliable("a", "user_timestamps"), loss("a", "b"), True),
    ("unreliable clocks inhibit latency alerts", unreliable("a", "clock_steps"), jitter("a", "b"), False),
    ("a draining peer inhibits its alerts", draining("b", "away"), unreachable("a", "b"), False),
    ("a draining peer inhibits alerts of all agents about it", draining("b", "away"), from_many("b"), False),
    ("a draining peer inhibits its scrape alert", draining("b", "away"), down("b"), False),
    ("a draining peer does not inhibit other peers", draining("b", "away"), unreachable("a", "c"), True),
    ("losses during a restart are inhibited", draining("b", "back"), loss("a", "b"), False),
    ("a host that is unreachable after its return is notified", draining("b", "back"), from_many("b"), True),
    ("an unreachable host is one page", from_many("b"), unreachable("a", "b"), False),
    ("alerts from a lossy agent about others are inhibited", from_many("b"), loss("b", "c"), False),
    ("an unreachable host inhibits its scrape alert", from_many("b"), down("b"), False),
    ("losses to other peers are notified", from_many("b"), loss("a", "c"), True),
    ("zone alerts are always notified", from_many("b"), ZONE, True),
    ("an agent that is down inhibits unreachable alerts", down("b"), unreachable("a", "b"), False),
    ("a failed scrape does not inhibit loss alerts", down("b"), loss("a", "b"), True),
    ("a failed scrape does not inhibit an unreachable host", down("b"), from_many("b"), True),
    ("many agents down are one page", MANY_DOWN, down("b"), False),
    ("an unreachable path inhibits its loss alert", unreachable("a", "b"), loss("a", "b"), False),
    ("an unreachable path does not inhibit other paths", unreachable("a", "b"), loss("a", "c"), True),
    ("a spent budget explains old results", bandwidth("BudgetSpent", "b"), bandwidth("Stale", "b", direction="reverse"), False),
    ("a spent budget does not explain those of other paths", bandwidth("BudgetSpent", "b"), bandwidth("Stale", "c"), True),
]


# A canary alert and inhibition, which show that the Alertmanager has processed earlier alerts.
CANARY, CAGED = {"alertname": "Canary"}, {"alertname": "Caged"}
CANARY_RULE = {"source_matchers": ['alertname="Canary"'], "target_matchers": ['alertname="Caged"']}

PATIENCE = 20


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Alertmanager:
    """A running Alertmanager with a configuration in a folder of its own."""

    def __init__(self, config):
        self.folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self.folder.name)
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.program = subprocess.Popen(
            [
                "prometheus-alertmanager",
                f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
                "--cluster.listen-address=",
                "--log.level=error",
            ],
        )

    def __enter__(self):
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self.ask("/-/ready", parse=False) and self
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > end or self.program.poll() is not None:
                    sys.exit("error: the Alertmanager does not start")
                time.sleep(0.05)

    def __exit__(self, *_):
        self.program.kill()
        self.program.wait()
        self.folder.cleanup()

    def ask(self, path, body=None, parse=True):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            text = answer.read()
        return json.loads(text) if parse and text else True

    def is_notified(self, source, target):
        """Whether the target is notified while both alerts fire."""
        now = datetime.datetime.now(datetime.timezone.utc)
        # Inhibition sources are processed in order, with a delay: when the canary is, the source is.
        for fires in ([source, target], [CANARY, CAGED]):
            self.ask("/api/v2/alerts", [{"labels": labels} for labels in fires])
        self.wait("the canary inhibits", lambda: self.states().get(key(CAGED)) == "suppressed")
        is_told = self.states()[key(target)] != "suppressed"
        self.ask(
            "/api/v2/alerts",
            [{"labels": labels, "endsAt": now.isoformat()} for labels in (source, target, CANARY, CAGED)],
        )
        self.wait("alerts that are over are gone", lambda: not self.states())
        return is_told

    def states(self):
        return {key(one["labels"]): one["status"]["state"] for one in self.ask("/api/v2/alerts")}

    def wait(self, what, is_so):
        end = time.monotonic() + PATIENCE
        while not is_so():
            if time.monotonic() > end:
                sys.exit(f"error: timed out after {PATIENCE} s: {what}")
            time.sleep(0.02)


def key(labels):
    return tuple(sorted(labels.items()))


def failures(config):
    """The cases with another result than expected."""
    config = {**config, "inhibit_rules": [*config["inhibit_rules"], CANARY_RULE]}
    with Alertmanager(config) as alertmanager:
        return [name for name, source, target, notified in CASES if alertmanager.is_notified(source, target) != notified]


def main():
    config = yaml.safe_load(SHIPPED.read_text())
    config.pop("templates")
    wrong = failures(config)
    if wrong:
        sys.exit("\n".join(wrong) + f"\nerror: {len(wrong)} of {len(CASES)} cases failed")
    rules = config["inhibit_rules"]
    for index, rule in enumerate(rules):
        without = {**config, "inhibit_rules": rules[:index] + rules[index + 1 :]}
        if not failures(without):
            sys.exit(f"error: no case needs the rule {rule}")
    print(f"{len(CASES)} cases passed, and each of {len(rules)} inhibitions is needed for one")


if __name__ == "__main__":
    main()
