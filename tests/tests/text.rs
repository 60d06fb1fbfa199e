//! Tokenizers and chat templates of every style against what transformers makes of them (`tests/oracles/make_text.py`),
//! and text from streams.

use lite_llm_model::Checkpoint;
use lite_llm_model::tokenizer::{Detokenizer, Message, Tokenizer};
use lite_llm_tests::harness::folder;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

const STYLES: [&str; 6] = ["o200k", "qwen", "deepseek", "gpt2", "mixtral", "phi"];

fn oracle_dir(style: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("oracles/text").join(style)
}

fn tokenizer(style: &str) -> Tokenizer {
    Tokenizer::open(&oracle_dir(style)).unwrap().unwrap()
}

fn oracle(style: &str) -> Value {
    serde_json::from_slice(&std::fs::read(oracle_dir(style).join("oracle.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A tokenizer of bytes with this template.
fn with_template(template: &str) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(oracle_dir("gpt2").join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    Tokenizer::open(dir.path()).unwrap().unwrap()
}

#[test]
fn texts_are_the_tokens_of_transformers() {
    for style in STYLES {
        let tokenizer = tokenizer(style);
        for text in oracle(style)["texts"].as_array().unwrap() {
            let found = tokenizer.encode(text["text"].as_str().unwrap()).unwrap();
            assert_eq!(found, ids(&text["ids"]), "{style}: {}", text["text"]);
            assert_eq!(tokenizer.decode(&found).unwrap(), text["decoded"].as_str().unwrap(), "{style}");
        }
    }
}

#[test]
fn chats_are_the_texts_and_tokens_of_transformers() {
    for style in STYLES {
        let tokenizer = tokenizer(style);
        for chat in oracle(style)["chats"].as_array().unwrap() {
            let messages = if style == "gpt2" {
                // Values to be printed are no messages: they have neither role nor content.
                let values = chat["messages"].as_array().unwrap();
                values.iter().map(|m| json!({ "role": "user", "value": m["value"] })).collect()
            } else {
                chat["messages"].clone()
            };
            let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
            let open = chat["add_generation_prompt"].as_bool().unwrap();
            let found = tokenizer.chat_text(&messages, open, UNIX_EPOCH);
            if let Some(error) = chat["error"].as_str() {
                let found = found.unwrap_err().to_string();
                assert!(found.contains(error), "{style}: {found} for {error}");
                continue;
            }
            assert_eq!(found.unwrap(), chat["text"].as_str().unwrap(), "{style}: {}", chat["messages"]);
            if open {
                assert_eq!(tokenizer.chat(&messages, UNIX_EPOCH).unwrap(), ids(&chat["ids"]), "{style}");
            }
        }
    }
}

#[test]
fn streams_are_the_text_without_half_characters() {
    for style in STYLES {
        let tokenizer = tokenizer(style);
        for text in oracle(style)["texts"].as_array().unwrap() {
            let ids = ids(&text["ids"]);
            let text = text["decoded"].as_str().unwrap();
            let mut stream = Detokenizer::new(Some(&tokenizer));
            let mut said = String::new();
            for &id in &ids {
                said += &stream.push(id);
                assert!(text.starts_with(&said), "{style}: {said:?} of {text:?}");
            }
            said += &stream.end();
            assert_eq!(said, text, "{style}");
        }
    }
}

/// Bytes that are no characters, in any order, cut anywhere.
#[test]
fn bad_bytes_lose_nothing_beside_them() {
    let tokenizer = tokenizer("mixtral");
    // Tokens 3 to 258 are the bytes.
    let bytes = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte) + 3).collect::<Vec<u32>>();
    let word = tokenizer.encode("Hello world").unwrap();
    let emoji = "🙂".as_bytes();
    for (tokens, text) in [
        (bytes(&[emoji, emoji, &emoji[..2]].concat()), "🙂🙂\u{fffd}"),
        (bytes(&[&[0xff], emoji, &[0x80]].concat()), "\u{fffd}🙂\u{fffd}"),
        (
            [word.clone(), bytes(emoji), bytes(&emoji[..3]), word.clone()].concat(),
            "Hello world🙂\u{fffd} Hello world",
        ),
        (
            [tokenizer.encode("Hello").unwrap(), bytes("\u{fffd}".as_bytes()), bytes(b"!")].concat(),
            "Hello\u{fffd}!",
        ),
        (vec![1, 2, 1], ""),
    ] {
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        let mut stream = Detokenizer::new(Some(&tokenizer));
        let mut said: Vec<String> = tokens.iter().map(|&token| stream.push(token)).collect();
        said.push(stream.end());
        assert_eq!(said.concat(), text, "{said:?}");
    }
}

#[test]
fn dates_are_of_the_moment_that_is_given() {
    let tokenizer = with_template("{{ strftime_now('%Y %B') }}");
    // In the middle of a month, in every time zone.
    let now = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    assert_eq!(tokenizer.chat_text(&[], true, now).unwrap(), "2023 November");
}

#[test]
fn templates_that_cannot_be_rendered_say_why() {
    let refused = |tokenizer: &Tokenizer| {
        tokenizer.chat_text(&[Message::user("x")], true, UNIX_EPOCH).unwrap_err().to_string()
    };
    for (template, word) in [
        ("{% for %}", "chat:1"),
        ("{{ raise_exception('out of order') }}", "out of order"),
        ("{{ strftime_now('%Q %!') }}", "strftime_now"),
        ("{{ messages[0].what.is }}", "undefined"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
            "fuel",
        ),
    ] {
        let error = refused(&with_template(template));
        assert!(error.contains(word), "{template}: {error}");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(oracle_dir("gpt2").join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    assert!(refused(&Tokenizer::open(dir.path()).unwrap().unwrap()).contains("no chat template"));
    let config = json!({ "chat_template": [{ "name": "rag", "template": "" }, { "name": "tool_use", "template": "" }] });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    assert!(refused(&Tokenizer::open(dir.path()).unwrap().unwrap()).contains("rag, tool_use"));
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(folder("qwen3_moe").join(name), dir.path().join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(Tokenizer::of(&checkpoint).unwrap().is_some());
    // A token more than the embedding has rows.
    let added = json!({ "content": "<late>", "lstrip": false, "rstrip": false, "normalized": false, "single_word": false,
        "special": true });
    let config = json!({ "added_tokens_decoder": { "512": added } });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let error = Tokenizer::of(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("token 512 (\"<late>\")") && error.contains("512 rows"), "{error}");
}

#[test]
fn a_tokenizer_that_draws_its_tokens_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let read = std::fs::read(oracle_dir("gpt2").join("tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_slice(&read).unwrap();
    for (dropout, part) in [(json!(null), None), (json!(0.0), None), (json!(0.5), Some("model.dropout"))] {
        tokenizer["model"]["dropout"] = dropout;
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let error = Tokenizer::open(dir.path()).err().map(|error| error.to_string());
        assert_eq!(error.is_some(), part.is_some(), "{error:?}");
        assert!(error.unwrap_or_default().contains(part.unwrap_or_default()));
    }
}

#[test]
fn stops_are_those_of_the_generation_configuration() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(folder("qwen3_moe").join(name), dir.path().join(name)).unwrap();
    }
    let of_config = Checkpoint::open(dir.path()).unwrap().eos().to_vec();
    for (value, expected) in [(json!(7), vec![7]), (json!([7, 9]), vec![7, 9]), (Value::Null, of_config)] {
        let config = json!({ "eos_token_id": value }).to_string();
        std::fs::write(dir.path().join("generation_config.json"), config).unwrap();
        assert_eq!(Checkpoint::open(dir.path()).unwrap().eos(), expected);
    }
    for value in [json!("7"), json!([7, -1]), json!(1.5)] {
        let config = json!({ "eos_token_id": value }).to_string();
        std::fs::write(dir.path().join("generation_config.json"), config).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("generation_config.json") && error.contains("eos_token_id"), "{error}");
    }
}
