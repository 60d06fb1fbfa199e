use super::*;
use lite_llm_core::journal::{Header, JournalError, Store};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

/// Names the directory that a second process, this test binary run once more, is to open.
const OTHER: &str = "LITE_LLM_TEST_OTHER_PROCESS";

fn header(incarnation: u64) -> Header {
    Header { logic_version: 1, node: 0, incarnation, identity: [7; 32] }
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

#[test]
fn journal_survives_on_real_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let (mut store, _) = Store::open(FileDisk::open(&path).unwrap(), &header(1)).unwrap();
    for seq in 1..=5 {
        store.push(seq, seq * 10, [seq as u8; 32], vec![seq as u8; 3000]).unwrap();
        assert_eq!(store.flush().unwrap(), seq);
    }
    store.write_snapshot(3, [3; 32], b"state").unwrap();
    store.trim(3).unwrap();
    drop(store);
    let (_, recovered) = Store::open(FileDisk::open(&path).unwrap(), &header(2)).unwrap();
    assert_eq!(recovered.snapshot.unwrap().bytes, b"state");
    assert_eq!(recovered.records.iter().map(|r| r.seq).collect::<Vec<_>>(), [3, 4, 5]);
    assert_eq!(recovered.incarnation, Some(1));
}

#[test]
fn everything_is_private_to_the_user() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("above").join("state");
    let (mut store, _) = Store::open(FileDisk::open(&path).unwrap(), &header(1)).unwrap();
    store.push(1, 1, [0; 32], b"a prompt".to_vec()).unwrap();
    store.write_snapshot(2, [2; 32], b"state").unwrap();
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o700, 0o700));
    let files: Vec<_> = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 3, "a segment, a snapshot and the lock: {files:?}");
    for file in files {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
}

/// Does nothing unless started by the test below.
#[test]
fn other_process() {
    if let Some(path) = std::env::var_os(OTHER) {
        match FileDisk::open(path) {
            Ok(_) => println!("[opened]"),
            Err(error) => println!("[refused: {error}]"),
        }
    }
}

fn open_in_another_process(path: &Path) -> String {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "disk::tests::other_process", "--nocapture", "--test-threads=1"])
        .env(OTHER, path)
        .output()
        .unwrap();
    let out = String::from_utf8(out.stdout).unwrap();
    let (start, end) = (out.find('[').unwrap(), out.rfind(']').unwrap());
    out[start..=end].to_string()
}

#[test]
fn one_process_at_a_time_has_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FileDisk::open(dir.path()).unwrap();
    let refused = open_in_another_process(dir.path());
    assert!(refused.starts_with("[refused: "), "{refused}");
    assert!(refused.contains(dir.path().to_str().unwrap()), "it names the directory: {refused}");
    assert!(refused.contains("in use by another process"), "{refused}");
    assert!(matches!(FileDisk::open(dir.path()), Err(OpenError::InUse(path)) if path == dir.path()));
    FileDisk::open_read_only(dir.path()).unwrap();
    drop(disk);
    assert_eq!(open_in_another_process(dir.path()), "[opened]");
}

#[test]
fn a_full_disk_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = FileDisk::open(dir.path()).unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join("full")).unwrap();
    let error = disk.append("full", b"bytes").unwrap_err();
    assert_eq!((error.op, error.kind), (DiskOp::Append, DiskErrorKind::NoSpace));
    assert_eq!(error.name, "full");

    // What the operator reads when a segment meets it names the file.
    let (mut store, _) = Store::open(disk, &header(1)).unwrap();
    let segment = store.disk().list().unwrap().remove(0);
    drop(store);
    let mut disk = FileDisk::open(dir.path()).unwrap();
    std::fs::remove_file(dir.path().join(&segment)).unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join(&segment)).unwrap();
    let error = JournalError::from(disk.append(&segment, &[0; 4096]).unwrap_err());
    assert!(error.to_string().starts_with(&format!("cannot append to {segment}: No space left")), "{error}");
}

#[test]
fn system_errors_are_sorted() {
    let kind = |errno: rustix::io::Errno| error(DiskOp::Append, "a", &io::Error::from(errno)).kind;
    use rustix::io::Errno;
    assert_eq!(kind(Errno::NOSPC), DiskErrorKind::NoSpace);
    assert_eq!(kind(Errno::DQUOT), DiskErrorKind::NoSpace);
    assert_eq!(kind(Errno::NOENT), DiskErrorKind::NotFound);
    assert_eq!(kind(Errno::EXIST), DiskErrorKind::Exists);
    assert_eq!(kind(Errno::ACCESS), DiskErrorKind::Denied);
    assert_eq!(kind(Errno::ROFS), DiskErrorKind::Denied);
    assert_eq!(kind(Errno::IO), DiskErrorKind::Io);
}

#[test]
fn read_only_refuses_to_write() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = FileDisk::open_read_only(dir.path()).unwrap();
    assert_eq!(disk.create_new("a").unwrap_err().kind, DiskErrorKind::Denied);
    for name in ["../a", "", ".", "..", "lock", ".hidden", "a/b", "/etc/passwd"] {
        assert_eq!(disk.read_at(name, 0, &mut []).unwrap_err().kind, DiskErrorKind::Denied, "{name}");
    }
}

#[test]
fn what_is_no_directory_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (file, pipe) = (dir.path().join("file"), dir.path().join("pipe"));
    std::fs::write(&file, b"not a directory").unwrap();
    make_pipe(&pipe);
    for path in [file, pipe] {
        for error in [FileDisk::open(&path).unwrap_err(), FileDisk::open_read_only(&path).unwrap_err()] {
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }
    std::fs::create_dir(dir.path().join(LOCK_NAME)).unwrap();
    let error = FileDisk::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("its file lock"), "{error}");
}

#[test]
fn a_journal_that_was_moved_and_linked_to_is_not_an_empty_one() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = |n| Store::open(FileDisk::open(dir.path()).unwrap(), &header(n));
    let (mut store, _) = open(1).unwrap();
    store.push(1, 10, [1; 32], vec![1; 300]).unwrap();
    store.flush().unwrap();
    let name = store.disk().list().unwrap().remove(0);
    drop(store);
    let (link, moved) = (dir.path().join(&name), elsewhere.path().join(&name));
    std::fs::copy(&link, &moved).unwrap();
    std::fs::remove_file(&link).unwrap();
    // Where the link leads nowhere, and where a pipe is in its place.
    for absent in [elsewhere.path().join("not mounted"), elsewhere.path().join("pipe")] {
        if absent.ends_with("pipe") {
            make_pipe(&absent);
        }
        std::os::unix::fs::symlink(&absent, &link).unwrap();
        let error = open(2).unwrap_err();
        assert!(matches!(&error, JournalError::Disk(error) if error.name == name), "{error}");
        std::fs::remove_file(&link).unwrap();
    }
    std::os::unix::fs::symlink(&moved, &link).unwrap();
    assert_eq!(open(2).unwrap().1.records.len(), 1);
}

fn make_pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn files_behave_as_the_contract_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = FileDisk::open(dir.path()).unwrap();
    disk.create_new("a").unwrap();
    assert_eq!(disk.create_new("a").unwrap_err().kind, DiskErrorKind::Exists);
    disk.append("a", b"one").unwrap();
    disk.rename("a", "b").unwrap();
    disk.append("b", b"two").unwrap();
    disk.sync("b").unwrap();
    disk.sync_dir().unwrap();
    let mut bytes = [0; 8];
    assert_eq!(disk.read_at("b", 1, &mut bytes).unwrap(), 5);
    assert_eq!(&bytes[..5], b"netwo");
    assert_eq!((disk.len("b").unwrap(), disk.list().unwrap()), (6, vec!["b".to_string()]));
    disk.remove("b").unwrap();
    assert_eq!(disk.append("b", b"x").unwrap_err().kind, DiskErrorKind::NotFound);
    assert_eq!(disk.len("a").unwrap_err().kind, DiskErrorKind::NotFound);
    // More files than are kept open at a time.
    for n in 0..2 * OPEN_FILES_MAX {
        let name = format!("n{n:02}");
        disk.create_new(&name).unwrap();
        disk.append(&name, name.as_bytes()).unwrap();
        disk.sync(&name).unwrap();
    }
    assert!(disk.open.len() <= OPEN_FILES_MAX + 1);
    disk.append("n00", b"+").unwrap();
    assert_eq!(disk.len("n00").unwrap(), 4);
}
