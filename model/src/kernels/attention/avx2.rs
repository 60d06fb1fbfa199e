//! The AVX2 form of the scores: eight keys at a time, whose lanes are transposed so that the left-to-right sums of
//! eight dot products are fifteen additions.

use crate::kernels::packed::CHUNK;
use std::arch::x86_64::*;

/// `out[i] = dot(q, keys[i]) * scale`, for keys of one chunk.
pub(super) fn dots(q: &[f32], keys: &[f32], scale: f32, out: &mut [f32]) {
    assert!(crate::kernels::Isa::Avx2.available(), "this machine lacks AVX2, FMA or F16C");
    assert!(!q.is_empty() && q.len() <= CHUNK);
    assert_eq!(keys.len(), q.len() * out.len());
    for (keys, out) in keys.chunks(8 * q.len()).zip(out.chunks_mut(8)) {
        // The places of missing keys are taken by the last one, and their results dropped.
        let key = |index: usize| keys[index.min(out.len() - 1) * q.len()..].as_ptr();
        let mut scores = [0.0f32; 8];
        // SAFETY: the features were checked; each pointer is followed by `q.len()` values, and `scores` takes a register.
        unsafe {
            let sums = eight(q, [key(0), key(1), key(2), key(3), key(4), key(5), key(6), key(7)]);
            _mm256_storeu_ps(scores.as_mut_ptr(), _mm256_mul_ps(sums, _mm256_set1_ps(scale)));
        }
        out.copy_from_slice(&scores[..out.len()]);
    }
}

/// # Safety
/// Every key is followed by `q.len()` values.
#[target_feature(enable = "avx2,fma")]
unsafe fn eight(q: &[f32], keys: [*const f32; 8]) -> __m256 {
    let [a, b, c, d, e, f, g, h] = keys;
    // SAFETY: the caller's promise is passed on.
    let ([al, bl, cl, dl], [ah, bh, ch, dh]) = unsafe { lanes(q, [a, b, c, d]) };
    // SAFETY: as above.
    let ([el, fl, gl, hl], [eh, fh, gh, hh]) = unsafe { lanes(q, [e, f, g, h]) };
    let low = transpose([al, bl, cl, dl, el, fl, gl, hl]);
    let high = transpose([ah, bh, ch, dh, eh, fh, gh, hh]);
    let mut sum = low[0];
    for lane in low[1..].iter().chain(&high) {
        sum = _mm256_add_ps(sum, *lane);
    }
    sum
}

/// The sixteen lanes of four dot products: the lower eight of each, and the upper eight.
///
/// # Safety
/// Every key is followed by `q.len()` values.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn lanes(q: &[f32], keys: [*const f32; 4]) -> ([__m256; 4], [__m256; 4]) {
    let (mut low, mut high) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4]);
    let whole = q.len() / 16 * 16;
    for at in (0..whole).step_by(16) {
        // SAFETY: at + 16 <= q.len().
        unsafe {
            let (x, y) = (_mm256_loadu_ps(q.as_ptr().add(at)), _mm256_loadu_ps(q.as_ptr().add(at + 8)));
            for (index, key) in keys.iter().enumerate() {
                // Eight keys ahead. A hint: the address may lie outside, and nothing is read through it.
                _mm_prefetch::<_MM_HINT_T0>(key.wrapping_add(8 * q.len() + at).cast());
                low[index] = _mm256_fmadd_ps(x, _mm256_loadu_ps(key.add(at)), low[index]);
                high[index] = _mm256_fmadd_ps(y, _mm256_loadu_ps(key.add(at + 8)), high[index]);
            }
        }
    }
    let rest = (q.len() - whole) as i32;
    if rest > 0 {
        // Masked places load as +0, which is the padding of the definition.
        let order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let first = _mm256_cmpgt_epi32(_mm256_set1_epi32(rest), order);
        let second = _mm256_cmpgt_epi32(_mm256_set1_epi32(rest - 8), order);
        // SAFETY: a masked load touches no place whose mask is unset, and the others are below q.len().
        unsafe {
            let pair = |at: *const f32| {
                let at = at.add(whole);
                (_mm256_maskload_ps(at, first), _mm256_maskload_ps(at.wrapping_add(8), second))
            };
            let (x, y) = pair(q.as_ptr());
            for (index, key) in keys.iter().enumerate() {
                let (lower, upper) = pair(*key);
                low[index] = _mm256_fmadd_ps(x, lower, low[index]);
                high[index] = _mm256_fmadd_ps(y, upper, high[index]);
            }
        }
    }
    (low, high)
}

/// Register l of the result holds value l of each register.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transpose(r: [__m256; 8]) -> [__m256; 8] {
    let pairs = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let ((ab0, ab2), (cd0, cd2)) = (pairs(r[0], r[1]), pairs(r[2], r[3]));
    let ((ef0, ef2), (gh0, gh2)) = (pairs(r[4], r[5]), pairs(r[6], r[7]));
    let fours = |a, b| (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
    let ((a0, a1), (a2, a3)) = (fours(ab0, cd0), fours(ab2, cd2));
    let ((e0, e1), (e2, e3)) = (fours(ef0, gh0), fours(ef2, gh2));
    [
        _mm256_permute2f128_ps::<0x20>(a0, e0),
        _mm256_permute2f128_ps::<0x20>(a1, e1),
        _mm256_permute2f128_ps::<0x20>(a2, e2),
        _mm256_permute2f128_ps::<0x20>(a3, e3),
        _mm256_permute2f128_ps::<0x31>(a0, e0),
        _mm256_permute2f128_ps::<0x31>(a1, e1),
        _mm256_permute2f128_ps::<0x31>(a2, e2),
        _mm256_permute2f128_ps::<0x31>(a3, e3),
    ]
}
