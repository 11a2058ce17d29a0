//! Members from a server in the format of Prometheus' `http_sd`.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hyper::header::HeaderValue;

use super::MemberList;
use super::files::regular;
use crate::config::discovery::Credentials;
use crate::config::{Url, file_sd};
use crate::http::client::{Client, TlsClient};
use crate::resolver;

/// The longest that a list may take from one address.
const DEADLINE: Duration = Duration::from_secs(10);

/// Bytes of a list. Chosen: as many as of a configuration.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Bytes of a token or a password. Chosen: tokens with many claims have 4 KiB.
const SECRET_BYTES_MAX: u64 = 16 << 10;

/// Asks the server; its addresses are tried one after the other until one answers.
pub(super) async fn ask(
    url: &Url,
    secure: Option<TlsClient>,
    credentials: Option<Credentials>,
    refresh: Duration,
) -> Result<MemberList, String> {
    let authorization = match credentials {
        Some(credentials) => {
            let read = tokio::task::spawn_blocking(move || authorization(&credentials)).await;
            Some(read.map_err(|_| "reading was interrupted".to_owned())??)
        }
        None => None,
    };
    let client = Client {
        deadline: DEADLINE,
        answer_bytes_max: ANSWER_BYTES_MAX,
        authorization,
        secure,
        ..Client::default()
    };
    let mut why = format!("{} has no address", url.host);
    for address in resolver::once(&url.host).await? {
        match client.get(SocketAddr::new(address, url.port), &url.authority(), &url.path).await {
            Ok(answer) if answer.status == hyper::StatusCode::OK => {
                let shown = format!("the answer of {}", url.authority());
                let members =
                    file_sd::read(&answer.body).map_err(|problems| problems.display(&shown).to_string())?;
                return Ok(MemberList { members, valid: refresh });
            }
            Ok(answer) => {
                return Err(format!("{} answered {} at {}", url.authority(), answer.status, url.path));
            }
            Err(error) => why = error.to_string(),
        }
    }
    Err(why)
}

/// The `Authorization` header; the files are read each time.
fn authorization(credentials: &Credentials) -> Result<HeaderValue, String> {
    let (text, path) = match credentials {
        Credentials::Bearer { file } => (format!("Bearer {}", secret(file)?), file),
        Credentials::Basic { username, password_file } => {
            let pair = format!("{username}:{}", secret(password_file)?);
            (format!("Basic {}", BASE64_STANDARD.encode(pair)), password_file)
        }
    };
    let mut header = HeaderValue::from_str(&text)
        .map_err(|_| format!("{}: has characters that are not allowed in an HTTP header", path.display()))?;
    header.set_sensitive(true);
    Ok(header)
}

/// The text of a file, without leading and trailing white space.
fn secret(path: &Path) -> Result<String, String> {
    let at = |what: String| format!("{}: {what}", path.display());
    let mut text = String::new();
    let file = regular(path).map_err(|error| at(error.to_string()))?;
    file.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| at(error.to_string()))?;
    match text.trim() {
        "" => Err(at("is empty".to_owned())),
        _ if text.len() as u64 > SECRET_BYTES_MAX => {
            Err(at(format!("is too long for a secret: more than {SECRET_BYTES_MAX} bytes")))
        }
        text => Ok(text.to_owned()),
    }
}
