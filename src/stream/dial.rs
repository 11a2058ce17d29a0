//! Opens connections: the parameters of a path, and the TCP part.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::key::Keys;
use pathmeter_proto::wire::websocket::MessageFormat;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::connect_error::ConnectError;
use super::http::{self, ExpectedResponse};
use super::http_target::{HttpTarget, RawConnection};
use super::kernel;
use super::link::StreamLink;
use super::tcp;
use super::tcp_info::TcpInfoReader;
use super::websocket;
use crate::clock::Clock;
use crate::http::client::TlsClient;
use crate::metrics::stream::{ConnectErrorKind, ConnectStage};
use crate::tls::Cause;

/// How a path connects.
#[derive(Debug, Clone)]
pub struct Dial {
    /// Destination address and port.
    pub to: SocketAddr,
    /// The host name that connection probes resolve and measure; `None` if the target is an address.
    pub host: Option<String>,
    /// Source address; `None`: the kernel chooses.
    pub source: Option<IpAddr>,
    /// DSCP of the connection.
    pub dscp: Dscp,
    /// The protocol over the connection.
    pub protocol: StreamProtocol,
}

/// The protocol over a connection.
#[derive(Debug, Clone)]
pub enum StreamProtocol {
    /// The pathmeter echo protocol on the agent port.
    Tcp {
        /// Message size in bytes.
        bytes: u32,
        /// Keys derived for [`pathmeter_proto::wire::stream::PURPOSE`]; `None`: open mode.
        keys: Option<Arc<Keys>>,
    },
    /// Messages that the server echoes over a WebSocket.
    WebSocket {
        /// The resource to request.
        target: HttpTarget,
        /// Format of the messages.
        format: MessageFormat,
        /// Message size in bytes.
        bytes: usize,
    },
    /// HTTP requests.
    Http {
        /// The resource to request.
        target: HttpTarget,
        /// Conditions that responses must meet.
        expected: ExpectedResponse,
    },
}

/// TCP keepalive interval of idle connections, so that NAT entries do not expire and a dead connection is
/// noticed before the next message. Chosen: 30 s; the shortest lifetime of common NAT entries is one minute.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Limits concurrent lookups; each occupies a thread until the resolver returns.
static LOOKUPS: Semaphore = Semaphore::const_new(8);

impl StreamProtocol {
    /// Maximum number of unanswered messages.
    #[must_use]
    pub fn at_once(&self) -> usize {
        match self {
            Self::Tcp { .. } | Self::WebSocket { .. } => usize::MAX,
            Self::Http { .. } => 1,
        }
    }

    /// Whether the server may close an idle connection.
    #[must_use]
    pub fn is_on_demand(&self) -> bool {
        match self {
            Self::Tcp { .. } | Self::WebSocket { .. } => false,
            Self::Http { .. } => true,
        }
    }
}

/// Durations of the stages of connecting.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectTimings {
    /// The TCP handshake.
    pub(super) connect: Option<Duration>,
    /// The other stages, in order.
    pub(super) stages: Vec<(ConnectStage, Duration)>,
    /// When the server's certificate expires, in seconds since 1970.
    pub(super) certificate_expiry: Option<u64>,
}

impl Dial {
    /// Opens a connection, up to the point where messages can be sent. `is_traced`: whether it has the IPv6
    /// flow label 0, as the segments of a trace, so that they take its route.
    pub(super) async fn connect(
        &self,
        timings: &mut ConnectTimings,
        is_traced: bool,
    ) -> Result<StreamLink, ConnectError> {
        let start = Clock::now();
        let stream = self.connect_tcp(self.to, is_traced).await?;
        timings.connect = Some(Clock::now().since(start));
        match &self.protocol {
            StreamProtocol::Tcp { bytes, keys } => {
                let start = Clock::now();
                let link = tcp::begin(stream, self.to, *bytes, keys.as_deref()).await?;
                timings.stages.push((ConnectStage::Greeting, Clock::now().since(start)));
                Ok(StreamLink::Tcp(link))
            }
            StreamProtocol::WebSocket { target, format, bytes } => {
                let tcp_info = self.tcp_info(&stream)?;
                let stream = self.secure(stream, target, timings).await?;
                let start = Clock::now();
                let link = websocket::begin(stream, tcp_info, self.to, target, *format, *bytes).await?;
                timings.stages.push((ConnectStage::WebSocket, Clock::now().since(start)));
                Ok(StreamLink::WebSocket(link))
            }
            StreamProtocol::Http { target, expected } => {
                let tcp_info = self.tcp_info(&stream)?;
                let stream = self.secure(stream, target, timings).await?;
                Ok(StreamLink::Http(
                    http::begin(stream, tcp_info, self.to, target.clone(), expected.clone()).await?,
                ))
            }
        }
    }

    fn tcp_info(&self, stream: &TcpStream) -> Result<TcpInfoReader, ConnectError> {
        TcpInfoReader::of(stream)
            .map_err(|error| ConnectError::local(&format!("connecting to {}", self.to), &error))
    }

    async fn secure(
        &self,
        stream: TcpStream,
        target: &HttpTarget,
        timings: &mut ConnectTimings,
    ) -> Result<RawConnection, ConnectError> {
        let Some(TlsClient { connector, server_name }) = &target.secure else {
            return Ok(RawConnection::Plain(stream));
        };
        let start = Clock::now();
        let stream = connector.connect(stream, server_name).await.map_err(|error| {
            let kind = if error.cause == Cause::Io { ConnectErrorKind::Reset } else { ConnectErrorKind::Tls };
            ConnectError::new(kind, format!("tls with {}: {error}", self.to))
        })?;
        timings.stages.push((ConnectStage::Tls, Clock::now().since(start)));
        timings.certificate_expiry = stream.certificate_expiry();
        Ok(RawConnection::Tls(Box::new(stream)))
    }

    /// Resolves the host name through the system resolver, and measures it.
    pub(super) async fn resolve(&self, timings: &mut ConnectTimings) -> Result<(), ConnectError> {
        let Some(host) = &self.host else { return Ok(()) };
        // The permit is released when the resolver returns, even if this future was dropped.
        let permit = LOOKUPS.acquire().await.expect("the semaphore is never closed");
        let start = Clock::now();
        let name = host.clone();
        let lookup = tokio::task::spawn_blocking(move || {
            let found = (name.as_str(), 0).to_socket_addrs();
            drop(permit);
            found
        });
        let found = lookup.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        timings.stages.push((ConnectStage::Resolve, Clock::now().since(start)));
        match found.map(|mut addresses| addresses.next()) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => {
                Err(ConnectError::new(ConnectErrorKind::Unresolved, format!("{host} has no address")))
            }
            Err(error) => {
                Err(ConnectError::new(ConnectErrorKind::Unresolved, format!("looking up {host}: {error}")))
            }
        }
    }

    async fn connect_tcp(&self, to: SocketAddr, is_traced: bool) -> Result<TcpStream, ConnectError> {
        let operation = format!("connecting to {to}");
        let stream =
            self.start_connect(to, is_traced).map_err(|error| ConnectError::local(&operation, &error))?;
        let ended = match stream.writable().await {
            Ok(()) => stream.take_error().unwrap_or_else(Some),
            Err(error) => Some(error),
        };
        match ended {
            None => Ok(stream),
            Some(error) => Err(ConnectError::from_io(&operation, &error)),
        }
    }

    fn start_connect(&self, to: SocketAddr, is_traced: bool) -> io::Result<TcpStream> {
        let socket =
            Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3))?;
        match to {
            SocketAddr::V4(_) => socket.set_tos_v4(self.dscp.tos().into())?,
            SocketAddr::V6(_) => socket.set_tclass_v6(self.dscp.tos().into())?,
        }
        if is_traced && to.is_ipv6() {
            kernel::disable_flow_label(&socket)?;
        }
        if let Some(source) = self.source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        match socket.connect(&to.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        TcpStream::from_std(socket.into())
    }
}
