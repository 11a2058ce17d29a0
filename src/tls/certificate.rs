//! Fields of X.509 certificates.

use std::net::IpAddr;

use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::Decode as _;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// Returns the end of the validity in seconds since the Unix epoch; `None` if the certificate cannot be
/// parsed.
pub(super) fn expiry(certificate: &CertificateDer<'_>) -> Option<u64> {
    let read = Certificate::from_der(certificate).ok()?;
    Some(read.tbs_certificate().validity().not_after.to_unix_duration().as_secs())
}

/// Returns the subject alternative names: DNS names, IP addresses, mail addresses and URIs. Empty if the
/// certificate cannot be parsed.
pub(super) fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(read) = Certificate::from_der(certificate) else { return Vec::new() };
    match read.tbs_certificate().get_extension::<SubjectAltName>() {
        Ok(Some((_, SubjectAltName(names)))) => names.iter().filter_map(text).collect(),
        Ok(None) | Err(_) => Vec::new(),
    }
}

fn text(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::DnsName(text)
        | GeneralName::Rfc822Name(text)
        | GeneralName::UniformResourceIdentifier(text) => Some(text.as_str().to_owned()),
        GeneralName::IpAddress(bytes) => {
            let bytes = bytes.as_bytes();
            let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
            let v6 = || <[u8; 16]>::try_from(bytes).map(IpAddr::from);
            v4.or_else(|_| v6()).ok().map(|address| address.to_string())
        }
        GeneralName::OtherName(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EdiPartyName(_)
        | GeneralName::RegisteredId(_) => None,
    }
}
