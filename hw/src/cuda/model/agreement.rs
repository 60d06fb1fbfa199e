//! Which way the values of ranks go: agreed on over the links of the cluster before the first step that exchanges, and again after
//! every epoch and every step that was given up. All ranks hear the same offers and decide the same.

use super::super::CudaError;
use super::super::gpu::Gpu;
use super::super::nccl::communicator::Communicator;
use super::super::nccl::{Nccl, UniqueId, number, pair};
use super::Failed;
use super::direct::Direct;
use super::transport::{Links, Transport};
use lite_llm_model::forward::exchange::of_agreement;
use lite_llm_model::{ExpertSource, Share};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// How long NCCL may take to bring ranks together, at most. Whoever serves has to get on within a minute.
const JOIN_WAIT: Duration = Duration::from_secs(20);

/// The ways that there are.
#[derive(Debug)]
pub(super) struct Ways {
    links: Links,
    direct: Option<Direct>,
    /// How often waiting had been interrupted when they were agreed on.
    agreed: Option<u64>,
}

/// What a rank has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Offer {
    /// The version of its NCCL, or why it has none.
    nccl: Result<u32, String>,
    /// What tells its machine and its device from others.
    machine: String,
    device: [u8; 16],
}

impl Ways {
    /// The links alone, with pinned memory of so many bytes.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self { links: Links::new(gpu, bytes)?, direct: None, agreed: None })
    }

    /// The way that was agreed on.
    pub(super) fn transport(&mut self) -> &mut dyn Transport {
        match &mut self.direct {
            Some(direct) => direct,
            None => &mut self.links,
        }
    }

    /// Whether it goes past the host.
    pub(super) const fn is_past_host(&self) -> bool {
        self.direct.is_some()
    }

    /// Agrees with the other ranks, if that has to be done.
    pub(super) fn agree(
        &mut self,
        gpu: &Arc<Gpu>,
        share: &Share,
        source: &dyn ExpertSource,
    ) -> Result<(), Failed> {
        // Every rank hears of every step that is given up before it begins the next one.
        let now = gpu.interrupts();
        if self.agreed == Some(now) {
            return Ok(());
        }
        (self.direct, self.agreed) = (None, None);
        let round = Round { source, ranks: (0..share.topology().ranks()).collect() };
        match join(gpu, share.rank(), &round, now)? {
            Ok((ranks, version)) => {
                self.direct = Some(Direct::new(ranks));
                let version = number(version);
                gpu.say_exchanges(format!("ranks exchange from device to device, by NCCL {version}"));
            }
            Err(why) => gpu.say_exchanges(format!("ranks exchange through the host: {why}")),
        }
        self.agreed = Some(now);
        Ok(())
    }
}

/// What all ranks say to all.
struct Round<'a> {
    source: &'a dyn ExpertSource,
    ranks: Vec<u32>,
}

impl Round<'_> {
    /// What each rank says; nothing of one that says something else.
    fn say<T: Serialize + DeserializeOwned>(&self, number: u8, own: &T) -> Result<Vec<Option<T>>, Failed> {
        let own = postcard::to_allocvec(own).expect("what is said fits memory");
        let said = self.source.gather(&self.ranks, of_agreement(number), &own)?;
        Ok(said.iter().map(|said| postcard::from_bytes(said).ok()).collect())
    }
}

/// Makes a communicator of all ranks, or says why there is none; and which version of NCCL that is.
fn join(
    gpu: &Arc<Gpu>,
    rank: u32,
    round: &Round<'_>,
    now: u64,
) -> Result<Result<(Arc<Communicator>, u32), String>, Failed> {
    let nccl = gpu.nccl_refusal().map_or_else(Nccl::find, Err);
    let own = Offer {
        nccl: nccl.as_ref().map(|nccl| nccl.version()).map_err(Clone::clone),
        machine: machine(),
        device: gpu.uuid()?,
    };
    let offers = round.say(0, &own)?;
    if let Some(why) = why_not(&offers) {
        return Ok(Err(why));
    }
    let nccl = nccl.expect("every rank has one");
    // The first one says how the others find it.
    let id = if rank == 0 { Some(nccl.unique_id().map(|id| id.0.to_vec())) } else { None };
    let said = round.say(1, &id)?.into_iter().next().flatten().flatten();
    let id = said.unwrap_or_else(|| Err("it does not say how ranks find each other".into()));
    let id = id.and_then(|id| id.try_into().map_err(|_| "what it says is none of NCCL's identifiers".into()));
    let id = match id {
        Ok(id) => UniqueId(id),
        Err(why) => {
            let why: String = why;
            if rank == 0 {
                gpu.refuse_nccl(why.clone());
            }
            return Ok(Err(format!("rank 0: {why}")));
        }
    };
    let wait = gpu.patience.min(JOIN_WAIT);
    let joined = Communicator::join(nccl, gpu, id, (rank, round.ranks.len() as u32), now, wait)?;
    if let Err(why) = &joined {
        gpu.refuse_nccl(why.clone());
    }
    let outcomes = round.say(2, &joined.as_ref().err().cloned())?;
    let refused = (0..).zip(outcomes).find_map(|(rank, outcome)| match outcome {
        Some(None) => None,
        Some(Some(why)) => Some(format!("rank {rank}: {why}")),
        None => Some(format!("rank {rank} does not say whether it has joined")),
    });
    match (refused, joined) {
        (None, Ok(ranks)) => Ok(Ok((ranks, nccl.version()))),
        (Some(why), _) | (None, Err(why)) => Ok(Err(why)),
    }
}

/// What tells this machine from others, and this start of it: nothing where the system does not say.
fn machine() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Why ranks with these offers cannot go past the host, if they cannot.
fn why_not(offers: &[Option<Offer>]) -> Option<String> {
    let mut known: Vec<(&Offer, u32)> = Vec::new();
    for (rank, offer) in offers.iter().enumerate() {
        let Some(offer) = offer else { return Some(format!("rank {rank} makes an offer that is none")) };
        let version = match &offer.nccl {
            Ok(version) => *version,
            Err(why) => return Some(format!("rank {rank}: {why}")),
        };
        if offer.machine.is_empty() {
            return Some(format!("rank {rank} cannot tell which machine it is on"));
        }
        for (other, (before, its_version)) in known.iter().enumerate() {
            if pair(version) != pair(*its_version) {
                let [one, two] = [*its_version, version].map(number);
                return Some(format!(
                    "rank {other} has NCCL {one}, and rank {rank} {two}: install one everywhere"
                ));
            }
            if offer.machine != before.machine {
                return Some(format!("ranks {other} and {rank} are on different machines"));
            }
            if offer.device == before.device {
                return Some(format!("ranks {other} and {rank} are on one device"));
            }
        }
        known.push((offer, version));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(nccl: Result<u32, &str>, machine: &str, device: u8) -> Option<Offer> {
        Some(Offer { nccl: nccl.map_err(str::to_owned), machine: machine.into(), device: [device; 16] })
    }

    #[test]
    fn ranks_go_past_the_host_only_where_all_of_them_can() {
        let first = || offer(Ok(22_703), "a", 0);
        let why = |other: Option<Offer>| why_not(&[first(), other]);
        assert_eq!(why(offer(Ok(22_705), "a", 1)), None);
        let expected = [
            (offer(Ok(22_703), "a", 0), "ranks 0 and 1 are on one device"),
            (offer(Ok(22_703), "b", 1), "ranks 0 and 1 are on different machines"),
            (offer(Ok(22_703), "", 1), "rank 1 cannot tell which machine it is on"),
            (offer(Ok(21_805), "a", 1), "rank 0 has NCCL 2.27.3, and rank 1 2.18.5: install one everywhere"),
            (offer(Err("there is none"), "a", 1), "rank 1: there is none"),
            (None, "rank 1 makes an offer that is none"),
        ];
        for (other, words) in expected {
            assert_eq!(why(other).as_deref(), Some(words));
        }
        assert_eq!(
            why_not(&[first(), offer(Ok(22_703), "a", 1), first()]).as_deref(),
            Some("ranks 0 and 2 are on one device")
        );
    }
}
