//! TCP traces through devices that treat TCP differently from other packets.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use pathmeter_lab::{Namespace, NetPlan, eventually};
use pathmeter_proto::sim::Link;
use serde_json::json;

use crate::agent::NodeAgent;
use crate::trace::responders;
use crate::trace_protocols::flows;

/// Port at which agents answer echoes over TCP.
const PORT: u16 = 9_863;

/// A proxy on a router accepts the connections to the peer: a TCP trace ends there, a UDP trace at the peer.
pub(crate) fn proxy() {
    let net = NetPlan::chain(3).build(21);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    net.wire("r3", "b").set_links(&link, &link);
    relay(net.node("r2"), (net.v4("b"), PORT).into());
    net.node("r2").nft(&format!(
        "add table ip proxy\n\
         add chain ip proxy prerouting {{ type nat hook prerouting priority dstnat; }}\n\
         add rule ip proxy prerouting ip daddr {} tcp dport {PORT} redirect to :{PORT}\n",
        net.v4("b")
    ));
    // Messages come from the address of the proxy.
    let b = json!({"agent": {"name": "b", "grace": "1s"}, "responder": {"allow": ["10.77.0.0/16"]}});
    let _b = NodeAgent::start(net.node("b"), b, &[]);
    let trace = |name: &str, follows: &str, protocol: &str| json!({"name": name, "kind": "trace", "follows": follows, "protocol": protocol, "interval": "2s"});
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": [{"name": "b", "address": net.v4("b")}],
        "probes": [
            {"name": "mesh", "interval": "100ms"},
            {"name": "chat", "protocol": "tcp", "interval": "1s"},
            trace("mesh-routes", "mesh", "udp"),
            trace("chat-routes", "chat", "tcp"),
        ],
        // The routers of the lab answer as fast as they are asked.
        "trace": {"router_rate": "1kpps"},
    });
    let a = NodeAgent::start(net.node("a"), config, &[]);
    let page = a.page_when("several traces of both, and messages through the proxy", |page| {
        let traces = ["mesh-routes", "chat-routes"].iter().all(|probe| {
            let labels = [&*format!("probe=\"{probe}\""), "direction=\"forward\"", "result=\"complete\""];
            page.has("pathmeter_trace_traces_total", &labels)
                && page.count("pathmeter_trace_traces_total", &labels) >= 3
        });
        traces && page.count("pathmeter_echo_rtt_seconds_count", &["probe=\"chat\""]) >= 3
    });
    let routers = ["10.77.0.2", "10.77.1.2", "10.77.2.2"];
    for (probe, count) in [("mesh-routes", 3), ("chat-routes", 1)] {
        let (routers, label) = (&routers[..count], format!("probe=\"{probe}\""));
        let flow = eventually("a trace", || flows(&a, probe).first().cloned());
        let (trace, route) = (&flow["forward"]["trace"], &flow["forward"]["route"]);
        let found: Vec<String> = responders(trace).iter().map(ToString::to_string).collect();
        assert_eq!(found, routers, "{probe}: {flow}");
        assert_eq!((&trace["reached"], &trace["routers"]), (&json!(true), &json!(count)), "{probe}: {flow}");
        assert_eq!((&route["hops"], &route["routers"]), (&json!(routers), &json!(count)), "{probe}: {flow}");
        let exported = page.count("pathmeter_trace_routers", &[&label, "direction=\"forward\""]);
        assert_eq!(exported, count as u64, "{probe}: {page}");
        for name in ["pathmeter_trace_route_changes_total", "pathmeter_trace_unmatched_total"] {
            assert_eq!(page.count(name, &[&label]), 0, "{probe}: {name}\n{page}");
        }
    }
}

/// Accepts connections at [`PORT`] and passes their data to a server and back. Its threads end with their
/// connections, or with this process.
fn relay(node: &Namespace, server: SocketAddr) {
    let listener = node.within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap());
    node.spawn(move || {
        for client in listener.incoming() {
            // A client that has gone again, such as a trace, is none.
            let Ok(client) = client else { continue };
            // A new thread is in the namespace of the thread that starts it.
            thread::spawn(move || {
                let Ok(upstream) = TcpStream::connect(server) else { return };
                let pair = (client.try_clone().unwrap(), upstream.try_clone().unwrap());
                let back = thread::spawn(move || pass(pair.1, pair.0));
                pass(client, upstream);
                back.join().unwrap();
            });
        }
    });
}

/// Passes data on until the sender ends it, or one of both is gone.
fn pass(mut from: TcpStream, mut to: TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
