//! A byte-level tokenizer for any vocabulary of at least three special tokens and 256 bytes. Ids beyond are pairs of
//! bytes, common English ones first, so that text of a random model has letters in it. Decoding gives the text back.

use super::SynthSpec;
use super::config::{END, TURN_END, TURN_START};
use serde_json::{Map, Value, json};

const SPECIAL: [(u32, &str); 3] =
    [(END, "<|endoftext|>"), (TURN_START, "<|im_start|>"), (TURN_END, "<|im_end|>")];
/// By frequency in English, the space first.
const COMMON: &[u8] = b" etaoinshrdlucmfwypvbgkjqxz";
/// ChatML.
const TEMPLATE: &str = "{%- for message in messages %}\
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
    {%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// `tokenizer.json`.
pub(super) fn tokenizer(spec: &SynthSpec) -> Value {
    let mut vocab = Map::new();
    for (id, text) in SPECIAL {
        vocab.insert(text.into(), json!(id));
    }
    for byte in 0..=u8::MAX {
        let id = vocab.len();
        vocab.insert(letter(byte).to_string(), json!(id));
    }
    let mut merges = Vec::new();
    for (first, second) in pairs() {
        if vocab.len() >= spec.vocab as usize {
            break;
        }
        let (first, second) = (letter(first), letter(second));
        let id = vocab.len();
        vocab.insert(format!("{first}{second}"), json!(id));
        merges.push(json!([first.to_string(), second.to_string()]));
    }
    let added = SPECIAL.map(|(id, content)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level(false),
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges
        }
    })
}

/// `tokenizer_config.json`.
pub(super) fn tokenizer_config(spec: &SynthSpec) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1].1,
        "eos_token": SPECIAL[2].1,
        "pad_token": SPECIAL[0].1,
        "add_bos_token": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": spec.context,
        "chat_template": TEMPLATE
    })
}

fn byte_level(prefix: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true })
}

/// Every pair of bytes once: pairs of common letters by their joint rank, then the rest in byte order.
fn pairs() -> impl Iterator<Item = (u8, u8)> {
    let count = COMMON.len();
    let common = (0..2 * count - 1).flat_map(move |rank| {
        (0..count)
            .filter_map(move |first| Some((first, rank.checked_sub(first)?)))
            // Text is cut into words before merging: a space is followed by a letter, never preceded by one.
            .filter(move |&(_, second)| (1..count).contains(&second))
            .map(|(first, second)| (COMMON[first], COMMON[second]))
    });
    let rest = (0..=u8::MAX).flat_map(|first| (0..=u8::MAX).map(move |second| (first, second)));
    let listed = |(first, second): &(u8, u8)| COMMON.contains(first) && COMMON[1..].contains(second);
    common.chain(rest.filter(move |pair| !listed(pair)))
}

/// The printable stand-in of a byte in GPT-2's byte-level vocabularies.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(256 + before as u32).expect("below the surrogates")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::SynthFamily;
    use std::collections::BTreeSet;

    #[test]
    fn pairs_are_distinct_and_complete() {
        let all: BTreeSet<(u8, u8)> = pairs().collect();
        assert_eq!((pairs().count(), all.len()), (65536, 65536));
    }

    #[test]
    fn every_byte_has_its_own_letter() {
        let letters: BTreeSet<char> = (0..=u8::MAX).map(letter).collect();
        assert_eq!(letters.len(), 256);
        assert_eq!((letter(b' '), letter(b'\n'), letter(b'A')), ('\u{120}', '\u{10a}', 'A'));
    }

    #[test]
    fn the_vocabulary_is_filled_and_never_passed() {
        for vocab in [259, 260, 512, 70_000] {
            let spec = SynthSpec { vocab, ..SynthSpec::of(SynthFamily::Llama) };
            let made = tokenizer(&spec);
            let tokens = made["model"]["vocab"].as_object().unwrap();
            assert_eq!(tokens.len(), (vocab as usize).min(259 + 65536));
            assert!(tokens.values().all(|id| id.as_u64().unwrap() < u64::from(vocab)));
        }
    }
}
