//! Invalid configurations, and the text of their problems.

use super::*;

#[test]
fn all_problems_are_shown_at_once_in_the_order_of_the_file() {
    let text = "\
agent: {name: fra 1, grace: 5}
listen:
  stamp: '[::]:9862'
  agent: '[::]:9862'
peers:
  - name: ams-1
    adress: 192.0.2.1
  - {name: ams-1, address: 10.0.0.256, http_port: '9862'}
probes:
  - name: fast
    interval: 20
    late_after: 1s
    flows: 17
    lost_after: 500ms
    peers: [ams-2]
  - {name: fast, protocol: icmp, intervall: 1s}
key-file: hunter2
";
    let expected = "\
config.yaml: 15 problems
  line 1, column 15: agent.name: `fra 1` is not a valid name
    a name consists of 1 to 64 letters, digits, `_`, `.` and `-`
  line 1, column 29: agent.grace: `5` has no unit
    write a number and a unit (ns, us, ms, s, m, h, d), for example 20ms, 1.5s or 5m
  line 4, column 10: listen.agent: [::]:9862 is also used by listen.http
    use different ports for listen.agent and listen.http
  line 6, column 5: peers[0].address: missing
    this key is required
  line 7, column 5: peers[0].adress: unknown key
    did you mean address? allowed: name, address, http_port, stamp_port, agent_port, scheme, tls, labels
  line 8, column 12: peers[1].name: ams-1 is already used at peers[0].name
    use unique names: peers and targets are identified by the label `peer`
  line 8, column 28: peers[1].address: `10.0.0.256` is not an IP address or a host name
    for example 192.0.2.1, \"2001:db8::1\" or fra-1.example.net
  line 8, column 51: peers[1].http_port: `9862` is a string
    write a whole number from 1 to 65535
  line 11, column 15: probes[0].interval: `20` has no unit
    write a number and a unit (ns, us, ms, s, m, h, d), for example 20ms, 1.5s or 5m
  line 13, column 12: probes[0].flows: 17 is out of range
    write a whole number from 1 to 16
  line 14, column 17: probes[0].lost_after: 500ms is shorter than late_after (1s)
    use at least 1s, so that a reply can be late before it counts as lost
  line 15, column 13: probes[0].peers[0]: no peer is named `ams-2`
    did you mean ams-1?
  line 16, column 12: probes[1].name: another probe is already named fast
    use a unique name
  line 16, column 34: probes[1].intervall: unknown key
    did you mean interval? allowed: name, kind, protocol, interval, dscp, source, family, late_after, lost_after, flows, size, dont_fragment, peers, targets
  line 17, column 1: key-file: unknown key
    did you mean key_file? allowed: agent, listen, state_dir, key_file, tls, responder, websocket, bandwidth, peers, targets, probes, trace, metrics, log";
    assert_eq!(rejected(text).display("config.yaml").to_string(), expected);
}

#[test]
fn invalid_and_unsupported_yaml_is_rejected_with_its_location() {
    check(&[
        (
            "agent: [1, 2\n",
            &[
                "line 2, column 1: did not find expected ',' or ']', while parsing a flow sequence at line 1 column 8",
            ],
        ),
        (
            "agent: b: c",
            &["line 1, column 9: mapping values are not allowed in this context; \
                 put text that contains `: ` in quotes, and check the indentation"],
        ),
        (
            "agent:\n\tname: a",
            &[
                "line 2, column 1: found character that cannot start any token, while scanning for the next token; \
                 indent with spaces, and put text that begins with @, ` or % in quotes",
            ],
        ),
        (
            "agent: {}\n---\nagent: {}\n",
            &["line 3, column 1: a second YAML document begins here; \
                 a configuration is a single document: remove the line `---` before it"],
        ),
        (
            "agent: !vault x",
            &["line 1, column 8: YAML tags are not supported; \
                 remove the word that begins with `!`, or put it in quotes"],
        ),
        (
            "agent: *nowhere",
            &["line 1, column 8: this alias has no anchor before it; \
                 write the anchor `&name` before the alias `*name`"],
        ),
        (
            "agent: {<<: {name: x}}",
            &["line 1, column 9: agent.<<: merge keys are not supported; \
                 write the keys out; an alias can stand for a whole value (`labels: *name`)"],
        ),
        (
            "? [agent]\n: 1\n",
            &["line 1, column 3: the key is a list or a mapping; \
                 keys are strings: put text that begins with [, { or ? in quotes"],
        ),
        (
            "agent: &a [*a]",
            &[
                "line 1, column 8: the file is nested too deeply; no key of a configuration is nested this deeply",
            ],
        ),
        (
            "agent: [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]",
            &[
                "line 1, column 23: the file is nested too deeply; no key of a configuration is nested this deeply",
            ],
        ),
        (
            "agent: {}\nlog: a\0b",
            &["line 2, column 7: control characters are not allowed; \
                 remove it, or write it as an escape sequence in double quotes"],
        ),
    ]);
}

#[test]
fn value_of_the_wrong_type_is_rejected() {
    check(&[
        ("5", &["`5` is a number; write a mapping of keys to values"]),
        ("- agent", &["a list; write a mapping of keys to values"]),
        ("agent: a", &["line 1, column 8: agent: `a` is a string; write a mapping of keys to values"]),
        ("agent: [a]", &["line 1, column 8: agent: a list; write a mapping of keys to values"]),
        ("agent: {name: 1}", &["line 1, column 15: agent.name: `1` is a number; write a name in quotes"]),
        (
            "agent: {name: 1.10}",
            &["line 1, column 15: agent.name: `1.1` is a number; write a name in quotes"],
        ),
        (
            "agent: {name: true}",
            &["line 1, column 15: agent.name: `true` is a boolean; write a name in quotes"],
        ),
        ("agent: {name: ~}", &["line 1, column 15: agent.name: no value; write a name, or remove the key"]),
        ("agent: {name: {first: a}}", &["line 1, column 15: agent.name: a mapping; write a name"]),
        (
            "agent: {labels: [a]}",
            &["line 1, column 17: agent.labels: a list; write a mapping of label names to strings"],
        ),
        (
            "agent: {grace: true}",
            &["line 1, column 16: agent.grace: `true` is a boolean; write a duration such as 20ms"],
        ),
        (
            "peers: {name: a}",
            &["line 1, column 8: peers: a mapping; write a list of mappings, each after `- `"],
        ),
        ("peers: [a]", &["line 1, column 9: peers[0]: `a` is a string; write a mapping of keys to values"]),
        (
            "responder: {allow: 10.0.0.0/8}",
            &["line 1, column 20: responder.allow: `10.0.0.0/8` is a string; write a list of networks"],
        ),
        (
            "responder: {open: yes}",
            &["line 1, column 19: responder.open: `yes` is a string; write true or false"],
        ),
        (
            "responder: {sessions: 64k}",
            &["line 1, column 23: responder.sessions: `64k` is a string; \
                 write a whole number from 1 to 16777216"],
        ),
        (
            "responder: {sessions: 1.5}",
            &["line 1, column 23: responder.sessions: `1.5` is a number; \
                 write a whole number from 1 to 16777216"],
        ),
    ]);
}

#[test]
fn value_that_is_not_allowed_is_rejected() {
    check(&[
        (
            "agent: {name: ''}",
            &["line 1, column 15: agent.name: `` is not a valid name; \
                 a name consists of 1 to 64 letters, digits, `_`, `.` and `-`"],
        ),
        (
            "agent: {grace: 5}",
            &["line 1, column 16: agent.grace: `5` has no unit; \
                 write a number and a unit (ns, us, ms, s, m, h, d), for example 20ms, 1.5s or 5m"],
        ),
        (
            "agent: {grace: 1.5}",
            &["line 1, column 16: agent.grace: `1.5` has no unit; \
                 write a number and a unit (ns, us, ms, s, m, h, d), for example 20ms, 1.5s or 5m"],
        ),
        (
            "agent: {grace: 5 parsecs}",
            &["line 1, column 16: agent.grace: `5 parsecs` has an unknown unit; \
                 write a number and a unit (ns, us, ms, s, m, h, d), for example 20ms, 1.5s or 5m"],
        ),
        ("agent: {grace: 61s}", &["line 1, column 16: agent.grace: 61s is out of range; write 0s to 1m"]),
        (
            "agent: {labels: {0a: x}}",
            &["line 1, column 18: agent.labels.0a: `0a` is not a valid label name; \
                 a label name consists of letters, digits and `_`, and begins neither with a digit nor with `__`"],
        ),
        (
            "agent: {labels: {__name__: x}}",
            &["line 1, column 18: agent.labels.__name__: `__name__` is not a valid label name; \
                 a label name consists of letters, digits and `_`, and begins neither with a digit nor with `__`"],
        ),
        (
            "agent: {labels: {a: \"x\\ty\"}}",
            &["line 1, column 21: agent.labels.a: the label value contains a control character; \
                 write it on one line, without tabs"],
        ),
        (
            "listen: {http: 9862}",
            &["line 1, column 16: listen.http: `9862` is a number; \
                 write an address and a port such as [::]:9862 in quotes"],
        ),
        (
            "listen: {http: ':9862'}",
            &["line 1, column 16: listen.http: `:9862` is not an address and a port; \
                 for example \"[::]:9862\" for all addresses, or \"192.0.2.1:9862\""],
        ),
        (
            "listen: {agent: '127.0.0.1:9862'}",
            &["line 1, column 17: listen.agent: 127.0.0.1:9862 is also used by listen.http; \
                 use different ports for listen.agent and listen.http"],
        ),
        (
            "key_file: ''",
            &["line 1, column 11: key_file: not a file path; for example /etc/pathmeter/mesh.key"],
        ),
        (
            "responder: {allow: [10.1.2.3/8, 10.0.0.0/33, ten]}",
            &[
                "line 1, column 21: responder.allow[0]: `10.1.2.3/8` has host bits set (the network is 10.0.0.0/8); \
                 write a network such as 10.0.0.0/8 or \"2001:db8::/32\", or a single address",
                "line 1, column 33: responder.allow[1]: `10.0.0.0/33` has a prefix length greater than 32; \
                 write a network such as 10.0.0.0/8 or \"2001:db8::/32\", or a single address",
                "line 1, column 46: responder.allow[2]: `ten` does not begin with an IP address; \
                 write a network such as 10.0.0.0/8 or \"2001:db8::/32\", or a single address",
            ],
        ),
        (
            "responder: {rate: 100000}",
            &["line 1, column 19: responder.rate: `100000` has no unit; \
                 write a number and a unit (pps, kpps, Mpps), for example 500pps or 100kpps"],
        ),
        (
            "trace: {router_rate: 0.05pps, router_rate_ipv6: 6kpps, agent_rate: 50}",
            &[
                "line 1, column 22: trace.router_rate: 0.05pps is out of range; write 0.1pps to 5000pps",
                "line 1, column 49: trace.router_rate_ipv6: 6000pps is out of range; write 0.1pps to 5000pps",
                "line 1, column 68: trace.agent_rate: `50` has no unit; \
                 write a number and a unit (pps, kpps), for example 0.8pps or 1kpps",
            ],
        ),
        (
            "responder: {rate: 0pps}",
            &["line 1, column 19: responder.rate: 0pps is out of range; write 1pps to 100000000pps"],
        ),
        (
            "responder: {sessions: 0}",
            &["line 1, column 23: responder.sessions: 0 is out of range; \
                 write a whole number from 1 to 16777216"],
        ),
        (
            "peers: [{name: a, address: 10.0.0.256}]",
            &["line 1, column 28: peers[0].address: `10.0.0.256` is not an IP address or a host name; \
                 for example 192.0.2.1, \"2001:db8::1\" or fra-1.example.net"],
        ),
        (
            "peers: [{name: a, address: '192.0.2.1:9862'}]",
            &["line 1, column 28: peers[0].address: `192.0.2.1:9862` is not an IP address or a host name; \
                 remove the port: ports have keys of their own"],
        ),
        (
            "peers: [{name: a, address: 'a.example.net:9862'}]",
            &[
                "line 1, column 28: peers[0].address: `a.example.net:9862` is not an IP address or a host name; \
                 remove the port: ports have keys of their own",
            ],
        ),
        (
            "peers: [{name: a, address: '[2001:db8::1]'}]",
            &["line 1, column 28: peers[0].address: `[2001:db8::1]` is not an IP address or a host name; \
                 write an IPv6 address without brackets, in quotes"],
        ),
        (
            "peers: [{name: a, address: 0.0.0.0}]",
            &["line 1, column 28: peers[0].address: 0.0.0.0 is not a unicast address; \
                 write the address of a single host"],
        ),
        (
            "peers: [{name: a, address: -a}]",
            &["line 1, column 28: peers[0].address: `-a` is not an IP address or a host name; \
                 for example 192.0.2.1, \"2001:db8::1\" or fra-1.example.net"],
        ),
        (
            "peers: [{name: a, address: a, http_port: 0}]",
            &["line 1, column 42: peers[0].http_port: 0 is out of range; \
                 write a whole number from 1 to 65535"],
        ),
        (
            "peers: [{name: a, address: a, http_port: 70000}]",
            &["line 1, column 42: peers[0].http_port: 70000 is out of range; \
                 write a whole number from 1 to 65535"],
        ),
        (
            "peers: [{name: a, address: a}]\ntargets: [{name: a, address: b}]",
            &["line 2, column 18: targets[0].name: a is already used at peers[0].name; \
                 use unique names: peers and targets are identified by the label `peer`"],
        ),
        (
            "listen: {http: '[::]:0'}\npeers: [{name: a, address: a}]",
            &["line 2, column 9: peers[0].http_port: missing; \
                 set it: the default is the own port, which is 0"],
        ),
        (
            "metrics: {series_max: -1}",
            &["line 1, column 23: metrics.series_max: -1 is out of range; \
                 write a whole number from 1 to 10000000"],
        ),
        (
            "log: {level: inof}",
            &["line 1, column 14: log.level: `inof` is not a log level; \
                 did you mean info? write off, error, warn, info, debug, trace, or a filter such as warn,pathmeter::http=debug"],
        ),
        (
            "log: {level: 'pathmeter=loud'}",
            &["line 1, column 14: log.level: `pathmeter=loud` is not a valid log filter; \
                 write off, error, warn, info, debug, trace, or a filter such as warn,pathmeter::http=debug"],
        ),
        (
            "log: {format: xml}",
            &["line 1, column 15: log.format: `xml` is not supported; allowed: text, json"],
        ),
    ]);
}

#[test]
fn bandwidth_that_cannot_run_is_rejected() {
    check(&[
        (
            "probes: [{name: p, kind: bandwidth, method: check}]",
            &["line 1, column 10: probes[0].rate: missing: method: check asks whether a path carries it; \
               write the rate that the path must carry, such as 50Mbit/s"],
        ),
        (
            "probes: [{name: p, kind: bandwidth, method: train, streams: 2}]",
            &["line 1, column 61: probes[0].streams: 2 connections, but method: train has none; \
               remove this key, or write method: tcp"],
        ),
        (
            "bandwidth: {quiet_hours: [\"8:00-18:00\"]}",
            &["line 1, column 27: bandwidth.quiet_hours[0]: \"8:00-18:00\"; \
               write hours in UTC such as \"08:00-18:00\""],
        ),
        (
            "bandwidth: {quiet_hours: 22}",
            &["line 1, column 26: bandwidth.quiet_hours: `22` is a number; \
               write a list of hours in UTC such as [\"08:00-18:00\"]"],
        ),
    ]);
}

#[test]
fn probe_that_cannot_run_is_rejected() {
    check(&[
        ("probes: [{}]", &["line 1, column 10: probes[0].name: missing; this key is required"]),
        (
            "probes: [{name: p, kind: speed, hops: 3}]",
            // `sample` is a kind for tests.
            &[
                "line 1, column 26: probes[0].kind: `speed` is not supported; allowed: echo, trace, bandwidth, sample",
            ],
        ),
        (
            "probes: [{name: p, kind: trace}]",
            &["line 1, column 10: probes[0].follows: missing; this key is required"],
        ),
        (
            "probes: [{name: p, kind: trace, follows: q}, {name: q}]",
            &["line 1, column 42: probes[0].follows: no probe before this one is named q; \
               name an echo probe, and list it first"],
        ),
        (
            "probes: [{name: q, kind: sample}, {name: p, kind: trace, follows: q}]",
            &["line 1, column 67: probes[1].follows: q sends no packets of its own; name an echo probe"],
        ),
        (
            "probes: [{name: q, protocol: icmp}, {name: p, kind: trace, follows: q, protocol: udp}]",
            &["line 1, column 82: probes[1].protocol: q is traced over icmp; \
               remove this key, or follow a probe over another protocol"],
        ),
        (
            "probes: [{name: q, protocol: websocket}, {name: p, kind: trace, follows: q, protocol: websocket}]",
            &["line 1, column 87: probes[1].protocol: q is traced over tcp, which carries its connections; \
               remove this key, or follow a probe over another protocol"],
        ),
        (
            "probes: [{name: q, protocol: websocket}, {name: p, kind: trace, follows: q, protocol: udp}]",
            &["line 1, column 87: probes[1].protocol: q is traced over tcp, which carries its connections; \
               remove this key, or follow a probe over another protocol"],
        ),
        (
            "probes: [{name: q}, {name: p, kind: trace, follows: q, protocol: http}]",
            &["line 1, column 66: probes[1].protocol: q is traced over udp; \
               remove this key, or follow a probe over another protocol"],
        ),
        (
            "probes: [{name: q}, {name: p, kind: trace, follows: q, protocol: quic}]",
            &["line 1, column 66: probes[1].protocol: `quic` is not supported; allowed: udp, icmp, tcp"],
        ),
        (
            "probes: [{name: q, protocol: icmp}, {name: p, kind: trace, follows: q, method: own_flow}]",
            &["line 1, column 80: probes[1].method: q is traced over icmp on its own flow already; \
               remove this key"],
        ),
        (
            "probes: [{name: q, protocol: tcp}, {name: p, kind: trace, follows: q, method: raw}]",
            &["line 1, column 79: probes[1].method: `raw` is not supported; allowed: unprivileged, own_flow"],
        ),
        (
            "probes: [{name: q}, {name: p, kind: trace, follows: q, interval: 1s, hops_max: 65, dscp: ef}]",
            &[
                "line 1, column 66: probes[1].interval: 1s is out of range; write 2s to 1h",
                "line 1, column 80: probes[1].hops_max: 65 is out of range; write a whole number from 1 to 64",
                "line 1, column 84: probes[1].dscp: unknown key; allowed: name, kind, follows, interval, protocol, hops_max, method, hop_metrics",
            ],
        ),
        (
            "probes: [{name: p, protocol: sctp, size: 1B}]",
            &[
                "line 1, column 30: probes[0].protocol: `sctp` is not supported; did you mean icmp? allowed: udp, icmp, tcp, websocket, http",
            ],
        ),
        (
            "probes: [{name: p}, {name: p}]",
            &["line 1, column 28: probes[1].name: another probe is already named p; use a unique name"],
        ),
        (
            "probes: [{name: p, interval: 500us}]",
            &["line 1, column 30: probes[0].interval: 500us is out of range; write 1ms to 1h"],
        ),
        (
            "probes: [{name: p, flows: 0}]",
            &["line 1, column 27: probes[0].flows: 0 is out of range; write a whole number from 1 to 16"],
        ),
        (
            "probes: [{name: p, size: 43B}]",
            &["line 1, column 26: probes[0].size: 43B is out of range; write 44B to 9000B"],
        ),
        (
            "probes: [{name: p, size: 64}]",
            &["line 1, column 26: probes[0].size: `64` has no unit; \
                 write a number and a unit (B, kB, KiB, MB, MiB, GB, GiB), for example 128B or 1KiB"],
        ),
        (
            "probes: [{name: p, path_mtu: true}]",
            &["line 1, column 30: probes[0].path_mtu: `true` is a boolean; \
                 write on, off, or a mapping such as {interval: 60s, ceiling: 9000B}"],
        ),
        (
            "probes: [{name: p, path_mtu: yes}]",
            &["line 1, column 30: probes[0].path_mtu: `yes` is not supported; \
                 write on, off, or a mapping such as {interval: 60s, ceiling: 9000B}"],
        ),
        (
            "probes: [{name: p, path_mtu: {interval: 500ms, ceiling: 1279B, floor: 1B}}]",
            &[
                "line 1, column 41: probes[0].path_mtu.interval: 500ms is out of range; write 1s to 1h",
                "line 1, column 57: probes[0].path_mtu.ceiling: 1279B is out of range; write 1280B to 9000B",
                "line 1, column 64: probes[0].path_mtu.floor: unknown key; allowed: interval, ceiling",
            ],
        ),
        (
            "probes: [{name: p, dscp: af44}]",
            &["line 1, column 26: probes[0].dscp: `af44` is not a class of service; \
                 write 0 to 63, or default, le, cs1 to cs7, af11 to af43, va or ef"],
        ),
        (
            "probes: [{name: p, dscp: 64}]",
            &["line 1, column 26: probes[0].dscp: `64` is above 63, the highest code point; \
                 write 0 to 63, or default, le, cs1 to cs7, af11 to af43, va or ef"],
        ),
        (
            "probes: [{name: p, source: eth0}]",
            &["line 1, column 28: probes[0].source: `eth0` is not a unicast IP address; \
                 for example 192.0.2.1"],
        ),
        (
            "probes: [{name: p, source: 192.0.2.1, family: ipv6}]",
            &["line 1, column 28: probes[0].source: 192.0.2.1 does not match the address family; \
                 write family: ipv4, or remove source"],
        ),
        (
            "probes: [{name: p, source: 192.0.2.1, family: both}]",
            &["line 1, column 28: probes[0].source: 192.0.2.1 does not match the address family; \
                 write family: ipv4, or remove source"],
        ),
        (
            "probes: [{name: p, source_port: 65530, flows: 7}]",
            &["line 1, column 33: probes[0].source_port: 7 flows from port 65530 exceed port 65535; \
                 write at most 65529"],
        ),
        (
            "probes: [{name: p, source_port: 9860, flows: 4}]",
            &[
                "line 1, column 33: probes[0].source_port: the flows would use source port 9862: listen.stamp; \
                 choose ports that are not in use",
            ],
        ),
        (
            "probes: [{name: p, source_port: 862}]",
            &[
                "line 1, column 33: probes[0].source_port: the flows would use source port 862: the port of STAMP reflectors, from which responders accept no requests; \
                 choose ports that are not in use",
            ],
        ),
        (
            "probes: [{name: p, family: ipv5}]",
            &["line 1, column 28: probes[0].family: `ipv5` is not supported; \
                 did you mean ipv4? allowed: auto, ipv4, ipv6, both"],
        ),
        (
            "probes: [{name: p, lost_after: 2m}]",
            &["line 1, column 32: probes[0].lost_after: 2m is out of range; write 1ms to 1m"],
        ),
        (
            "probes: [{name: p, lost_after: 500ms}]",
            &["line 1, column 32: probes[0].lost_after: 500ms is shorter than late_after (1s); \
                 use at least 1s, so that a reply can be late before it counts as lost"],
        ),
        (
            "probes: [{name: p, peers: fra-1}]",
            &["line 1, column 27: probes[0].peers: `fra-1` is not a list; \
                 write all, or a list of peer names such as [a-1, a-2]"],
        ),
        (
            "peers: [{name: fra-1, address: a}]\nprobes: [{name: p, peers: [fra-2]}]",
            &["line 2, column 28: probes[0].peers[0]: no peer is named `fra-2`; did you mean fra-1?"],
        ),
        (
            "peers: [{name: fra-1, address: a}]\nprobes: [{name: p, targets: [fra-1]}]",
            &["line 2, column 30: probes[0].targets[0]: no target is named `fra-1`; \
                 it is a peer: list it under peers"],
        ),
    ]);
}

#[test]
fn invalid_websocket_section_is_rejected() {
    let many = (0..101).map(|i| format!("'http://a{i}'")).collect::<Vec<_>>().join(", ");
    check(&[
        (
            "websocket: {origins: all}",
            &["line 1, column 22: websocket.origins: `all` is not supported; \
                 write same, any, or a list such as [https://page.example.net]"],
        ),
        (
            "websocket: {origins: ['https://page.example.net/', null]}",
            &[
                "line 1, column 23: websocket.origins[0]: `https://page.example.net/` is not an origin; \
                 write scheme, host and port, without a path: https://page.example.net, http://10.0.0.1:8080",
                "line 1, column 52: websocket.origins[1]: no value; write an origin, or remove the key",
            ],
        ),
        (
            &format!("websocket: {{origins: [{many}]}}"),
            &["line 1, column 22: websocket.origins: 101 origins; at most 100 are allowed"],
        ),
        (
            "websocket: {clients_max: 0, message_bytes_max: 2MiB, idle_timeout: 500ms, messages_per_second: 10pps}",
            &[
                "line 1, column 26: websocket.clients_max: 0 is out of range; write a whole number from 1 to 100000",
                "line 1, column 48: websocket.message_bytes_max: 2097152B is out of range; write 128B to 1048576B",
                "line 1, column 68: websocket.idle_timeout: 500ms is out of range; write 1s to 1h",
                "line 1, column 96: websocket.messages_per_second: `10pps` is a string; \
                 write a whole number from 1 to 1000000",
            ],
        ),
    ]);
}

#[test]
fn unknown_or_duplicate_key_is_rejected() {
    check(&[
        (
            "prboes: []",
            &["line 1, column 1: prboes: unknown key; \
                 did you mean probes? allowed: agent, listen, state_dir, key_file, tls, responder, websocket, bandwidth, peers, targets, probes, trace, metrics, log"],
        ),
        (
            "timeout: 5s",
            &["line 1, column 1: timeout: unknown key; \
                 allowed: agent, listen, state_dir, key_file, tls, responder, websocket, bandwidth, peers, targets, probes, trace, metrics, log"],
        ),
        ("agent: {}\nlog: {}\nagent: {}", &["line 3, column 1: agent: duplicate key; remove one of the two"]),
        (
            "agent: {labels: {a: x, b: y, a: z}}",
            &["line 1, column 30: agent.labels.a: duplicate key; remove one of the two"],
        ),
    ]);
}

#[test]
fn file_that_is_not_text_is_rejected() {
    for (bytes, problem) in [
        (
            &b"agent: {}\nlog: \xff\n"[..],
            "line 2, column 6: byte 0xff is not valid UTF-8; save the file as UTF-8",
        ),
        (b"\xff\xfea\0", "line 1, column 1: byte 0xff is not valid UTF-8; save the file as UTF-8"),
    ] {
        assert_eq!(lines(&rejected(bytes)), [problem]);
    }
}

#[test]
fn problem_shows_no_value_but_its_own() {
    let text = "
key_file: {secret: hunter2}
secret: hunter2
agent: {password: hunter2, labels: {a: x, a: hunter2}, grace: [hunter2]}
probes: [hunter2: {hunter2: hunter2]
";
    assert!(!rejected(text).to_string().contains("hunter2"));
    let (valid_yaml, _) = text.split_once("probes").unwrap();
    assert!(!rejected(valid_yaml).to_string().contains("hunter2"));
}

#[test]
fn invalid_provider_is_rejected() {
    check(&[
        (
            "peers: [{files: [/etc/a.yaml], dns: b}]",
            &["line 1, column 37: peers[0].dns: files is also set; write a separate entry for each"],
        ),
        (
            "peers: [{files: /a/*/b.yaml}]",
            &[
                "line 1, column 17: peers[0].files: `/a/*/b.yaml` has a `*` that is not allowed; use at most one `*`, in the last part of the path",
            ],
        ),
        (
            "peers: [{files: a.txt}]",
            &[
                "line 1, column 17: peers[0].files: `a.txt` is not the path of a JSON or YAML file; it must end in .json, .yml or .yaml",
            ],
        ),
        (
            "targets: [{dns: a.example.net}]",
            &[
                "line 1, column 17: targets[0].dns: address records do not contain the names that targets need; write {name: …, type: srv}, or list the targets in a file",
            ],
        ),
        (
            "targets: [{kubernetes: {service: a}}]",
            &["line 1, column 24: targets[0].kubernetes: the pods of a service are agents; move it to peers"],
        ),
        (
            "peers: [{dns: a}, {dns: a}]",
            &["line 1, column 25: peers[1].dns: duplicate provider dns:a; remove one of the two"],
        ),
        (
            "probes: [{name: p, peers: {select: ring}}]",
            &["line 1, column 27: probes[0].peers.k: missing; this key is required"],
        ),
        (
            "peers: [{http: {url: 'http://a/b', authorization: {credentials_file: /t}, basic_auth: {username: u, password_file: /p}}}]",
            &[
                "line 1, column 87: peers[0].http.basic_auth: authorization is also set; remove one of the two",
            ],
        ),
        (
            "peers: [{http: {url: 'http://a/b', authorization: {type: Digest}, basic_auth: {username: 'u:', password: x}}}]",
            &[
                "line 1, column 51: peers[0].http.authorization.credentials_file: missing; this key is required",
                "line 1, column 58: peers[0].http.authorization.type: `Digest` is not supported; allowed: Bearer",
                "line 1, column 79: peers[0].http.basic_auth.password_file: missing; this key is required",
                "line 1, column 90: peers[0].http.basic_auth.username: `u:` is not a valid user name; remove colons and control characters",
                "line 1, column 96: peers[0].http.basic_auth.password: unknown key; allowed: username, password_file",
            ],
        ),
    ]);
}
