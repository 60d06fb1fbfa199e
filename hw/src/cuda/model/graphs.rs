//! Steps of decode as graphs: what such a step launches depends on its shape alone, so that it is recorded once and launched again.
//!
//! A rank exchanges values in the middle of a step. What it launches between two exchanges is a graph, and the exchange itself is in none:
//! so it is the same whichever way values go, no graph knows of NCCL, and none is in the way when an epoch ends. A step of a whole model
//! is one graph.

use super::super::CudaError;
use super::super::functions::Function;
use super::super::graph::Graph;
use super::super::stream::Arg::{self, At, Value, Word};
use super::super::stream::Stream;
use super::standing::Lists;
use super::tables::Tables;

/// Shapes that are known, at most: the one that was not seen for longest is forgotten.
const SHAPES_MAX: usize = 16;

/// All that the launches of a step are made of, beside what is the same for all steps until memory is carved or weights are loaded
/// again: addresses of lists, how long they are, the sizes of grids, and which way values go. What stands in lists is read by kernels,
/// and is no part of it.
#[derive(Debug)]
struct Shape {
    standing: Lists,
    tables: Tables,
    past_host: bool,
    /// Made when a shape comes the second time: many come once.
    segments: Option<Vec<Segment>>,
}

/// Launches with nothing but launches between them.
#[derive(Debug)]
pub(super) struct Segment {
    graph: Graph,
    launches: usize,
}

/// The shapes that came last, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    shapes: Vec<Shape>,
    /// Of steps that did not come to their end: they may be under way until the stream has been waited for.
    abandoned: Vec<Segment>,
    /// The driver makes no graphs.
    pub(super) refused: bool,
}

impl Graphs {
    /// Of a driver that makes graphs, as it said at start, or does not.
    pub(super) const fn new(refused: bool) -> Self {
        Self { shapes: Vec::new(), abandoned: Vec::new(), refused }
    }

    /// Forgets all graphs. The stream has been waited for since the last launch.
    pub(super) fn clear(&mut self) {
        self.shapes.clear();
        self.abandoned.clear();
    }

    /// How the launches of a step with this shape are given to a stream. It has been waited for since the last step.
    pub(super) fn begin(&mut self, standing: &Lists, tables: &Tables, past_host: bool) -> Launches {
        self.abandoned.clear();
        if self.refused {
            return Launches::AtOnce;
        }
        let is_this = |shape: &Shape| {
            shape.past_host == past_host && shape.standing == *standing && shape.tables == *tables
        };
        let Some(at) = self.shapes.iter().position(is_this) else {
            if self.shapes.len() == SHAPES_MAX {
                self.shapes.remove(0);
            }
            let (standing, tables) = (standing.clone(), tables.clone());
            self.shapes.push(Shape { standing, tables, past_host, segments: None });
            return Launches::AtOnce;
        };
        let mut shape = self.shapes.remove(at);
        let known = shape.segments.take();
        self.shapes.push(shape);
        match known {
            Some(segments) => Launches::Known { segments, next: 0, skipped: 0 },
            None => Launches::Recorded { waiting: Vec::new(), segments: Vec::new() },
        }
    }

    /// Takes back what [`begin`](Self::begin) gave, once the step has come to its end, or has not.
    ///
    /// # Panics
    /// If steps of one shape launch different things.
    pub(super) fn keep(&mut self, launches: Launches, has_ended: bool) {
        let segments = match launches {
            Launches::AtOnce => return,
            Launches::Refused(segments) => {
                // None of these is under way.
                self.shapes.clear();
                self.refused = true;
                return self.abandoned.extend(segments);
            }
            Launches::Recorded { segments, .. } if !has_ended => return self.abandoned.extend(segments),
            Launches::Recorded { segments, waiting } => {
                assert!(waiting.is_empty(), "a step that has ended waits for nothing");
                segments
            }
            Launches::Known { segments, next, skipped } => {
                let all = next == segments.len() && skipped == 0;
                assert!(!has_ended || all, "a step of a known shape launches all that was recorded");
                segments
            }
        };
        let shape = self.shapes.last_mut().expect("the one that the step began with");
        shape.segments = Some(segments);
    }
}

/// A launch, as it is given to a stream.
#[derive(Debug)]
pub(super) struct Launch {
    function: Function,
    blocks: [u32; 3],
    threads: u32,
    arguments: Vec<Arg>,
}

/// How the launches of a step are given to a stream.
#[derive(Debug)]
pub(super) enum Launches {
    /// One by one.
    AtOnce,
    /// They wait for whatever is no launch, then become a graph.
    Recorded { waiting: Vec<Launch>, segments: Vec<Segment> },
    /// They are graphs already: so many were launched, and so many launches skipped since then.
    Known { segments: Vec<Segment>, next: usize, skipped: usize },
    /// One by one, since the driver has refused to make a graph after these.
    Refused(Vec<Segment>),
}

impl Launches {
    /// Launches a kernel, now or when [`flush`](Self::flush) comes.
    ///
    /// # Safety
    /// As of [`Stream::launch`]; and what a step of the same shape needs stands where it is now, until graphs are forgotten.
    ///
    /// # Errors
    /// If the device is lost.
    pub(super) unsafe fn launch(
        &mut self,
        stream: &Stream,
        function: Function,
        (blocks, threads): ([u32; 3], u32),
        arguments: &[Arg],
    ) -> Result<(), CudaError> {
        match self {
            // SAFETY: the caller's.
            Self::AtOnce | Self::Refused(_) => unsafe { stream.launch(function, blocks, threads, arguments) },
            Self::Recorded { waiting, .. } => {
                waiting.push(Launch { function, blocks, threads, arguments: arguments.to_vec() });
                Ok(())
            }
            Self::Known { skipped, .. } => {
                *skipped += 1;
                Ok(())
            }
        }
    }

    /// Gives the stream all that waits: before whatever is no launch, and at the end.
    ///
    /// # Panics
    /// If steps of one shape launch different things.
    ///
    /// # Errors
    /// If the device is lost.
    pub(super) fn flush(&mut self, stream: &Stream) -> Result<(), CudaError> {
        match self {
            Self::AtOnce | Self::Refused(_) => Ok(()),
            Self::Recorded { waiting, segments } => {
                if waiting.is_empty() {
                    return Ok(());
                }
                let (all, mut segments) = (std::mem::take(waiting), std::mem::take(segments));
                let launches = all.len();
                let give = || {
                    all.iter().try_for_each(|Launch { function, blocks, threads, arguments }| {
                        // SAFETY: whoever had it wait has kept that it may be launched, and when.
                        unsafe { stream.launch(*function, *blocks, *threads, arguments) }
                    })
                };
                match stream.record::<CudaError>(give) {
                    Ok(graph) => {
                        segments.push(Segment { graph, launches });
                        let graph = &segments[segments.len() - 1].graph;
                        // SAFETY: what the launches need is there now, as it is when they are launched one by one.
                        let launched = unsafe { stream.replay(graph) };
                        *self = Self::Recorded { waiting: Vec::new(), segments };
                        launched
                    }
                    Err(_) => {
                        // Launched one by one they do the same; if the device is lost, they say so.
                        *self = Self::Refused(segments);
                        give()
                    }
                }
            }
            Self::Known { segments, next, skipped } => {
                if *skipped == 0 {
                    return Ok(());
                }
                let Segment { graph, launches } = &segments[*next];
                assert_eq!(std::mem::take(skipped), *launches, "a step of a known shape launches the same");
                *next += 1;
                // SAFETY: what the launches need are weights, slots, cache and the values and lists of a step, which stay where they are
                // until they are carved or loaded again; then graphs are forgotten. Everything else is in the shape.
                unsafe { stream.replay(graph) }
            }
        }
    }
}

/// Why the driver makes no graph, if it makes none: asked at start, with a launch that does nothing.
///
/// # Errors
/// If the device is lost.
pub(super) fn refusal(stream: &Stream, add: Function) -> Result<Option<CudaError>, CudaError> {
    let nothing = [At(0), At(0), Value(0.0), Word(0)];
    // SAFETY: the arguments are those of the kernel, which adds up nothing.
    let launch = || unsafe { stream.launch(add, [1; 3], 32, &nothing) };
    // A driver may load a kernel only when it is first launched, which it may not do while it records. Those of a step were launched
    // when its shape came first.
    launch()?;
    stream.wait()?;
    Ok(stream.record(launch).err())
}
