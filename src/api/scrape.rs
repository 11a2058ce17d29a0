//! The answer to a scrape: in the format and the encoding that the client likes, made as the client takes it.

use std::convert::Infallible;
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http_body_util::BodyExt as _;
use hyper::Response;
use hyper::body::Frame;
use hyper::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, VARY};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::http::server::Body;
use crate::metrics::{Format, Page};

/// How a scrape wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Negotiated {
    pub(super) format: Format,
    is_gzip: bool,
}

const CLASSIC: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

impl Negotiated {
    /// What the headers say (RFC 9110 section 12.5). Who says nothing, or nothing that we have, gets the classic text as it is.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let format = match weight(headers, ACCEPT, is_open_metrics) {
            Some(open) if open > 0 && open >= weight(headers, ACCEPT, is_classic).unwrap_or(0) => {
                Format::OpenMetrics
            }
            Some(_) | None => Format::Classic,
        };
        let named = weight(headers, ACCEPT_ENCODING, |name, _| name.eq_ignore_ascii_case("gzip"));
        let gzip = named.or_else(|| weight(headers, ACCEPT_ENCODING, |name, _| name == "*"));
        Self { format, is_gzip: gzip.is_some_and(|gzip| gzip > 0) }
    }

    /// The answer, packed if that is wished and one of the `packers` is free.
    pub(super) fn answer(self, page: Page, packers: &Packers) -> Response<Body> {
        let packer = if self.is_gzip { packers.take() } else { None };
        let is_gzip = packer.is_some();
        let mut response = Response::new(Scrape { page, packer, is_over: false }.boxed_unsync());
        let headers = response.headers_mut();
        let kind = match self.format {
            Format::Classic => CLASSIC,
            Format::OpenMetrics => OPEN_METRICS,
        };
        headers.insert(CONTENT_TYPE, kind);
        headers.insert(VARY, HeaderValue::from_static("accept, accept-encoding"));
        if is_gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    }
}

/// What packs pages. Each takes 0.3 MiB until its page is over, so there are few.
#[derive(Debug, Clone)]
pub struct Packers(Arc<Semaphore>);

/// Pages that are packed at once; further ones come as they are. Chosen: 10 MiB, and more scrapers than anybody has.
const PACKED_AT_ONCE: usize = 32;

impl Default for Packers {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(PACKED_AT_ONCE)))
    }
}

impl Packers {
    /// One that is free.
    fn take(&self) -> Option<Packer> {
        let place = Arc::clone(&self.0).try_acquire_owned().ok()?;
        Some(Packer { encoder: GzEncoder::new(Vec::new(), LEVEL), _place: place })
    }
}

/// Packs one page.
struct Packer {
    encoder: GzEncoder<Vec<u8>>,
    _place: OwnedSemaphorePermit,
}

/// The fastest: a page repeats itself so much that the best level saves little more.
const LEVEL: Compression = Compression::fast();

/// OpenMetrics 1.0.0; further parameters, such as Prometheus' `escaping`, change nothing for names like ours.
fn is_open_metrics(name: &str, parameters: &[(&str, &str)]) -> bool {
    let version = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case("version"));
    name.eq_ignore_ascii_case("application/openmetrics-text")
        && version.is_none_or(|(_, version)| *version == "1.0.0")
}

fn is_classic(name: &str, parameters: &[(&str, &str)]) -> bool {
    let version = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case("version"));
    name.eq_ignore_ascii_case("text/plain") && version.is_none_or(|(_, version)| *version == "0.0.4")
}

/// The weight, in thousandths, of the first item of a list that fits. What cannot be read fits nothing.
fn weight(
    headers: &HeaderMap,
    header: hyper::header::HeaderName,
    fits: impl Fn(&str, &[(&str, &str)]) -> bool,
) -> Option<u32> {
    let lists = headers.get_all(header).into_iter().filter_map(|value| value.to_str().ok());
    lists.flat_map(|list| list.split(',')).find_map(|item| {
        let mut parts = item.split(';').map(str::trim);
        let name = parts.next()?;
        let parameters: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
        if !fits(name, &parameters) {
            return None;
        }
        match parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case("q")) {
            None => Some(1_000),
            Some((_, quality)) => thousandths(quality),
        }
    })
}

/// A weight as RFC 9110 section 12.4.2 writes it: 0 to 1 with three digits at most.
fn thousandths(text: &str) -> Option<u32> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.len() > 3 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let fraction: u32 = format!("{fraction:0<3}").parse().ok()?;
    match whole {
        "0" => Some(fraction),
        "1" if fraction == 0 => Some(1_000),
        _ => None,
    }
}

/// A page that is made as the client takes it: nothing is made ahead.
struct Scrape {
    page: Page,
    packer: Option<Packer>,
    is_over: bool,
}

impl Scrape {
    /// The next piece, empty at the end.
    fn next(&mut self) -> Vec<u8> {
        let mut piece = Vec::with_capacity(Page::PIECE + Page::PIECE / 4);
        let Some(Packer { encoder: packer, .. }) = &mut self.packer else {
            self.page.next(&mut piece);
            return piece;
        };
        while !self.is_over && packer.get_ref().is_empty() {
            piece.clear();
            let packed = match self.page.next(&mut piece) {
                true => packer.write_all(&piece),
                false => {
                    self.is_over = true;
                    packer.try_finish()
                }
            };
            packed.expect("memory takes everything");
        }
        std::mem::take(packer.get_mut())
    }
}

impl hyper::body::Body for Scrape {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.next();
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(Bytes::from(piece)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(accept: &str, encoding: &str) -> (Format, bool) {
        let mut headers = HeaderMap::new();
        for (name, value) in [(ACCEPT, accept), (ACCEPT_ENCODING, encoding)] {
            if !value.is_empty() {
                headers.insert(name, value.parse().unwrap());
            }
        }
        let wish = Negotiated::of(&headers);
        (wish.format, wish.is_gzip)
    }

    #[test]
    fn open_metrics_is_for_those_who_like_it_at_least_as_much_as_text() {
        for (accept, format) in [
            ("", Format::Classic),
            ("*/*", Format::Classic),
            ("text/plain", Format::Classic),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("Application/OpenMetrics-Text; version=1.0.0", Format::OpenMetrics),
            ("application/openmetrics-text;version=2.0.0", Format::Classic),
            ("application/openmetrics-text;version=0.0.1", Format::Classic),
            ("application/openmetrics-text;q=0", Format::Classic),
            ("application/openmetrics-text;q=0.5, text/plain;q=0.6", Format::Classic),
            ("application/openmetrics-text;q=0.500, text/plain;q=0.5", Format::OpenMetrics),
            ("application/openmetrics-text;q=many, text/plain", Format::Classic),
            ("text/html;q=0.9, garbage;;;=, \"", Format::Classic),
            // Prometheus 2.42 and 3.
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                Format::OpenMetrics,
            ),
        ] {
            assert_eq!(wish(accept, "").0, format, "{accept}");
        }
    }

    #[test]
    fn only_who_takes_gzip_gets_it() {
        for (encoding, is_gzip) in [
            ("", false),
            ("gzip", true),
            ("GZIP;q=0.1", true),
            ("deflate, gzip, br", true),
            ("*", true),
            ("*;q=0", false),
            ("gzip;q=0, *", false),
            ("gzip;q=0.000", false),
            ("identity", false),
            ("br", false),
            ("gzip;q=1.5", false),
        ] {
            assert_eq!(wish("", encoding).1, is_gzip, "{encoding}");
        }
    }

    #[test]
    fn with_no_packer_free_a_page_comes_as_it_is() {
        let packers = Packers::default();
        let mut busy: Vec<Packer> = (0..PACKED_AT_ONCE).map(|_| packers.take().unwrap()).collect();
        assert!(packers.take().is_none());
        drop(busy.pop());
        assert!(packers.take().is_some());
    }
}
