//! Documentation and constants agree with the program.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use pathmeter::metrics::Series as _;
use pathmeter::metrics::bandwidth::BandwidthSeries;
use pathmeter::metrics::echo::EchoSeries;
use pathmeter::metrics::path_mtu::PathMtuSeries;
use pathmeter::metrics::stream::StreamSeries;
use pathmeter::metrics::trace::TraceSeries;

use crate::fixture::{Agent, Host, MetricsPage, run, skipped};

/// A page with every exported series, with one path that is answered and one that is not.
fn full_page() -> MetricsPage {
    let (a, b) = (Host::claim(), Host::claim());
    let _b = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let more = format!(
        "peers: [{{name: b, address: {b}}}]\n\
         targets: [{{name: silent, address: {b}, port: 9}}]\n\
         probes: [{{name: fast, interval: 20ms, peers: all, targets: all, path_mtu: {{interval: 1s}}, late_after: 100ms, \
         lost_after: 100ms}}, {{name: chat, protocol: tcp, interval: 20ms, connect_interval: 1s}}, \
         {{name: routes, kind: trace, follows: fast, interval: 2s, hop_metrics: true}}, \
         {{name: capacity, kind: bandwidth, interval: 10s, bytes: 1MB, direction: forward}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &more));
    agent.page_when("answers and losses", |page| {
        page.count("pathmeter_echo_verdicts_total", &[r#"peer="b""#]) >= 5
            && page.count("pathmeter_echo_lost_total", &[r#"peer="silent""#]) >= 5
            && page.has("pathmeter_peers", &[])
            && page.has("pathmeter_path_mtu_bytes", &[r#"peer="b""#])
            && page.count("pathmeter_echo_connect_duration_seconds_count", &[]) >= 1
            && page.count("pathmeter_trace_traces_total", &[r#"peer="b""#]) >= 1
            && page.has("pathmeter_bandwidth_throughput_bytes_per_second", &[r#"peer="b""#])
    })
}

fn in_project(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn series_per_path_match_the_limit_constants() {
    let page = full_page();
    let of = |peer: &str| {
        let label = format!("probe=\"fast\",peer=\"{peer}\"");
        page.count_series(|series| series.starts_with("pathmeter_echo_") && series.contains(&label))
    };
    // A path with TLS has one more.
    let of_stream =
        page.count_series(|series| series.contains("probe=\"chat\",peer=")) + 1 - EchoSeries::LINES;
    assert_eq!(of_stream, StreamSeries::LINES, "src/metrics/stream.rs\n{}", page.text());
    let most = of("b").max(of("silent"));
    assert_eq!(
        most,
        EchoSeries::LINES,
        "EchoSeries::LINES in src/metrics/echo.rs is to be {most}\n{}",
        page.text()
    );
    let of_mtu = page
        .count_series(|series| series.starts_with("pathmeter_path_mtu_") && series.contains("peer=\"b\""));
    assert_eq!(of_mtu, PathMtuSeries::LINES, "src/metrics/path_mtu.rs\n{}", page.text());
    // A path whose route has changed has one more, and one with `method: own_flow` another one.
    let of_trace = page.count_series(|series| {
        let is_forward = series.contains("peer=\"b\"") && series.contains("direction=\"forward\"");
        let is_of_hop = series.starts_with("pathmeter_trace_hop_");
        series.starts_with("pathmeter_trace_") && !is_of_hop && is_forward
    });
    assert_eq!(of_trace + 2, TraceSeries::LINES, "src/metrics/trace.rs\n{}", page.text());
    // A run that is too short to have echoes has no latency: three fewer. One over TCP has no dispersion and
    // no verdict: five fewer.
    let is_latency =
        |series: &str| series.contains("_rtt_seconds") || series.contains("_added_delay_seconds");
    let of_bandwidth =
        page.count_series(|series| series.starts_with("pathmeter_bandwidth_") && !is_latency(series));
    assert_eq!(of_bandwidth + 3 + 5, BandwidthSeries::LINES, "src/metrics/bandwidth.rs\n{}", page.text());
}

/// The metric families of a page without a row in docs/reference/metrics.md.
pub(crate) fn undocumented(page: &MetricsPage) -> Vec<&str> {
    let Ok(text) = fs::read_to_string(in_project("docs/reference/metrics.md")) else {
        skipped("docs/reference/metrics.md does not exist");
        return Vec::new();
    };
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let documented: BTreeSet<&str> = rows.map(|(name, _)| name).collect();
    page.families().into_iter().map(|(name, _)| name).filter(|name| !documented.contains(name)).collect()
}

#[test]
fn every_metric_family_is_documented() {
    let page = full_page();
    let missing = undocumented(&page);
    assert!(
        missing.is_empty(),
        "docs/reference/metrics.md has no row that begins with | `name` for {missing:#?}"
    );
}

#[test]
fn example_configuration_is_valid() {
    let example = in_project("config.example.yaml");
    let output = run(&["check", example.to_str().unwrap()]);
    assert_eq!(output.code, Some(0), "{output}");
    assert!(output.stdout.contains(": ok: agent ") && !output.stdout.contains("warning"), "{output}");
}
