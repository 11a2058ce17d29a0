//! Limits on the size of a configuration.

use super::*;

#[test]
fn file_that_would_exhaust_memory_is_rejected() {
    let mut billion_laughs = "a0: &a0 [ha]\n".to_owned();
    for i in 1..12 {
        let previous = vec![format!("*a{}", i - 1); 9].join(", ");
        billion_laughs += &format!("a{i}: &a{i} [{previous}]\n");
    }
    assert_eq!(
        lines(&rejected(billion_laughs)),
        ["aliases repeat too many values; write values out instead of repeating them with `*`"]
    );

    let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), "*a, ".repeat(1000));
    assert_eq!(
        lines(&rejected(long)),
        ["line 1, column 4: the file has too many values; use fewer values, and fewer aliases `*name`"]
    );

    assert_eq!(
        lines(&rejected("[".repeat(100_000))),
        ["line 1, column 17: the file is nested too deeply; no key of a configuration is nested this deeply"]
    );
    assert_eq!(
        lines(&rejected("#".repeat(file::FILE_BYTES_MAX + 1))),
        ["the file has 16777217 bytes; at most 16777216 are allowed"]
    );
}

#[test]
fn first_hundred_problems_are_listed_and_the_others_counted() {
    let text: String = (0..1234).map(|i| format!("key{i}: 0\n")).collect();
    let problems = rejected(text);
    assert_eq!(problems.iter().count(), Problems::LISTED_MAX);
    assert_eq!(problems.more(), 1134);
    let shown = problems.to_string();
    assert!(
        shown.starts_with("configuration: 1234 problems\n  line 1, column 1: key0: unknown key\n"),
        "{shown}"
    );
    assert!(shown.contains("line 100, column 1: key99: unknown key"), "{shown}");
    assert!(shown.ends_with("\n  and 1134 more"), "{shown}");
}

#[test]
fn limits_on_the_number_of_entries_apply() {
    let peers = |count: usize| -> String {
        let peers = (0..count).map(|i| format!("- {{name: p{i}, address: p{i}}}\n"));
        "peers:\n".to_owned() + &peers.collect::<String>()
    };
    let probes = |count: usize| -> String {
        let probes = (0..count).map(|i| format!("- {{name: p{i}}}\n"));
        "probes:\n".to_owned() + &probes.collect::<String>()
    };
    load_on("fra-1", &(peers(20_000) + &probes(5)));
    load_on("fra-1", &(peers(2) + &probes(256)));
    check(&[
        (
            &peers(20_001),
            &["line 2, column 1: peers: 20001 peers and targets; at most 20000 are allowed together"],
        ),
        (&probes(257), &["line 2, column 1: probes: too many probes; at most 256 are allowed"]),
        (
            &(peers(20_000) + &probes(6)),
            &["line 20008, column 3: probes[5].peers: with this probe the file has 120000 paths; \
               at most 100000 are allowed: select fewer hosts"],
        ),
    ]);
}
