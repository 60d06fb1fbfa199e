//! How likely a model finds a text: the windows that the text is cut into, and the surprise at each token.
//!
//! All sums are in f64, in the order of the vocabulary and of positions, with the exponential and the logarithm of
//! `libm`: the result is the same bits on every machine and for any number of threads.

/// A part of a text that is computed at once. Its first token is never scored there: it has nothing before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The first token.
    pub start: usize,
    /// Beyond the last token.
    pub end: usize,
    /// The first token that is scored; those before it are context.
    pub scored_from: usize,
}

/// Cuts a text into windows of `length` tokens that begin `stride` tokens apart. Each scores the tokens that no window
/// before it did, so that all but those of the first have at least `length - stride` tokens before them.
///
/// # Panics
/// If the stride is 0 or more than the length.
pub fn windows(tokens: usize, length: usize, stride: usize) -> Vec<Window> {
    assert!((1..=length).contains(&stride), "windows follow each other without a gap");
    let mut windows: Vec<Window> = Vec::new();
    let (mut start, mut done) = (0, 0);
    while done < tokens {
        let end = tokens.min(start + length);
        windows.push(Window { start, end, scored_from: done.max(start + 1) });
        done = end;
        start += stride;
    }
    windows
}

/// The negative natural logarithm of the probability of a token.
pub fn surprise(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().fold(f64::NEG_INFINITY, |max, &logit| max.max(f64::from(logit)));
    let sum = logits.iter().fold(0.0, |sum, &logit| sum + libm::exp(f64::from(logit) - max));
    max + libm::log(sum) - f64::from(logits[token as usize])
}

/// The perplexity of scored tokens, from the sum of their surprises.
pub fn perplexity(surprise: f64, scored: u64) -> f64 {
    libm::exp(surprise / scored as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_scored_once() {
        for tokens in 1..40 {
            for length in 2..12 {
                for stride in 1..length {
                    let mut scored = Vec::new();
                    for window in windows(tokens, length, stride) {
                        assert!(window.end - window.start <= length && window.scored_from > window.start);
                        let context = window.scored_from - window.start;
                        assert!(window.start == 0 || context >= length - stride);
                        scored.extend(window.scored_from..window.end);
                    }
                    assert!(scored.into_iter().eq(1..tokens), "{tokens} tokens, {length}, {stride}");
                }
            }
        }
        // Side by side, the first token of each has nothing before it.
        let side_by_side = windows(10, 4, 4);
        assert_eq!(side_by_side.iter().map(|w| w.end - w.scored_from).sum::<usize>(), 7);
    }

    #[test]
    fn surprise_is_the_logarithm_of_the_softmax() {
        let logits = [1.0f32, -2.0, 0.5, 700.0];
        let naive = |token: usize| {
            let sum: f64 = logits.iter().map(|&l| (f64::from(l) - 700.0).exp()).sum();
            700.0 + sum.ln() - f64::from(logits[token])
        };
        for token in 0..4 {
            assert!((surprise(&logits, token as u32) - naive(token)).abs() < 1e-12);
        }
        assert!((perplexity(3.0 * 8f64.ln(), 3) - 8.0).abs() < 1e-12);
    }
}
