//! See `lite_llm_tests::fuzzing::gguf`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lite_llm_tests::fuzzing::gguf(bytes));
