"""Does $instance measure well?"""

from .kit import *
from .promql import *

HOST = 'job="$job",instance="$instance"'
ALL = 'job="$job",zone=~"$zone"'


def board():
    return dashboard(
        AGENT,
        "Pathmeter / Agent",
        "Does this agent measure well, and does it run as it was told to?",
        variables=[JOB, ZONE, INSTANCE],
        annotations=events(HOST, HOST),
        screen=[
            line(
                4,
                (3, state()),
                (3, version()),
                (3, uptime()),
                (3, configuration()),
                (3, accounting()),
                (3, left_out()),
                (3, clock_now()),
                (3, discovery_failing()),
            ),
            line(9, (8, lag()), (8, not_sent()), (8, drops())),
            line(9, (8, cpu()), (8, memory()), (8, descriptors())),
        ],
        rows=[
            details(
                "Loops",
                line(9, (12, lag_heatmap()), (12, wakeups())),
                line(8, (8, tick()), (8, outstanding()), (8, unrouted())),
            ),
            details("Clocks and stamps", line(8, (8, clock()), (8, user_stamps()), (8, turnaround_invalid()))),
            details(
                "Configuration and discovery",
                line(6, (12, reload_state()), (12, reloaded())),
                line(8, (8, members()), (8, discovery_age()), (8, discovery_failures())),
                line(8, (8, targets()), (8, peers()), (8, resolve_failures())),
            ),
            details("Responder", line(8, (8, responder()), (8, rejected()), (8, refused()))),
            details(
                "HTTP and TLS",
                line(8, (8, responses()), (8, connections()), (8, handshake_errors())),
                line(5, (8, certificate()), (8, tls_files()), (8, probed_certificates())),
            ),
            details("WebSocket clients", line(8, (8, clients()), (8, clients_refused()), (8, clients_closed()))),
            details("Process", line(8, (8, threads()), (8, virtual_memory()), (8, events_dropped()))),
            details(
                "All agents of the zone: the worst",
                line(9, (8, most_late()), (8, most_not_sent()), (8, most_left_out())),
                line(9, (8, old_configurations()), (8, stale_discoveries()), (8, wrong_accounts())),
            ),
        ],
    )


# --- The first screen


def state():
    return stat(
        "Scraped",
        NUMBER,
        "Whether Prometheus gets an answer from it. No: everything below is old.",
        query(f"min(up{{{HOST}}})"),
        thresholds=ONE_IS_WELL,
        mappings=[value(1, "yes", GREEN), value(0, "no", RED)],
        background=True,
    )


def version():
    return names_of(
        "Version",
        "Which build runs. Two for a moment after an upgrade.",
        query(f"max by (version) (pathmeter_build_info{{{HOST}}})", "{{version}}"),
    )


def uptime():
    return stat(
        "Runs since",
        SECONDS,
        "How long ago the agent began. Counters began at 0 then.",
        query(f"time() - max(process_start_time_seconds{{{HOST}}})"),
        decimals=0,
    )


def configuration():
    return stat(
        "Configuration",
        NUMBER,
        "Whether what was last read is in force. Refused: the agent runs the one before, and would not start with the new one; its log has every mistake with line and column.",
        query(f"min(pathmeter_config_last_reload_successful{{{HOST}}})"),
        thresholds=ONE_IS_WELL,
        mappings=[value(1, "in force", GREEN), value(0, "refused", RED)],
        background=True,
    )


def accounting():
    return stat(
        "Accounts that do not add up",
        NUMBER,
        "In a day: paths whose sent datagrams were not their verdicts plus those in flight. Anything but 0 is a bug: report it.",
        query(f"sum(increase(pathmeter_accounting_errors_total{{{HOST}}}[1d]))"),
        thresholds=NONE_IS_WELL,
        decimals=0,
    )


def left_out():
    return stat(
        "Paths left out",
        NUMBER,
        "Measured and not exported because of metrics.max_series. Normal: 0. Raise the limit, select fewer peers, or sum them by group.",
        query(f"sum(pathmeter_series_limit_dropped{{{HOST}}})"),
        thresholds=NONE_IS_WELL,
    )


def clock_now():
    return stat(
        "Clock steps, suspends",
        NUMBER,
        "In a day. Each loop counts for itself; the largest is shown. Round trips survive a step; what was in flight at a suspend is withdrawn.",
        query(f"max(increase(pathmeter_clock_steps_total{{{HOST}}}[1d]))", "steps"),
        query(f"max(increase(pathmeter_host_suspends_total{{{HOST}}}[1d]))", "suspends"),
        thresholds=FEW_ARE_ODD,
        decimals=0,
    )


def discovery_failing():
    return stat(
        "Discovery is old",
        NUMBER,
        "Providers of peers that had no good result for three of their intervals. The last result stays in use. Nothing: the configuration names all peers itself.",
        query(
            f"count(pathmeter_discovery_last_success_timestamp_seconds{{{HOST}}}) - (count("
            f"time() - pathmeter_discovery_last_success_timestamp_seconds{{{HOST}}} < 3 * pathmeter_discovery_interval_seconds{{{HOST}}}) or vector(0))",
            expects=DISCOVERY,
        ),
        thresholds=NONE_IS_WELL,
    )


def lag():
    return timeseries(
        "Late wake-ups",
        SHARE,
        "Sleeps that ended 10 ms too late or more, by thread that owns sockets, in ten minutes. The delay is not in a round trip where the kernel stamps. "
        "Normal: below 0.1 %; from 1 % on the host is short of CPU.",
        query(late_wakeups(HOST, "loop"), "{{loop}}"),
        thresholds=LATE_WAKEUPS,
    )


def not_sent():
    return timeseries(
        "Not sent",
        DATAGRAMS,
        "Slots of the schedule that the process missed, and datagrams that the kernel refused, by the reason. They are no loss. Normal: none.",
        query(total("pathmeter_echo_unsent_total", HOST), "missed slot"),
        query(total("pathmeter_echo_send_errors_total", HOST, "error"), "{{error}}"),
        stack=True,
        bars=True,
    )


def drops():
    return timeseries(
        "Dropped at the sockets",
        DATAGRAMS,
        "By the kernel, because they were not read in time. Counted as host-dropped, not as lost. Normal: none; else more net.core.rmem_max, or more CPU.",
        query(total("pathmeter_socket_rx_dropped_total", HOST, "loop"), "{{loop}}"),
        stack=True,
        bars=True,
    )


def cpu():
    return timeseries(
        "CPU",
        SHARE,
        "Of one core. It grows with the datagrams a second, sent and answered.",
        query(total("process_cpu_seconds_total", HOST), "cores"),
    )


def memory():
    return timeseries(
        "Memory",
        BYTES,
        "Resident. It grows with the number of paths, not with time.",
        query(f"sum(process_resident_memory_bytes{{{HOST}}})", "resident"),
    )


def descriptors():
    return timeseries(
        "File descriptors",
        SHARE,
        "Open, of those that are allowed. Connections take one each. At 100 % no connection can be accepted or made.",
        query(f"max(process_open_fds{{{HOST}}} / process_max_fds{{{HOST}}})", "open"),
        thresholds=FULL,
        high=1,
    )


# --- Loops


def lag_heatmap():
    return heatmap(
        "How late the loops wake",
        SECONDS,
        "How many sleeps ended how much too late, all loops together. A second band high up is a host that takes the CPU away.",
        buckets("pathmeter_loop_lag_seconds", HOST),
    )


def wakeups():
    return timeseries(
        "Wake-ups",
        EVENTS,
        "Sleeps that ended, by loop. Under load many sends share one.",
        query(total("pathmeter_loop_wakeups_total", HOST, "loop"), "{{loop}}"),
    )


def tick():
    return timeseries(
        "Tick",
        SECONDS,
        "Sends that are due within it leave together. It grows with the load, to 5 ms at most.",
        query(f"max by (loop) (pathmeter_loop_tick_seconds{{{HOST}}})", "{{loop}}"),
    )


def outstanding():
    return timeseries(
        "In flight",
        NUMBER,
        "Datagrams without a verdict, on all paths of the loop.",
        query(f"sum by (loop) (pathmeter_loop_outstanding{{{HOST}}})", "{{loop}}"),
    )


def unrouted():
    return timeseries(
        "Datagrams that belong to nothing",
        DATAGRAMS,
        "Unrouted: for no path of ours; a few after a reload are normal. Oversized: longer than 9,216 bytes, thrown away.",
        query(total("pathmeter_socket_unrouted_total", HOST), "unrouted"),
        query(total("pathmeter_socket_oversized_total", HOST), "oversized"),
    )


# --- Clocks and stamps


def clock():
    return timeseries(
        "Clock steps and suspends",
        NUMBER,
        "In each interval of the graph, by loop. A host whose clock is stepped often has a broken NTP.",
        query(f"sum by (loop) (increase(pathmeter_clock_steps_total{{{HOST}}}[$__rate_interval]))", "step, {{loop}}"),
        query(f"sum by (loop) (increase(pathmeter_host_suspends_total{{{HOST}}}[$__rate_interval]))", "suspend, {{loop}}"),
        bars=True,
    )


def user_stamps():
    return timeseries(
        "Stamps by the process, not the kernel",
        SHARE,
        "By probe; such round trips contain the scheduler's delays. Normal: 0 for udp and icmp, a few for tcp where segments are lost or reordered, 100 % for websocket and http.",
        query(
            f"{total('pathmeter_echo_user_timestamps_total', HOST, 'probe')}"
            f" / (2 * {total('pathmeter_echo_responder_turnaround_seconds_count', HOST, 'probe')} > 0)",
            "{{probe}}",
        ),
        high=1,
    )


def turnaround_invalid():
    return timeseries(
        "Impossible turnarounds",
        DATAGRAMS,
        "Replies whose time at the responder was negative or longer than the whole exchange, so that nothing was subtracted. A reflector with a bad clock: see timestamps in the configuration.",
        query(total("pathmeter_echo_responder_turnaround_invalid_total", HOST, "peer") + " > 0", "{{peer}}", expects=TROUBLE),
    )


# --- Configuration and discovery


def reload_state():
    return state_timeline(
        "Last reload",
        "Whether the configuration that was last read is in force, and the web config file, certificates and keys as they were last found.",
        query(f"min(pathmeter_config_last_reload_successful{{{HOST}}})", "configuration"),
        query(f"min(pathmeter_tls_files_last_reload_successful{{{HOST}}})", "TLS files", expects=TLS),
        mappings=[value(1, "in force", GREEN), value(0, "refused", RED)],
    )


def reloaded():
    return stat(
        "Configuration in force",
        SECONDS,
        "How long ago it was read, by the hash of its file. The same hash everywhere: the fleet agrees.",
        query(
            f"(time() - max by (instance) (pathmeter_config_last_reload_success_timestamp_seconds{{{HOST}}}))"
            f" * on (instance) group_right () max by (instance, hash) (pathmeter_config_info{{{HOST}}})",
            "{{hash}}",
        ),
        decimals=0,
    )


def members():
    return timeseries(
        "Found, by provider",
        NUMBER,
        "Members in the provider's last good result, and addresses whose agent has not yet told its name: those are not probed.",
        query(f"sum by (provider) (pathmeter_discovery_members{{{HOST}}})", "{{provider}}", expects=DISCOVERY),
        query(f"sum by (provider) (pathmeter_discovery_unidentified{{{HOST}}})", "{{provider}}, unnamed", expects=DISCOVERY),
    )


def discovery_age():
    return timeseries(
        "Age of what was found",
        SECONDS,
        "Since the provider's last good result. Normal: a saw below its interval. A straight climb: it fails, and the last result stays in use.",
        query(f"time() - max by (provider) (pathmeter_discovery_last_success_timestamp_seconds{{{HOST}}} > 0)", "{{provider}}", expects=DISCOVERY),
    )


def discovery_failures():
    return timeseries(
        "Failed looks, by provider",
        EVENTS,
        "Looks that brought no result. The log says why.",
        query(total("pathmeter_discovery_failures_total", HOST, "provider"), "{{provider}}", expects=DISCOVERY),
        bars=True,
    )


def targets():
    return timeseries(
        "Selected, by probe",
        NUMBER,
        "Peers and targets that each probe's selection names. With a ring of k: k.",
        query(f"sum by (probe) (pathmeter_probe_targets{{{HOST}}})", "{{probe}}"),
    )


def peers():
    return timeseries(
        "Peers by state",
        NUMBER,
        "By the best of their paths. Normal: all up.",
        query(f"sum by (state) (pathmeter_peers{{{HOST}}})", "{{state}}"),
        stack=True,
    )


def resolve_failures():
    return timeseries(
        "Names that could not be looked up",
        EVENTS,
        "An address that worked stays in use. Normal: none.",
        query(total("pathmeter_resolve_failures_total", HOST), "failures"),
        bars=True,
    )


# --- Responder


def responder():
    return timeseries(
        "Asked and answered",
        DATAGRAMS,
        "At the STAMP port, and over connections. Unbelievable goodbyes are forged, or from an agent with another key.",
        query(total("pathmeter_responder_requests_total", HOST), "requests"),
        query(total("pathmeter_responder_replies_total", HOST), "replies"),
        query(total("pathmeter_responder_messages_total", HOST), "messages over tcp"),
        query(total("pathmeter_goodbyes_refused_total", HOST), "unbelievable goodbyes"),
    )


def rejected():
    return timeseries(
        "Refused, by reason",
        DATAGRAMS,
        "Datagrams that got no answer; docs/reference/protocol.md explains the reasons. Normal: none within a mesh; on an open network there are always some unlisted ones.",
        query(total("pathmeter_responder_rejected_total", HOST, "reason"), "{{reason}}"),
        stack=True,
        bars=True,
    )


def refused():
    return timeseries(
        "Connections refused, by reason",
        EVENTS,
        "At the agent port: not let in, or ended otherwise than by the other side's wish; and errors of accepting. Normal: none.",
        query(total("pathmeter_responder_connections_refused_total", HOST, "reason"), "{{reason}}"),
        query(total("pathmeter_responder_accept_errors_total", HOST), "accept error"),
        stack=True,
        bars=True,
    )


# --- HTTP and TLS


def responses():
    return timeseries(
        "HTTP responses by class",
        REQUESTS,
        "Scrapes, probes over http, and whoever asks. 4xx: wrong address or no permission. 5xx: a bug.",
        query(total("pathmeter_http_responses_total", HOST, "code"), "{{code}}"),
        stack=True,
    )


def connections():
    return timeseries(
        "HTTP connections",
        NUMBER,
        "Open ones, and errors of accepting further ones (for example no file descriptor left).",
        query(f"sum(pathmeter_http_connections{{{HOST}}})", "open"),
        query(f"sum(increase(pathmeter_http_accept_errors_total{{{HOST}}}[$__rate_interval]))", "accept errors"),
    )


def handshake_errors():
    return timeseries(
        "TLS handshakes that failed",
        EVENTS,
        "Plain HTTP, no client certificate, no version in common, or too slow. Only where HTTPS is served.",
        query(total("pathmeter_http_tls_handshake_errors_total", HOST), "failed", expects=TLS),
        bars=True,
    )


def certificate():
    return stat(
        "Own certificate",
        SECONDS,
        "How long the certificate of the HTTP port is still valid. Nothing without HTTPS. Replace the file; it is read again by itself.",
        query(f"min(pathmeter_http_tls_certificate_expiry_timestamp_seconds{{{HOST}}}) - time()", expects=TLS),
        thresholds=CERTIFICATE,
        decimals=0,
    )


def tls_files():
    return stat(
        "TLS files",
        NUMBER,
        "Whether every web config file, certificate, key and CA is in force as it was last found.",
        query(f"min(pathmeter_tls_files_last_reload_successful{{{HOST}}})", expects=TLS),
        thresholds=ONE_IS_WELL,
        mappings=[value(1, "in force", GREEN), value(0, "an older one is", RED)],
    )


def probed_certificates():
    return stat(
        "First certificate of a peer to end",
        SECONDS,
        "Of those that this agent's probes see. Which one: /api/v1/paths, or the pair.",
        query(f"min(pathmeter_tls_certificate_expiry_timestamp_seconds{{{HOST}}}) - time()", expects=TLS),
        thresholds=CERTIFICATE,
        decimals=0,
    )


# --- WebSocket clients


def clients():
    return timeseries(
        "Clients",
        NUMBER,
        "That have messages echoed at /ws: other agents, browsers, scripts.",
        query(f"sum(pathmeter_websocket_clients{{{HOST}}})", "connected"),
    )


def clients_refused():
    return timeseries(
        "Clients that were not let in",
        EVENTS,
        "By reason; an origin is a page that websocket.origins does not list.",
        query(total("pathmeter_websocket_refused_total", HOST, "reason"), "{{reason}}"),
        stack=True,
        bars=True,
    )


def clients_closed():
    return timeseries(
        "Clients that left, by reason",
        EVENTS,
        "client is a Close of theirs, the usual end. error: their connection ended without one.",
        query(total("pathmeter_websocket_closed_total", HOST, "reason"), "{{reason}}"),
        stack=True,
        bars=True,
    )


# --- Process


def threads():
    return timeseries(
        "Threads",
        NUMBER,
        "A fixed number, and some for look-ups of names.",
        query(f"sum(process_threads{{{HOST}}})", "threads"),
    )


def virtual_memory():
    return timeseries(
        "Virtual memory",
        BYTES,
        "Address space. Much larger than the resident memory, and of no concern while it does not climb for days.",
        query(f"sum(process_virtual_memory_bytes{{{HOST}}})", "virtual"),
    )


def events_dropped():
    return timeseries(
        "Events dropped",
        EVENTS,
        "Events that the daemon was too slow to take: lines that are missing in the log. No count of a path is affected. Normal: none.",
        query(total("pathmeter_events_dropped_total", HOST, "loop"), "{{loop}}"),
        bars=True,
    )


# --- All agents


def _worst(title, unit, description, expr, thresholds, expects=ALWAYS):
    return table(
        title,
        description,
        query(f"topk(20, {expr})", expects=expects),
        columns=[
            Column("instance", "agent", links=(to_agent(cell("instance")), to_node(cell("instance")))),
            Column("Value", "now", unit, thresholds, width=120),
        ],
        sort=["now"],
    )


def most_late():
    return _worst(
        "Agents: late wake-ups",
        SHARE,
        "The twenty agents whose worst loop wakes 10 ms late or more most often. From 1 % on their measurement is in doubt.",
        f"max by (instance) ({late_wakeups(ALL, 'instance, loop')})",
        LATE_WAKEUPS,
    )


def most_not_sent():
    by = "instance"
    unsent = total("pathmeter_echo_unsent_total", ALL, by, RECORDED)
    errors = total("pathmeter_echo_send_errors_total", ALL, by, RECORDED)
    return _worst(
        "Agents: not sent",
        DATAGRAMS,
        "The twenty agents that missed or were refused most datagrams in five minutes.",
        f"{unsent} + {errors}",
        NONE_IS_WELL,
    )


def most_left_out():
    return _worst(
        "Agents: paths left out",
        NUMBER,
        "Agents that measure more paths than metrics.max_series lets them export. Empty: none.",
        f"max by (instance) (pathmeter_series_limit_dropped{{{ALL}}}) > 0",
        NONE_IS_WELL,
        TROUBLE,
    )


def old_configurations():
    return _worst(
        "Agents: configurations refused",
        SECONDS,
        "Agents that run an older configuration than their file, and how old it is. Empty: none.",
        f"max by (instance) (time() - pathmeter_config_last_reload_success_timestamp_seconds{{{ALL}}}"
        f" and on (instance) pathmeter_config_last_reload_successful{{{ALL}}} == 0)",
        NONE_IS_WELL,
        TROUBLE,
    )


def stale_discoveries():
    return _worst(
        "Agents: discovery is old",
        SECONDS,
        "Agents with a provider that had no good result for three of its intervals, and for how long. Empty: none.",
        f"max by (instance) (time() - pathmeter_discovery_last_success_timestamp_seconds{{{ALL}}} >= 3 * pathmeter_discovery_interval_seconds{{{ALL}}})",
        NONE_IS_WELL,
        TROUBLE,
    )


def wrong_accounts():
    return _worst(
        "Agents: accounts that do not add up, drops at sockets",
        NUMBER,
        "Agents of which one or the other happened within an hour, and how often. Their numbers are in doubt. Empty: none.",
        f"sum by (instance) (increase(pathmeter_accounting_errors_total{{{ALL}}}[1h])"
        f" + on (instance, loop) increase(pathmeter_socket_rx_dropped_total{{{ALL}}}[1h])) > 0",
        NONE_IS_WELL,
        TROUBLE,
    )
