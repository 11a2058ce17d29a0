//! HTTP client for a single request to an agent, within a deadline.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONNECTION, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, http};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::auth::Signer;
use crate::tls::{Connector, MaybeTls, TlsError};

/// HTTP client. Each request uses a new connection.
#[derive(Debug, Clone)]
pub struct Client {
    /// Maximum duration of a request, from connecting to reading the whole response.
    pub deadline: Duration,
    /// Maximum size of a response body in bytes.
    pub answer_bytes_max: usize,
    /// Signs requests with the mesh key; `None` sends them unsigned.
    pub signer: Option<Signer>,
    /// `Authorization` header, for servers that are not agents; `None` sends none.
    pub authorization: Option<HeaderValue>,
    /// Source address; `None` lets the kernel choose.
    pub source: Option<IpAddr>,
    /// TLS settings; `None` uses plain HTTP.
    pub secure: Option<TlsClient>,
}

/// TLS settings of a client.
#[derive(Debug, Clone, PartialEq)]
pub struct TlsClient {
    /// Trusted CAs and the client certificate.
    pub connector: Connector,
    /// DNS name or IP address for which the server's certificate must be valid.
    pub server_name: String,
}

impl Default for Client {
    /// 3 s, 64 KiB, unsigned, without TLS.
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(3),
            answer_bytes_max: 64 * 1024,
            signer: None,
            authorization: None,
            source: None,
            secure: None,
        }
    }
}

impl Client {
    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(source) = self.source {
            socket.bind((source, 0).into())?;
        }
        socket.connect(to).await
    }

    async fn protect(&self, stream: TcpStream, host: &str) -> Result<MaybeTls<TcpStream>, ClientError> {
        let Some(TlsClient { connector, server_name }) = &self.secure else {
            return Ok(MaybeTls::Plain(stream));
        };
        let stream = connector.connect(stream, server_name).await;
        let stream = stream.map_err(|source| ClientError::Tls { host: host.to_owned(), source })?;
        Ok(MaybeTls::Tls(Box::new(stream)))
    }

    /// Returns the TLS error that caused `error`, if any, else `error`.
    fn cause_of(&self, host: &str, error: ClientError) -> ClientError {
        let explained = self.secure.as_ref().and_then(|secure| secure.connector.explain(&error));
        explained.map_or(error, |source| ClientError::Tls { host: host.to_owned(), source })
    }

    /// Sends `GET path` and returns the response. `path` may contain a query; `host` is the value of the
    /// `Host` header.
    ///
    /// # Errors
    /// [`ClientError`]; a response with an error status is not an error.
    pub async fn get(&self, to: SocketAddr, host: &str, path: &str) -> Result<HttpResponse, ClientError> {
        self.send(to, host, Method::GET, path, Bytes::new()).await
    }

    /// Sends a request with any method and a body; see [`Client::get`].
    ///
    /// # Errors
    /// [`ClientError`]; a response with an error status is not an error.
    pub async fn send(
        &self,
        to: SocketAddr,
        host: &str,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<HttpResponse, ClientError> {
        let request = self.build(to, host, method, path, body)?;
        let end = Instant::now() + self.deadline;
        let late = |operation| move |_| ClientError::Timeout { to, operation, after: self.deadline };
        let broken = |operation| move |source| ClientError::Protocol { to, operation, source };

        let stream = timeout_at(end, self.connect(to))
            .await
            .map_err(late("connecting to"))?
            .map_err(|source| ClientError::Connect { to, source })?;
        let stream =
            timeout_at(end, self.protect(stream, host)).await.map_err(late("TLS handshake with"))??;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(broken("sending request to"))?;
        // Dropping the set when this function returns also closes the connection.
        let mut driver = JoinSet::new();
        driver.spawn(connection);

        let response =
            timeout_at(end, sender.send_request(request)).await.map_err(late("waiting for response from"))?;
        let response = match response {
            Ok(response) => response,
            Err(error) => {
                // The error of the connection is more specific than that of the request.
                let ended = timeout_at(end, driver.join_next()).await;
                let error = match ended {
                    Ok(Some(Ok(Err(error)))) => error,
                    Ok(_) | Err(_) => error,
                };
                return Err(self.cause_of(host, broken("sending request to")(error)));
            }
        };
        let answer = timeout_at(end, self.read(to, response)).await.map_err(late("reading response from"))?;
        answer.map_err(|error| self.cause_of(host, error))
    }

    fn build(
        &self,
        to: SocketAddr,
        host: &str,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let invalid = |source| ClientError::Invalid { to, source };
        // A path without a leading slash would be parsed as a host.
        let path: http::uri::PathAndQuery =
            path.parse().map_err(|error: http::uri::InvalidUri| invalid(error.into()))?;
        let mut request = Request::builder()
            .method(method)
            .uri(http::Uri::from(path))
            .header(HOST, host)
            .header(CONNECTION, HeaderValue::from_static("close"))
            .body(body)
            .map_err(invalid)?;
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        if let Some(signer) = &self.signer {
            signer
                .sign(&mut request, SystemTime::now())
                .map_err(|source| ClientError::Unsigned { to, source })?;
        }
        Ok(request.map(Full::new))
    }

    async fn read(&self, to: SocketAddr, response: Response<Incoming>) -> Result<HttpResponse, ClientError> {
        let limit = self.answer_bytes_max;
        let too_large = ClientError::TooLarge { to, limit };
        let (head, body) = response.into_parts();
        if body.size_hint().lower() > limit as u64 {
            return Err(too_large);
        }
        match Limited::new(body, limit).collect().await {
            Ok(body) => Ok(HttpResponse { status: head.status, body: body.to_bytes() }),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large),
            Err(error) => {
                let source =
                    *error.downcast().expect("a limited body fails with its limit or with hyper's error");
                Err(ClientError::Protocol { to, operation: "reading response from", source })
            }
        }
    }
}

/// Returns a host and a port as in a URL: `fra-1:9862`, `[::1]:9862`.
#[must_use]
pub fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// A response of any status, with its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpResponse {
    /// Status code.
    pub status: StatusCode,
    /// Whole body.
    pub body: Bytes,
}

/// Why a request got no complete response.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The path or the host is not valid in a request.
    #[error("request to {to}: invalid: {source}")]
    Invalid {
        /// Address of the server.
        to: SocketAddr,
        /// What is invalid.
        source: http::Error,
    },
    /// The request could not be signed, because the kernel provided no random bytes.
    #[error("signing a request to {to}: {source}")]
    Unsigned {
        /// Address of the server.
        to: SocketAddr,
        /// Error of the kernel.
        source: getrandom::Error,
    },
    /// The connection could not be established.
    #[error("connecting to {to}: {source}")]
    Connect {
        /// Address of the server.
        to: SocketAddr,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The TLS handshake failed, or the other side rejected the client certificate later.
    #[error("tls with {host}: {source}")]
    Tls {
        /// The server, as written in the configuration or on the command line.
        host: String,
        /// Reason.
        source: TlsError,
    },
    /// The deadline expired.
    #[error("{operation} {to}: timed out after {after:?}")]
    Timeout {
        /// Address of the server.
        to: SocketAddr,
        /// Operation in progress.
        operation: &'static str,
        /// The deadline, from the start of the request.
        after: Duration,
    },
    /// The response body exceeds the size limit.
    #[error("reading response from {to}: larger than {limit} bytes")]
    TooLarge {
        /// Address of the server.
        to: SocketAddr,
        /// Size limit in bytes.
        limit: usize,
    },
    /// The response is not HTTP, or ended early.
    #[error("{operation} {to}: {source}")]
    Protocol {
        /// Address of the server.
        to: SocketAddr,
        /// Operation in progress.
        operation: &'static str,
        /// Underlying error.
        source: hyper::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::auth::Verifier;
    use pathmeter_proto::key::Keys;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;

    /// Server for one connection: sends `answer` after reading the request's head and `body` bytes, and
    /// returns what it read. `then` tells when it closes the connection.
    async fn server(answer: &'static [u8], body: usize, then: Then) -> (SocketAddr, JoinHandle<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut read = Vec::new();
            let head = b"\r\n\r\n";
            while read.windows(4).position(|end| end == head).is_none_or(|at| read.len() < at + 4 + body) {
                assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0, "the client closed early");
            }
            stream.write_all(answer).await.unwrap();
            match then {
                Then::Close => {}
                Then::Wait => {
                    let _ = stream.read_to_end(&mut Vec::new()).await;
                }
            }
            read
        });
        (address, task)
    }

    enum Then {
        Close,
        /// Waits for the client to close the connection.
        Wait,
    }

    fn client(deadline: Duration) -> Client {
        Client { deadline, answer_bytes_max: 10, ..Client::default() }
    }

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn response_has_status_and_body() {
        let (to, server) =
            server(b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnope", 0, Then::Close).await;
        let answer = client(LONG).get(to, "ams-1:9862", "/api/v1/agent?as=fra-1").await.unwrap();
        assert_eq!(answer, HttpResponse { status: StatusCode::NOT_FOUND, body: Bytes::from_static(b"nope") });
        let request = String::from_utf8(server.await.unwrap()).unwrap();
        assert_eq!(
            request,
            "GET /api/v1/agent?as=fra-1 HTTP/1.1\r\nhost: ams-1:9862\r\nconnection: close\r\n\r\n"
        );
    }

    #[tokio::test]
    async fn posted_body_is_sent() {
        let (to, server) = server(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 5, Then::Close).await;
        client(LONG).send(to, "ams-1", Method::POST, "/-/reload", "hello".into()).await.unwrap();
        let request = String::from_utf8(server.await.unwrap()).unwrap();
        assert!(request.starts_with("POST /-/reload HTTP/1.1\r\n") && request.ends_with("\r\n\r\nhello"));
    }

    #[tokio::test]
    async fn silent_server_is_a_timeout_that_names_the_server() {
        let (to, _) = server(b"", 0, Then::Wait).await;
        let error = client(SHORT).get(to, "x", "/").await.unwrap_err();
        assert_eq!(error.to_string(), format!("waiting for response from {to}: timed out after 50ms"));
    }

    #[tokio::test]
    async fn response_that_does_not_end_is_a_timeout() {
        let (to, server) = server(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nno", 0, Then::Wait).await;
        // Longer than a scheduling delay, so that the head has been read.
        let error = client(Duration::from_secs(2)).get(to, "x", "/").await.unwrap_err();
        assert_eq!(error.to_string(), format!("reading response from {to}: timed out after 2s"));
        server.await.unwrap();
    }

    #[tokio::test]
    async fn truncated_response_is_a_protocol_error() {
        let (to, _) = server(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nno", 0, Then::Close).await;
        let error = client(LONG).get(to, "x", "/").await.unwrap_err();
        assert!(
            matches!(error, ClientError::Protocol { operation: "reading response from", .. }),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn response_above_the_size_limit_is_rejected_with_and_without_content_length() {
        for answer in [
            &b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nb\r\n12345678901\r\n",
        ] {
            let (to, server) = server(answer, 0, Then::Wait).await;
            let error = client(LONG).get(to, "x", "/").await.unwrap_err();
            assert_eq!(error.to_string(), format!("reading response from {to}: larger than 10 bytes"));
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn response_that_is_not_http_is_a_protocol_error() {
        let (to, _) = server(b"220 mail.example.net ESMTP\r\n", 0, Then::Wait).await;
        let error = client(LONG).get(to, "x", "/").await.unwrap_err();
        assert!(matches!(error, ClientError::Protocol { operation: "sending request to", .. }), "{error:?}");
    }

    #[tokio::test]
    async fn refused_connection_names_the_address() {
        // Bound but not listening: the port stays reserved, and connections are refused.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let to = socket.local_addr().unwrap();
        let error = client(LONG).get(to, "x", "/").await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
        assert!(error.to_string().starts_with(&format!("connecting to {to}: Connection refused")));
    }

    #[tokio::test]
    async fn invalid_request_is_reported_before_connecting() {
        let to = "127.0.0.1:1".parse().unwrap();
        for (host, path) in [("x", "/a b"), ("two\nlines", "/")] {
            let error = client(LONG).get(to, host, path).await.unwrap_err();
            assert!(matches!(error, ClientError::Invalid { .. }), "{error:?}");
        }
    }

    #[tokio::test]
    async fn signed_request_is_accepted_by_a_verifier() {
        let mesh = Keys::parse("mesh-key-0123456789").unwrap();
        let (to, server) = server(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 5, Then::Close).await;
        let client = Client { signer: Some(Signer::new(&mesh)), ..client(LONG) };
        client.send(to, "x", Method::POST, "/-/reload?wait=1", "hello".into()).await.unwrap();

        let sent = String::from_utf8(server.await.unwrap()).unwrap();
        let proof = sent.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap();
        let request = Request::post("/-/reload?wait=1")
            .header(AUTHORIZATION, proof)
            .body(Bytes::from_static(b"hello"))
            .unwrap();
        assert_eq!(Verifier::new(&mesh).verify(&request, SystemTime::now()), Ok(()));
    }
}
