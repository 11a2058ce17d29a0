//! Reads members from files in the format of Prometheus' `file_sd`.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::MemberList;
use crate::config::file_sd::{self, Member};

/// Maximum bytes of one file. Chosen: as many as of a configuration.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Reads the members of all files. It is an error if one file is invalid.
pub(super) async fn read(patterns: Vec<PathBuf>, refresh: Duration) -> Result<MemberList, String> {
    let reading = tokio::task::spawn_blocking(move || read_all(&patterns));
    let members = reading.await.map_err(|_| "reading the files was interrupted".to_owned())??;
    Ok(MemberList { members, valid: refresh })
}

fn read_all(patterns: &[PathBuf]) -> Result<Vec<Member>, String> {
    let mut members = Vec::new();
    for pattern in patterns {
        for path in expand(pattern).map_err(|error| format!("looking for {}: {error}", pattern.display()))? {
            members.extend(read_one(&path)?);
        }
    }
    Ok(members)
}

fn read_one(path: &Path) -> Result<Vec<Member>, String> {
    let file_name = path.display();
    let mut text = Vec::new();
    let read = open_regular(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text));
    read.map_err(|error| format!("reading {file_name}: {error}"))?;
    file_sd::read(&text).map_err(|problems| problems.display(&file_name.to_string()).to_string())
}

/// Opens a regular file. Opening a pipe would block until a process writes to it.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    match fs::metadata(path)?.is_file() {
        true => File::open(path),
        false => Err(io::Error::other("not a regular file")),
    }
}

/// The files that match a pattern, sorted by name. A pattern without a `*` is returned as it is; its file may
/// not exist.
fn expand(pattern: &Path) -> io::Result<Vec<PathBuf>> {
    let last = pattern.file_name().unwrap_or_default().to_string_lossy();
    let Some((begin, end)) = last.split_once('*') else { return Ok(vec![pattern.to_owned()]) };
    let folder = pattern.parent().filter(|folder| *folder != Path::new("")).unwrap_or_else(|| Path::new("."));
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        let is_long_enough = text.len() >= begin.len() + end.len();
        if is_long_enough && text.starts_with(begin) && text.ends_with(end) {
            paths.push(folder.join(&name));
        }
    }
    paths.sort_unstable();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(patterns: &[PathBuf]) -> Result<Vec<String>, String> {
        Ok(read_all(patterns)?.into_iter().map(|member| member.host).collect())
    }

    #[test]
    fn star_matches_existing_files_and_a_path_without_star_must_exist() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(hosts(&[at("*.yaml")]), Ok(vec![]));
        fs::write(at("b.yaml"), "- targets: [b-1, b-2]\n").unwrap();
        fs::write(at("a.yaml"), "- targets: [a-1]\n").unwrap();
        fs::write(at("c.json"), r#"[{"targets": ["c-1"]}]"#).unwrap();
        assert_eq!(hosts(&[at("*.yaml")]).unwrap(), ["a-1", "b-1", "b-2"]);
        assert_eq!(hosts(&[at("c*.json"), at("a.yaml")]).unwrap(), ["c-1", "a-1"]);
        let error = hosts(&[at("*.yaml"), at("gone.yaml")]).unwrap_err();
        assert!(error.contains("gone.yaml: No such file"), "{error}");
    }

    #[test]
    fn pipe_is_rejected_without_blocking() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe.yaml");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let error = hosts(&[pipe]).unwrap_err();
        assert!(error.contains("pipe.yaml: not a regular file"), "{error}");
    }

    #[test]
    fn one_invalid_file_is_an_error_for_all_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.yaml"), "- targets: [a-1]\n").unwrap();
        fs::write(folder.path().join("b.yaml"), "- targets: [b 1]\n").unwrap();
        let error = hosts(&[folder.path().join("*.yaml")]).unwrap_err();
        assert!(error.contains("b.yaml: 1 problem\n  line 1, column 13: [0].targets[0]: `b 1`"), "{error}");
    }
}
