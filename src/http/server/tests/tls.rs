//! Tests of the server with TLS.

use super::*;
use crate::tls::tests::{acceptor, connector, web};
use crate::tls::{Connector, TlsStream};
use pathmeter_lab::pki::{Authority, VALID_UNTIL, Validity};

/// Returns a server with a certificate for `first`, and a client that trusts its CA.
fn serving(limits: ServerLimits) -> (Served, Arc<ArcSwap<LoadedWebConfig>>, Authority, Connector) {
    let ca = Authority::new("ours");
    let web_config = Arc::new(ArcSwap::from_pointee(web_config(&ca, "first")));
    let listener = listen("127.0.0.1:0");
    let address = listener.local_addr().unwrap();
    let served = Served::behind(Arc::clone(&web_config), listener, address, limits);
    let connector = connector(&ca, None);
    (served, web_config, ca, connector)
}

fn web_config(ca: &Authority, name: &str) -> LoadedWebConfig {
    LoadedWebConfig {
        acceptor: Some(acceptor(&web(&ca.issue(&[name], Validity::Current)))),
        ..LoadedWebConfig::default()
    }
}

async fn connect(served: &Served, connector: &Connector, name: &str) -> TlsStream<TcpStream> {
    let stream = within(TcpStream::connect(served.address)).await.unwrap();
    within(connector.connect(stream, name)).await.unwrap()
}

async fn hello(stream: &mut TlsStream<TcpStream>) {
    within(stream.write_all(HELLO.as_bytes())).await.unwrap();
    within(stream.flush()).await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"hello") {
        assert_ne!(
            within(stream.read_buf(&mut read)).await.unwrap(),
            0,
            "{}",
            String::from_utf8_lossy(&read)
        );
    }
}

#[tokio::test]
async fn new_certificate_applies_to_new_connections_only() {
    let (served, served_as, ca, connector) = serving(ServerLimits::default());
    let mut first = connect(&served, &connector, "first").await;
    hello(&mut first).await;
    assert_eq!(first.certificate_expiry(), Some(VALID_UNTIL));

    served_as.store(Arc::new(web_config(&ca, "second")));
    let mut second = connect(&served, &connector, "second").await;
    hello(&mut second).await;
    hello(&mut first).await;

    // The same when TLS is switched off.
    served_as.store(Arc::default());
    assert!(is(&served.request(HELLO).await, 200));
    hello(&mut first).await;
    assert_eq!(served.counters.handshake_errors(), 0);
}

#[tokio::test]
async fn plain_http_on_a_tls_port_is_answered_with_a_remedy() {
    let (served, _, _, _) = serving(ServerLimits::default());
    let mut client = served.connect().await;
    client.send(HELLO).await;
    let response = client.closed().await;
    assert!(is(&response, 400), "{response}");
    assert!(response.ends_with("this port requires HTTPS; use https://…\n"), "{response}");
    assert_eq!(served.counters.handshake_errors(), 1);
    assert_eq!(served.counters.responses()[3], ("4xx", 1));
}

#[tokio::test]
async fn client_without_a_complete_handshake_is_dropped() {
    let (served, _, _, _) = serving(ServerLimits { handshake_timeout: SHORT, ..ServerLimits::default() });
    let silent = served.connect().await;
    assert_eq!(silent.closed().await, "");
    let mut slow = served.connect().await;
    // The header of a TLS record without its content.
    slow.send("\u{16}\u{3}\u{1}\u{2}\0").await;
    assert_eq!(slow.closed().await, "");
    until(|| served.counters.connections() == 0).await;
    assert_eq!(served.counters.handshake_errors(), 2);
}

#[tokio::test]
async fn port_check_without_data_is_not_a_handshake_error() {
    let (served, _, _, connector) = serving(ServerLimits::default());
    drop(served.connect().await);
    hello(&mut connect(&served, &connector, "first").await).await;
    assert_eq!(served.counters.handshake_errors(), 0);
}

#[tokio::test]
async fn shutdown_does_not_wait_for_a_handshake() {
    let (served, _, _, _) =
        serving(ServerLimits { handshake_timeout: 2 * DEADLINE, ..ServerLimits::default() });
    let silent = served.connect().await;
    until(|| served.counters.connections() == 1).await;
    served.stop.send(true).unwrap();
    assert_eq!(silent.closed().await, "");
    within(served.task).await.unwrap();
}

#[tokio::test]
async fn connection_can_be_upgraded_over_tls() {
    let ca = Authority::new("ours");
    let listener = vec![listen("127.0.0.1:0")];
    let address = listener[0].local_addr().unwrap();
    let (_stop, stopped) = watch::channel(false);
    let counters = Arc::new(Counters::default());
    let behind = Arc::new(ArcSwap::from_pointee(web_config(&ca, "first")));
    tokio::spawn(serve(
        listener,
        ServerLimits::default(),
        Arc::new(counter),
        Arc::clone(&counters),
        behind,
        stopped,
    ));
    let stream = within(TcpStream::connect(address)).await.unwrap();
    count_up(within(connector(&ca, None).connect(stream, "first")).await.unwrap()).await;
    assert_eq!(counters.responses()[0], ("1xx", 1));
}
