//! Files of a checkpoint or a state directory. What is no regular file is refused before it is opened: a pipe may never
//! answer, and a device has no size that could justify what is read of it.

use std::fs::{File, Metadata};
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// The most that is read of a file of text: configuration, tokenizer, template, index, manifest.
const TEXT_BYTES_MAX: u64 = 1 << 30;

/// What the system says of a regular file.
pub(crate) fn regular(path: &Path) -> Result<Metadata> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "it is no regular file"));
    }
    Ok(metadata)
}

/// Opens a regular file for reading.
pub(crate) fn open(path: &Path) -> Result<File> {
    regular(path)?;
    File::open(path)
}

/// Reads the whole of a file of text.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = open(path)?;
    let size = file.metadata()?.len();
    if size > TEXT_BYTES_MAX {
        return Err(Error::new(
            ErrorKind::FileTooLarge,
            format!("it has {size} bytes, more than any such file has"),
        ));
    }
    // It may grow meanwhile.
    file.take(TEXT_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_a_believable_size_are_read() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("text");
        std::fs::write(&path, "text").expect("it can be written");
        assert_eq!(read(&path).expect("a file"), b"text");
        let large = File::options().write(true).open(&path).expect("it is there");
        large.set_len(TEXT_BYTES_MAX + 1).expect("a hole takes no room");
        assert_eq!(read(&path).expect_err("too large").kind(), ErrorKind::FileTooLarge);
        for other in [Path::new("/dev/zero"), dir.path()] {
            assert_eq!(read(other).expect_err("no file").kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(open(&dir.path().join("none")).expect_err("not there").kind(), ErrorKind::NotFound);
    }
}
