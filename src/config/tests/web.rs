//! The TLS keys of the configuration, and the web config file.

use std::path::Path;

use super::*;
use crate::config::web::{self, WebConfig};

const HASH: &str = "$2y$10$QOauhQNbBCuQDKes6eFzPeMqBSjb7Mr5DUmpZ/VcEd00UAV/LDeSi";

fn web_on(text: &str) -> Loaded<WebConfig> {
    web::load(text.as_bytes(), Path::new("/etc/web")).unwrap_or_else(|problems| panic!("{problems}"))
}

/// Checks the problems of texts of web config files, each as one line.
fn check_web(cases: &[(&str, &[&str])]) {
    for (text, problems) in cases {
        match web::load(text.as_bytes(), Path::new("")) {
            Ok(loaded) => panic!("accepted: {loaded:#?}"),
            Err(found) => assert_eq!(lines(&found), *problems, "{text:?}"),
        }
    }
}

#[test]
fn empty_web_config_file_changes_nothing() {
    for text in
        ["", "{}", "tls_server_config:\nhttp_server_config:\nbasic_auth_users:\n", "tls_server_config: {}"]
    {
        let loaded = web_on(text);
        let nothing = WebConfig { tls: None, headers: Vec::new(), users: BTreeMap::new() };
        assert_eq!((loaded.config, loaded.warnings), (nothing, Vec::new()), "{text:?}");
    }
}

#[test]
fn headers_and_users_do_not_require_tls() {
    let text = format!(
        "http_server_config: {{headers: {{X-Frame-Options: deny, Strict-Transport-Security: max-age=31536000}}}}\n\
         basic_auth_users: {{alice: '{HASH}', 'bob smith': '{}'}}",
        HASH.replace("2y", "2b")
    );
    let config = web_on(&text).config;
    assert_eq!(
        config.headers,
        [
            ("Strict-Transport-Security", "max-age=31536000".to_owned()),
            ("X-Frame-Options", "deny".to_owned())
        ]
    );
    assert_eq!(config.users.keys().collect::<Vec<_>>(), ["alice", "bob smith"]);
}

#[cfg(feature = "tls")]
#[test]
fn file_of_the_prometheus_documentation_is_read() {
    let text = format!(
        "tls_server_config:
  cert_file: server.crt
  key_file: /keys/server.key
  client_auth_type: \"RequireAndVerifyClientCert\"
  client_ca_file: ca/clients.pem
  client_allowed_sans: [prometheus.example.net, 192.0.2.9]
  min_version: TLS12
  max_version: TLS13
  cipher_suites:
    - TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
    - TLS_AES_128_GCM_SHA256
    - TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
  prefer_server_cipher_suites: false
  curve_preferences: [CurveP384, X25519]
http_server_config:
  http2: true
  headers:
    X-Content-Type-Options: nosniff
basic_auth_users:
  alice: {HASH}
"
    );
    use crate::config::web::{ClientVerification, Curve, Pem, Suite, TlsVersion};
    let loaded = web_on(&text);
    let tls = loaded.config.tls.unwrap();
    assert_eq!(tls.certificate, Pem::File("/etc/web/server.crt".into()));
    assert_eq!(tls.key, Pem::File("/keys/server.key".into()));
    let ClientVerification::Verified { ca, names } = &tls.clients else { panic!("{tls:?}") };
    assert_eq!(*ca, Pem::File("/etc/web/ca/clients.pem".into()));
    assert_eq!(*names, ["prometheus.example.net", "192.0.2.9"]);
    assert_eq!((tls.min_version, tls.max_version), (TlsVersion::Tls12, TlsVersion::Tls13));
    assert_eq!(tls.suites, Some(vec![Suite::RsaAes256, Suite::EcdsaChacha20]));
    assert_eq!(tls.curves, [Curve::P384, Curve::X25519]);
    assert!(!tls.prefer_server_suites);
    assert_eq!(
        lines(&loaded.warnings),
        [
            "line 16, column 10: http_server_config.http2: has no effect; only HTTP/1.1 is supported: write false, or remove it"
        ]
    );
}

#[cfg(feature = "tls")]
#[test]
fn unsupported_tls_options_are_rejected_with_a_remedy() {
    check_web(&[
        (
            "tls_server_config: {cert_file: a, min_version: TLS10, cipher_suites: [TLS_RSA_WITH_AES_128_CBC_SHA]}",
            &[
                "line 1, column 20: tls_server_config.key_file: missing; TLS requires a certificate and its private key",
                "line 1, column 48: tls_server_config.min_version: TLS10 is not supported; \
                 it is deprecated (RFC 8996): write TLS12 or TLS13",
                "line 1, column 71: tls_server_config.cipher_suites[0]: `TLS_RSA_WITH_AES_128_CBC_SHA` is not supported; \
                 allowed: TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, \
                 TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, \
                 TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, \
                 TLS_AES_128_GCM_SHA256, TLS_AES_256_GCM_SHA384, TLS_CHACHA20_POLY1305_SHA256",
            ],
        ),
        (
            "tls_server_config: {cert_file: a, key_file: b, curve_preferences: [CurveP521], min_version: TLS13, max_version: TLS12}",
            &[
                "line 1, column 68: tls_server_config.curve_preferences[0]: `CurveP521` is not supported; \
                 did you mean CurveP256? allowed: X25519, CurveP256, CurveP384",
                "line 1, column 93: tls_server_config.min_version: higher than max_version; \
                 lower min_version, or raise max_version",
            ],
        ),
        (
            "tls_server_config: {cert_file: a, cert: b, key_file: b, client_auth_type: RequireAnyClientCert}",
            &[
                "line 1, column 41: tls_server_config.cert: cert_file is also set; remove one of the two",
                "line 1, column 75: tls_server_config.client_auth_type: RequireAnyClientCert is not supported; \
                 an unverified certificate proves nothing: write RequireAndVerifyClientCert, and set client_ca_file",
            ],
        ),
        (
            "tls_server_config: {cert_file: a, key_file: b, client_ca_file: c}",
            &[
                "line 1, column 20: tls_server_config.client_auth_type: a client CA is set, but client certificates are not verified; \
               write VerifyClientCertIfGiven or RequireAndVerifyClientCert, or remove the CA",
            ],
        ),
        (
            "tls_server_config: {cert_file: a, key_file: b, client_auth_type: VerifyClientCertIfGiven}",
            &["line 1, column 20: tls_server_config.client_ca_file: missing; \
               set the CA that signs client certificates"],
        ),
        (
            "tls_server_config: {cert_file: a, key_file: b, client_allowed_sans: [x]}",
            &[
                "line 1, column 69: tls_server_config.client_allowed_sans: client certificates are not required; \
               write client_auth_type: RequireAndVerifyClientCert",
            ],
        ),
    ]);
}

#[test]
fn unsupported_keys_and_values_are_rejected() {
    check_web(&[
        (
            "basic_auth_users: {alice: secret, 'b:c': x}\nrate_limit: {burst: 3}\ntls_config: {}",
            &[
                "line 1, column 27: basic_auth_users.alice: not a bcrypt hash; \
                 create one with: htpasswd -nBC 10 \"\" | tr -d ':\\n'",
                "line 1, column 35: basic_auth_users.`b:c`: `b:c` is not a valid user name; remove colons and control characters",
                "line 2, column 13: rate_limit: not supported; \
                 remove it: the number of connections is limited instead (512 at once)",
                "line 3, column 1: tls_config: unknown key; \
                 allowed: tls_server_config, http_server_config, basic_auth_users, rate_limit",
            ],
        ),
        (
            "http_server_config: {headers: {X-Frame-Options: never, Server: me}}",
            &[
                "line 1, column 49: http_server_config.headers.X-Frame-Options: `never` is not supported; \
                 allowed: deny, sameorigin",
                "line 1, column 56: http_server_config.headers.Server: unknown key; \
                 allowed: Cache-Control, Content-Security-Policy, Strict-Transport-Security, X-Content-Type-Options, \
                 X-Frame-Options, X-XSS-Protection",
            ],
        ),
    ]);
    let expensive = format!("basic_auth_users: {{alice: '{}'}}", HASH.replace("$10$", "$17$"));
    check_web(&[(
        &expensive,
        &[
            "line 1, column 27: basic_auth_users.alice: the hash has a cost of 17; at most 16 is allowed, 10 is usual: \
           create one with: htpasswd -nBC 10 \"\" | tr -d ':\\n'",
        ],
    )]);
}

#[cfg(feature = "tls")]
#[test]
fn tls_section_of_a_peer_overrides_the_default() {
    let text = "
tls: {ca_file: ca, cert_file: cert, key_file: key}
peers:
  - {name: plain, address: plain}
  - {name: same, address: same, scheme: https}
  - {name: other, address: 192.0.2.1, scheme: https, tls: {ca_file: their-ca, server_name: other.example.net}}
";
    let config = load_on("a", text).config;
    let https = |name: &str| config.peers.iter().find(|peer| peer.name == name).unwrap().https.clone();
    assert_eq!(https("plain"), None);
    assert_eq!(https("same"), Some(Https { trust: config.tls.client.clone(), server_name: "same".into() }));
    let trust = Trust { ca_file: Some("their-ca".into()), ..config.tls.client.clone() };
    assert_eq!(https("other"), Some(Https { trust, server_name: "other.example.net".into() }));
}

#[cfg(feature = "tls")]
#[test]
fn incomplete_key_pair_and_tls_without_https_are_rejected() {
    check(&[
        (
            "tls: {cert_file: a}\npeers: [{name: b, address: b, tls: {}}, {name: c, address: c, scheme: ftp}]",
            &[
                "line 1, column 6: tls.key_file: missing; cert_file requires the file with its private key",
                "line 2, column 36: peers[0].tls: has no effect with scheme: http; \
                 write scheme: https, or remove it",
                "line 2, column 71: peers[1].scheme: `ftp` is not supported; allowed: http, https",
            ],
        ),
        (
            "peers: [{name: b, address: b, scheme: https, tls: {key_file: k, server_name: 'b:1'}}]",
            &[
                "line 1, column 51: peers[0].tls.cert_file: missing; key_file requires the file with its certificate",
                "line 1, column 78: peers[0].tls.server_name: `b:1` is not an IP address or a host name; \
                 remove the port: ports have keys of their own",
            ],
        ),
    ]);
}

#[cfg(not(feature = "tls"))]
#[test]
fn build_without_tls_rejects_tls_keys() {
    const PROBLEM: &str =
        "this build does not support TLS; build with the default feature `tls`, or remove the key";
    check(&[(
        "tls: {ca_file: a}\npeers: [{name: b, address: b, scheme: https}]",
        &[
            &format!("line 1, column 16: tls.ca_file: {PROBLEM}"),
            &format!("line 2, column 39: peers[0].scheme: {PROBLEM}"),
        ],
    )]);
    check_web(&[(
        "tls_server_config: {cert_file: a, key_file: b}",
        &[&format!("line 1, column 20: tls_server_config: {PROBLEM}")],
    )]);
    assert_eq!(load_on("a", "tls: {web_config_file: web.yml}").config.tls.client, Trust::default());
}
