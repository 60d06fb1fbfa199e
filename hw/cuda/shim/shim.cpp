// Runs kernels of CUDA on a CPU and distrusts them.
//
// Each thread of a block is a fiber; which one goes on, and which block comes first, is an order that the caller chooses. The
// kernels are compiled with the compiler's instrumentation for thread sanitizers, whose hooks stand here instead of its library:
// every access to a buffer or to shared memory is looked up in a shadow memory, which knows who last wrote and read each two
// bytes, and when. Two accesses of which one is a write must have a barrier between them that both threads pass: one of the block,
// or one of their warp. Shuffles order nothing, nor does a warp that happens to run in step. An access that no barrier orders, one
// beside every buffer, a read of shared memory that nobody wrote, and threads that wait at different barriers end the launch.
//
// An asynchronous copy is done as late as it may be, when its thread waits for it. Before, its place has nobody's bytes, and whoever
// touches them ends the launch; to the shadow memory it is a write when it begins and again when it ends.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "shim.hpp"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
namespace {

constexpr std::size_t ARENA = std::size_t(1) << 28, SHARED_MAX = 48 << 10, STACK = 64 << 10, THREADS_MAX = 1024, GRANULE = 2;
// Nobody's bytes around each buffer and each piece of shared memory.
constexpr std::size_t MOAT = 256;

// An access: who, and how many barriers of the block and of the warp before.
struct Event {
    std::uint32_t block, thread, block_epoch, warp_epoch;

    bool ordered(const Event& other) const {
        if (block != other.block) return false;
        if (thread == other.thread || block_epoch != other.block_epoch) return true;
        return thread / 32 == other.thread / 32 && warp_epoch != other.warp_epoch;
    }
};

enum Content : std::uint8_t { NOBODYS, UNWRITTEN, WRITTEN, UNDER_WAY };
// By how many it was read since the last barrier that all of them passed.
enum Readers : std::uint8_t { NONE, ONE, OF_WARP, OF_BLOCK, OF_GRID };

struct Cell {
    Event write, read;
    Content content;
    Readers readers;
    bool has_write;
};

enum State { READY, AT_BLOCK, AT_WARP, ENDED };

struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
};

struct Fiber {
    jmp_buf at;
    State state;
    bool started;
    std::size_t shared;
    Site site;
    std::uint64_t sent[2];
    std::vector<Copy> copies;
};

struct Warp {
    unsigned arrived, ended;
    std::uint32_t epoch, exchanges;
};

char* arena;
Cell* shadow;
char* stacks;
Fiber fibers[THREADS_MAX];
Warp warps[THREADS_MAX / 32];
std::size_t arena_used = SHARED_MAX, shared_used;
bool running;
unsigned current, threads, arrived, ended;
std::uint32_t block, block_epoch;
jmp_buf scheduler, given_up;
std::string fault, left_out;
std::vector<std::string> sites, names;
std::vector<std::size_t> starts;
const Kernel* kernel;
const Argument* arguments;
std::uint64_t order;

[[noreturn]] void die(const char* what) {
    std::fprintf(stderr, "shim: %s\n", what);
    std::exit(2);
}

// The sequence of xorshift64*, for orders.
std::uint64_t draw() {
    order ^= order >> 12;
    order ^= order << 25;
    order ^= order >> 27;
    return order * 0x2545f4914f6cdd1dull;
}

std::string text(Site site) {
    const char* name = site.file;
    for (const char* at = site.file; *at; at++) {
        if (*at == '/') name = at + 1;
    }
    return std::string(name) + ":" + std::to_string(site.line);
}

std::string who(std::uint32_t block, std::uint32_t thread) {
    return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

[[noreturn]] void give_up(const std::string& what) {
    fault = std::string(kernel->name) + ": " + what;
    running = false;
    _longjmp(given_up, 1);
}

std::string place(std::size_t at) {
    std::size_t found = 0;
    while (found + 1 < starts.size() && starts[found + 1] <= at) found++;
    if (starts.empty() || at < starts[0]) return "byte " + std::to_string(at) + " before all buffers";
    return names[found] + " at byte " + std::to_string(at - starts[found]);
}

void set_content(std::size_t at, std::size_t bytes, Content content) {
    for (std::size_t i = at / GRANULE; i < (at + bytes + GRANULE - 1) / GRANULE; i++) shadow[i] = Cell{{}, {}, content, NONE, false};
}

Event now() { return {block, current, block_epoch, warps[current / 32].epoch}; }

bool reads_are_ordered(const Cell& cell, const Event& event) {
    const Event& read = cell.read;
    switch (cell.readers) {
        case NONE: return true;
        case ONE: return read.ordered(event) || (read.block == event.block && read.thread == event.thread);
        case OF_WARP:
            if (read.block != event.block) return false;
            if (read.block_epoch != event.block_epoch) return true;
            return read.thread / 32 == event.thread / 32 && read.warp_epoch != event.warp_epoch;
        case OF_BLOCK: return read.block == event.block && read.block_epoch != event.block_epoch;
        default: return false;
    }
}

void note_read(Cell& cell, const Event& event) {
    const Event& read = cell.read;
    if (cell.readers == OF_GRID) return;
    if (cell.readers != NONE && read.block != event.block) {
        cell.readers = OF_GRID;
        return;
    }
    const bool same_epoch = cell.readers != NONE && read.block_epoch == event.block_epoch;
    if (same_epoch && (cell.readers == OF_BLOCK || read.thread / 32 != event.thread / 32)) {
        cell.readers = OF_BLOCK;
    } else if (same_epoch && read.warp_epoch == event.warp_epoch && (cell.readers == OF_WARP || read.thread != event.thread)) {
        cell.readers = OF_WARP;
    } else {
        cell.readers = ONE;
    }
    cell.read = event;
}

void look(const void* address, std::size_t bytes, bool is_write) {
    const std::size_t at = static_cast<const char*>(address) - arena;
    if (at >= ARENA || !running) return;
    if (is_write && bytes < GRANULE) give_up("writes a single byte, which the shadow memory does not tell from its neighbour");
    const Event event = now();
    for (std::size_t i = at / GRANULE; i < (at + bytes + GRANULE - 1) / GRANULE; i++) {
        Cell& cell = shadow[i];
        const auto subject = [&] { return who(block, current) + (is_write ? " writes " : " reads ") + place(i * GRANULE); };
        if (cell.content == NOBODYS) give_up(subject() + ", which is beside every buffer");
        if (cell.content == UNWRITTEN && !is_write) give_up(subject() + ", which nobody wrote");
        if (cell.content == UNDER_WAY) give_up(subject() + ", to which a copy is under way");
        const bool after_write = !cell.has_write || cell.write.ordered(event);
        if (!after_write || (is_write && !reads_are_ordered(cell, event))) {
            const Event& other = after_write ? cell.read : cell.write;
            give_up("race: " + subject() + ", which " + who(other.block, other.thread) + (after_write ? " read" : " wrote") +
                    " with no barrier between them");
        }
        if (!is_write) {
            note_read(cell, event);
        } else {
            cell.write = event, cell.has_write = true;
            cell.content = WRITTEN, cell.readers = NONE;
        }
    }
}

void pause(State state, Site site) {
    Fiber& fiber = fibers[current];
    fiber.state = state, fiber.site = site;
    if (!_setjmp(fiber.at)) _longjmp(scheduler, 1);
}

bool is_left_out(Site site) {
    const std::string name = text(site);
    for (const std::string& known : sites) {
        if (known == name) return name == left_out;
    }
    sites.push_back(name);
    return name == left_out;
}

// Lets threads go on that wait at one place.
void release(unsigned first, unsigned end, State state, Site site) {
    for (unsigned i = first; i < end; i++) {
        if (fibers[i].state != state || text(fibers[i].site) != text(site)) {
            give_up(who(block, i) + " waits at " + text(fibers[i].site) + ", " + who(block, current) + " at " + text(site));
        }
    }
    for (unsigned i = first; i < end; i++) fibers[i].state = READY;
}

void wait_for_warp(unsigned mask, Site site, bool is_barrier) {
    if (mask != 0xffffffffu) give_up("a mask of a part of a warp at " + text(site));
    const unsigned first = current / 32 * 32;
    Warp& warp = warps[current / 32];
    if (warp.ended > 0) give_up("threads of the warp ended without " + text(site));
    Fiber& fiber = fibers[current];
    fiber.state = AT_WARP, fiber.site = site;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        warp.exchanges += is_barrier ? 0 : 1;
        warp.epoch += is_barrier ? 1 : 0;
        release(first, first + 32, AT_WARP, site);
    } else {
        pause(AT_WARP, site);
    }
}

void run_thread() {
    kernel->call(arguments);
    fibers[current].state = ENDED;
    ended++;
    if (arrived > 0) give_up(who(block, current) + " ended while others wait at a barrier");
    if (warps[current / 32].arrived > 0) give_up(who(block, current) + " ended while its warp waits");
    if (!fibers[current].copies.empty()) give_up(who(block, current) + " ended while its copies are under way");
    warps[current / 32].ended++;
    _longjmp(scheduler, 1);
}

void start(unsigned thread) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + thread * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, run_thread, 0);
    setcontext(&context);
}

void resume(unsigned thread) {
    current = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
    if (_setjmp(scheduler)) return;
    Fiber& fiber = fibers[thread];
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    start(thread);
}

// The numbers below `count` in one of the orders: 0 is ascending, 1 descending, others are shuffled anew each time.
void arrange(std::vector<unsigned>& list, std::size_t count, std::uint64_t kind) {
    list.resize(count);
    for (std::size_t i = 0; i < count; i++) list[i] = static_cast<unsigned>(kind == 1 ? count - 1 - i : i);
    for (std::size_t i = count; kind > 1 && i > 1; i--) std::swap(list[i - 1], list[draw() % i]);
}

std::vector<unsigned> turns, of_blocks;

void run_block(std::uint64_t kind) {
    block_epoch = 0, arrived = 0, ended = 0;
    // What the block before wrote is nobody's any more, and as good as NaN.
    set_content(0, shared_used, NOBODYS);
    std::memset(arena, 0xff, shared_used);
    shared_used = 0;
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].state = READY, fibers[i].started = false, fibers[i].shared = 0;
        fibers[i].copies.clear();
        warps[i / 32] = {};
    }
    while (ended < threads) {
        bool moved = false;
        arrange(turns, threads, kind);
        for (unsigned thread : turns) {
            if (fibers[thread].state != READY) continue;
            moved = true;
            resume(thread);
        }
        if (!moved) give_up("every thread waits: some at a barrier of the block, some for their warp");
    }
}

void run_grid(std::uint64_t kind) {
    order = kind * 0x9e3779b97f4a7c15ull | 1;
    threads = blockDim.x * blockDim.y * blockDim.z;
    if (threads == 0 || threads > THREADS_MAX || threads % 32 != 0) die("a block is of whole warps, and of 1024 threads at most");
    arrange(of_blocks, std::size_t(gridDim.x) * gridDim.y * gridDim.z, kind);
    running = true;
    for (unsigned number : of_blocks) {
        block = number;
        blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
        run_block(kind);
    }
    running = false;
}

void read_bytes(void* to, std::size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) die("the request ends early");
}

template <class T>
T read() {
    T value;
    read_bytes(&value, sizeof(T));
    return value;
}

std::string read_text() {
    std::string text(read<std::uint32_t>(), '\0');
    read_bytes(text.data(), text.size());
    return text;
}

void write_text(const std::string& text) {
    const std::uint32_t size = static_cast<std::uint32_t>(text.size());
    std::fwrite(&size, 4, 1, stdout);
    std::fwrite(text.data(), 1, text.size(), stdout);
}

uint3 read_three() {
    const unsigned x = read<std::uint32_t>(), y = read<std::uint32_t>(), z = read<std::uint32_t>();
    return {x, y, z};
}

// A launch: the name of a kernel, its grid and block, the order, a barrier to be left out, arguments. The answer: what went wrong,
// which places threads waited at, what the buffers hold. All numbers are little-endian.
bool serve() {
    std::uint32_t length;
    if (std::fread(&length, 4, 1, stdin) != 1) return false;
    std::string name(length, '\0');
    read_bytes(name.data(), length);
    kernel = nullptr;
    for (std::size_t i = 0; i < kernels_count; i++) {
        if (name == kernels[i].name) kernel = &kernels[i];
    }
    if (!kernel) die(("no kernel " + name).c_str());
    gridDim = read_three();
    blockDim = read_three();
    const std::uint64_t kind = read<std::uint64_t>();
    left_out = read_text();
    set_content(SHARED_MAX, arena_used - SHARED_MAX, NOBODYS);
    names = {"shared memory"}, starts = {0};
    arena_used = SHARED_MAX + MOAT;
    sites.clear(), fault.clear();
    std::vector<Argument> list;
    std::vector<std::pair<std::size_t, std::size_t>> buffers;
    for (std::uint32_t left = read<std::uint32_t>(); left > 0; left--) {
        // A value, a buffer, or the buffer that an earlier argument is.
        const std::uint8_t form = read<std::uint8_t>();
        const std::uint64_t bits = read<std::uint64_t>();
        if (form == 2 && (bits >= list.size() || !list[bits].is_buffer)) die("an argument that is no buffer");
        list.push_back(form == 2 ? list[bits] : Argument{form == 1, bits});
        if (form != 1) continue;
        if (bits > ARENA - arena_used - 2 * MOAT) die("more bytes than the arena has");
        read_bytes(arena + arena_used, bits);
        set_content(arena_used, bits, WRITTEN);
        list.back().bits = reinterpret_cast<std::uintptr_t>(arena + arena_used);
        buffers.push_back({arena_used, bits});
        names.push_back("argument " + std::to_string(list.size() - 1)), starts.push_back(arena_used);
        arena_used += (bits + MOAT - 1) / MOAT * MOAT + MOAT;
    }
    if (list.size() != kernel->arguments) die((name + ": the number of arguments differs").c_str());
    arguments = list.data();
    if (!_setjmp(given_up)) run_grid(kind);
    write_text(fault);
    std::string all;
    for (const std::string& site : sites) all += site + "\n";
    write_text(all);
    for (const auto& [at, bytes] : buffers) std::fwrite(arena + at, 1, bytes, stdout);
    std::fflush(stdout);
    return true;
}

}  // namespace

void* shared_bytes(std::size_t bytes, const char* name) {
    Fiber& fiber = fibers[current];
    const std::size_t at = fiber.shared;
    fiber.shared += (bytes + MOAT - 1) / 16 * 16 + MOAT;
    if (fiber.shared > SHARED_MAX + MOAT) give_up(std::string("more shared memory than a block has, at ") + name);
    if (fiber.shared > shared_used) {
        set_content(at, bytes, UNWRITTEN);
        shared_used = fiber.shared;
    }
    return arena + at;
}

void sync_threads(Site site) {
    if (is_left_out(site)) return;
    if (ended > 0) give_up(who(block, current) + " waits at " + text(site) + ", others have ended");
    fibers[current].state = AT_BLOCK, fibers[current].site = site;
    if (++arrived == threads) {
        arrived = 0;
        block_epoch++;
        release(0, threads, AT_BLOCK, site);
    } else {
        pause(AT_BLOCK, site);
    }
}

void sync_warp(unsigned mask, Site site) {
    if (is_left_out(site)) return;
    wait_for_warp(mask, site, true);
}

std::uint64_t exchange(unsigned mask, std::uint64_t bits, unsigned source, Site site) {
    // A thread may be one exchange ahead of the slowest of its warp, never two.
    const unsigned first = current / 32 * 32, turn = warps[current / 32].exchanges % 2;
    fibers[current].sent[turn] = bits;
    wait_for_warp(mask, site, false);
    return fibers[first + source].sent[turn];
}

void copy_async(void* to, const void* from, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0 || reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
        give_up(who(block, current) + " copies " + std::to_string(bytes) + " bytes that do not begin at a multiple of as many");
    }
    const std::size_t at = static_cast<char*>(to) - arena;
    if (at >= SHARED_MAX) give_up(who(block, current) + " copies to a place that is not in shared memory");
    look(from, bytes, false);
    look(to, bytes, true);
    for (std::size_t i = at / GRANULE; i < (at + bytes) / GRANULE; i++) shadow[i].content = UNDER_WAY;
    fibers[current].copies.push_back({to, from, bytes});
}

void wait_for_copies(Site site) {
    if (is_left_out(site)) return;
    for (const Copy& copy : fibers[current].copies) {
        const std::size_t at = static_cast<char*>(copy.to) - arena;
        for (std::size_t i = at / GRANULE; i < (at + copy.bytes) / GRANULE; i++) shadow[i].content = WRITTEN;
        look(copy.from, copy.bytes, false);
        look(copy.to, copy.bytes, true);
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
    fibers[current].copies.clear();
}

}  // namespace shim

#define SHIM_HOOKS(bytes)                                                                                \
    extern "C" void __tsan_read##bytes(void* at) { shim::look(at, bytes, false); }                       \
    extern "C" void __tsan_write##bytes(void* at) { shim::look(at, bytes, true); }                       \
    extern "C" void __tsan_unaligned_read##bytes(void* at) { shim::look(at, bytes, false); }             \
    extern "C" void __tsan_unaligned_write##bytes(void* at) { shim::look(at, bytes, true); }
SHIM_HOOKS(1)
SHIM_HOOKS(2)
SHIM_HOOKS(4)
SHIM_HOOKS(8)
SHIM_HOOKS(16)
extern "C" void __tsan_read_range(void* at, std::size_t bytes) { shim::look(at, bytes, false); }
extern "C" void __tsan_write_range(void* at, std::size_t bytes) { shim::look(at, bytes, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

static void* map(std::size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) shim::die("no memory");
    return at;
}

int main() {
    shim::arena = static_cast<char*>(map(shim::ARENA));
    shim::shadow = static_cast<shim::Cell*>(map(shim::ARENA / shim::GRANULE * sizeof(shim::Cell)));
    shim::stacks = static_cast<char*>(map(shim::THREADS_MAX * shim::STACK));
    while (shim::serve()) {
    }
    return 0;
}
