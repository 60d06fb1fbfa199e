// Compiles sources with NVRTC, which needs neither a GPU nor a toolkit:
//   nvrtc <libnvrtc> <options, one an argument> -- <sources>
// Whatever the compiler says of a source, a warning too, is a failure, and so is an instruction that the contract forbids. Options
// hold for all sources. Ends with 3 where the library cannot be loaded.
#include <dlfcn.h>

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
    // What rule 1 of the numeric contract forbids.
    for (const char* forbidden : {".approx", ".ftz", ".tf32", "mma.", "atom.", "fma.rz", "div.full"}) {
        if (ptx.find(forbidden) != std::string::npos) log += std::string("forbidden: ") + forbidden;
    }
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
