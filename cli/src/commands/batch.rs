//! `lite-llm run --batch`: many requests at once, results in order of completion.

use crate::commands::run::{Opened, PriorityName, RunArgs};
use crate::exit::{Exit, usage};
use crate::prompt::Prompt;
use crate::serve::Service;
use crate::state::StateDir;
use crate::stream::{finish_name, is_complete};
use anyhow::{Context, bail};
use clap::Args;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::Body;
use lite_llm_core::lifecycle::Lifecycle;
use lite_llm_core::output::FinishReason;
use lite_llm_hw::node::{NodeHandle, StreamEvent};
use lite_llm_model::tokenizer::{Detokenizer, Message};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

/// Requests that are with the node at once.
const IN_FLIGHT_MAX: usize = 64;
/// Bytes of the longest line of a batch.
const LINE_BYTES_MAX: u64 = 64 << 20;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Batch")]
pub(crate) struct BatchArgs {
    /// Many requests: a JSON object a line, {id, prompt | prompt_tokens | chat, max_tokens, temperature, ...}
    #[arg(long, value_name = "IN.jsonl", conflicts_with_all = ["prompt", "prompt_file", "chat", "prompt_tokens", "request_id",
        "stream", "logits", "routes", "generations", "from_offset"])]
    pub(crate) batch: Option<PathBuf>,
    /// Where the results go, a JSON object a line; what is there already is not done again
    #[arg(long, value_name = "OUT.jsonl")]
    pub(crate) out: Option<PathBuf>,
}

/// A line of a batch. What is left out is as the command line says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<String>,
    prompt: Option<String>,
    prompt_tokens: Option<Vec<u32>>,
    chat: Option<Chat>,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: Option<u64>,
    stop: Option<Vec<String>>,
    ignore_eos: Option<bool>,
    deadline_ms: Option<u64>,
    priority: Option<PriorityName>,
}

/// A user's message, or all messages so far.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Chat {
    One(String),
    Several(Vec<Message>),
}

/// How one request of a batch ended.
struct Done {
    id: RequestId,
    tokens: Vec<u32>,
    end: Result<FinishReason, End>,
}

/// Why there is no result.
enum End {
    Refused(String),
    /// The node stopped; the request is in the journal.
    Stopped,
}

/// Runs a batch.
pub(crate) fn run(args: &RunArgs, opened: Opened) -> anyhow::Result<Exit> {
    let path = args.batch.batch.as_deref().context("a batch")?;
    let requests = read(args, &opened, path)?;
    let mut results = Results::open(args.batch.out.as_deref(), args.state.is_some())?;
    let left: Vec<(RequestId, Body)> =
        requests.into_iter().filter(|(id, _)| !results.done.contains(id.as_str())).collect();
    let state = StateDir::choose(args.state.as_deref())?;
    let ended = serve(args, &opened, &state, left, &mut results);
    state.end(matches!(ended, Ok(Exit::Ok)));
    ended
}

fn serve(
    args: &RunArgs,
    opened: &Opened,
    state: &StateDir,
    left: Vec<(RequestId, Body)>,
    results: &mut Results,
) -> anyhow::Result<Exit> {
    if left.is_empty() {
        return Ok(Exit::Ok);
    }
    let service = Service::start(&args.model, state, &opened.settings, None)?;
    if args.beats {
        crate::beats::progress(service.node().handle())?;
    }
    let window = IN_FLIGHT_MAX.min(opened.settings.config.limits.requests_max as usize);
    let (sender, receiver) = channel();
    let (mut waiting, mut running, mut failed) = (left.into_iter(), 0, 0u64);
    loop {
        while running < window
            && let Some((id, body)) = waiting.next()
        {
            submit(&service.node().handle(), id, body, sender.clone())?;
            running += 1;
        }
        if running == 0 {
            break;
        }
        let Ok(mut done) = receiver.recv() else { break };
        running -= 1;
        // What a node that drains refuses is not done, and has no result: the next run of the batch asks again.
        if matches!(done.end, Err(End::Refused(_))) && !serves(&service) {
            done.end = Err(End::Stopped);
        }
        match &done.end {
            Err(End::Stopped) => {
                let report = service.wait()?;
                bail!(
                    "drained with {} unfinished requests; the same command with --state {} goes on",
                    report.unfinished,
                    state.path().display()
                );
            }
            Ok(reason) if is_complete(reason) => {}
            Ok(_) | Err(End::Refused(_)) => failed += 1,
        }
        results.write(&to_json(opened, &done))?;
    }
    service.stop()?;
    anyhow::ensure!(failed == 0, "{failed} requests of the batch failed; their lines say why");
    Ok(Exit::Ok)
}

/// Whether the node accepts requests.
fn serves(service: &Service) -> bool {
    let lifecycle = service.node().status().map(|status| status.lifecycle);
    matches!(lifecycle, Ok(Lifecycle::Active | Lifecycle::Reconfiguring))
}

/// Collects a stream on a thread of its own: the node's channels cannot be waited for together.
fn submit(node: &NodeHandle, id: RequestId, body: Body, done: Sender<Done>) -> anyhow::Result<()> {
    let events = node.submit(id.clone(), body, 0);
    let collect = move || {
        let (tokens, end) = collect(&events);
        // The receiver is gone only when the command has failed.
        let _ = done.send(Done { id, tokens, end });
    };
    std::thread::Builder::new().name("stream".into()).spawn(collect).context("cannot start a thread")?;
    Ok(())
}

fn collect(events: &Receiver<StreamEvent>) -> (Vec<u32>, Result<FinishReason, End>) {
    let mut tokens = Vec::new();
    loop {
        match events.recv() {
            Ok(StreamEvent::Accepted { .. }) => {}
            Ok(StreamEvent::Token { token, .. }) => tokens.push(token),
            Ok(StreamEvent::Finish { reason, .. }) => return (tokens, Ok(reason)),
            Ok(StreamEvent::Refused { reason }) => return (tokens, Err(End::Refused(reason))),
            Err(_) => return (tokens, Err(End::Stopped)),
        }
    }
}

fn to_json(opened: &Opened, done: &Done) -> Value {
    let id = done.id.as_str();
    match &done.end {
        Ok(reason) => {
            let mut text = Detokenizer::new(opened.tokenizer.as_ref());
            let mut whole: String = done.tokens.iter().map(|&token| text.push(token)).collect();
            whole.push_str(&text.end());
            let mut value = json!({
                "id": id,
                "tokens": done.tokens,
                "text": opened.tokenizer.as_ref().map(|_| whole),
                "finish_reason": finish_name(reason),
            });
            if let FinishReason::Fault(fault) = reason {
                value["error"] = fault.as_str().into();
            }
            value
        }
        Err(End::Refused(reason)) => json!({ "id": id, "error": reason }),
        Err(End::Stopped) => json!({ "id": id, "error": "unfinished" }),
    }
}

fn read(args: &RunArgs, opened: &Opened, path: &Path) -> anyhow::Result<Vec<(RequestId, Body)>> {
    let cannot = || format!("cannot read the batch {}", path.display());
    let mut reader = BufReader::new(File::open(path).with_context(cannot)?);
    let (mut requests, mut ids, mut number) = (Vec::new(), BTreeSet::new(), 0u64);
    loop {
        let mut text = String::new();
        let read =
            std::io::Read::take(&mut reader, LINE_BYTES_MAX).read_line(&mut text).with_context(cannot)?;
        if read == 0 {
            return Ok(requests);
        }
        number += 1;
        if text.trim().is_empty() {
            continue;
        }
        let place = || format!("{}, line {number}", path.display());
        let line: Line = serde_json::from_str(&text).with_context(place)?;
        let (id, body) = request(args, opened, line, number).with_context(place)?;
        anyhow::ensure!(ids.insert(id.clone()), "{}: the id {id} is there twice", place());
        requests.push((id, body));
    }
}

fn request(args: &RunArgs, opened: &Opened, line: Line, number: u64) -> anyhow::Result<(RequestId, Body)> {
    let id = line.id.unwrap_or_else(|| format!("line-{number}"));
    let id = RequestId::new(id).map_err(anyhow::Error::msg)?;
    let prompt = match (line.prompt, line.prompt_tokens, line.chat) {
        (Some(text), None, None) => Prompt::Text(text),
        (None, Some(tokens), None) => Prompt::Tokens(tokens),
        (None, None, Some(Chat::One(text))) => Prompt::Chat(vec![Message::user(&text)]),
        (None, None, Some(Chat::Several(messages))) => Prompt::Chat(messages),
        _ => bail!("give one of prompt, prompt_tokens and chat"),
    };
    let mut body = args.request.body(prompt.tokens(opened.tokenizer.as_ref(), &args.model)?);
    let sampling = &mut body.sampling;
    sampling.temperature = line.temperature.unwrap_or(sampling.temperature);
    sampling.top_k = line.top_k.unwrap_or(sampling.top_k);
    sampling.top_p = line.top_p.unwrap_or(sampling.top_p);
    sampling.min_p = line.min_p.unwrap_or(sampling.min_p);
    sampling.repetition_penalty = line.repetition_penalty.unwrap_or(sampling.repetition_penalty);
    sampling.seed = line.seed.unwrap_or(sampling.seed);
    body.max_tokens = line.max_tokens.unwrap_or(body.max_tokens);
    body.stop = line.stop.unwrap_or(body.stop);
    body.ignore_eos = line.ignore_eos.unwrap_or(body.ignore_eos);
    body.priority = line.priority.map_or(body.priority, Into::into);
    body.deadline_ns = line.deadline_ms.map_or(body.deadline_ns, |ms| Some(ms.saturating_mul(1_000_000)));
    if opened.tokenizer.is_none() && !body.stop.is_empty() {
        bail!("stop needs a tokenizer, and this checkpoint has none");
    }
    Ok((id, body))
}

/// Where results go, and which are there.
struct Results {
    /// Standard output if `None`; it is locked for one result at a time, because beats go there too.
    out: Option<File>,
    done: BTreeSet<String>,
}

impl Results {
    /// Opens the file of an earlier run of the same batch, without the line that a crash tore.
    fn open(path: Option<&Path>, resumable: bool) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self { out: None, done: BTreeSet::new() });
        };
        let cannot = || format!("cannot write the results {}", path.display());
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(cannot)?;
        let (mut done, mut whole) = (BTreeSet::new(), 0u64);
        for line in BufReader::new(&file).split(b'\n') {
            let line = line.with_context(cannot)?;
            let Ok(value) = serde_json::from_slice::<Value>(&line) else { break };
            let Some(id) = value["id"].as_str() else { break };
            done.insert(id.to_owned());
            whole += line.len() as u64 + 1;
        }
        let bytes = file.metadata().with_context(cannot)?.len();
        if bytes > 0 && !resumable {
            return Err(usage(format!(
                "{} is there already: name another file, or go on with the --state that wrote it",
                path.display()
            )));
        }
        let torn = bytes.saturating_sub(whole.min(bytes));
        anyhow::ensure!(
            torn == 0 || last_line_only(&file, whole)?,
            "{} has lines that are no results: name another file",
            path.display()
        );
        file.set_len(whole.min(bytes)).with_context(cannot)?;
        file.seek(std::io::SeekFrom::End(0)).with_context(cannot)?;
        if whole == bytes + 1 {
            // The last line was whole but for its end.
            file.write_all(b"\n").with_context(cannot)?;
        }
        Ok(Self { out: Some(file), done })
    }

    fn write(&mut self, value: &Value) -> anyhow::Result<()> {
        let line = format!("{value}\n");
        match &mut self.out {
            None => {
                let mut out = crate::terminal::stdout();
                out.write_all(line.as_bytes()).and_then(|()| out.flush()).context("cannot write a result")
            }
            // A line that is lost after the journal has forgotten its request could not be had again.
            Some(file) => file
                .write_all(line.as_bytes())
                .and_then(|()| file.sync_data())
                .context("cannot write a result to --out"),
        }
    }
}

/// Whether what follows is one torn line, as a crash leaves it.
fn last_line_only(file: &File, from: u64) -> anyhow::Result<bool> {
    let mut file = file;
    file.seek(std::io::SeekFrom::Start(from))?;
    let mut rest = Vec::new();
    BufReader::new(file).read_until(b'\n', &mut rest)?;
    Ok(rest.last() != Some(&b'\n'))
}
