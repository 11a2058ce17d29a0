//! Content negotiation with scrapers, and the headers of the response.

use hyper::Response;
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, VARY,
};

use crate::http::server::Body;
use crate::metrics::ExpositionFormat;

/// Format and encoding of the page, negotiated with a scraper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Negotiated {
    pub(super) format: ExpositionFormat,
    pub(super) is_gzip: bool,
}

const CLASSIC: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

impl Negotiated {
    /// Negotiates from the request headers (RFC 9110 section 12.5). The default is the classic text format,
    /// uncompressed.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let format = match weight(headers, ACCEPT, is_open_metrics) {
            Some(open) if open > 0 && open >= weight(headers, ACCEPT, is_classic).unwrap_or(0) => {
                ExpositionFormat::OpenMetrics
            }
            Some(_) | None => ExpositionFormat::Classic,
        };
        let named = weight(headers, ACCEPT_ENCODING, |name, _| name.eq_ignore_ascii_case("gzip"));
        let gzip = named.or_else(|| weight(headers, ACCEPT_ENCODING, |name, _| name == "*"));
        Self { format, is_gzip: gzip.is_some_and(|gzip| gzip > 0) }
    }

    /// Returns the response with this page. `is_gzip` tells its actual encoding.
    pub(super) fn response(self, (page, is_gzip): (Body, bool)) -> Response<Body> {
        let mut response = Response::new(page);
        let headers = response.headers_mut();
        let kind = match self.format {
            ExpositionFormat::Classic => CLASSIC,
            ExpositionFormat::OpenMetrics => OPEN_METRICS,
        };
        headers.insert(CONTENT_TYPE, kind);
        headers.insert(VARY, HeaderValue::from_static("accept, accept-encoding"));
        if is_gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    }
}

/// Returns whether the client requests a page that was not rendered for another one (`no-cache`, RFC 9111
/// section 5.2.1.4).
pub(super) fn wants_fresh(headers: &HeaderMap) -> bool {
    weight(headers, CACHE_CONTROL, |name, _| name.eq_ignore_ascii_case("no-cache")).is_some()
}

/// Matches OpenMetrics 1.0.0. Other parameters, such as `escaping` of Prometheus, are irrelevant for ASCII
/// names.
fn is_open_metrics(name: &str, parameters: &[(&str, &str)]) -> bool {
    let version = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case("version"));
    name.eq_ignore_ascii_case("application/openmetrics-text")
        && version.is_none_or(|(_, version)| *version == "1.0.0")
}

fn is_classic(name: &str, parameters: &[(&str, &str)]) -> bool {
    let version = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case("version"));
    name.eq_ignore_ascii_case("text/plain") && version.is_none_or(|(_, version)| *version == "0.0.4")
}

/// Returns the weight, in thousandths, of the first list item that `matches_item`. Malformed items are
/// ignored.
fn weight(
    headers: &HeaderMap,
    header: hyper::header::HeaderName,
    matches_item: impl Fn(&str, &[(&str, &str)]) -> bool,
) -> Option<u32> {
    let lists = headers.get_all(header).into_iter().filter_map(|value| value.to_str().ok());
    lists.flat_map(|list| list.split(',')).find_map(|item| {
        let mut parts = item.split(';').map(str::trim);
        let name = parts.next()?;
        let parameters: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
        if !matches_item(name, &parameters) {
            return None;
        }
        match parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case("q")) {
            None => Some(1_000),
            Some((_, quality)) => thousandths(quality),
        }
    })
}

/// Parses a weight (RFC 9110 section 12.4.2), from 0 to 1 with at most three digits, into thousandths.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn negotiated(accept: &str, encoding: &str) -> (ExpositionFormat, bool) {
        let mut headers = HeaderMap::new();
        for (name, value) in [(ACCEPT, accept), (ACCEPT_ENCODING, encoding)] {
            if !value.is_empty() {
                headers.insert(name, value.parse().unwrap());
            }
        }
        let negotiated = Negotiated::of(&headers);
        (negotiated.format, negotiated.is_gzip)
    }

    #[test]
    fn open_metrics_is_chosen_if_its_weight_is_at_least_that_of_text() {
        for (accept, format) in [
            ("", ExpositionFormat::Classic),
            ("*/*", ExpositionFormat::Classic),
            ("text/plain", ExpositionFormat::Classic),
            ("application/openmetrics-text", ExpositionFormat::OpenMetrics),
            ("Application/OpenMetrics-Text; version=1.0.0", ExpositionFormat::OpenMetrics),
            ("application/openmetrics-text;version=2.0.0", ExpositionFormat::Classic),
            ("application/openmetrics-text;version=0.0.1", ExpositionFormat::Classic),
            ("application/openmetrics-text;q=0", ExpositionFormat::Classic),
            ("application/openmetrics-text;q=0.5, text/plain;q=0.6", ExpositionFormat::Classic),
            ("application/openmetrics-text;q=0.500, text/plain;q=0.5", ExpositionFormat::OpenMetrics),
            ("application/openmetrics-text;q=many, text/plain", ExpositionFormat::Classic),
            ("text/html;q=0.9, garbage;;;=, \"", ExpositionFormat::Classic),
            // Prometheus 2.42 and 3.
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                ExpositionFormat::OpenMetrics,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                ExpositionFormat::OpenMetrics,
            ),
        ] {
            assert_eq!(negotiated(accept, "").0, format, "{accept}");
        }
    }

    #[test]
    fn gzip_is_chosen_only_if_accepted() {
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
            assert_eq!(negotiated("", encoding).1, is_gzip, "{encoding}");
        }
    }

    #[test]
    fn only_no_cache_requests_a_fresh_page() {
        for (value, is_fresh) in
            [("no-cache", true), ("max-age=0, No-Cache", true), ("max-age=0", false), ("no-cached", false)]
        {
            let headers = HeaderMap::from_iter([(CACHE_CONTROL, value.parse().unwrap())]);
            assert_eq!(wants_fresh(&headers), is_fresh, "{value}");
        }
        assert!(!wants_fresh(&HeaderMap::new()));
    }
}
