//! The program `pathmeter`. See [`pathmeter::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    pathmeter::cli::main()
}
