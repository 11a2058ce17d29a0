"""The network between all agents, and where it has problems."""

from .kit import *
from .promql import *

AGENTS = 'job="$job",zone=~"$zone"'
PATHS = AGENTS + ',probe=~"$probe",family=~"$family"'
ZONE_PAIRS = 'job="$job",zone=~"$zone",probe=~"$probe",family=~"$family"'
# Rows of a table, and rows and columns of a matrix: the worst ones. A fleet of any size stays legible, and cheap to draw.
WORST = 20
WIDEST = 30

PATH = "instance, peer, probe, family"
LOSS_OF_PAIRS = worst_loss(PATHS, "instance, peer")


def everything(of_pairs, of_groups):
    """Each path once: agents that sum their paths by group export the worst of them as pairs, too."""
    return f"(({of_pairs} unless on (job, instance, probe, family) pathmeter_echo_group_paths{{{PATHS}}}) or ({of_groups}))"


def _of_groups(*names):
    return " - ".join(f"rate(pathmeter_echo_group_{name}_total{{{PATHS}}}[{RECORDED}])" for name in names)


ALL_LOST = everything(f"pathmeter_pair:echo_lost_direction:rate5m{{{PATHS}}}", _of_groups("lost"))
ALL_JUDGED = everything(f"pathmeter_pair:echo_network_verdicts:rate5m{{{PATHS}}}", _of_groups("verdicts", "withdrawn", "host_dropped"))


def board():
    return dashboard(
        FLEET,
        "Pathmeter / Fleet",
        "The network between all agents, and where it has problems.",
        variables=[
            JOB,
            ZONE,
            variable("probe", "Probe", "pathmeter_probe_info", AGENTS, several=True),
            FAMILY,
        ],
        annotations=fleet_events(),
        screen=[
            line(4, (4, agents()), (7, peers_by_state()), (3, unreachable()), (3, loss_now()), (4, pairs_losing()), (3, alerts_firing())),
            line(8, (14, worst_pairs()), (10, alerts())),
            line(10, (8, loss_matrix()), (8, p99_matrix()), (8, zone_loss_matrix())),
        ],
        rows=[
            details(
                "Over time",
                line(8, (12, loss_by_direction_over_time()), (12, states_over_time())),
            ),
            details(
                "Zones",
                line(9, (8, zone_p99_matrix()), (8, zone_loss_hour_matrix()), (8, zone_table())),
                line(8, (12, zone_loss_over_time()), (12, zone_p99_over_time())),
            ),
            details("Location of faults", line(9, (12, peers_lost_by_many()), (12, sources_with_loss()))),
            details("Agents", line(9, (6, versions()), (6, configurations()), (6, not_scraped()), (6, restarts()))),
            details("Connections", line(8, (12, reconnects()), (12, not_connected()))),
            details("Path MTU", line(8, (12, smallest_mtu()), (12, mtu_changes()))),
            details(
                "Bandwidth",
                line(9, (14, lowest_throughputs()), (10, no_runs())),
                line(8, (12, runs()), (12, run_bytes())),
            ),
            details("Routes", line(9, (12, route_changes()), (12, lossy_hops()))),
            details("Groups (metrics.level: group)", line(9, (8, group_loss_matrix()), (8, group_p99()), (8, group_paths()))),
        ],
    )


def fleet_events():
    """Counted, not listed: a rollout restarts a thousand agents."""
    return [
        annotation(
            "Routes changed", RED,
            f"count by (job) (sum by (job, instance, peer) (increase(pathmeter_trace_route_changes_total{{{PATHS}}}[$__rate_interval])) > 0)",
            "of one pair or more",
        ),
        annotation(
            "Path MTU changed", ORANGE,
            f"sum by (instance) (increase(pathmeter_path_mtu_changes_total{{{PATHS}}}[$__rate_interval])) > 0",
            "towards peers of {{instance}}",
        ),
        annotation(
            "Peer draining", BLUE,
            f"max by (peer) (pathmeter_echo_draining{{{PATHS}}}) == 1",
            "{{peer}} said goodbye",
        ),
        annotation(
            "Configuration reloaded", GREEN,
            f"count by (job) (changes(pathmeter_config_last_reload_success_timestamp_seconds{{{AGENTS}}}[$__rate_interval]) > 0)",
            "by one agent or more",
        ),
        annotation(
            "Agents restarted", PURPLE,
            f"count by (job) (time() - process_start_time_seconds{{{AGENTS}}} < 60)",
            "one or more",
        ),
        annotation(
            "Clock stepped", YELLOW,
            f"max by (instance) (increase(pathmeter_clock_steps_total{{{AGENTS}}}[$__rate_interval])) > 0",
            "{{instance}}",
        ),
    ]  # fmt: skip


# --- The first screen


def agents():
    return stat(
        "Agents",
        NUMBER,
        "Agents that Prometheus scrapes, and agents that it cannot scrape. The paths of agents that are not scraped are unknown. Normal: none. Which ones: row Agents.",
        query(f"sum(up{{{AGENTS}}})", "scraped"),
        query(or_zero(f"count(up{{{AGENTS}}} == 0)"), "not scraped"),
        thresholds=NONE_IS_WELL,
    )


def peers_by_state():
    return stat(
        "Peers, as the agents see them",
        NUMBER,
        "Each agent counts its peers and targets by the best state of their paths; a peer that ten agents probe is counted ten times. Draining: the peer "
        "announced its shutdown. Unresolved: its name has no address. Normal: all up.",
        query(f"sum by (state) (pathmeter_peers{{{AGENTS}}})", "{{state}}"),
        thresholds=NONE_IS_WELL,
    )


def unreachable():
    return stat(
        "Peers unreachable",
        NUMBER,
        "Peers from which more than half of the agents that probe them receive no replies. The fault is then at the peer, not on the path. Normal: 0.",
        query(or_zero('count(pathmeter_peer:sources_without_replies:count{job="$job"} / pathmeter_peer:sources:count{job="$job"} > 0.5)')),
        thresholds=NONE_IS_WELL,
    )


def loss_now():
    return stat(
        "Loss now",
        SHARE,
        "Lost datagrams of all paths together, as a share of those that the network is responsible for, over five minutes. It includes unreachable hosts: "
        "check the next number before you blame the network.",
        query(f"sum({ALL_LOST}) / (sum({ALL_JUDGED}) > 0)"),
        thresholds=LOSS,
        graph=True,
    )


def pairs_losing():
    return stat(
        "Pairs with 1 % loss or more",
        NUMBER,
        "Pairs of agent and peer, by the worst of the selected probes, over five minutes. Normal: 0.",
        query(or_zero(f"count({LOSS_OF_PAIRS} >= {LOSS_HIGH})")),
        thresholds=NONE_IS_WELL,
        graph=True,
    )


def alerts_firing():
    return stat(
        "Alerts",
        NUMBER,
        "Firing alerts of Pathmeter's rules, independent of the variables above. Silenced and inhibited alerts are included, because Prometheus does not know about them.",
        query(or_zero('count(ALERTS{alertname=~"Pathmeter.*",alertstate="firing"})')),
        thresholds=NONE_IS_WELL,
    )


def worst_pairs():
    loss = f"pathmeter_pair:echo_loss:ratio_rate5m{{{PATHS}}}"
    network_verdicts = f"pathmeter_pair:echo_network_verdicts:rate5m{{{PATHS}}}"
    p99 = f"pathmeter_pair:echo_rtt_seconds:p99_5m{{{PATHS}}}"
    worst = f"(topk({WORST}, {loss} and {network_verdicts} >= 0.1) or topk({WORST}, {p99}))"

    def of_the_worst(recorded):
        return query(f"max by ({PATH}) ({recorded} and {worst})")

    names = (cell("instance"), cell("peer"))
    return table(
        "Worst paths",
        "The 20 paths with the highest loss and the 20 with the longest p99 of the RTT, over five minutes. A path with fewer than 30 datagrams in that time is "
        "not ranked by loss; a p99 needs 300 replies. Each row links to its pair.",
        of_the_worst(loss),
        of_the_worst(p99),
        of_the_worst(f"pathmeter_pair:echo_rtt_seconds:mean5m{{{PATHS}}}"),
        of_the_worst(network_verdicts),
        columns=[
            Column("instance", "from", links=(to_pair(*names, cell("probe"), cell("family")), to_node(names[0]))),
            Column("peer", "to", links=(to_pair(*names, cell("probe"), cell("family")), to_node(names[1]))),
            Column("probe", "probe", width=100),
            Column("family", "family", width=70),
            Column("A", "loss", SHARE, LOSS, width=90),
            Column("B", "p99", SECONDS, shades=True, width=90),
            Column("C", "mean", SECONDS, width=90),
            Column("D", "sent", DATAGRAMS, width=90),
        ],
        sort=["loss", "p99"],
    )


def alerts():
    by = "alertname, severity, instance, peer, zone, peer_zone"
    firing = 'ALERTS{alertname=~"Pathmeter.*",alertstate="firing"}'
    return table(
        "Firing alerts",
        "Of Pathmeter's rules, with the time since their condition began to hold. docs/runbooks.md explains each. An agent that measures unreliably causes "
        "other alerts: check for that first. Empty: none.",
        query(f'max by ({by}) ((time() - ALERTS_FOR_STATE{{alertname=~"Pathmeter.*"}}) and ignoring (alertstate) {firing})', expects=TROUBLE),
        columns=[
            Column("alertname", "alert"),
            Column("severity", "severity", width=80),
            Column("instance", "agent", width=110, links=(to_node(cell("instance")), to_agent(cell("instance")))),
            Column("peer", "peer", width=110, links=(to_pair(cell("instance"), cell("peer")), to_node(cell("peer")))),
            Column("zone", "zone", width=80),
            Column("peer_zone", "peer's zone", width=90),
            Column("Value", "for", SECONDS, width=80),
        ],
        sort=["for"],
    )


def loss_matrix():
    lost = f"sum by ({{}}) (pathmeter_pair:echo_lost:rate5m{{{{{PATHS}}}}})"
    most = " ".join(f"and on ({side}) topk({WIDEST}, {lost.format(side)})" for side in ("instance", "peer"))
    return matrix(
        "Loss: agent × peer",
        SHARE,
        f"Of the worst selected probe, over five minutes. A row is the agent that measures. The {WIDEST} agents and {WIDEST} peers with the highest loss; "
        "a smaller fleet is shown completely. A red row: that agent or its uplink. A red column: that peer. A single red cell: the path between.",
        f"{LOSS_OF_PAIRS} {most}",
        "instance",
        "peer",
        thresholds=LOSS,
        links=(to_pair(ROW_NAME, COLUMN_NAME),),
        row_links=(to_node(ROW_NAME),),
    )


def p99_matrix():
    p99 = f"max by ({{}}) (pathmeter_pair:echo_rtt_seconds:p99_5m{{{{{PATHS}}}}})"
    most = " ".join(f"and on ({side}) topk({WIDEST}, {p99.format(side)})" for side in ("instance", "peer"))
    return matrix(
        "RTT p99: agent × peer",
        SECONDS,
        f"Of the slowest selected probe, over five minutes, from 300 replies on. The {WIDEST} slowest agents and peers. "
        "Darker is longer; whether that is too long depends on the distance. Select a single probe to compare like with like.",
        f"{p99.format('instance, peer')} {most}",
        "instance",
        "peer",
        links=(to_pair(ROW_NAME, COLUMN_NAME),),
        row_links=(to_node(ROW_NAME),),
    )


def zone_loss_matrix():
    return matrix(
        "Loss: zone × zone",
        SHARE,
        "Over five minutes, from agents in the zone of the row to peers in the zone of the column, of the worst selected probe. Empty if agents have no zone "
        "(label zone of the scrape target, agent.labels.zone of the peers).",
        zone_loss("5m"),
        "zone",
        "peer_zone",
        row_links=(to_zone(ROW_NAME),),
        thresholds=LOSS,
        expects=ZONES,
    )


def zone_loss(window):
    return f"max by (zone, peer_zone) (pathmeter_zone_pair:echo_loss:ratio_rate{window}{{{ZONE_PAIRS}}})"


# --- Details


def loss_by_direction_over_time():
    return timeseries(
        "Loss by direction",
        SHARE,
        "Of all paths together. Forward: from the agent to its peer. Unknown: no later reply that could tell, for example because the host is unreachable.",
        query(f"sum by (direction) ({ALL_LOST}) / on () group_left () (sum({ALL_JUDGED}) > 0)", "{{direction}}"),
        stack=True,
    )


def states_over_time():
    return timeseries(
        "Peers by state",
        NUMBER,
        "As in the first line, over time. Steps of draining are restarts; steps of down are outages, or restarts without a mesh key.",
        query(f"sum by (state) (pathmeter_peers{{{AGENTS}}})", "{{state}}"),
        stack=True,
    )


def zone_p99_matrix():
    return matrix(
        "RTT p99: zone × zone",
        SECONDS,
        "Of the slowest selected probe, over five minutes. Darker is longer.",
        f"max by (zone, peer_zone) (pathmeter_zone_pair:echo_rtt_seconds:p99_5m{{{ZONE_PAIRS}}})",
        "zone",
        "peer_zone",
        row_links=(to_zone(ROW_NAME),),
        expects=ZONES,
    )


def zone_loss_hour_matrix():
    return matrix(
        "Loss in an hour: zone × zone",
        SHARE,
        "As on the first screen, over one hour: what is red there and green here has just begun; the reverse has just ended.",
        zone_loss("1h"),
        "zone",
        "peer_zone",
        row_links=(to_zone(ROW_NAME),),
        thresholds=LOSS,
        expects=ZONES,
    )


def zone_table():
    by = "zone, peer_zone, probe, family"

    def recorded(name):
        return query(f"max by ({by}) ({name}{{{ZONE_PAIRS}}})", expects=ZONES)

    return table(
        "Loss between zones, with confidence interval",
        "Over five minutes, by probe. The true ratio lies between low and high with 95 % confidence (Wilson): a wide interval means few datagrams.",
        recorded("pathmeter_zone_pair:echo_loss:ratio_rate5m"),
        recorded("pathmeter_zone_pair:echo_loss:wilson_low_5m"),
        recorded("pathmeter_zone_pair:echo_loss:wilson_high_5m"),
        columns=[
            Column("zone", "from"),
            Column("peer_zone", "to"),
            Column("probe", "probe", width=90),
            Column("family", "family", width=60),
            Column("A", "loss", SHARE, LOSS, width=80),
            Column("B", "low", SHARE, width=75),
            Column("C", "high", SHARE, width=75),
        ],
        sort=["low", "loss"],
    )


def zone_loss_over_time():
    return timeseries(
        "Loss between zones: the ten worst",
        SHARE,
        "Over five minutes. At each moment the ten pairs of zones with the highest loss.",
        query(f"topk(10, {zone_loss('5m')})", "{{zone}} → {{peer_zone}}", expects=ZONES),
    )


def zone_p99_over_time():
    return timeseries(
        "RTT p99 between zones: the ten longest",
        SECONDS,
        "Of the slowest selected probe. A step is a route change; a gradual rise is queueing.",
        query(
            f"topk(10, max by (zone, peer_zone) (pathmeter_zone_pair:echo_rtt_seconds:p99_5m{{{ZONE_PAIRS}}}))",
            "{{zone}} → {{peer_zone}}",
            expects=ZONES,
        ),
        log=True,
    )


def peers_lost_by_many():
    lost = 'pathmeter_peer:sources_without_replies:count{job="$job"}'
    probed = 'pathmeter_peer:sources:count{job="$job"}'
    worst = f"and on (peer) topk({WORST}, sum by (peer) ({lost} > 0))"
    return table(
        "Peers without replies",
        "By the number of agents that probe them without receiving replies. Most of them: the peer or its uplink is down. One of many: the path between the two. Empty: none.",
        query(f"sum by (peer) ({lost}) {worst}", expects=TROUBLE),
        query(f"sum by (peer) ({probed}) {worst}", expects=TROUBLE),
        query(f"sum by (peer) ({lost}) / sum by (peer) ({probed}) {worst}", expects=TROUBLE),
        columns=[
            Column("peer", "peer", links=(to_node(cell("peer")), to_agent(cell("peer")))),
            Column("A", "lost by", NUMBER),
            Column("B", "probed by", NUMBER),
            Column("C", "share", SHARE, MOST),
        ],
        sort=["share", "lost by"],
    )


def sources_with_loss():
    return bargauge(
        "Agents by their share of peers with loss",
        SHARE,
        "Share of an agent's peers with 1 % loss or more: the fifteen highest. Near 100 %: the fault is at that host or its uplink, not at its peers.",
        query(
            f"topk(15, (count by (instance) ({LOSS_OF_PAIRS} >= {LOSS_HIGH}) or count by (instance) ({LOSS_OF_PAIRS}) * 0)"
            f" / count by (instance) ({LOSS_OF_PAIRS}))",
            "{{instance}}",
        ),
        thresholds=MOST,
        high=1,
        links=(to_node("${__field.labels.instance}"),),
    )


def versions():
    return bargauge(
        "Agents by version",
        NUMBER,
        "Different versions are compatible, but should be present only during an upgrade.",
        query(f"count by (version) (pathmeter_build_info{{{AGENTS}}})", "{{version}}"),
    )


def configurations():
    return bargauge(
        "Agents by configuration",
        NUMBER,
        "By the hash of the configuration file in use. The file should be the same on all agents: more than one bar means a rollout, or an agent that rejected it.",
        query(f"count by (hash) (pathmeter_config_info{{{AGENTS}}})", "{{hash}}"),
    )


def not_scraped():
    return table(
        "Agents that are not scraped",
        "Targets of the job that Prometheus cannot scrape. Empty: none. An agent that disappeared from service discovery is not listed.",
        query(f"max by (instance, zone) (up{{{AGENTS}}} == 0)", expects=TROUBLE),
        columns=[
            Column("instance", "agent", links=(to_node(cell("instance")), to_agent(cell("instance")))),
            Column("zone", "zone"),
            Column("Value", "up", NUMBER, width=60),
        ],
        sort=[],
    )


def restarts():
    return table(
        "Agents that restarted",
        "In the time range of the dashboard. If an agent restarted more than once, check its log.",
        query(f"max by (instance, zone) (changes(process_start_time_seconds{{{AGENTS}}}[$__range])) > 0", expects=TROUBLE),
        columns=[
            Column("instance", "agent", links=(to_agent(cell("instance")),)),
            Column("zone", "zone"),
            Column("Value", "times", NUMBER, FEW_ARE_ODD, width=70),
        ],
        sort=["times"],
    )


def reconnects():
    return timeseries(
        "Connections lost, by reason",
        EVENTS,
        "Closed connections that carried messages, and failed attempts to establish them, of probes over tcp, websocket and http. Normal: none.",
        query(f"sum by (reason) (rate(pathmeter_echo_reconnects_total{{{PATHS}}}[$__rate_interval]))", "{{reason}}", expects=STREAMS),
        stack=True,
    )


def not_connected():
    return table(
        "Paths without a connection",
        "Paths over tcp, websocket and http without an established connection. For the reason see the row Connections of the pair. Empty: none.",
        query(f"max by ({PATH}) (pathmeter_echo_connected{{{PATHS}}} == 0)", expects=TROUBLE),
        columns=[
            Column("instance", "from", links=(to_pair(cell("instance"), cell("peer"), cell("probe")),)),
            Column("peer", "to", links=(to_pair(cell("instance"), cell("peer"), cell("probe")),)),
            Column("probe", "probe"),
            Column("family", "family", width=70),
        ],
        sort=[],
    )


def smallest_mtu():
    by = "instance, peer, probe, family"
    return table(
        f"Smallest path MTUs ({WORST})",
        "The longest packet that reaches the peer unfragmented. Below 1500 there is a tunnel on the path; below 1280 IPv6 does not work.",
        query(f"bottomk({WORST}, max by ({by}) (pathmeter_path_mtu_bytes{{{PATHS}}}))", expects=PATH_MTU),
        columns=[
            Column("instance", "from", links=(to_pair(cell("instance"), cell("peer"), cell("probe")),)),
            Column("peer", "to", links=(to_pair(cell("instance"), cell("peer"), cell("probe")),)),
            Column("probe", "probe"),
            Column("family", "family", width=70),
            Column("Value", "MTU", PACKET, width=90),
        ],
        sort=[],
    )


def mtu_changes():
    by = "instance, peer, probe, family"
    return table(
        "Path MTUs that changed",
        "In the time range of the dashboard. A change together with loss of long packets is an MTU black hole; alone it is a route change. Empty: none.",
        query(f"max by ({by}) (increase(pathmeter_path_mtu_changes_total{{{PATHS}}}[$__range])) > 0", expects=TROUBLE),
        columns=[
            Column("instance", "from", links=(to_pair(cell("instance"), cell("peer"), cell("probe")),)),
            Column("peer", "to", links=(to_pair(cell("instance"), cell("peer"), cell("probe")),)),
            Column("probe", "probe"),
            Column("family", "family", width=70),
            Column("Value", "times", NUMBER, FEW_ARE_ODD, width=90),
        ],
        sort=["times"],
    )


def lowest_throughputs():
    by = "instance, peer, probe, family, direction"
    throughput = f"max by ({by}) (pathmeter_bandwidth_throughput_bytes_per_second{{{PATHS}}})"
    usual = f"max by ({by}) (pathmeter_pair:bandwidth_throughput_bytes_per_second:median7d{{{PATHS}}})"

    def shown(expr):
        return query(f"{expr} and bottomk({WORST}, {throughput})", expects=BANDWIDTH)

    to = to_pair(cell("instance"), cell("peer"))
    return table(
        f"Lowest throughputs ({WORST})",
        "Payload of the last run. Limited by the path: it is the capacity; otherwise the capacity is at least that. Of usual: compared with the median of a "
        "week, from six runs on. Added delay: p95 of the RTT under load above the idle median.",
        shown(f"8 * {throughput}"),
        shown(f"max by ({by}) (pathmeter_bandwidth_capacity{{{PATHS}}})"),
        shown(f"{throughput} / ({usual} > 0)"),
        shown(f"max by ({by}) (pathmeter_bandwidth_added_delay_seconds{{{PATHS}}})"),
        shown(f"time() - max by ({by}) (pathmeter_bandwidth_run_timestamp_seconds{{{PATHS}}})"),
        columns=[
            Column("instance", "from", links=(to,)),
            Column("peer", "to", links=(to,)),
            Column("probe", "probe", width=90),
            Column("family", "family", width=60),
            Column("direction", "direction", width=80),
            Column("A", "throughput", BITS_PER_SECOND, width=100),
            Column("B", "by the path", NUMBER, width=90),
            Column("C", "of usual", SHARE, width=80),
            Column("D", "added delay", SECONDS, width=90),
            Column("E", "age", SECONDS, width=80),
        ],
        sort=["throughput"],
        ascending=True,
    )


def no_runs():
    return timeseries(
        "Bandwidth runs skipped and failed in a day",
        NUMBER,
        "In the 24 hours before, by reason. Budget: too few bytes are left for today, at one of the two agents. Busy: other runs took the time. Request, connect: "
        "the peer was not reached. Normal: few.",
        *(
            query(f"sum by (reason) (increase(pathmeter_bandwidth_{name}_total{{{PATHS}}}[1d])) > 0", f"{text}: {{{{reason}}}}", expects=TROUBLE)
            for name, text in (("skipped", "skipped"), ("failures", "failed"))
        ),
        stack=True,
    )


def runs():
    return timeseries(
        "Bandwidth runs in a day, by what ended them",
        NUMBER,
        "In the 24 hours before. Bytes and time: complete. Delay and loss: stopped because they disturbed other traffic; which paths, PathmeterBandwidthRunsStopped says.",
        query(f"sum by (reason) (increase(pathmeter_bandwidth_runs_total{{{PATHS}}}[1d])) > 0", "{{reason}}", expects=BANDWIDTH),
        stack=True,
    )


def run_bytes():
    return timeseries(
        "Bytes of bandwidth runs in a day",
        BYTES,
        f"Payload received in the 24 hours before, by the agent whose probe began the runs; the {WORST} largest. It counts in the budgets of both agents.",
        query(f"topk({WORST}, sum by (instance) (increase(pathmeter_bandwidth_received_bytes_total{{{PATHS}}}[1d])))", "{{instance}}", expects=BANDWIDTH),
        stack=True,
    )


def route_changes():
    changes = f"sum by (instance, peer, family, direction) (increase(pathmeter_trace_route_changes_total{{{PATHS}}}[$__range]))"
    return table(
        f"Routes that changed most ({WORST})",
        "Confirmed changes in the time range of the dashboard, of all flows together, in each direction. Many pairs with the same peer or zone: a common "
        "cause. Empty: none.",
        query(f"topk({WORST}, {changes} >= 0.5)", expects=TROUBLE),
        columns=[
            Column("instance", "from", links=(to_pair(cell("instance"), cell("peer")),)),
            Column("peer", "to", links=(to_pair(cell("instance"), cell("peer")),)),
            Column("family", "family", width=70),
            Column("direction", "direction", width=90),
            Column("Value", "changes", NUMBER, FEW_ARE_ODD, width=90),
        ],
        sort=["changes"],
    )


def lossy_hops():
    return table(
        "Hops from which on packets are lost",
        "More than a quarter of the latest trace probes to this hop and to all hops behind it are lost. Reverse: counted from the peer. Missing answers of "
        "routers alone do not count. A peer that is down shows as loss, too. Empty: none.",
        query(f"max by (instance, peer, family, direction) (pathmeter_trace_first_lossy_hop{{{PATHS}}} > 0)", expects=TROUBLE),
        columns=[
            Column("instance", "from", links=(to_pair(cell("instance"), cell("peer")),)),
            Column("peer", "to", links=(to_pair(cell("instance"), cell("peer")),)),
            Column("family", "family", width=70),
            Column("direction", "direction", width=90),
            Column("Value", "hop", NUMBER, width=70),
        ],
        sort=[],
    )


def group_loss_matrix():
    by = "sum by (instance, group)"
    return matrix(
        "Loss: agent × group of peers",
        SHARE,
        "Of agents that sum their paths by the peer's zone, over five minutes.",
        f"{by} ({_of_groups('lost')}) / ({by} ({_of_groups('verdicts', 'withdrawn', 'host_dropped')}) > 0)",
        "instance",
        "group",
        thresholds=LOSS,
        row_links=(to_node(ROW_NAME),),
        expects=GROUPS,
    )


def group_p99():
    return timeseries(
        "RTT p99 by group",
        SECONDS,
        "Of all agents' paths of a probe to the peers of a group, from 300 replies on.",
        query(quantile(0.99, "pathmeter_echo_group_rtt_seconds", PATHS, "probe, group", LONG), "{{probe}} → {{group}}", expects=GROUPS),
        log=True,
    )


def group_paths():
    return timeseries(
        "Paths by group",
        NUMBER,
        "Number of paths summed in each group. The worst of them are also exported individually.",
        query(f"sum by (group) (pathmeter_echo_group_paths{{{PATHS}}})", "{{group}}", expects=GROUPS),
        stack=True,
    )
