//! Steps of decode as graphs: what such a step launches depends on its shape alone, so that it is recorded once and launched again.

use super::super::CudaError;
use super::super::functions::Function;
use super::super::graph::Graph;
use super::super::stream::Arg::{At, Value, Word};
use super::super::stream::Stream;
use super::standing::Lists;
use super::tables::Tables;

/// Shapes that are known, at most: the one that was not seen for longest is forgotten.
const SHAPES_MAX: usize = 16;

/// All that the launches of a step are made of, beside what is the same for all steps until memory is carved or weights are loaded
/// again: addresses of lists, how long they are, and the sizes of grids. What stands in lists is read by kernels, and is no part of it.
#[derive(Debug)]
struct Shape {
    standing: Lists,
    tables: Tables,
    /// Made when a shape comes the second time: many come once.
    graph: Option<Graph>,
}

/// The shapes that came last, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    shapes: Vec<Shape>,
    /// The driver makes no graphs.
    pub(super) refused: bool,
}

impl Graphs {
    /// Of a driver that makes graphs, as it said at start, or does not.
    pub(super) const fn new(refused: bool) -> Self {
        Self { shapes: Vec::new(), refused }
    }

    /// Forgets all graphs. The stream has been waited for since the last launch.
    pub(super) fn clear(&mut self) {
        self.shapes.clear();
    }

    /// Gives a stream the launches of a step with this shape, one by one or all at once.
    ///
    /// # Errors
    /// If the device is lost.
    pub(super) fn launch<E: From<CudaError>>(
        &mut self,
        stream: &Stream,
        (standing, tables): (&Lists, &Tables),
        launches: impl Fn() -> Result<(), E>,
    ) -> Result<(), E> {
        if self.refused {
            return launches();
        }
        let known =
            self.shapes.iter().position(|shape| shape.standing == *standing && shape.tables == *tables);
        let Some(at) = known else {
            if self.shapes.len() == SHAPES_MAX {
                self.shapes.remove(0);
            }
            self.shapes.push(Shape { standing: standing.clone(), tables: tables.clone(), graph: None });
            return launches();
        };
        let mut shape = self.shapes.remove(at);
        let graph = match shape.graph.take() {
            Some(graph) => graph,
            None => match stream.record(&launches) {
                Ok(graph) => graph,
                Err(_) => {
                    // Launched one by one they do the same; if the device is lost, they say so.
                    self.refused = true;
                    self.clear();
                    return launches();
                }
            },
        };
        // SAFETY: what the launches need are weights, slots, cache and the values and lists of a step, which stay where they are until
        // they are carved or loaded again; then graphs are forgotten. Everything else is in the shape.
        unsafe { stream.replay(&graph) }?;
        shape.graph = Some(graph);
        self.shapes.push(shape);
        Ok(())
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
