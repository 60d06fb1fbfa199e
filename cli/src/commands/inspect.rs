//! `lite-llm inspect`: whatever it is, say what it holds.

use crate::bench::hits::Hits;
use crate::exit::{Exit, corrupt};
use crate::history::{History, describe};
use crate::quantity::Size;
use crate::terminal;
use anyhow::{Context, bail, ensure};
use clap::Args;
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::journal::frame::{
    SEGMENT_MAGIC, SNAPSHOT_HEADER_BYTES, SNAPSHOT_MAGIC, SegmentHeader, SnapshotHeader, parse_segment_name,
    parse_snapshot_name,
};
use lite_llm_model::Checkpoint;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Bytes of a file that are read to tell what it is.
const HEAD_BYTES: u64 = 4096;
/// Bytes of the largest crash report.
const REPORT_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A checkpoint or state directory; or a journal segment, a snapshot or a crash report in one
    path: PathBuf,
    /// Print every record of a state directory's journal, too
    #[arg(long)]
    records: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl InspectArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let path = &self.path;
        let found = path.metadata().with_context(|| format!("cannot read {}", path.display()))?;
        let value = if found.is_dir() {
            if path.join("config.json").exists() || path.join("manifest.json").exists() {
                checkpoint(path)?
            } else {
                state(path, self.records)?
            }
        } else {
            // A pipe may never answer.
            ensure!(found.is_file(), "{} is no checkpoint or state directory, and no file", path.display());
            file(path, found.len())?
        };
        let mut out = terminal::stdout();
        if self.json {
            writeln!(out, "{value}")?;
        } else {
            let mut text = String::new();
            lines(&value, 0, &mut text);
            out.write_all(text.as_bytes())?;
        }
        Ok(Exit::Ok)
    }
}

/// A file by what it begins with; by its name where that is damaged.
fn file(path: &Path, bytes: u64) -> anyhow::Result<Value> {
    let head = head(path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if head.starts_with(&SEGMENT_MAGIC) || parse_segment_name(&name).is_some() {
        segment(path, bytes, &head)
    } else if head.starts_with(&SNAPSHOT_MAGIC) || parse_snapshot_name(&name).is_some() {
        snapshot(path, bytes, &head)
    } else if head.starts_with(b"{") {
        report(path, bytes)
    } else {
        bail!("{} is no checkpoint or state directory, no segment, snapshot or crash report", path.display())
    }
}

fn checkpoint(dir: &Path) -> anyhow::Result<Value> {
    let checkpoint = Checkpoint::open(dir)?;
    let arch = checkpoint.arch();
    let mut files = Vec::new();
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if [".safetensors", ".bin"].iter().any(|end| name.ends_with(end)) {
            let size = entry.metadata()?.len();
            bytes += size;
            files.push(json!({ "name": name, "bytes": size }));
        }
    }
    files.sort_by_key(|file| file["name"].as_str().map(str::to_owned));
    Ok(json!({
        "kind": "checkpoint",
        "path": dir.display().to_string(),
        "family": arch.family,
        "layers": arch.layers.len(),
        "moe_layers": arch.moe_layers().len(),
        "hidden": arch.hidden,
        "heads": arch.attention.heads,
        "kv_heads": arch.attention.kv_heads,
        "vocab": arch.vocab,
        "context": arch.context,
        "experts": arch.moe.as_ref().map(|moe| moe.experts),
        "experts_per_token": arch.moe.as_ref().map(|moe| moe.top_k),
        "tiers": checkpoint.tiers().iter().map(|tier| json!({
            "name": tier.name,
            "experts": tier.experts,
            "placement": format!("{:?}", tier.placement).to_lowercase(),
        })).collect::<Vec<_>>(),
        "eos": checkpoint.eos(),
        "tokenizer": dir.join("tokenizer.json").exists(),
        "bytes": bytes,
        "files": files,
    }))
}

fn state(dir: &Path, records: bool) -> anyhow::Result<Value> {
    let mut history = History::open(dir)?;
    let first = history.engine.next_seq().0;
    let mut listed = Vec::new();
    let mut hits = Hits::default();
    history.walk(None, |moment| {
        hits.note(moment);
        if records {
            listed.push(json!({
                "seq": moment.record.seq,
                "time_ns": moment.record.time_ns,
                "digest": Digest(moment.record.digest).to_string(),
                "input": describe(moment.input),
            }));
        }
        Ok(())
    })?;
    let engine = &history.engine;
    let view = engine.view();
    let scanned = &history.scanned;
    let segments: Vec<Value> = scanned
        .segments
        .iter()
        .map(|s| {
            json!({
                "name": s.name,
                "bytes": s.bytes,
                "first": s.header.first_seq,
                "incarnation": s.header.header.incarnation,
            })
        })
        .collect();
    let unfinished: Vec<Value> = view
        .requests()
        .map(|r| {
            json!({
                "id": r.id.as_str(),
                "prompt_tokens": r.body.prompt.len(),
                "generated": r.tokens.len(),
                "max_tokens": r.body.max_tokens,
            })
        })
        .collect();
    let mut value = json!({
        "kind": "state",
        "path": dir.display().to_string(),
        "first": first,
        "last": engine.next_seq().0 - 1,
        "lifecycle": format!("{:?}", view.lifecycle()),
        "incarnation": view.incarnation().0,
        "routing_seed": view.routing_seed(),
        "weights": view.plan().map(|plan| plan.identity.weights.to_string()),
        "snapshot_before": scanned.snapshot.as_ref().map(|snapshot| snapshot.next),
        "segments": segments,
        "torn_bytes": scanned.cut.as_ref().map_or(0, |cut| cut.bytes),
        "unfinished": unfinished,
        "experts": hits.report(),
        "digest": engine.digest().to_string(),
        "state_digest": engine.state_digest().to_string(),
    });
    if records {
        value["records"] = Value::Array(listed);
    }
    Ok(value)
}

fn segment(path: &Path, bytes: u64, head: &[u8]) -> anyhow::Result<Value> {
    let (header, _) = SegmentHeader::decode(head)
        .map_err(|invalid| corrupt(format!("{}: the header is damaged: {invalid:?}", path.display())))?;
    Ok(json!({
        "kind": "segment",
        "path": path.display().to_string(),
        "bytes": bytes,
        "index": header.index,
        "first": header.first_seq,
        "logic_version": header.header.logic_version,
        "node": header.header.node,
        "incarnation": header.header.incarnation,
        "identity": Digest(header.header.identity).to_string(),
    }))
}

fn snapshot(path: &Path, bytes: u64, head: &[u8]) -> anyhow::Result<Value> {
    let header = SnapshotHeader::decode(&head[..head.len().min(SNAPSHOT_HEADER_BYTES)])
        .map_err(|invalid| corrupt(format!("{}: the header is damaged: {invalid:?}", path.display())))?;
    let of_header = header.state_bytes.saturating_add(SNAPSHOT_HEADER_BYTES as u64);
    if bytes != of_header {
        return Err(corrupt(format!("{} has {bytes} bytes, its header says {of_header}", path.display())));
    }
    // The directory's reader verifies the state's hash; a snapshot that is not the newest is read by itself.
    let whole = std::fs::read(path)?;
    let state = whole.get(SNAPSHOT_HEADER_BYTES..).unwrap_or_default();
    if Digest::of(state).0 != header.state_hash {
        return Err(corrupt(format!("{}: the state does not have the hash in its header", path.display())));
    }
    let engine = Engine::restore(state)?;
    Ok(json!({
        "kind": "snapshot",
        "path": path.display().to_string(),
        "bytes": bytes,
        "next": header.next,
        "digest": Digest(header.digest).to_string(),
        "logic_version": header.header.logic_version,
        "incarnation": header.header.incarnation,
        "lifecycle": format!("{:?}", engine.view().lifecycle()),
        "unfinished": engine.view().requests().count(),
        "state_digest": engine.state_digest().to_string(),
    }))
}

fn report(path: &Path, bytes: u64) -> anyhow::Result<Value> {
    if bytes > REPORT_BYTES_MAX {
        bail!("{} has {}: no crash report is that long", path.display(), Size(bytes));
    }
    let mut value: Value = serde_json::from_slice(&std::fs::read(path)?)
        .map_err(|error| corrupt(format!("{} is no JSON: {error}", path.display())))?;
    if !value["failed_at_ns"].is_u64() || !value["journal"].is_object() {
        bail!("{} is JSON, but no crash report", path.display());
    }
    value["kind"] = "crash_report".into();
    Ok(value)
}

fn head(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(HEAD_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Keys and values, a line each, nested ones indented.
fn lines(value: &Value, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            let width = map.keys().map(String::len).max().unwrap_or(0);
            for (key, value) in map {
                match value {
                    Value::Array(list) if list.iter().any(Value::is_object) => {
                        out.push_str(&format!("{indent}{key}\n"));
                        for entry in list {
                            out.push_str(&format!("{indent}  {}\n", row(entry)));
                        }
                    }
                    Value::Object(_) => {
                        out.push_str(&format!("{indent}{key}\n"));
                        lines(value, depth + 1, out);
                    }
                    _ => out.push_str(&format!("{indent}{key:width$}  {}\n", plain(value))),
                }
            }
        }
        _ => out.push_str(&format!("{indent}{}\n", plain(value))),
    }
}

fn row(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            map.iter().map(|(key, value)| format!("{key} {}", plain(value))).collect::<Vec<_>>().join(", ")
        }
        _ => plain(value),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        Value::Array(list) if list.is_empty() => "none".into(),
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(" "),
        _ => value.to_string(),
    }
}
