//! Who listens to which stream. The engine addresses streams by request id; several clients may listen to one.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use lite_llm_core::ids::{RequestId, Seq};
use lite_llm_core::output::{FinishReason, Refusal};

use super::{GenerationSpan, StreamEvent};

/// A client that listens to a stream.
#[derive(Debug)]
struct Listener {
    /// Its `Submit`: what older inputs brought about is not for it.
    since: Seq,
    /// The next token offset that it has not heard.
    next: u32,
    events: Sender<StreamEvent>,
}

/// Everybody who listens.
#[derive(Debug, Default)]
pub(super) struct Streams {
    listeners: BTreeMap<RequestId, Vec<Listener>>,
}

impl Streams {
    pub(super) fn listen(&mut self, id: RequestId, since: Seq, from: u32, events: Sender<StreamEvent>) {
        self.listeners.entry(id).or_default().push(Listener { since, next: from, events });
    }

    pub(super) fn accepted(&mut self, id: &RequestId, generated: u32, after: Seq) {
        self.keep(id, |listener| {
            listener.since != after || listener.events.send(StreamEvent::Accepted { generated }).is_ok()
        });
    }

    /// Everybody hears each offset once: a stream that is sent again for one is no news for the others.
    pub(super) fn token(&mut self, id: &RequestId, offset: u32, token: u32, after: Seq) {
        self.keep(id, |listener| {
            if listener.since > after || offset != listener.next {
                return true;
            }
            listener.next += 1;
            listener.events.send(StreamEvent::Token { offset, token }).is_ok()
        });
    }

    pub(super) fn finish(
        &mut self,
        id: &RequestId,
        (reason, generated): (&FinishReason, u32),
        generations: &[GenerationSpan],
        after: Seq,
    ) {
        self.keep(id, |listener| {
            if listener.since > after {
                return true;
            }
            let (reason, generations) = (reason.clone(), generations.to_vec());
            let _ = listener.events.send(StreamEvent::Finish { reason, generated, generations });
            false
        });
    }

    pub(super) fn refused(&mut self, id: &RequestId, refusal: Refusal, reason: &str, after: Seq) {
        self.keep(id, |listener| {
            if listener.since != after {
                return true;
            }
            let _ = listener.events.send(StreamEvent::Refused { refusal, reason: reason.into() });
            false
        });
    }

    /// Lets go of those whom `keep` does not keep, or who have hung up.
    fn keep(&mut self, id: &RequestId, keep: impl FnMut(&mut Listener) -> bool) {
        if let Some(listeners) = self.listeners.get_mut(id) {
            listeners.retain_mut(keep);
            if listeners.is_empty() {
                self.listeners.remove(id);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use lite_llm_core::ids::Generation;
    use std::sync::mpsc::channel;

    #[test]
    fn a_second_client_hears_the_stream_again_and_the_first_does_not() {
        let id = RequestId::new("a").unwrap();
        let mut streams = Streams::default();
        let (first, first_events) = channel();
        let (second, second_events) = channel();
        streams.listen(id.clone(), Seq(1), 0, first);
        streams.accepted(&id, 0, Seq(1));
        streams.token(&id, 0, 10, Seq(5));
        // The second asks while token 1, of input 6, waits to be durable.
        streams.listen(id.clone(), Seq(7), 0, second);
        streams.token(&id, 1, 11, Seq(6));
        streams.accepted(&id, 2, Seq(7));
        streams.token(&id, 0, 10, Seq(7));
        streams.token(&id, 1, 11, Seq(7));
        streams.token(&id, 2, 12, Seq(8));
        let span = GenerationSpan { until: 3, generation: Generation(0), tiers: vec!["all".into()] };
        streams.finish(&id, (&FinishReason::Eos, 3), std::slice::from_ref(&span), Seq(8));
        let tokens = [(0, 10), (1, 11), (2, 12)];
        for (events, generated) in [(first_events, 0), (second_events, 2)] {
            let mut expected = vec![StreamEvent::Accepted { generated }];
            expected.extend(tokens.map(|(offset, token)| StreamEvent::Token { offset, token }));
            let generations = vec![span.clone()];
            expected.push(StreamEvent::Finish { reason: FinishReason::Eos, generated: 3, generations });
            assert_eq!(events.try_iter().collect::<Vec<_>>(), expected);
        }
        assert!(streams.listeners.is_empty());
    }

    #[test]
    fn who_hangs_up_or_is_refused_is_forgotten() {
        let id = RequestId::new("a").unwrap();
        let mut streams = Streams::default();
        let (gone, events) = channel();
        drop(events);
        streams.listen(id.clone(), Seq(1), 0, gone);
        streams.accepted(&id, 0, Seq(1));
        assert!(streams.listeners.is_empty());
        let (other, events) = channel();
        streams.listen(id.clone(), Seq(2), 0, other);
        streams.refused(&id, Refusal::Busy, "no", Seq(1));
        streams.refused(&id, Refusal::Busy, "yes", Seq(2));
        let refused = StreamEvent::Refused { refusal: Refusal::Busy, reason: "yes".into() };
        assert_eq!(events.recv().unwrap(), refused);
        assert!(streams.listeners.is_empty());
    }
}
