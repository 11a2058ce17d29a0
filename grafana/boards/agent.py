"""Whether $instance measures reliably."""

from .kit import *
from .promql import *

HOST = 'job="$job",instance="$instance"'
ALL = 'job="$job",zone=~"$zone"'


def board():
    return dashboard(
        AGENT,
        "Pathmeter / Agent",
        "Whether this agent measures reliably, and runs with its current configuration.",
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
            details("Clocks and timestamps", line(8, (8, clock()), (8, user_timestamps()), (8, turnaround_invalid()))),
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
                "Worst agents of the zone",
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
        "Whether Prometheus can scrape this agent. If not, everything below is old.",
        query(f"min(up{{{HOST}}})"),
        thresholds=ONE_IS_WELL,
        mappings=[value(1, "yes", GREEN), value(0, "no", RED)],
        background=True,
    )


def version():
    return names_of(
        "Version",
        "Version of this agent. Two versions are shown for a moment after an upgrade.",
        query(f"max by (version) (pathmeter_build_info{{{HOST}}})", "{{version}}"),
    )


def uptime():
    return stat(
        "Uptime",
        SECONDS,
        "Time since the agent was started. Its counters started at 0 then.",
        query(f"time() - max(process_start_time_seconds{{{HOST}}})"),
        decimals=0,
    )


def configuration():
    return stat(
        "Configuration",
        NUMBER,
        "Whether the last configuration read is in use. Rejected: the agent runs the previous one, and would not start with the new one; its log lists every "
        "problem with line and column.",
        query(f"min(pathmeter_config_last_reload_successful{{{HOST}}})"),
        thresholds=ONE_IS_WELL,
        mappings=[value(1, "in use", GREEN), value(0, "rejected", RED)],
        background=True,
    )


def accounting():
    return stat(
        "Accounting errors",
        NUMBER,
        "In one day: paths whose sent datagrams differed from verdicts plus datagrams in flight. Anything but 0 is a bug: report it.",
        query(f"sum(increase(pathmeter_accounting_errors_total{{{HOST}}}[1d]))"),
        thresholds=NONE_IS_WELL,
        decimals=0,
    )


def left_out():
    return stat(
        "Paths not exported",
        NUMBER,
        "Paths that are measured but not exported because of metrics.series_max. Normal: 0. Raise the limit, select fewer peers, or sum paths by group.",
        query(f"sum(pathmeter_paths_not_exported{{{HOST}}})"),
        thresholds=NONE_IS_WELL,
    )


def clock_now():
    return stat(
        "Clock steps, suspends",
        NUMBER,
        "In one day. Each loop counts by itself; the largest count is shown. RTTs are not affected by clock steps; datagrams in flight at a suspend are withdrawn.",
        query(f"max(increase(pathmeter_clock_steps_total{{{HOST}}}[1d]))", "steps"),
        query(f"max(increase(pathmeter_host_suspends_total{{{HOST}}}[1d]))", "suspends"),
        thresholds=FEW_ARE_ODD,
        decimals=0,
    )


def discovery_failing():
    return stat(
        "Stale discovery",
        NUMBER,
        "Discovery providers without a successful result for three intervals. The last result stays in use. No data: all peers are listed in the configuration.",
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
        "Share of wake-ups that were 10 ms or more late, by thread with sockets, over ten minutes. With kernel timestamps the delay is not part of any RTT. "
        "Normal: below 0.1 %; from 1 % on the host is short of CPU.",
        query(late_wakeups(HOST, "loop"), "{{loop}}"),
        thresholds=LATE_WAKEUPS,
    )


def not_sent():
    return timeseries(
        "Not sent",
        DATAGRAMS,
        "Scheduled sends that the process missed, and datagrams that the kernel refused, by reason. Not counted as loss. Normal: none.",
        query(total("pathmeter_echo_unsent_total", HOST), "missed send"),
        query(total("pathmeter_echo_send_errors_total", HOST, "error"), "{{error}}"),
        stack=True,
        bars=True,
    )


def drops():
    return timeseries(
        "Dropped at the sockets",
        DATAGRAMS,
        "Datagrams that the kernel dropped because they were not read in time. Counted as host-dropped, not as lost. Normal: none. Remedy: raise "
        "net.core.rmem_max, or add CPU.",
        query(total("pathmeter_socket_rx_dropped_total", HOST, "loop"), "{{loop}}"),
        stack=True,
        bars=True,
    )


def cpu():
    return timeseries(
        "CPU",
        SHARE,
        "In cores. Grows with the number of datagrams sent and answered per second.",
        query(total("process_cpu_seconds_total", HOST), "cores"),
    )


def memory():
    return timeseries(
        "Memory",
        BYTES,
        "Resident memory. Grows with the number of paths, not with time.",
        query(f"sum(process_resident_memory_bytes{{{HOST}}})", "resident"),
    )


def descriptors():
    return timeseries(
        "File descriptors",
        SHARE,
        "Open file descriptors as a share of the limit. Each connection takes one. At 100 % no connection can be accepted or opened.",
        query(f"max(process_open_fds{{{HOST}}} / process_max_fds{{{HOST}}})", "open"),
        thresholds=FULL,
        high=1,
    )


# --- Loops


def lag_heatmap():
    return heatmap(
        "Wake-up delay of the loops",
        SECONDS,
        "Distribution of the wake-up delay, all loops together. A second band at high values means that another process takes the CPU.",
        buckets("pathmeter_loop_lag_seconds", HOST),
    )


def wakeups():
    return timeseries(
        "Wake-ups",
        EVENTS,
        "Wake-ups per second, by loop. Under load many sends share one wake-up.",
        query(total("pathmeter_loop_wakeups_total", HOST, "loop"), "{{loop}}"),
    )


def tick():
    return timeseries(
        "Tick",
        SECONDS,
        "Sends that are due within this time are sent together. Grows with the load, up to 5 ms.",
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
        "Unmatched datagrams",
        DATAGRAMS,
        "Unrouted: received datagrams that match no path; a few after a reload are normal. Oversized: longer than 9,216 bytes, discarded.",
        query(total("pathmeter_socket_unrouted_total", HOST), "unrouted"),
        query(total("pathmeter_socket_oversized_total", HOST), "oversized"),
    )


# --- Clocks and timestamps


def clock():
    return timeseries(
        "Clock steps and suspends",
        NUMBER,
        "In each interval of the graph, by loop. Frequent steps mean that time synchronisation is broken.",
        query(f"sum by (loop) (increase(pathmeter_clock_steps_total{{{HOST}}}[$__rate_interval]))", "step, {{loop}}"),
        query(f"sum by (loop) (increase(pathmeter_host_suspends_total{{{HOST}}}[$__rate_interval]))", "suspend, {{loop}}"),
        bars=True,
    )


def user_timestamps():
    return timeseries(
        "Timestamps not from the kernel",
        SHARE,
        "Share of timestamps taken by the process, by probe; such RTTs include scheduling delays. Normal: 0 for udp and icmp, a few for tcp where segments are "
        "lost or reordered, 100 % for websocket and http.",
        query(
            f"{total('pathmeter_echo_user_timestamps_total', HOST, 'probe')}"
            f" / (2 * {total('pathmeter_echo_responder_turnaround_seconds_count', HOST, 'probe')} > 0)",
            "{{probe}}",
        ),
        high=1,
    )


def turnaround_invalid():
    return timeseries(
        "Invalid turnaround times",
        DATAGRAMS,
        "Replies whose time at the responder was negative or longer than the whole exchange, so that nothing was subtracted. The reflector has a bad clock: "
        "see timestamps in the configuration.",
        query(total("pathmeter_echo_responder_turnaround_invalid_total", HOST, "peer") + " > 0", "{{peer}}", expects=TROUBLE),
    )


# --- Configuration and discovery


def reload_state():
    return state_timeline(
        "Last reload",
        "Whether the last version of the configuration, and of the web config file, certificates and keys, is in use.",
        query(f"min(pathmeter_config_last_reload_successful{{{HOST}}})", "configuration"),
        query(f"min(pathmeter_tls_files_last_reload_successful{{{HOST}}})", "TLS files", expects=TLS),
        mappings=[value(1, "in use", GREEN), value(0, "rejected", RED)],
    )


def reloaded():
    return stat(
        "Age of the configuration",
        SECONDS,
        "Time since the configuration in use was read, by the hash of its file. In a consistent fleet all hashes are equal.",
        query(
            f"(time() - max by (instance) (pathmeter_config_last_reload_success_timestamp_seconds{{{HOST}}}))"
            f" * on (instance) group_right () max by (instance, hash) (pathmeter_config_info{{{HOST}}})",
            "{{hash}}",
        ),
        decimals=0,
    )


def members():
    return timeseries(
        "Discovered members, by provider",
        NUMBER,
        "Members in the provider's last successful result, and members whose agent name is not known yet, which are not probed.",
        query(f"sum by (provider) (pathmeter_discovery_members{{{HOST}}})", "{{provider}}", expects=DISCOVERY),
        query(f"sum by (provider) (pathmeter_discovery_unidentified{{{HOST}}})", "{{provider}}, unnamed", expects=DISCOVERY),
    )


def discovery_age():
    return timeseries(
        "Age of discovery results",
        SECONDS,
        "Time since the provider's last successful result. Normal: a sawtooth below its interval. A steady rise means that the provider fails; the last result stays in use.",
        query(f"time() - max by (provider) (pathmeter_discovery_last_success_timestamp_seconds{{{HOST}}} > 0)", "{{provider}}", expects=DISCOVERY),
    )


def discovery_failures():
    return timeseries(
        "Failed polls, by provider",
        EVENTS,
        "Polls without a result. The log has the reason.",
        query(total("pathmeter_discovery_failures_total", HOST, "provider"), "{{provider}}", expects=DISCOVERY),
        bars=True,
    )


def targets():
    return timeseries(
        "Selected, by probe",
        NUMBER,
        "Peers and targets that each probe selects. With a ring of k: k.",
        query(f"sum by (probe) (pathmeter_probe_targets{{{HOST}}})", "{{probe}}"),
    )


def peers():
    return timeseries(
        "Peers by state",
        NUMBER,
        "Each peer has the best state of its paths. Normal: all up.",
        query(f"sum by (state) (pathmeter_peers{{{HOST}}})", "{{state}}"),
        stack=True,
    )


def resolve_failures():
    return timeseries(
        "Failed DNS lookups",
        EVENTS,
        "The last address that was resolved stays in use. Normal: none.",
        query(total("pathmeter_resolve_failures_total", HOST), "failures"),
        bars=True,
    )


# --- Responder


def responder():
    return timeseries(
        "Requests and replies",
        DATAGRAMS,
        "At the STAMP port, and over connections. Rejected goodbyes are forged, or from an agent with another key.",
        query(total("pathmeter_responder_requests_total", HOST), "requests"),
        query(total("pathmeter_responder_replies_total", HOST), "replies"),
        query(total("pathmeter_responder_messages_total", HOST), "messages over tcp"),
        query(total("pathmeter_agent_port_rejected_total", HOST), "rejected goodbyes"),
    )


def rejected():
    return timeseries(
        "Requests refused, by reason",
        DATAGRAMS,
        "Requests that were not answered; docs/reference/protocol.md explains the reasons. Normal: none within a mesh; on an open network there are always some unlisted ones.",
        query(total("pathmeter_responder_rejected_total", HOST, "reason"), "{{reason}}"),
        stack=True,
        bars=True,
    )


def refused():
    return timeseries(
        "Connections refused, by reason",
        EVENTS,
        "At the agent port: refused, or closed other than by the client; and errors while accepting. Normal: none.",
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
        "Responses to scrapes, probes over http, and other clients. 4xx: wrong URL or not authorised. 5xx: a bug.",
        query(total("pathmeter_http_responses_total", HOST, "code"), "{{code}}"),
        stack=True,
    )


def connections():
    return timeseries(
        "HTTP connections",
        NUMBER,
        "Open connections, and errors while accepting (for example, no free file descriptor).",
        query(f"sum(pathmeter_http_connections{{{HOST}}})", "open"),
        query(f"sum(increase(pathmeter_http_accept_errors_total{{{HOST}}}[$__rate_interval]))", "accept errors"),
    )


def handshake_errors():
    return timeseries(
        "Failed TLS handshakes",
        EVENTS,
        "Plain HTTP, no client certificate, no common version, or timeout. Only where HTTPS is served.",
        query(total("pathmeter_http_tls_handshake_errors_total", HOST), "failed", expects=TLS),
        bars=True,
    )


def certificate():
    return stat(
        "Certificate of this agent",
        SECONDS,
        "Remaining validity of the certificate of the HTTP port. No data without HTTPS. After its file is replaced, the agent loads it automatically.",
        query(f"min(pathmeter_http_tls_certificate_expiry_timestamp_seconds{{{HOST}}}) - time()", expects=TLS),
        thresholds=CERTIFICATE,
        decimals=0,
    )


def tls_files():
    return stat(
        "TLS files",
        NUMBER,
        "Whether the latest version of every web config file, certificate, key and CA file is in use.",
        query(f"min(pathmeter_tls_files_last_reload_successful{{{HOST}}})", expects=TLS),
        thresholds=ONE_IS_WELL,
        mappings=[value(1, "in use", GREEN), value(0, "outdated", RED)],
    )


def probed_certificates():
    return stat(
        "First peer certificate to expire",
        SECONDS,
        "Of the certificates that this agent's probes receive. See /api/v1/paths, or the pair, for which one it is.",
        query(f"min(pathmeter_tls_certificate_expiry_timestamp_seconds{{{HOST}}}) - time()", expects=TLS),
        thresholds=CERTIFICATE,
        decimals=0,
    )


# --- WebSocket clients


def clients():
    return timeseries(
        "Clients",
        NUMBER,
        "Clients whose messages are echoed at /ws: other agents, browsers, scripts.",
        query(f"sum(pathmeter_websocket_clients{{{HOST}}})", "connected"),
    )


def clients_refused():
    return timeseries(
        "Clients refused, by reason",
        EVENTS,
        "origin: the origin of the page is not listed in websocket.origins.",
        query(total("pathmeter_websocket_clients_refused_total", HOST, "reason"), "{{reason}}"),
        stack=True,
        bars=True,
    )


def clients_closed():
    return timeseries(
        "Clients disconnected, by reason",
        EVENTS,
        "client: the client sent a close frame, the usual case. error: the connection ended without one.",
        query(total("pathmeter_websocket_clients_closed_total", HOST, "reason"), "{{reason}}"),
        stack=True,
        bars=True,
    )


# --- Process


def threads():
    return timeseries(
        "Threads",
        NUMBER,
        "A fixed number, plus some for DNS lookups.",
        query(f"sum(process_threads{{{HOST}}})", "threads"),
    )


def virtual_memory():
    return timeseries(
        "Virtual memory",
        BYTES,
        "Address space. Much larger than the resident memory; harmless unless it grows for days.",
        query(f"sum(process_virtual_memory_bytes{{{HOST}}})", "virtual"),
    )


def events_dropped():
    return timeseries(
        "Events dropped",
        EVENTS,
        "Events that the daemon did not read in time, which are missing in the log. Counters of paths are not affected. Normal: none.",
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
        "The twenty agents whose worst loop most often wakes 10 ms or more late. From 1 % on their measurements are unreliable.",
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
        "The twenty agents with the most unsent datagrams in five minutes.",
        f"{unsent} + {errors}",
        NONE_IS_WELL,
    )


def most_left_out():
    return _worst(
        "Agents: paths not exported",
        NUMBER,
        "Agents that measure more paths than metrics.series_max allows to export. Empty: none.",
        f"max by (instance) (pathmeter_paths_not_exported{{{ALL}}}) > 0",
        NONE_IS_WELL,
        TROUBLE,
    )


def old_configurations():
    return _worst(
        "Agents: configurations rejected",
        SECONDS,
        "Agents that rejected their configuration file, and the age of the configuration that they run. Empty: none.",
        f"max by (instance) (time() - pathmeter_config_last_reload_success_timestamp_seconds{{{ALL}}}"
        f" and on (instance) pathmeter_config_last_reload_successful{{{ALL}}} == 0)",
        NONE_IS_WELL,
        TROUBLE,
    )


def stale_discoveries():
    return _worst(
        "Agents: stale discovery",
        SECONDS,
        "Agents with a provider without a successful result for three intervals, and for how long. Empty: none.",
        f"max by (instance) (time() - pathmeter_discovery_last_success_timestamp_seconds{{{ALL}}} >= 3 * pathmeter_discovery_interval_seconds{{{ALL}}})",
        NONE_IS_WELL,
        TROUBLE,
    )


def wrong_accounts():
    return _worst(
        "Agents: accounting errors, drops at sockets",
        NUMBER,
        "Agents with either of these within one hour, and how often. Their measurements are unreliable. Empty: none.",
        f"sum by (instance) (increase(pathmeter_accounting_errors_total{{{ALL}}}[1h])"
        f" + on (instance, loop) increase(pathmeter_socket_rx_dropped_total{{{ALL}}}[1h])) > 0",
        NONE_IS_WELL,
        TROUBLE,
    )
