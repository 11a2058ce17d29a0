#![no_main]

#[path = "../../proto/tests/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzed::run("decode_quoted_header", bytes));
