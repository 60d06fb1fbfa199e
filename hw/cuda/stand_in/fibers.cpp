// Runs the blocks of a grid as fast as one thread of a CPU can.
//
// A stack runs one thread of the block after another, until one waits; that one keeps the stack, and the next begins on a fresh one.
// So a kernel that never waits is a loop of calls. Who waits switches to the next that may run, without a scheduler in between.
// Nothing is looked for here but threads that wait for each other in vain; what orders memory is the business of shim.cpp.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>

#include "driver.hpp"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
namespace {

constexpr unsigned THREADS_MAX = 1024, LANES = 32;
constexpr std::size_t STACK = 64 << 10, SHARED_MAX = 48 << 10, SHARED_ALIGNMENT = 16;

enum State : std::uint8_t { FRESH, READY, AT_BLOCK, AT_WARP, ENDED };

#ifdef __x86_64__
using Context = void*;

asm(R"(
    .text
    .type stand_in_switch, @function
stand_in_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size stand_in_switch, .-stand_in_switch
)");
extern "C" void stand_in_switch(Context* from, Context* to);

void begin_at(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    // As a call leaves it: a multiple of sixteen, less the address of return.
    auto* const top = reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{15}) - 2;
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;
    for (int i = 1; i <= 6; i++) top[-i] = nullptr;
    context = top - 6;
}
#else
using Context = ucontext_t;

void stand_in_switch(Context* from, Context* to) { swapcontext(from, to); }

void begin_at(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

struct Wait {
    unsigned count;
    Site site;
};

char* stacks;
alignas(64) char memory[SHARED_MAX];
State states[THREADS_MAX];
// Where each thread goes on.
Context contexts[THREADS_MAX];
Context caller;
uint3 places[THREADS_MAX];
std::size_t shared_of[THREADS_MAX];
std::uint64_t sent[2][THREADS_MAX];
Wait at_block, at_warp[THREADS_MAX / LANES];
// Which of the two places each thread sent to last.
unsigned turns[THREADS_MAX];
// Stacks that nobody has, and how many were ever begun.
unsigned free_stacks[THREADS_MAX], free_count, threads, current, ended;
std::size_t shared_used;
const Kernel* kernel;
const Argument* arguments;

[[noreturn]] void refuse(const char* what, Site site) {
    stand_in::report("thread %u of block (%u, %u, %u) %s, at %s:%d", current, blockIdx.x, blockIdx.y, blockIdx.z, what, site.file, site.line);
}

unsigned stack_of[THREADS_MAX];

void work();

inline void become(unsigned thread) {
    current = thread;
    threadIdx = places[thread];
}

void begin_on(unsigned thread, unsigned stack) {
    states[thread] = READY;
    stack_of[thread] = stack;
    become(thread);
}

[[gnu::noinline]] void begin(unsigned thread) {
    const unsigned stack = free_stacks[--free_count];
    // Frames of different threads in different sets of the cache.
    begin_at(contexts[thread], stacks + stack * STACK, STACK - stack % 61 * 64, work);
    begin_on(thread, stack);
}

// Goes on with another thread; that which waits is left where `from` says.
[[gnu::always_inline]] inline void go_to(unsigned thread, Context* from) {
    if (states[thread] == FRESH) {
        begin(thread);
    } else {
        become(thread);
    }
    stand_in_switch(from, &contexts[thread]);
}

inline bool may_run(unsigned thread) { return states[thread] <= READY; }

// The next that may run of those from `first` to `end`, after `from`; `end` if nobody may.
unsigned next_of(unsigned from, unsigned first, unsigned end) {
    for (unsigned i = from + 1; i < end; i++) {
        if (may_run(i)) return i;
    }
    for (unsigned i = first; i < from; i++) {
        if (may_run(i)) return i;
    }
    return end;
}

// Runs one thread after another, and gives the stack away where others wait already.
void work() {
    for (;;) {
        kernel->call(arguments);
        states[current] = ENDED;
        ended++;
        const unsigned self = current;
        if (at_warp[self / LANES].count > 0) refuse("ended while others of its warp wait", at_warp[self / LANES].site);
        if (at_block.count > 0) refuse("ended while others wait", at_block.site);
        const unsigned stack = stack_of[self];
        Context nowhere;
        const unsigned next = ended == threads ? threads : next_of(self, 0, threads);
        if (next < threads && states[next] == FRESH) {
            begin_on(next, stack);
            continue;
        }
        free_stacks[free_count++] = stack;
        if (ended == threads) stand_in_switch(&nowhere, &caller);
        if (next == threads) refuse("ended while every other waits", {"the kernel", 0});
        go_to(next, &nowhere);
    }
}

[[gnu::always_inline]] inline void arrive(Wait& wait, Site site) {
    if (wait.count++ == 0) {
        wait.site = site;
    } else if (wait.site.line != site.line || (wait.site.file != site.file && std::strcmp(wait.site.file, site.file) != 0)) {
        refuse("waits where others of its do not", site);
    }
}

// The next to run, of whom those from `first` to `end` come first.
[[gnu::noinline]] unsigned find_next(unsigned first, unsigned end, Site site) {
    unsigned next = next_of(current, first, end);
    if (next == end && (next = next_of(current, 0, threads)) == threads) refuse("waits, and so does every other", site);
    return next;
}

[[gnu::always_inline]] inline void pause(State state, unsigned first, unsigned end, Site site) {
    const unsigned self = current;
    states[self] = state;
    // Mostly it is the neighbour's turn.
    const unsigned next = self + 1 < end && may_run(self + 1) ? self + 1 : find_next(first, end, site);
    go_to(next, &contexts[self]);
}

[[gnu::always_inline]] inline void wait_for_warp(unsigned mask, Site site) {
    if (mask != 0xffffffffu) refuse("waits for a part of its warp", site);
    const unsigned first = current / LANES * LANES;
    Wait& wait = at_warp[current / LANES];
    arrive(wait, site);
    if (wait.count < LANES) return pause(AT_WARP, first, first + LANES, site);
    wait.count = 0;
    std::memset(states + first, READY, LANES);
}

void run_block() {
    std::memset(states, FRESH, threads);
    std::memset(shared_of, 0, threads * sizeof(shared_of[0]));
    // What the block before wrote is as good as NaN.
    std::memset(memory, 0xff, shared_used);
    shared_used = 0, ended = 0;
    at_block.count = 0;
    go_to(0, &caller);
}

}  // namespace

void* shared_bytes(std::size_t bytes, const char* name) {
    std::size_t& own = shared_of[current];
    const std::size_t at = own;
    own += (bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    if (own > SHARED_MAX) refuse("has more shared memory than there is", {name, 0});
    if (own > shared_used) shared_used = own;
    return memory + at;
}

void sync_threads(Site site) {
    if (ended > 0) refuse("waits for threads that have ended", site);
    arrive(at_block, site);
    if (at_block.count < threads) return pause(AT_BLOCK, 0, threads, site);
    at_block.count = 0;
    std::memset(states, READY, threads);
}

void sync_warp(unsigned mask, Site site) { wait_for_warp(mask, site); }

std::uint64_t exchange(unsigned mask, std::uint64_t bits, unsigned source, Site site) {
    // A thread may be one exchange ahead of the slowest of its warp, never two.
    const unsigned first = current / LANES * LANES;
    std::uint64_t* const all = sent[turns[current] ^= 1];
    all[current] = bits;
    wait_for_warp(mask, site);
    return all[first + source];
}

// At once, which is early enough.
void copy_async(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

void wait_for_copies(Site) {}

}  // namespace shim

namespace stand_in {

void run_grid(const shim::Kernel& kernel, const shim::Argument* arguments, uint3 grid, uint3 block) {
    using namespace shim;
    if (!stacks) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* const at = mmap(nullptr, THREADS_MAX * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (at == MAP_FAILED) report("no stacks: %m");
        stacks = static_cast<char*>(at);
        for (unsigned i = 0; i < THREADS_MAX; i++) free_stacks[i] = THREADS_MAX - 1 - i;
        free_count = THREADS_MAX;
    }
    threads = block.x * block.y * block.z;
    if (threads % LANES != 0) report("a block of %u threads, which are no whole warps", threads);
    shim::kernel = &kernel, shim::arguments = arguments;
    gridDim = grid, blockDim = block;
    for (unsigned i = 0; i < threads; i++) places[i] = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                run_block();
            }
        }
    }
}

}  // namespace stand_in
