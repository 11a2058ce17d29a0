use super::*;

const SECOND: Duration = Duration::from_secs(1);
const TERMS: RunTerms = RunTerms { connections: 2, duration_max: Duration::from_secs(10) };

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_nanos(seconds * 1_000_000_000)
}

fn position(response: LeaseResponse) -> usize {
    match response {
        LeaseResponse::Waiting(place) => place.position,
        LeaseResponse::Granted { .. } | LeaseResponse::Full { .. } => panic!("{response:?}"),
    }
}

fn is_granted(response: LeaseResponse) -> bool {
    matches!(response, LeaseResponse::Granted { .. })
}

#[test]
fn run_uses_the_host_from_the_grant_to_its_last_connection() {
    let mut table = LeaseTable::new(1);
    let (first, second) = (LeaseId(1), LeaseId(2));
    assert_eq!(table.request(at(0), first, TERMS), LeaseResponse::Granted { until: at(5) });
    assert_eq!(table.request(at(1), first, TERMS), LeaseResponse::Granted { until: at(5) }, "a repetition");
    assert_eq!(position(table.request(at(1), second, TERMS)), 1);
    assert_eq!(table.attach(at(2), first, 0), Ok(at(12)));
    assert_eq!(table.attach(at(3), first, 1), Ok(at(12)));
    assert_eq!(table.attach(at(3), first, 1), Err(AttachError::Taken));
    assert_eq!(table.attach(at(3), first, 2), Err(AttachError::Taken));
    assert_eq!(table.attach(at(3), second, 0), Err(AttachError::Invalid), "it waits");
    assert!(table.is_valid(at(4), first));
    assert_eq!(position(table.request(at(4), second, TERMS)), 1);
    table.release(first);
    assert!(!table.is_valid(at(4), first));
    assert!(is_granted(table.request(at(4), second, TERMS)));
    assert_eq!((table.running(at(4)), table.waiting(at(4))), (1, 0));
}

#[test]
fn lease_expires_without_a_connection_and_at_its_deadline() {
    let mut table = LeaseTable::new(1);
    let (first, second, third) = (LeaseId(1), LeaseId(2), LeaseId(3));
    table.request(at(0), first, TERMS);
    assert_eq!(table.attach(at(5), first, 0), Err(AttachError::Invalid));
    assert!(is_granted(table.request(at(5), second, TERMS)));
    table.attach(at(6), second, 0).unwrap();
    assert_eq!(position(table.request(at(15), third, TERMS)), 1);
    assert!(!table.is_valid(at(16), second));
    assert_eq!(table.running(at(16)), 0);
    assert!(is_granted(table.request(at(16), third, TERMS)));
    table.release(second);
    assert_eq!(table.running(at(16)), 1, "a late end of an expired run changes nothing");
}

#[test]
fn waiting_client_learns_its_position_and_when_it_can_start() {
    let mut table = LeaseTable::new(2);
    for id in 0..6 {
        table.request(at(0), LeaseId(id), TERMS);
    }
    for id in 0..2 {
        table.attach(at(0), LeaseId(id), 0).unwrap();
    }
    let place = |table: &mut LeaseTable, id| match table.request(at(4), LeaseId(id), TERMS) {
        LeaseResponse::Waiting(place) => place,
        response @ (LeaseResponse::Granted { .. } | LeaseResponse::Full { .. }) => panic!("{response:?}"),
    };
    let starts = [2, 3, 4, 5].map(|id| {
        let place = place(&mut table, id);
        (place.position, place.expected_start.as_secs())
    });
    assert_eq!(starts, [(1, 6), (2, 6), (3, 16), (4, 16)]);
    let soon = place(&mut table, 2).repeat_after;
    let late = place(&mut table, 5).repeat_after;
    assert!(soon <= REPEAT_MIN && late <= REPEAT_MAX && soon < late, "{soon:?} {late:?}");
}

#[test]
fn client_that_no_longer_repeats_its_request_holds_up_others_for_half_a_second_and_loses_its_place() {
    let mut table = LeaseTable::new(1);
    let [running, absent, next] = [1, 2, 3].map(LeaseId);
    table.request(at(0), running, TERMS);
    table.attach(at(0), running, 0).unwrap();
    table.request(at(0), absent, TERMS);
    table.request(at(0), next, TERMS);
    table.release(running);
    // Both are due after 200 ms.
    let in_time = at(0) + Duration::from_millis(200);
    assert_eq!(position(table.request(in_time, next, TERMS)), 2);
    let overdue = at(0) + Duration::from_millis(701);
    assert!(is_granted(table.request(overdue, next, TERMS)));
    assert_eq!(position(table.request(at(1), absent, TERMS)), 1, "it kept its place");
    assert_eq!(table.waiting(at(6)), 1);
    assert_eq!(table.waiting(at(7)), 0);
    assert!(!table.is_known(at(7), absent));
}

#[test]
fn deferred_lease_keeps_its_place_and_lets_others_pass_once() {
    let mut table = LeaseTable::new(1);
    let [own, other] = [1, 2].map(LeaseId);
    table.request(at(0), own, TERMS);
    table.request(at(0), other, TERMS);
    table.defer(at(0), own);
    assert_eq!(table.running(at(0)), 0);
    assert!(is_granted(table.request(at(0), own, TERMS)), "it is before the other one");
    table.defer(at(0), own);
    assert!(is_granted(table.request(at(0), other, TERMS)), "it lets the other one pass");
    assert_eq!(position(table.request(at(0), LeaseId(3), TERMS)), 2);
    assert_eq!(position(table.request(at(0), own, TERMS)), 1);
    table.release(other);
    assert_eq!(position(table.request(at(0), LeaseId(3), TERMS)), 2, "it waits again");
}

#[test]
fn queue_is_limited_and_says_when_to_try_again() {
    let mut table = LeaseTable::new(1);
    let terms = RunTerms { connections: 1, duration_max: SECOND };
    for id in 0..=WAITING_MAX as u64 {
        assert!(!matches!(table.request(at(0), LeaseId(id), terms), LeaseResponse::Full { .. }));
    }
    let LeaseResponse::Full { retry_after } = table.request(at(0), LeaseId(u64::MAX), terms) else {
        panic!()
    };
    assert_eq!(retry_after, ACTIVATION_MAX + SECOND, "the run that has a lease makes room");
    assert!(matches!(table.request(at(0), LeaseId(500), terms), LeaseResponse::Waiting(_)));
    table.release(LeaseId(500));
    assert!(matches!(table.request(at(0), LeaseId(u64::MAX), terms), LeaseResponse::Waiting(_)));
}

#[test]
fn stop_ends_all_leases() {
    let mut table = LeaseTable::new(1);
    table.request(at(0), LeaseId(1), TERMS);
    table.request(at(0), LeaseId(2), TERMS);
    table.release_all();
    assert_eq!((table.running(at(0)), table.waiting(at(0))), (0, 0));
    assert!(!table.is_valid(at(0), LeaseId(1)));
    table.set_runs_max(0);
    assert_eq!(position(table.request(at(0), LeaseId(3), TERMS)), 1);
}
