//! Passes the target triple to the program as `PATHMETER_TARGET`.

fn main() {
    let target = std::env::var("TARGET").unwrap_or_default();
    println!("cargo:rustc-env=PATHMETER_TARGET={target}");
    println!("cargo:rerun-if-changed=build.rs");
}
