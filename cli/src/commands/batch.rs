//! `lite-llm run --batch`: many requests at once, results in order of completion.

use crate::commands::run::{Opened, RunArgs};
use crate::exit::Exit;
use crate::prompt::Prompt;
use crate::request::PriorityName;
use crate::results::Results;
use crate::serve::{Service, Serving};
use crate::state::StateDir;
use crate::stream::finish_name;
use anyhow::{Context, bail};
use clap::Args;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::Body;
use lite_llm_core::output::{FinishReason, Refusal};
use lite_llm_hw::node::StreamEvent;
use lite_llm_model::tokenizer::{Detokenizer, Message};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Requests that are with the node at once.
const IN_FLIGHT_MAX: usize = 64;
/// How long a node without room is left alone.
const BUSY_PAUSE: Duration = Duration::from_millis(100);
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

/// A request of the batch.
#[derive(Debug)]
struct Task {
    /// What the batch calls it.
    id: RequestId,
    /// What the node calls it: by another name, if the node has forgotten the stream of that one.
    name: RequestId,
    body: Body,
}

/// How one request of a batch ended.
struct Done {
    task: Task,
    tokens: Vec<u32>,
    end: Result<FinishReason, NoResult>,
}

/// Why there is no result.
enum NoResult {
    Refused(Refusal, String),
    /// The node stopped; the request is in the journal.
    Stopped,
}

/// Runs a batch.
pub(crate) fn run(args: &RunArgs, opened: Opened) -> anyhow::Result<Exit> {
    let state = StateDir::choose(args.state.as_deref())?;
    let ended = run_on(args, &opened, &state, || {
        let service = Service::start(&args.model, &state, &opened.settings, None)?;
        if args.beats {
            crate::beats::progress(service.node().handle())?;
        }
        Ok(service)
    });
    state.end(matches!(ended, Ok(Exit::Ok)));
    ended
}

/// Runs a batch on whatever serves.
pub(crate) fn run_on<S: Serving>(
    args: &RunArgs,
    opened: &Opened,
    state: &StateDir,
    start: impl FnOnce() -> anyhow::Result<S>,
) -> anyhow::Result<Exit> {
    let path = args.batch.batch.as_deref().context("a batch")?;
    let requests = read(args, opened, path)?;
    let digests = requests.iter().map(|(id, body)| (id.as_str(), Digest::of_value(body))).collect();
    let mut results = Results::open(args.batch.out.as_deref(), args.state.as_deref(), &digests)?;
    let left = requests.into_iter().filter(|(id, _)| !results.has(id.as_str()));
    let left = left.map(|(id, body)| Task { name: id.clone(), id, body }).collect();
    serve(args, opened, state, left, &mut results, start)?;
    anyhow::ensure!(
        results.failed == 0,
        "{} requests of the batch failed; their lines say why",
        results.failed
    );
    Ok(Exit::Ok)
}

fn serve<S: Serving>(
    args: &RunArgs,
    opened: &Opened,
    state: &StateDir,
    waiting: VecDeque<Task>,
    results: &mut Results,
    start: impl FnOnce() -> anyhow::Result<S>,
) -> anyhow::Result<()> {
    if waiting.is_empty() {
        return Ok(());
    }
    let service = start()?;
    if args.state.is_some() {
        results.keep(state.path())?;
    }
    ask(service, opened, waiting, results).with_context(|| state.goes_on(None))
}

/// Asks for everything, some requests at a time.
fn ask<S: Serving>(
    service: S,
    opened: &Opened,
    mut waiting: VecDeque<Task>,
    results: &mut Results,
) -> anyhow::Result<()> {
    // What ends while its result is written, or lost by a crash, is to be kept until it is asked for again.
    let limits = &opened.settings.config.limits;
    let window = IN_FLIGHT_MAX.min(limits.requests_max.min(limits.finished_max) as usize);
    let (sender, receiver) = channel();
    let (mut running, mut busy) = (0, false);
    while running > 0 || !waiting.is_empty() {
        while running < window
            && !busy
            && let Some(task) = waiting.pop_front()
        {
            submit(&service, task, sender.clone())?;
            running += 1;
        }
        busy = false;
        if running == 0 {
            // Requests that are none of the batch have all the room.
            std::thread::sleep(BUSY_PAUSE);
            continue;
        }
        let done = receiver.recv().context("a thread of a stream")?;
        running -= 1;
        match &done.end {
            // What a node that drains refuses is not done, and has no result: the next run of the batch asks again.
            Err(NoResult::Stopped | NoResult::Refused(Refusal::NotServing, _)) => {
                return Err(service.broken_off());
            }
            Err(NoResult::Refused(Refusal::Busy, _)) => {
                waiting.push_front(done.task);
                busy = true;
            }
            Err(NoResult::Refused(Refusal::Expired, _)) if let Some(task) = renamed(&done.task) => {
                waiting.push_front(task);
            }
            _ => results.write(&done.task.body, &to_json(opened, &done))?,
        }
    }
    service.end()
}

/// The same request under the next name: computed again, it has the same stream.
fn renamed(task: &Task) -> Option<Task> {
    let before =
        task.name.as_str().strip_prefix(task.id.as_str()).and_then(|rest| rest.strip_prefix(".again-"));
    let number: u64 = before.and_then(|number| number.parse().ok()).unwrap_or(0) + 1;
    let name = RequestId::new(format!("{}.again-{number}", task.id)).ok()?;
    Some(Task { id: task.id.clone(), name, body: task.body.clone() })
}

/// Collects a stream on a thread of its own: the node's channels cannot be waited for together.
fn submit(service: &impl Serving, task: Task, done: Sender<Done>) -> anyhow::Result<()> {
    let events = service.submit(task.name.clone(), task.body.clone());
    let collect = move || {
        let (tokens, end) = collect(&events);
        // The receiver is gone only when the command has failed.
        let _ = done.send(Done { task, tokens, end });
    };
    std::thread::Builder::new().name("stream".into()).spawn(collect).context("cannot start a thread")?;
    Ok(())
}

fn collect(events: &Receiver<StreamEvent>) -> (Vec<u32>, Result<FinishReason, NoResult>) {
    let mut tokens = Vec::new();
    loop {
        match events.recv() {
            Ok(StreamEvent::Accepted { .. }) => {}
            Ok(StreamEvent::Token { token, .. }) => tokens.push(token),
            Ok(StreamEvent::Finish { reason, .. }) => return (tokens, Ok(reason)),
            Ok(StreamEvent::Refused { refusal, reason }) => {
                return (tokens, Err(NoResult::Refused(refusal, reason)));
            }
            Err(_) => return (tokens, Err(NoResult::Stopped)),
        }
    }
}

fn to_json(opened: &Opened, done: &Done) -> Value {
    let id = done.task.id.as_str();
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
        Err(NoResult::Refused(_, reason)) => json!({ "id": id, "error": reason }),
        Err(NoResult::Stopped) => json!({ "id": id, "error": "unfinished" }),
    }
}

fn read(args: &RunArgs, opened: &Opened, path: &Path) -> anyhow::Result<Vec<(RequestId, Body)>> {
    let cannot = || format!("cannot read the batch {}", path.display());
    let mut reader = BufReader::new(File::open(path).with_context(cannot)?);
    let (mut requests, mut ids, mut number) = (Vec::new(), BTreeSet::new(), 0u64);
    loop {
        let mut text = Vec::new();
        let mut bounded = std::io::Read::take(&mut reader, LINE_BYTES_MAX);
        if bounded.read_until(b'\n', &mut text).with_context(cannot)? == 0 {
            return Ok(requests);
        }
        number += 1;
        if text.trim_ascii().is_empty() {
            continue;
        }
        let place = || format!("{}, line {number}", path.display());
        let line: Line = serde_json::from_slice(&text).with_context(place)?;
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
        (None, None, Some(Chat::Several(messages))) if messages.is_empty() => bail!("chat has no message"),
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
    body.check(opened.vocab, opened.context).map_err(anyhow::Error::msg)?;
    Ok((id, body))
}
