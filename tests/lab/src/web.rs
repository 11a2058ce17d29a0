//! A minimal HTTP/1.0 client.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use crate::DEADLINE;

/// An HTTP response.
#[derive(Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Status line and headers.
    pub head: String,
    /// Body.
    pub body: String,
}

impl Response {
    /// The value of a header; `name` is lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Sends a GET request and returns the response.
///
/// # Errors
/// Connection errors, and a response that cannot be parsed.
pub fn get(to: SocketAddr, path: &str) -> io::Result<Response> {
    request("GET", to, path)
}

/// Sends a request without a body and returns the response. HTTP/1.0: the response ends when the connection
/// closes. `Cache-Control: no-cache` prevents a shared metrics page that is up to a second older than the
/// request.
pub fn request(method: &str, to: SocketAddr, path: &str) -> io::Result<Response> {
    let mut stream = TcpStream::connect_timeout(&to, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: {to}\r\nCache-Control: no-cache\r\nContent-Length: 0\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let parts = text.split_once("\r\n\r\n");
    let (head, body) = parts.ok_or_else(|| io::Error::other(format!("no response to {path}: {text:?}")))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no status in {head:?}")))?;
    Ok(Response { status, head: head.to_owned(), body: body.to_owned() })
}
