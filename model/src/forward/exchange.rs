//! The exchanges of a step by number: the layer, and the place in it. All ranks agree on it without asking, whichever device
//! computes them.

/// The most rows of experts that are computed together. A larger expert is computed by itself.
pub const ROWS_TOGETHER: usize = 256;

/// Exchanges of a layer, at most.
const OF_LAYER: u32 = 1 << 16;
/// Places of exchanges in a layer. A gated block has two: its inner values, its outputs.
const QUERIES: u32 = 0;
const KEYS: u32 = 1;
const MIXED: u32 = 2;
const OUTPUT: u32 = 3;
const BLOCK: u32 = 4;
const RESULTS: u32 = 6;
const HANDED_ON: u32 = 7;
const EXPERTS: u32 = 8;

/// Beyond those of all layers.
const AGREEMENT: u32 = u32::MAX - 0xff;

const fn number(layer: usize, place: u32) -> u32 {
    layer as u32 * OF_LAYER + place
}

/// Of queries, where they are normalised over all heads.
pub const fn of_queries(layer: usize) -> u32 {
    number(layer, QUERIES)
}

/// Of keys, where they are normalised over all heads.
pub const fn of_keys(layer: usize) -> u32 {
    number(layer, KEYS)
}

/// Of what attention has mixed.
pub const fn of_mixed(layer: usize) -> u32 {
    number(layer, MIXED)
}

/// Of the output of attention; of logits, for the number of layers.
pub const fn of_output(layer: usize) -> u32 {
    number(layer, OUTPUT)
}

/// Of the block that every position uses: its inner values. Its outputs are the exchange after this one.
pub const fn of_block(layer: usize) -> u32 {
    number(layer, BLOCK)
}

/// Of the results of all experts of a layer.
pub const fn of_results(layer: usize) -> u32 {
    number(layer, RESULTS)
}

/// Of what a stage hands on to the one that begins with this layer.
pub const fn of_stage(layer: usize) -> u32 {
    number(layer, HANDED_ON)
}

/// Of some experts that are computed together, as a block: the so-manieth in the order of experts, by waves; or those of
/// [`ROWS_TOGETHER`] rows that are resident.
pub const fn of_experts(layer: usize, together: u32) -> u32 {
    number(layer, EXPERTS + 2 * together)
}

/// Of what ranks agree on before the first step that exchanges: the so-manieth round.
pub const fn of_agreement(round: u8) -> u32 {
    AGREEMENT + round as u32
}
