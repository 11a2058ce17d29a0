"""The path from $instance to $peer, by one probe.

One probe, because loss and RTT of different protocols cannot be combined; the table lists the others, with links.
The name of an agent must be its label `instance` in Prometheus, so that `peer` on one side is `instance` on the other.
"""

from .kit import *
from .promql import *

# By pattern, so that a link can name several probes.
PATH = 'job="$job",instance="$instance",peer="$peer",probe=~"$probe",family=~"$family"'
# Paths of trace and bandwidth probes: other probes of the same pair.
OF_PAIR = 'job="$job",instance="$instance",peer="$peer",family=~"$family"'
# The same as PATH, measured by the other side.
TWIN = 'job="$job",instance="$peer",peer="$instance",probe=~"$probe",family=~"$family"'
# Backticks: what the format regex escapes has single backslashes, which a quoted string would not have.
BOTH_AGENTS = 'job="$job",instance=~`${instance:regex}|${peer:regex}`'


def board():
    return dashboard(
        PAIR,
        "Pathmeter / Pair",
        "The path from one agent to one peer, measured from both sides.",
        variables=[
            JOB,
            ZONE,
            INSTANCE,
            variable("peer", "Peer", "pathmeter_echo_verdicts_total", 'job="$job",instance="$instance"'),
            variable("probe", "Probe", "pathmeter_echo_verdicts_total", 'job="$job",instance="$instance",peer="$peer"'),
            variable("family", "Family", "pathmeter_echo_verdicts_total", 'job="$job",instance="$instance",peer="$peer",probe=~"$probe"'),
        ],
        annotations=events(BOTH_AGENTS, PATH, OF_PAIR),
        links=[
            link(
                "Opposite direction",
                "/d/pathmeter-pair?${datasource:queryparam}&${job:queryparam}&var-instance=${peer}&var-peer=${instance}&${probe:queryparam}&${family:queryparam}",
                "The same pair, measured by the peer",
            )
        ],
        screen=[
            line(4, (3, last_reply()), (3, loss_now()), (6, loss_now_by_direction()), (6, round_trip_now()), (3, jitter_now()), (3, hops_now())),
            line(9, (9, loss()), (7, twins_loss()), (8, probes())),
            line(9, (12, round_trip_heatmap()), (12, round_trip())),
        ],
        rows=[
            details(
                "Datagrams",
                line(8, (8, verdicts()), (8, out_of_order()), (8, bursts())),
                line(8, (8, not_sent()), (8, mismatched()), (8, lossy_flows())),
            ),
            details(
                "Delay",
                line(8, (8, minimum()), (8, jitter()), (8, turnaround())),
                line(8, (16, round_trip_by_probe()), (8, user_timestamps())),
            ),
            details("Route", line(8, (8, hops()), (8, dscp()), (8, ecn()))),
            details(
                "Routes (kind: trace)",
                line(6, (12, route()), (12, reached())),
                line(8, (8, routers()), (8, route_changes()), (8, first_lossy_hop())),
                line(8, (8, traces()), (8, trace_probes()), (8, rate_limited_hops())),
                line(5, (24, ttl_clamped())),
            ),
            details("Hops (hop_metrics)", line(10, (12, hop_table()), (12, hop_rtt()))),
            details("Path MTU", line(8, (12, mtu()), (12, mtu_probes()))),
            details(
                "Bandwidth (kind: bandwidth)",
                line(8, (12, throughput()), (12, run_latency())),
                line(8, (8, added_delay()), (8, run_loss()), (8, run_bytes())),
                line(8, (12, runs()), (12, no_runs())),
            ),
            details(
                "Connections (tcp, websocket, http)",
                line(7, (12, connected()), (12, reconnects())),
                line(8, (8, connect_time()), (8, handshake()), (8, connect_failures())),
                line(8, (8, retransmits()), (8, what_limits()), (8, kernel_round_trip())),
                line(7, (8, delivery_rate()), (8, unexpected()), (8, certificate())),
            ),
            details(
                "Measured by the peer",
                line(8, (12, twins_round_trip()), (12, both_jitters())),
                line(8, (8, twins_verdicts()), (8, both_hops()), (8, twins_turnaround())),
            ),
        ],
    )


# --- The first screen


def last_reply():
    return stat(
        "Last reply",
        SECONDS,
        "Age of the last reply at the time of the last scrape, plus up to one scrape interval. Normal: below the sum of the scrape interval and the probe interval.",
        query(f"time() - max(pathmeter_echo_last_reply_timestamp_seconds{{{PATH}}} > 0)"),
        thresholds=SILENCE,
        decimals=0,
    )


def loss_now():
    return stat(
        "Loss now",
        SHARE,
        "Over five minutes, without datagrams that a host dropped or that were withdrawn.",
        query(recorded_loss(PATH)),
        thresholds=LOSS,
    )


def loss_now_by_direction():
    return stat(
        "Loss now, by direction",
        SHARE,
        "Forward: the request did not reach the peer. Reverse: its reply was lost. Unknown: no evidence, because no later reply arrived or the other side "
        "keeps no record. The directions add up to the loss.",
        query(recorded_loss_by_direction(PATH), "{{direction}}"),
        thresholds=LOSS,
    )


def round_trip_now():
    return stat(
        "RTT now",
        SECONDS,
        "Over ten minutes, without the responder's turnaround time. Quantiles are interpolated between bounds of a 1-2-5 scale, and are shown from 6, 30 and 300 replies on.",
        *(query(quantile(q, "pathmeter_echo_rtt_seconds", PATH, window=LONG), f"p{q * 100:.0f}") for q in (0.5, 0.9, 0.99)),
    )


def jitter_now():
    return stat(
        "Jitter now",
        SECONDS,
        "Mean difference between the RTTs of consecutive datagrams (RFC 3393), over five minutes. For calls, a tenth of the RTT is much.",
        query(mean("pathmeter_echo_ipdv_seconds", PATH, window=RECORDED)),
    )


def hops_now():
    return stat(
        "Routers",
        NUMBER,
        "On the path in each direction, from the received TTL. Known only between agents. Different numbers are an asymmetric route, which is common and not a fault.",
        query(f"max by (direction) (pathmeter_echo_hops{{{PATH}}})", "{{direction}}"),
    )


def loss():
    return timeseries(
        "Loss: $instance → $peer, by direction",
        SHARE,
        "Lost datagrams, as a share of those that the network is responsible for. A loss is counted after lost_after, some seconds after it happened. Normal: "
        "none. TCP suffers from one in a thousand.",
        query(loss_by_direction(PATH), "{{direction}}"),
        stack=True,
        bars=True,
    )


def twins_loss():
    return timeseries(
        "Loss: $peer → $instance, measured by the peer",
        SHARE,
        "The same pair measured by the other side: its forward is this side's reverse. Loss that both measure in the same direction of the wire is in the "
        "network. Empty: the peer has no agent, does not probe back with this probe, or its name differs from its label instance.",
        query(loss_by_direction(TWIN), "{{direction}}"),
        stack=True,
        bars=True,
    )


def probes():
    by = "probe, family"

    def recorded(name):
        return query(f'max by ({by}) ({name}{{job="$job",instance="$instance",peer="$peer"}})')

    link_to_it = (to_pair("${instance}", "${peer}", cell("probe"), cell("family")),)
    return table(
        "Probes of this pair",
        "All paths between the two over five minutes, independent of the selection above; a click selects one. Loss of one protocol only is a firewall, a "
        "shaper or a busy server, not the network.",
        recorded("pathmeter_pair:echo_loss:ratio_rate5m"),
        recorded("pathmeter_pair:echo_rtt_seconds:mean5m"),
        recorded("pathmeter_pair:echo_rtt_seconds:p99_5m"),
        recorded("pathmeter_pair:echo_ipdv_seconds:mean5m"),
        recorded("pathmeter_pair:echo_network_verdicts:rate5m"),
        columns=[
            Column("probe", "probe", links=link_to_it),
            Column("family", "family", width=60, links=link_to_it),
            Column("A", "loss", SHARE, LOSS, width=80),
            Column("B", "mean", SECONDS, width=80),
            Column("C", "p99", SECONDS, width=80),
            Column("D", "jitter", SECONDS, width=80),
            Column("E", "sent", DATAGRAMS, width=80),
        ],
        sort=["loss", "p99"],
    )


def round_trip_heatmap():
    return heatmap(
        "RTT distribution",
        SECONDS,
        "Replies in each bucket between two points of the graph. Two bands are two routes. A cloud above the band is queueing.",
        buckets("pathmeter_echo_rtt_seconds", PATH),
    )


def round_trip():
    return timeseries(
        "RTT",
        SECONDS,
        "Without the responder's turnaround time; p99 over ten minutes. Shown from 6, 30 and 300 replies on.",
        *_quantiles(PATH),
        log=True,
    )


def _quantiles(where):
    return (
        query(quantile(0.5, "pathmeter_echo_rtt_seconds", where), "p50"),
        query(quantile(0.9, "pathmeter_echo_rtt_seconds", where), "p90"),
        query(quantile(0.99, "pathmeter_echo_rtt_seconds", where, window=LONG), "p99"),
    )


# --- Datagrams


def _verdicts(where):
    answered = total("pathmeter_echo_rtt_seconds_count", where)
    late = total("pathmeter_echo_late_total", where)
    return (
        query(f"{answered} - {late}", "ok"),
        query(late, "late"),
        query(total("pathmeter_echo_lost_total", where), "lost"),
        query(total("pathmeter_echo_host_dropped_total", where), "host-dropped"),
        query(total("pathmeter_echo_withdrawn_total", where), "withdrawn"),
    )


def verdicts():
    return timeseries(
        "Verdicts",
        DATAGRAMS,
        "Each datagram gets one verdict. Late: answered after late_after. Host-dropped: received but dropped by one of the hosts. Withdrawn: the wait was "
        "abandoned, as at a restart. Normal: all ok.",
        *_verdicts(PATH),
        stack=True,
    )


def out_of_order():
    return timeseries(
        "Late, duplicate and reordered",
        DATAGRAMS,
        "Late: RTT above late_after. Very late: after the datagram counted as lost. Duplicates: further copies of a reply. Reordered: after one that was sent "
        "later. Normal: none; a little reordering comes from parallel links.",
        query(total("pathmeter_echo_late_total", PATH), "late"),
        query(total("pathmeter_echo_very_late_total", PATH), "very late"),
        query(total("pathmeter_echo_duplicates_total", PATH), "duplicate"),
        query(total("pathmeter_echo_reordered_total", PATH), "reordered"),
    )


def bursts():
    return timeseries(
        "Mean length of loss bursts",
        NUMBER,
        "Near 1: single losses, as from a full queue or a bad optic. Long: interruptions. Empty without loss.",
        query(mean("pathmeter_echo_loss_burst_length", PATH), "length", expects=TROUBLE),
    )


def not_sent():
    return timeseries(
        "Not sent",
        DATAGRAMS,
        "Scheduled sends that the process missed, and datagrams that the kernel refused, by reason. A problem of this host, not counted as loss. Normal: none.",
        query(total("pathmeter_echo_unsent_total", PATH), "missed send"),
        query(total("pathmeter_echo_send_errors_total", PATH, "error"), "{{error}}"),
    )


def mismatched():
    return timeseries(
        "Invalid replies",
        EVENTS,
        "Received datagrams that are not valid replies, by reason, and ICMP errors. auth: the two sides have different keys. ICMP errors: a router or the peer "
        "refuses; /api/v1/paths lists them by type. Normal: none.",
        query(total("pathmeter_echo_mismatched_total", PATH, "reason"), "{{reason}}"),
        query(total("pathmeter_echo_icmp_errors_total", PATH), "ICMP error"),
    )


def lossy_flows():
    return timeseries(
        "Flows with loss",
        NUMBER,
        "Source ports of the path with 1 % loss or more. More than none and fewer than all: one of several equal-cost routes is bad, a fault that a single flow often misses.",
        query(f"sum(pathmeter_echo_flows_lossy{{{PATH}}})", "with loss"),
        query(f"sum(pathmeter_echo_flows{{{PATH}}})", "all"),
    )


# --- Delay


def jitter():
    return timeseries(
        "Jitter and queues",
        SECONDS,
        "Jitter: mean difference between the RTTs of consecutive datagrams of a flow (IPDV, RFC 3393). Queues: mean RTT above the smallest of the last minutes "
        "(PDV, RFC 5481), which is the delay that load adds.",
        query(mean("pathmeter_echo_ipdv_seconds", PATH), "jitter"),
        query(mean("pathmeter_echo_pdv_seconds", PATH), "queues"),
    )


def minimum():
    return timeseries(
        "Smallest and mean RTT",
        SECONDS,
        "The smallest RTT of the last one to two minutes depends on the route and not on the load: a step is a route change. Both have the full resolution of "
        "the clock, unlike the quantiles.",
        query(f"min(pathmeter_echo_rtt_minimum_seconds{{{PATH}}} > 0)", "smallest"),
        query(mean("pathmeter_echo_rtt_seconds", PATH), "mean"),
        log=True,
    )


def turnaround():
    return timeseries(
        "Time at the responder",
        SECONDS,
        "Mean time between receiving a request and replying at the peer, as reported by the peer; not part of the RTT. Milliseconds: the peer is busy. Sending "
        "(udp): delay between the timestamp in a reply and its transmission by the peer's kernel.",
        query(mean("pathmeter_echo_responder_turnaround_seconds", PATH), "turnaround"),
        query(mean("pathmeter_echo_responder_transmit_lag_seconds", PATH), "sending"),
    )


def user_timestamps():
    return timeseries(
        "Timestamps not from the kernel",
        SHARE,
        "Share of transmit and receive timestamps taken by the process, by probe; such RTTs include scheduling delays of this host. Normal: 0 for udp and "
        "icmp, a few for tcp where segments are lost or reordered, 100 % for websocket and http.",
        query(
            f"{total('pathmeter_echo_user_timestamps_total', PATH, 'probe')}"
            f" / (2 * {total('pathmeter_echo_responder_turnaround_seconds_count', PATH, 'probe')} > 0)",
            "{{probe}}",
        ),
        high=1,
    )


def round_trip_by_probe():
    return timeseries(
        "Mean RTT of all probes",
        SECONDS,
        "Of this pair, independent of the selection above. Differences between protocols are what TCP, TLS or a web server add.",
        query(mean("pathmeter_echo_rtt_seconds", 'job="$job",instance="$instance",peer="$peer"', "probe, family"), "{{probe}} {{family}}"),
        log=True,
    )


# --- Route


def hops():
    return timeseries(
        "Routers on the path",
        NUMBER,
        "By direction, from the received TTL. A step is a route change. Known only between agents, over udp.",
        query(f"max by (direction) (pathmeter_echo_hops{{{PATH}}})", "{{direction}}"),
    )


def dscp():
    return timeseries(
        "Changed DSCP",
        DATAGRAMS,
        "Answered datagrams that arrived with a DSCP different from the one they were sent with. A network on the path does not honour it. Normal: none, or all.",
        query(total("pathmeter_echo_dscp_remarked_total", PATH, "direction"), "{{direction}}"),
    )


def ecn():
    return timeseries(
        "Congestion marks",
        DATAGRAMS,
        "Answered datagrams that a router marked as having met congestion (ECN CE), instead of dropping them. Normal: none.",
        query(total("pathmeter_echo_ecn_ce_total", PATH, "direction"), "{{direction}}"),
    )


# --- Routes


def _traced(metric):
    """Of each trace probe of the pair; there are several if several echo probes are followed."""
    return query(f"max by (probe, direction) ({metric}{{{OF_PAIR}}})", "{{probe}} {{direction}}", expects=TRACES)


def route():
    return state_timeline(
        "Route of the first flow",
        "The shade is the number of the route, which /api/v1/paths and /api/v1/events show too: another shade is another route, the same shade the same one. "
        "Normal: one for hours.",
        _traced("pathmeter_trace_route_id"),
        unit=HEX,
    )


def reached():
    return state_timeline(
        "Latest trace reached the peer",
        "Of the first flow. Reverse: not reached if the peer cannot trace the way back. Normal: always. A single trace that is not reached is loss.",
        _traced("pathmeter_trace_reached"),
        mappings=[value(1, "reached", GREEN), value(0, "not reached", ORANGE)],
    )


def routers():
    return timeseries(
        "Routers of the route",
        NUMBER,
        "Of the first flow, in each direction, also of routers that do not answer. Different numbers are an asymmetric route, which is common and not a fault.",
        _traced("pathmeter_trace_routers"),
    )


def route_changes():
    return timeseries(
        "Route changes in an hour",
        NUMBER,
        "Confirmed changes of all flows together, to a new route or back to an earlier one, over the last hour. Each is marked on all graphs. Normal: none.",
        query(f"sum by (direction) (pathmeter_pair:trace_route_changes:increase1h{{{OF_PAIR}}})", "{{direction}}", expects=TRACES),
    )


def first_lossy_hop():
    return timeseries(
        "First lossy hop",
        NUMBER,
        "The hop from which on more than a quarter of the probes are lost, up to the peer; reverse: counted from the peer. Normal: 0. It also is 0 if packets "
        "are lost on the last link only. Loss in one direction can show in both: compare with the loss by direction.",
        query(f"max by (direction) (pathmeter_trace_first_lossy_hop{{{OF_PAIR}}})", "{{direction}}", expects=TRACES),
    )


def traces():
    return timeseries(
        "Traces by result",
        EVENTS,
        "Complete: all hops answered. Partial: some routers did not, which is normal. Unreached: the peer did not answer.",
        query(total("pathmeter_trace_traces_total", OF_PAIR, "direction, result"), "{{result}} {{direction}}", expects=TRACES),
        stack=True,
    )


def trace_probes():
    return timeseries(
        "Trace probes by outcome",
        DATAGRAMS,
        "Unanswered: routers answer few probes or none, so it is no sign of loss. Deferred: sent later, because the router, or the agent as a whole, was "
        "probed too recently. Not sent: refused by this host's kernel.",
        query(total("pathmeter_trace_answers_total", OF_PAIR), "answered", expects=TRACES),
        query(total("pathmeter_trace_unanswered_total", OF_PAIR), "unanswered", expects=TRACES),
        query(total("pathmeter_trace_deferred_total", OF_PAIR, "reason"), "deferred: {{reason}}", expects=TRACES),
        query(total("pathmeter_trace_send_errors_total", OF_PAIR), "not sent", expects=TRACES),
    )


def rate_limited_hops():
    return timeseries(
        "Hops that limit their answers",
        NUMBER,
        "Of the first flow: their routers answer only some probes, although packets pass them. That is no loss, and common.",
        query(f"max by (direction) (pathmeter_trace_rate_limited_hops{{{OF_PAIR}}})", "{{direction}}", expects=TRACES),
    )


def ttl_clamped():
    return state_timeline(
        "TTLs rewritten on the way",
        "Of any flow. A device on the way sets the TTL, so the routers cannot be measured and the other panels of this row show little. /api/v1/events says how. "
        "Normal: never. It is found at once; that it is gone is found within a day.",
        _traced("pathmeter_trace_ttl_clamped"),
        mappings=[value(0, "no", GREEN), value(1, "rewritten", ORANGE)],
    )


_HOP = "probe, family, direction, ttl"


def _of_hops(expr):
    """With the router and the state of each hop."""
    joined = f"{expr} * on ({_HOP}) group_left (router, state) max by ({_HOP}, router, state) (pathmeter_trace_hop_info{{{OF_PAIR}}})"
    return query(joined, "{{direction}} {{ttl}} {{router}}", expects=HOPS)


def hop_table():
    answers, probes = (f"sum by ({_HOP}) (increase(pathmeter_trace_hop_{what}_total{{{OF_PAIR}}}[1h]))" for what in ("answers", "probes"))
    return table(
        "Hops",
        "The current routers of the first flow. Answered: share of the probes of all flows in the last hour; a router that answers few of them limits its "
        "answers, which is no loss. State lossy: probes are lost from here on up to the peer.",
        query(f"max by ({_HOP}, router, state) (pathmeter_trace_hop_info{{{OF_PAIR}}})", expects=HOPS),
        _of_hops(f"max by ({_HOP}) (pathmeter_trace_hop_rtt_seconds{{{OF_PAIR}}})"),
        _of_hops(f"{answers} / {probes}"),
        columns=[
            Column("probe", "probe", width=100),
            Column("family", "family", width=70),
            Column("direction", "direction", width=90),
            Column("ttl", "TTL", width=60),
            Column("router", "router"),
            Column("state", "state", width=110),
            Column("B", "RTT", SECONDS, width=90),
            Column("C", "answered", SHARE, width=90),
        ],
        sort=["probe", "family", "direction", "TTL"],
        ascending=True,
        numeric=["ttl"],
    )


def hop_rtt():
    return timeseries(
        "RTT of hops",
        SECONDS,
        "Of the latest answer of each hop of the first flow. Routers answer slowly when they are busy, so a hop that is slower than those behind it says "
        "nothing about the packets that pass it. A rise that goes on to the peer does.",
        _of_hops(f"max by ({_HOP}) (pathmeter_trace_hop_rtt_seconds{{{OF_PAIR}}})"),
    )



# --- Path MTU


def mtu():
    return timeseries(
        "Path MTU",
        PACKET,
        "The longest IP packet that reaches the peer unfragmented. 1500 is usual, 9000 within some data centres. Smaller: a tunnel. A path that is down keeps its last value.",
        query(f"min(pathmeter_path_mtu_bytes{{{PATH}}})", "MTU", expects=PATH_MTU),
        low=None,
    )


def mtu_probes():
    return timeseries(
        "Path MTU probes",
        DATAGRAMS,
        "By outcome. Lost probes are part of the search; afterwards there are only acknowledged ones.",
        query(total("pathmeter_path_mtu_probes_total", PATH, "outcome"), "{{outcome}}", expects=PATH_MTU),
        stack=True,
    )


# --- Bandwidth


def throughput():
    rate = f"8 * pathmeter_bandwidth_throughput_bytes_per_second{{{OF_PAIR}}}"
    is_capacity = f"pathmeter_bandwidth_capacity{{{OF_PAIR}}}"
    return timeseries(
        "Throughput",
        BITS_PER_SECOND,
        "Payload of the last run, which is shown until the next one. Capacity: the path limited it. At least: a host, a rate or the length of the run did, "
        "so the capacity may be larger. Usual: the median of a week.",
        query(f"max by (direction) ({rate} and {is_capacity} == 1)", "{{direction}}: capacity", expects=BANDWIDTH),
        query(f"max by (direction) ({rate} and {is_capacity} == 0)", "{{direction}}: at least", expects=BANDWIDTH),
        query(
            f"max by (direction) (8 * pathmeter_pair:bandwidth_throughput_bytes_per_second:median7d{{{OF_PAIR}}})",
            "{{direction}}: usual",
            expects=BANDWIDTH,
        ),
    )


def run_latency():
    return timeseries(
        "RTT idle and under load",
        SECONDS,
        "Medians before and during the last run. Far apart: a long queue on the path, which any download fills.",
        *(
            query(f"max by (direction) (pathmeter_bandwidth_{name}_rtt_seconds{{{OF_PAIR}}})", f"{{{{direction}}}}: {name}", expects=BANDWIDTH)
            for name in ("idle", "loaded")
        ),
        log=True,
    )


def added_delay():
    return timeseries(
        "Delay added by runs",
        SECONDS,
        "95th percentile of the RTT under load above the idle median, of the last run. A run is stopped soon after it exceeds added_delay_max, 10 ms by default.",
        query(f"max by (direction) (pathmeter_bandwidth_added_delay_seconds{{{OF_PAIR}}})", "{{direction}}", expects=BANDWIDTH),
    )


def run_loss():
    return timeseries(
        "Retransmitted share of runs",
        SHARE,
        "Of the payload of the last run. Some percent are usual where a queue overflows; loss without added delay is a policer or a bad link.",
        query(f"max by (direction) (pathmeter_bandwidth_loss_ratio{{{OF_PAIR}}})", "{{direction}}", expects=BANDWIDTH),
    )


def run_bytes():
    return timeseries(
        "Bytes of runs in a day",
        BYTES,
        "Payload that the receivers of runs received in the 24 hours before. The limits of both agents count from midnight to midnight in UTC.",
        query(f"sum by (direction) (increase(pathmeter_bandwidth_received_bytes_total{{{OF_PAIR}}}[1d]))", "{{direction}}", expects=BANDWIDTH),
        stack=True,
    )


def runs():
    return timeseries(
        "Runs in a day, by what ended them",
        NUMBER,
        "In the 24 hours before. Bytes and time: complete. Delay and loss: stopped because they disturbed other traffic. Lease: the budget or the lease ended. "
        "Peer, operator: stopped by them.",
        query(
            f"sum by (direction, reason) (increase(pathmeter_bandwidth_runs_total{{{OF_PAIR}}}[1d])) > 0",
            "{{direction}}: {{reason}}",
            expects=BANDWIDTH,
        ),
        stack=True,
    )


def no_runs():
    return timeseries(
        "Runs skipped and failed in a day",
        NUMBER,
        "In the 24 hours before, by reason. An attempt is repeated after about ten minutes. Budget: too few bytes are left for today, here or at the peer. "
        "Busy: other runs took the time. Request, connect: the peer was not reached. Normal: none or few.",
        *(
            query(
                f"sum by (direction, reason) (increase(pathmeter_bandwidth_{name}_total{{{OF_PAIR}}}[1d])) > 0",
                f"{{{{direction}}}} {text}: {{{{reason}}}}",
                expects=TROUBLE,
            )
            for name, text in (("skipped", "skipped"), ("failures", "failed"))
        ),
        stack=True,
    )


# --- Connections


def connected():
    return state_timeline(
        "Connected",
        "Whether the connection that carries the messages is established; with http also while none is needed. Normal: always.",
        query(f"min by (probe, family) (pathmeter_echo_connected{{{PATH}}})", "{{probe}} {{family}}", expects=STREAMS),
        mappings=[value(1, "connected", GREEN), value(0, "not connected", RED)],
    )


def reconnects():
    return timeseries(
        "Connections lost, by reason",
        EVENTS,
        "Closed connections, and failed attempts to establish one. refused: the port is not listening; timeout: no reply; reset: reset by the peer or a "
        "middlebox; denied: the peer refuses to answer this agent. Normal: none.",
        query(total("pathmeter_echo_reconnects_total", PATH, "reason"), "{{reason}}", expects=STREAMS),
        stack=True,
        bars=True,
    )


def connect_time():
    return timeseries(
        "Time to connect",
        SECONDS,
        "TCP handshakes of new connections that are opened every connect_interval only to be timed; over one hour, because they are few. About one RTT; an "
        "additional second is a lost SYN.",
        *(
            query(quantile(q, "pathmeter_echo_connect_duration_seconds", PATH, window="1h"), f"p{q * 100:.0f}", expects=STREAMS)
            for q in (0.5, 0.9)
        ),
        query(mean("pathmeter_echo_connect_duration_seconds", PATH, window=LONG), "mean", expects=STREAMS),
        log=True,
    )


def handshake():
    return timeseries(
        "Stages after the TCP handshake",
        SECONDS,
        "Mean duration of the other stages of a new connection: DNS lookup, TLS, greeting, upgrade to WebSocket, first byte of a response. Slow resolve: DNS. "
        "Slow first_byte: the server.",
        query(mean("pathmeter_echo_handshake_duration_seconds", PATH, "stage", LONG), "{{stage}}", expects=STREAMS),
        stack=True,
    )


def connect_failures():
    return timeseries(
        "Failed new connections",
        EVENTS,
        "By reason. Established connections may keep working while new ones fail: a full connection table of a firewall, a stopped server. Normal: none.",
        query(total("pathmeter_echo_connect_failures_total", PATH, "reason"), "{{reason}}", expects=STREAMS),
        stack=True,
        bars=True,
    )


def retransmits():
    return timeseries(
        "Retransmitted segments",
        DATAGRAMS,
        "By this host's kernel, on the connections that carry messages. TCP turns loss into retransmissions and late replies. Normal: almost none.",
        query(total("pathmeter_echo_tcp_retransmits_total", PATH), "segments", expects=STREAMS),
    )


def what_limits():
    busy = total("pathmeter_echo_tcp_busy_seconds_total", PATH)
    window = total("pathmeter_echo_tcp_receive_window_limited_seconds_total", PATH)
    buffer = total("pathmeter_echo_tcp_send_buffer_limited_seconds_total", PATH)
    return timeseries(
        "What TCP waits for",
        SHARE,
        "Share of the time with data to send: waiting for the receive window (the peer does not read), for the local send buffer, or for the network. Small "
        "messages wait for the RTT of the network, which is normal.",
        query(f"{window} / ({busy} > 0)", "receiver's window", expects=STREAMS),
        query(f"{buffer} / ({busy} > 0)", "send buffer", expects=STREAMS),
        query(f"({busy} - {window} - {buffer}) / ({busy} > 0)", "network", expects=STREAMS),
        stack=True,
        high=1,
    )


def kernel_round_trip():
    return timeseries(
        "RTT measured by the kernel",
        SECONDS,
        "Smoothed RTT, smallest RTT and mean deviation, of the connections that carry messages. Far below the message's own RTT: the time is spent in the "
        "peer's process, not in the network.",
        query(f"max(pathmeter_echo_tcp_srtt_seconds{{{PATH}}} > 0)", "smoothed", expects=STREAMS),
        query(f"min(pathmeter_echo_tcp_rtt_minimum_seconds{{{PATH}}} > 0)", "smallest", expects=STREAMS),
        query(f"max(pathmeter_echo_tcp_rtt_variation_seconds{{{PATH}}} > 0)", "deviation", expects=STREAMS),
        log=True,
    )


def delivery_rate():
    return timeseries(
        "Delivery rate",
        BYTES_PER_SECOND,
        "Last delivery rate measured by the kernel. Small messages never fill the path, so it is not its bandwidth.",
        query(f"max(pathmeter_echo_tcp_delivery_rate_bytes_per_second{{{PATH}}})", "rate", expects=STREAMS),
    )


def unexpected():
    return timeseries(
        "Unexpected HTTP responses",
        REQUESTS,
        "HTTP responses with a status or body other than configured. They count as answered, not as lost. Normal: none.",
        query(total("pathmeter_echo_unexpected_total", PATH, "reason"), "{{reason}}", expects=STREAMS),
        stack=True,
        bars=True,
    )


def certificate():
    return stat(
        "Certificate of the other side",
        SECONDS,
        "Remaining validity of the first certificate to expire. No data without TLS. Renew it before 7 days are left.",
        query(f"min(pathmeter_tls_certificate_expiry_timestamp_seconds{{{PATH}}}) - time()", expects=TLS),
        thresholds=CERTIFICATE,
        decimals=0,
    )


# --- Measured by the peer


def twins_round_trip():
    return timeseries(
        "RTT: $peer → $instance",
        SECONDS,
        "Measured by the peer over the same route. It should look like this side's RTT; if not, one of the two hosts is the cause.",
        *_quantiles(TWIN),
        log=True,
    )


def both_jitters():
    return timeseries(
        "Jitter, both sides",
        SECONDS,
        "Mean. If both are alike, the network is the cause.",
        query(mean("pathmeter_echo_ipdv_seconds", PATH), "$instance → $peer"),
        query(mean("pathmeter_echo_ipdv_seconds", TWIN), "$peer → $instance"),
    )


def twins_verdicts():
    return timeseries(
        "Verdicts: $peer → $instance",
        DATAGRAMS,
        "As in the row Datagrams, measured by the other side.",
        *_verdicts(TWIN),
        stack=True,
    )


def both_hops():
    return timeseries(
        "Routers on the path from $peer",
        NUMBER,
        "As counted by the peer: its forward direction is this side's reverse, and should have the same number.",
        query(f"max by (direction) (pathmeter_echo_hops{{{TWIN}}})", "{{direction}}"),
    )


def twins_turnaround():
    return timeseries(
        "Time at this side's responder",
        SECONDS,
        "Mean turnaround time of $instance for requests of $peer. Milliseconds: $instance is busy.",
        query(mean("pathmeter_echo_responder_turnaround_seconds", TWIN), "turnaround"),
    )
