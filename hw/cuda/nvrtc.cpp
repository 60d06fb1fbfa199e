// Compiles sources with NVRTC, which needs neither a GPU nor a toolkit:
//   nvrtc <libnvrtc> <options, one an argument> -- <sources>
// Whatever the compiler says of a source, a warning too, is a failure, and so are an instruction that the contract forbids and a
// kernel that keeps values in local memory, for which it has no registers. Options hold for all sources.
// Ends with 3 where the library cannot be loaded.
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

typedef struct Program_* Program;
void* library;

template <class F>
F* find(const char* name) {
    F* const found = reinterpret_cast<F*>(dlsym(library, name));
    if (!found) {
        std::fprintf(stderr, "the library has no %s\n", name);
        std::exit(3);
    }
    return found;
}

template <class T>
T value_at(const std::string& bytes, std::size_t at) {
    T value;
    if (at > bytes.size() || sizeof(T) > bytes.size() - at) {
        std::fprintf(stderr, "machine code that is no ELF file\n");
        std::exit(3);
    }
    std::memcpy(&value, bytes.data() + at, sizeof(T));
    return value;
}

// The most bytes of local memory that a kernel has: what it has no registers for. They stand in the section `.nv.info`, whose records
// have a form, a number, a length and, of this one, a symbol and bytes.
unsigned local_bytes(const std::string& code) {
    const auto header = value_at<Elf64_Ehdr>(code, 0);
    const auto section = [&](unsigned number) { return value_at<Elf64_Shdr>(code, header.e_shoff + number * sizeof(Elf64_Shdr)); };
    constexpr unsigned FORM_WITH_LENGTH = 4, FRAME_SIZE = 0x11;
    unsigned most = 0, found = 0;
    for (unsigned number = 0; number < header.e_shnum; number++) {
        const Elf64_Shdr of = section(number);
        if (std::strcmp(code.c_str() + section(header.e_shstrndx).sh_offset + of.sh_name, ".nv.info") != 0) continue;
        for (std::size_t at = of.sh_offset; at < of.sh_offset + of.sh_size;) {
            const auto form = value_at<unsigned char>(code, at), what = value_at<unsigned char>(code, at + 1);
            const auto length = form == FORM_WITH_LENGTH ? value_at<unsigned short>(code, at + 2) : 0;
            if (form == FORM_WITH_LENGTH && what == FRAME_SIZE) {
                most = std::max(most, value_at<unsigned>(code, at + 8));
                found++;
            }
            at += 4 + length;
        }
    }
    // Or the format is another one.
    return found > 0 ? most : ~0u;
}

bool compile(const char* path, const std::vector<const char*>& options) {
    typedef int Create(Program*, const char*, const char*, int, const char* const*, const char* const*);
    typedef int Compile(Program, int, const char* const*);
    typedef int Size(Program, std::size_t*);
    typedef int Text(Program, char*);
    typedef int Destroy(Program*);
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    Program program;
    if (!file || find<Create>("nvrtcCreateProgram")(&program, text.str().c_str(), path, 0, nullptr, nullptr)) {
        std::printf("%s: cannot be read\n", path);
        return false;
    }
    const int failed = find<Compile>("nvrtcCompileProgram")(program, static_cast<int>(options.size()), options.data());
    std::size_t size = 0, code = 0;
    find<Size>("nvrtcGetProgramLogSize")(program, &size);
    std::string log(size, '\0');
    find<Text>("nvrtcGetProgramLog")(program, log.data());
    while (!log.empty() && (log.back() == '\0' || log.back() == '\n')) log.pop_back();
    // Machine code for the real architecture that the options name.
    if (!failed) find<Size>("nvrtcGetCUBINSize")(program, &code);
    if (!failed) find<Size>("nvrtcGetPTXSize")(program, &size);
    std::string ptx(size, '\0');
    if (!failed) find<Text>("nvrtcGetPTX")(program, ptx.data());
    // What rule 1 of the numeric contract forbids: of products of matrices all but those of integers, which are exact.
    const std::string exact = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32";
    for (std::size_t at = ptx.find(exact); at != std::string::npos; at = ptx.find(exact, at)) ptx.erase(at, exact.size());
    for (const char* forbidden : {".approx", ".ftz", ".tf32", "mma.", "atom.", "fma.rz", "div.full"}) {
        if (ptx.find(forbidden) != std::string::npos) log += std::string("forbidden: ") + forbidden;
    }
    std::string machine(failed ? 0 : code, '\0');
    if (!machine.empty()) find<Text>("nvrtcGetCUBIN")(program, machine.data());
    // A function that is called, not put in its place, may save registers there.
    const unsigned saved = text.str().find("__noinline__") == std::string::npos ? 0 : 16;
    const unsigned local = machine.empty() ? 0 : local_bytes(machine);
    if (local > saved) log += "forbidden: " + std::to_string(local) + " bytes of local memory";
    find<Destroy>("nvrtcDestroyProgram")(&program);
    std::printf("%s: %s, %zu bytes\n%s%s", path, failed ? "failed" : "compiled", code, log.c_str(), log.empty() ? "" : "\n");
    return !failed && code > 0 && log.empty();
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<const char*> options;
    int at = 2;
    for (; at < count && std::strcmp(arguments[at], "--") != 0; at++) options.push_back(arguments[at]);
    library = count > 1 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
    if (!library) {
        std::fprintf(stderr, "NVRTC cannot be loaded: %s\n", count > 1 ? dlerror() : "no library was named");
        return 3;
    }
    bool all = at + 1 < count;
    for (at++; at < count; at++) all = compile(arguments[at], options) && all;
    return all ? 0 : 1;
}
