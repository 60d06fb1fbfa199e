//! How the experts of every mixture layer are divided into tiers: what a user asks for, and what comes of it.
//!
//! A tier has as many experts in each layer, but not the same ones. Experts keep their original numbers, by which they
//! are combined and ties are decided; a tier only says which of them it has. So the bits of all tiers together are
//! those of the source, however it was divided.

use super::{Tier, contradiction};
use crate::arch::Arch;
use crate::trace::Trace;
use lite_llm_core::config::Placement;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// The largest list of tiers that is read.
const LIST_BYTES_MAX: u64 = 64 << 20;
/// The most experts of a layer that a list is believed to mean.
const EXPERTS_MAX: u32 = 1 << 20;
/// What a tier takes that has all experts that no other has.
const REST: &str = "rest";

/// What a user asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Division {
    tiers: Vec<Wanted>,
    /// Counts take the most used first; by original number if there is none.
    by_use: Option<Trace>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    name: String,
    experts: Choice,
    placement: Placement,
}

/// Which experts of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    /// As many of those that no list names.
    Count {
        /// In so many groups of a tiered router.
        groups: u32,
        /// All of them.
        experts: u32,
    },
    /// These of each layer.
    Each(Vec<u32>),
    /// These, layer by layer.
    Layers(BTreeMap<u32, Vec<u32>>),
    /// All that are left.
    Rest,
}

/// Which experts of each layer a tier has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Divided {
    /// The tiers.
    pub(crate) tiers: Vec<Tier>,
    /// The experts of each tier, ascending, for every mixture layer; empty if all are in their original order.
    pub(crate) layers: BTreeMap<u32, Vec<Vec<u32>>>,
}

/// Parses `NAME:EXPERTS[:hot|warm|cold],...`, where EXPERTS is a count, `GROUPSxEXPERTS`, a list `@0-3+9`, or `rest`.
///
/// # Errors
/// What is wrong, for people.
pub fn parse_tiers(spec: &str) -> Result<Division, String> {
    let mut tiers: Vec<Wanted> = Vec::new();
    for part in spec.split(',') {
        let wrong = || {
            format!(
                "{part:?} is no tier; write NAME:EXPERTS or NAME:EXPERTS:hot|warm|cold, where EXPERTS is a count, a \
                 list like @0-3+9, rest, or GROUPSxEXPERTS for a tiered router"
            )
        };
        let mut fields = part.split(':');
        let (name, experts, placement) = (fields.next().unwrap_or(""), fields.next(), fields.next());
        let experts = experts.and_then(choice).filter(|_| fields.next().is_none()).ok_or_else(wrong)?;
        let placement = placement.map_or(Some(Placement::Hot), placement_of).ok_or_else(wrong)?;
        tiers.push(Wanted { name: name.into(), experts, placement });
    }
    Division::new(tiers)
}

fn placement_of(name: &str) -> Option<Placement> {
    match name {
        "hot" => Some(Placement::Hot),
        "warm" => Some(Placement::Warm),
        "cold" => Some(Placement::Cold),
        _ => None,
    }
}

fn choice(text: &str) -> Option<Choice> {
    if text == REST {
        return Some(Choice::Rest);
    }
    if let Some(list) = text.strip_prefix('@') {
        return list_of(list).map(Choice::Each);
    }
    let (groups, experts) = text.split_once('x').unwrap_or(("1", text));
    let groups = groups.parse().ok().filter(|&groups: &u32| groups > 0)?;
    let experts = experts.parse().ok().filter(|&experts: &u32| experts > 0)?.checked_mul(groups)?;
    Some(Choice::Count { groups, experts })
}

/// `0-3+9`: numbers and ranges, both ends included.
fn list_of(text: &str) -> Option<Vec<u32>> {
    let mut list = Vec::new();
    for part in text.split('+') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        // A longer list is a slip, and must not fill the memory.
        if first > last || last >= EXPERTS_MAX || list.len() > EXPERTS_MAX as usize {
            return None;
        }
        list.extend(first..=last);
    }
    Some(list)
}

/// A tier in a file of tiers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    name: String,
    placement: Option<String>,
    experts: Option<Vec<u32>>,
    layers: Option<BTreeMap<u32, Vec<u32>>>,
}

/// Reads tiers from a JSON file: `[{"name", "placement", "experts": [..] | "layers": {"0": [..], ..}}, ..]`. A tier with
/// neither list has the rest.
///
/// # Errors
/// What is wrong, for people.
pub fn read_tiers(path: &Path) -> Result<Division, String> {
    let at = |what: String| format!("{}: {what}", path.display());
    let bytes = std::fs::metadata(path).map_err(|error| at(error.to_string()))?.len();
    if bytes > LIST_BYTES_MAX {
        return Err(at(format!("{bytes} bytes are more than any list of tiers has")));
    }
    let text = crate::files::read(path).map_err(|error| at(error.to_string()))?;
    let listed: Vec<Listed> = serde_json::from_slice(&text).map_err(|error| {
        at(format!(
            "it is no list of tiers: {error}; write [{{\"name\": \"core\", \"placement\": \"hot\", \"experts\": [0, 3]}}, \
             {{\"name\": \"rest\"}}]"
        ))
    })?;
    let mut tiers = Vec::new();
    for tier in listed {
        let placement = tier.placement.as_deref().unwrap_or("hot");
        let placement = placement_of(placement).ok_or_else(|| {
            at(format!("tier {:?}: placement {placement:?} is none of hot, warm and cold", tier.name))
        })?;
        let experts = match (tier.experts, tier.layers) {
            (Some(list), None) => Choice::Each(list),
            (None, Some(layers)) => Choice::Layers(layers),
            (None, None) => Choice::Rest,
            (Some(_), Some(_)) => {
                return Err(at(format!("tier {:?} has experts and layers; give one of them", tier.name)));
            }
        };
        tiers.push(Wanted { name: tier.name, experts, placement });
    }
    Division::new(tiers).map_err(at)
}

impl Division {
    fn new(tiers: Vec<Wanted>) -> Result<Self, String> {
        for (i, tier) in tiers.iter().enumerate() {
            if tier.name.is_empty() || tier.name.contains([',', ':']) {
                return Err(format!(
                    "{:?} is no name of a tier: TierSets name it, separated by commas",
                    tier.name
                ));
            }
            if tiers[..i].iter().any(|other| other.name == tier.name) {
                return Err(format!("tier {:?} is there twice", tier.name));
            }
        }
        if tiers.is_empty() {
            return Err("there are no tiers; give at least one".into());
        }
        if tiers.iter().filter(|tier| tier.experts == Choice::Rest).count() > 1 {
            return Err("two tiers have the rest; only one can".into());
        }
        Ok(Self { tiers, by_use: None })
    }

    /// Counts take the experts that the trace saw used most, instead of the first.
    #[must_use]
    pub fn by_use(self, trace: Trace) -> Self {
        Self { by_use: Some(trace), ..self }
    }

    /// The tiers, if nothing but counts says which experts they have: those of a tiered router.
    ///
    /// # Errors
    /// The tier that has something else.
    pub fn counts(&self) -> Result<Vec<Tier>, String> {
        let tier = |wanted: &Wanted| match wanted.experts {
            Choice::Count { groups, experts } => {
                Ok(Tier { name: wanted.name.clone(), experts, groups, placement: wanted.placement })
            }
            _ => Err(format!("tier {}: write how many experts it has, as GROUPSxEXPERTS", wanted.name)),
        };
        self.tiers.iter().map(tier).collect()
    }

    /// What this means for a model with these weights.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub(crate) fn of(&self, arch: &Arch, weights: &str) -> Result<Divided, String> {
        let experts = arch.moe.as_ref().map_or(0, |moe| moe.experts as u32);
        let layers = arch.moe_layers();
        if let Some(trace) = &self.by_use {
            trace.check(weights, experts, &layers)?;
        }
        self.check_counts(experts)?;
        let mut divided = BTreeMap::new();
        for &layer in &layers {
            let of_layer = self.of_layer(layer, experts)?;
            divided.insert(layer, of_layer);
        }
        let mut tiers = Vec::new();
        for (i, wanted) in self.tiers.iter().enumerate() {
            let mut sizes = divided.iter().map(|(layer, tiers)| (layer, tiers[i].len()));
            let (first, size) = sizes.next().expect("a model of experts has mixture layers");
            if let Some((layer, other)) = sizes.find(|&(_, other)| other != size) {
                return Err(format!(
                    "tier {} has {size} experts in layer {first} and {other} in layer {layer}; a tier has as many in \
                     each",
                    wanted.name
                ));
            }
            if size == 0 {
                return Err(format!("tier {} has no experts", wanted.name));
            }
            let groups = match wanted.experts {
                Choice::Count { groups, .. } => groups,
                _ => 1,
            };
            let (name, placement) = (wanted.name.clone(), wanted.placement);
            tiers.push(Tier { name, experts: size as u32, groups, placement });
        }
        if divided.values().all(|tiers| tiers.iter().flatten().copied().eq(0..experts)) {
            divided.clear();
        }
        if let Some(moe) = &arch.moe {
            if let Some(what) = contradiction(&tiers, moe) {
                return Err(what);
            }
            if moe.tiered.is_some() && !divided.is_empty() {
                return Err(
                    "the router of this model says which experts its tiers have; give counts only".into()
                );
            }
        }
        Ok(Divided { tiers, layers: divided })
    }

    /// Counts alone must be all of a layer, of which this is known before there is a checkpoint.
    ///
    /// # Errors
    /// If they are not.
    pub fn check_counts(&self, experts: u32) -> Result<(), String> {
        let mut sum = 0u64;
        for tier in &self.tiers {
            match &tier.experts {
                Choice::Count { experts, .. } => sum += u64::from(*experts),
                Choice::Each(list) => sum += list.len() as u64,
                // Each layer is looked at by itself.
                Choice::Layers(_) => return Ok(()),
                Choice::Rest if experts > 0 => return Ok(()),
                Choice::Rest => {}
            }
        }
        if sum == u64::from(experts) && experts > 0 {
            return Ok(());
        }
        Err(format!("the tiers have {sum} experts, the checkpoint {experts} a layer"))
    }

    /// The experts of each tier in a layer, ascending.
    fn of_layer(&self, layer: u32, experts: u32) -> Result<Vec<Vec<u32>>, String> {
        let mut owner: Vec<Option<usize>> = vec![None; experts as usize];
        for (tier, wanted) in self.tiers.iter().enumerate() {
            for &expert in self.list(wanted, layer)? {
                let Some(place) = owner.get_mut(expert as usize) else {
                    return Err(format!(
                        "tier {} lists expert {expert} of layer {layer}; the layer has experts 0 to {}",
                        wanted.name,
                        experts - 1
                    ));
                };
                if let Some(other) = place.replace(tier) {
                    return Err(format!(
                        "expert {expert} of layer {layer} is listed for tier {} and for tier {}; give it to one, once",
                        self.tiers[other].name, wanted.name
                    ));
                }
            }
        }
        let ranking = match &self.by_use {
            Some(trace) => trace.ranking(layer),
            None => (0..experts).collect(),
        };
        let mut free = ranking.into_iter().filter(|&expert| owner[expert as usize].is_none());
        let mut taken = Vec::new();
        for (tier, wanted) in self.tiers.iter().enumerate() {
            if let Choice::Count { experts, .. } = wanted.experts {
                taken.extend(free.by_ref().take(experts as usize).map(|expert| (expert, tier)));
            }
        }
        let rest = self.tiers.iter().position(|tier| tier.experts == Choice::Rest);
        let left: Vec<u32> = free.collect();
        match rest {
            Some(rest) => taken.extend(left.into_iter().map(|expert| (expert, rest))),
            None if left.is_empty() => {}
            None => {
                let names: Vec<String> = left.iter().take(8).map(u32::to_string).collect();
                return Err(format!(
                    "in layer {layer}, {} of {experts} experts are in no tier (expert {}{}); list them too, or add a \
                     tier of the rest",
                    left.len(),
                    names.join(", "),
                    if left.len() > names.len() { ", ..." } else { "" }
                ));
            }
        }
        for (expert, tier) in taken {
            owner[expert as usize] = Some(tier);
        }
        let of_tier =
            |tier: usize| (0u32..).zip(&owner).filter(move |(_, o)| **o == Some(tier)).map(|(e, _)| e);
        let tiers: Vec<Vec<u32>> = (0..self.tiers.len()).map(|tier| of_tier(tier).collect()).collect();
        for (tier, wanted) in tiers.iter().zip(&self.tiers) {
            if let Choice::Count { experts, .. } = wanted.experts
                && tier.len() != experts as usize
            {
                return Err(format!(
                    "tier {} asks for {experts} experts, and layer {layer} has {} left",
                    wanted.name,
                    tier.len()
                ));
            }
        }
        Ok(tiers)
    }

    /// What a tier lists for a layer.
    fn list<'a>(&self, wanted: &'a Wanted, layer: u32) -> Result<&'a [u32], String> {
        match &wanted.experts {
            Choice::Count { .. } | Choice::Rest => Ok(&[]),
            Choice::Each(list) => Ok(list),
            Choice::Layers(layers) => layers.get(&layer).map(Vec::as_slice).ok_or_else(|| {
                format!(
                    "tier {} lists nothing for layer {layer}, which has experts; name every such layer",
                    wanted.name
                )
            }),
        }
    }
}

/// Where each expert of a layer stands, tier by tier, and back.
#[derive(Clone, Debug, Default)]
pub(super) struct Order {
    ordinals: Vec<u32>,
    ranks: Vec<u32>,
}

impl Order {
    /// Of experts that are given tier by tier.
    ///
    /// # Errors
    /// If they are not every expert of the layer once, as many in each tier as it has, ascending.
    pub(super) fn new(tiers: &[Tier], listed: &[Vec<u32>]) -> Result<Self, String> {
        let sizes = tiers.iter().map(|tier| tier.experts as usize);
        if !sizes.eq(listed.iter().map(Vec::len))
            || !listed.iter().all(|list| list.is_sorted_by(|a, b| a < b))
        {
            return Err("it does not list as many experts for each tier as the tier has, ascending".into());
        }
        let ordinals: Vec<u32> = listed.iter().flatten().copied().collect();
        let mut ranks = vec![None; ordinals.len()];
        for (rank, &ordinal) in (0u32..).zip(&ordinals) {
            match ranks.get_mut(ordinal as usize) {
                Some(place @ None) => *place = Some(rank),
                _ => return Err(format!("it lists expert {ordinal} twice, or has none of that number")),
            }
        }
        let ranks = ranks.into_iter().map(|rank| rank.expect("as many as there are, none twice")).collect();
        Ok(Self { ordinals, ranks })
    }

    /// The original numbers, tier by tier.
    pub(super) fn ordinals(&self) -> &[u32] {
        &self.ordinals
    }

    /// The place of an expert among all tiers' experts.
    pub(super) fn rank(&self, ordinal: u32) -> u32 {
        self.ranks.get(ordinal as usize).copied().unwrap_or(ordinal)
    }

    /// The original number of the expert at a place.
    pub(super) fn ordinal(&self, rank: u32) -> u32 {
        self.ordinals.get(rank as usize).copied().unwrap_or(rank)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn tiers(sizes: &[u32]) -> Vec<Tier> {
        let tier = |(i, &experts): (usize, &u32)| Tier {
            name: i.to_string(),
            experts,
            groups: 1,
            placement: Placement::Hot,
        };
        sizes.iter().enumerate().map(tier).collect()
    }

    #[test]
    fn an_order_goes_there_and_back() {
        let order = Order::new(&tiers(&[2, 3]), &[vec![1, 4], vec![0, 2, 3]]).unwrap();
        assert_eq!([0, 1, 2, 3, 4].map(|rank| order.ordinal(rank)), [1, 4, 0, 2, 3]);
        assert_eq!([0, 1, 2, 3, 4].map(|ordinal| order.rank(ordinal)), [2, 0, 3, 4, 1]);
    }

    #[test]
    fn an_order_of_a_manifest_is_not_believed() {
        let sizes = tiers(&[2, 1]);
        for listed in [
            vec![vec![0, 1]],
            vec![vec![0], vec![1, 2]],
            vec![vec![1, 0], vec![2]],
            vec![vec![0, 1], vec![1]],
            vec![vec![0, 1], vec![3]],
            vec![vec![0, 1], vec![2], vec![]],
        ] {
            assert!(Order::new(&sizes, &listed).is_err(), "{listed:?}");
        }
    }
}
