//! What kernels have to know of a step: tokens, positions, where pages are, which rows attend together.

use super::mirror::Mirror;
use super::sizes::{Sizes, places_of_tokens};
use lite_llm_core::output::{Forward, Row};
use lite_llm_model::Model;
use lite_llm_model::forward::{choice, penalty};
use lite_llm_model::kernels::PAGE_POSITIONS;
use lite_llm_model::kernels::sample::Params;

/// Rows of one sequence that read a page together.
const TOGETHER: usize = 16;
const PAGE: u32 = PAGE_POSITIONS as u32;
/// What a list of tokens has where it has none.
const NO_TOKEN: u32 = u32::MAX;

/// A position of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    pub(super) row: usize,
    pub(super) request: u64,
    pub(super) position: u32,
}

/// Rows that attend in one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    /// The first of its positions, and how many there are.
    pub(super) first: usize,
    pub(super) count: usize,
    /// Pieces of sequences.
    pub(super) pieces: u32,
    /// Pages that rows of one piece see together, at most.
    pub(super) span: u32,
    /// Lists: for each piece its first row, counted from `first`, and at their end how many there are; where the pages of its
    /// sequence begin in the table.
    pub(super) first_row: u64,
    pub(super) first_page: u64,
}

/// The pages of a group of layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pages {
    pub(super) window: u32,
    /// The page that each position is written to.
    pub(super) of_position: u64,
    pub(super) table: u64,
    pub(super) batches: Vec<Batch>,
}

/// The tables of a step: addresses of lists, and how long they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tables {
    /// How many positions there are.
    pub(super) count: usize,
    /// Whether each row has one position. What grows as such rows do is rounded up, so that many steps have one shape.
    pub(super) decode: bool,
    pub(super) tokens: u64,
    pub(super) positions: u64,
    /// The rows of a product with all positions; of one for each head.
    pub(super) all: u64,
    pub(super) by_head: u64,
    /// Row by row where each head's row is among heads, head by head where each row's head is among rows.
    pub(super) from_heads: u64,
    pub(super) to_heads: u64,
    pub(super) pages: Vec<Pages>,
    /// The positions whose logits are wanted, as many at once as there is room for.
    pub(super) wanted: Vec<Wanted>,
}

/// Positions whose logits are computed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) positions: Vec<u32>,
    /// Lists: the same; the rows of their product.
    pub(super) picked: u64,
    pub(super) all: u64,
    /// Whether a token is chosen after one, what repetition changes before, and the lists by which, if one is drawn.
    pub(super) chooses: bool,
    pub(super) penalties: Vec<Penalty>,
    pub(super) draws: Option<Draws>,
}

/// What repetition changes in the logits of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Penalty {
    /// Which one of those together it is.
    pub(super) row: u32,
    /// A list of tokens, each once, and how long it is with the places after them that are none.
    pub(super) tokens: u64,
    pub(super) places: u32,
    /// By how much, as bits.
    pub(super) bits: u32,
}

/// Lists of how tokens are drawn, position by position: temperatures, 0 where the largest logit is taken; top-k; shares of top-p and
/// min-p; draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Draws {
    pub(super) temperatures: u64,
    pub(super) top_k: u64,
    pub(super) top_p: u64,
    pub(super) min_p: u64,
    pub(super) draws: u64,
}

impl Tables {
    /// Writes all lists of a step.
    pub(super) fn of(
        model: &Model,
        sizes: &Sizes,
        step: &Forward,
        at: &[At],
        wants_logits: &dyn Fn(u64) -> bool,
        mirror: &mut Mirror,
    ) -> Self {
        mirror.clear();
        assert!(at.len() <= sizes.positions, "a step has no more positions than was planned");
        let tokens: Vec<u32> = step.rows.iter().flat_map(|row| &row.tokens).copied().collect();
        let positions: Vec<u32> = at.iter().map(|at| at.position).collect();
        let (count, heads) = (at.len() as u32, model.attention_part().heads as u32);
        let latent = model.arch().attention.latent.is_some();
        let pairs = |outer: u32, inner: u32| (0..outer).flat_map(move |o| (0..inner).map(move |i| (o, i)));
        let list = |wanted: bool, list: &mut dyn Iterator<Item = u32>| -> Vec<u32> {
            if wanted { list.collect() } else { Vec::new() }
        };
        let from_heads = list(latent, &mut pairs(count, heads).map(|(row, head)| head * count + row));
        let to_heads = list(latent, &mut pairs(heads, count).map(|(head, row)| row * heads + head));
        let by_head = list(latent, &mut (0..=heads).map(|head| head * count));
        let is_wanted =
            |at: &At| last_of(step, at).is_some_and(|row| row.sample.is_some()) || wants_logits(at.request);
        let wanted: Vec<u32> = (0..count).filter(|&i| is_wanted(&at[i as usize])).collect();
        let wanted = wanted.chunks(sizes.rows.max(1)).map(|chunk| wanted_of(step, at, chunk, mirror));
        let wanted = wanted.collect();
        Self {
            tokens: mirror.words(&tokens),
            positions: mirror.words(&positions),
            all: mirror.words(&[0, count]),
            by_head: mirror.words(&by_head),
            from_heads: mirror.words(&from_heads),
            to_heads: mirror.words(&to_heads),
            pages: (0..sizes.groups).map(|group| pages(model, sizes, step, group, at, mirror)).collect(),
            wanted,
            count: at.len(),
            decode: is_decode(step),
        }
    }
}

/// The row whose last position this is.
pub(super) fn last_of<'a>(step: &'a Forward, at: &At) -> Option<&'a Row> {
    let row = &step.rows[at.row];
    (at.position + 1 == row.start + row.tokens.len() as u32).then_some(row)
}

/// Positions whose logits are computed together, and how the tokens after them are chosen.
fn wanted_of(step: &Forward, at: &[At], positions: &[u32], mirror: &mut Mirror) -> Wanted {
    let choices = positions.iter().map(|&i| last_of(step, &at[i as usize]).and_then(choice));
    let choices: Vec<Option<(Params, u64)>> = choices.collect();
    let drawn: Vec<Option<(Params, u64)>> =
        choices.iter().map(|choice| choice.filter(|(params, _)| !params.is_greedy())).collect();
    let draws = drawn.iter().any(Option::is_some).then(|| {
        let words = |of: &dyn Fn(&Params) -> u32| -> Vec<u32> {
            drawn.iter().map(|choice| choice.map_or(0, |(params, _)| of(&params))).collect()
        };
        let longs = |of: &dyn Fn(&Params, u64) -> u64| -> Vec<u64> {
            drawn.iter().map(|choice| choice.map_or(0, |(params, draw)| of(&params, draw))).collect()
        };
        Draws {
            temperatures: mirror.words(&words(&|params| params.temperature.to_bits())),
            top_k: mirror.words(&words(&|params| params.top_k)),
            top_p: mirror.longs(&longs(&|params, _| params.top_p_share().unwrap_or(u64::MAX))),
            min_p: mirror.longs(&longs(&|params, _| params.min_p_share().unwrap_or(0))),
            draws: mirror.longs(&longs(&|_, draw| draw)),
        }
    });
    let changed = (0..).zip(positions).filter_map(|(row, &i)| Some((row, last_of(step, &at[i as usize])?)));
    let changed = changed.filter_map(|(row, of_row)| Some((row, penalty(of_row)?)));
    let penalties = changed.map(|(row, (mut tokens, by))| {
        tokens.resize(places_of_tokens(tokens.len()), NO_TOKEN);
        let places = tokens.len() as u32;
        Penalty { row, tokens: mirror.words(&tokens), places, bits: by.to_bits() }
    });
    let penalties = penalties.collect();
    Wanted {
        penalties,
        positions: positions.to_vec(),
        picked: mirror.words(positions),
        all: mirror.words(&[0, positions.len() as u32]),
        chooses: choices.iter().any(Option::is_some),
        draws,
    }
}

/// The positions of a step.
pub(super) fn positions(step: &Forward) -> Vec<At> {
    let mut at = Vec::new();
    for (row, of_row) in step.rows.iter().enumerate() {
        let positions = (of_row.start..).take(of_row.tokens.len());
        at.extend(positions.map(|position| At { row, request: of_row.request, position }));
    }
    at
}

fn is_decode(step: &Forward) -> bool {
    step.rows.iter().all(|row| row.tokens.len() == 1)
}

/// A piece of a sequence: rows that stand together, pages that they see together, and where its sequence's begin.
struct Piece {
    rows: usize,
    span: u32,
    first_page: u32,
}

fn pages(
    model: &Model,
    sizes: &Sizes,
    step: &Forward,
    group: usize,
    at: &[At],
    mirror: &mut Mirror,
) -> Pages {
    let (window, heads) = (model.kv_groups()[group].unwrap_or(0), model.attention_part().heads);
    // What a graph is to be launched with for a while.
    let decode = is_decode(step);
    let rounded = |count: usize, most: usize| {
        if decode { count.next_power_of_two().min(most).max(count) } else { count }
    };
    let seen_from = |position: u32| if window == 0 { 0 } else { (position + 1).saturating_sub(window) };
    let of_position: Vec<u32> = at
        .iter()
        .map(|at| {
            let page = step.rows[at.row].pages[group].page(at.position / PAGE);
            page.expect("a row has a page for each of its positions")
        })
        .collect();
    // What rows of one piece may be, so that its scores have room.
    let (mut table, mut pieces) = (Vec::new(), Vec::new());
    for row in &step.rows {
        let (run, first_page) = (&row.pages[group], table.len() as u32);
        // What lies before every window is gone, and nobody looks there.
        table.extend(std::iter::repeat_n(0, run.first as usize));
        table.extend(&run.pages);
        let (mut position, end) = (row.start, row.start + row.tokens.len() as u32);
        while position < end {
            let base = seen_from(position) / PAGE;
            let mut rows = 0;
            let mut span = 0;
            while position < end && rows < TOGETHER {
                let more = rounded((position / PAGE + 1 - base) as usize, sizes.pages) as u32;
                if rows > 0 && values(sizes, heads, rows + 1, more) > sizes.attention {
                    break;
                }
                (rows, span, position) = (rows + 1, more, position + 1);
            }
            pieces.push(Piece { rows, span, first_page });
        }
    }
    table.resize(rounded(table.len(), sizes.rows * sizes.pages), 0);
    let mut batches = Vec::new();
    let (mut rest, mut first) = (&pieces[..], 0);
    while !rest.is_empty() {
        let (mut count, mut span, mut taken) = (0, 0, 0);
        for piece in rest {
            let (more, wider) = (count + piece.rows, span.max(piece.span));
            if taken > 0 && values(sizes, heads, more, wider) > sizes.attention {
                break;
            }
            (count, span, taken) = (more, wider, taken + 1);
        }
        let (own, after) = rest.split_at(taken);
        let mut first_row = vec![0u32];
        first_row.extend(own.iter().scan(0, |end, piece| {
            *end += piece.rows as u32;
            Some(*end)
        }));
        let first_page: Vec<u32> = own.iter().map(|piece| piece.first_page).collect();
        batches.push(Batch {
            first,
            count,
            pieces: taken as u32,
            span,
            first_row: mirror.words(&first_row),
            first_page: mirror.words(&first_page),
        });
        (rest, first) = (after, first + count);
    }
    Pages { window, of_position: mirror.words(&of_position), table: mirror.words(&table), batches }
}

/// Values that so many heads of attention have for so many rows that see so many pages.
const fn values(sizes: &Sizes, heads: usize, rows: usize, span: u32) -> usize {
    rows * heads * span as usize * sizes.page_values
}
