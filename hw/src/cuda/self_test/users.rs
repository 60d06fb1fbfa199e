//! Who uses which expert. A CPU makes no such lists, so that there is no golden hash: they are held against the lists that follow from
//! the choices.

use super::super::CudaError;
use super::super::stream::Arg::{self, At, Word};
use super::{Desk, Tried};
use lite_llm_model::kernels::golden::{Bits, NOBODY};

/// Experts of the layer, choices of a position, positions.
const EXPERTS: u32 = 70;
const PLACES: usize = 3;
const POSITIONS: usize = 40;
/// The position whose values are not finite: it uses nobody.
const FAULTY: usize = 17;
/// From which on users are counted.
const BASE: u32 = 1000;

pub(super) fn try_users(desk: &mut Desk) -> Result<Tried, CudaError> {
    let count = POSITIONS * PLACES;
    // Ascending, as routers choose; every fifth position has one less.
    let choice = |at: usize| match (at / PLACES, at % PLACES) {
        (position, place) if position % 5 == 4 && place == PLACES - 1 => NOBODY,
        (position, place) => ((position * position + 19 * place) % 30 + 20 * place) as u32,
    };
    let choices: Vec<u32> = (0..count).map(choice).collect();
    let mut faults = [0u32; POSITIONS];
    faults[FAULTY] = 1;
    // Experts stand in the layer from the last to the first.
    let places: Vec<u32> = (0..EXPERTS).rev().collect();
    let begins: Vec<u64> = (0..EXPERTS).map(|place| u64::from(place * 7 % EXPERTS) << 20).collect();
    let room = EXPERTS.min(count as u32) as usize;

    let [experts, faulty] = [desk.put(&choices)?, desk.put(&faults)?];
    let [stand, begin] = [desk.put(&places)?, desk.put(&begins)?];
    // In one piece, to be taken together.
    let out = desk.room(8 * room + 4 * (room + 1 + 2 * count))?;
    let At(weights_at) = out else { unreachable!("results stand at an address") };
    let first_user = weights_at + 8 * room as u64;
    let users = first_user + 4 * (room + 1) as u64;
    let results = users + 4 * count as u64;
    let lists = [weights_at, first_user, users, results].map(At);
    let sizes = [count as u32, PLACES as u32, room as u32, BASE].map(Word);
    let arguments: Vec<Arg> = [&[experts, faulty, stand, begin][..], &lists, &sizes].concat();
    desk.run(desk.gpu.functions.find_users, [EXPERTS, 1, 1], 256, &arguments)?;
    let found: Vec<u32> = desk.take(out, 2 * room + room + 1 + 2 * count)?;

    let used = |at: &usize| faults[at / PLACES] == 0 && choices[*at] != NOBODY;
    let mut order: Vec<usize> = (0..count).filter(used).collect();
    order.sort_by_key(|&at| (places[choices[at] as usize], at));
    let place = |user: usize| places[choices[order[user]] as usize];
    let firsts: Vec<usize> =
        (0..order.len()).filter(|&user| user == 0 || place(user) != place(user - 1)).collect();
    let mut begins_of: Vec<u64> = firsts.iter().map(|&user| begins[place(user) as usize]).collect();
    begins_of.resize(room, 0);
    let mut firsts: Vec<u32> = firsts.into_iter().map(|user| user as u32).collect();
    firsts.resize(room + 1, order.len() as u32);
    let mut of_users: Vec<u32> = order.iter().map(|at| (at / PLACES) as u32).collect();
    of_users.resize(count, 0);
    let mut of_choices = vec![NOBODY; count];
    (0u32..).zip(&order).for_each(|(user, &at)| of_choices[at] = BASE + user);
    let expected = [bytemuck::cast_slice(&begins_of), &firsts, &of_users, &of_choices].concat();

    let hash = |words: &[u32]| {
        let mut bits = Bits::default();
        words.iter().for_each(|&word| bits.word(word));
        bits.0
    };
    Ok(Tried { kernel: "users of experts".into(), expected: hash(&expected), found: hash(&found) })
}
