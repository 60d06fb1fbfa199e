//! Memory that is grown once and kept, so that a step allocates nothing that an earlier one already had.

use std::marker::PhantomData;
use std::ops::Range;

/// Room for the values of one use after another: as much as the largest of them wanted.
#[derive(Debug, Default)]
pub struct Buffer(Vec<f32>);

impl Buffer {
    /// So many values, whatever they are: who takes them writes each before he reads it. Where assertions are checked
    /// they are NaN.
    pub fn values(&mut self, count: usize) -> &mut [f32] {
        if self.0.len() < count {
            // Given up first, so that old and new are never there together.
            self.0 = Vec::new();
            self.0 = vec![0.0; count];
        }
        let values = &mut self.0[..count];
        if cfg!(debug_assertions) {
            values.fill(f32::NAN);
        }
        values
    }

    /// The values as they were last written.
    ///
    /// # Panics
    /// If there never were so many.
    pub fn written(&self, count: usize) -> &[f32] {
        &self.0[..count]
    }

    /// Bytes that it keeps.
    pub fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<f32>()
    }
}

/// The memory of a list for a list of something else, which may borrow what the first could not. It is kept where the
/// two have one layout.
pub fn emptied<A, B>(mut list: Vec<A>) -> Vec<B> {
    list.clear();
    // The standard library collects in place; were it to stop, this would be slower and not wrong.
    list.into_iter().map(|_| unreachable!("the list is empty")).collect()
}

/// A slice whose places are shared out among the tasks of one call.
#[derive(Debug)]
pub(super) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: it is an exclusive reference to a slice, which may go to another thread where its values may.
unsafe impl<T: Send> Send for Parts<'_, T> {}
// SAFETY: the only access to the values is `part`, whose callers see to it that no two threads have the same ones.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(super) fn new(values: &'a mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), of: PhantomData }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Some of the values.
    ///
    /// # Safety
    /// While the result is used, no other call's result that overlaps it is.
    #[allow(clippy::mut_from_ref, reason = "the caller promises that what is lent does not overlap")]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part outside of the slice");
        // SAFETY: the range is inside of the slice, which is borrowed exclusively for 'a; the caller's promise makes
        // this reference the only one to its values.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
