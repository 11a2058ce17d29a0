use pathmeter_proto::bandwidth::RunDirection;

use super::super::tests::{request, rules};
use super::*;

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

fn refusal(answer: LeaseAnswer) -> (RefusalReason, String) {
    match answer {
        LeaseAnswer::Refused { reason, detail, .. } => (reason, detail),
        answer @ (LeaseAnswer::Granted(_) | LeaseAnswer::Waiting { .. }) => panic!("{answer:?}"),
    }
}

fn place(answer: &LeaseAnswer) -> String {
    match answer {
        LeaseAnswer::Waiting { lease, .. } => lease.clone(),
        LeaseAnswer::Granted(_) | LeaseAnswer::Refused { .. } => panic!("{answer:?}"),
    }
}

fn forward(bytes: u64) -> LeaseRequest {
    request(RunDirection::Forward, 2, bytes)
}

#[test]
fn request_is_json_with_the_documented_names() {
    let request = LeaseRequest { rate_bytes_per_second: Some(5), ..forward(1_000) };
    let text = r#"{"method":"tcp","direction":"forward","connections":2,"bytes_max":1000,"seconds_max":20,"rate_bytes_per_second":5,"dscp":1}"#;
    assert_eq!(serde_json::to_string(&request).unwrap(), text);
    assert_eq!(serde_json::from_str::<LeaseRequest>(text).unwrap(), request);
    let unknown = text.replace("forward", "sideways");
    assert!(serde_json::from_str::<LeaseRequest>(&unknown).is_err());
    let answer = LeaseAnswer::Refused {
        reason: RefusalReason::QueueFull,
        detail: "x".to_owned(),
        retry_after_seconds: None,
    };
    let text = r#"{"state":"refused","reason":"queue_full","detail":"x"}"#;
    assert_eq!(serde_json::to_string(&answer).unwrap(), text);
    let newer = text.replace("queue_full", "something_new");
    assert_eq!(refusal(serde_json::from_str(&newer).unwrap()).0, RefusalReason::Other);
}

#[test]
fn run_that_is_larger_than_allowed_is_refused_with_the_limit() {
    let leases = Leases::new(rules("run_bytes_max: 1MB, run_time_max: 10s"), 9863);
    let refused = |request: LeaseRequest| refusal(leases.request(CLIENT, request));
    let allowed = LeaseRequest { seconds_max: 10, ..forward(1_000_000) };
    for (request, detail) in [
        (LeaseRequest { connections: 0, ..allowed.clone() }, "connections: 0; this agent allows 1 to 16"),
        (LeaseRequest { connections: 17, ..allowed.clone() }, "connections: 17; this agent allows 1 to 16"),
        (LeaseRequest { seconds_max: 11, ..allowed.clone() }, "seconds: 11; this agent allows 1 to 10"),
        (LeaseRequest { seconds_max: 0, ..allowed.clone() }, "seconds: 0; this agent allows 1 to 10"),
        (
            LeaseRequest { bytes_max: Some(1_000_001), ..allowed.clone() },
            "bytes: 1000001; this agent allows 1 to 1000000",
        ),
        (LeaseRequest { bytes_max: Some(0), ..allowed.clone() }, "bytes: 0; this agent allows 1 to 1000000"),
    ] {
        assert_eq!(refused(request), (RefusalReason::Invalid, detail.to_owned()));
    }
    assert!(matches!(leases.request(CLIENT, allowed), LeaseAnswer::Granted(_)));
}

#[test]
fn runs_that_are_switched_off_end_and_are_refused() {
    let leases = Leases::new(rules(""), 9863);
    leases.request(CLIENT, forward(1_000));
    leases.request(CLIENT, forward(1_000));
    assert_eq!(leases.counts(), (1, 1));
    leases.set_rules(rules("enabled: false"));
    assert_eq!(leases.counts(), (0, 0));
    assert_eq!(refusal(leases.request(CLIENT, forward(1_000))).0, RefusalReason::Disabled);
    leases.set_rules(rules(""));
    leases.request(CLIENT, forward(1_000));
    leases.shut_down();
    assert_eq!(leases.counts(), (0, 0));
    assert_eq!(refusal(leases.request(CLIENT, forward(1_000))).0, RefusalReason::Stopping);
}

#[test]
fn stopped_runs_do_not_begin_again_at_once() {
    let leases = Leases::new(rules(""), 9863);
    leases.request(CLIENT, forward(1_000));
    assert!(matches!(leases.request(OTHER, forward(1_000)), LeaseAnswer::Waiting { .. }));
    assert_eq!(leases.stop_all(), 1);
    let LeaseAnswer::Refused { reason, retry_after_seconds, .. } = leases.request(OTHER, forward(1_000))
    else {
        panic!("a run begins")
    };
    assert_eq!(reason, RefusalReason::Stopped);
    assert!(retry_after_seconds.is_some_and(|seconds| seconds > 50.0), "{retry_after_seconds:?}");
    let unknown = LeaseRequest { dscp: 64, ..forward(1_000) };
    assert_eq!(refusal(leases.request(OTHER, unknown)).0, RefusalReason::Stopped);
    let fresh = Leases::new(rules(""), 9863);
    let unknown = LeaseRequest { dscp: 64, ..forward(1_000) };
    assert_eq!(refusal(fresh.request(OTHER, unknown)).1, "dscp: 64; 0 to 63 are allowed");
}

#[test]
fn run_that_is_stopped_still_counts_what_it_has_sent() {
    let leases = Leases::new(rules("bytes_per_day: 10MB, path_bytes_per_day: 10MB"), 9863);
    let LeaseAnswer::Granted(grant) = leases.request(CLIENT, forward(5_000_000)) else { panic!() };
    let (id, _) = grant.decode().unwrap();
    leases.attach(id, 0).unwrap();
    leases.set_rules(rules("enabled: false"));
    leases.set_rules(rules("bytes_per_day: 10MB, path_bytes_per_day: 10MB"));
    leases.request(OTHER, forward(1));
    leases.count_bytes(id, 4_000_000);
    leases.end(id);
    assert_eq!(leases.bytes_left(&CLIENT.to_string()), Some(5_999_999));
}

#[test]
fn place_in_the_queue_belongs_to_the_client_that_has_it() {
    let leases = Leases::new(rules(""), 9863);
    leases.request(OTHER, forward(1_000));
    let first = place(&leases.request(CLIENT, forward(1_000)));
    let repeated = LeaseRequest { lease: Some(first.clone()), ..forward(1_000) };
    assert_eq!(place(&leases.request(CLIENT, repeated.clone())), first);
    assert_ne!(place(&leases.request(OTHER, repeated.clone())), first);
    let changed = LeaseRequest { bytes_max: Some(2_000), ..repeated };
    assert_ne!(place(&leases.request(CLIENT, changed)), first);
    assert_eq!(leases.counts(), (1, 3));
}

#[test]
fn bytes_of_the_day_are_limited_and_unused_ones_are_given_back() {
    let leases = Leases::new(rules("bytes_per_day: 10MB, path_bytes_per_day: 6MB, runs_max: 5"), 9863);
    let granted = |client, bytes: Option<u64>| {
        let request = LeaseRequest { bytes_max: bytes, ..forward(1) };
        match leases.request(client, request) {
            LeaseAnswer::Granted(grant) => grant,
            answer @ (LeaseAnswer::Waiting { .. } | LeaseAnswer::Refused { .. }) => panic!("{answer:?}"),
        }
    };
    let first = granted(CLIENT, Some(4_000_000));
    let (reason, detail) = refusal(leases.request(CLIENT, forward(3_000_000)));
    assert_eq!(reason, RefusalReason::Budget);
    let expected = "the run may use 3000000 bytes, but the budget of this path has 2000000 bytes left today";
    assert_eq!(detail, expected);
    assert_eq!(granted(CLIENT, None).bytes_max, 2_000_000, "what is left");
    assert_eq!(granted(OTHER, None).bytes_max, 4_000_000, "what is left for the host");
    assert_eq!(refusal(leases.request(OTHER, forward(1))).0, RefusalReason::Budget);
    let (id, _) = first.decode().unwrap();
    assert!(leases.count_bytes(id, 1_000_000));
    leases.end(id);
    assert_eq!(granted(OTHER, None).bytes_max, 2_000_000, "the path has 2 MB left, the host 3 MB");
}

#[test]
fn grant_has_a_secret_of_its_own() {
    let leases = Leases::new(rules("runs_max: 2, rate_max: 80Mbit/s"), 9863);
    let answers = [CLIENT, OTHER].map(|client| leases.request(client, forward(1_000)));
    let [LeaseAnswer::Granted(first), LeaseAnswer::Granted(second)] = answers else { panic!("{answers:?}") };
    assert_eq!((first.agent_port, first.rate_bytes_per_second), (9863, Some(10_000_000)));
    let ((id, secret), (other_id, other_secret)) = (first.decode().unwrap(), second.decode().unwrap());
    assert!(id != other_id && secret != other_secret);
    assert_eq!(leases.leased(id).unwrap().secret, secret);
    for lease in ["", "+1", "xyz", &"1".repeat(17)] {
        assert_eq!(Grant { lease: lease.to_owned(), ..first.clone() }.decode(), None, "{lease}");
    }
    let short = Grant { secret: first.secret[1..].to_owned(), ..first };
    assert_eq!(short.decode(), None);
}

#[test]
fn no_run_begins_in_quiet_hours() {
    let leases = Leases::new(rules(""), 9863);
    let LeaseAnswer::Granted(granted) = leases.request(CLIENT, forward(1_000)) else { panic!() };
    let LeaseAnswer::Waiting { lease, .. } = leases.request(OTHER, forward(1_000)) else { panic!() };
    leases.set_rules(rules("quiet_hours: [\"00:00-24:00\"]"));
    let again = LeaseRequest { lease: Some(granted.lease.clone()), ..forward(1_000) };
    assert_eq!(leases.request(CLIENT, again), LeaseAnswer::Granted(granted.clone()), "it was granted before");
    leases.end(granted.decode().unwrap().0);
    let waiting = LeaseRequest { lease: Some(lease), ..forward(1_000) };
    let forged = LeaseRequest { lease: Some("0123456789abcdef".to_owned()), ..forward(1_000) };
    for request in [forward(1_000), waiting, forged] {
        let answer = leases.request(OTHER, request);
        let LeaseAnswer::Refused { reason: RefusalReason::QuietHours, retry_after_seconds, .. } = answer
        else {
            panic!("{answer:?}")
        };
        assert!(retry_after_seconds.is_some_and(|seconds| (1.0..=86_400.0).contains(&seconds)));
    }
}

#[test]
fn run_over_udp_has_one_connection_and_a_check_has_a_rate() {
    let leases = Leases::new(rules("rate_max: 8Mbit/s"), 9863);
    let train = LeaseRequest { method: Method::Train, connections: 2, ..forward(300_000) };
    let small = LeaseRequest { connections: 1, ..train.clone() };
    let slow = LeaseRequest { rate_bytes_per_second: Some(239_999), ..small.clone() };
    let small = LeaseRequest { bytes_max: Some(99_999), ..small };
    let check = LeaseRequest { method: Method::Check, connections: 1, ..forward(1_000) };
    let fast = LeaseRequest { rate_bytes_per_second: Some(1_000_001), ..check.clone() };
    for (request, detail) in [
        (train, "connections: 2; runs over UDP have 1"),
        (small, "bytes: 99999; this agent allows 100000 to 2000000000"),
        (slow, "rate_bytes_per_second: 239999; this agent allows 240000 to 18446744073709551615"),
        (check, "rate_bytes_per_second: missing; a check needs a rate"),
        (fast, "rate_bytes_per_second: 1000001; this agent allows 12500 to 1000000"),
    ] {
        assert_eq!(refusal(leases.request(CLIENT, request)), (RefusalReason::Invalid, detail.to_owned()));
    }
}
