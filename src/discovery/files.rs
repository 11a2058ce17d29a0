//! Members from files in the format of Prometheus' `file_sd`.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::MemberList;
use crate::config::file_sd::{self, Member};

/// Bytes of one file. Chosen: as many as of a configuration.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// The members of all files; an error if one of them is invalid.
pub(super) async fn read(patterns: Vec<PathBuf>, refresh: Duration) -> Result<MemberList, String> {
    let reading = tokio::task::spawn_blocking(move || read_all(&patterns));
    let members = reading.await.map_err(|_| "reading was interrupted".to_owned())??;
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
    let shown = path.display();
    let mut text = Vec::new();
    let read = regular(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text));
    read.map_err(|error| format!("reading {shown}: {error}"))?;
    file_sd::read(&text).map_err(|problems| problems.display(&shown.to_string()).to_string())
}

/// Opens a regular file. Opening a pipe could block for as long as nothing is written to it.
pub(super) fn regular(path: &Path) -> io::Result<File> {
    match fs::metadata(path)?.is_file() {
        true => File::open(path),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// The files that match a pattern, sorted by name. A pattern without a `*` is a path; the file does not have
/// to exist.
fn expand(pattern: &Path) -> io::Result<Vec<PathBuf>> {
    let last = pattern.file_name().unwrap_or_default().to_string_lossy();
    let Some((begin, end)) = last.split_once('*') else { return Ok(vec![pattern.to_owned()]) };
    let folder = pattern.parent().filter(|folder| *folder != Path::new("")).unwrap_or_else(|| Path::new("."));
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        let is_long_enough = text.len() >= begin.len() + end.len();
        if is_long_enough && text.starts_with(begin) && text.ends_with(end) {
            found.push(folder.join(&name));
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(patterns: &[PathBuf]) -> Result<Vec<String>, String> {
        Ok(read_all(patterns)?.into_iter().map(|member| member.host).collect())
    }

    #[test]
    fn a_star_means_all_files_that_fit_and_a_plain_path_one_that_must_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(hosts(&[at("*.yaml")]), Ok(vec![]));
        fs::write(at("b.yaml"), "- targets: [b-1, b-2]\n").unwrap();
        fs::write(at("a.yaml"), "- targets: [a-1]\n").unwrap();
        fs::write(at("c.json"), r#"[{"targets": ["c-1"]}]"#).unwrap();
        assert_eq!(hosts(&[at("*.yaml")]).unwrap(), ["a-1", "b-1", "b-2"]);
        assert_eq!(hosts(&[at("c*.json"), at("a.yaml")]).unwrap(), ["c-1", "a-1"]);
        let why = hosts(&[at("*.yaml"), at("gone.yaml")]).unwrap_err();
        assert!(why.contains("gone.yaml: No such file"), "{why}");
    }

    #[test]
    fn a_pipe_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe.yaml");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let why = hosts(&[pipe]).unwrap_err();
        assert!(why.contains("pipe.yaml: it is not a regular file"), "{why}");
    }

    #[test]
    fn one_file_that_cannot_be_used_makes_the_whole_unusable() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.yaml"), "- targets: [a-1]\n").unwrap();
        fs::write(folder.path().join("b.yaml"), "- targets: [b 1]\n").unwrap();
        let why = hosts(&[folder.path().join("*.yaml")]).unwrap_err();
        assert!(why.contains("b.yaml: 1 problem\n  line 1, column 13: [0].targets[0]: `b 1`"), "{why}");
    }
}
