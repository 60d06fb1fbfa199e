//! Lists that stay on the device until tiers or slots change: who is eligible, and where each resident expert is.

use super::super::CudaError;
use super::super::stream::Stream;
use super::mirror::{Mirror, Results};
use super::routes::NONE;
use lite_llm_core::ids::{ExpertKey, Slot};
use lite_llm_core::output::Forward;
use lite_llm_model::Model;

/// The lists, and what they were made of.
#[derive(Debug)]
pub(super) struct Standing {
    mirror: Mirror,
    tiers: Vec<u32>,
    resident: Option<Vec<(ExpertKey, Slot)>>,
    lists: Option<Lists>,
}

/// Addresses of lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lists {
    /// Zeros, for products that begin where they are said to.
    pub(super) zeros: u64,
    /// For each layer with experts, whether each expert is eligible, by original number.
    pub(super) eligible: Vec<Option<u64>>,
    /// The tiers that may be selected, and how many.
    pub(super) active: (u64, u32),
    /// The first child of each tier and group of a tiered router.
    pub(super) first_child: u64,
    /// For each layer, if all of this rank's experts are resident, which ones each expert rank has; nothing if not all of the step are.
    pub(super) resident: Option<Vec<Vec<Resident>>>,
}

/// The experts of a layer that may be chosen and that an expert rank has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resident {
    /// How many.
    pub(super) count: u32,
    /// A list of the place of each among them, by original number, or `NONE`; they stand in the order of their keys.
    pub(super) places: u64,
    /// A list of where each begins, by its place, counted from the first slot: a number of 64 bits each.
    pub(super) begins: u64,
}

impl Standing {
    pub(super) const fn new(mirror: Mirror) -> Self {
        Self { mirror, tiers: Vec::new(), resident: None, lists: None }
    }

    /// The lists for a step: written again only where they have to be, and verified then, as all that stays.
    ///
    /// # Errors
    /// If the device is lost.
    pub(super) fn of(
        &mut self,
        model: &Model,
        step: &Forward,
        slot_bytes: u64,
        (stream, results): (&Stream, &mut Results),
    ) -> Result<&Lists, CudaError> {
        let lists = match self.lists.take() {
            Some(lists) if self.tiers == step.tiers && self.resident == step.resident => lists,
            _ => {
                self.mirror.clear();
                let lists = Writer(&mut self.mirror).lists(model, step, slot_bytes);
                self.mirror.send_to_stay(stream, results)?;
                (self.tiers, self.resident) = (step.tiers.clone(), step.resident.clone());
                lists
            }
        };
        Ok(self.lists.insert(lists))
    }
}

/// Where lists are written.
struct Writer<'a>(&'a mut Mirror);

impl Writer<'_> {
    fn lists(&mut self, model: &Model, step: &Forward, slot_bytes: u64) -> Lists {
        let layers = 0..model.arch().layers.len();
        let eligible = layers.clone().map(|layer| {
            let mixture = model.arch().layers[layer].dense.is_none();
            mixture.then(|| {
                let list = model.checkpoint().eligible(layer as u32, &step.tiers).map(u32::from);
                self.0.words(&list.collect::<Vec<_>>())
            })
        });
        let eligible = eligible.collect();
        let here = model.share().layers(model.arch());
        let resident = step.resident.as_ref().map(|resident| {
            let begin = |key| {
                let at = resident.binary_search_by_key(&key, |&(key, _)| key);
                u64::from(resident[at.expect("every expert of the tiers is resident")].1.0) * slot_bytes
            };
            let of_layer = layers.map(|layer| {
                let has_experts = here.contains(&layer) && model.arch().layers[layer].dense.is_none();
                let seats = 0..if has_experts { model.share().topology().expert } else { 0 };
                seats.map(|seat| self.resident(model, (layer as u32, seat), &step.tiers, &begin)).collect()
            });
            of_layer.collect()
        });
        Lists {
            eligible,
            resident,
            zeros: self.0.longs(&[0]),
            active: (self.0.words(&step.tiers), step.tiers.len() as u32),
            first_child: self.0.words(&first_children(model)),
        }
    }

    /// Which experts of a layer an expert rank has. Where those of another rank begin is its own business.
    fn resident(
        &mut self,
        model: &Model,
        (layer, seat): (u32, u32),
        tiers: &[u32],
        begin: &dyn Fn(ExpertKey) -> u64,
    ) -> Resident {
        let eligible = (0..).zip(model.checkpoint().eligible(layer, tiers)).filter(|(_, eligible)| *eligible);
        let keys = eligible.map(|(expert, _)| (model.checkpoint().key(layer, expert), expert));
        let mut held: Vec<(ExpertKey, u32)> =
            keys.filter(|(key, _)| model.holder(*key) == Some(seat)).collect();
        if held.is_empty() {
            return Resident::default();
        }
        held.sort_unstable();
        let mut places = vec![NONE; model.arch().moe.as_ref().map_or(0, |moe| moe.experts)];
        (0..).zip(&held).for_each(|(place, (_, expert))| places[*expert as usize] = place);
        let is_own = seat == model.share().seat().expert;
        let begins: Vec<u64> = held.iter().map(|(key, _)| if is_own { begin(*key) } else { 0 }).collect();
        Resident { count: held.len() as u32, places: self.0.words(&places), begins: self.0.longs(&begins) }
    }
}

/// For each tier the first row of its groups, for each group that of its experts, and where those of the last end.
fn first_children(model: &Model) -> Vec<u32> {
    let tiered = model.arch().moe.as_ref().and_then(|moe| moe.tiered.as_ref());
    let Some(router) = tiered else { return Vec::new() };
    let tiers = 0..router.tiers.len();
    let groups = tiers.clone().flat_map(|tier| router.groups_of(tier));
    let firsts = tiers.map(|tier| router.groups_of(tier).start);
    let all = firsts.chain(groups.map(|group| router.experts_of(group).start)).chain([router.rows()]);
    all.map(|row| row as u32).collect()
}
