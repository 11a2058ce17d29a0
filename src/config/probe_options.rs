//! A probe from the command line, with the rules, ranges and defaults of a probe in a file.

use super::Probe;
use super::file::Node;
use super::hosts::DeclaredHosts;
use super::probes::{ProbeContext, probe};
use super::reader::{Diagnostic, Diagnostics, ValueReader};

/// The value of a command-line option.
#[derive(Debug, Clone)]
pub enum Argument {
    /// A text that is not parsed yet.
    Text(String),
    /// A number.
    Number(u16),
    /// Several numbers.
    Numbers(Vec<u16>),
    /// A switch that was given.
    On,
}

/// Reads a probe from options, which have the names of the keys of a probe in a file.
///
/// # Errors
/// All problems, one line for each.
pub fn probe_from_options(options: Vec<(&'static str, Argument)>) -> Result<Probe, String> {
    let mut entries = vec![("name".to_owned(), Node::Text("once".to_owned()))];
    entries.extend(options.into_iter().map(|(key, value)| (key.to_owned(), node(value))));
    let tree = Node::Mapping(entries);
    let mut diagnostics = Diagnostics::default();
    let declared = DeclaredHosts::default();
    let mut context = ProbeContext::new(Some(""), None, &declared);
    let read = ValueReader::top(&tree, &diagnostics).section(|section| probe(section, &mut context));
    let (problems, _) = diagnostics.problems();
    match read {
        Some(probe) if problems.is_empty() => Ok(probe),
        Some(_) | None => Err(problems.iter().map(line).collect::<Vec<_>>().join("\n")),
    }
}

fn node(value: Argument) -> Node {
    match value {
        Argument::Text(text) => Node::Text(text),
        Argument::Number(number) => Node::Int(number.into()),
        Argument::Numbers(numbers) => Node::List(numbers.into_iter().map(|n| Node::Int(n.into())).collect()),
        Argument::On => Node::Bool(true),
    }
}

/// Formats a problem, such as `--interval: 5ms is out of range; write 10ms to 1h`.
fn line(diagnostic: &Diagnostic<'_>) -> String {
    let path = diagnostic.path.to_string();
    let option = path.split('[').next().unwrap_or_default().replace('_', "-");
    format!("--{option}: {}; {}", diagnostic.what, diagnostic.remedy)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::echo::Echo;
    use super::super::echo::transport::Transport;
    use super::*;

    fn text(key: &'static str, value: &str) -> (&'static str, Argument) {
        (key, Argument::Text(value.to_owned()))
    }

    #[test]
    fn options_have_the_defaults_of_the_file() {
        let probe = probe_from_options(vec![text("protocol", "tcp")]).unwrap();
        let echo = probe.kind.downcast::<Echo>().unwrap();
        assert_eq!((probe.interval, echo.lost_after), (Duration::from_secs(1), Duration::from_secs(15)));
        assert!(matches!(&echo.transport, Transport::Tcp(tcp) if tcp.size == 56));
    }

    #[test]
    fn all_invalid_options_are_reported_at_once_with_the_ranges_of_the_file() {
        let options = vec![
            text("protocol", "tcp"),
            text("interval", "5ms"),
            ("flows", Argument::Number(2)),
            ("dont_fragment", Argument::On),
        ];
        let expected = "\
--interval: 5ms is out of range; write 10ms to 1h
--flows: only valid with protocol: udp, icmp; remove it, or choose another protocol
--dont-fragment: only valid with protocol: udp, icmp; remove it, or choose another protocol";
        assert_eq!(probe_from_options(options), Err(expected.to_owned()));
        let status = vec![text("protocol", "http"), ("expect_status", Argument::Numbers(vec![200, 99]))];
        let expected = "--expect-status: 99 is out of range; write a whole number from 100 to 599";
        assert_eq!(probe_from_options(status), Err(expected.to_owned()));
    }
}
