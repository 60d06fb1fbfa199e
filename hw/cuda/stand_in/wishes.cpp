// What the environment asks of the stand-in (driver.hpp), and how it says that it was used wrongly.
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "driver.hpp"

namespace stand_in {
namespace {

const char* const NAMES[WHATS] = {
    "init", "alloc", "pin", "module", "graph", "unique", "replay", "launch", "join", "exchange", "pages", "pages_back", "copy", "fetch"};

const char* variable(const char* name, const char* otherwise) {
    const char* const value = std::getenv(name);
    return value && *value ? value : otherwise;
}

std::uint64_t number(const char* name, std::uint64_t otherwise) {
    const char* const text = variable(name, nullptr);
    if (!text) return otherwise;
    char* end;
    const std::uint64_t value = std::strtoull(text, &end, 10);
    if (*end) report("%s=%s is no number", name, text);
    return value;
}

struct Wished {
    // By its name: a `What`, or a kernel.
    std::string what;
    // 0 for each.
    std::uint64_t number;
    Fault fault;
};

[[noreturn]] void refuse(const std::string& text) { report("LITE_LLM_STAND_IN_FAULT has %s, which is no fault", text.c_str()); }

Wished parse(const std::string& text) {
    const std::size_t first = text.find(':'), second = first == std::string::npos ? first : text.find(':', first + 1);
    if (second == std::string::npos) refuse(text);
    const std::string what = text.substr(0, first), how = text.substr(second + 1);
    Wished wished = {what, std::strtoull(text.c_str() + first + 1, nullptr, 10), {}};
    wished.fault.code = std::atoi(how.c_str());
    wished.fault.how = how == "hang" ? Fault::HANG : how == "flip" ? Fault::FLIP : Fault::CODE;
    bool is_kernel = false;
    for (std::size_t i = 0; i < shim::kernels_count; i++) is_kernel |= what == shim::kernels[i].name;
    const bool is_operation = is_kernel || std::find(NAMES + LAUNCH, NAMES + WHATS, what) != NAMES + WHATS;
    const bool is_any = is_operation || std::find(NAMES, NAMES + WHATS, what) != NAMES + WHATS;
    const bool fits = wished.fault.how == Fault::CODE ? wished.fault.code > 0 : is_operation;
    const bool is_counted = wished.number > 0 || text.compare(first, 3, ":*:") == 0;
    if (!is_any || !is_counted || !fits) refuse(text);
    return wished;
}

const std::vector<Wished>& faults() {
    static const std::vector<Wished> list = [] {
        std::vector<Wished> list;
        std::string left = variable("LITE_LLM_STAND_IN_FAULT", "");
        while (!left.empty()) {
            const std::size_t end = left.find(',');
            list.push_back(parse(left.substr(0, end)));
            left = end == std::string::npos ? "" : left.substr(end + 1);
        }
        return list;
    }();
    return list;
}

std::uint64_t state;

// What there was of each, and where that is written as the library is let go of.
struct Tally {
    std::map<std::string, std::uint64_t> counts;

    ~Tally() {
        std::string path = variable("LITE_LLM_STAND_IN_TALLY", "");
        const std::size_t own = path.find("%p");
        if (own != std::string::npos) path.replace(own, 2, std::to_string(getpid()));
        std::FILE* const file = path.empty() ? nullptr : std::fopen(path.c_str(), "w");
        if (!file) return;
        const auto write = [&](const char* name) { std::fprintf(file, "%s %llu\n", name, static_cast<unsigned long long>(counts[name])); };
        for (const char* const name : NAMES) write(name);
        write("kernels");
        for (std::size_t i = 0; i < shim::kernels_count; i++) write(shim::kernels[i].name);
        std::fclose(file);
    }
};

Tally tally;

Fault count_named(const char* what) {
    const std::uint64_t number = ++tally.counts[what];
    for (const Wished& wished : faults()) {
        if (wished.what == what && (wished.number == 0 || wished.number == number)) return wished.fault;
    }
    return {};
}

}  // namespace

const char* kind_of_driver() { return variable("LITE_LLM_STAND_IN", "0"); }

int device_count() {
    static const int count = static_cast<int>(std::min<std::uint64_t>(number("LITE_LLM_STAND_IN_DEVICES", 2), DEVICES_MAX));
    return count;
}

std::string folder_of_nccl() { return variable("LITE_LLM_STAND_IN_NCCL", variable("TMPDIR", "/tmp")); }

int version_of_nccl() { return static_cast<int>(number("LITE_LLM_STAND_IN_NCCL_VERSION", 22703)); }

std::size_t memory_of_device() {
    static const std::size_t bytes = number("LITE_LLM_STAND_IN_MEMORY", std::uint64_t{24} << 30);
    return bytes;
}

std::size_t pinned_limit() {
    static const std::size_t bytes = number("LITE_LLM_STAND_IN_PINNED", ~std::uint64_t{0});
    return bytes;
}

bool is_busy(int device) {
    const std::uint64_t none = ~std::uint64_t{0};
    return number("LITE_LLM_STAND_IN_BUSY", none) == static_cast<std::uint64_t>(device);
}

Fault count(What what) { return count_named(NAMES[what]); }

Fault count_copy(bool to_host, Address host, std::size_t bytes) {
    const Fault of_copy = count(to_host ? FETCH : COPY);
    // What is not pinned may begin at a page by chance, with other lengths of paths in the arguments alone.
    if (host % 4096 || bytes % 4096 || bytes == 0 || !is_pinned(reinterpret_cast<const void*>(host))) return of_copy;
    const Fault of_pages = count(to_host ? PAGES_BACK : PAGES);
    return of_copy.how == Fault::NOTHING ? of_pages : of_copy;
}

Fault count_launch(const char* kernel) {
    const Fault of_kernel = count_named(kernel), of_launch = count(LAUNCH);
    return of_launch.how == Fault::NOTHING ? of_kernel : of_launch;
}

bool is_sticky(int code) {
    switch (code) {
        case 214: case 220: case 226: case 700: case 702: case 710: case 714: case 715: case 716: case 717: case 718: case 719: case 721:
        case UNKNOWN: return true;
        default: return false;
    }
}

// The sequence of splitmix64.
std::uint64_t draw(std::uint64_t end) {
    static const bool seeded = (state = number("LITE_LLM_STAND_IN_SEED", 0), true);
    (void)seeded;
    std::uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) % end;
}

// Also from a handler of signals, whose stack is small: nothing here may need much.
void report(const char* format, ...) {
    static char text[1024];
    static bool reporting;
    if (reporting) std::abort();
    reporting = true;
    std::size_t length = static_cast<std::size_t>(std::snprintf(text, sizeof(text), "stand-in for the CUDA driver: "));
    const auto add = [&](const char* format, std::va_list list) {
        length += static_cast<std::size_t>(std::vsnprintf(text + length, sizeof(text) - length, format, list));
        length = std::min(length, sizeof(text) - 1);
    };
    std::va_list list;
    va_start(list, format);
    add(format, list);
    va_end(list);
    const std::string in = running_now.empty() ? "\n" : " (in " + running_now + ")\n";
    if (write(2, text, length) < 0 || write(2, in.data(), in.size()) < 0) std::abort();
    std::abort();
}

}  // namespace stand_in
