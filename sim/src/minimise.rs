//! Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002): the smallest
//! part of a list that still fails the same way.

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Minimised<T> {
    /// What is left: taking any one of it away makes the failure go away, unless `bounded`.
    pub left: Vec<T>,
    /// How often the run was tried.
    pub tries: u32,
    /// Whether it ended because `tries_max` were over.
    pub bounded: bool,
}

/// Shrinks a list for which `fails` holds.
pub fn minimise<T: Clone>(list: &[T], tries_max: u32, mut fails: impl FnMut(&[T]) -> bool) -> Minimised<T> {
    let mut left = list.to_vec();
    let mut tries = 0;
    let mut parts = 2;
    if !left.is_empty() {
        tries += 1;
        if fails(&[]) {
            return Minimised { left: Vec::new(), tries, bounded: false };
        }
    }
    while left.len() > 1 {
        let len = left.len().div_ceil(parts);
        let mut smaller = None;
        for start in (0..left.len()).step_by(len) {
            if tries >= tries_max {
                return Minimised { left, tries, bounded: true };
            }
            let end = left.len().min(start + len);
            let rest: Vec<T> = left[..start].iter().chain(&left[end..]).cloned().collect();
            tries += 1;
            if !rest.is_empty() && fails(&rest) {
                smaller = Some(rest);
                break;
            }
        }
        match smaller {
            Some(rest) => {
                left = rest;
                parts = (parts - 1).max(2).min(left.len().max(1));
            }
            None if len == 1 => break,
            None => parts = (parts * 2).min(left.len()),
        }
    }
    Minimised { left, tries, bounded: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_needed_is_left_and_nothing_else(needed in prop::collection::btree_set(0u32..200, 0..5)) {
            let all: Vec<u32> = (0..200).collect();
            let result = minimise(&all, 10_000, |part| needed.iter().all(|need| part.contains(need)));
            prop_assert_eq!(result.left, needed.into_iter().collect::<Vec<_>>());
            prop_assert!(!result.bounded && result.tries < 1000);
        }
    }

    #[test]
    fn it_ends_when_the_tries_are_over() {
        let all: Vec<u32> = (0..1000).collect();
        let result = minimise(&all, 5, |part| part.contains(&3) && part.contains(&999));
        assert!(result.bounded && result.tries == 5);
        assert!(result.left.contains(&3) && result.left.contains(&999));
    }
}
