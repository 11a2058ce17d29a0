//! Reads members from DNS records: addresses and services.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::{RData, RecordType};

use super::MemberList;
use crate::config::discovery::Records;
use crate::config::file_sd::{self, Member};

/// Minimum TTL; a shorter one is replaced by it. Chosen: the shortest TTL that clusters use for their
/// services.
const TTL_MIN: Duration = Duration::from_secs(5);

/// Timeout of a lookup with all search domains and repetitions.
const DEADLINE: Duration = Duration::from_secs(20);

/// Looks up a name with the servers of `resolv.conf`, which is read each time. The result is valid for its
/// TTL, at most for `refresh`.
pub(super) async fn query(name: &str, records: Records, refresh: Duration) -> Result<MemberList, String> {
    let describe = |error: &dyn std::fmt::Display| format!("looking up {name}: {error}");
    let mut builder = TokioResolver::builder_tokio().map_err(|error| describe(&error))?;
    // The poller decides when to query again.
    builder.options_mut().cache_size = 0;
    let resolver = builder.build().map_err(|error| describe(&error))?;
    let lookups = async {
        match records {
            Records::A => Ok(vec![resolver.lookup(name, RecordType::A).await?]),
            Records::Aaaa => Ok(vec![resolver.lookup(name, RecordType::AAAA).await?]),
            Records::Srv => Ok(vec![resolver.lookup(name, RecordType::SRV).await?]),
            Records::Both => both(&resolver, name).await,
        }
    };
    let lookups = match tokio::time::timeout(DEADLINE, lookups).await {
        Ok(lookups) => lookups.map_err(|error: NetError| describe(&error))?,
        Err(_) => return Err(describe(&format_args!("timed out after {} s", DEADLINE.as_secs()))),
    };
    let members: Result<BTreeSet<Member>, String> = lookups.iter().flat_map(members_of).collect();
    let members = members.map_err(|error| describe(&error))?;
    if members.is_empty() {
        return Err(describe(&"no records of this type"));
    }
    let ttls = lookups.iter().map(|lookup| lookup.valid_until().saturating_duration_since(Instant::now()));
    let valid = ttls.fold(refresh, Duration::min).max(TTL_MIN);
    Ok(MemberList { members: members.into_iter().collect(), valid })
}

/// Looks up addresses of both families. It is an error if neither family has addresses.
///
/// A name without records of one family would be looked up in each search domain and then as it is, which a
/// server may refuse. So once one family is found, the other is looked up only under the same full name.
async fn both(resolver: &TokioResolver, name: &str) -> Result<Vec<Lookup>, NetError> {
    let full_name = |lookup: &Lookup| lookup.query().name().to_string();
    let v4 = resolver.lookup(name, RecordType::A).await;
    let v6 = match &v4 {
        Ok(v4) => resolver.lookup(full_name(v4), RecordType::AAAA).await,
        Err(_) => resolver.lookup(name, RecordType::AAAA).await,
    };
    let v4 = match (v4, &v6) {
        (Err(error), Ok(v6)) if !error.is_no_records_found() => {
            resolver.lookup(full_name(v6), RecordType::A).await
        }
        (v4, _) => v4,
    };
    let mut lookups = Vec::new();
    for lookup in [v4, v6] {
        match lookup {
            Ok(lookup) => lookups.push(lookup),
            Err(error) if error.is_no_records_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(lookups)
}

fn members_of(lookup: &Lookup) -> impl Iterator<Item = Result<Member, String>> {
    lookup.answers().iter().filter_map(|record| {
        let member = |host: String| Ok(Member { host, ..Member::default() });
        #[expect(clippy::wildcard_enum_match_arm, reason = "records that were not queried, such as CNAME")]
        match &record.data {
            RData::A(address) => Some(member(address.0.to_string())),
            RData::AAAA(address) => Some(member(address.0.to_string())),
            // A target that is the root domain means that the service is not available (RFC 2782).
            RData::SRV(service) if service.target.is_root() => None,
            RData::SRV(service) => {
                let target = service.target.to_ascii();
                Some(file_sd::service(target.trim_end_matches('.'), service.port))
            }
            _ => None,
        }
    })
}
