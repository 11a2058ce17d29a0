//! Members from DNS records: addresses and services.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::{RData, RecordType};

use super::MemberList;
use crate::config::discovery::Records;
use crate::config::file_sd::{self, Member};

/// A shorter TTL counts as this. Chosen: the shortest that clusters give their services.
const TTL_MIN: Duration = Duration::from_secs(5);

/// A query takes no longer, with all search domains and repetitions.
const DEADLINE: Duration = Duration::from_secs(20);

/// Asks the servers of `resolv.conf`, which is read each time. The answer is valid for its TTL, and `refresh`
/// at most.
pub(super) async fn ask(name: &str, records: Records, refresh: Duration) -> Result<MemberList, String> {
    let why = |error: &dyn std::fmt::Display| format!("looking up {name}: {error}");
    let mut builder = TokioResolver::builder_tokio().map_err(|error| why(&error))?;
    // The poller decides when to ask again.
    builder.options_mut().cache_size = 0;
    let resolver = builder.build().map_err(|error| why(&error))?;
    let looking = async {
        match records {
            Records::A => Ok(vec![resolver.lookup(name, RecordType::A).await?]),
            Records::Aaaa => Ok(vec![resolver.lookup(name, RecordType::AAAA).await?]),
            Records::Srv => Ok(vec![resolver.lookup(name, RecordType::SRV).await?]),
            Records::Both => both(&resolver, name).await,
        }
    };
    let lookups = match tokio::time::timeout(DEADLINE, looking).await {
        Ok(looked) => looked.map_err(|error: NetError| why(&error))?,
        Err(_) => return Err(why(&format_args!("no answer within {} s", DEADLINE.as_secs()))),
    };
    let found: Result<BTreeSet<Member>, String> = lookups.iter().flat_map(members).collect();
    let found = found.map_err(|error| why(&error))?;
    if found.is_empty() {
        return Err(why(&"no such records"));
    }
    let lives = lookups.iter().map(|lookup| lookup.valid_until().saturating_duration_since(Instant::now()));
    let valid = lives.fold(refresh, Duration::min).max(TTL_MIN);
    Ok(MemberList { members: found.into_iter().collect(), valid })
}

/// Addresses of both families. One may have none, but not both: a name without any address is a mistake.
///
/// A name without records of one family would be looked up in every search domain, and then as it is, which a
/// server may refuse. So once one family is found, the other is looked up under the same full name only.
async fn both(resolver: &TokioResolver, name: &str) -> Result<Vec<Lookup>, NetError> {
    let place = |found: &Lookup| found.query().name().to_string();
    let v4 = resolver.lookup(name, RecordType::A).await;
    let v6 = match &v4 {
        Ok(v4) => resolver.lookup(place(v4), RecordType::AAAA).await,
        Err(_) => resolver.lookup(name, RecordType::AAAA).await,
    };
    let v4 = match (v4, &v6) {
        (Err(error), Ok(v6)) if !error.is_no_records_found() => {
            resolver.lookup(place(v6), RecordType::A).await
        }
        (v4, _) => v4,
    };
    let mut found = Vec::new();
    for lookup in [v4, v6] {
        match lookup {
            Ok(lookup) => found.push(lookup),
            Err(error) if error.is_no_records_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn members(lookup: &Lookup) -> impl Iterator<Item = Result<Member, String>> {
    lookup.answers().iter().filter_map(|record| {
        let at = |host: String| Ok(Member { host, ..Member::default() });
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "what was not asked for, such as a name on the way"
        )]
        match &record.data {
            RData::A(address) => Some(at(address.0.to_string())),
            RData::AAAA(address) => Some(at(address.0.to_string())),
            // A target of the root says that there is no such service (RFC 2782).
            RData::SRV(service) if service.target.is_root() => None,
            RData::SRV(service) => {
                let target = service.target.to_ascii();
                Some(file_sd::service(target.trim_end_matches('.'), service.port))
            }
            _ => None,
        }
    })
}
