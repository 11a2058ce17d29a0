"""What is wrong on the way from $instance to $peer, by one probe?

One, because protocols together have neither a loss nor a round trip; the others are in the table, and one click away.
Needs that the name of an agent is its label `instance` in Prometheus: so `peer` on one side is `instance` on the other.
"""

from .kit import *
from .promql import *

# By pattern, so that a link can name several probes.
PATH = 'job="$job",instance="$instance",peer="$peer",probe=~"$probe",family=~"$family"'
# The same, measured by the other side.
TWIN = 'job="$job",instance="$peer",peer="$instance",probe=~"$probe",family=~"$family"'
# Backticks: what the format regex escapes has single backslashes, which a quoted string would not have.
BOTH_AGENTS = 'job="$job",instance=~`${instance:regex}|${peer:regex}`'


def board():
    return dashboard(
        PAIR,
        "Pathmeter / Pair",
        "What is wrong on the way from one agent to one peer, and what does the peer see?",
        variables=[
            JOB,
            ZONE,
            INSTANCE,
            variable("peer", "Peer", "pathmeter_echo_verdicts_total", 'job="$job",instance="$instance"'),
            variable("probe", "Probe", "pathmeter_echo_verdicts_total", 'job="$job",instance="$instance",peer="$peer"'),
            variable("family", "Family", "pathmeter_echo_verdicts_total", 'job="$job",instance="$instance",peer="$peer",probe=~"$probe"'),
        ],
        annotations=events(BOTH_AGENTS, PATH),
        links=[
            link(
                "The other way round",
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
                line(8, (16, round_trip_by_probe()), (8, user_stamps())),
            ),
            details("Route", line(8, (8, hops()), (8, dscp()), (8, ecn()))),
            details("Path MTU", line(8, (12, mtu()), (12, mtu_probes()))),
            details(
                "Connections (tcp, websocket, http)",
                line(7, (12, connected()), (12, reconnects())),
                line(8, (8, connect_time()), (8, handshake()), (8, connect_failures())),
                line(8, (8, retransmits()), (8, what_limits()), (8, kernel_round_trip())),
                line(7, (8, delivery_rate()), (8, unexpected()), (8, certificate())),
            ),
            details(
                "Seen from the other side",
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
        "How long ago the last reply came at the time of the last scrape and up to one scrape more. Normal: below a scrape interval and a probe interval.",
        query(f"time() - max(pathmeter_echo_last_reply_timestamp_seconds{{{PATH}}} > 0)"),
        thresholds=SILENCE,
        decimals=0,
    )


def loss_now():
    return stat(
        "Loss now",
        SHARE,
        "Of five minutes, without what a host dropped or nobody waited for.",
        query(recorded_loss(PATH)),
        thresholds=LOSS,
    )


def loss_now_by_direction():
    return stat(
        "Loss now, by direction",
        SHARE,
        "Forward: the request did not reach the peer. Reverse: its reply did not come back. Unknown: no evidence, because nothing came back "
        "afterwards or the other side keeps no record. They add up to the loss.",
        query(recorded_loss_by_direction(PATH), "{{direction}}"),
        thresholds=LOSS,
    )


def round_trip_now():
    return stat(
        "Round trip now",
        SECONDS,
        "Of ten minutes, without the time that the responder took. A quantile lies between two bounds of a 1-2-5 scale. "
        "Shown where there are replies enough: 6, 30 and 300.",
        *(query(quantile(q, "pathmeter_echo_rtt_seconds", PATH, window=LONG), f"p{q * 100:.0f}") for q in (0.5, 0.9, 0.99)),
    )


def jitter_now():
    return stat(
        "Jitter now",
        SECONDS,
        "Mean difference between two consecutive round trips (RFC 3393), of five minutes. "
        "For calls a tenth of the round trip is much.",
        query(mean("pathmeter_echo_ipdv_seconds", PATH, window=RECORDED)),
    )


def hops_now():
    return stat(
        "Routers",
        NUMBER,
        "On the way there and on the way back, from the TTL of what arrived. Known between agents only. "
        "Two numbers that differ are an asymmetric route: common, and no fault.",
        query(f"max by (direction) (pathmeter_echo_hops{{{PATH}}})", "{{direction}}"),
    )


def loss():
    return timeseries(
        "Loss: $instance → $peer, by direction",
        SHARE,
        "Lost datagrams, of those that the network was answerable for. A loss is counted when lost_after has passed, some seconds after it happened. "
        "Normal: none. One in a thousand is felt by TCP.",
        query(loss_by_direction(PATH), "{{direction}}"),
        stack=True,
        bars=True,
    )


def twins_loss():
    return timeseries(
        "Loss: $peer → $instance, as the peer sees it",
        SHARE,
        "The same pair measured by the other side: its forward is this side's reverse. Loss that both see in the same direction of the wire is in the network. "
        "Empty: the peer has no agent, does not probe back by this probe, or its name is not its label instance.",
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
        "Every path between the two over five minutes, whichever is selected above; a click selects it. "
        "Loss by one protocol only is a firewall, a shaper or a busy server, not the wire.",
        recorded("pathmeter_pair:echo_loss:ratio_rate5m"),
        recorded("pathmeter_pair:echo_rtt_seconds:mean5m"),
        recorded("pathmeter_pair:echo_rtt_seconds:p99_5m"),
        recorded("pathmeter_pair:echo_ipdv_seconds:mean5m"),
        recorded("pathmeter_pair:echo_judged:rate5m"),
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
        "Round trips",
        SECONDS,
        "How many replies came into each bucket between two points of the graph. Two bands are two routes. "
        "A cloud above the band is a queue.",
        buckets("pathmeter_echo_rtt_seconds", PATH),
    )


def round_trip():
    return timeseries(
        "Round trip",
        SECONDS,
        "Without the time that the responder took; p99 over ten minutes. "
        "Shown where there are replies enough: 6, 30 and 300.",
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
        "Every datagram gets one. Late: answered, after late_after. Host-dropped: a host at one end threw away what had reached it. "
        "Withdrawn: nobody waited any more, as at a restart. Normal: all ok.",
        *_verdicts(PATH),
        stack=True,
    )


def out_of_order():
    return timeseries(
        "Late, duplicate and reordered",
        DATAGRAMS,
        "Late: slower than late_after. Very late: given up before. Duplicates: further copies of a reply. Reordered: behind one that was sent later. "
        "Normal: none; a little reordering is a route of several lanes.",
        query(total("pathmeter_echo_late_total", PATH), "late"),
        query(total("pathmeter_echo_very_late_total", PATH), "very late"),
        query(total("pathmeter_echo_duplicates_total", PATH), "duplicate"),
        query(total("pathmeter_echo_reordered_total", PATH), "reordered"),
    )


def bursts():
    return timeseries(
        "Mean length of a run of losses",
        NUMBER,
        "Near 1: losses come singly, as from a full queue or a bad optic. Long: interruptions. Empty while nothing is lost.",
        query(mean("pathmeter_echo_loss_burst_length", PATH), "length", expects=TROUBLE),
    )


def not_sent():
    return timeseries(
        "Not sent",
        DATAGRAMS,
        "What this host owes, and no loss: slots that its process missed, and datagrams that its kernel refused, by the reason. Normal: none.",
        query(total("pathmeter_echo_unsent_total", PATH), "missed slot"),
        query(total("pathmeter_echo_send_errors_total", PATH, "error"), "{{error}}"),
    )


def mismatched():
    return timeseries(
        "What came instead of replies",
        EVENTS,
        "Datagrams that answer nothing, by reason, and ICMP errors. auth: the two sides have different keys. ICMP errors: a router or the peer refuses; "
        "/api/v1/paths has them by kind. Normal: none.",
        query(total("pathmeter_echo_mismatched_total", PATH, "reason"), "{{reason}}"),
        query(total("pathmeter_echo_icmp_errors_total", PATH), "ICMP error"),
    )


def lossy_flows():
    return timeseries(
        "Flows with loss",
        NUMBER,
        "Of the source ports over which the path is spread, those that lost 1 % or more. Between none and all: one of several equal-cost routes is bad, "
        "a fault that a single flow meets by luck only.",
        query(f"sum(pathmeter_echo_flows_lossy{{{PATH}}})", "with loss"),
        query(f"sum(pathmeter_echo_flows{{{PATH}}})", "all"),
    )


# --- Delay


def jitter():
    return timeseries(
        "Jitter and queues",
        SECONDS,
        "Jitter: mean difference between two consecutive round trips of a flow (IPDV, RFC 3393). Queues: mean round trip above the smallest one "
        "of the last minutes (PDV, RFC 5481), what the path adds when it is busy.",
        query(mean("pathmeter_echo_ipdv_seconds", PATH), "jitter"),
        query(mean("pathmeter_echo_pdv_seconds", PATH), "queues"),
    )


def minimum():
    return timeseries(
        "Smallest and mean round trip",
        SECONDS,
        "The smallest of the last one to two minutes moves with the route and not with the load: a step is a new route. "
        "Both have the full resolution of the clock, where quantiles have bounds.",
        query(f"min(pathmeter_echo_rtt_minimum_seconds{{{PATH}}} > 0)", "smallest"),
        query(mean("pathmeter_echo_rtt_seconds", PATH), "mean"),
        log=True,
    )


def turnaround():
    return timeseries(
        "Time at the responder",
        SECONDS,
        "Mean time between arrival and reply at the peer, as it says; not in the round trip. Milliseconds: the peer is busy, not the path. "
        "Sending (udp): how much later than its own timestamp a reply left, by the peer's kernel.",
        query(mean("pathmeter_echo_responder_turnaround_seconds", PATH), "turnaround"),
        query(mean("pathmeter_echo_responder_transmit_lag_seconds", PATH), "sending"),
    )


def user_stamps():
    return timeseries(
        "Replies stamped by the process",
        SHARE,
        "By probe: share of the time stamps, of sending and of arrival, that are not the kernel's; such round trips contain this host's scheduling delays. "
        "Normal: 0 for udp and icmp, a few for tcp where segments are lost or reordered, 100 % for websocket and http.",
        query(
            f"{total('pathmeter_echo_user_timestamps_total', PATH, 'probe')}"
            f" / (2 * {total('pathmeter_echo_responder_turnaround_seconds_count', PATH, 'probe')} > 0)",
            "{{probe}}",
        ),
        high=1,
    )


def round_trip_by_probe():
    return timeseries(
        "Mean round trip of all probes",
        SECONDS,
        "Of this pair, whichever is selected above. Between protocols: what TCP, TLS or a web server add to the wire.",
        query(mean("pathmeter_echo_rtt_seconds", 'job="$job",instance="$instance",peer="$peer"', "probe, family"), "{{probe}} {{family}}"),
        log=True,
    )


# --- Route


def hops():
    return timeseries(
        "Routers on the way",
        NUMBER,
        "By direction, from the TTL of what arrived. A step is another route. Known between agents, over udp, only.",
        query(f"max by (direction) (pathmeter_echo_hops{{{PATH}}})", "{{direction}}"),
    )


def dscp():
    return timeseries(
        "Remarked class of service",
        DATAGRAMS,
        "Answered datagrams that arrived with another DSCP than they were sent with. Some network on the way does not honour it. Normal: none, or all.",
        query(total("pathmeter_echo_dscp_remarked_total", PATH, "direction"), "{{direction}}"),
    )


def ecn():
    return timeseries(
        "Congestion marks",
        DATAGRAMS,
        "Answered datagrams on which a router had marked congestion (ECN CE). A queue that marks does not have to drop. Normal: none.",
        query(total("pathmeter_echo_ecn_ce_total", PATH, "direction"), "{{direction}}"),
    )


# --- Path MTU


def mtu():
    return timeseries(
        "Path MTU",
        PACKET,
        "The longest IP packet that gets to the peer in one piece. 1500 is usual, 9000 within some data centres. Smaller: a tunnel. "
        "A path that is down keeps its value.",
        query(f"min(pathmeter_path_mtu_bytes{{{PATH}}})", "MTU", expects=PATH_MTU),
        low=None,
    )


def mtu_probes():
    return timeseries(
        "Packets that looked for it",
        DATAGRAMS,
        "By what became of them. Lost ones are the search: after it only acknowledged ones are left.",
        query(total("pathmeter_path_mtu_probes_total", PATH, "outcome"), "{{outcome}}", expects=PATH_MTU),
        stack=True,
    )


# --- Connections


def connected():
    return state_timeline(
        "Connected",
        "Whether the connection that carries the messages stands; over http also while none is needed. Normal: all the time.",
        query(f"min by (probe, family) (pathmeter_echo_connected{{{PATH}}})", "{{probe}} {{family}}", expects=STREAMS),
        mappings=[value(1, "connected", GREEN), value(0, "not connected", RED)],
    )


def reconnects():
    return timeseries(
        "Connections lost, by reason",
        EVENTS,
        "Ends of that connection, and failed attempts to make it. refused: nobody listens; timeout: silence; reset: somebody on the way; "
        "denied: the peer will not answer us. Normal: none.",
        query(total("pathmeter_echo_reconnects_total", PATH, "reason"), "{{reason}}", expects=STREAMS),
        stack=True,
        bars=True,
    )


def connect_time():
    return timeseries(
        "Time to connect",
        SECONDS,
        "TCP handshakes of fresh connections, which are made every connect_interval only to be timed; an hour's worth, because they are few. "
        "About one round trip; a second more is a lost SYN.",
        *(
            query(quantile(q, "pathmeter_echo_connect_duration_seconds", PATH, window="1h"), f"p{q * 100:.0f}", expects=STREAMS)
            for q in (0.5, 0.9)
        ),
        query(mean("pathmeter_echo_connect_duration_seconds", PATH, window=LONG), "mean", expects=STREAMS),
        log=True,
    )


def handshake():
    return timeseries(
        "Stages after it",
        SECONDS,
        "Mean time that fresh connections took besides: looking up the name, TLS, our greeting, the upgrade to WebSocket, the first byte of an answer. "
        "Slow resolve: DNS. Slow first_byte: the server.",
        query(mean("pathmeter_echo_handshake_duration_seconds", PATH, "stage", LONG), "{{stage}}", expects=STREAMS),
        stack=True,
    )


def connect_failures():
    return timeseries(
        "Fresh connections that failed",
        EVENTS,
        "By reason. Established connections may live on while new ones fail: a full table of a firewall, a listener that is gone. Normal: none.",
        query(total("pathmeter_echo_connect_failures_total", PATH, "reason"), "{{reason}}", expects=STREAMS),
        stack=True,
        bars=True,
    )


def retransmits():
    return timeseries(
        "Segments sent again",
        DATAGRAMS,
        "By this host's kernel, on the connections that carry messages. TCP hides loss and shows it here: with a reply that came late. Normal: next to none.",
        query(total("pathmeter_echo_tcp_retransmits_total", PATH), "segments", expects=STREAMS),
    )


def what_limits():
    busy = total("pathmeter_echo_tcp_busy_seconds_total", PATH)
    window = total("pathmeter_echo_tcp_receive_window_limited_seconds_total", PATH)
    buffer = total("pathmeter_echo_tcp_send_buffer_limited_seconds_total", PATH)
    return timeseries(
        "What TCP waits for",
        SHARE,
        "Of the time in which there was something to send: for the receiver's window (the peer does not read), for our own buffer, "
        "or for the network. Small messages wait for the network's round trip: that is normal.",
        query(f"{window} / ({busy} > 0)", "receiver's window", expects=STREAMS),
        query(f"{buffer} / ({busy} > 0)", "our buffer", expects=STREAMS),
        query(f"({busy} - {window} - {buffer}) / ({busy} > 0)", "network", expects=STREAMS),
        stack=True,
        high=1,
    )


def kernel_round_trip():
    return timeseries(
        "Round trip as the kernel sees it",
        SECONDS,
        "Smoothed, smallest and mean deviation, of the connections that carry messages. Far below the message's own round trip: the time is spent in the "
        "peer's process, not on the wire.",
        query(f"max(pathmeter_echo_tcp_srtt_seconds{{{PATH}}} > 0)", "smoothed", expects=STREAMS),
        query(f"min(pathmeter_echo_tcp_rtt_minimum_seconds{{{PATH}}} > 0)", "smallest", expects=STREAMS),
        query(f"max(pathmeter_echo_tcp_rtt_variation_seconds{{{PATH}}} > 0)", "deviation", expects=STREAMS),
        log=True,
    )


def delivery_rate():
    return timeseries(
        "Rate of delivery",
        BYTES_PER_SECOND,
        "The kernel's last measurement of how fast data was delivered. Small messages never fill the pipe: it is no bandwidth.",
        query(f"max(pathmeter_echo_tcp_delivery_rate_bytes_per_second{{{PATH}}})", "rate", expects=STREAMS),
    )


def unexpected():
    return timeseries(
        "Unexpected answers",
        REQUESTS,
        "HTTP answers with another status or body than configured. The network carried them, so they are no loss. Normal: none.",
        query(total("pathmeter_echo_unexpected_total", PATH, "reason"), "{{reason}}", expects=STREAMS),
        stack=True,
        bars=True,
    )


def certificate():
    return stat(
        "Certificate of the other side",
        SECONDS,
        "How long it is still valid: the first one to end. Nothing without TLS. Renew it before 7 days are left.",
        query(f"min(pathmeter_tls_certificate_expiry_timestamp_seconds{{{PATH}}}) - time()", expects=TLS),
        thresholds=CERTIFICATE,
        decimals=0,
    )


# --- Seen from the other side


def twins_round_trip():
    return timeseries(
        "Round trip: $peer → $instance",
        SECONDS,
        "Measured by the peer, over the same wires. It should look as this side's does; if not, one of the two hosts is in its own way.",
        *_quantiles(TWIN),
        log=True,
    )


def both_jitters():
    return timeseries(
        "Jitter, both sides",
        SECONDS,
        "Mean. Both alike: the network's.",
        query(mean("pathmeter_echo_ipdv_seconds", PATH), "$instance → $peer"),
        query(mean("pathmeter_echo_ipdv_seconds", TWIN), "$peer → $instance"),
    )


def twins_verdicts():
    return timeseries(
        "Verdicts: $peer → $instance",
        DATAGRAMS,
        "As in the row Datagrams, by the other side.",
        *_verdicts(TWIN),
        stack=True,
    )


def both_hops():
    return timeseries(
        "Routers on the way from $peer",
        NUMBER,
        "As the peer counts them: its forward is this side's reverse, and should have the same number.",
        query(f"max by (direction) (pathmeter_echo_hops{{{TWIN}}})", "{{direction}}"),
    )


def twins_turnaround():
    return timeseries(
        "Time at this side's responder",
        SECONDS,
        "Mean time that $instance took to answer $peer. Milliseconds: $instance is busy.",
        query(mean("pathmeter_echo_responder_turnaround_seconds", TWIN), "turnaround"),
    )
