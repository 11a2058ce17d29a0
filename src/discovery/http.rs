//! Lists from a server, as Prometheus' `http_sd` has them.

use std::net::SocketAddr;
use std::time::Duration;

use super::Answer;
use crate::config::{Url, inventory};
use crate::http::client::{Client, Secure};
use crate::resolver;

/// The longest that a list may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// Bytes of a list. Chosen: as many as of a configuration.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// What the server knows; its addresses are tried one after the other until one answers.
pub(super) async fn ask(url: &Url, secure: Option<Secure>, refresh: Duration) -> Result<Answer, String> {
    let client =
        Client { deadline: DEADLINE, answer_bytes_max: ANSWER_BYTES_MAX, secure, ..Client::default() };
    let mut why = format!("{} has no address", url.host);
    for address in resolver::once(&url.host).await? {
        match client.get(SocketAddr::new(address, url.port), &url.authority(), &url.path).await {
            Ok(answer) if answer.status == hyper::StatusCode::OK => {
                let shown = format!("the answer of {}", url.authority());
                let members =
                    inventory::read(&answer.body).map_err(|problems| problems.display(&shown).to_string())?;
                return Ok(Answer { members, again: refresh });
            }
            Ok(answer) => {
                return Err(format!("{} answered {} at {}", url.authority(), answer.status, url.path));
            }
            Err(error) => why = error.to_string(),
        }
    }
    Err(why)
}
