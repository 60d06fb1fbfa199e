//! Experts from their shards straight into slots of a GPU, by the thread that wants them: the way of `direct`.
//!
//! No byte passes through memory of the host on its way up. So an expert is verified after it was copied back, and so is the way itself:
//! before it is used, bytes of every shard are read into the device and compared with those that the system reads.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lite_llm_core::ids::ExpertKey;
use lite_llm_core::input::Fault;
use lite_llm_model::checkpoint::native::ExpertBlob;

use super::INTERRUPTED_MAX;
use super::blocks::Buffered;
use super::fault::{ReadFault, corrupt};
use super::fetch::{padded, passes, read_all};
use super::shards::{Shard, open, open_direct};
use crate::arena::SlotWriter;
use crate::cuda::cufile::{CuFile, CuFileHandle, CuFileMemory, Missing};
use crate::cuda::memory::Memory;
use crate::cuda::{CudaError, Gpu};

/// Bytes of each shard that are read before the way is used.
const TRIAL_BYTES: u64 = 64 << 10;

/// Shards that are read past the host.
#[derive(Debug)]
pub(crate) struct Direct {
    files: Vec<CuFileHandle>,
    shards: Arc<[Shard]>,
    library: Arc<CuFile>,
}

impl Direct {
    /// Opens shards for reads into a device, and tries it with each.
    pub(super) fn open(gpu: &Arc<Gpu>, shards: &Arc<[Shard]>) -> Result<Self, Missing> {
        let library = CuFile::open(gpu)?;
        let of = |path: &Path, why: &str| Missing::new(format!("{}: {why}", path.display()));
        let files = open_direct(shards).map_err(|(path, error)| of(&path, &format!("O_DIRECT: {error}")))?;
        let known = files.into_iter().zip(&**shards);
        let known = known.map(|(file, shard)| library.file(file).map_err(|why| of(&shard.path, &why)));
        let files = known.collect::<Result<_, _>>()?;
        let this = Self { files, shards: Arc::clone(shards), library };
        // The budget of the device is nobody's yet, and so again after it.
        gpu.set_limit(TRIAL_BYTES);
        let tried = this.try_all(gpu);
        gpu.set_limit(0);
        tried.map(|()| this)
    }

    fn try_all(&self, gpu: &Arc<Gpu>) -> Result<(), Missing> {
        let failed = |error: CudaError| Missing::new(format!("a trial of it fails: {error}"));
        let memory = Memory::new(gpu, "a trial of reads", TRIAL_BYTES).map_err(failed)?;
        // Whether so much is known changes nothing; of slots it is said.
        // SAFETY: it is dropped before the memory.
        let _known = unsafe { self.library.memory(memory.at(), TRIAL_BYTES as usize) };
        for (number, shard) in self.shards.iter().enumerate() {
            let refuse = |why: &str| Missing::new(format!("{}: {why}", shard.path.display()));
            let bytes = shard.bytes.min(TRIAL_BYTES) as usize;
            let mut expected = vec![0; bytes];
            let buffered = Buffered(Arc::clone(&self.shards));
            read_all(&buffered, number, 0, &mut expected, bytes)
                .map_err(|fault| refuse(&format!("a trial cannot read it: {fault:?}")))?;
            // What a read that does nothing would leave there is all wrong.
            let inverted: Vec<u8> = expected.iter().map(|byte| !byte).collect();
            memory.fill(0, &inverted).map_err(failed)?;
            // SAFETY: the memory has so many bytes, and nobody else knows it.
            let read = unsafe { self.files[number].read(0, memory.at(), 0, bytes) };
            let read = read.map_err(|error| refuse(&format!("cuFileRead fails in a trial: {error}")))?;
            let mut back = inverted;
            memory.read(&mut back).map_err(failed)?;
            if read != bytes || back != expected {
                return Err(refuse("a trial of cuFileRead does not bring the bytes of the file"));
            }
        }
        Ok(())
    }

    /// The same of one file, for people: whether it can be read so, or why not.
    pub(super) fn look(gpu: &Arc<Gpu>, path: &Path) -> Result<String, Missing> {
        let opened = open(&[PathBuf::from(path)]);
        let failed = |(_, error): (PathBuf, io::Error)| Missing::new(format!("{}: {error}", path.display()));
        let this = Self::open(gpu, &opened.map_err(failed)?.into())?;
        Ok(format!("{}; {}", this.report(), this.registered(gpu).unwrap_or_else(|why| why)))
    }

    /// How much of the memory of a device can be made known, for people; or why none can.
    fn registered(&self, gpu: &Arc<Gpu>) -> Result<String, String> {
        gpu.set_limit(TRIAL_BYTES);
        let memory = Memory::new(gpu, "a trial of reads", TRIAL_BYTES);
        gpu.set_limit(0);
        let memory = memory.map_err(|error| error.to_string())?;
        // SAFETY: what is known is forgotten before the memory goes.
        let known = unsafe { self.library.memory(memory.at(), TRIAL_BYTES as usize) };
        let refused = |why| format!("no memory of the GPU can be registered with cuFile: {why}");
        drop(known.map_err(refused)?);
        let (most, all) = (self.library.known_max(), gpu.memory().map_err(|error| error.to_string())?.1);
        Ok(if most < all {
            format!(
                "slots are registered up to {} MiB of the GPU's {} (max_device_pinned_mem_size_kb in cufile.json)",
                most >> 20,
                all >> 20
            )
        } else {
            "slots are registered, whatever they take of the GPU's memory".into()
        })
    }

    /// For people.
    pub(super) fn report(&self) -> String {
        format!("straight into memory of the GPU (GPUDirect Storage, {})", self.library.mover_name())
    }

    /// Makes slots known to the library.
    ///
    /// # Safety
    /// All of it is of one allocation, which outlives what is returned.
    ///
    /// # Errors
    /// Why it has no room for them. They are read into all the same.
    pub(crate) unsafe fn know(&self, at: u64, bytes: usize) -> Result<CuFileMemory, String> {
        // SAFETY: the caller's.
        unsafe { self.library.memory(at, bytes) }
    }

    /// Reads an expert into a slot of the device. Nobody knows yet whether it is right.
    ///
    /// # Errors
    /// If it cannot be read, twice.
    ///
    /// # Panics
    /// If the slot is too small, or none of a device.
    pub(crate) fn read(&self, expert: ExpertKey, blob: &ExpertBlob, slot: &SlotWriter) -> Result<(), Fault> {
        let shard = &self.shards[blob.shard];
        let (base, slot_bytes) = slot.arena().on_gpu().expect("a slot of the device");
        let bytes = padded(blob, shard.bytes, slot.bytes());
        assert!(bytes <= slot.bytes(), "an expert fits into its slot");
        let from = u64::from(slot.slot().0) * slot_bytes;
        let (mut again, mut interrupted) = (true, 0);
        loop {
            // SAFETY: by the assertion they lie in the slot, which is in these hands.
            let fault = match unsafe { self.files[blob.shard].read(blob.offset, base, from, bytes) } {
                Ok(read) if read >= blob.bytes => return Ok(()),
                Ok(read) => ReadFault::Short { at: blob.offset + read as u64 },
                Err(error) if passes(&error) && interrupted < INTERRUPTED_MAX => {
                    interrupted += 1;
                    continue;
                }
                Err(error) => ReadFault::Failed { at: blob.offset, error },
            };
            if !std::mem::take(&mut again) {
                return Err(fault.of(expert, &shard.path));
            }
        }
    }

    /// Verifies what was copied back.
    ///
    /// # Errors
    /// If it does not have its checksum.
    pub(crate) fn verify(&self, expert: ExpertKey, blob: &ExpertBlob, back: &[u8]) -> Result<(), Fault> {
        let path = &self.shards[blob.shard].path;
        blob.verify(path, &back[..blob.bytes]).map_err(|error| corrupt(expert, &error))
    }
}
