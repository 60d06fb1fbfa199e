//! Every kernel of CUDA compiles with NVRTC for the architectures that are named here, without a warning, by the options of the
//! numeric contract, to nothing that it forbids, and with registers for all its values. `hw/cuda/fetch-nvrtc` fetches the library;
//! where it was not, this says so.

use lite_llm_hw::cuda::kernels::OPTIONS;
use lite_llm_tests::cuda::{compile_nvrtc, say_skipped, sources};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

/// The library and what loads it, if there are both.
fn ready() -> Option<(PathBuf, PathBuf)> {
    let builds = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = builds.parent()?.join("nvrtc/libnvrtc.so.12");
    let program = if library.exists() { compile_nvrtc(builds) } else { None };
    if program.is_none() {
        say_skipped(&format!(
            "kernels of CUDA with NVRTC, for want of {} or a C++ compiler",
            library.display()
        ));
    }
    Some((library, program?))
}

fn compile((library, program): &(PathBuf, PathBuf), options: &[&str], files: &[PathBuf]) -> (bool, String) {
    let mut command = Command::new(program);
    command.arg(library).args(options).arg(format!("-I{}", sources().display())).arg("--").args(files);
    let Output { status, stdout, stderr } = command.output().expect("the program runs");
    let said = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(matches!(status.code(), Some(0 | 1)), "{status}: {said}");
    (status.success(), said)
}

fn kernels() -> Vec<PathBuf> {
    let files = std::fs::read_dir(sources())
        .expect("the folder of kernels")
        .map(|entry| entry.expect("an entry").path());
    let mut files: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|extension| extension == "cu")).collect();
    files.sort();
    files
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let Some(nvrtc) = ready() else { return };
    let files = kernels();
    assert!(!files.is_empty());
    std::thread::scope(|scope| {
        for architecture in ARCHITECTURES {
            let (nvrtc, files) = (&nvrtc, &files);
            scope.spawn(move || {
                let mut options = vec!["--gpu-architecture", architecture];
                options.extend(OPTIONS);
                let (good, said) = compile(nvrtc, &options, files);
                assert!(good, "{architecture}: {said}");
                assert_eq!(said.matches(": compiled, ").count(), files.len(), "{architecture}: {said}");
            });
        }
    });
}

#[test]
fn local_memory_is_a_failure() {
    let Some(nvrtc) = ready() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("local.cu");
    let source = "#include \"words.cuh\"\nKERNEL local(u32* out, u32 at) {\n    u32 room[64];\n#pragma unroll 1\n    \
                  for (u32 i = 0; i < 64; i++) room[i] = out[i];\n    out[0] = room[at % 64];\n}\n";
    std::fs::write(&file, source).expect("the source is written");
    for architecture in ARCHITECTURES {
        let mut options = vec!["--gpu-architecture", architecture];
        options.extend(OPTIONS);
        let (good, said) = compile(&nvrtc, &options, std::slice::from_ref(&file));
        assert!(!good && said.contains("forbidden: 256 bytes of local memory"), "{said}");
    }
}

#[test]
fn warnings_and_other_arithmetic_are_failures() {
    let Some(nvrtc) = ready() else { return };
    let norm = [sources().join("norm.cu")];
    for (instead, of) in [("--ftz=true", "--ftz=false"), ("--prec-div=false", "--prec-div=true")] {
        let options = OPTIONS.map(|option| if option == of { instead } else { option });
        let (good, said) = compile(&nvrtc, &options, &norm);
        assert!(!good && said.contains("forbidden: "), "{said}");
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    // Sums of integers are exact, those of floats are not.
    let file = dir.path().join("products.cu");
    let source = r#"#include "words.cuh"
KERNEL products(float* sums, const u32* a) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]));
}
"#;
    std::fs::write(&file, source).expect("the source is written");
    let options = [&["--gpu-architecture=sm_90"], &OPTIONS[..]].concat();
    let (good, said) = compile(&nvrtc, &options, &[file]);
    assert!(!good && said.contains("forbidden: mma."), "{said}");
    let file = dir.path().join("unused.cu");
    let source = "#include \"words.cuh\"\nKERNEL unused(u32* out) { u32 nobody = 7; *out = 1; }\n";
    std::fs::write(&file, source).expect("the source is written");
    let (good, said) = compile(&nvrtc, &OPTIONS, &[file]);
    assert!(!good && said.contains("warning"), "{said}");
}
