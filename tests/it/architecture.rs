//! Dependency rules. The compiler keeps `proto` independent of the daemon; these tests check the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Words that only some files may contain.
struct Rule {
    /// Folder that the rule applies to.
    root: &'static str,
    /// The words, each matched with word boundaries.
    words: &'static [&'static str],
    /// Files, or folders with a trailing slash, in which the words are allowed.
    allowed_in: &'static [&'static str],
    reason: &'static str,
}

const RULES: [Rule; 13] = [
    Rule {
        root: "proto/src",
        words: &[
            "Instant",
            "SystemTime",
            "std::thread",
            "std::env",
            "std::fs",
            "std::process",
            "std::io",
            "use std::{",
        ],
        allowed_in: &[],
        reason: "a state machine has no side effects: the time and all other inputs are arguments",
    },
    Rule {
        root: "proto/src",
        words: &[
            "UdpSocket",
            "TcpStream",
            "TcpListener",
            "UnixDatagram",
            "tokio",
            "async",
            "libc",
            "nix",
            "getrandom",
        ],
        allowed_in: &[],
        reason: "sockets, tasks and system calls belong to the daemon; proto takes bytes and returns bytes",
    },
    Rule {
        root: "proto/src",
        words: &["unsafe {", "unsafe fn", "unsafe impl"],
        allowed_in: &[],
        reason: "code that parses network data must not be unsafe",
    },
    Rule {
        root: "src",
        words: &["unsafe {", "unsafe fn", "unsafe impl"],
        allowed_in: &[
            "src/datagram/cmsg.rs",
            "src/datagram/socket.rs",
            "src/datagram/poller.rs",
            "src/stream/kernel.rs",
        ],
        reason: "system calls without a safe wrapper are confined to these files",
    },
    Rule {
        root: "src",
        words: &["prometheus::"],
        allowed_in: &["src/metrics/"],
        reason: "other modules count in pathmeter's own types; only src/metrics knows the exposition format",
    },
    Rule {
        root: "src",
        words: &["\"pathmeter_"],
        allowed_in: &["src/metrics/"],
        reason: "every metric has its name and its help text in src/metrics, where they are reviewed together",
    },
    Rule {
        root: "src",
        words: &["serde_yaml"],
        allowed_in: &["src/config/file.rs"],
        reason: "one file uses the YAML library, so that it can be replaced",
    },
    Rule {
        root: "src",
        words: &["tokio_rustls", "rustls_native_certs", "x509_cert"],
        allowed_in: &[
            "src/tls/acceptor.rs",
            "src/tls/certificate.rs",
            "src/tls/connector.rs",
            "src/tls/pem.rs",
            "src/tls/stream.rs",
        ],
        reason: "other modules use src/tls, which also exists in a build without TLS",
    },
    Rule {
        root: "src/http",
        words: &["crate::api", "crate::websocket", "crate::metrics", "crate::stream", "crate::daemon"],
        allowed_in: &[],
        reason: "src/http is independent of what is served: src/api passes it a handler",
    },
    Rule {
        root: "src/websocket",
        words: &["crate::api", "crate::stream", "crate::daemon"],
        allowed_in: &[],
        reason: "src/api uses src/websocket; an import back would be a cycle",
    },
    Rule {
        root: "src",
        words: &["tokio::spawn", "JoinSet", "spawn_blocking", "spawn_local"],
        allowed_in: &[
            "src/api/renderer.rs",
            "src/api/routes.rs",
            "src/bulk/streams.rs",
            "src/cli/bandwidth/mod.rs",
            "src/cli/demo.rs",
            "src/cli/interrupt.rs",
            "src/cli/run.rs",
            "src/daemon/client_traces/",
            "src/daemon/stored_state.rs",
            "src/discovery/files.rs",
            "src/discovery/http.rs",
            "src/http/basic.rs",
            "src/http/client.rs",
            "src/http/server/mod.rs",
            "src/poller.rs",
            "src/stream/dial.rs",
            "src/stream/mod.rs",
            "src/stream/responder.rs",
            "src/websocket/mod.rs",
        ],
        reason: "every task has an owner that ends it; list each file that starts tasks here",
    },
    Rule {
        root: "src",
        words: &["std::thread", "thread::spawn", "thread::sleep"],
        allowed_in: &[
            "src/answering.rs",
            "src/bulk/load/thread.rs",
            "src/bulk/threads.rs",
            "src/loops/mod.rs",
        ],
        reason: "the only threads besides the runtime's are the measuring loops and those of connections",
    },
    Rule {
        root: "src",
        words: &["clock_gettime", "Instant::now"],
        allowed_in: &[
            "src/clock/mod.rs",
            "src/api/routes.rs",
            "src/http/",
            "src/websocket/",
            "src/daemon/mod.rs",
            "src/daemon/shutdown.rs",
            "src/daemon/pending.rs",
            "src/discovery/dns.rs",
            "src/metrics/host_load.rs",
            "src/stream/mod.rs",
        ],
        reason: "what is measured has one clock, src/clock; only deadlines of HTTP, of WebSocket clients, of answers of the DNS, of marks and of the stop have another",
    },
];

#[test]
fn restricted_items_are_used_only_where_allowed() {
    let mut broken = Vec::new();
    for rule in &RULES {
        for file in sources(rule.root) {
            let name = file.to_str().unwrap().to_owned();
            if rule
                .allowed_in
                .iter()
                .any(|allowed| name == *allowed || allowed.ends_with('/') && name.starts_with(allowed))
            {
                continue;
            }
            for (number, line) in code(&file) {
                if let Some(word) = rule.words.iter().find(|word| contains_word(&line, word)) {
                    broken.push(format!("{name}:{number}: `{word}`\n    {}", rule.reason));
                }
            }
        }
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

/// rustfmt wraps code, not comments.
#[test]
fn comments_are_not_wider_than_code() {
    const COLUMNS_MAX: usize = 110;
    let mut wide = Vec::new();
    for file in ["src", "proto", "tests", "benches"].iter().flat_map(|root| sources(root)) {
        let text = fs::read_to_string(in_project(&file)).unwrap();
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim_start().starts_with("//") && line.chars().count() > COLUMNS_MAX {
                wide.push(format!("{}:{number}", file.display()));
            }
        }
    }
    assert!(wide.is_empty(), "wider than {COLUMNS_MAX} columns:\n{}", wide.join("\n"));
}

#[test]
fn every_exception_is_used() {
    for rule in &RULES {
        for allowed in rule.allowed_in.iter().filter(|allowed| !allowed.ends_with('/')) {
            let path = Path::new(allowed).to_owned();
            let is_used = in_project(&path).exists()
                && code(&path)
                    .iter()
                    .any(|(_, line)| rule.words.iter().any(|word| contains_word(line, word)));
            assert!(is_used, "{allowed} uses none of {:?}: remove it from the list", rule.words);
        }
    }
}

/// The modules of a crate in layers, lowest first: a module imports only from layers below its own.
struct Layers {
    root: &'static str,
    layers: &'static [&'static [&'static str]],
}

/// The source of the layers: `docs/explanation/architecture.md` shows a copy of this table.
const LAYERS: [Layers; 2] = [
    Layers {
        root: "proto/src",
        layers: &[
            &["dscp", "key", "prefix", "time"],
            &["bandwidth", "token_bucket"],
            &["admission", "machine", "probe_budget", "schedule", "stats", "wire"],
            &["echo", "goodbye", "load", "selection"],
            &["mtu", "trace"],
            &["sim"],
        ],
    },
    Layers {
        root: "src",
        layers: &[
            &[
                "config",
                "event_log",
                "identity",
                "local_routes",
                "logging",
                "metrics",
                "paths",
                "poller",
                "route_record",
                "runtime",
                "state_dir",
                "systemd",
            ],
            &["answering", "clock", "keys", "loops", "resolver", "tls", "trace_log"],
            &["datagram", "http"],
            &["identity_poller", "quoted_headers", "settings", "stream", "websocket"],
            &["bulk"],
            &["discovery", "probe"],
            &["echo", "roster", "trace"],
            &["bandwidth"],
            &["fleet"],
            &["api"],
            &["daemon"],
            &["cli"],
        ],
    },
];

#[test]
fn modules_import_from_lower_layers_only() {
    let mut broken = Vec::new();
    for Layers { root, layers } in LAYERS {
        let level = |module: &str| layers.iter().position(|layer| layer.contains(&module));
        for file in sources(root) {
            let module = module_of(root, &file);
            if ["lib", "main", "sample"].contains(&module.as_str()) {
                continue;
            }
            let Some(own) = level(&module) else {
                broken.push(format!("{root}/{module} is not in any layer"));
                continue;
            };
            for used in imports_from_root(&file) {
                if used != module && level(&used).is_some_and(|level| level >= own) {
                    broken.push(format!("{} imports {used}, which is not in a lower layer", file.display()));
                }
            }
        }
        for layer in layers {
            println!("{root}: {}", layer.join(" "));
        }
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

/// Files of one folder have no import cycles either. A file and the `mod.rs` above it belong together.
#[test]
fn files_of_a_module_have_no_import_cycles() {
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for root in ["proto/src", "src"] {
        for file in sources(root) {
            let own = file.with_extension("").to_str().unwrap().to_owned();
            let folder = file.parent().unwrap().to_str().unwrap();
            let siblings = imports_from_parent(&file).into_iter().map(|used| format!("{folder}/{used}"));
            let is_file = |used: &String| {
                in_project(Path::new(&format!("{used}.rs"))).exists()
                    || in_project(Path::new(&format!("{used}/mod.rs"))).exists()
            };
            imports.entry(own).or_default().extend(siblings.filter(is_file));
        }
    }
    let cycles: Vec<&String> =
        imports.keys().filter(|file| reachable(&imports, file).contains(file.as_str())).collect();
    assert!(cycles.is_empty(), "import cycles between: {cycles:#?}");
}

/// The sample kind is a complete kind of probe: the shared files that it touches are those that every new
/// kind touches.
#[test]
fn sample_kind_touches_only_the_documented_files() {
    const PAGE: &str = "docs/how-to/add-a-kind.md";
    let touches = |file: &&PathBuf| {
        let text = fs::read_to_string(in_project(file)).unwrap().to_lowercase();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines.windows(2).any(|pair| pair[0] == "#[cfg(test)]" && pair[1].contains("sample"))
    };
    let all = sources("src");
    let touched: BTreeSet<&str> = all.iter().filter(touches).map(|file| file.to_str().unwrap()).collect();
    let page = fs::read_to_string(in_project(Path::new(PAGE))).unwrap();
    let shared = page.split("## Lines in shared files").nth(1).unwrap();
    let listed: BTreeSet<&str> =
        shared.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    assert_eq!(touched, listed, "{PAGE} lists other files than the sample kind touches");
}

#[test]
fn documentation_shows_the_layers() {
    let text = fs::read_to_string(in_project(Path::new(LAYERS_SHOWN_IN))).unwrap();
    let missing: Vec<String> =
        LAYERS.iter().map(layers_block).filter(|block| !text.contains(block.as_str())).collect();
    assert!(missing.is_empty(), "{LAYERS_SHOWN_IN} must contain these blocks:\n{}", missing.join("\n"));
}

const LAYERS_SHOWN_IN: &str = "docs/explanation/architecture.md";

/// The layers as a text block, highest first, as in the documentation.
fn layers_block(layers: &Layers) -> String {
    let lines: Vec<String> = layers.layers.iter().rev().map(|layer| layer.join(" ")).collect();
    format!("```text\n{}\n```", lines.join("\n"))
}

/// The top-level module that a file belongs to.
fn module_of(root: &str, file: &Path) -> String {
    let name = file.strip_prefix(root).unwrap().iter().next().unwrap().to_str().unwrap();
    name.trim_end_matches(".rs").to_owned()
}

/// The top-level modules that a file imports: `crate::metrics`, or from a top-level file, `super::metrics`.
fn imports_from_root(file: &Path) -> BTreeSet<String> {
    identifiers_after("crate::", file)
}

/// The files in the same folder that a file imports.
fn imports_from_parent(file: &Path) -> BTreeSet<String> {
    let is_mod = file.ends_with("mod.rs");
    if is_mod { BTreeSet::new() } else { identifiers_after("super::", file) }
}

/// The identifiers after a prefix, alone or in braces.
fn identifiers_after(prefix: &str, file: &Path) -> BTreeSet<String> {
    let text: String = code(file).into_iter().map(|(_, line)| line + "\n").collect();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let word = |text: &str| text.chars().take_while(|c| is_word(*c)).collect::<String>();
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices(prefix) {
        let before = text[..at].chars().next_back();
        if before.is_some_and(|c| is_word(c) || c == ':') {
            continue;
        }
        let rest = &text[at + prefix.len()..];
        match rest.strip_prefix('{') {
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default();
                found.extend(list.split(',').map(|item| word(item.trim())));
            }
            None => drop(found.insert(word(rest))),
        }
    }
    found
}

/// All modules that a module imports, directly or indirectly.
fn reachable<'a>(imports: &'a BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<&'a str> {
    let (mut found, mut queue) = (BTreeSet::new(), vec![from]);
    while let Some(module) = queue.pop() {
        for next in imports.get(module).into_iter().flatten() {
            if found.insert(next.as_str()) {
                queue.push(next);
            }
        }
    }
    found
}

#[test]
fn proto_depends_on_pure_crates_only() {
    const PURE: [&str; 4] = ["hmac", "ipnet", "sha2", "thiserror"];
    let manifest = fs::read_to_string(in_project(Path::new("proto/Cargo.toml"))).unwrap();
    let section = manifest.split("\n[").find(|section| section.starts_with("dependencies]")).unwrap();
    for line in section.lines().skip(1).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let name = line.split([' ', '=', '.']).next().unwrap();
        assert!(
            PURE.contains(&name),
            "proto depends on {name}: allowed are crates that open no socket, read no clock and start no thread. \
             If that holds, add it to this list"
        );
    }
}

fn in_project(path: &Path) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The Rust files below a folder, without tests, by path in the project.
fn sources(root: &str) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::from(root)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(in_project(&folder)).unwrap() {
            let name = entry.unwrap().file_name();
            let path = folder.join(&name);
            match name.to_str().unwrap() {
                "tests" | "tests.rs" => {}
                _ if in_project(&path).is_dir() => folders.push(path),
                name if name.ends_with(".rs") => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no source files in {root}");
    found
}

/// The numbered lines of a file without comments and without tests, which come last.
fn code(path: &Path) -> Vec<(usize, String)> {
    let text = fs::read_to_string(in_project(path)).unwrap();
    let is_test = |line: &&str| !line.starts_with("mod tests {");
    let lines = text.lines().take_while(is_test).map(|line| line.split("//").next().unwrap_or_default());
    lines.enumerate().map(|(index, line)| (index + 1, line.to_owned())).collect()
}

/// Whether a line contains a word, and not only as part of a longer one.
fn contains_word(line: &str, word: &str) -> bool {
    let is_part = |character: Option<char>| character.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(word).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + word.len()..]);
        let opens = word.starts_with(char::is_alphanumeric) && is_part(before.chars().next_back());
        let closes = word.ends_with(char::is_alphanumeric) && is_part(after.chars().next());
        !opens && !closes
    })
}
