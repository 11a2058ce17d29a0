//! A flow whose packets get other ports.

use super::*;

/// A route over `routers` of which those from the second on depend on the ports.
fn of_ports(ttl: u8, routers: u8, ports: u8) -> Fate {
    match route(ttl, routers) {
        Fate::Router(ttl) if ttl > 1 => Fate::Router(ttl + 100 * ports),
        fate @ (Fate::Router(_)
        | Fate::Destination
        | Fate::Rejected
        | Fate::RejectedBy(_)
        | Fate::Unanswered) => fate,
    }
}

fn hops<F: FnMut(u8, u64, Timestamp) -> Fate>(world: &World<F>) -> (Option<RouteId>, Vec<HopRouter>) {
    let route = world.tracer.routes(Direction::Forward).next().flatten();
    route.map_or((None, Vec::new()), |route| (Some(route.id), route.hops.clone()))
}

/// The packets have other ports; what is sent with the earlier ones is no longer received.
fn replace<F>(world: &mut World<F>) {
    world.answers.clear();
    world.tracer.observe(Finding::FlowReplaced { flow: 0 }, world.time);
}

#[test]
fn route_of_other_ports_is_found_at_once_and_is_no_change() {
    for routers in [4, 6, 9] {
        // The tracer learns of other ports in the middle of a trace, too.
        for replaced_at in [40_000, 40_003, 40_025, 65_000] {
            let mut world =
                World::new(ProbeProtocol::Tcp, 3, move |ttl, _, time| match time < at(replaced_at) {
                    true => of_ports(ttl, 6, 1),
                    false => of_ports(ttl, routers, 2),
                });
            world.run_until(at(replaced_at));
            let earlier = hops(&world);
            replace(&mut world);
            world.run_until(at(replaced_at) + Duration::from_millis(1));
            assert_eq!(hops(&world), earlier, "it is shown until another one is known");
            world.run_until(at(replaced_at + 500));
            let (_, found) = hops(&world);
            let expected = (1..=routers).map(|ttl| match of_ports(ttl, routers, 2) {
                Fate::Router(last) => HopRouter::Single(IpAddr::from([10, 0, 0, last])),
                fate @ (Fate::Destination | Fate::Rejected | Fate::RejectedBy(_) | Fate::Unanswered) => {
                    panic!("{fate:?}")
                }
            });
            assert!(found.iter().cloned().eq(expected), "{replaced_at}: {found:?}");
            let trace = *world.traces().last().unwrap();
            assert_eq!((trace.trigger, trace.routers), (Trigger::Connection, Some(routers)));
            world.run_until(at(replaced_at + 200_000));
            assert_eq!(world.updates(), Vec::<&RouteUpdate>::new());
            world.check_counts();
        }
    }
}

#[test]
fn ports_that_change_without_pause_cost_one_trace_in_ten_seconds() {
    let mut world = World::new(ProbeProtocol::Tcp, 4, |ttl, _, _| route(ttl, 5));
    world.run_until(at(40_000));
    let before = world.sent;
    for tick in 0..600 {
        replace(&mut world);
        world.run_until(at(40_000 + 100 * tick));
    }
    let sent = world.sent - before;
    assert!((6..=7 * 7).contains(&sent), "{sent} probes in a minute");
    let traces = world.traces().len();
    world.run_until(world.time + TRACE_GAP_MIN + Duration::from_secs(1));
    let found: Vec<_> = world.traces().iter().skip(traces).map(|trace| trace.routers).collect();
    assert_eq!(found.first(), Some(&Some(5)), "the last ports are traced");
    world.check_counts();
}

/// The destination is down, and with other ports, too: the route that was known is reported, and that it does
/// not answer ends when it answers.
#[test]
fn destination_that_is_missed_with_other_ports_is_reported_with_the_route_of_the_earlier_ones() {
    let mut world = World::new(ProbeProtocol::Tcp, 5, |ttl, _, time| match route(ttl, 5) {
        Fate::Destination if (at(40_000)..at(120_000)).contains(&time) => Fate::Unanswered,
        Fate::Router(ttl) if ttl > 3 && (at(40_000)..at(120_000)).contains(&time) => Fate::Unanswered,
        fate @ (Fate::Router(_)
        | Fate::Destination
        | Fate::Rejected
        | Fate::RejectedBy(_)
        | Fate::Unanswered) => fate,
    });
    world.run_until(at(41_000));
    let (id, _) = hops(&world);
    replace(&mut world);
    world.run_until(at(110_000));
    let mut missed = Vec::new();
    for report in &world.reports {
        if let TraceReport::Reachability(change) = report {
            let route = change.route.as_ref().map(|route| route.id);
            missed.push((route, change.lasted, change.last_hop));
        }
    }
    assert_eq!(missed, [(id, None, Some((3, IpAddr::from([10, 0, 0, 3]))))]);
    replace(&mut world);
    world.run_until(at(200_000));
    let absences = world.absences();
    assert!(matches!(absences[..], [None, Some(_)]), "{absences:?}");
    assert_eq!(world.updates(), Vec::<&RouteUpdate>::new());
    world.check_counts();
}
