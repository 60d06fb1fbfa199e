// A stand-in for cuFile (libcufile), the library of GPUDirect Storage: files into memory of the devices of the stand-in for the driver,
// which has to be the driver of the process.
//
// It is strict where the library may be lenient. A file has to be known and open past the cache, a read has to lie in one allocation, in
// memory that is known within what was made known and by its beginning, and nothing that is queued may copy there meanwhile. What was
// made known is forgotten once, before its memory is freed and before the library is closed. What only a wrong host does is said on
// standard error and ends the process.
//
// What it is asked for, by variables of the environment:
//   LITE_LLM_STAND_IN_CUFILE        fails (it does not open), compat (no nvidia-fs, which is said when it is opened, or, where the mode
//                                   may not be switched off, by its properties: forced), allowed (nvidia-fs, and the mode cannot be
//                                   switched off), files (it takes no file), memory (it has no room for memory of devices), little
//                                   (it has room for 64 KiB of it), unknown (a code that nobody knows, as a later library may have,
//                                   when memory is made known), unopened (the same when it is opened)
//   LITE_LLM_STAND_IN_CUFILE_FAULT  faults with commas between them, each `number:how` or, for each from that one on, `number+:how`,
//                                   with reads of the process counted from 1. `how` is an error (of the system, or, from 5000 on,
//                                   of the library), flip (a bit is another), short (the second half is missing)
//   LITE_LLM_STAND_IN_CUFILE_TALLY  a file, to which a process that ends well writes how many reads there were, and how many of them
//                                   went to memory that is known; %p in its name is the number of the process
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define CALL extern "C" __attribute__((visibility("default")))

namespace {

enum Code : unsigned {
    SUCCESS = 0,
    NOT_INITIALISED = 5001,
    NOT_SUPPORTED = 5008,
    NVFS_ERROR = 5010,
    CUDA_ERROR = 5011,
    INVALID_VALUE = 5022,
    ALREADY_OPEN = 5026,
    PINNING_FAILED = 5036,
    UNKNOWN = 5999,
};

struct Error {
    unsigned code;
    unsigned cuda;
};

struct Properties {
    unsigned major, minor;
    std::size_t poll_threshold, direct_max;
    unsigned status, control;
    unsigned features, cache_max, cache_of_buffer, pinned_max, batch_max, batch_timeout;
};

struct Descriptor {
    unsigned type;
    union {
        int fd;
        void* handle;
    };
    const void* operations;
};

struct Known {
    int fd;
};

std::mutex door;
bool is_open, allows_compat = true;
std::map<Known*, bool> files;  // Whether it is known still: addresses are not used twice.
std::map<std::uintptr_t, std::size_t> memory;
unsigned long long reads, direct_reads;

[[noreturn]] __attribute__((format(printf, 1, 2))) void report(const char* format, ...) {
    std::va_list list;
    va_start(list, format);
    std::fputs("stand-in for cuFile: ", stderr);
    std::vfprintf(stderr, format, list);
    std::fputs("\n", stderr);
    std::abort();
}

const char* variable(const char* name) {
    const char* const value = std::getenv(name);
    return value ? value : "";
}

bool is_kind(const char* kind) { return std::strcmp(variable("LITE_LLM_STAND_IN_CUFILE"), kind) == 0; }

// How much memory of devices it may know, in KiB.
unsigned pinned_max() { return is_kind("little") ? 64 : 32u << 20; }

// The stand-in for the driver: copies to a device at once, as what moves the bytes past the host does. Nothing else is known of a device.
int put(std::uint64_t at, const void* from, std::size_t bytes) {
    using Call = int (*)(std::uint64_t, const void*, std::size_t);
    static const Call call = [] {
        void* const driver = dlopen("libcuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return driver ? reinterpret_cast<Call>(dlsym(driver, "stand_in_put")) : nullptr;
    }();
    if (!call) report("the driver of this process is no stand-in");
    return call(at, from, bytes);
}

// What is to become of a read.
std::string fault_of(unsigned long long number) {
    std::string left = variable("LITE_LLM_STAND_IN_CUFILE_FAULT");
    while (!left.empty()) {
        const std::size_t end = left.find(','), colon = left.find(':');
        if (colon == std::string::npos || colon > end) report("%s is no fault", left.c_str());
        const unsigned long long from = std::strtoull(left.c_str(), nullptr, 10);
        const std::string how = left.substr(colon + 1, end == std::string::npos ? end : end - colon - 1);
        if (number == from || (left[colon - 1] == '+' && number > from)) return how;
        left = end == std::string::npos ? "" : left.substr(end + 1);
    }
    return "";
}

struct AtEnd {
    ~AtEnd() {
        std::string path = variable("LITE_LLM_STAND_IN_CUFILE_TALLY");
        const std::size_t own = path.find("%p");
        if (own != std::string::npos) path.replace(own, 2, std::to_string(getpid()));
        std::FILE* const file = path.empty() ? nullptr : std::fopen(path.c_str(), "w");
        if (!file) return;
        std::fprintf(file, "reads %llu\nknown %llu\n", reads, direct_reads);
        std::fclose(file);
    }
} at_end;

void need_open(const char* call) {
    if (!is_open) report("%s before it is opened, or after it is closed", call);
}

Known* known(void* handle, const char* call) {
    const auto found = files.find(static_cast<Known*>(handle));
    if (found == files.end()) report("%s of a file that was never made known", call);
    if (!found->second) report("%s of a file that was forgotten", call);
    return found->first;
}

}  // namespace

CALL Error cuFileSetParameterBool(unsigned what, bool value) {
    const std::lock_guard<std::mutex> lock(door);
    if (is_open || what != 1 || is_kind("forced") || is_kind("allowed")) return {INVALID_VALUE, 0};
    return allows_compat = value, Error{SUCCESS, 0};
}

CALL Error cuFileDriverOpen() {
    const std::lock_guard<std::mutex> lock(door);
    if (is_open) return {ALREADY_OPEN, 0};
    if (is_kind("fails")) return {NOT_INITIALISED, 0};
    if (is_kind("unopened")) return {UNKNOWN, 0};
    if (is_kind("compat") && !allows_compat) return {NVFS_ERROR, 0};
    return is_open = true, Error{SUCCESS, 0};
}

CALL Error cuFileDriverClose() {
    const std::lock_guard<std::mutex> lock(door);
    need_open("cuFileDriverClose");
    for (const auto& [file, is_known] : files) {
        if (is_known) report("cuFileDriverClose while file %d is known", file->fd);
    }
    if (!memory.empty()) report("cuFileDriverClose while memory is known");
    return is_open = false, Error{SUCCESS, 0};
}

CALL Error cuFileDriverGetProperties(Properties* properties) {
    const std::lock_guard<std::mutex> lock(door);
    need_open("cuFileDriverGetProperties");
    *properties = {};
    if (!is_kind("compat") && !is_kind("forced")) properties->major = 2, properties->minor = 17, properties->status = 1 << 4;
    properties->control = allows_compat ? 1 << 1 : 0;
    properties->pinned_max = pinned_max();
    return {SUCCESS, 0};
}

CALL Error cuFileHandleRegister(void** handle, Descriptor* descriptor) {
    const std::lock_guard<std::mutex> lock(door);
    need_open("cuFileHandleRegister");
    if (descriptor->type != 1 || descriptor->operations) return {INVALID_VALUE, 0};
    const int flags = fcntl(descriptor->fd, F_GETFL);
    if (flags < 0 || !(flags & O_DIRECT)) report("cuFileHandleRegister of a file that is not open past the cache");
    if (is_kind("files")) return {NOT_SUPPORTED, 0};
    auto* const file = new Known{descriptor->fd};
    files[file] = true;
    return *handle = file, Error{SUCCESS, 0};
}

CALL void cuFileHandleDeregister(void* handle) {
    const std::lock_guard<std::mutex> lock(door);
    need_open("cuFileHandleDeregister");
    Known* const file = known(handle, "cuFileHandleDeregister");
    if (fcntl(file->fd, F_GETFL) < 0) report("cuFileHandleDeregister of a file that was closed before");
    files[file] = false;
}

CALL Error cuFileBufRegister(const void* at, std::size_t bytes, int) {
    const std::lock_guard<std::mutex> lock(door);
    need_open("cuFileBufRegister");
    if (is_kind("memory")) return {PINNING_FAILED, 0};
    if (is_kind("unknown")) return {UNKNOWN, 7};
    const auto begin = reinterpret_cast<std::uintptr_t>(at);
    for (const auto& [other, other_bytes] : memory) {
        if (begin < other + other_bytes && other < begin + bytes) report("cuFileBufRegister of memory that is known already");
    }
    if (bytes == 0 || put(begin, nullptr, bytes)) report("cuFileBufRegister of what is no memory of a device");
    std::size_t all = bytes;
    for (const auto& other : memory) all += other.second;
    if (all > std::size_t{pinned_max()} << 10) return {PINNING_FAILED, 0};
    memory[begin] = bytes;
    return {SUCCESS, 0};
}

CALL Error cuFileBufDeregister(const void* at) {
    const std::lock_guard<std::mutex> lock(door);
    need_open("cuFileBufDeregister");
    const auto begin = reinterpret_cast<std::uintptr_t>(at);
    if (memory.erase(begin) == 0) report("cuFileBufDeregister of memory that is not known");
    // It is to be there still.
    if (put(begin, nullptr, 0) == 1) report("cuFileBufDeregister of memory that was freed before");
    return {SUCCESS, 0};
}

CALL ssize_t cuFileRead(void* handle, void* base, std::size_t size, off_t file_offset, off_t offset) {
    std::unique_lock<std::mutex> lock(door);
    need_open("cuFileRead");
    const int fd = known(handle, "cuFileRead")->fd;
    const auto begin = reinterpret_cast<std::uintptr_t>(base);
    const std::uintptr_t at = begin + static_cast<std::uintptr_t>(offset);
    for (const auto& [start, bytes] : memory) {
        if (at >= start + bytes || start >= at + size) continue;
        if (begin != start) report("cuFileRead into memory that is known by another beginning");
        if (at < start || size > start + bytes - at) report("cuFileRead beyond memory that is known");
        direct_reads++;
    }
    const std::string how = fault_of(++reads);
    lock.unlock();
    if (const int error = std::atoi(how.c_str())) return errno = error, error < 5000 ? -1 : -error;
    std::vector<char> bytes(size);
    std::size_t got = 0;
    const int buffered = open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDONLY | O_CLOEXEC);
    if (buffered < 0) return -1;
    while (got < size) {
        const ssize_t part = pread(buffered, bytes.data() + got, size - got, file_offset + static_cast<off_t>(got));
        if (part < 0) return close(buffered), -1;
        if (part == 0) break;
        got += static_cast<std::size_t>(part);
    }
    close(buffered);
    if (how == "short") got /= 2;
    if (how == "flip" && got > 0) bytes[got / 3] ^= 64;
    const int code = put(at, bytes.data(), got);
    // The driver's: such memory is not there.
    if (code == 1) report("cuFileRead of %zu bytes into what is no memory of a device, or beyond it", size);
    return code ? -static_cast<ssize_t>(CUDA_ERROR) : static_cast<ssize_t>(got);
}
