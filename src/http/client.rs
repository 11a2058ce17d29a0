//! One request to one agent, within a deadline.

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

/// How requests are made. Every request has a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    /// The longest a request may take: connecting, asking and reading the whole answer.
    pub deadline: Duration,
    /// The most bytes an answer's body may have.
    pub answer_bytes_max: usize,
    /// Proves requests with the mesh key; `None`: they are sent without a proof.
    pub signer: Option<Signer>,
    /// The `Authorization` header, for servers that are no agents; `None`: none.
    pub authorization: Option<HeaderValue>,
    /// The address to ask from; `None`: the kernel's choice.
    pub source: Option<IpAddr>,
    /// Asks with TLS; `None`: plain.
    pub secure: Option<TlsClient>,
}

/// How a server is asked with TLS.
#[derive(Debug, Clone, PartialEq)]
pub struct TlsClient {
    /// Whom we believe, and who we are.
    pub connector: Connector,
    /// The DNS name or IP address that the server's certificate must have.
    pub server_name: String,
}

impl Default for Client {
    /// 3 s, 64 KiB, unsigned, plain.
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

    /// The error of a request, or what was wrong with TLS below it.
    fn why(&self, host: &str, error: ClientError) -> ClientError {
        let explained = self.secure.as_ref().and_then(|secure| secure.connector.explain(&error));
        explained.map_or(error, |source| ClientError::Tls { host: host.to_owned(), source })
    }

    /// The answer to `GET path`, where `path` may carry a query and `host` is what the `Host` header says.
    ///
    /// # Errors
    /// [`ClientError`]; an answer of any status is not one.
    pub async fn get(&self, to: SocketAddr, host: &str, path: &str) -> Result<HttpResponse, ClientError> {
        self.ask(to, host, Method::GET, path, Bytes::new()).await
    }

    /// The answer to `POST path`; see [`Client::get`].
    ///
    /// # Errors
    /// [`ClientError`]; an answer of any status is not one.
    pub async fn post(
        &self,
        to: SocketAddr,
        host: &str,
        path: &str,
        body: impl Into<Bytes>,
    ) -> Result<HttpResponse, ClientError> {
        self.ask(to, host, Method::POST, path, body.into()).await
    }

    async fn ask(
        &self,
        to: SocketAddr,
        host: &str,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<HttpResponse, ClientError> {
        let request = self.request(to, host, method, path, body)?;
        let end = Instant::now() + self.deadline;
        let late = |operation| move |_| ClientError::Timeout { to, operation, after: self.deadline };
        let broken = |operation| move |source| ClientError::Protocol { to, operation, source };

        let stream = timeout_at(end, self.connect(to))
            .await
            .map_err(late("connecting to"))?
            .map_err(|source| ClientError::Connect { to, source })?;
        let stream =
            timeout_at(end, self.protect(stream, host)).await.map_err(late("shaking hands with"))??;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(broken("asking"))?;
        // Dropped, and with it the connection, however this function ends.
        let mut driver = JoinSet::new();
        driver.spawn(connection);

        let response =
            timeout_at(end, sender.send_request(request)).await.map_err(late("waiting for an answer of"))?;
        let response = match response {
            Ok(response) => response,
            Err(error) => {
                // What broke the connection says more than that it broke.
                let ended = timeout_at(end, driver.join_next()).await;
                let error = match ended {
                    Ok(Some(Ok(Err(error)))) => error,
                    Ok(_) | Err(_) => error,
                };
                return Err(self.why(host, broken("asking")(error)));
            }
        };
        let answer = timeout_at(end, self.read(to, response)).await.map_err(late("reading the answer of"))?;
        answer.map_err(|error| self.why(host, error))
    }

    fn request(
        &self,
        to: SocketAddr,
        host: &str,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let invalid = |source| ClientError::Invalid { to, source };
        // Without a slash the text would be read as a host.
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
                let source = *error.downcast().expect("a limited body fails by its limit or as hyper's does");
                Err(ClientError::Protocol { to, operation: "reading the answer of", source })
            }
        }
    }
}

/// A host and a port as a URL has them: `fra-1:9862`, `[::1]:9862`.
#[must_use]
pub fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpResponse {
    /// The status.
    pub status: StatusCode,
    /// The body.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The path or the host cannot be sent.
    #[error("asking {to}: not a request: {source}")]
    Invalid {
        /// Whom we would have asked.
        to: SocketAddr,
        /// What is wrong with it.
        source: http::Error,
    },
    /// The kernel gave no random bytes for the proof.
    #[error("signing a request to {to}: {source}")]
    Unsigned {
        /// Whom we would have asked.
        to: SocketAddr,
        /// What the kernel said.
        source: getrandom::Error,
    },
    /// No connection.
    #[error("connecting to {to}: {source}")]
    Connect {
        /// Whom we asked.
        to: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody answers whom we cannot believe, or who does not believe us.
    #[error("tls with {host}: {source}")]
    Tls {
        /// Whom we asked, as the configuration or the command line has it.
        host: String,
        /// Why.
        source: TlsError,
    },
    /// The deadline passed.
    #[error("{operation} {to}: timed out after {after:?}")]
    Timeout {
        /// Whom we asked.
        to: SocketAddr,
        /// What was going on.
        operation: &'static str,
        /// The deadline, counted from the beginning of the request.
        after: Duration,
    },
    /// The answer's body is too large to be one of ours.
    #[error("reading the answer of {to}: larger than {limit} bytes")]
    TooLarge {
        /// Whom we asked.
        to: SocketAddr,
        /// The most we take.
        limit: usize,
    },
    /// The other side does not speak HTTP, or stopped in the middle.
    #[error("{operation} {to}: {source}")]
    Protocol {
        /// Whom we asked.
        to: SocketAddr,
        /// What was going on.
        operation: &'static str,
        /// What is wrong.
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

    /// A server for one connection: says `answer` when it has read the request's head and `body` bytes, and returns
    /// what it read. Closes when told by `then`.
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
        /// Wait for the client to close.
        Wait,
    }

    fn client(deadline: Duration) -> Client {
        Client { deadline, answer_bytes_max: 10, ..Client::default() }
    }

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn an_answer_is_its_status_and_body() {
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
    async fn a_posted_body_arrives() {
        let (to, server) = server(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 5, Then::Close).await;
        client(LONG).post(to, "ams-1", "/-/reload", "hello").await.unwrap();
        let request = String::from_utf8(server.await.unwrap()).unwrap();
        assert!(request.starts_with("POST /-/reload HTTP/1.1\r\n") && request.ends_with("\r\n\r\nhello"));
    }

    #[tokio::test]
    async fn a_silent_server_is_a_timeout_that_names_it() {
        let (to, _) = server(b"", 0, Then::Wait).await;
        let error = client(SHORT).get(to, "x", "/").await.unwrap_err();
        assert_eq!(error.to_string(), format!("waiting for an answer of {to}: timed out after 50ms"));
    }

    #[tokio::test]
    async fn an_answer_that_does_not_end_is_a_timeout() {
        let (to, server) = server(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nno", 0, Then::Wait).await;
        // Longer than a scheduling delay: the head must have been read.
        let error = client(Duration::from_secs(2)).get(to, "x", "/").await.unwrap_err();
        assert_eq!(error.to_string(), format!("reading the answer of {to}: timed out after 2s"));
        server.await.unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_stops_in_the_middle_is_no_answer() {
        let (to, _) = server(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nno", 0, Then::Close).await;
        let error = client(LONG).get(to, "x", "/").await.unwrap_err();
        assert!(
            matches!(error, ClientError::Protocol { operation: "reading the answer of", .. }),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn an_answer_beyond_the_limit_is_refused_announced_or_not() {
        for answer in [
            &b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nb\r\n12345678901\r\n",
        ] {
            let (to, server) = server(answer, 0, Then::Wait).await;
            let error = client(LONG).get(to, "x", "/").await.unwrap_err();
            assert_eq!(error.to_string(), format!("reading the answer of {to}: larger than 10 bytes"));
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn something_that_is_not_http_is_a_protocol_error() {
        let (to, _) = server(b"220 mail.example.net ESMTP\r\n", 0, Then::Wait).await;
        let error = client(LONG).get(to, "x", "/").await.unwrap_err();
        assert!(matches!(error, ClientError::Protocol { operation: "asking", .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_refused_connection_names_the_address() {
        // Bound and not listening: nobody else can take the port, and it refuses.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let to = socket.local_addr().unwrap();
        let error = client(LONG).get(to, "x", "/").await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
        assert!(error.to_string().starts_with(&format!("connecting to {to}: Connection refused")));
    }

    #[tokio::test]
    async fn what_cannot_be_sent_is_said_before_connecting() {
        let to = "127.0.0.1:1".parse().unwrap();
        for (host, path) in [("x", "/a b"), ("two\nlines", "/")] {
            let error = client(LONG).get(to, host, path).await.unwrap_err();
            assert!(matches!(error, ClientError::Invalid { .. }), "{error:?}");
        }
    }

    #[tokio::test]
    async fn a_signed_request_is_believed_by_a_verifier() {
        let mesh = Keys::parse("mesh-key-0123456789").unwrap();
        let (to, server) = server(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 5, Then::Close).await;
        let client = Client { signer: Some(Signer::new(&mesh)), ..client(LONG) };
        client.post(to, "x", "/-/reload?wait=1", "hello").await.unwrap();

        let sent = String::from_utf8(server.await.unwrap()).unwrap();
        let proof = sent.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap();
        let request = Request::post("/-/reload?wait=1")
            .header(AUTHORIZATION, proof)
            .body(Bytes::from_static(b"hello"))
            .unwrap();
        assert_eq!(Verifier::new(&mesh).verify(&request, SystemTime::now()), Ok(()));
    }
}
