//! Traces of clients of `/ws` on their own connections.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pathmeter_lab::{DEADLINE, Net, NetPlan, eventually};
use pathmeter_proto::sim::Link;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::agent::NodeAgent;
use crate::seen_ports::{diamond, has_seen, is_address_of};
use crate::testbed::Inconclusive;
use crate::trace::{ROUTERS, address_of, routers_of_chain};

/// A client that asks for its route, and answers pings.
#[derive(Debug)]
struct TracedClient {
    stream: TcpStream,
    /// Texts that were received and are no updates of the trace.
    echoes: Vec<String>,
}

impl TracedClient {
    fn connect(net: &Net, to: IpAddr) -> Self {
        let to = SocketAddr::new(to, 9_862);
        let connect = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            // Longer segments do not fit the cables between routers, and are sent again.
            socket.set_tcp_mss(1_200)?;
            socket.connect_timeout(&to.into(), DEADLINE)?;
            std::io::Result::Ok(TcpStream::from(socket))
        };
        let mut stream = net.node("a").within(connect).expect("the agent listens");
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        write!(
            stream,
            "GET /ws HTTP/1.1\r\nHost: {to}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: pathmeter.trace.v1\r\n\r\n"
        )
        .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        Self { stream, echoes: Vec::new() }
    }

    /// Sends a frame, masked with zeros.
    fn send(&mut self, kind: u8, payload: &[u8]) {
        let length = u8::try_from(payload.len()).unwrap();
        assert!(length < 126);
        let frame = [&[kind, 0x80 | length, 0, 0, 0, 0], payload].concat();
        self.stream.write_all(&frame).unwrap();
    }

    /// The next text.
    fn receive(&mut self) -> String {
        loop {
            let mut head = [0; 2];
            self.stream.read_exact(&mut head).unwrap();
            let length = match head[1] {
                126 => {
                    let mut length = [0; 2];
                    self.stream.read_exact(&mut length).unwrap();
                    usize::from(u16::from_be_bytes(length))
                }
                short => usize::from(short),
            };
            let mut payload = vec![0; length];
            self.stream.read_exact(&mut payload).unwrap();
            match head[0] {
                0x89 => self.send(0x8a, &payload),
                0x81 => return String::from_utf8(payload).unwrap(),
                other => panic!("{other:#x}"),
            }
        }
    }

    /// The next update of the trace.
    fn update(&mut self) -> Value {
        loop {
            let text = self.receive();
            match serde_json::from_str::<Value>(&text) {
                Ok(update) if update["event"].is_string() => return update,
                Ok(_) | Err(_) => self.echoes.push(text),
            }
        }
    }

    /// The updates up to the last one.
    fn updates(&mut self) -> Vec<Value> {
        let mut updates = vec![self.update()];
        while !["done", "error"].map(|end| json!(end)).contains(&updates[updates.len() - 1]["event"]) {
            updates.push(self.update());
        }
        updates
    }
}

fn start<'a>(net: &'a Net, trace_timeout: &str) -> NodeAgent<'a> {
    NodeAgent::start(net.node("b"), config(trace_timeout), &[])
}

fn config(trace_timeout: &str) -> Value {
    json!({
        "agent": {"name": "b", "grace": "1s"},
        "trace": {"router_rate": "1000pps", "router_rate_ipv6": "1000pps", "agent_rate": "1000pps"},
        "websocket": {
            "open": true,
            "trace_method": "own_flow",
            "traces_per_second": 100,
            "trace_timeout": trace_timeout,
        },
    })
}

/// A counter of TCP in the kernel of a node.
pub(crate) fn tcp_counter(net: &Net, node: &str, file: &str, name: &str) -> u64 {
    let path = format!("/proc/thread-self/net/{file}");
    let text = net.node(node).within(|| fs::read_to_string(path)).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let found = lines.chunks(2).find_map(|pair| {
        let column = pair[0].split(' ').position(|column| column == name)?;
        pair[1].split(' ').nth(column)?.parse().ok()
    });
    found.unwrap_or_else(|| panic!("{name} in {text}"))
}

fn routers(updates: &[Value]) -> Vec<IpAddr> {
    let mut hops: Vec<&Value> = updates.iter().filter(|update| update["event"] == "hop").collect();
    hops.sort_by_key(|hop| hop["ttl"].as_u64());
    hops.iter().map(|hop| address_of(&hop["address"])).collect()
}

/// The connection of a client shows the same routers as other packets, and is not harmed: no byte is lost and
/// none is sent again.
pub(crate) fn own_flow() -> Result<(), Inconclusive> {
    for is_v4 in [true, false] {
        let net = NetPlan::chain(ROUTERS).build(16);
        for (first, second) in [("a", "r1"), ("r8", "b")] {
            let link = Link::perfect(10_000_000);
            net.wire(first, second).set_links(&link, &link);
        }
        let b = start(&net, "1200ms");
        let to = if is_v4 { net.v4("b") } else { net.v6("b") };
        let mut client = TracedClient::connect(&net, to);
        let messages: Vec<String> = (0..100).map(|number| format!("message {number}")).collect();
        messages.iter().for_each(|message| client.send(0x81, message.as_bytes()));
        let updates = client.updates();
        assert_eq!(updates[0]["method"], "own_flow", "{updates:?}");
        assert_eq!(updates[0]["fallback_reason"], Value::Null, "{updates:?}");
        assert_eq!(routers(&updates), routers_of_chain(is_v4, "reverse"), "{updates:?}");
        let done = &updates[updates.len() - 1];
        assert_eq!(
            (&done["event"], &done["reached"], &done["routers"]),
            (&json!("done"), &json!(true), &json!(ROUTERS))
        );
        let rtts = updates.iter().filter_map(|update| update["rtt_seconds"].as_f64());
        assert!(rtts.clone().all(|rtt| (0.020..0.5).contains(&rtt)), "{updates:?}");
        while client.echoes.len() < messages.len() {
            let echo = client.receive();
            client.echoes.push(echo);
        }
        assert_eq!(client.echoes, messages, "every message comes back, in order");
        for node in ["a", "b"] {
            let count = |file, name| tcp_counter(&net, node, file, name);
            let is_late = count("netstat", "TCPLossProbes") + count("netstat", "TCPTimeouts") > 0;
            assert_eq!(count("netstat", "TCPFastRetrans"), 0, "{node}");
            match (count("snmp", "RetransSegs"), is_late) {
                (0, _) => {}
                (count, true) => {
                    let reason = format!("a wire was late: {count} segments were sent again after a timer");
                    return Err(Inconclusive(reason));
                }
                (count, false) => panic!("{node} has sent {count} segments again"),
            }
        }
        let ignored = tcp_counter(&net, "b", "netstat", "OutOfWindowIcmps");
        assert_eq!(ignored, u64::try_from(ROUTERS).unwrap(), "the kernel ignores the answers of routers");
        let events = b.json("/api/v1/events");
        let event =
            events["events"].as_array().unwrap().iter().find(|event| event["event"] == "client_traced");
        let event = event.expect("the operator sees it as well");
        assert_eq!((&event["method"], &event["routers"]), (&json!("own_flow"), &json!(ROUTERS)), "{event}");
        let page = b.page();
        assert_eq!(page.count("pathmeter_websocket_traces_total", &["result=\"complete\""]), 1, "{page}");
    }
    Ok(())
}

/// The client receives each hop when its router answers, also while another one is still waited for.
pub(crate) fn hops_as_they_are_found() {
    for method in ["unprivileged", "own_flow"] {
        let net = NetPlan::chain(4).build(20);
        let link = Link::perfect(2_000_000);
        net.wire("a", "r1").set_links(&link, &link);
        net.node("r2").nft(
            "add table ip silent\n\
             add chain ip silent output { type filter hook output priority 0; }\n\
             add rule ip silent output icmp type time-exceeded drop\n",
        );
        let mut config = config("1200ms");
        config["websocket"]["trace_method"] = json!(method);
        let _b = NodeAgent::start(net.node("b"), config, &[]);
        let mut client = TracedClient::connect(&net, net.v4("b"));
        assert_eq!(client.update()["event"], "connected");
        let (begin, mut found) = (Instant::now(), Vec::new());
        while found.len() < 3 {
            found.push(client.update()["ttl"].as_u64());
        }
        let (first, at) = (begin.elapsed(), Instant::now());
        found.sort_unstable();
        assert_eq!(found, [1, 2, 4].map(Some), "{method}");
        let last = client.update();
        assert_eq!((&last["ttl"], &last["state"]), (&json!(3), &json!("unanswered")), "{method}: {last}");
        assert_eq!(client.update()["event"], "done");
        assert!(
            at.elapsed() > Duration::from_secs(1).saturating_sub(first),
            "{method}: {first:?}, {:?}",
            at.elapsed()
        );
    }
}

/// Where routers choose by flow, the routers of the connection are found, and not those of other packets.
pub(crate) fn own_flow_balanced() {
    const WAYS: usize = 4;
    let net = diamond(WAYS, 17, "sport 9862", "dport");
    let _b = start(&net, "300ms");
    let mut found = Vec::new();
    for _ in 0..8 {
        let mut client = TracedClient::connect(&net, net.v4("b"));
        let port = client.stream.local_addr().unwrap().port();
        let updates = client.updates();
        let routers = routers(&updates);
        assert_eq!((&updates[0]["method"], routers.len()), (&json!("own_flow"), 3), "{updates:?}");
        let used: Vec<usize> = (1..=WAYS).filter(|way| has_seen(&net, *way, port)).collect();
        assert_eq!(used.len(), 1, "a flow has one way");
        assert!(is_address_of(&net, used[0], routers[1]), "{} is not of way {}", routers[1], used[0]);
        found.push(used[0]);
    }
    found.dedup();
    assert!(found.len() > 1, "the flows differ");
}

/// A firewall that drops the connection after a segment with a small TTL is found: it is an event, and
/// the next client of the address is traced by another method.
pub(crate) fn own_flow_clamped() {
    let net = NetPlan::chain(4).build(18);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    net.node("r3").nft(
        "add table ip clamp\n\
         add chain ip clamp pre { type filter hook prerouting priority mangle; }\n\
         add rule ip clamp pre tcp sport 9862 ip ttl < 16 ct mark set 1\n\
         add rule ip clamp pre tcp sport 9862 ct mark 1 ip ttl set 2\n",
    );
    let b = start(&net, "300ms");
    // What is sent to it may no longer arrive.
    let _client = TracedClient::connect(&net, net.v4("b"));
    let failed = eventually("the event", || {
        let events = b.json("/api/v1/events");
        let mut events = events["events"].as_array().unwrap().iter();
        events.find(|event| event["event"] == "client_trace_failed").cloned()
    });
    assert_eq!((&failed["client"], &failed["method"]), (&json!(net.v4("a")), &json!("own_flow")), "{failed}");
    assert!(failed["reason"].as_str().unwrap().contains("has stalled"), "{failed}");
    let page = b.page();
    assert_eq!(page.count("pathmeter_websocket_traces_total", &["result=\"stalled\""]), 1, "{page}");
    assert!(b.log().contains("a client's connection stalled"), "{}", b.log());
    b.page_when("the connection is closed", |page| {
        page.count("pathmeter_websocket_clients_closed_total", &["reason=\"stalled\""]) == 1
    });
    let mut next = TracedClient::connect(&net, net.v4("b"));
    let updates = next.updates();
    assert_ne!(updates[0]["method"], "own_flow", "{updates:?}");
    assert_eq!(updates[0]["fallback_reason"], "a connection of this address has stalled when it was traced");
    assert_eq!(updates[updates.len() - 1]["event"], "done", "{updates:?}");
}

/// A connection that acknowledges nothing is left alone: its client is traced by another method.
pub(crate) fn own_flow_unhealthy() {
    let net = NetPlan::chain(4).build(21);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    // Segments without data, which are the acknowledgments of the client, do not leave it.
    net.node("a").nft(
        "add table ip mute\n\
         add chain ip mute output { type filter hook output priority 0; }\n\
         add rule ip mute output tcp dport 9862 tcp flags & (syn | psh) == 0 drop\n",
    );
    let b = start(&net, "300ms");
    let mut client = TracedClient::connect(&net, net.v4("b"));
    let page = b.page_when("the trace is complete", |page| {
        page.count("pathmeter_websocket_traces_total", &["result=\"complete\""]) == 1
    });
    assert_eq!(page.count("pathmeter_websocket_traces_total", &[]), 1, "{page}");
    net.node("a").nft("delete table ip mute\n");
    let updates = client.updates();
    assert!([json!("icmp"), json!("udp")].contains(&updates[0]["method"]), "{updates:?}");
    assert_eq!(routers(&updates).len(), 4, "{updates:?}");
}

/// A connection over which nothing reaches the client is left alone, also if the client sends.
pub(crate) fn own_flow_deaf() {
    let net = NetPlan::chain(4).build(22);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    // Only the response to the handshake, and the messages of another method, are that long.
    net.node("a").nft(
        "add table ip deaf\n\
         add chain ip deaf pre { type filter hook prerouting priority mangle; }\n\
         add rule ip deaf pre tcp sport 9862 tcp flags & psh == psh ip length < 100 drop\n",
    );
    let b = start(&net, "300ms");
    let mut client = TracedClient::connect(&net, net.v4("b"));
    client.send(0x81, b"x");
    let page = b.page_when("the trace is complete", |page| {
        page.count("pathmeter_websocket_traces_total", &["result=\"complete\""]) == 1
    });
    assert_eq!(page.count("pathmeter_websocket_traces_total", &[]), 1, "{page}");
    net.node("a").nft("delete table ip deaf\n");
    let updates = client.updates();
    assert!([json!("icmp"), json!("udp")].contains(&updates[0]["method"]), "{updates:?}");
    assert_eq!(updates[0]["fallback_reason"], "the connection is lossy or does not answer", "{updates:?}");
    let updates = TracedClient::connect(&net, net.v4("b")).updates();
    assert_eq!(updates[0]["method"], "own_flow", "the address is not excluded: {updates:?}");
}

/// If this host does not let the segments leave, the client is traced by another method, which says why.
pub(crate) fn own_flow_refused() {
    let net = NetPlan::chain(4).build(23);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    net.node("b").nft(
        "add table ip refuse\n\
         add chain ip refuse output { type filter hook output priority 0; }\n\
         add rule ip refuse output tcp sport 9862 ip ttl < 32 drop\n",
    );
    let b = start(&net, "300ms");
    let updates = TracedClient::connect(&net, net.v4("b")).updates();
    assert!([json!("icmp"), json!("udp")].contains(&updates[0]["method"]), "{updates:?}");
    let reason = &updates[0]["fallback_reason"];
    assert!(reason.as_str().unwrap().starts_with("sending a segment: Operation not permitted"), "{reason}");
    assert_eq!(routers(&updates).len(), 4, "{updates:?}");
    let events = b.json("/api/v1/events");
    let mut events = events["events"].as_array().unwrap().iter();
    let event = events.find(|event| event["event"] == "client_traced").expect("the operator sees it");
    assert_eq!(event["fallback_reason"], *reason, "{event}");
}

/// ICMP messages about the connection that arrive without pause hold up neither the trace nor the agent.
pub(crate) fn own_flow_flooded() {
    let net = NetPlan::chain(4).build(24);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    let b = start(&net, "300ms");
    let to = net.v4("b");
    let open = || Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::ICMPV4));
    let socket = net.node("b").within(open).unwrap();
    let mut client = TracedClient::connect(&net, to);
    let mut message = vec![11, 0, 0, 0, 0, 0, 0, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 1, 6, 0, 0];
    message.extend([0; 8]);
    message.extend(9_862_u16.to_be_bytes());
    message.extend(client.stream.local_addr().unwrap().port().to_be_bytes());
    message.extend([0; 4]);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Relaxed) {
                let _ = socket.send_to(&message, &SocketAddr::new(to, 0).into());
            }
        });
        let updates = client.updates();
        b.page();
        is_over.store(true, Relaxed);
        assert_eq!(updates[0]["method"], "own_flow", "{updates:?}");
        assert_eq!(updates[updates.len() - 1]["event"], "done", "{updates:?}");
    });
}

/// Without the capability the agent says so once, and names the method that it uses instead.
pub(crate) fn own_flow_not_permitted() {
    let net = NetPlan::chain(4).build(19);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    let b = NodeAgent::start_without_capabilities(net.node("b"), config("1200ms"));
    for _ in 0..2 {
        let updates = TracedClient::connect(&net, net.v4("b")).updates();
        assert!([json!("icmp"), json!("udp")].contains(&updates[0]["method"]), "{updates:?}");
        assert_eq!(updates[0]["fallback_reason"], "raw sockets need CAP_NET_RAW", "{updates:?}");
        assert_eq!(routers(&updates).len(), 4, "{updates:?}");
    }
    assert_eq!(b.log().matches("CAP_NET_RAW").count(), 1, "{}", b.log());
}
