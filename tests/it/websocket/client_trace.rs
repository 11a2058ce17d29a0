//! Traces to the clients of `/ws`.

use serde_json::{Value, json};

use super::raw_client::{CLOSE, RawClient, TEXT, UpgradeResponse};
use super::{agent, when_all_closed};
use crate::fixture::{Agent, Host, eventually};

const ASKED: (&str, &str) = ("Sec-WebSocket-Protocol", "chat, pathmeter.trace.v1");

fn connect(host: &Host, from: &str, headers: &[(&str, &str)]) -> (RawClient, UpgradeResponse) {
    RawClient::request_upgrade(host, from.parse().unwrap(), headers)
}

fn receive(client: &mut RawClient) -> Value {
    let (kind, text) = client.receive().unwrap();
    assert_eq!(kind, TEXT);
    serde_json::from_slice(&text).unwrap()
}

fn failed(agent: &Agent) -> Vec<Value> {
    let events = agent.json("/api/v1/events");
    let found = events["events"].as_array().unwrap().iter();
    found.filter(|event| event["event"] == "client_trace_failed").cloned().collect()
}

const TRACES: &str = "pathmeter_websocket_traces_total";

fn traced(agent: &Agent) -> Vec<Value> {
    let events = agent.json("/api/v1/events");
    let found = events["events"].as_array().unwrap().iter().filter(|event| event["event"] == "client_traced");
    found.cloned().collect()
}

#[test]
fn client_that_asks_is_told_its_route_and_so_is_the_operator() {
    let host = Host::claim();
    let agent = agent(&host, "open: true, traces_per_second: 100");
    let (mut client, response) = connect(&host, "127.0.0.1", &[ASKED]);
    assert!(response.head.contains("sec-websocket-protocol: pathmeter.trace.v1"), "{response:?}");
    let connected = receive(&mut client);
    assert_eq!((&connected["event"], &connected["address"]), (&json!("connected"), &json!("127.0.0.1")));
    let method = &connected["method"];
    assert!(*method == "icmp" || *method == "udp", "{connected}");
    let done = receive(&mut client);
    assert_eq!(
        (&done["event"], &done["reached"], &done["routers"]),
        (&json!("done"), &json!(true), &json!(0))
    );
    client.echo("it still echoes");
    let event = eventually("the event", || traced(&agent).first().cloned());
    assert_eq!((&event["client"], &event["method"]), (&json!("127.0.0.1"), method), "{event}");
    assert_eq!((&event["reached"], &event["hops"]), (&json!(true), &json!([])), "{event}");
    client.send(CLOSE, &1000_u16.to_be_bytes()).unwrap();
    assert_eq!(client.closed(), 1000);
    let page = when_all_closed(&agent);
    assert_eq!(page.count(TRACES, &["result=\"complete\""]), 1, "{page}");
    assert_eq!(page.count(TRACES, &[]), 1, "{page}");
}

#[test]
fn plain_client_only_receives_echoes() {
    for (trace, is_traced) in [("asked", false), ("all", true)] {
        let host = Host::claim();
        let agent = agent(&host, &format!("open: true, trace: {trace}, traces_per_second: 100"));
        let (mut client, response) = connect(&host, "127.0.0.1", &[]);
        assert!(!response.head.contains("sec-websocket-protocol"), "{response:?}");
        if is_traced {
            eventually("the event", || (traced(&agent).len() == 1).then_some(()));
        }
        client.echo("nothing else was received");
        // A trace of the plain client would begin before that of the next one, and so refuse it.
        let (mut next, _) = connect(&host, "127.0.0.1", &[ASKED]);
        assert_eq!(
            [receive(&mut next), receive(&mut next)].map(|update| update["event"].clone()),
            ["connected", "done"]
        );
        eventually("the event", || (traced(&agent).len() == 1 + usize::from(is_traced)).then_some(()));
    }
}

#[test]
fn clients_are_not_traced_if_that_is_off() {
    let host = Host::claim();
    let agent = agent(&host, "open: true, trace: off");
    let (mut client, response) = connect(&host, "127.0.0.1", &[ASKED]);
    assert_eq!(response.status, 101, "{response:?}");
    assert!(!response.head.contains("sec-websocket-protocol"), "{response:?}");
    client.echo("nothing else was received");
    assert_eq!(traced(&agent), Vec::<Value>::new());
}

#[test]
fn client_that_is_not_traced_is_told_why() {
    let host = Host::claim();
    let agent = agent(&host, "open: true, traces_per_second: 1");
    // One after the other from one address, then each from another one: more than may begin at once.
    for (last, expected) in [(1..=1, "to your address begins every 4 s"), (2..=20, "at most 1 trace ")] {
        let mut addresses = last.cycle().take(20).map(|last| format!("127.0.0.{last}"));
        let refused = addresses.find_map(|address| {
            let (mut client, _) = connect(&host, &address, &[ASKED]);
            let update = receive(&mut client);
            if update["event"] == "connected" {
                assert_eq!(receive(&mut client)["event"], "done");
                return None;
            }
            client.echo("it still echoes");
            Some(update)
        });
        let update = refused.expect("one was refused");
        assert_eq!(update["event"], "error");
        assert!(update["reason"].as_str().unwrap().contains(expected), "{update}");
    }
    assert_eq!(failed(&agent), Vec::<Value>::new(), "refusals are only counted");
    let page = agent.page();
    let refused =
        ["source_rate", "total_rate"].map(|result| page.count(TRACES, &[&format!("result=\"{result}\"")]));
    assert_eq!(refused, [1, 1], "{page}");
}
