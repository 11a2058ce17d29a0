//! Programs that measure throughput: their clients and servers, and how their results are read.

use std::io;

use pathmeter_lab::Program;
use serde_json::Value;

use super::{ours, package, parse_number};
use crate::direct_hosts::DirectHosts;

pub(crate) const IPERF: &str = "iperf3";
pub(crate) const NUTTCP: &str = "nuttcp";

/// A program that measures throughput, and how it is run.
#[derive(Clone, Copy)]
pub(crate) struct ThroughputTool {
    pub(crate) program: &'static str,
    /// Its name in tables.
    pub(crate) name: &'static str,
    /// The arguments of its client that load the way to `target` over TCP.
    pub(crate) tcp: fn(&TcpLoad, target: &str) -> Vec<String>,
    /// The same for datagrams of 1,200 bytes, as fast as it sends them; `None`: the program is compared over
    /// TCP only.
    pub(crate) udp: Option<fn(&UdpLoad, target: &str) -> Vec<String>>,
    /// Reads the result that the client has printed.
    pub(crate) read: fn(output: &str) -> io::Result<Transfer>,
}

/// A load over TCP.
#[derive(Debug, Clone)]
pub(crate) struct TcpLoad {
    /// Connections that share the load.
    pub(crate) streams: u16,
    pub(crate) seconds: u16,
    /// The congestion control that the kernel uses by default.
    pub(crate) congestion_control: String,
}

/// A load over UDP.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UdpLoad {
    pub(crate) seconds: u16,
}

/// What a receiver has received.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transfer {
    /// Bytes of payload.
    pub(crate) bytes: f64,
    pub(crate) bits_per_second: f64,
}

/// pathmeter is the first.
pub(crate) const THROUGHPUT_TOOLS: [ThroughputTool; 4] = [
    ThroughputTool {
        program: ours::PROGRAM,
        name: "**pathmeter**",
        tcp: ours_tcp,
        udp: Some(ours_udp),
        read: read_ours,
    },
    ThroughputTool { program: IPERF, name: "iperf3", tcp: iperf_tcp, udp: Some(iperf_udp), read: read_iperf },
    ThroughputTool {
        program: IPERF,
        name: "iperf3 -Z",
        tcp: iperf_tcp_zero_copy,
        udp: None,
        read: read_iperf,
    },
    ThroughputTool {
        program: NUTTCP,
        name: "nuttcp",
        tcp: nuttcp_tcp,
        udp: Some(nuttcp_udp),
        read: read_nuttcp,
    },
];

/// The rivals with their versions.
pub(crate) fn versions() -> impl Iterator<Item = (&'static str, Option<String>)> {
    [IPERF, NUTTCP].into_iter().map(|program| (program, package(program)))
}

/// Where the program is.
pub(crate) fn path(program: &str) -> String {
    if program == ours::PROGRAM { ours::program() } else { program.to_owned() }
}

/// Starts the server of a program, waits until it is ready, and returns it with its command.
pub(crate) fn start_server(hosts: &DirectHosts, program: &str) -> io::Result<(Program, String)> {
    let (arguments, port) = match program {
        ours::PROGRAM => return start_agent(hosts),
        IPERF => (["-s"].as_slice(), 5_201),
        // One process, whose CPU time can be read between the runs.
        NUTTCP => (["-S", "--nofork", "--single-threaded"].as_slice(), 5_000),
        _ => unreachable!("{program} is not one of the tools"),
    };
    let server = hosts.start_server(program, arguments);
    hosts.wait_for_tcp(port);
    Ok((server, format!("{program} {}", arguments.join(" "))))
}

/// An agent whose limits no run reaches: by default a run may transfer 2 GB, and all runs of a day 20 GB.
fn start_agent(hosts: &DirectHosts) -> io::Result<(Program, String)> {
    let file = hosts.file("b.yaml");
    std::fs::write(
        &file,
        "log: {level: warn}\n\
         agent: {name: b}\n\
         responder: {allow: [10.77.0.0/24, 127.0.0.0/8]}\n\
         bandwidth: {run_bytes_max: 1000GB, bytes_per_day: 1000000GB, path_bytes_per_day: 1000000GB}\n",
    )?;
    let agent = hosts.start_server(&ours::program(), &["run", "--config", &file.display().to_string()]);
    ours::wait_until_ready(hosts.server_host());
    Ok((agent, "pathmeter run --config b.yaml".to_owned()))
}

/// The arguments of a run of pathmeter that nothing stops early.
fn ours_tcp(load: &TcpLoad, target: &str) -> Vec<String> {
    let (seconds, streams) = (load.seconds.to_string(), load.streams.to_string());
    let load = ["--direction", "forward", "--seconds", &seconds, "--streams", &streams];
    let common = ["--added-delay-max", "off", "--json"];
    owned(&[&["probe", "bandwidth", target, "--method", "tcp"], &load[..], &common].concat())
}

/// A check at more than 1,000,000 datagrams per second. pathmeter always sends at a rate.
fn ours_udp(load: &UdpLoad, target: &str) -> Vec<String> {
    let seconds = load.seconds.to_string();
    let load = ["--direction", "forward", "--seconds", &seconds, "--rate", "10Gbit/s"];
    let common = ["--added-delay-max", "off", "--json"];
    owned(&[&["probe", "bandwidth", target, "--method", "check"], &load[..], &common].concat())
}

fn iperf_udp(load: &UdpLoad, target: &str) -> Vec<String> {
    let seconds = load.seconds.to_string();
    owned(&["-c", target, "-u", "-b", "0", "-l", "1200", "-t", &seconds, "-J"])
}

fn nuttcp_udp(load: &UdpLoad, target: &str) -> Vec<String> {
    owned(&["-u", "-Ru", "-l1200", &format!("-T{}", load.seconds), "-fparse", target])
}

/// The arguments of a run of pathmeter that transfers almost nothing.
pub(crate) fn ours_without_load(load: &TcpLoad, target: &str) -> Vec<String> {
    let mut arguments = ours_tcp(load, target);
    arguments.extend(owned(&["--bytes", "1kB"]));
    arguments
}

fn iperf_tcp(load: &TcpLoad, target: &str) -> Vec<String> {
    let (seconds, streams) = (load.seconds.to_string(), load.streams.to_string());
    owned(&["-c", target, "-t", &seconds, "-P", &streams, "-C", &load.congestion_control, "-J"])
}

/// With `sendfile` instead of `write`.
fn iperf_tcp_zero_copy(load: &TcpLoad, target: &str) -> Vec<String> {
    let mut arguments = iperf_tcp(load, target);
    arguments.push("-Z".to_owned());
    arguments
}

/// nuttcp cannot choose a congestion control: it uses that of the kernel.
fn nuttcp_tcp(load: &TcpLoad, target: &str) -> Vec<String> {
    let mut arguments = vec![format!("-T{}", load.seconds)];
    if load.streams > 1 {
        arguments.push(format!("-N{}", load.streams));
    }
    arguments.extend(owned(&["-fparse", target]));
    arguments
}

fn owned(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|&argument| argument.to_owned()).collect()
}

/// The mean of the whole run, as of the others; the throughput that pathmeter reports leaves out the slow
/// start.
fn read_ours(output: &str) -> io::Result<Transfer> {
    // Warnings may precede the JSON object.
    let found: Value = serde_json::from_str(output.lines().last().unwrap_or(""))?;
    let result = &found["results"][0];
    let number = |key: &str| result[key].as_f64().ok_or_else(|| no_field(key));
    let bytes = number("bytes")?;
    Ok(Transfer { bytes, bits_per_second: bytes * 8.0 / number("duration_seconds")? })
}

fn read_iperf(output: &str) -> io::Result<Transfer> {
    let found: Value = serde_json::from_str(output)?;
    let sum = &found["end"]["sum_received"];
    let number = |key: &str| sum[key].as_f64().ok_or_else(|| no_field(key));
    Ok(Transfer { bytes: number("bytes")?, bits_per_second: number("bits_per_second")? })
}

/// `megabytes=4177.0000 real_seconds=2.00 rate_Mbps=17532.4152 tx_cpu=30 rx_cpu=27 retrans=0 rtt_ms=0.06`
fn read_nuttcp(output: &str) -> io::Result<Transfer> {
    let number = |key: &str| {
        let value = output.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        parse_number::<f64>(value.ok_or_else(|| no_field(key))?)
    };
    // Its megabytes are MiB, the rate is in units of 10⁶.
    Ok(Transfer {
        bytes: number("megabytes")? * f64::from(1 << 20),
        bits_per_second: number("rate_Mbps")? * 1e6,
    })
}

fn no_field(key: &str) -> io::Error {
    io::Error::other(format!("no {key}"))
}
