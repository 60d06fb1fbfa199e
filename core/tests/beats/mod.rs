//! What tests of the supervisor share.

use lite_llm_core::cluster::membership::{Epoch, Member};
use lite_llm_core::cluster::orders::{Activity, Beat, Facts, LogEnd};
use lite_llm_core::cluster::supervisor::Supervisor;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::time::Time;

/// The beat of a node that does what it was told: it is in its epoch, and its log is that of the others.
pub(crate) fn beat_of(supervisor: &Supervisor, member: Member, now: Time) -> Beat {
    let view = supervisor.view();
    let membership = view.memberships().find(|(membership, _)| membership.rank_of(member).is_some());
    Beat {
        member,
        sent: now,
        facts: Facts::default(),
        log: LogEnd { last: Seq(9), digest: Digest::default() },
        torn: false,
        began: Incarnation(1),
        committed: Seq(9),
        epoch: membership.map_or(Epoch(0), |(membership, _)| membership.epoch),
        synced: membership.is_some_and(|(membership, _)| membership.leading() == member),
        activity: Activity::Idle,
        progress: now.0,
        diverged: 0,
        drained: false,
        shards: None,
    }
}
