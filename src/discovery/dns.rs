//! Hosts that the DNS knows of.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::{RData, RecordType};

use super::Answer;
use crate::config::discovery::Records;
use crate::config::inventory::Member;

/// The shortest time to live that is followed. Chosen: what clusters give their services at the least; more often is asked of
/// no server.
const TTL_MIN: Duration = Duration::from_secs(5);

/// A question, with all its search domains and repetitions, takes no longer.
const DEADLINE: Duration = Duration::from_secs(20);

/// Asks the servers of the host's `resolv.conf`, as it is now. The answer holds for as long as it lives, `refresh` at most.
pub(super) async fn ask(name: &str, records: Records, refresh: Duration) -> Result<Answer, String> {
    let why = |error: &dyn std::fmt::Display| format!("looking up {name}: {error}");
    let mut builder = TokioResolver::builder_tokio().map_err(|error| why(&error))?;
    // When to ask again is decided here.
    builder.options_mut().cache_size = 0;
    let resolver = builder.build().map_err(|error| why(&error))?;
    let types: &[RecordType] = match records {
        Records::A => &[RecordType::A],
        Records::Aaaa => &[RecordType::AAAA],
        Records::Both => &[RecordType::A, RecordType::AAAA],
        Records::Srv => &[RecordType::SRV],
    };
    let mut found = BTreeSet::new();
    let mut again = refresh;
    let looking = async {
        for record_type in types {
            match resolver.lookup(name, *record_type).await {
                Ok(lookup) => {
                    again = again.min(lookup.valid_until().saturating_duration_since(Instant::now()));
                    found.extend(members(&lookup));
                }
                // One family of two may be empty, but not both: a service has at least us, and a name that is gone is a mistake.
                Err(error) if error.is_no_records_found() && records == Records::Both => {}
                Err(error) => return Err(error),
            }
        }
        Ok::<(), NetError>(())
    };
    match tokio::time::timeout(DEADLINE, looking).await {
        Ok(Ok(())) if found.is_empty() => Err(why(&"there are no such records")),
        Ok(Ok(())) => Ok(Answer { members: found.into_iter().collect(), again: again.max(TTL_MIN) }),
        Ok(Err(error)) => Err(why(&error)),
        Err(_) => Err(why(&format_args!("no answer within {} s", DEADLINE.as_secs()))),
    }
}

fn members(lookup: &Lookup) -> impl Iterator<Item = Member> {
    lookup.answers().iter().filter_map(|record| {
        let at = |host: String| Member { host, ..Member::default() };
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "what was not asked for, such as a name on the way"
        )]
        match &record.data {
            RData::A(address) => Some(at(address.0.to_string())),
            RData::AAAA(address) => Some(at(address.0.to_string())),
            RData::SRV(service) => {
                let host = service.target.to_ascii().trim_end_matches('.').to_owned();
                Some(Member { name: Some(host.clone()), port: Some(service.port), ..at(host) })
            }
            _ => None,
        }
    })
}
