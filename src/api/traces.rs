//! The routes of `/api/v1/traces`.

use pathmeter_proto::trace::Trace;
use serde_json::{Value, json};

use crate::trace::{direction_name, trace_json, trigger_name};
use crate::trace_log::{StoredTrace, TraceLog};

/// Which traces are listed.
#[derive(Debug, Default, PartialEq)]
struct Filter {
    target: Option<String>,
    /// Seconds since 1970.
    since: f64,
}

/// The latest traces that a query selects, oldest first.
///
/// # Errors
/// What is wrong with the query.
pub(super) fn list(log: &TraceLog, query: Option<&str>) -> Result<Value, String> {
    let filter = Filter::read(query)?;
    let all = log.all();
    let found = all.iter().filter(|stored| {
        let is_target = filter.target.as_deref().is_none_or(|target| *stored.path.peer == *target);
        is_target && stored.timestamp_seconds >= filter.since
    });
    Ok(json!({"traces": found.map(|stored| stored_json(stored)).collect::<Vec<Value>>()}))
}

/// One trace; `None` if it is not kept.
pub(super) fn one(log: &TraceLog, number: &str) -> Option<Value> {
    Some(stored_json(&*log.find(number.parse().ok()?)?))
}

/// The difference of two traces.
///
/// # Errors
/// What is wrong with the query.
pub(super) fn difference(log: &TraceLog, query: Option<&str>) -> Result<Value, String> {
    let allowed = "allowed: a=N&b=N, where N are the numbers of traces\n";
    let value = |name: &str| {
        let pair = pairs(query)
            .find(|(key, _)| *key == name)
            .ok_or_else(|| format!("{name} is missing; {allowed}"))?;
        let number = pair.1.parse().map_err(|_| format!("{name}={} is not a number; {allowed}", pair.1))?;
        log.find(number).ok_or_else(|| format!("trace {number} is not kept; see /api/v1/traces\n"))
    };
    let (a, b) = (value("a")?, value("b")?);
    let routers = |trace: &Trace, ttl: u8| {
        let hop = trace.hops.iter().find(|hop| hop.ttl == ttl)?;
        let mut routers: Vec<String> = hop.answers.iter().map(|(router, _)| router.to_string()).collect();
        routers.sort_unstable();
        routers.dedup();
        (!routers.is_empty()).then_some(routers)
    };
    let length = a.trace.hops.len().max(b.trace.hops.len());
    let hops = (1..=u8::try_from(length).unwrap_or(u8::MAX)).filter_map(|ttl| {
        let (of_a, of_b) = (routers(&a.trace, ttl), routers(&b.trace, ttl));
        // A hop that did not answer in one of them says nothing, unless the other route has ended there.
        let is_known = of_a.is_some() && of_b.is_some() || a.trace.hops.len() != b.trace.hops.len();
        (of_a != of_b && is_known).then(|| json!({"ttl": ttl, "a": of_a, "b": of_b}))
    });
    let hops: Vec<Value> = hops.collect();
    let side = |stored: &StoredTrace| {
        let rtt = stored.trace.rtt.map(|rtt| rtt.as_secs_f64());
        json!({"number": stored.number, "routers": stored.trace.routers, "rtt_seconds": rtt})
    };
    Ok(json!({"a": side(&a), "b": side(&b), "is_same_route": hops.is_empty(), "hops": hops}))
}

impl Filter {
    fn read(query: Option<&str>) -> Result<Self, String> {
        let mut filter = Self::default();
        for (key, value) in pairs(query) {
            match (key, value.parse::<f64>()) {
                ("target", _) if !value.is_empty() => filter.target = Some(value.to_owned()),
                ("since", Ok(seconds)) if seconds.is_finite() => filter.since = seconds,
                (_, _) => {
                    return Err(format!(
                        "query {key}={value} is invalid; allowed: target=NAME of a peer or target, since=SECONDS \
                         since 1970\n"
                    ));
                }
            }
        }
        Ok(filter)
    }
}

/// The keys and values of a query. A part without `=` has an empty value.
fn pairs(query: Option<&str>) -> impl Iterator<Item = (&str, &str)> {
    let parts = query.into_iter().flat_map(|query| query.split('&')).filter(|part| !part.is_empty());
    parts.map(|part| part.split_once('=').unwrap_or((part, "")))
}

fn stored_json(stored: &StoredTrace) -> Value {
    let mut value = trace_json(&stored.trace);
    let more = json!({
        "number": stored.number,
        "timestamp_seconds": stored.timestamp_seconds,
        "probe": &*stored.path.probe,
        "peer": &*stored.path.peer,
        "family": stored.path.family,
        "direction": direction_name(stored.direction),
        "flow": stored.trace.flow,
        "trigger": trigger_name(stored.trace.trigger),
        "route": stored.trace.route.map(|route| route.to_string()),
    });
    if let (Value::Object(fields), Value::Object(more)) = (&mut value, more) {
        fields.extend(more);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_selects_by_target_and_time() {
        let read = |query| Filter::read(Some(query));
        let both = Filter { target: Some("ams-1".to_owned()), since: 5.5 };
        assert_eq!(read("target=ams-1&since=5.5"), Ok(both));
        assert_eq!(Filter::read(None), Ok(Filter::default()));
        for invalid in ["since=x", "since=inf", "since", "until=5", "target=", "target"] {
            assert!(read(invalid).is_err(), "{invalid}");
        }
    }
}
