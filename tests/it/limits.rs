//! The table of `docs/reference/limits.md`: each value is read from the constant in the source that sets it.
//! `UPDATE_DOCS=1 cargo test --test it limits` writes it.

use std::fs;
use std::path::Path;

const PAGE: &str = "docs/reference/limits.md";
const BEGIN: &str = "<!-- The table is generated: tests/it/limits.rs. -->\n\n";

/// What is limited; where its constants or defaults are, `file:name`; what happens at the limit.
type Row = (&'static str, &'static [&'static str], &'static str);

const CONFIGURATION: &[Row] = &[
    (
        "configuration file",
        &["src/config/file.rs:FILE_BYTES_MAX", "src/config/file.rs:DEPTH_MAX"],
        "refused; the second value is the nesting depth",
    ),
    ("problems listed", &["src/config/diagnostic.rs:LISTED_MAX"], "further ones are counted"),
    (
        "peers and targets",
        &["src/config/schema.rs:HOSTS_MAX"],
        "refused; discovered hosts beyond it are skipped and logged",
    ),
    ("providers", &["src/config/schema.rs:PROVIDERS_MAX"], "refused"),
    ("probes", &["src/config/schema.rs:PROBES_MAX"], "refused"),
    (
        "paths",
        &["src/config/probes.rs:PATHS_MAX"],
        "refused; discovered paths beyond it are not measured, and `/api/v1/paths` says so",
    ),
    (
        "peers that a rule selects, in a ring and per zone",
        &["src/config/probes.rs:RING_COUNT_ALLOWED", "src/config/probes.rs:COUNT_ALLOWED"],
        "refused",
    ),
    ("networks in `responder.allow`", &["src/config/schema.rs:ALLOW_MAX"], "refused"),
    ("characters of a name", &["src/config/values.rs:NAME_CHARS_MAX"], "refused"),
    (
        "labels of an agent or target, characters of a value",
        &["src/config/values.rs:LABELS_MAX", "src/config/values.rs:LABEL_CHARS_MAX"],
        "refused",
    ),
    (
        "bandwidth runs at a time, bytes and time of a run, bytes of all runs and of a path in a day",
        &[
            "src/config/bandwidth.rs:RUNS",
            "src/config/bandwidth.rs:RUN_BYTES",
            "src/config/bandwidth.rs:RUN_TIME",
            "src/config/bandwidth.rs:DAY_BYTES",
            "src/config/bandwidth.rs:PATH_DAY_BYTES",
        ],
        "defaults; a run waits, is refused with the limit, or is refused until midnight in UTC",
    ),
    ("origins in `websocket.origins`", &["src/config/websocket.rs:ORIGINS_MAX"], "refused"),
    (
        "users of a web configuration file, cost of a hash",
        &["src/config/web.rs:USERS_MAX", "src/config/web.rs:COST_MAX"],
        "refused",
    ),
    (
        "members of one provider",
        &["src/config/file_sd.rs:MEMBERS_MAX"],
        "the list is rejected, its last members stay",
    ),
];

const MEASURING: &[Row] = &[
    (
        "undecided datagrams or messages of a flow",
        &["proto/src/echo/flow/mod.rs:PENDING"],
        "the send is skipped and counted as unsent",
    ),
    (
        "wait for the transmit timestamp after the reply",
        &["proto/src/machine.rs:TX_TIMESTAMP_WAIT"],
        "the user-space timestamp is used and counted",
    ),
    (
        "pending transmit timestamps, and for how long",
        &["src/datagram/tx_timestamps.rs:PENDING_MAX", "src/datagram/tx_timestamps.rs:TIMEOUT"],
        "the oldest is dropped; the user-space timestamp is used",
    ),
    (
        "datagram that is read",
        &["src/datagram/socket.rs:DATAGRAM_BYTES"],
        "dropped: `pathmeter_socket_oversized_total`",
    ),
    (
        "receive and send buffers of a socket",
        &["src/datagram/socket.rs:BUFFER_BYTES"],
        "the kernel drops: `pathmeter_socket_rx_dropped_total`",
    ),
    ("datagrams sent in one call", &["src/datagram/outbox.rs:OUTBOX_MAX"], "sent before more are made"),
    (
        "datagrams read in one call, calls per turn",
        &["src/datagram/socket.rs:RECEIVE_BATCH", "src/datagram/thread/receive.rs:BATCHES_PER_TURN_MAX"],
        "the rest is read in the next turn; no loss is decided before",
    ),
    (
        "paths that send in one turn of a loop",
        &["src/datagram/thread/slots.rs:TIMERS_PER_TURN_MAX"],
        "the rest in the next turn; a send that is late by half an interval is skipped",
    ),
    (
        "replies per connection without a matching message: unreadable in a row, in one turn",
        &["src/stream/path.rs:MISMATCHES_MAX", "src/stream/path.rs:UNMATCHED_MAX"],
        "the connection is closed: `protocol`",
    ),
    (
        "HTTP body searched for `expect_body`, body read",
        &["src/stream/http.rs:BODY_BYTES_MAX", "src/stream/http.rs:BODY_BYTES_READ"],
        "not searched; the connection is closed",
    ),
    (
        "lookups at once, time for one",
        &["src/resolver.rs:CONCURRENT_LOOKUPS_MAX", "src/resolver.rs:RESOLVE_TIMEOUT"],
        "further ones wait; the lookup has failed",
    ),
    ("events stored for `/api/v1/events`", &["src/event_log/mod.rs:EVENTS_MAX"], "the oldest is dropped"),
    (
        "traces of clients of `/ws` that begin at once; clients that wait for one",
        &["src/daemon/client_traces/mod.rs:BURST", "src/daemon/mod.rs:CLIENT_TRACES_PENDING_MAX"],
        "refused with a reason: `total_rate`, `busy`",
    ),
    (
        "traces of clients of one address, or IPv6 /64: that begin at once, part of the rate of all",
        &["src/daemon/client_traces/mod.rs:SOURCE_BURST", "src/daemon/client_traces/mod.rs:SOURCE_SHARE"],
        "refused with a reason: `source_rate`",
    ),
    ("duration of a trace of a client", &["src/daemon/client_traces/report.rs:RESULT_MAX"], "it has failed"),
    (
        "messages of its trace that wait until a client reads",
        &["src/websocket/trace.rs:MESSAGES_MAX"],
        "dropped; a trace has fewer",
    ),
    (
        "traces of clients on their own connections at once; addresses, or IPv6 /64, with stalled connections",
        &[
            "src/daemon/client_traces/own_flow.rs:RUNNING_MAX",
            "src/daemon/client_traces/own_flow.rs:STALLED_MAX",
        ],
        "further ones are traced by another method; the first one is forgotten",
    ),
    (
        "time for a client's connection to acknowledge what is sent before, in and after its trace: minimum, RTTs, until it has stalled",
        &[
            "src/stream/own_flow/mod.rs:ANSWER_MIN",
            "src/stream/own_flow/mod.rs:ANSWER_RTTS",
            "src/stream/own_flow/mod.rs:STALLED_AFTER",
        ],
        "before: traced by another method; in or after: the trace ends; stalled: it is closed, unless the client does not read",
    ),
    (
        "ICMP messages about a client's connection that are read at once; segments searched for the latest one",
        &["src/stream/own_flow/mod.rs:MESSAGES_PER_STEP", "src/stream/own_flow/sockets.rs:SEGMENTS_MAX"],
        "other tasks run first; the latest one of these is used",
    ),
    (
        "paths that are traced on the connection of their echoes",
        &["src/stream/mod.rs:OWN_FLOW_PATHS_MAX"],
        "further ones are traced with SYN segments",
    ),
    (
        "time for an echo's connection to be opened again before it is traced with SYN segments; age of a connection after one that was younger",
        &[
            "proto/src/trace/own_flow/probes/mod.rs:CONNECTION_WAIT",
            "proto/src/trace/own_flow/probes/mod.rs:AGE_MIN",
        ],
        "traced with SYN segments until there is one; until it is that old",
    ),
    (
        "time for an echo's connection to acknowledge what is sent after a segment of its trace, or to be reset; connections that do neither in time",
        &[
            "proto/src/trace/own_flow/probes/mod.rs:STALLED_AFTER",
            "proto/src/trace/own_flow/probes/mod.rs:RESET_WITHIN",
            "proto/src/trace/own_flow/probes/stalls.rs:STALLS_MAX",
        ],
        "it has stalled; a later reset has another cause; traced with SYN segments for 24 h",
    ),
    (
        "segments in a row that reach a peer and are not answered",
        &["proto/src/trace/own_flow/probes/mod.rs:UNANSWERED_MAX"],
        "traced with SYN segments for an hour",
    ),
    (
        "segments of a trace on an echo's connection to which answers are recognized; answers read at once; bytes that a received segment may be ahead",
        &[
            "proto/src/trace/own_flow/probes/mod.rs:SENT_MAX",
            "src/stream/tcp_trace/mod.rs:ANSWERS_PER_STEP",
            "proto/src/trace/own_flow/probes/mod.rs:AHEAD_MAX",
        ],
        "answers to the oldest are ignored; other tasks run first; it does not count",
    ),
    (
        "changed routes of this host that wait for the next second",
        &["src/local_routes.rs:CHANGED_MAX"],
        "all paths are traced",
    ),
    ("clients that follow events", &["src/event_log/mod.rs:FEEDS_MAX"], "503"),
    (
        "clients of one address, or IPv6 /64, that follow events",
        &["src/event_log/mod.rs:FEEDS_PER_SOURCE_MAX"],
        "429",
    ),
    (
        "events of each type about clients",
        &["src/daemon/client_traces/report.rs:EVENTS_MAX"],
        "the oldest is dropped",
    ),
    (
        "flows whose routes an agent reports to a peer, and their bytes; response of a peer to `/api/v1/agent`",
        &[
            "src/route_record.rs:ROUTES_MAX",
            "src/route_record.rs:ROUTES_BYTES_MAX",
            "src/identity_poller.rs:REPORT_BYTES_MAX",
        ],
        "further flows are left out; a longer response is a failed request",
    ),
    (
        "hops of a reported route, routers of a hop, and bytes of its names",
        &["src/route_record.rs:HOPS_MAX", "src/route_record.rs:TEXT_MAX"],
        "the record is left out",
    ),
    (
        "paths that wait to be enumerated; longest enumeration; results that are kept",
        &[
            "src/daemon/enumerations.rs:WAITING_MAX",
            "src/daemon/enumerations.rs:DURATION_MAX",
            "src/daemon/enumerations.rs:EVENTS_MAX",
        ],
        "the request is refused; it has failed; the oldest is dropped",
    ),
    (
        "headers that routers have quoted, by router and flow",
        &["src/quoted_headers/mod.rs:HEADERS_MAX"],
        "the one whose router and flow were added first is dropped",
    ),
    ("traces stored for `/api/v1/traces`", &["src/trace_log/mod.rs:TRACES_MAX"], "the oldest is dropped"),
    (
        "each of the two files of events in `state_dir`",
        &["src/daemon/stored_state.rs:EVENTS_BYTES_MAX"],
        "the older one is replaced",
    ),
    (
        "each of the two files of traces in `state_dir`",
        &["src/daemon/stored_state.rs:TRACES_BYTES_MAX"],
        "the older one is replaced",
    ),
    (
        "each of the two files of byte ledgers in `state_dir`",
        &["src/daemon/stored_state.rs:LEDGER_BYTES_MAX"],
        "the older one is replaced; a longer ledger is not stored",
    ),
    (
        "time to store what is new when the agent stops",
        &["src/daemon/stored_state.rs:LAST_WRITE_MAX"],
        "it is lost",
    ),
    (
        "echoes kept for each traced flow: time in slots",
        &["proto/src/trace/echo_history.rs:SLOT", "proto/src/trace/echo_history.rs:SLOTS_MAX"],
        "the oldest slot is dropped",
    ),
    (
        "findings of echoes that wait for a trace",
        &["proto/src/trace/watch.rs:FINDINGS_MAX"],
        "the oldest is dropped",
    ),
    (
        "routers with a limit of their own",
        &["proto/src/probe_budget.rs:ROUTERS"],
        "those that may be asked at once are forgotten; further ones are only limited by the rate of the agent",
    ),
    (
        "routers of a balanced hop, earlier routes of a flow",
        &["proto/src/trace/route.rs:BALANCED_MAX", "proto/src/trace/route.rs:EARLIER_MAX"],
        "not added; the oldest is forgotten, and its return is a new route",
    ),
    (
        "probes between two traces of a flow whose peer does not answer",
        &["proto/src/trace/reachability.rs:CHECKS_IN_FLIGHT"],
        "the oldest counts as one of a trace",
    ),
    (
        "routers remembered for each hop",
        &["proto/src/trace/hop.rs:RESPONDERS_MAX"],
        "the one that has been silent longest is forgotten",
    ),
    (
        "flows, routers of a hop, and probes of an enumeration of equal-cost paths",
        &[
            "proto/src/trace/enumeration/mod.rs:FLOWS_MAX",
            "proto/src/trace/enumeration/mod.rs:ROUTERS_MAX",
            "proto/src/trace/enumeration/mod.rs:PROBES_MAX",
        ],
        "hops that are not known completely are marked; without probes it ends",
    ),
    (
        "silent hops in a row, probes that the host refuses to send, in an enumeration",
        &[
            "proto/src/trace/enumeration/mod.rs:SILENT_HOPS_MAX",
            "proto/src/trace/enumeration/mod.rs:NOT_SENT_MAX",
        ],
        "it ends, and says so",
    ),
    (
        "MPLS labels and interfaces of one answer of a router",
        &["proto/src/trace/extensions.rs:LABELS_MAX", "proto/src/trace/extensions.rs:INTERFACES_MAX"],
        "left out",
    ),
    (
        "events from a loop to the daemon",
        &["src/loops/mod.rs:EVENTS_PENDING_MAX"],
        "dropped: `pathmeter_events_dropped_total`; counters are not affected",
    ),
    (
        "series of paths: default, allowed",
        &["src/config/schema.rs:SERIES", "src/config/schema.rs:SERIES_ALLOWED"],
        "measured, not exported: `pathmeter_paths_not_exported`",
    ),
];

const ANSWERING: &[Row] = &[
    (
        "clients that wait for a bandwidth run, time until one that does not ask again has left",
        &["proto/src/bandwidth/lease/mod.rs:WAITING_MAX", "proto/src/bandwidth/lease/mod.rs:ABSENT_AFTER"],
        "refused with the time after which to try again",
    ),
    (
        "time from a lease to its first connection",
        &["proto/src/bandwidth/lease/mod.rs:ACTIVATION_MAX"],
        "the lease expires",
    ),
    (
        "time without bandwidth runs after an operator has stopped all",
        &["src/bulk/leases/mod.rs:STOP_TIME"],
        "runs may begin again",
    ),
    (
        "data connections of a bandwidth run",
        &["src/bulk/leases/mod.rs:DATA_CONNECTIONS_MAX"],
        "the run is refused",
    ),
    (
        "connections that have not proven their lease yet",
        &["src/bulk/responder.rs:UNPROVEN_MAX", "src/bulk/responder.rs:UNPROVEN_PER_SOURCE"],
        "closed; the second value is for each source address",
    ),
    (
        "paths or clients in the ledger of bandwidth bytes",
        &["proto/src/bandwidth/ledger.rs:LEDGER_PATHS_MAX"],
        "runs of others are refused until midnight in UTC",
    ),
    (
        "silence of the other end of a bandwidth run, time for a message, messages in 10 ms",
        &[
            "src/bulk/endpoint.rs:SILENT_MAX",
            "src/bulk/control.rs:MESSAGE_TIME_MAX",
            "src/bulk/endpoint.rs:MESSAGES_PER_TICK_MAX",
        ],
        "the run ends",
    ),
    (
        "samples of a bandwidth run, echoes that watch it",
        &["src/bulk/endpoint.rs:SAMPLES_MAX", "proto/src/bandwidth/harm.rs:DELAYS_MAX"],
        "the last one is replaced; later ones are judged but not kept",
    ),
    (
        "replies with a limited TTL that routers may still answer, probers that wait for their turn",
        &["proto/src/echo/responder/reverse.rs:PROBES_MAX", "proto/src/echo/responder/reverse.rs:TURNS_MAX"],
        "the oldest is forgotten, and its hop not known; further ones have to ask again",
    ),
    (
        "datagrams answered per second, per source",
        &["src/config/schema.rs:RATE", "src/config/schema.rs:RATE_PER_SOURCE"],
        "not answered: `total_rate`, `source_rate`",
    ),
    (
        "sessions: default, allowed",
        &["src/config/schema.rs:SESSIONS", "src/config/schema.rs:SESSIONS_ALLOWED"],
        "the least recently used one is dropped and starts anew",
    ),
    (
        "connections to the agent port, per source",
        &["src/stream/responder.rs:connections", "src/stream/responder.rs:connections_per_source"],
        "refused as full",
    ),
    (
        "unverified connections to the agent port, per source",
        &["src/stream/responder.rs:unverified", "src/stream/responder.rs:unverified_per_source"],
        "closed without a reply",
    ),
    (
        "time for a greeting, for reading a reply",
        &["src/stream/responder.rs:greeting", "src/stream/responder.rs:stall"],
        "closed",
    ),
    (
        "HTTP connections",
        &["src/http/server/mod.rs:connections"],
        "further ones wait in the kernel. Each `http` path towards the agent keeps one: with some hundreds, scrapes wait too",
    ),
    (
        "HTTP head, body",
        &["src/http/server/mod.rs:HEAD_BYTES_MAX", "src/http/server/mod.rs:body_bytes_max"],
        "refused; 413",
    ),
    (
        "time for a TLS handshake, an HTTP head, a body, a response, a stalled client",
        &[
            "src/http/server/mod.rs:handshake_timeout",
            "src/http/server/mod.rs:head_timeout",
            "src/http/server/mod.rs:body_timeout",
            "src/http/server/mod.rs:handler_timeout",
            "src/http/server/mod.rs:stall_timeout",
        ],
        "closed; closed; 408; 503; closed",
    ),
    ("metrics pages rendered at once", &["src/api/renderer.rs:RENDERED_AT_ONCE"], "further ones wait"),
    (
        "how long a rendered page is shared",
        &["src/api/renderer.rs:SHARED_FOR"],
        "the next scrape renders another",
    ),
    (
        "uncompressed page kept in memory, all pages",
        &["src/api/renderer.rs:PLAIN_BYTES_MAX", "src/api/renderer.rs:HELD_BYTES_MAX"],
        "rendered for each client as it reads",
    ),
    (
        "WebSocket clients, per source",
        &["src/config/websocket.rs:CLIENTS", "src/config/websocket.rs:CLIENTS_PER_SOURCE"],
        "503; 429. Also 503 above ¾ of the limit of open files",
    ),
    (
        "messages per second of a WebSocket client",
        &["src/config/websocket.rs:MESSAGES_PER_SECOND"],
        "read more slowly",
    ),
    ("WebSocket message", &["src/config/websocket.rs:MESSAGE_BYTES"], "closed with 1009"),
    (
        "silent WebSocket client",
        &["src/config/websocket.rs:IDLE"],
        "a ping after half of it; closed with 1001",
    ),
    (
        "WebSocket client that reads nothing, that does not finish closing",
        &["src/websocket/client.rs:STALL_TIMEOUT", "src/websocket/client.rs:CLOSE_TIMEOUT"],
        "disconnected",
    ),
    (
        "passwords verified at once, cached",
        &["src/http/basic.rs:CONCURRENT_HASHES_MAX", "src/http/basic.rs:CACHE_ENTRIES_MAX"],
        "further ones wait; the oldest is verified again",
    ),
    (
        "signed requests remembered, clock difference",
        &["src/http/auth.rs:NONCES_MAX", "src/http/auth.rs:CLOCK_DIFFERENCE_MAX"],
        "refused until older ones expire; refused",
    ),
    (
        "TLS file, how often files are checked",
        &["src/tls/watched_files.rs:FILE_BYTES_MAX", "src/daemon/file_watch.rs:CHECK_INTERVAL"],
        "refused",
    ),
];

#[test]
fn limits_are_those_of_the_source() {
    let mut table = String::new();
    for (title, rows) in
        [("Configuration", CONFIGURATION), ("Measuring", MEASURING), ("Answering", ANSWERING)]
    {
        table += &format!("## {title}\n\n| limit | value | then |\n|---|---|---|\n");
        for (what, constants, then) in rows {
            let values: Vec<String> = constants.iter().map(|constant| value(constant)).collect();
            table += &format!("| {what} | {} | {then} |\n", values.join("; "));
        }
        table.push('\n');
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let page = fs::read_to_string(&path).unwrap();
    let (head, found) = page.split_once(BEGIN).expect("the page says where the table begins");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, format!("{head}{BEGIN}{}\n", table.trim_end())).unwrap();
        return;
    }
    assert_eq!(found.trim_end(), table.trim_end(), "run UPDATE_DOCS=1 cargo test --test it limits");
}

/// The value of a constant or of a field's default, as people write it.
fn value(constant: &str) -> String {
    let (file, name) = constant.split_once(':').unwrap();
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let is_bytes = name.to_ascii_uppercase().contains("BYTES") || name.contains("BUFFER");
    let source = definition(&text, name).unwrap_or_else(|| panic!("{file} defines no {name}"));
    let side = |side: &str| {
        let side = side.trim();
        let resolved = definition(&text, side);
        shown(resolved.as_deref().unwrap_or(side), is_bytes).unwrap_or_else(|| panic!("{constant}: {side}"))
    };
    match source.split_once("..=") {
        Some((from, to)) => format!("{} to {}", side(from), side(to)),
        None => side(&source),
    }
}

fn definition(text: &str, name: &str) -> Option<String> {
    let find = |begin: &str, end: char| {
        let (_, rest) = text.split_once(begin)?;
        let (value, _) = rest.split_once(end)?;
        Some(value.trim().to_owned())
    };
    match name.starts_with(|first: char| first.is_ascii_uppercase()) {
        true => {
            find(&format!("const {name}: "), ';')?.split_once('=').map(|(_, value)| value.trim().to_owned())
        }
        // The default of a field: the fields' types come first in the file and are no values.
        false => text
            .lines()
            .filter_map(|line| line.trim().strip_prefix(&format!("{name}: "))?.strip_suffix(','))
            .find(|value| {
                value.starts_with(|first: char| first.is_ascii_digit()) || value.starts_with("Duration::from")
            })
            .map(str::to_owned),
    }
}

fn shown(source: &str, is_bytes: bool) -> Option<String> {
    let number = |text: &str| text.trim().replace('_', "").parse::<u64>().ok();
    if let Some(span) = source.strip_prefix("Duration::from_") {
        let (unit, count) = span.strip_suffix(')')?.split_once('(')?;
        return Some(match (unit, number(count)?) {
            ("secs", seconds) if seconds % 3600 == 0 => format!("{} h", seconds / 3600),
            ("secs", seconds) => format!("{seconds} s"),
            ("millis", millis) => format!("{millis} ms"),
            _ => return None,
        });
    }
    let count = match (source.split_once("<<"), source.split_once('*')) {
        (Some((value, bits)), _) => number(value)? << number(bits)?,
        (None, Some((a, b))) => number(a)? * number(b)?,
        (None, None) => number(source)?,
    };
    Some(match count {
        count if is_bytes && count % (1 << 20) == 0 => format!("{} MiB", count >> 20),
        count if is_bytes && count % (1 << 10) == 0 => format!("{} KiB", count >> 10),
        count if is_bytes => format!("{} bytes", grouped(count)),
        count => grouped(count),
    })
}

/// A number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let first = (digits.len() + 2) % 3 + 1;
    let (head, rest) = digits.split_at(first.min(digits.len()));
    let rest: Vec<&str> =
        rest.as_bytes().chunks(3).map(|chunk| std::str::from_utf8(chunk).unwrap()).collect();
    [&[head][..], &rest[..]].concat().join(",")
}
