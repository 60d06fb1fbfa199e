// Memory of devices and pinned memory of the host.
//
// A device's addresses lie in a range that nobody can touch; the bytes are in another, at a fixed distance, and only what runs on
// the device goes there (`reach`). No address is used twice. An allocation ends with its last page, so that beyond it is nothing;
// what is left of its first page, and of the 256 bytes that allocations are multiples of, holds a pattern that nobody may write.
// Fresh memory holds the same pattern: no number in any of the types of 32 or 16 bits.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "driver.hpp"

namespace stand_in {

std::string running_now;

namespace {

constexpr std::size_t PAGE = 4096, ALIGNMENT = 256, RANGE = std::size_t{1} << 40, NEAR = 256;
// From so many bytes on, fresh memory is copies of one file until it is written.
constexpr std::size_t LARGE = std::size_t{16} << 20;
constexpr std::uint16_t POISON = 0xffa5;

std::map<Address, Allocation> live;
std::map<Address, std::size_t> freed;
std::map<char*, std::size_t> pinned;
std::size_t pinned_bytes;
char *device_range, *own_range;
Address next_page;

std::size_t whole(std::size_t bytes, std::size_t of) { return (bytes + of - 1) / of * of; }

char* reserve() {
    void* const at = mmap(nullptr, RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) report("no addresses: %m");
    return static_cast<char*>(at);
}

void prepare() {
    if (device_range) return;
    device_range = reserve(), own_range = reserve();
    next_page = reinterpret_cast<Address>(device_range) + PAGE;
}

void poison(char* at, std::size_t bytes) {
    std::size_t done = 0;
    for (; done < bytes && done < PAGE; done++) at[done] = static_cast<char>(POISON >> (done % 2 * 8));
    for (; done < bytes; done += std::min(done, bytes - done)) std::memcpy(at + done, at, std::min(done, bytes - done));
}

int poisoned_file() {
    static const int file = [] {
        const int file = memfd_create("stand-in", MFD_CLOEXEC);
        void* const at = file < 0 || ftruncate(file, LARGE) ? MAP_FAILED : mmap(nullptr, LARGE, PROT_WRITE, MAP_SHARED, file, 0);
        if (at == MAP_FAILED) report("no file for fresh memory: %m");
        poison(static_cast<char*>(at), LARGE);
        munmap(at, LARGE);
        return file;
    }();
    return file;
}

// Makes pages, poisoned.
bool make(char* at, std::size_t bytes) {
    for (std::size_t done = 0; done < bytes;) {
        const std::size_t part = std::min(bytes - done, LARGE);
        const bool from_file = bytes >= LARGE;
        const int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE | (from_file ? 0 : MAP_ANONYMOUS);
        const int file = from_file ? poisoned_file() : -1;
        if (mmap(at + done, part, PROT_READ | PROT_WRITE, flags, file, 0) == MAP_FAILED) return false;
        if (!from_file) poison(at + done, part);
        done += part;
    }
    return true;
}

// The first byte of `bytes` that is not what it was left as.
const char* written(const char* at, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i++) {
        const auto expected = static_cast<char>(POISON >> (reinterpret_cast<std::uintptr_t>(at + i) % 2 * 8));
        if (at[i] != expected) return at + i;
    }
    return nullptr;
}

struct sigaction old_actions[2];

const char* belongs(Address at) {
    static char text[160];
    // Or the page behind it.
    const auto before = live.upper_bound(at);
    const Allocation* const last = before == live.begin() ? nullptr : &std::prev(before)->second;
    const Allocation* const near = last && at < last->pages + last->pages_bytes + PAGE ? last : nullptr;
    const auto after = freed.upper_bound(at);
    if (near) {
        std::snprintf(text, sizeof(text), "byte %lld of an allocation of %zu", static_cast<long long>(at - near->at), near->bytes);
    } else if (after != freed.begin() && at < std::prev(after)->first + std::prev(after)->second) {
        const auto& [begin, bytes] = *std::prev(after);
        std::snprintf(text, sizeof(text), "byte %lld of an allocation of %zu that was freed", static_cast<long long>(at - begin), bytes);
    } else {
        std::snprintf(text, sizeof(text), "beside every allocation");
    }
    return text;
}

// A fault of the machine: of ours it is said what it is, others are left to whoever was there before.
void on_fault(int signal, siginfo_t* info, void*) {
    const auto at = static_cast<char*>(info->si_addr);
    if (device_range && at >= device_range && at < device_range + RANGE) {
        const Address address = reinterpret_cast<Address>(at);
        report("the host touches device memory at %#llx, %s", static_cast<unsigned long long>(address), belongs(address));
    }
    if (own_range && at >= own_range && at < own_range + RANGE) {
        const Address address = reinterpret_cast<Address>(device_range) + static_cast<Address>(at - own_range);
        report("out of bounds at %#llx, %s", static_cast<unsigned long long>(address), belongs(address));
    }
    if (!running_now.empty()) report("memory of the host at %p is not there any more, or never was", static_cast<void*>(at));
    sigaction(signal, &old_actions[signal == SIGBUS], nullptr);
}

}  // namespace

void watch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_actions[0]);
    sigaction(SIGBUS, &action, &old_actions[1]);
}

int allocate(Device& device, std::size_t bytes, Address& at) {
    if (bytes == 0) return INVALID_VALUE;
    const Fault fault = count(ALLOC);
    if (fault.how == Fault::CODE) return fault.code;
    prepare();
    const std::size_t room = whole(bytes, ALIGNMENT), pages = whole(room, PAGE);
    if (room > memory_of_device() - device.used) return OUT_OF_MEMORY;
    if (next_page + pages + PAGE > reinterpret_cast<Address>(device_range) + RANGE) report("all addresses are used");
    if (!make(reach(next_page), pages)) return OUT_OF_MEMORY;
    at = next_page + pages - room;
    live[at] = {at, bytes, &device, next_page, pages};
    // Nothing is behind it but a page that is not there.
    next_page += pages + PAGE;
    device.used += room;
    return SUCCESS;
}

const Allocation* find(Address at) {
    const auto after = live.upper_bound(at);
    if (after == live.begin()) return nullptr;
    const Allocation& found = std::prev(after)->second;
    return at <= found.at + found.bytes ? &found : nullptr;
}

void release(Address at) {
    const auto found = live.find(at);
    if (found == live.end()) report("frees %#llx: %s", static_cast<unsigned long long>(at), belongs(at));
    const Allocation of = found->second;
    check_guards(of, true, "found as it is freed");
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (mmap(reach(of.pages), of.pages_bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED) report("pages stay: %m");
    of.device->used -= whole(of.bytes, ALIGNMENT);
    live.erase(found);
    freed[of.at] = of.bytes;
}

bool is_device_address(Address at) {
    const Address begin = reinterpret_cast<Address>(device_range);
    return device_range && at >= begin && at < begin + RANGE;
}

char* reach(Address at) { return own_range + (at - reinterpret_cast<Address>(device_range)); }

void check_guards(const Allocation& of, bool all, const char* who) {
    const std::size_t before = std::min<std::size_t>(of.at - of.pages, all ? PAGE : NEAR);
    const char* const begin = reach(of.at);
    const std::size_t behind = of.pages + of.pages_bytes - (of.at + of.bytes);
    const char* found = written(begin - before, before);
    if (!found) found = written(begin + of.bytes, behind);
    if (found) report("written out of bounds: byte %lld of an allocation of %zu, %s", static_cast<long long>(found - begin), of.bytes, who);
}

void check_all_guards(const char* who) {
    for (const auto& [at, of] : live) check_guards(of, true, who);
}

int pin(std::size_t bytes, void*& at) {
    if (bytes == 0) return INVALID_VALUE;
    const Fault fault = count(PIN);
    if (fault.how == Fault::CODE) return fault.code;
    if (bytes > pinned_limit() - pinned_bytes) return OUT_OF_MEMORY;
    // Between two pages that are not there; as far as pages allow, it ends with one.
    const std::size_t pages = whole(bytes, PAGE);
    void* const range = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED || !make(static_cast<char*>(range) + PAGE, pages)) return OUT_OF_MEMORY;
    char* const begin = static_cast<char*>(range) + PAGE;
    pinned[begin] = bytes;
    pinned_bytes += bytes;
    at = begin;
    return SUCCESS;
}

bool unpin(void* at) {
    const auto found = pinned.find(static_cast<char*>(at));
    if (found == pinned.end()) return false;
    const std::size_t bytes = found->second, pages = whole(bytes, PAGE);
    if (written(found->first + bytes, pages - bytes)) report("written behind pinned memory of %zu bytes", bytes);
    munmap(found->first - PAGE, pages + 2 * PAGE);
    pinned_bytes -= bytes;
    pinned.erase(found);
    return true;
}

bool is_pinned(const void* at) {
    const auto after = pinned.upper_bound(static_cast<char*>(const_cast<void*>(at)));
    return after != pinned.begin() && at < std::prev(after)->first + std::prev(after)->second;
}

std::size_t pinned_bytes_at(const void* at) {
    const auto found = pinned.find(static_cast<char*>(const_cast<void*>(at)));
    return found == pinned.end() ? 0 : found->second;
}

}  // namespace stand_in
