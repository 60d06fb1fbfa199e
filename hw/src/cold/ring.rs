//! The io_uring under the reader: submission in batches, completions, a bell that other threads ring, registered files and slots.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};
use memmap2::MmapMut;
use rustix::event::{EventfdFlags, eventfd};

use super::BLOCK;
use super::depth::DEPTH_MAX;
use super::reader::{Bell, Came, Piece, Queue};

/// What may be submitted at once: every piece in flight, and the bell.
const ENTRIES: u32 = 2 * DEPTH_MAX;
/// The most buffers that a ring takes (`IORING_MAX_REG_BUFFERS`).
const BUFFERS_MAX: u32 = 1 << 14;
/// The most bytes of one of them.
const BUFFER_BYTES_MAX: usize = 1 << 30;
/// Of what is mapped to find out whether memory can be registered.
const TRIAL_BYTES_MAX: u64 = 64 << 20;
/// What the bell's own completions are named.
const BELL: u64 = u64::MAX;

/// An io_uring with the shards registered.
pub(super) struct Ring {
    // The ring goes first: what it may still read from must be there until then.
    ring: IoUring,
    files: Vec<File>,
    files_registered: bool,
    buffers: bool,
    bell: Arc<OwnedFd>,
    bell_armed: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("files", &self.files.len()).finish_non_exhaustive()
    }
}

/// Rings it from another thread.
#[derive(Debug)]
struct Eventfd(Arc<OwnedFd>);

impl Bell for Eventfd {
    fn ring(&self) {
        // A counter that is full rings as well.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

impl Ring {
    /// Sets a ring up over files that were opened for direct reads, and has it read a block of the first.
    pub(super) fn open(files: Vec<File>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_clamp().build(ENTRIES)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel is older than 5.11"));
        }
        let descriptors: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let files_registered = ring.submitter().register_files(&descriptors).is_ok();
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut ring = Self { ring, files, files_registered, buffers: false, bell, bell_armed: false };
        ring.read_a_block()?;
        Ok(ring)
    }

    /// Whether it reads from a shard at all: file systems and sandboxes refuse late.
    fn read_a_block(&mut self) -> io::Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        let mut page = MmapMut::map_anon(BLOCK)?;
        let (into, len) = (page.as_mut_ptr(), BLOCK as u32);
        let piece = Piece { id: 0, shard: 0, offset: 0, into, len, buffer: None };
        // SAFETY: the page is there until the completion has come, or for ever.
        let pushed = unsafe { self.push(&piece) };
        let mut came = Vec::new();
        while pushed && came.is_empty() {
            if let Err(error) = self.turn(None, &mut came) {
                // Whether the kernel has the page is not known.
                std::mem::forget(page);
                return Err(error);
            }
        }
        match came.first() {
            Some(Came { result: 1.., .. }) => Ok(()),
            Some(Came { result: 0, .. }) => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(Came { result, .. }) => Err(io::Error::from_raw_os_error(-result)),
            None => Err(io::Error::other("its queue takes no read")),
        }
    }

    /// Makes a table for slots, if as much memory as `bytes` can be registered; or says why not.
    pub(super) fn allow_buffers(&mut self, bytes: u64) -> Result<(), String> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        let submitter = self.ring.submitter();
        let table = submitter.register_buffers_sparse(BUFFERS_MAX);
        table.map_err(|error| format!("the kernel has no table of registered memory: {error}"))?;
        if let Some(limit) = limit.filter(|&limit| limit < bytes) {
            // The limit binds those alone who may not lock memory, which only trying tells.
            let beyond = limit.saturating_add(BLOCK as u64).min(TRIAL_BYTES_MAX) as usize;
            let mut trial = MmapMut::map_anon(beyond).map_err(|error| error.to_string())?;
            let buffer = libc::iovec { iov_base: trial.as_mut_ptr().cast(), iov_len: beyond };
            // SAFETY: the map lives beyond the next call, which takes it out of the table again.
            let tried = unsafe { submitter.register_buffers_update(0, &[buffer], None) };
            self.clear_buffers(1);
            drop(trial);
            tried.map_err(|error| {
                format!("the limit of locked memory is {limit} bytes ({error}): raise it with ulimit -l")
            })?;
        }
        self.buffers = true;
        Ok(())
    }

    /// Whether it knows the shards by number.
    pub(super) const fn has_registered_files(&self) -> bool {
        self.files_registered
    }

    fn clear_buffers(&self, count: u32) {
        const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let nothing = vec![NOTHING; count as usize];
        // SAFETY: an empty entry is no memory.
        let cleared = unsafe { self.ring.submitter().register_buffers_update(0, &nothing, None) };
        // What stays registered stays in memory until the ring goes.
        let _ = cleared;
    }

    fn arm_bell(&mut self) {
        if !self.bell_armed {
            let poll = opcode::PollAdd::new(types::Fd(self.bell.as_raw_fd()), libc::POLLIN as u32);
            // SAFETY: the descriptor lives as long as the ring, and no memory is involved.
            let pushed = unsafe { self.ring.submission().push(&poll.build().user_data(BELL)) };
            self.bell_armed = pushed.is_ok();
        }
    }

    fn heard_bell(&mut self) {
        self.bell_armed = false;
        let mut count = [0; 8];
        // Nothing to read: somebody rings again.
        let _ = rustix::io::read(&*self.bell, &mut count);
    }
}

impl Queue for Ring {
    unsafe fn push(&mut self, piece: &Piece) -> bool {
        let &Piece { id, shard, offset, into, len, buffer } = piece;
        let read = match (self.files_registered, buffer) {
            (true, Some(buffer)) => {
                opcode::ReadFixed::new(types::Fixed(shard as u32), into, len, buffer).offset(offset).build()
            }
            (true, None) => opcode::Read::new(types::Fixed(shard as u32), into, len).offset(offset).build(),
            (false, Some(buffer)) => {
                let file = types::Fd(self.files[shard].as_raw_fd());
                opcode::ReadFixed::new(file, into, len, buffer).offset(offset).build()
            }
            (false, None) => {
                let file = types::Fd(self.files[shard].as_raw_fd());
                opcode::Read::new(file, into, len).offset(offset).build()
            }
        };
        // SAFETY: the caller keeps the memory until the completion has come; the files live as long as the ring.
        unsafe { self.ring.submission().push(&read.user_data(id)).is_ok() }
    }

    fn turn(&mut self, wait: Option<Duration>, came: &mut Vec<Came>) -> io::Result<()> {
        self.arm_bell();
        let turned = match wait {
            None => self.ring.submitter().submit_and_wait(1),
            Some(wait) => {
                let wait = types::Timespec::from(wait);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&wait))
            }
        };
        match turned {
            Ok(_) => {}
            Err(error) => match rustix::io::Errno::from_io_error(&error) {
                // Nothing came in time, a signal did, or the kernel wants completions to be taken first.
                Some(rustix::io::Errno::TIME | rustix::io::Errno::INTR | rustix::io::Errno::BUSY) => {}
                Some(rustix::io::Errno::AGAIN) => std::thread::yield_now(),
                _ => return Err(error),
            },
        }
        let mut rang = false;
        came.extend(self.ring.completion().filter_map(|entry| {
            rang |= entry.user_data() == BELL;
            (entry.user_data() != BELL).then(|| Came { id: entry.user_data(), result: entry.result() })
        }));
        if rang {
            self.heard_bell();
        }
        Ok(())
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::new(Eventfd(Arc::clone(&self.bell)))
    }

    unsafe fn register(&mut self, buffer: u16, start: *mut u8, bytes: usize) -> bool {
        if !self.buffers || u32::from(buffer) >= BUFFERS_MAX || bytes > BUFFER_BYTES_MAX {
            return false;
        }
        let entry = libc::iovec { iov_base: start.cast(), iov_len: bytes };
        // SAFETY: the caller keeps the memory until it is forgotten or the ring gone.
        let registered =
            unsafe { self.ring.submitter().register_buffers_update(buffer.into(), &[entry], None) };
        // One that is refused is the last that was asked for: the limit is used up.
        self.buffers = registered.is_ok();
        self.buffers
    }

    fn forget(&mut self, count: u16) {
        if count > 0 {
            self.clear_buffers(count.into());
        }
    }
}
