// A stand-in for the CUDA driver, for tests on machines that have none: the calls that the host side makes, the kernels on the CPU.
//
// It is strict where a driver may be lenient. What is queued runs late and in any order that streams and events allow, drawn by
// a seed; device memory cannot be touched by the host, is fresh or freed or beside every allocation in a way that is noticed, and
// an async copy touches the host's memory when it runs, whatever that memory is. What only a wrong host does is reported on
// standard error and aborts the process.
//
// What it is asked for, by variables of the environment:
//   LITE_LLM_STAND_IN         a device of that compute capability, ten times it; none (0, or nothing); a driver that fails (fails)
//   LITE_LLM_STAND_IN_SEED    the order in which what is queued runs (0)
//   LITE_LLM_STAND_IN_MEMORY  bytes of each device (24 GiB)
//   LITE_LLM_STAND_IN_DEVICES how many devices there are (2)
//   LITE_LLM_STAND_IN_PINNED  bytes of host memory that may be pinned (no limit)
//   LITE_LLM_STAND_IN_BUSY    the number of a device that somebody else has to himself
//   LITE_LLM_STAND_IN_TALLY   a file, to which a process that ends well writes how many of each `what` there were, and how often each
//                             kernel ran: a line for each. %p in its name is the number of the process
//   LITE_LLM_STAND_IN_NCCL    the folder in which processes find each other (TMPDIR, or /tmp): see nccl.cpp
//   LITE_LLM_STAND_IN_NCCL_VERSION  the version of NCCL, as it counts them (22703)
//   LITE_LLM_STAND_IN_FAULT   faults with commas between them, each `what:number:how`
// The number-th `what` of the process, counted from 1 as the host asks for it, or each where the number is *: init, alloc (of a device),
// pin, module, graph (one that is made), replay (its launch), launch (of a kernel; those of a graph count at each replay), copy (from
// the host to a device), fetch (back), pages and pages_back (those of both that are whole pinned pages of the host, as experts are),
// unique, join and exchange (of NCCL), and the name of a kernel for its launches. `how` is
//   a code    the call fails with it. One after which a context is lost (214, 700, 719, 999 and others) comes when the operation
//             runs, so that a later call has it first; and from then on nothing runs, and every call has it
//   hang      the operation never ends, and nothing that waits for it begins
//   flip      one bit of what is copied is another, or of each list that a kernel wrote
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../shim/shim.hpp"

#define CALL extern "C" __attribute__((visibility("default"))) int

namespace stand_in {

enum Code : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALISED = 3,
    DEVICE_UNAVAILABLE = 46,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    NOT_SUPPORTED = 801,
    MISMATCH = 803,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    UNKNOWN = 999,
};

// As an address of device memory is handed to the host.
using Address = std::uint64_t;

constexpr int DEVICES_MAX = 8;

// A device, and its primary context, which is all the contexts that there are.
struct Device {
    int number;
    unsigned retained;
    std::size_t used;
};
extern Device devices[DEVICES_MAX];

// ---- What was wished (wishes.cpp).

struct Fault {
    enum How { NOTHING, CODE, HANG, FLIP } how = NOTHING;
    int code = 0;
};
enum What { INIT, ALLOC, PIN, MODULE, GRAPH, UNIQUE, REPLAY, LAUNCH, JOIN, EXCHANGE, PAGES, PAGES_BACK, COPY, FETCH, WHATS };

const char* kind_of_driver();
int device_count();
// Where processes find each other, and the version of NCCL.
std::string folder_of_nccl();
int version_of_nccl();
std::size_t memory_of_device();
std::size_t pinned_limit();
bool is_busy(int device);
// Counts one more of them, and says what is to become of it.
Fault count(What what);
// The same of a copy from the host or to it, by whether it is of whole pages too.
Fault count_copy(bool to_host, Address host, std::size_t bytes);
// The same of a launch, by its kernel too.
Fault count_launch(const char* kernel);
// Whether a context is lost with this code.
bool is_sticky(int code);
// The next number below `end`, of the sequence that the seed begins.
std::uint64_t draw(std::uint64_t end);
// The host, or a kernel, did what it must not: says so, and ends the process.
[[noreturn]] __attribute__((format(printf, 1, 2))) void report(const char* format, ...);

// ---- Memory (memory.cpp).

struct Allocation {
    Address at;
    std::size_t bytes;
    Device* device;
    // Pages that are its own, with what is beside it.
    Address pages;
    std::size_t pages_bytes;
};

int allocate(Device& device, std::size_t bytes, Address& at);
// The live allocation that an address belongs to, or that ends there; null if there is none.
const Allocation* find(Address at);
void release(Address at);
bool is_device_address(Address at);
// Where kernels and copies find a device's byte: the host has no use for addresses of devices.
char* reach(Address at);
// Looks for bytes written beside an allocation; `all` takes longer.
void check_guards(const Allocation& of, bool all, const char* who);
void check_all_guards(const char* who);

int pin(std::size_t bytes, void*& at);
bool unpin(void* at);
bool is_pinned(const void* at);
// How much was pinned that begins there, or nothing.
std::size_t pinned_bytes_at(const void* at);
// For what a fault of the machine is reported with.
void watch_faults();
extern std::string running_now;

// ---- What is queued (queue.cpp).

// What goes to other processes, and comes from them.
struct Exchange {
    virtual ~Exchange() = default;
    // Moves what can be moved; whether all is done, or nobody waits for it any more.
    virtual bool advance() = 0;
    virtual bool uses(Address begin, Address end) const = 0;
};

struct Work {
    enum Kind { MARK, RUN, MOVE, MEET } kind = MARK;
    std::shared_ptr<Exchange> exchange;
    const shim::Kernel* kernel = nullptr;
    uint3 grid = {}, block = {};
    std::vector<shim::Argument> arguments;
    // Of a copy: bytes, places on devices or of the host.
    Address to = 0, from = 0;
    bool to_host = false, from_host = false;
    std::size_t bytes = 0;

    bool uses(Address begin, Address end) const;
    bool uses_host(const char* begin, const char* end) const;
};

struct Stream;

struct Operation {
    std::shared_ptr<const Work> work;
    std::uint64_t number = 0;
    Device* device = nullptr;
    unsigned stream = 0;
    // What has to be done before, as far as it is not, and what waits for this.
    std::vector<std::shared_ptr<Operation>> after;
    std::vector<Operation*> before;
    unsigned open = 0;
    bool done = false;
    Fault fault;

    std::string name() const;
};
using Op = std::shared_ptr<Operation>;

struct Capture;

struct Stream {
    unsigned number = 0;
    Device* device = nullptr;
    bool waits_for_default = true;
    Op last;
    // An exchange is to come that was not issued yet: what is queued now would overtake it.
    bool is_overtaken = false;
    // Where it records a graph: what comes next comes after these nodes.
    std::shared_ptr<Capture> capture;
    std::vector<std::size_t> tails;
};

struct Event {
    Op op;
    std::shared_ptr<Capture> capture;
    std::vector<std::size_t> nodes;
};

// A node of a graph, after others of it.
struct Node {
    std::shared_ptr<const Work> work;
    std::vector<std::size_t> after;
};

struct Capture {
    Stream* origin = nullptr;
    bool invalid = false;
    int mode = 0;
    std::vector<Node> nodes;
    std::vector<Stream*> streams;
};

// The stream of a handle, also of the default one; null if there is none.
Stream* stream_of(void* handle);
Stream* new_stream(Device* device, bool waits_for_default);
// The stream is gone for the host; what is queued in it still runs.
void forget(Stream* stream);
std::size_t streams_in_capture();

// Queues work, or records it where the stream is captured. `more` has to be done before too.
int enqueue(Stream& stream, std::shared_ptr<const Work> work, const std::vector<Op>& more = {}, Op* made = nullptr);
// Queues an operation after others, in no stream's order.
Op enqueue_after(Stream& stream, std::shared_ptr<const Work> work, const std::vector<Op>& after);
// Of all that is queued in `stream` and has to be waited for, by one that comes now.
std::vector<Op> before_next(Stream& stream);

// Runs what it takes until this is done, and perhaps more. Blocks for ever if it never is.
int wait_for(const Op& op, std::unique_lock<std::mutex>& lock);
// Runs something, and says whether this is done.
bool poll(const Op& op);
// Reports what is queued and uses this memory.
void refuse_if_used(Address begin, Address end, const char* call);
// The same of copies alone.
void refuse_if_copied(Address begin, Address end, const char* call);
void refuse_if_host_used(const char* begin, const char* end, const char* call);
// The code with which the context was lost.
extern int lost;

// ---- Running it (run.cpp, fibers.cpp).

// Whether it is done: what waits for other processes may not be.
bool run(Operation& operation);
void run_grid(const shim::Kernel& kernel, const shim::Argument* arguments, uint3 grid, uint3 block);

// ---- A call of the host: one at a time.

extern thread_local Device* current;
extern bool initialised;
std::mutex& door();

enum Needs { NOTHING, DRIVER, CONTEXT };

struct Entry {
    std::unique_lock<std::mutex> lock;
    int code = SUCCESS;
    explicit Entry(Needs needs);
};

#define ENTER(needs)                   \
    ::stand_in::Entry entry(needs);    \
    if (entry.code) return entry.code

}  // namespace stand_in
