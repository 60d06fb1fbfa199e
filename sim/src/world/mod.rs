//! A world of actors on machines: virtual time, messages, clocks and processes, all in the hands of [`Decisions`].
//!
//! An actor is a process. It is handed one [`Happening`] at a time and acts on its [`Context`]; whatever it has under
//! way when it dies is lost: no timer and no message of a former life reaches the next one. What outlives it (a disk)
//! the actor keeps itself and tears in [`Actor::died`]. Supervisors, clients and operators are actors like any other.

mod clock;
mod network;
mod queue;

use crate::chronicle::{Chronicle, What};
use crate::decision::Decisions;
use crate::hazard::Hazard;
use clock::Clock;
use lite_llm_core::time::Time;
use network::Network;
use queue::Queue;

/// The number of an actor; each is on a machine of its own.
pub type ActorId = u32;

/// How often the world asks whether something befalls its machines.
const WEATHER_NS: u64 = 50_000_000;

/// What an actor is handed.
#[derive(Debug)]
pub enum Happening<M> {
    /// The process begins; the argument is the starter's.
    Started {
        /// What the starter gave it.
        argument: u64,
    },
    /// A message came whole.
    Message {
        /// From whom.
        from: ActorId,
        /// What it says.
        message: M,
    },
    /// A message came whose checksum is wrong.
    Tampered {
        /// From whom.
        from: ActorId,
    },
    /// The time of [`Context::wake_at`] or [`Context::wake_in`] has come.
    Woken {
        /// The token given there.
        token: u64,
    },
    /// A process that this one started has ended.
    Ended {
        /// Which.
        child: ActorId,
        /// The argument of its life.
        argument: u64,
        /// Its exit code, if it ended by itself.
        code: Option<i32>,
    },
}

/// What can be sent. Only corrupted messages are ever encoded, so that the usual ones cost nothing.
pub trait Wire: Clone {
    /// The bytes on the wire.
    fn encode(&self) -> Vec<u8>;
    /// The message in some bytes, if that is what they are: what a receiver does with a frame, checksum included.
    fn decode(bytes: &[u8]) -> Option<Self>;
    /// What a timeline shows.
    fn label(&self) -> String;
}

/// A process.
pub trait Actor {
    /// What it tells others.
    type Message: Wire;

    /// Deals with what happened.
    fn handle(&mut self, cx: &mut Context<'_, Self::Message>, happening: Happening<Self::Message>);

    /// It has died: what was volatile is gone. The crash of its machine may tear what was not durable.
    fn died(&mut self, cx: &mut Context<'_, Self::Message>);
}

#[derive(Debug)]
enum Event<M> {
    Start { actor: ActorId, argument: u64 },
    Arrive { to: ActorId, from: ActorId, connection: u32, number: u64, tampered: bool, message: M },
    Wake { actor: ActorId, life: u32, token: u64 },
    Ended { parent: ActorId, life: u32, child: ActorId, argument: u64, code: Option<i32> },
    Weather { nth: u64 },
}

/// What the world knows of a process.
#[derive(Debug)]
struct Process {
    clock: Clock,
    up: bool,
    /// Grows with every death and start.
    life: u32,
    argument: u64,
    /// The argument of a start that is on its way, unless it was killed before.
    wanted: Option<u64>,
    parent: Option<ActorId>,
    paused_until: u64,
}

/// Everything but the actors.
#[derive(Debug)]
struct Inner<M> {
    now: u64,
    queue: Queue<Event<M>>,
    processes: Vec<Process>,
    network: Network,
    decisions: Decisions,
    chronicle: Chronicle,
    deaths: Vec<ActorId>,
    messages: u64,
    events: u64,
}

/// What an actor can do.
#[derive(Debug)]
pub struct Context<'a, M> {
    inner: &'a mut Inner<M>,
    me: ActorId,
}

/// How a world is made.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Clocks keep this drift, in thousandths.
    pub drift_per_mille: u32,
    /// Whether to keep entries for a timeline.
    pub chronicle: bool,
    /// The names of the actors.
    pub names: Vec<String>,
}

/// The world.
#[derive(Debug)]
pub struct World<A: Actor> {
    inner: Inner<A::Message>,
    actors: Vec<A>,
}

impl<A: Actor> World<A> {
    /// A world of actors, none of them started.
    #[must_use]
    pub fn new(decisions: Decisions, setup: Setup, actors: Vec<A>) -> Self {
        let count = u32::try_from(actors.len()).expect("few actors");
        let processes = (0..count)
            .map(|actor| Process {
                clock: Clock::new(&decisions, actor, setup.drift_per_mille),
                up: false,
                life: 0,
                argument: 0,
                wanted: None,
                parent: None,
                paused_until: 0,
            })
            .collect();
        let mut queue = Queue::new();
        queue.push(WEATHER_NS, Event::Weather { nth: 0 });
        let network = Network::new(actors.len());
        let chronicle = Chronicle::new(setup.chronicle, setup.names);
        let inner = Inner {
            now: 0,
            queue,
            processes,
            network,
            decisions,
            chronicle,
            deaths: Vec::new(),
            messages: 0,
            events: 0,
        };
        Self { inner, actors }
    }

    /// Starts an actor that nobody else starts.
    pub fn start(&mut self, actor: ActorId, argument: u64) {
        self.inner.processes[actor as usize].wanted = Some(argument);
        self.inner.queue.push(self.inner.now, Event::Start { actor, argument });
    }

    /// Lets the next thing happen; `false` when nothing more will before the time.
    pub fn step(&mut self, until_ns: u64) -> bool {
        let Some((at, event)) = self.inner.queue.pop() else { return false };
        if at > until_ns {
            self.inner.queue.push(at, event);
            self.inner.now = until_ns;
            return false;
        }
        debug_assert!(at >= self.inner.now, "time goes on");
        self.inner.now = at;
        self.inner.events += 1;
        self.happen(event);
        self.bury();
        true
    }

    fn bury(&mut self) {
        while let Some(actor) = self.inner.deaths.pop() {
            self.actors[actor as usize].died(&mut Context { inner: &mut self.inner, me: actor });
        }
    }

    /// Runs to a time.
    pub fn run_until(&mut self, until_ns: u64) {
        while self.step(until_ns) {}
    }

    fn happen(&mut self, event: Event<A::Message>) {
        let (actor, happening) = match event {
            Event::Weather { nth } => return self.weather(nth),
            Event::Start { actor, argument } => {
                let process = &mut self.inner.processes[actor as usize];
                if process.up || process.wanted.take_if(|wanted| *wanted == argument).is_none() {
                    return;
                }
                (process.up, process.argument) = (true, argument);
                process.life += 1;
                self.inner.chronicle.add(self.inner.now, actor, || What::State("up".into()));
                (actor, Happening::Started { argument })
            }
            Event::Arrive { to, from, connection, number, tampered, message } => {
                let broken = connection != self.inner.network.connection(from, to);
                let process = &self.inner.processes[to as usize];
                if broken || !process.up {
                    return self.inner.chronicle.add(self.inner.now, to, || What::Lost { message: number });
                }
                if process.paused_until > self.inner.now {
                    let until = process.paused_until;
                    let event = Event::Arrive { to, from, connection, number, tampered, message };
                    return self.inner.queue.push(until, event);
                }
                self.inner.chronicle.add(self.inner.now, to, || What::Received { message: number });
                (
                    to,
                    if tampered {
                        Happening::Tampered { from }
                    } else {
                        Happening::Message { from, message }
                    },
                )
            }
            Event::Wake { actor, life, token } => {
                let process = &self.inner.processes[actor as usize];
                if process.life != life || !process.up {
                    return;
                }
                if process.paused_until > self.inner.now {
                    return self.inner.queue.push(process.paused_until, Event::Wake { actor, life, token });
                }
                (actor, Happening::Woken { token })
            }
            Event::Ended { parent, life, child, argument, code } => {
                let process = &self.inner.processes[parent as usize];
                if process.life != life || !process.up {
                    return;
                }
                (parent, Happening::Ended { child, argument, code })
            }
        };
        self.actors[actor as usize].handle(&mut Context { inner: &mut self.inner, me: actor }, happening);
    }

    /// What befalls machines and links whatever they do.
    fn weather(&mut self, nth: u64) {
        let inner = &mut self.inner;
        let (now, decisions) = (inner.now, inner.decisions.clone());
        if let Some(value) = decisions.at(Hazard::Partition, 0, nth) {
            let (apart, one_way) = inner.network.part(value, now);
            let way = if one_way { "one way" } else { "both ways" };
            inner.chronicle.add(now, 0, || What::Fault(format!("partition of {apart:#b}, {way}")));
        }
        if let Some(value) = decisions.at(Hazard::Clog, 0, nth) {
            let (from, to) = inner.network.clog(value, now);
            inner.chronicle.add(now, from, || What::Fault(format!("link to {to} is clogged")));
        }
        if let Some(value) = decisions.at(Hazard::ResetConnection, 0, nth) {
            let (from, to) = inner.network.reset(value);
            inner.chronicle.add(now, from, || What::Fault(format!("connection with {to} is reset")));
        }
        for (machine, process) in (0u32..).zip(&mut inner.processes) {
            let subject = u64::from(machine);
            if let Some(value) = decisions.at(Hazard::Pause, subject, nth) {
                process.paused_until = now + 1_000_000 + value % 3_000_000_000;
                inner.chronicle.add(now, machine, || What::Fault("paused".into()));
            }
            for (hazard, sign) in [(Hazard::ClockBack, -1), (Hazard::ClockJump, 1)] {
                if let Some(value) = decisions.at(hazard, subject, nth) {
                    let by = i64::try_from(value % 100_000_000_000_000).expect("below the modulus");
                    process.clock.set_wall(sign * by);
                    inner.chronicle.add(now, machine, || What::Fault(hazard.to_string()));
                }
            }
        }
        inner.queue.push(now + WEATHER_NS, Event::Weather { nth: nth + 1 });
    }

    /// Ends every fault that lasts.
    pub fn heal(&mut self) {
        self.inner.decisions.calm_down();
        self.inner.network.heal();
        for process in &mut self.inner.processes {
            process.paused_until = 0;
        }
    }

    /// The world's time, in nanoseconds.
    #[must_use]
    pub const fn now_ns(&self) -> u64 {
        self.inner.now
    }

    /// How many things have happened.
    #[must_use]
    pub const fn events(&self) -> u64 {
        self.inner.events
    }

    /// How many things are going to happen, as far as is known.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.inner.queue.len()
    }

    /// The actors.
    #[must_use]
    pub fn actors(&self) -> &[A] {
        &self.actors
    }

    /// The actors, to be changed between two steps.
    pub fn actors_mut(&mut self) -> &mut [A] {
        &mut self.actors
    }

    /// Acts as an actor between two steps.
    pub fn act<R>(
        &mut self,
        actor: ActorId,
        act: impl FnOnce(&mut A, &mut Context<'_, A::Message>) -> R,
    ) -> R {
        let result =
            act(&mut self.actors[actor as usize], &mut Context { inner: &mut self.inner, me: actor });
        self.bury();
        result
    }

    /// Whether an actor's process runs.
    #[must_use]
    pub fn is_up(&self, actor: ActorId) -> bool {
        self.inner.processes[actor as usize].up
    }

    /// What was kept for a timeline.
    #[must_use]
    pub const fn chronicle(&self) -> &Chronicle {
        &self.inner.chronicle
    }
}

impl<M: Wire> Context<'_, M> {
    /// What this machine's monotonic clock shows.
    #[must_use]
    pub fn clock(&self) -> Time {
        Time(self.inner.processes[self.me as usize].clock.at(self.inner.now))
    }

    /// What this machine's wall clock shows.
    #[must_use]
    pub fn wall_clock_ns(&self) -> u64 {
        self.inner.processes[self.me as usize].clock.wall(self.inner.now)
    }

    /// The world's time, which no actor may act upon: for observers.
    #[must_use]
    pub const fn world_ns(&self) -> u64 {
        self.inner.now
    }

    /// The decisions of this run.
    #[must_use]
    pub fn decisions(&self) -> Decisions {
        self.inner.decisions.clone()
    }

    /// Whether a fault befalls this actor, and how.
    #[must_use]
    pub fn fault(&mut self, hazard: Hazard, nth: u64) -> Option<u64> {
        let value = self.inner.decisions.at(hazard, u64::from(self.me), nth)?;
        self.inner.chronicle.add(self.inner.now, self.me, || What::Fault(hazard.to_string()));
        Some(value)
    }

    /// Sends a message, which may come, come late, come twice, or not.
    pub fn send(&mut self, to: ActorId, message: M) {
        let (from, now) = (self.me, self.inner.now);
        let decisions = &self.inner.decisions;
        let fate = self.inner.network.fate(decisions, now, from, to);
        self.inner.messages += 1;
        let number = self.inner.messages;
        self.inner.chronicle.add(now, from, || What::Sent { message: number, to, text: message.label() });
        let Some(arrives_ns) = fate.arrives_ns else {
            return self.inner.chronicle.add(now, from, || What::Lost { message: number });
        };
        let connection = self.inner.network.connection(from, to);
        if let Some(again_ns) = fate.again_ns {
            let message = message.clone();
            let event = Event::Arrive { to, from, connection, number, tampered: false, message };
            self.inner.queue.push(now + again_ns, event);
        }
        let (message, tampered) = match fate.corrupt {
            None => (message, false),
            Some(value) => match corrupted(&message, value) {
                Some(other) => (other, false),
                None => (message, true),
            },
        };
        let event = Event::Arrive { to, from, connection, number, tampered, message };
        self.inner.queue.push(now + arrives_ns, event);
    }

    /// Hands itself `token` when its clock shows a time.
    pub fn wake_at(&mut self, time: Time, token: u64) {
        let process = &self.inner.processes[self.me as usize];
        let at = process.clock.when(time.0).max(self.inner.now);
        self.inner.queue.push(at, Event::Wake { actor: self.me, life: process.life, token });
    }

    /// Hands itself `token` after some nanoseconds.
    pub fn wake_in(&mut self, ns: u64, token: u64) {
        let life = self.inner.processes[self.me as usize].life;
        self.inner.queue.push(self.inner.now + ns, Event::Wake { actor: self.me, life, token });
    }

    /// Starts a process after some nanoseconds, and hears of its end.
    pub fn start(&mut self, actor: ActorId, argument: u64, in_ns: u64) {
        let process = &mut self.inner.processes[actor as usize];
        (process.parent, process.wanted) = (Some(self.me), Some(argument));
        self.inner.queue.push(self.inner.now + in_ns, Event::Start { actor, argument });
    }

    /// Kills a process at once, or one that is about to start; whether there was one.
    pub fn kill(&mut self, actor: ActorId) -> bool {
        self.end(actor, None)
    }

    /// This process ends here, as one that crashed.
    pub fn exit(&mut self) {
        self.kill(self.me);
    }

    /// This process ends here, and says why.
    pub fn exit_with(&mut self, code: i32) {
        self.end(self.me, Some(code));
    }

    fn end(&mut self, actor: ActorId, code: Option<i32>) -> bool {
        let process = &mut self.inner.processes[actor as usize];
        if !process.up {
            return process.wanted.take().is_some();
        }
        process.up = false;
        process.life += 1;
        process.paused_until = 0;
        let (parent, argument) = (process.parent, process.argument);
        self.inner.deaths.push(actor);
        self.inner.chronicle.add(self.inner.now, actor, || What::State("down".into()));
        if let Some(parent) = parent {
            let life = self.inner.processes[parent as usize].life;
            let event = Event::Ended { parent, life, child: actor, argument, code };
            self.inner.queue.push(self.inner.now + 100_000, event);
        }
        true
    }

    /// Whether a process runs, or is about to.
    #[must_use]
    pub fn is_up(&self, actor: ActorId) -> bool {
        let process = &self.inner.processes[actor as usize];
        process.up || process.wanted.is_some()
    }

    /// Whether a process runs that was started with this argument, or is about to.
    #[must_use]
    pub fn runs(&self, actor: ActorId, argument: u64) -> bool {
        let process = &self.inner.processes[actor as usize];
        process.wanted == Some(argument) || (process.up && process.argument == argument)
    }

    /// This actor.
    #[must_use]
    pub const fn me(&self) -> ActorId {
        self.me
    }

    /// Adds to the timeline.
    pub fn note(&mut self, what: impl FnOnce() -> What) {
        self.inner.chronicle.add(self.inner.now, self.me, what);
    }
}

/// A message with a bit changed, as its receiver decodes it: nothing, if its checksum tells.
fn corrupted<M: Wire>(message: &M, value: u64) -> Option<M> {
    let mut bytes = message.encode();
    let bits = bytes.len() as u64 * 8;
    let bit = value % bits.max(1);
    let byte = usize::try_from(bit / 8).expect("inside the message");
    *bytes.get_mut(byte)? ^= 1 << (bit % 8);
    M::decode(&bytes)
}

#[cfg(test)]
mod tests;
