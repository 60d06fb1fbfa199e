//! The kernels of `hw/cuda` by what they do, as functions of loaded modules.

use super::CudaError;
use super::driver::refusal;
use cudarc::driver::result::module;
use cudarc::driver::sys::{CUfunction, CUmodule};
use lite_llm_model::kernels::{DType, Quantised, Storage};
use std::ffi::CString;

/// A kernel that can be launched; none before it is loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(pub(super) CUfunction);

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Default for Function {
    fn default() -> Self {
        Self(std::ptr::null_mut())
    }
}

/// A form of a matrix product: its kernel, and what a block of it has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Form {
    pub(crate) function: Function,
    pub(crate) outputs: u32,
    pub(crate) rows: u32,
    pub(crate) threads: u32,
}

impl Form {
    /// Blocks for one product.
    pub(crate) const fn blocks(&self, outputs: u32, rows: u32) -> [u32; 2] {
        [outputs.div_ceil(self.outputs), rows.div_ceil(self.rows)]
    }
}

/// The forms of a matrix product: for one row, a few, some, many.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Linear {
    pub(crate) one_row: Form,
    pub(crate) few_rows: Form,
    pub(crate) some_rows: Form,
    pub(crate) many_rows: Form,
}

/// The kernels that know the type of the cache.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OfCache {
    pub(crate) write: Function,
    pub(crate) scores: Function,
    pub(crate) mix: Function,
}

/// All kernels: those that a step launches, and those that the self-test alone does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Functions {
    embed: [Function; 5],
    linear: [Linear; 7],
    of_cache: [OfCache; 3],
    pub(crate) attention_sum: Function,
    pub(crate) arrange: Function,
    pub(crate) rms_norm: Function,
    pub(crate) layer_norm: Function,
    pub(crate) rope: Function,
    pub(crate) repack: Function,
    pub(crate) quantise: Function,
    pub(crate) route: Function,
    pub(crate) route_tiers: Function,
    pub(crate) route_sparsely: Function,
    pub(crate) find_users: Function,
    pub(crate) swiglu: Function,
    pub(crate) clamped_swiglu: Function,
    pub(crate) clip: Function,
    pub(crate) add: Function,
    pub(crate) combine: Function,
    pub(crate) divide: Function,
    pub(crate) penalise: Function,
    pub(crate) argmax: Function,
    pub(crate) sample: Function,
    pub(crate) exponentials: Function,
    pub(crate) exponential_hashes: Function,
}

/// Names of storages in kernels' names, and the source of their products.
const STORAGES: [(&str, &str); 7] = [
    ("f32", "linear.cu"),
    ("bf16", "linear.cu"),
    ("f16", "linear.cu"),
    ("q8", "grouped.cu"),
    ("q4", "grouped.cu"),
    ("mxfp4", "linear.cu"),
    ("e4m3", "linear.cu"),
];

const fn place(storage: Storage) -> usize {
    match storage {
        Storage::Plain(dtype) => of_type(dtype),
        Storage::Grouped(Quantised::Q8) => 3,
        Storage::Grouped(Quantised::Q4) => 4,
        Storage::Mxfp4 => 5,
        Storage::E4m3 => 6,
    }
}

const fn of_type(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
    }
}

impl Functions {
    /// Those of modules, each with the name of its source.
    pub(super) fn of(modules: &[(&str, CUmodule)]) -> Result<Self, CudaError> {
        let find = |source: &str, name: &str| {
            let module = modules.iter().find(|(of, _)| *of == source).expect("every source is compiled").1;
            let name = CString::new(name).expect("a name without a zero byte");
            // SAFETY: the module is loaded, and stays so as long as its functions are used.
            let function = unsafe { module::get_function(module, name) };
            function.map(Function).map_err(refusal("cuModuleGetFunction"))
        };
        let mut this = Self::default();
        for (at, (name, source)) in STORAGES.into_iter().enumerate() {
            let form = |form: &str, [outputs, rows, threads]: [u32; 3]| {
                let function = find(source, &format!("linear_{form}_{name}"))?;
                Ok::<_, CudaError>(Form { function, outputs, rows, threads })
            };
            let grouped = source == "grouped.cu";
            this.linear[at] = Linear {
                one_row: form("one_row", [16, 1, 256])?,
                few_rows: form("few_rows", [16, 4, 256])?,
                some_rows: form("some_rows", if grouped { [64, 32, 128] } else { [128, 32, 128] })?,
                many_rows: form("many_rows", if grouped { [64, 64, 128] } else { [128, 64, 128] })?,
            };
            if let Some(embed) = this.embed.get_mut(at) {
                let source = if source == "linear.cu" { "embed.cu" } else { source };
                *embed = find(source, &format!("embed_{name}"))?;
            }
            if let Some(of_cache) = this.of_cache.get_mut(at) {
                let find = |what: &str| find("attention.cu", &format!("{what}_{name}"));
                *of_cache = OfCache {
                    write: find("write_cache")?,
                    scores: find("attention_scores")?,
                    mix: find("attention_mix")?,
                };
            }
        }
        this.attention_sum = find("attention.cu", "attention_sum")?;
        this.arrange = find("arrange.cu", "arrange")?;
        this.rms_norm = find("norm.cu", "rms_norm")?;
        this.layer_norm = find("norm.cu", "layer_norm")?;
        this.rope = find("rope.cu", "rope")?;
        this.repack = find("linear.cu", "repack")?;
        this.quantise = find("grouped.cu", "quantise")?;
        this.divide = find("sample.cu", "divide")?;
        this.penalise = find("sample.cu", "penalise")?;
        this.argmax = find("sample.cu", "argmax")?;
        this.sample = find("sample.cu", "sample")?;
        this.exponentials = find("exponential.cu", "exponentials")?;
        this.exponential_hashes = find("exponential.cu", "exponential_hashes")?;
        let of_moe = [
            ("route", &mut this.route),
            ("route_tiers", &mut this.route_tiers),
            ("route_sparsely", &mut this.route_sparsely),
            ("find_users", &mut this.find_users),
            ("swiglu", &mut this.swiglu),
            ("clamped_swiglu", &mut this.clamped_swiglu),
            ("clip", &mut this.clip),
            ("add", &mut this.add),
            ("combine", &mut this.combine),
        ];
        for (name, function) in of_moe {
            *function = find("moe.cu", name)?;
        }
        Ok(this)
    }

    /// The embedding of a table that is stored so; none for storages that no table has.
    pub(crate) fn embed(&self, storage: Storage) -> Option<Function> {
        self.embed.get(place(storage)).copied()
    }

    /// Products with matrices that are stored so.
    pub(crate) const fn linear(&self, storage: Storage) -> Linear {
        self.linear[place(storage)]
    }

    /// What reads and writes a cache of this type.
    pub(crate) const fn of_cache(&self, dtype: DType) -> OfCache {
        self.of_cache[of_type(dtype)]
    }
}
