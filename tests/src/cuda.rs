//! The kernels of CUDA on the CPU: compiles their sources with the shim (`hw/cuda/shim`) and launches them by name.
//!
//! The shim is a process of its own, which answers launches on its standard output; `shim.cpp` says what it looks for.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

/// The folder of the kernels.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("hw/cuda")
}

/// The shim, built once by a process in a folder of `dir`. Where that cannot be done, this is said, and it is `None`.
///
/// # Panics
/// If the compiler finds an error.
pub fn shim(dir: &str) -> Option<Shim> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| build(&Path::new(dir).join("cuda-shim")));
    if program.is_none() {
        say_skipped("the kernels of CUDA on the CPU, for want of Linux and a C++ compiler (c++, or CXX)");
    }
    program.as_deref().map(Shim::start)
}

/// Says what was skipped where it is seen: what a passing test prints is not.
pub fn say_skipped(what: &str) {
    // Whoever closed standard error does not want to hear it.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}");
}

/// The C++ compiler, if there is one for Linux: fibers and libraries are as that system has them.
fn compiler() -> Option<OsString> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| OsString::from("c++"));
    let version =
        Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.ok().map(|_| compiler)
}

/// A command of the compiler, with the options that all have.
fn compile(compiler: &OsString) -> Command {
    let mut command = Command::new(compiler);
    command.args(["-std=c++17", "-g0", "-Wall", "-Wextra", "-U_FORTIFY_SOURCE"]);
    command
}

fn succeed(command: &mut Command) {
    let status = command.status().expect("the compiler runs");
    assert!(status.success(), "{command:?}: {status}");
}

/// Another run may build at the same time, or still use what an earlier one built: each writes files of its own.
fn own(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}-{}", std::process::id()))
}

/// Puts what was built where it is known.
fn put(built: &Path, dir: &Path, name: &str) -> PathBuf {
    let known = dir.join(name);
    std::fs::rename(built, &known).expect("the program takes its place");
    known
}

/// Compiles kernels and shim into `dir`. `None` if there is no C++ compiler.
fn build(dir: &Path) -> Option<PathBuf> {
    let compiler = compiler()?;
    std::fs::create_dir_all(dir).expect("a folder for the shim");
    let [kernels, shim, program] = ["kernels.o", "shim.o", "shim"].map(|name| own(dir, name));
    let object = |options: &[&str], source: &str, object: &Path| {
        let mut command = compile(&compiler);
        command.args([
            "-Wno-unknown-pragmas",
            "-DLITE_LLM_SHIM",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
        ]);
        succeed(
            command.args(options).arg("-c").arg(sources().join("shim").join(source)).arg("-o").arg(object),
        );
    };
    // Instrumented for the shim's own hooks; whatever the language leaves undefined, a misaligned load among it, ends the process.
    let hooks = ["-O1", "-fsanitize=thread,undefined", "-fsanitize-undefined-trap-on-error"];
    object(&hooks, "kernels.cpp", &kernels);
    object(&["-O2"], "shim.cpp", &shim);
    succeed(Command::new(&compiler).args([&kernels, &shim]).arg("-lm").arg("-o").arg(&program));
    for object in [kernels, shim] {
        std::fs::remove_file(object).expect("the object is there");
    }
    Some(put(&program, dir, "shim"))
}

/// Compiles into a folder of `dir` the program that compiles kernels with NVRTC. `None` if there is no C++ compiler.
///
/// # Panics
/// If the compiler finds an error.
pub fn compile_nvrtc(dir: &Path) -> Option<PathBuf> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let built = PROGRAM.get_or_init(|| {
        let (compiler, dir) = (compiler()?, dir.join("cuda-nvrtc"));
        std::fs::create_dir_all(&dir).expect("a folder for the program");
        let program = own(&dir, "nvrtc");
        succeed(compile(&compiler).arg(sources().join("nvrtc.cpp")).arg("-ldl").arg("-o").arg(&program));
        Some(put(&program, &dir, "nvrtc"))
    });
    built.clone()
}

/// Compiles into a folder of its own in `dir` the stand-in for the driver, and gives the folder. `None` if there is no C++ compiler.
/// What was built of the same sources in the same way is used again.
///
/// # Panics
/// If the compiler finds an error.
pub fn compile_driver(dir: &Path) -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(|| Some(build_driver(&compiler()?, &dir.join("cuda-driver")))).clone()
}

// The name that is looked for first: before that of a driver that the machine may have. NVRTC looks for another one, and is content
// without it.
const DRIVER: &str = "libcuda.so";
// The same of cuFile, and the name that others look for.
const CUFILE: &str = "libcufile.so.0";
const CUFILE_TO_LINK: &str = "libcufile.so";

/// The folder in which the stand-in of [`compile_driver`], in this folder, is NCCL too.
///
/// # Panics
/// If it cannot be made.
pub fn nccl_of(driver: &Path) -> PathBuf {
    let dir = driver.join("nccl");
    std::fs::create_dir_all(&dir).expect("a folder for the library");
    // One file with two names is one library, which has the driver's queues and memory. Another process may have been faster.
    let _ = std::fs::hard_link(driver.join(DRIVER), dir.join("libnccl.so.2"));
    assert!(dir.join("libnccl.so.2").exists(), "the library has no other name in {}", dir.display());
    dir
}

fn build_driver(compiler: &OsString, dir: &Path) -> PathBuf {
    let folder = sources().join("stand_in");
    let mut units = files(&folder);
    units.retain(|file| file.extension().is_some_and(|extension| extension == "cpp"));
    units.push(sources().join("shim/kernels.cpp"));
    let commands: Vec<Command> = units.iter().map(|unit| stand_in_unit(compiler, unit)).collect();
    let mut hasher = blake3::Hasher::new();
    for file in [folder, sources(), sources().join("shim")].iter().flat_map(|folder| files(folder)) {
        hasher.update(&std::fs::read(file).expect("a source"));
    }
    let version = Command::new(compiler).arg("--version").output().expect("the compiler runs").stdout;
    hasher.update(&version).update(format!("{commands:?}").as_bytes());
    let dir = dir.join(&hasher.finalize().to_hex()[..16]);
    if dir.join(DRIVER).exists() {
        return dir;
    }
    std::fs::create_dir_all(&dir).expect("a folder for the library");
    let objects: Vec<PathBuf> =
        units.iter().map(|unit| own(&dir, &unit.file_stem().expect("a name").to_string_lossy())).collect();
    let started = commands.into_iter().zip(&objects).map(|(mut command, object)| {
        let child = command.arg("-o").arg(object).spawn().expect("the compiler runs");
        (command, child)
    });
    for (command, mut child) in started.collect::<Vec<_>>() {
        let status = child.wait().expect("the compiler ends");
        assert!(status.success(), "{command:?}: {status}");
    }
    let library = own(&dir, DRIVER);
    // Nothing of it may be taken for a part of the program, or of another library.
    let options = ["-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs"];
    succeed(Command::new(compiler).args(options).args(&objects).arg("-lm").arg("-o").arg(&library));
    for object in objects {
        std::fs::remove_file(object).expect("the object is there");
    }
    put(&library, &dir, DRIVER);
    dir
}

/// Compiles into a folder of its own in `dir` the stand-in for cuFile, and gives the folder. `None` if there is no C++ compiler.
///
/// # Panics
/// If the compiler finds an error.
pub fn compile_cufile(dir: &Path) -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let built = FOLDER.get_or_init(|| {
        let (compiler, dir) = (compiler()?, dir.join("cuda-cufile"));
        std::fs::create_dir_all(&dir).expect("a folder for the library");
        let library = own(&dir, CUFILE);
        let options =
            ["-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-static-libstdc++", "-static-libgcc"];
        let mut command = compile(&compiler);
        command.args(options).args(["-Wl,--exclude-libs,ALL", "-Wl,-z,defs", "-pthread"]);
        succeed(
            command.arg(sources().join("stand_in/cufile/cufile.cpp")).arg("-ldl").arg("-o").arg(&library),
        );
        put(&library, &dir, CUFILE);
        Some(dir)
    });
    built.clone()
}

/// The folder in which the library of [`compile_cufile`], in this folder, has the name by which programs are linked with it, and no other.
///
/// # Panics
/// If it cannot be made.
pub fn cufile_to_link(cufile: &Path) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let linked = FOLDER.get_or_init(|| {
        let dir = cufile.join("to-link");
        std::fs::create_dir_all(&dir).expect("a folder for the library");
        // What is there may be of older sources.
        let new = own(&dir, "new");
        std::fs::copy(cufile.join(CUFILE), &new).expect("another copy of the library");
        put(&new, &dir, CUFILE_TO_LINK);
        dir
    });
    linked.clone()
}

/// The command that compiles a source of the stand-in: the bits are those of the shim, and it is as fast as this machine can.
fn stand_in_unit(compiler: &OsString, unit: &Path) -> Command {
    let mut command = compile(compiler);
    command.args(["-O2", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-DLITE_LLM_SHIM"]);
    command.args(["-ffp-contract=off", "-fno-strict-aliasing", "-pthread"]);
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        command.args(["-mavx2", "-mfma"]);
    }
    command.arg("-c").arg(unit);
    command
}

/// What the stand-in wrote down: how often it was asked for what, and each kernel.
///
/// # Panics
/// If it wrote nothing to that file.
pub fn counts(file: &Path) -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(file).expect("a process that ended well has counted");
    let lines = text.lines().map(|line| line.split_once(' ').expect("a name and a number"));
    lines.map(|(what, count)| (what.to_owned(), count.parse().expect("a number"))).collect()
}

/// Faults whose numbers count from the end of the self-test on, as the stand-in counts them, which was asked for so much `before`.
/// Modules are loaded before it, and it makes no graphs: the one that is there before a model only shows that there may be some.
///
/// # Panics
/// If it knows no such faults.
pub fn after_the_self_test(before: &BTreeMap<String, u64>, faults: &str) -> String {
    let moved = faults.split(',').map(|fault| {
        let parts: Vec<&str> = fault.split(':').collect();
        let [what, number, how] = parts[..] else { panic!("{fault} is no fault") };
        let before = if matches!(what, "module" | "graph") { 0 } else { before[what] };
        format!("{what}:{}:{how}", before + number.parse::<u64>().expect("a number"))
    });
    moved.collect::<Vec<_>>().join(",")
}

/// The files of a folder, by name.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder of sources");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|file| file.is_file());
    files.sort();
    files
}

/// A launch of a kernel.
#[derive(Clone, Debug)]
pub struct Launch {
    kernel: String,
    grid: [u32; 3],
    threads: u32,
    arguments: Vec<u8>,
    count: u32,
    buffers: Vec<usize>,
}

impl Launch {
    /// A kernel in so many blocks of so many threads, as yet without arguments.
    pub fn new(kernel: &str, grid: [u32; 3], threads: u32) -> Self {
        let (arguments, buffers) = (Vec::new(), Vec::new());
        Self { kernel: kernel.to_owned(), grid, threads, arguments, count: 0, buffers }
    }

    fn argument(mut self, form: u8, bits: u64, bytes: &[u8]) -> Self {
        self.arguments.push(form);
        self.arguments.extend(bits.to_le_bytes());
        self.arguments.extend(bytes);
        self.count += 1;
        self
    }

    /// An integer.
    #[must_use]
    pub fn word(self, value: usize) -> Self {
        self.argument(0, value as u64, &[])
    }

    /// A number.
    #[must_use]
    pub fn value(self, value: f32) -> Self {
        self.argument(0, u64::from(value.to_bits()), &[])
    }

    /// No buffer, where one may be.
    #[must_use]
    pub fn null(self) -> Self {
        self.argument(0, 0, &[])
    }

    /// A buffer.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.buffers.push(bytes.len());
        self.argument(1, bytes.len() as u64, bytes)
    }

    /// A buffer of numbers.
    #[must_use]
    pub fn values(self, values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.bytes(&bytes)
    }

    /// The buffer that an earlier argument is.
    #[must_use]
    pub fn same_as(self, argument: usize) -> Self {
        self.argument(2, argument as u64, &[])
    }

    /// A buffer of numbers, or none.
    #[must_use]
    pub fn values_if(self, values: Option<&[f32]>) -> Self {
        match values {
            Some(values) => self.values(values),
            None => self.null(),
        }
    }

    /// A buffer of integers.
    #[must_use]
    pub fn words(self, words: &[u32]) -> Self {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.bytes(&bytes)
    }

    /// A buffer of long integers.
    #[must_use]
    pub fn longs(self, words: &[u64]) -> Self {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.bytes(&bytes)
    }

    /// A buffer for so many results, of bytes that no kernel may leave.
    #[must_use]
    pub fn room(self, values: usize) -> Self {
        self.bytes(&vec![0xa5; values * 4])
    }
}

/// What the buffers of a launch hold after it, in the order of arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffers(Vec<Vec<u8>>);

impl Buffers {
    /// A buffer as bytes.
    pub fn bytes(&self, index: usize) -> &[u8] {
        &self.0[index]
    }

    /// A buffer as integers.
    pub fn words(&self, index: usize) -> Vec<u32> {
        self.0[index].as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(*four)).collect()
    }

    /// A buffer as long integers.
    pub fn longs(&self, index: usize) -> Vec<u64> {
        self.0[index].as_chunks::<8>().0.iter().map(|eight| u64::from_le_bytes(*eight)).collect()
    }

    /// A buffer as numbers.
    pub fn values(&self, index: usize) -> Vec<f32> {
        self.words(index).into_iter().map(f32::from_bits).collect()
    }
}

/// A running shim.
pub struct Shim {
    child: Child,
    requests: Option<ChildStdin>,
    answers: ChildStdout,
    /// Every place where threads waited for each other, and whether something was found when they did not.
    barriers: BTreeMap<String, bool>,
}

impl Shim {
    /// Starts the program.
    fn start(program: &Path) -> Self {
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the shim starts");
        let requests = child.stdin.take();
        let answers = child.stdout.take().expect("its output is piped");
        Self { child, requests, answers, barriers: BTreeMap::new() }
    }

    /// Launches a kernel with its threads in one order (0 is ascending, 1 descending, others are shuffled), and where a place
    /// is given, without the barrier there.
    ///
    /// # Errors
    /// What the shim found.
    ///
    /// # Panics
    /// If the shim ends.
    pub fn launch(&mut self, launch: &Launch, order: u64, left_out: &str) -> Result<Buffers, String> {
        let mut request = Vec::new();
        text(&mut request, &launch.kernel);
        for word in launch.grid.iter().chain(&[launch.threads, 1, 1]) {
            request.extend(word.to_le_bytes());
        }
        request.extend(order.to_le_bytes());
        text(&mut request, left_out);
        request.extend(launch.count.to_le_bytes());
        request.extend(&launch.arguments);
        let requests = self.requests.as_mut().expect("the shim runs");
        requests.write_all(&request).and_then(|()| requests.flush()).expect("the shim takes the launch");
        let fault = self.read_text(&launch.kernel);
        for site in self.read_text(&launch.kernel).lines() {
            self.barriers.entry(site.to_owned()).or_default();
        }
        let buffers = launch.buffers.iter().map(|&bytes| self.read(bytes, &launch.kernel)).collect();
        if fault.is_empty() { Ok(Buffers(buffers)) } else { Err(fault) }
    }

    /// Launches a kernel in several orders, which have to give the same, and without each of its barriers that has not yet been
    /// seen to be needed.
    ///
    /// # Panics
    /// If the shim finds something, or orders differ.
    pub fn check(&mut self, launch: &Launch) -> Buffers {
        let first = self.launch(launch, 0, "").unwrap_or_else(|fault| panic!("{fault}"));
        for order in [1, 7] {
            let again = self.launch(launch, order, "").unwrap_or_else(|fault| panic!("{fault}"));
            assert!(first == again, "{}: threads in another order give other results", launch.kernel);
        }
        let open: Vec<String> =
            self.barriers.iter().filter(|(_, found)| !**found).map(|(site, _)| site.clone()).collect();
        for site in open {
            if self.launch(launch, 1, &site) != Ok(first.clone()) {
                self.barriers.insert(site, true);
            }
        }
        first
    }

    /// Ends the shim, having seen that each barrier of a source is needed.
    ///
    /// # Panics
    /// If one can be left out and nothing is found, or there was none.
    pub fn finish(self, source: &str) {
        let of_source = |site: &str| site.split(':').next() == Some(source);
        let own: Vec<_> = self.barriers.iter().filter(|(site, _)| of_source(site)).collect();
        let idle: Vec<&String> = own.iter().filter(|(_, found)| !**found).map(|(site, _)| *site).collect();
        assert!(!own.is_empty(), "no thread waited in {source}");
        assert!(idle.is_empty(), "nothing is found without the barriers at {idle:?}");
    }

    fn read(&mut self, bytes: usize, kernel: &str) -> Vec<u8> {
        let mut read = vec![0; bytes];
        if let Err(error) = self.answers.read_exact(&mut read) {
            panic!("{kernel}: the shim ended ({:?}): {error}", self.child.wait());
        }
        read
    }

    fn read_text(&mut self, kernel: &str) -> String {
        let length = self.read(4, kernel);
        let length = u32::from_le_bytes(length.try_into().expect("four bytes"));
        String::from_utf8(self.read(length as usize, kernel)).expect("the shim writes text")
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // The end of its requests ends it.
        self.requests = None;
        let _ = self.child.wait();
    }
}

fn text(request: &mut Vec<u8>, text: &str) {
    request.extend((text.len() as u32).to_le_bytes());
    request.extend(text.as_bytes());
}

/// Numbers within (-2, 2), an eighth of them zeros of both signs, an eighth subnormals or so small that products underflow.
#[derive(Debug)]
pub struct Operands(u64);

impl Operands {
    /// A sequence by its seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 32 bits.
    pub fn word(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// The next number.
    pub fn value(&mut self) -> f32 {
        let bits = self.word();
        match self.word() % 16 {
            0 => 0.0,
            1 => -0.0,
            2 => f32::from_bits(bits & 0x807f_ffff),
            3 => f32::from_bits(bits & 0x80ff_ffff | 0x1a00_0000),
            _ => bits as i32 as f32 / 1_073_741_824.0,
        }
    }

    /// Some numbers.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }
}

/// Asserts that numbers have the same bits; of what is no number the contract says nothing but that.
///
/// # Panics
/// If they differ.
pub fn assert_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
        assert!(same, "{what}: {found:e} at {at} instead of {expected:e}");
    }
}
