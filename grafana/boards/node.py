"""Is it $instance, its uplink, one path or a peer?

Needs, as pair.py, that the name of an agent is its label `instance`.
"""

from .kit import *
from .promql import *

SELECTED = 'probe=~"$probe",family=~"$family"'
HOST = 'job="$job",instance="$instance"'
I_SEE = f"{HOST},{SELECTED}"
THEY_SEE = f'job="$job",peer="$instance",{SELECTED}'
OTHERS = f'job="$job",instance!="$instance",{SELECTED}'

# Of the worst probe each.
MY_LOSS = worst_loss(I_SEE, "peer")
LOSS_TO_ME = worst_loss(THEY_SEE, "instance")
LOSS_OF_OTHERS = worst_loss(OTHERS, "instance, peer")
# By peer: share of the other agents with loss to it. A share, so that one agent with loss to all peers does not affect them all.
OTHERS_LOSE = (
    f"((count by (peer) ({LOSS_OF_OTHERS} >= {LOSS_HIGH}) or count by (peer) ({LOSS_OF_OTHERS}) * 0) / count by (peer) ({LOSS_OF_OTHERS}))"
)
LOSING = f">= {LOSS_HIGH}"

# Over tcp, timestamps are not the kernel's after loss and reordering; over websocket and http never. That is no fault of the host.
STAMPED = 'on (job, instance, probe) group_left () pathmeter_probe_info{job="$job",instance="$instance",protocol!~"tcp|websocket|http"}'


def board():
    return dashboard(
        NODE,
        "Pathmeter / Node",
        "Is it this host, its uplink, one path or a peer? The verdicts read from left to right: the first that is not green is where to look.",
        variables=[
            JOB,
            ZONE,
            INSTANCE,
            variable("probe", "Probe", "pathmeter_probe_info", HOST, several=True),
            FAMILY,
        ],
        annotations=events(HOST, I_SEE),
        screen=[
            line(5, (6, this_host()), (6, uplink()), (6, single_paths()), (6, peers_themselves())),
            line(
                4,
                (3, not_sent_now()),
                (3, dropped_now()),
                (3, lag_now()),
                (3, user_stamps_now()),
                (3, loss_i_see()),
                (3, loss_others_see()),
                (3, silent_peers()),
                (3, slowest_responder()),
            ),
            line(13, (24, both_sides())),
        ],
        rows=[
            details(
                "Over time",
                line(8, (12, my_loss()), (12, loss_to_me())),
                line(8, (12, shares()), (12, states())),
            ),
            details(
                "Responder",
                line(8, (8, requests()), (8, rejected()), (8, peers_seen())),
                line(8, (8, messages()), (8, connections_refused()), (8, turnaround_of_mine())),
            ),
            details(
                "Process and kernel",
                line(8, (8, lag()), (8, not_sent()), (8, drops())),
                line(8, (8, user_timestamps()), (8, in_flight()), (8, host_dropped())),
            ),
        ],
    )


# --- The verdicts


def _not_sent(where, window=RECORDED):
    return f"{total('pathmeter_echo_unsent_total', where, '', window)} + {total('pathmeter_echo_send_errors_total', where, '', window)}"


def _user_stamps(by="", window=RECORDED):
    """Share of timestamps that should be from the kernel but are not."""
    keep = f"sum by ({by})" if by else "sum"

    def stamped(metric):
        return f"{keep} (rate({metric}{{{HOST}}}[{window}]) * {STAMPED})"

    return f"{stamped('pathmeter_echo_user_timestamps_total')} / (2 * {stamped('pathmeter_echo_responder_turnaround_seconds_count')} > 0)"


def _drops(by="", window=RECORDED):
    return total("pathmeter_socket_rx_dropped_total", HOST, by, window)


def _late_wakeups():
    # The probers' loops and the responder's alike: the worst one counts.
    return f"max({late_wakeups(HOST, 'loop')})"


def this_host():
    sent = total("pathmeter_echo_sent_total", HOST, "", RECORDED)
    signs = [
        f"((({_not_sent(HOST)}) / ({_not_sent(HOST)} + {sent}) > bool 0.001) or vector(0))",
        f"(({_drops()} > bool 0) or vector(0))",
        f"(({_late_wakeups()} > bool 0.01) or vector(0))",
        f"(({_user_stamps()} > bool 0.05) or vector(0))",
        f"((sum(increase(pathmeter_accounting_errors_total{{{HOST}}}[{RECORDED}])) > bool 0) or vector(0))",
    ]
    return stat(
        "1. This host?",
        "suffix: signs",
        "How many of five problems this host had in the last five minutes: more than one datagram in a thousand not sent, drops at its sockets, more than one "
        "wake-up in a hundred 10 ms late, more than 5 % of timestamps not from the kernel, accounting errors. If there is any, its other numbers are unreliable.",
        query(" + ".join(signs)),
        thresholds=NONE_IS_WELL,
        background=True,
        mappings=[value(0, "in order", GREEN), value(1, "1 sign of trouble", RED)],
        links=[to_agent("${instance}")],
    )


def uplink():
    losing = f"(count({MY_LOSS} {LOSING}) or vector(0)) + (count({LOSS_TO_ME} {LOSING}) or vector(0))"
    measured = f"(count({MY_LOSS}) or vector(0)) + (count({LOSS_TO_ME}) or vector(0))"
    return stat(
        "2. Its uplink?",
        SHARE,
        "Share of the pairs of this host, in either role, with 1 % loss or more. From one half on the fault is what all these pairs have in common: this "
        "host's cable, switch or address.",
        query(f"({losing}) / ({measured} > 0)"),
        thresholds=MOST,
        background=True,
        decimals=0,
    )


def single_paths():
    return stat(
        "3. The path to some peers?",
        NUMBER,
        "Peers to which this host has 1 % loss or more while most of the other agents do not: the fault is on the path between. If the second verdict is red, "
        "it is the cause of these.",
        query(or_zero(f"count(({MY_LOSS} {LOSING}) unless on (peer) ({OTHERS_LOSE} >= 0.5))")),
        thresholds=[(None, GREEN), (1, ORANGE)],
        background=True,
        mappings=[value(0, "none", GREEN)],
    )


def peers_themselves():
    return stat(
        "4. The peers?",
        NUMBER,
        "Peers to which this host and at least half of the other agents have 1 % loss or more: the fault is at the peer.",
        query(or_zero(f"count(({MY_LOSS} {LOSING}) and on (peer) ({OTHERS_LOSE} >= 0.5))")),
        thresholds=[(None, GREEN), (1, BLUE)],
        background=True,
        mappings=[value(0, "none", GREEN)],
    )


# --- Inputs of the verdicts


def not_sent_now():
    return stat(
        "Not sent",
        DATAGRAMS,
        "Scheduled sends that the process missed, and datagrams that the kernel refused, per second. Not counted as loss. Normal: 0.",
        query(_not_sent(HOST)),
        thresholds=FEW_ARE_ODD,
    )


def dropped_now():
    return stat(
        "Dropped at sockets",
        DATAGRAMS,
        "Datagrams that the kernel dropped because the process did not read them in time. Normal: 0.",
        query(_drops()),
        thresholds=NONE_IS_WELL,
    )


def lag_now():
    return stat(
        "Late wake-ups",
        SHARE,
        "Share of wake-ups of the worst loop that were 10 ms or more late, over ten minutes. With kernel timestamps the delay is not part of any RTT. Normal: "
        "below 0.1 %; from 1 % on the host is short of CPU.",
        query(_late_wakeups()),
        thresholds=LATE_WAKEUPS,
    )


def user_stamps_now():
    return stat(
        "Timestamps not from the kernel",
        SHARE,
        "Of udp and icmp. Such RTTs include this host's scheduling delays. Normal: 0.",
        query(_user_stamps()),
        thresholds=STAMPS,
    )


def loss_i_see():
    return stat(
        "Loss to peers",
        SHARE,
        "From this host to all its peers together, over five minutes, by the worst of the selected probes.",
        query(worst_loss(I_SEE)),
        thresholds=LOSS,
    )


def loss_others_see():
    return stat(
        "Loss from peers",
        SHARE,
        "From all agents that probe this host, over five minutes, by the worst of the selected probes. No data: no agent probes it, or its name differs from "
        "its label instance.",
        query(worst_loss(THEY_SEE)),
        thresholds=LOSS,
    )


def silent_peers():
    return stat(
        "Peers that are down",
        NUMBER,
        "Peers of this host that do not reply on any path. Normal: 0.",
        query(f'sum(pathmeter_peers{{{HOST},state="down"}})'),
        thresholds=NONE_IS_WELL,
    )


def slowest_responder():
    return stat(
        "Slowest responder",
        SECONDS,
        "Mean turnaround time of the slowest of this host's peers. Not part of the RTT. Milliseconds: that peer is busy.",
        query(f"max({mean('pathmeter_echo_responder_turnaround_seconds', I_SEE, 'peer', RECORDED)})"),
        thresholds=TURNAROUND,
    )


def both_sides():
    def of_me(expr):
        """An agent that probes this host is also its peer: joins both views by its name."""
        return f'label_replace({expr}, "peer", "$1", "instance", "(.+)")'

    def by_name(expr):
        return f"sum by (peer) ({of_me(expr)})"

    mine = f"and on (peer) sum by (peer) (pathmeter_pair:echo_network_verdicts:rate5m{{{I_SEE}}})"
    return table(
        "Peers, measured in both roles",
        "Over five minutes, of the worst selected probe; RTTs of the fastest. Directions are those of the wire, seen from this host: loss on the way to the "
        "peer is forward for this host and reverse for the peer, so columns of the same direction should agree. Others with loss: share of the other agents "
        "with 1 % loss or more to that peer; if high, the fault is at the peer. Each row links to the pair.",
        query(MY_LOSS),
        query(worst_loss(I_SEE, "peer", "forward")),
        query(worst_loss(I_SEE, "peer", "reverse")),
        query(by_name(LOSS_TO_ME)),
        query(by_name(worst_loss(THEY_SEE, "instance", "reverse"))),
        query(by_name(worst_loss(THEY_SEE, "instance", "forward"))),
        query(f"{OTHERS_LOSE} {mine}"),
        query(f"min by (peer) (pathmeter_pair:echo_rtt_seconds:mean5m{{{I_SEE}}})"),
        query(f"min by (peer) ({of_me(f'pathmeter_pair:echo_rtt_seconds:mean5m{{{THEY_SEE}}}')})"),
        columns=[
            Column("peer", "peer", links=(to_pair("${instance}", cell("peer")), to_node(cell("peer")))),
            Column("A", "loss", SHARE, LOSS),
            Column("B", "to peer", SHARE, LOSS),
            Column("C", "from peer", SHARE, LOSS),
            Column("D", "loss (peer)", SHARE, LOSS),
            Column("E", "to peer (peer)", SHARE, LOSS),
            Column("F", "from peer (peer)", SHARE, LOSS),
            Column("G", "others with loss", SHARE, MOST),
            Column("H", "RTT", SECONDS),
            Column("I", "RTT (peer)", SECONDS),
        ],
        sort=["loss", "loss (peer)", "RTT"],
    )


# --- Over time


def _loss_by_direction(where):
    lost = total("pathmeter_echo_lost_total", where, "probe, family, direction")
    return f"max by (direction) ({lost} / on (probe, family) group_left () ({network_verdicts(where, 'probe, family')} > 0))"


def my_loss():
    return timeseries(
        "Loss to peers, by direction",
        SHARE,
        "From this host to all its peers together, of the worst selected probe. Forward is what leaves this host.",
        query(_loss_by_direction(I_SEE), "{{direction}}"),
    )


def loss_to_me():
    return timeseries(
        "Loss from peers, by direction",
        SHARE,
        "From all agents that probe this host, of the worst selected probe. Reverse is what leaves this host: if it is as high as forward on the left, the "
        "fault is this host's uplink.",
        query(_loss_by_direction(THEY_SEE), "{{direction}}"),
    )


def shares():
    def share(loss):
        return f"(count({loss} {LOSING}) or vector(0)) / count({loss})"

    return timeseries(
        "Share of pairs with 1 % loss or more",
        SHARE,
        "Of the pairs that this host measures, and of the pairs that measure this host. Both near 100 % at the same time: this host's uplink.",
        query(share(MY_LOSS), "to peers"),
        query(share(LOSS_TO_ME), "from peers"),
        high=1,
    )


def states():
    return timeseries(
        "Peers by state",
        NUMBER,
        "Peers and targets that this host probes, by the best state of their paths. Normal: all up.",
        query(f"sum by (state) (pathmeter_peers{{{HOST}}})", "{{state}}"),
        stack=True,
    )


# --- Responder


def requests():
    return timeseries(
        "Requests and replies",
        DATAGRAMS,
        "Requests received at this host's STAMP port, and its replies. The difference was refused, or could not be sent.",
        query(total("pathmeter_responder_requests_total", HOST), "requests"),
        query(total("pathmeter_responder_replies_total", HOST), "replies"),
        query(total("pathmeter_responder_reply_errors_total", HOST), "could not be sent"),
    )


def rejected():
    return timeseries(
        "Requests refused, by reason",
        DATAGRAMS,
        "Requests that were not answered. unlisted: the source is not a configured peer; auth: another key; source_rate and total_rate: too many. The senders "
        "count them as lost. Normal: none.",
        query(total("pathmeter_responder_rejected_total", HOST, "reason"), "{{reason}}"),
        stack=True,
        bars=True,
    )


def peers_seen():
    return timeseries(
        "Agents that probe this host",
        NUMBER,
        "Distinct source addresses answered within the last minute. Fewer than usual without loss to peers: the others cannot reach this host.",
        query(f"sum(pathmeter_responder_peers_seen{{{HOST}}})", "addresses"),
    )


def messages():
    return timeseries(
        "Messages over connections",
        REQUESTS,
        "Messages answered at the agent port (tcp) and at /ws (websocket).",
        query(total("pathmeter_responder_messages_total", HOST), "tcp"),
        query(total("pathmeter_websocket_messages_total", HOST), "websocket"),
        query(f"sum(pathmeter_responder_connections{{{HOST}}})", "tcp connections, number"),
    )


def connections_refused():
    return timeseries(
        "Connections refused, by reason",
        EVENTS,
        "At the agent port: refused (unlisted, auth, full), or closed other than by the client. Normal: none.",
        query(total("pathmeter_responder_connections_refused_total", HOST, "reason"), "{{reason}}"),
        stack=True,
        bars=True,
    )


def turnaround_of_mine():
    return timeseries(
        "Turnaround time",
        SECONDS,
        "Mean time between receiving a request and replying on this host, as reported to its clients. Milliseconds: this host is busy. Not part of any RTT.",
        query(mean("pathmeter_echo_responder_turnaround_seconds", THEY_SEE, "probe"), "{{probe}}"),
    )


# --- Process and kernel


def lag():
    return timeseries(
        "Late wake-ups, by loop",
        SHARE,
        "Share of wake-ups that were 10 ms or more late, by thread with sockets. From 1 % on the host is short of CPU.",
        query(late_wakeups(HOST, "loop"), "{{loop}}"),
        thresholds=LATE_WAKEUPS,
    )


def not_sent():
    return timeseries(
        "Not sent, by reason",
        DATAGRAMS,
        "Scheduled sends that the process missed, and datagrams that the kernel refused, by reason: unreachable is a missing route, permission a local "
        "firewall, buffer a full queue. Normal: none.",
        query(total("pathmeter_echo_unsent_total", HOST), "missed send"),
        query(total("pathmeter_echo_send_errors_total", HOST, "error"), "{{error}}"),
        stack=True,
        bars=True,
    )


def drops():
    return timeseries(
        "Dropped at the sockets, by loop",
        DATAGRAMS,
        "Datagrams that the kernel dropped because the process did not read them in time. As many datagrams are counted as host-dropped, not as lost. Normal: none.",
        query(_drops("loop", GRAPH), "{{loop}}"),
        stack=True,
        bars=True,
    )


def user_timestamps():
    return timeseries(
        "Timestamps not from the kernel, by probe",
        SHARE,
        "Of udp and icmp only: other protocols have kernel timestamps never, or not always. Normal: 0.",
        query(_user_stamps("probe", GRAPH), "{{probe}}"),
        high=1,
    )


def in_flight():
    return timeseries(
        "In flight",
        NUMBER,
        "Datagrams sent that have no verdict yet. Grows with the rate, the RTT, and each peer that does not reply.",
        query(f"sum by (loop) (pathmeter_loop_outstanding{{{HOST}}})", "{{loop}}"),
    )


def host_dropped():
    return timeseries(
        "Dropped by a host, and withdrawn",
        DATAGRAMS,
        "Verdicts for which the network is not responsible: received but dropped by one of the hosts, or withdrawn because the wait was abandoned. Normal: "
        "none except at restarts.",
        query(total("pathmeter_echo_host_dropped_total", I_SEE), "host-dropped"),
        query(total("pathmeter_echo_withdrawn_total", I_SEE), "withdrawn"),
    )
