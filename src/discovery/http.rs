//! Reads members from an HTTP server in the format of Prometheus' `http_sd`.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use headers::{Authorization, HeaderMapExt as _};
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};

use super::MemberList;
use super::files::open_regular;
use crate::config::discovery::Credentials;
use crate::config::{Url, file_sd};
use crate::http::client::{Client, TlsClient};
use crate::resolver;

/// Timeout of a request to one address.
const DEADLINE: Duration = Duration::from_secs(10);

/// Maximum bytes of a list. Chosen: as many as of a configuration.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Maximum bytes of a token or a password. Chosen: tokens with many claims have 4 KiB.
const SECRET_BYTES_MAX: u64 = 16 << 10;

/// Requests the list. The addresses of the server are tried one after another until one responds.
pub(super) async fn request(
    url: &Url,
    secure: Option<TlsClient>,
    credentials: Option<Credentials>,
    refresh: Duration,
) -> Result<MemberList, String> {
    let authorization = match credentials {
        Some(credentials) => {
            let read = tokio::task::spawn_blocking(move || authorization(&credentials)).await;
            Some(read.map_err(|_| "reading the credentials was interrupted".to_owned())??)
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
    let mut error = format!("{} has no address", url.host);
    for address in resolver::once(&url.host).await? {
        match client.get(SocketAddr::new(address, url.port), &url.authority(), &url.path).await {
            Ok(response) if response.status == hyper::StatusCode::OK => {
                let source = format!("the list from {}", url.authority());
                let members = file_sd::read(&response.body)
                    .map_err(|problems| problems.display(&source).to_string())?;
                return Ok(MemberList { members, valid: refresh });
            }
            Ok(response) => {
                return Err(format!(
                    "{} responded with {} to {}",
                    url.authority(),
                    response.status,
                    url.path
                ));
            }
            Err(failed) => error = failed.to_string(),
        }
    }
    Err(error)
}

/// The value of the `Authorization` header. The files are read for each request.
fn authorization(credentials: &Credentials) -> Result<HeaderValue, String> {
    let mut headers = HeaderMap::new();
    match credentials {
        Credentials::Bearer { file } => {
            let token = Authorization::bearer(&read_secret(file)?);
            headers.typed_insert(token.map_err(|_| {
                format!("{}: contains characters that are not allowed in an HTTP header", file.display())
            })?);
        }
        Credentials::Basic { username, password_file } => {
            headers.typed_insert(Authorization::basic(username, &read_secret(password_file)?));
        }
    }
    Ok(headers.remove(AUTHORIZATION).expect("either scheme inserts it"))
}

/// Reads a file; returns its text without leading and trailing white space.
fn read_secret(path: &Path) -> Result<String, String> {
    let describe = |what: String| format!("{}: {what}", path.display());
    let mut text = String::new();
    let file = open_regular(path).map_err(|error| describe(error.to_string()))?;
    file.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| describe(error.to_string()))?;
    match text.trim() {
        "" => Err(describe("is empty".to_owned())),
        _ if text.len() as u64 > SECRET_BYTES_MAX => {
            Err(describe(format!("is too long: more than {SECRET_BYTES_MAX} bytes")))
        }
        text => Ok(text.to_owned()),
    }
}
