//! Reads the section `websocket`.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::diagnostic::quoted;
use super::file::Node;
use super::reader::{MappingReader, ValueReader};
use super::values::{duration, size};
use super::{Origin, Origins, TRACE_METHODS, TraceMethod, TracedClients, WebSocketRules};

/// Concurrent clients. Chosen: idle clients of this number take 200 MiB.
const CLIENTS: usize = 10_000;
const CLIENTS_PER_SOURCE: usize = 1000;
const CLIENTS_ALLOWED: RangeInclusive<i128> = 1..=100_000;

/// Messages per second and client. Chosen: one per millisecond, the shortest interval of a probe.
const MESSAGES_PER_SECOND: u32 = 1000;
const MESSAGES_ALLOWED: RangeInclusive<i128> = 1..=1_000_000;

/// Bytes of a message. Each client can occupy the memory of two messages.
const MESSAGE_BYTES: u64 = 64 << 10;
const MESSAGE_BYTES_ALLOWED: RangeInclusive<u64> = 128..=1 << 20;

/// How long a client may send nothing.
const IDLE: Duration = Duration::from_secs(60);
const IDLE_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

const TRACED: [(&str, TracedClients); 3] =
    [("off", TracedClients::Off), ("asked", TracedClients::Asked), ("all", TracedClients::All)];

/// Largest TTL of a trace to a client: the default of traceroute.
const TRACE_HOPS: u8 = 30;
const TRACE_HOPS_ALLOWED: RangeInclusive<i128> = 1..=64;

/// How long an answer is waited for. Chosen: more than the RTT of a mobile network.
const TRACE_TIMEOUT: Duration = Duration::from_millis(1_200);
const TRACE_TIMEOUT_ALLOWED: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(5);

/// Traces of clients per second. Chosen: about what the first routers answer by default. Other traces come
/// first, so more cost only hops in the traces of clients.
const TRACES_PER_SECOND: u32 = 1;
const TRACES_ALLOWED: RangeInclusive<i128> = 1..=100;

/// Maximum origins in `websocket.origins`.
const ORIGINS_MAX: usize = 100;

pub(super) fn websocket(section: &mut MappingReader<'_, '_>) -> Option<WebSocketRules> {
    let enabled = section.key("enabled", ValueReader::boolean).or(true);
    let origins = section.key("origins", origins).or(Origins::Same);
    let open = section.key("open", ValueReader::boolean).or(false);
    let clients_max = section.key("clients_max", |value| value.number(&CLIENTS_ALLOWED)).or(CLIENTS);
    let clients_per_source =
        section.key("clients_per_source", |value| value.number(&CLIENTS_ALLOWED)).or(CLIENTS_PER_SOURCE);
    let messages_per_second =
        section.key("messages_per_second", |value| value.number(&MESSAGES_ALLOWED)).or(MESSAGES_PER_SECOND);
    let message_bytes_max =
        section.key("message_bytes_max", |value| size(value, &MESSAGE_BYTES_ALLOWED)).or(MESSAGE_BYTES);
    let trace = section.key("trace", |value| value.one_of(&TRACED)).or(TracedClients::Asked);
    let trace_method =
        section.key("trace_method", |value| value.one_of(&TRACE_METHODS)).or(TraceMethod::Unprivileged);
    let trace_hops_max =
        section.key("trace_hops_max", |value| value.number(&TRACE_HOPS_ALLOWED)).or(TRACE_HOPS);
    let trace_timeout =
        section.key("trace_timeout", |value| duration(value, &TRACE_TIMEOUT_ALLOWED)).or(TRACE_TIMEOUT);
    let traces_per_second =
        section.key("traces_per_second", |value| value.number(&TRACES_ALLOWED)).or(TRACES_PER_SECOND);
    let idle_timeout = section.key("idle_timeout", |value| duration(value, &IDLE_ALLOWED)).or(IDLE);

    if open == Some(true) {
        let remedy = "list the allowed networks in responder.allow instead";
        section.warn("open", "messages from any source are echoed, up to the limits", remedy);
    }
    Some(WebSocketRules {
        enabled: enabled?,
        origins: origins?,
        open: open?,
        clients_max: clients_max?,
        clients_per_source: clients_per_source?,
        messages_per_second: messages_per_second?,
        message_bytes_max: usize::try_from(message_bytes_max?).expect("at most 1 MiB"),
        idle_timeout: idle_timeout?,
        trace: trace?,
        trace_method: trace_method?,
        trace_hops_max: trace_hops_max?,
        trace_timeout: trace_timeout?,
        traces_per_second: traces_per_second?,
    })
}

fn origins(value: ValueReader<'_, '_>) -> Option<Origins> {
    match value.node() {
        Node::List(_) => {}
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::Text(_) | Node::Mapping(_) => {
            return match value.text("same, any, or a list of origins")? {
                "same" => Some(Origins::Same),
                "any" => Some(Origins::Any),
                text => value.reject(
                    format!("{} is not supported", quoted(text)),
                    "write same, any, or a list such as [https://page.example.net]",
                ),
            };
        }
    }
    let whole = value.clone();
    let origins = value.list("a list of origins", origin)?;
    if origins.len() > ORIGINS_MAX {
        return whole
            .reject(format!("{} origins", origins.len()), format!("at most {ORIGINS_MAX} are allowed"));
    }
    Some(Origins::These(origins))
}

fn origin(value: ValueReader<'_, '_>) -> Option<Origin> {
    let text = value.text("an origin")?;
    text.parse().map_or_else(
        |error| {
            let remedy =
                "write scheme, host and port, without a path: https://page.example.net, http://10.0.0.1:8080";
            value.reject(format!("{} {error}", quoted(text)), remedy)
        },
        Some,
    )
}
