//! The names of routers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use crate::resolver;

/// How long to look up names.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Looks up the names of routers and lists those that have one. Not before the measurement has ended, which
/// queries of the DNS would disturb.
pub(super) async fn names_text(routers: Vec<IpAddr>) -> String {
    let names = resolver::names_of(routers.clone(), TIMEOUT).await;
    list(&routers, &names)
}

/// A list of the routers that have names, in this order, or nothing.
fn list(routers: &[IpAddr], names: &BTreeMap<IpAddr, String>) -> String {
    let named = routers.iter().filter_map(|router| Some((router.to_string(), names.get(router)?)));
    let named: Vec<(String, &String)> = named.collect();
    let Some(width) = named.iter().map(|(router, _)| router.len()).max() else {
        return String::new();
    };
    let mut text = "\nnames\n".to_owned();
    for (router, name) in named {
        let _ = writeln!(text, "  {router:<width$}  {name}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routers_with_names_are_listed_in_the_order_of_the_hops() {
        let routers = [[10, 9, 1, 2], [10, 9, 0, 254], [10, 9, 0, 3]].map(IpAddr::from);
        let names = [(routers[0], "b.example.net".to_owned()), (routers[1], "a.example.net".to_owned())];
        let expected = "\nnames\n  10.9.1.2    b.example.net\n  10.9.0.254  a.example.net\n";
        assert_eq!(list(&routers, &names.into()), expected);
        assert_eq!(list(&routers, &BTreeMap::new()), "");
    }
}
