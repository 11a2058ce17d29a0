//! A minimal WebSocket client that can misbehave.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};

use socket2::{Domain, Socket, Type};

use crate::fixture::{DEADLINE, Host};

pub(super) const TEXT: u8 = 0x81;
pub(super) const BINARY: u8 = 0x82;
pub(super) const PING: u8 = 0x89;
pub(super) const CLOSE: u8 = 0x88;

/// A client that sends exactly the given frames.
#[derive(Debug)]
pub(super) struct RawClient {
    pub(super) stream: TcpStream,
}

/// Response to a request for an upgrade.
#[derive(Debug)]
pub(super) struct UpgradeResponse {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl RawClient {
    /// Opens a connection that the agent accepts.
    pub(super) fn open(to: &Host) -> Self {
        Self::open_from(to, "127.0.0.1".parse().unwrap())
    }

    pub(super) fn open_from(to: &Host, from: IpAddr) -> Self {
        let (raw_client, response) = Self::request_upgrade(to, from, &[]);
        assert_eq!(response.status, 101, "{response:?}");
        raw_client
    }

    /// Requests an upgrade with changed headers; an empty value omits one.
    pub(super) fn request_upgrade(
        to: &Host,
        from: IpAddr,
        changed: &[(&str, &str)],
    ) -> (Self, UpgradeResponse) {
        Self::request_upgrade_of("/ws", to, from, changed)
    }

    /// [`Self::request_upgrade`] of another path.
    pub(super) fn request_upgrade_of(
        path: &str,
        to: &Host,
        from: IpAddr,
        changed: &[(&str, &str)],
    ) -> (Self, UpgradeResponse) {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
        socket.connect_timeout(&to.service_address().into(), DEADLINE).unwrap();
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let host = to.service_address().to_string();
        let defaults = [
            ("Host", host.as_str()),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("Sec-WebSocket-Version", "13"),
        ];
        let kept = defaults.iter().filter(|(name, _)| !changed.iter().any(|(other, _)| other == name));
        let headers = kept.chain(changed).filter(|(_, value)| !value.is_empty());
        let headers: String = headers.map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        write!(stream, "GET {path} HTTP/1.1\r\n{headers}\r\n").unwrap();

        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        stream.read_exact(&mut body).unwrap();
        (Self { stream }, UpgradeResponse { status, head, body: String::from_utf8(body).unwrap() })
    }

    /// Sends a frame, masked with zeros.
    pub(super) fn send(&mut self, first: u8, payload: &[u8]) -> io::Result<()> {
        self.stream.write_all(&frame(first, payload))
    }

    /// The next frame: its first byte and its payload.
    pub(super) fn receive(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head)?;
        let length = match head[1] {
            126 => {
                let mut length = [0; 2];
                self.stream.read_exact(&mut length)?;
                usize::from(u16::from_be_bytes(length))
            }
            127 => {
                let mut length = [0; 8];
                self.stream.read_exact(&mut length)?;
                usize::try_from(u64::from_be_bytes(length)).unwrap()
            }
            short => usize::from(short),
        };
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload)?;
        Ok((head[0], payload))
    }

    /// Sends a message and asserts that it is echoed.
    pub(super) fn echo(&mut self, body: &str) {
        self.send(TEXT, body.as_bytes()).unwrap();
        assert_eq!(self.receive().unwrap(), (TEXT, body.as_bytes().to_vec()));
    }

    /// The code of the close frame from the agent.
    pub(super) fn closed(&mut self) -> u16 {
        let (first, payload) = self.receive().unwrap();
        assert_eq!(first, CLOSE, "{payload:?}");
        u16::from_be_bytes([payload[0], payload[1]])
    }
}

pub(super) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match u16::try_from(payload.len()) {
        Ok(length @ ..126) => frame.push(0x80 | u8::try_from(length).unwrap()),
        Ok(length) => {
            frame.push(0xfe);
            frame.extend(length.to_be_bytes());
        }
        Err(_) => {
            frame.push(0xff);
            frame.extend((payload.len() as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}
