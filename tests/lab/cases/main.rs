//! The real program on test networks: the exported metrics must equal the true counts of the wires.
//!
//! Each file in `scenarios/` is a trial. Trials that need more than impaired links are procedures in code
//! here. The lab needs root or unprivileged user namespaces; without either, its trials are skipped.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod agent;
mod bandwidth;
mod client_traces;
mod discovery;
mod equal_cost;
mod host_faults;
mod icmp;
mod lab_guarantees;
mod mesh;
mod path_mtu;
mod quoted_headers;
mod seen_ports;
mod streams;
mod testbed;
mod trace;
mod trace_answers;
mod trace_changes;
mod trace_connections;
mod trace_limits;
mod trace_networks;
mod trace_protocols;
mod trace_rejections;
mod trace_tcp;
mod watched;
mod websocket;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use pathmeter_lab::scenario::{Procedure, Scenario};

use crate::testbed::Inconclusive;

/// If set, a lab that cannot run on this machine is a failure.
const REQUIRED: &str = "PATHMETER_LAB_REQUIRED";
/// If set, the long trials run too.
const LONG: &str = "PATHMETER_LAB_LONG";
/// Attempts before a trial that proves nothing fails.
const ATTEMPTS: usize = 3;
/// Exit code if the lab cannot run here: automake's code for a skipped test.
const SKIPPED: u8 = 77;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // A process with a second thread cannot enter a user namespace.
    let entered = pathmeter_lab::enter();
    if let Err(reason) = &entered {
        eprintln!("skipped: the lab cannot run here: {reason}");
        if is_set(REQUIRED) {
            return SKIPPED.into();
        }
    }
    if let Some(dir) = std::env::var_os(lab_guarantees::CRASH_CHILD) {
        lab_guarantees::run_crash_child(Path::new(&dir));
    }
    let trials =
        [scenario_trials(), lab_trials(), dns_trials(), icmp_trials(), stream_trials(), fleet_trials()]
            .into_iter()
            .flatten()
            .map(|trial| {
                let is_ignored = trial.has_ignored_flag() || entered.is_err();
                trial.with_ignored_flag(is_ignored)
            });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some()
}

fn scenario_trials() -> Vec<Trial> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/scenarios");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| scenario_trial(file)).collect()
}

fn scenario_trial(file: &Path) -> Trial {
    let text = fs::read_to_string(file).unwrap();
    let scenario = Scenario::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let name = file.file_stem().unwrap().to_string_lossy().into_owned();
    let is_too_long = scenario.long && !is_set(LONG);
    // Without the feature, PATHMETER_CLOCK_FAULTS has no effect.
    let needs_clock_faults = matches!(scenario.procedure, Procedure::WrongClocks | Procedure::Suspend)
        && !cfg!(feature = "clock-faults");
    let procedure = procedure(scenario.procedure);
    repeatable(&name, move || procedure(&scenario)).with_ignored_flag(is_too_long || needs_clock_faults)
}

/// A trial that is repeated while its result is inconclusive.
fn repeatable(name: &str, attempt: impl Fn() -> Result<(), Inconclusive> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        for _ in 1..ATTEMPTS {
            match attempt() {
                Ok(()) => return Ok(()),
                Err(Inconclusive(why)) => eprintln!("inconclusive, repeating: {why}"),
            }
        }
        attempt().map_err(|Inconclusive(why)| {
            format!("{ATTEMPTS} attempts were inconclusive; the last: {why}").into()
        })
    })
}

fn procedure(procedure: Procedure) -> fn(&Scenario) -> Result<(), Inconclusive> {
    match procedure {
        Procedure::Phases => testbed::run,
        Procedure::Busy => host_faults::busy,
        Procedure::StopProber => host_faults::stopped_prober,
        Procedure::StopResponder => host_faults::stopped_responder,
        Procedure::OverflowProber => host_faults::overflowed_prober,
        Procedure::OverflowResponder => host_faults::overflowed_responder,
        Procedure::WrongClocks => host_faults::wrong_clocks,
        Procedure::Suspend => host_faults::suspended,
        Procedure::Planted => host_faults::planted,
        Procedure::OneBadPath => equal_cost::one_bad_path,
        Procedure::OneBadUplink => mesh::one_bad_uplink,
        Procedure::MtuBlackHole => path_mtu::black_hole,
        Procedure::MtuRouter => path_mtu::router,
    }
}

fn trial(name: &str, run: fn()) -> Trial {
    Trial::test(name, move || {
        run();
        Ok(())
    })
}

/// Hosts that answer ICMP, measured by the datagram loop in this process.
fn icmp_trials() -> Vec<Trial> {
    vec![
        trial("icmp_timestamps", icmp::timestamps),
        trial("icmp_not_permitted", icmp::not_permitted),
        trial("icmp_thousand_hosts", icmp::thousand_hosts),
        trial("icmp_other_programs", icmp::other_programs),
        trial("icmp_flooded", icmp::flooded),
        trial("icmp_lossy", icmp::lossy),
        trial("icmp_refused", icmp::refused),
    ]
}

/// Echo over connections.
fn stream_trials() -> Vec<Trial> {
    vec![
        repeatable("tcp_lossy", streams::tcp_lossy),
        repeatable("tcp_blackout", streams::tcp_blackout),
        repeatable("tcp_timeout", streams::tcp_timeout),
        repeatable("tcp_bottleneck", streams::tcp_bottleneck),
        repeatable("websocket_lossy", streams::websocket_lossy),
        repeatable("http_lossy", streams::http_lossy),
    ]
}

/// A fleet with Prometheus, the shipped rules and the shipped dashboards.
fn fleet_trials() -> Vec<Trial> {
    let is_short = !is_set(LONG);
    vec![
        trial("time_scale", watched::time_scale::scaled_durations),
        repeatable("watched", watched::accelerated),
        repeatable("watched_for_an_hour", watched::real_time).with_ignored_flag(is_short),
    ]
}

/// Names in the DNS.
fn dns_trials() -> Vec<Trial> {
    vec![
        trial("names_in_the_dns", discovery::dns),
        trial("services_in_the_dns", discovery::services),
        trial("one_address_family_in_the_dns", discovery::one_family),
        trial("trace_names_of_routers", discovery::names_of_routers),
    ]
}

/// Guarantees of the lab itself, and what needs a second host but no impaired link.
fn lab_trials() -> Vec<Trial> {
    let is_short = !is_set(LONG);
    vec![
        trial("two_labs_at_once", lab_guarantees::two_labs_at_once),
        trial("unprivileged", lab_guarantees::unprivileged),
        trial("nothing_outlives_a_crash", lab_guarantees::nothing_outlives_a_crash),
        repeatable("bandwidth_capacity", bandwidth::capacity),
        repeatable("bandwidth_capacities", bandwidth::capacities).with_ignored_flag(is_short),
        trial("bandwidth_harm", bandwidth::harm),
        repeatable("bandwidth_trains", bandwidth::trains),
        repeatable("bandwidth_checks", bandwidth::checks),
        trial("bandwidth_killed", bandwidth::killed),
        trial("trace_chain", trace::chain),
        trial("trace_change", trace::change),
        repeatable("trace_late_answers", trace_answers::late),
        trial("trace_forged_answers", trace_answers::forged),
        trial("trace_balanced", trace_changes::balanced),
        trial("trace_flapping", trace_changes::flapping),
        trial("trace_length", trace_changes::length),
        trial("trace_clamped", trace::clamped),
        repeatable("trace_limited", trace_limits::limited),
        repeatable("trace_limited_for_ten_minutes", trace_limits::limited_for_ten_minutes)
            .with_ignored_flag(is_short),
        trial("trace_labels", trace::labels),
        trial("trace_protocols", trace_protocols::chain),
        trial("trace_clients", trace_protocols::clients),
        trial("trace_tcp_proxy", trace_tcp::proxy),
        trial("trace_connections", trace_connections::chain),
        trial("trace_connections_balanced", trace_connections::balanced),
        trial("trace_connections_balanced_uplinks", trace_connections::balanced_uplinks),
        trial("trace_connections_stalled", trace_connections::stalled),
        trial("trace_connections_outage", trace_connections::outage),
        trial("trace_connections_disturbed", trace_connections::disturbed),
        trial("trace_connections_closed_each_time", trace_connections::closed_each_time),
        trial("trace_connections_not_permitted", trace_connections::not_permitted),
        trial("trace_client_hops", client_traces::hops_as_they_are_found),
        repeatable("trace_own_flow", client_traces::own_flow),
        trial("trace_own_flow_balanced", client_traces::own_flow_balanced),
        trial("trace_own_flow_clamped", client_traces::own_flow_clamped),
        trial("trace_own_flow_unhealthy", client_traces::own_flow_unhealthy),
        trial("trace_own_flow_deaf", client_traces::own_flow_deaf),
        trial("trace_own_flow_refused", client_traces::own_flow_refused),
        trial("trace_own_flow_flooded", client_traces::own_flow_flooded),
        trial("trace_own_flow_not_permitted", client_traces::own_flow_not_permitted),
        trial("trace_protocols_change", trace_protocols::change),
        trial("trace_protocols_labels", trace_protocols::labels),
        trial("trace_unreachable_and_reloaded", trace::unreachable_and_reloaded),
        trial("trace_protocols_unreachable", trace_protocols::unreachable),
        repeatable("trace_lossy_flow", trace::lossy_flow),
        trial("trace_asymmetric", trace_networks::asymmetric),
        trial("trace_unprivileged", trace_networks::unprivileged),
        trial("trace_address_translation", trace_networks::address_translation),
        trial("trace_routing_loop", trace_networks::routing_loop),
        trial("trace_refusing_router", trace_rejections::refusing_router),
        trial("trace_refusing_router_ipv6", trace_rejections::refusing_router_ipv6),
        trial("trace_refusing_router_of_a_peer", trace_rejections::refusing_router_of_a_peer),
        trial("trace_absent_host", trace_rejections::absent_host),
        trial("trace_hops_appear_one_by_one", trace_networks::hops_appear_one_by_one),
        trial("trace_failures_of_this_host", trace_rejections::failures_of_this_host),
        trial("trace_mtu_step", trace_networks::mtu_step),
        trial("trace_local_route", trace_networks::local_route),
        repeatable("trace_equal_cost_paths", trace_networks::equal_cost_paths),
        trial("trace_quoted_headers", quoted_headers::shown),
        trial("trace_quoted_headers_protocols", quoted_headers::protocols),
        trial("trace_quoted_headers_masquerade", quoted_headers::masquerade),
        trial("trace_quoted_headers_not_permitted", quoted_headers::not_permitted),
        trial("trace_quoted_headers_reloaded", quoted_headers::reloaded),
        trial("trace_raised_limits", trace_networks::raised_limits),
        repeatable("trace_unreachable", trace::unreachable),
        trial("websocket_admission", websocket::admission),
    ]
}
