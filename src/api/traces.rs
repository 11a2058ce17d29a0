//! The routes of `/api/v1/traces`.

use serde_json::{Value, json};

use crate::trace_log::{StoredTrace, TraceLog, TraceRecord};

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
    let mut found = log.after(0);
    found.retain(|stored| {
        let is_target = filter.target.as_deref().is_none_or(|target| stored.peer == target);
        is_target && stored.timestamp_seconds >= filter.since
    });
    let found: Vec<&StoredTrace> = found.iter().map(AsRef::as_ref).collect();
    Ok(json!({"traces": found}))
}

/// One trace; `None` if it is not kept.
pub(super) fn one(log: &TraceLog, number: &str) -> Option<Value> {
    Some(json!(*log.find(number.parse().ok()?)?))
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
    let path = |stored: &StoredTrace| {
        let StoredTrace { probe, peer, family, direction, .. } = stored;
        (probe.clone(), peer.clone(), family.clone(), direction.clone())
    };
    if path(&a) != path(&b) {
        return Err("the traces are of different paths or directions\n".to_owned());
    }
    Ok(difference_json(&a, &b))
}

fn difference_json(a: &StoredTrace, b: &StoredTrace) -> Value {
    let routers = |trace: &TraceRecord, ttl: u8| {
        let hop = trace.hops.iter().find(|hop| hop.ttl == ttl && hop.answered > 0)?;
        let mut routers: Vec<String> = hop.responders.iter().map(|found| found.address.to_string()).collect();
        routers.sort_unstable();
        Some(routers)
    };
    // A hop that did not answer in one of them says nothing, unless its route has ended before.
    let has_ended =
        |trace: &TraceRecord, ttl: u8| trace.reached && trace.routers.is_some_and(|last| last < ttl);
    let length = u8::try_from(a.trace.hops.len().max(b.trace.hops.len())).unwrap_or(u8::MAX);
    let hops = (1..=length).filter_map(|ttl| {
        let (of_a, of_b) = (routers(&a.trace, ttl), routers(&b.trace, ttl));
        let is_known =
            (of_a.is_some() || has_ended(&a.trace, ttl)) && (of_b.is_some() || has_ended(&b.trace, ttl));
        (of_a != of_b && is_known).then(|| json!({"ttl": ttl, "a": of_a, "b": of_b}))
    });
    let hops: Vec<Value> = hops.collect();
    let side = |stored: &StoredTrace| {
        let TraceRecord { routers, rtt_seconds, .. } = &stored.trace;
        json!({"number": stored.number, "routers": routers, "rtt_seconds": rtt_seconds})
    };
    let is_whole = a.trace.reached && b.trace.reached;
    let is_same = hops.is_empty() && a.trace.routers == b.trace.routers;
    let is_same_route = (is_whole || !hops.is_empty()).then_some(is_same);
    json!({"a": side(a), "b": side(b), "is_same_route": is_same_route, "hops": hops})
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

/// The target in the query of a request for traces; `None` if there is no target, or anything else.
pub(super) fn requested_target(query: Option<&str>) -> Option<&str> {
    let mut pairs = pairs(query);
    let (key, target) = pairs.next()?;
    (key == "target" && !target.is_empty() && pairs.next().is_none()).then_some(target)
}

/// The keys and values of a query. A part without `=` has an empty value.
pub(super) fn pairs(query: Option<&str>) -> impl Iterator<Item = (&str, &str)> {
    let parts = query.into_iter().flat_map(|query| query.split('&')).filter(|part| !part.is_empty());
    parts.map(|part| part.split_once('=').unwrap_or((part, "")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace_log::{HopRecord, ResponderRecord, RttRecord};

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

    /// A trace of these routers, of which 0 did not answer; it reached the destination.
    fn trace(routers: &[u8]) -> StoredTrace {
        let responder = |last: u8| ResponderRecord {
            address: [192, 0, 2, last].into(),
            rtt_seconds: RttRecord { min: 0.0, last: 0.0 },
            mpls: Vec::new(),
            interfaces: Vec::new(),
            quoted: None,
        };
        let hops = (1..).zip(routers).map(|(ttl, last)| {
            let responders = match last {
                0 => vec![],
                last => vec![responder(*last)],
            };
            HopRecord { ttl, state: "answered".into(), sent: 1, answered: responders.len(), responders }
        });
        let trace = TraceRecord {
            reached: true,
            routers: u8::try_from(routers.len()).ok(),
            duration_seconds: 0.0,
            rtt_seconds: Some(0.0),
            first_lossy_hop: None,
            ttl_clamped: false,
            rejected: None,
            hops: hops.collect(),
        };
        StoredTrace {
            number: 1,
            timestamp_seconds: 0.0,
            probe: "routes".to_owned(),
            peer: "ams-1".to_owned(),
            family: "ipv4".into(),
            direction: "forward".into(),
            flow: 0,
            trigger: "start".into(),
            route: None,
            trace,
        }
    }

    #[test]
    fn routes_differ_in_known_routers_and_in_their_length() {
        let difference = |a: &StoredTrace, b: &StoredTrace| {
            let found = difference_json(a, b);
            let ttls = found["hops"].as_array().unwrap().iter().map(|hop| hop["ttl"].as_u64().unwrap());
            (found["is_same_route"].as_bool(), ttls.collect::<Vec<u64>>())
        };
        let of = |a: &[u8], b: &[u8]| difference(&trace(a), &trace(b));
        assert_eq!(of(&[1, 2, 3], &[1, 2, 3]), (Some(true), vec![]));
        assert_eq!(of(&[1, 2, 3], &[1, 9, 3]), (Some(false), vec![2]));
        assert_eq!(of(&[1, 2, 3], &[1, 0, 3]), (Some(true), vec![]), "it did not answer");
        assert_eq!(of(&[1, 0, 3, 4], &[1, 2, 3]), (Some(false), vec![4]), "the other has ended");
        assert_eq!(of(&[1, 2, 0], &[1, 2]), (Some(false), vec![]), "another length");
        let mut unreached = trace(&[1, 2]);
        (unreached.trace.reached, unreached.trace.routers) = (false, None);
        assert_eq!(difference(&trace(&[1, 2, 3]), &unreached), (None, vec![]), "not known");
        assert_eq!(difference(&trace(&[1, 9, 3]), &unreached), (Some(false), vec![2]));
    }

    #[test]
    fn request_names_one_target() {
        let target = |query| requested_target(Some(query));
        assert_eq!(target("target=ams-1"), Some("ams-1"));
        let others = ["target=", "target", "target=b&x=1", "x=1&target=b", ""].map(target);
        assert_eq!(others, [None; 5]);
    }
}
