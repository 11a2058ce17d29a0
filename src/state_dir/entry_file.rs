//! A file to which entries are appended, with a limit on its size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Entries as lines of JSON, in `NAME.jsonl`. When that reaches its limit it becomes `NAME.old.jsonl`, and a
/// new one begins.
///
/// A crash or a full disk can cut the last line short. It is removed when the file is opened, and before the
/// next entries are appended.
#[derive(Debug)]
pub struct EntryFile {
    path: PathBuf,
    older: PathBuf,
    bytes_max: u64,
    /// `None` after an error: it is opened again for the next entries.
    open: Option<OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    /// Up to the end of its last whole line.
    length: u64,
}

/// A pipe in the place of a file is an error at once.
const NEVER_WAIT: i32 = libc::O_NONBLOCK;

/// What was found in the files.
#[derive(Debug, PartialEq, Eq)]
pub struct FoundEntries<T> {
    /// The entries, oldest first.
    pub entries: Vec<T>,
    /// The number of lines that are not entries, for example of another version. They are left out.
    pub unreadable: usize,
}

impl EntryFile {
    /// Opens the two files `NAME` in a folder, with at most `bytes_max` each, and returns their entries.
    ///
    /// # Errors
    /// The file cannot be opened, read or written.
    pub(super) fn open<T: DeserializeOwned>(
        dir: &Path,
        name: &str,
        bytes_max: u64,
    ) -> io::Result<(Self, FoundEntries<T>)> {
        let path = dir.join(format!("{name}.jsonl"));
        let older = dir.join(format!("{name}.old.jsonl"));
        let mut found = FoundEntries { entries: Vec::new(), unreadable: 0 };
        match read(&older, bytes_max) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            read => found.add(&read?),
        }
        let (open, bytes) = OpenFile::open(&path, bytes_max)?;
        found.add(&bytes);
        Ok((Self { path, older, bytes_max, open: Some(open) }, found))
    }

    /// Appends entries. One that is longer than the file may be is left out.
    ///
    /// # Errors
    /// The file cannot be written. Some of the entries may have been appended, each of them whole.
    pub fn append<T: Serialize>(&mut self, entries: &[T]) -> io::Result<()> {
        let mut open = match self.open.take() {
            Some(open) if open.file.metadata()?.nlink() > 0 => open,
            // After an error, or because the file was removed.
            Some(_) | None => OpenFile::open(&self.path, self.bytes_max)?.0,
        };
        let mut lines = Vec::new();
        for entry in entries {
            let line = line(entry)?;
            if (line.len() as u64) > self.bytes_max {
                continue;
            }
            if open.length + ((lines.len() + line.len()) as u64) > self.bytes_max {
                open.write(&lines)?;
                lines.clear();
                fs::rename(&self.path, &self.older)?;
                open = OpenFile::open(&self.path, self.bytes_max)?.0;
            }
            lines.extend(line);
        }
        open.write(&lines)?;
        self.open = Some(open);
        Ok(())
    }
}

impl OpenFile {
    /// Opens a file, removes what follows its last whole line, and returns it with its bytes.
    fn open(path: &Path, bytes_max: u64) -> io::Result<(Self, Vec<u8>)> {
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).custom_flags(NEVER_WAIT).open(path)?;
        let mut bytes = read(path, bytes_max)?;
        bytes.truncate(bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1));
        let length = bytes.len() as u64;
        if file.metadata()?.len() > length {
            file.set_len(length)?;
        }
        Ok((Self { file, length }, bytes))
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        self.file.write_all(lines)?;
        self.length += lines.len() as u64;
        Ok(())
    }
}

fn line<T: Serialize>(entry: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(entry)?;
    line.push(b'\n');
    Ok(line)
}

/// The beginning of a file, at most so many bytes.
fn read(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = OpenOptions::new().read(true).custom_flags(NEVER_WAIT).open(path)?;
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl<T: DeserializeOwned> FoundEntries<T> {
    /// Adds the lines of a file.
    fn add(&mut self, bytes: &[u8]) {
        for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line) {
                Ok(entry) => self.entries.push(entry),
                Err(_) => self.unreadable += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path, bytes_max: u64) -> (EntryFile, Vec<u32>) {
        let (file, found) = EntryFile::open(folder, "numbers", bytes_max).unwrap();
        (file, found.entries)
    }

    fn bytes(folder: &Path) -> u64 {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    }

    #[test]
    fn latest_entries_survive_and_both_files_stay_within_their_limit() {
        let folder = tempfile::tempdir().unwrap();
        let mut all: Vec<u32> = Vec::new();
        for round in 0..200_u32 {
            let (mut file, found) = open(folder.path(), 100);
            assert!(all.ends_with(&found), "round {round}: {found:?}");
            // Nine digits and a line feed: at least one whole file of ten is kept.
            assert!(found.len() >= all.len().min(10), "round {round}: {found:?}");
            let new: Vec<u32> = (0..round % 23).map(|index| 100_000_000 + round * 1_000 + index).collect();
            file.append(&new).unwrap();
            all.extend(new);
            assert!(bytes(folder.path()) <= 200, "round {round}");
        }
    }

    #[test]
    fn line_that_was_cut_short_is_removed_and_the_rest_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.jsonl");
        for length in 0..=24 {
            fs::write(&path, &b"11111\n22222\n33333\n444444\n"[..length.min(25)]).unwrap();
            let (mut file, found) = open(folder.path(), 1_000);
            let expected: Vec<u32> = [11_111, 22_222, 33_333].into_iter().take(length / 6).collect();
            assert_eq!(found, expected, "{length} bytes");
            file.append(&[55_555_u32]).unwrap();
            assert_eq!(open(folder.path(), 1_000).1, [expected, vec![55_555]].concat(), "{length} bytes");
        }
    }

    #[test]
    fn unreadable_lines_are_left_out_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let text = b"1\n\0\0\0\0\n2\n\xff\n{\"a\": 1}\n3\nnull\n";
        fs::write(folder.path().join("numbers.jsonl"), text).unwrap();
        fs::write(folder.path().join("numbers.old.jsonl"), b"8\n9\n1").unwrap();
        let found = EntryFile::open::<u32>(folder.path(), "numbers", 1_000).unwrap().1;
        assert_eq!(found, FoundEntries { entries: vec![8, 9, 1, 1, 2, 3], unreadable: 4 });
    }

    #[test]
    fn file_that_cannot_be_written_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.jsonl");
        // Every write fails as on a full disk.
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let (mut file, found) = open(folder.path(), 1_000);
        assert_eq!(found, Vec::<u32>::new());
        for _ in 0..2 {
            assert_eq!(file.append(&[1_u32]).unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
        fs::remove_file(&path).unwrap();
        file.append(&[1_u32]).unwrap();
        assert_eq!(open(folder.path(), 1_000).1, [1]);
    }

    #[test]
    fn removed_file_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let (mut file, _) = open(folder.path(), 1_000);
        file.append(&[1_u32]).unwrap();
        fs::remove_file(folder.path().join("numbers.jsonl")).unwrap();
        file.append(&[2_u32]).unwrap();
        assert_eq!(open(folder.path(), 1_000).1, [2]);
        fs::remove_dir_all(folder.path()).unwrap();
        assert_eq!(file.append(&[3_u32]).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::create_dir(folder.path()).unwrap();
        file.append(&[4_u32]).unwrap();
        assert_eq!(open(folder.path(), 1_000).1, [4]);
    }

    #[test]
    fn pipe_is_an_error_at_once() {
        let folder = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&folder.path().join("numbers.jsonl"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(EntryFile::open::<u32>(folder.path(), "numbers", 1_000).is_err());
    }

    #[test]
    fn entry_that_does_not_fit_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let (mut file, _) = open(folder.path(), 6);
        file.append(&[1_u32, 1_234_567, 2]).unwrap();
        assert_eq!(open(folder.path(), 6).1, [1, 2]);
    }
}
