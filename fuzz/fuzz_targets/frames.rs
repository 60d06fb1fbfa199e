//! See `lite_llm_tests::fuzzing::frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lite_llm_tests::fuzzing::frames(bytes));
