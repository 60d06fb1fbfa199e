// What is queued, and in which order it runs.
//
// An operation comes after the one before it in its stream, after those of the events that the stream waits for, and, as the
// legacy default stream is, after or before what is in that. Among those that may run the next is drawn. What is drawn beside it
// differs from seed to seed: how much runs as it is queued, and whether some streams are always late.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <thread>
#include <unordered_map>
#include <utility>

#include "driver.hpp"

namespace stand_in {

int lost = SUCCESS;

namespace {

std::unordered_map<Operation*, Op> pending;
std::vector<Operation*> ready;
std::set<Stream*> streams;
Stream defaults[DEVICES_MAX], defaults_of_threads[DEVICES_MAX];
std::uint64_t operations;
unsigned streams_made;

// What a seed decides once for all.
struct Temper {
    // Of so many in eight times something runs as something is queued.
    std::uint64_t eager = draw(4) == 0 ? 0 : draw(9);
    // The streams have ranks that they keep; else each is drawn.
    bool ranked = draw(2) == 0;
    std::uint64_t rank_salt = draw(~std::uint64_t{0});
    // Of so many in four times all is run that may be, else only what is waited for.
    std::uint64_t broad = draw(5);
};

const Temper& temper() {
    static const Temper temper;
    return temper;
}

std::uint64_t rank(unsigned stream) {
    std::uint64_t z = (temper().rank_salt ^ stream) * 0xbf58476d1ce4e5b9ull;
    return (z ^ (z >> 31)) * 0x94d049bb133111ebull;
}

void finish(Operation* operation) {
    const auto found = pending.find(operation);
    const Op kept = found->second;
    operation->done = true;
    for (Operation* next : operation->before) {
        if (--next->open == 0) ready.push_back(next);
    }
    operation->before.clear();
    operation->after.clear();
    pending.erase(found);
}

// Whether it got anywhere: what waits for another process is tried again.
bool run_ready(std::size_t index) {
    Operation* const operation = ready[index];
    ready[index] = ready.back();
    ready.pop_back();
    // What hangs is never done, and never ready again.
    if (operation->fault.how == Fault::HANG) return true;
    if (!run(*operation)) {
        ready.push_back(operation);
        return false;
    }
    if (operation->fault.how == Fault::CODE) {
        lost = operation->fault.code;
        return true;
    }
    finish(operation);
    return true;
}

// Whether something waits for another process.
bool somebody_waits() {
    return std::any_of(ready.begin(), ready.end(), [](const Operation* of) { return of->work->kind == Work::MEET; });
}

// Runs one operation, drawn.
bool run_any() {
    if (lost || ready.empty()) return false;
    std::size_t index = draw(ready.size());
    if (temper().ranked) {
        for (std::size_t i = 0; i < ready.size(); i++) {
            const auto key = [](const Operation* of) { return std::make_pair(rank(of->stream), of->number); };
            if (key(ready[i]) < key(ready[index])) index = i;
        }
    }
    return run_ready(index);
}

// From an operation to one that it waits for, as far as that is known: chains are long, and each is walked once.
using Path = std::vector<Op>;

// Runs one operation that the first of a path has to wait for, or that one.
bool run_needed(Path& path) {
    while (path.size() > 1 && path.back()->done) path.pop_back();
    while (!lost && path.back()->open > 0) {
        Op next;
        std::uint64_t seen = 0;
        for (const Op& before : path.back()->after) {
            if (!before->done && draw(++seen) == 0) next = before;
        }
        path.push_back(next);
    }
    const auto found = std::find(ready.begin(), ready.end(), path.back().get());
    if (lost || found == ready.end()) return false;
    return run_ready(static_cast<std::size_t>(found - ready.begin()));
}

bool run_for(Path& path) { return (draw(4) < temper().broad && run_any()) || run_needed(path); }

// Nothing will ever come: others may call, this thread may not go on.
[[noreturn]] void hang(std::unique_lock<std::mutex>& lock) {
    lock.unlock();
    for (;;) pause();
}

// A device gets on whether its host calls or not, which others see who exchange something with it: as long as there is an exchange, what
// it takes to come to it is run by a thread of its own.
void run_beside_calls() {
    static bool begun, over;
    if (std::exchange(begun, true)) return;
    std::atexit([] {
        const std::lock_guard<std::mutex> lock(door());
        over = true;
    });
    std::thread([] {
        for (;;) {
            usleep(200);
            const std::lock_guard<std::mutex> lock(door());
            if (over) return;
            const auto is_exchange = [](const auto& one) { return one.second->work->kind == Work::MEET; };
            const auto found = std::find_if(pending.begin(), pending.end(), is_exchange);
            if (lost || found == pending.end()) continue;
            Path path = {found->second};
            run_for(path);
        }
    }).detach();
}

Op make(Stream& stream, std::shared_ptr<const Work> work, const std::vector<Op>& after) {
    const Op op = std::make_shared<Operation>();
    op->fault = work->kind == Work::RUN                        ? count_launch(work->kernel->name)
                : work->kind == Work::MOVE && work->from_host  ? count_copy(false, work->from, work->bytes)
                : work->kind == Work::MOVE && work->to_host    ? count_copy(true, work->to, work->bytes)
                                                               : Fault{};
    if (op->fault.how == Fault::CODE && !is_sticky(op->fault.code)) return op;
    op->work = std::move(work);
    op->number = ++operations;
    op->device = stream.device;
    op->stream = stream.number;
    for (const Op& before : after) {
        if (!before || before->done) continue;
        op->after.push_back(before);
        before->before.push_back(op.get());
        op->open++;
    }
    pending[op.get()] = op;
    if (op->open == 0) ready.push_back(op.get());
    return op;
}

Stream& default_of(Device* device) {
    Stream& stream = defaults[device->number];
    stream.device = device;
    return stream;
}

}  // namespace

bool Work::uses(Address begin, Address end) const {
    if (kind == MEET) return exchange->uses(begin, end);
    const auto overlaps = [&](Address at, std::size_t count) { return at < end && begin < at + count; };
    if (kind == MOVE && !from_host && overlaps(from, bytes)) return true;
    if (kind == MOVE && !to_host && overlaps(to, bytes)) return true;
    for (std::size_t i = 0; kernel && i < arguments.size(); i++) {
        if (kernel->parameters[i].is_pointer && arguments[i].bits >= begin && arguments[i].bits < end) return true;
    }
    return false;
}

bool Work::uses_host(const char* begin, const char* end) const {
    const auto overlaps = [&](Address at) {
        return at < reinterpret_cast<Address>(end) && reinterpret_cast<Address>(begin) < at + bytes;
    };
    return kind == MOVE && ((from_host && overlaps(from)) || (to_host && overlaps(to)));
}

std::string Operation::name() const {
    std::string what = work->kind == Work::RUN    ? work->kernel->name
                       : work->kind == Work::MOVE ? "a copy"
                       : work->kind == Work::MEET ? "an exchange"
                                                  : "a mark";
    if (work->kind == Work::MOVE) {
        what += work->from_host ? " from the host" : work->to_host ? " to the host" : " on the device";
        what += " of " + std::to_string(work->bytes) + " bytes";
    }
    return what + ", operation " + std::to_string(number) + ", stream " + std::to_string(stream);
}

Stream* stream_of(void* handle) {
    const auto number = reinterpret_cast<std::uintptr_t>(handle);
    if (number <= 1) return &default_of(current);
    if (number == 2) {
        Stream& stream = defaults_of_threads[current->number];
        stream.device = current;
        return &stream;
    }
    const auto found = streams.find(static_cast<Stream*>(handle));
    return found == streams.end() ? nullptr : *found;
}

Stream* new_stream(Device* device, bool waits_for_default) {
    auto* const stream = new Stream;
    stream->number = ++streams_made;
    stream->device = device;
    stream->waits_for_default = waits_for_default;
    streams.insert(stream);
    return stream;
}

void forget(Stream* stream) {
    streams.erase(stream);
    delete stream;
}

std::size_t streams_in_capture() {
    return static_cast<std::size_t>(std::count_if(streams.begin(), streams.end(), [](const Stream* stream) { return !!stream->capture; }));
}

std::vector<Op> before_next(Stream& stream) {
    std::vector<Op> all;
    const auto add = [&](const Op& op) {
        if (op && !op->done) all.push_back(op);
    };
    add(stream.last);
    if (&stream != &default_of(stream.device)) {
        if (stream.waits_for_default) add(default_of(stream.device).last);
        return all;
    }
    for (const Stream* other : streams) {
        if (other->waits_for_default && other->device == stream.device) add(other->last);
    }
    add(defaults_of_threads[stream.device->number].last);
    return all;
}

Op enqueue_after(Stream& stream, std::shared_ptr<const Work> work, const std::vector<Op>& after) {
    return make(stream, std::move(work), after);
}

int enqueue(Stream& stream, std::shared_ptr<const Work> work, const std::vector<Op>& more, Op* made) {
    if (stream.is_overtaken) report("what is queued would overtake an exchange: ncclCommGetAsyncError has not yet said that it was issued");
    if (stream.capture && work->kind == Work::MEET) report("an exchange is recorded in a graph");
    if (work->kind == Work::MEET) run_beside_calls();
    if (stream.capture) {
        if (stream.capture->invalid) return CAPTURE_INVALIDATED;
        stream.capture->nodes.push_back({std::move(work), stream.tails});
        stream.tails = {stream.capture->nodes.size() - 1};
        return SUCCESS;
    }
    std::vector<Op> after = before_next(stream);
    after.insert(after.end(), more.begin(), more.end());
    const Op op = make(stream, std::move(work), after);
    if (!op->number) return op->fault.code;
    stream.last = op;
    if (made) *made = op;
    while (draw(8) < temper().eager && run_any()) {
    }
    return SUCCESS;
}

int wait_for(const Op& op, std::unique_lock<std::mutex>& lock) {
    Path path = {op};
    while (op && !op->done) {
        if (lost) return lost;
        if (!run_for(path)) {
            if (lost) return lost;
            if (!somebody_waits()) hang(lock);
            lock.unlock();
            usleep(50);
            lock.lock();
        }
    }
    return SUCCESS;
}

bool poll(const Op& op) {
    if (!op || op->done) return true;
    // Now and then it takes long.
    const bool patient = draw(4) == 0;
    Path path = {op};
    for (std::uint64_t turns = draw(8); !op->done && (!patient || turns > 0); turns--) {
        if (!run_for(path)) break;
    }
    return op->done;
}

void refuse_if_used(Address begin, Address end, const char* call) {
    for (const auto& [at, op] : pending) {
        if (!op->work->uses(begin, end)) continue;
        report("%s of memory that is still used by %s", call, op->name().c_str());
    }
}

void refuse_if_copied(Address begin, Address end, const char* call) {
    for (const auto& [at, op] : pending) {
        if (op->work->kind != Work::MOVE || !op->work->uses(begin, end)) continue;
        report("%s of memory that is still used by %s", call, op->name().c_str());
    }
}

void refuse_if_host_used(const char* begin, const char* end, const char* call) {
    for (const auto& [at, op] : pending) {
        if (op->work->uses_host(begin, end)) report("%s of memory that is still used by %s", call, op->name().c_str());
    }
}

}  // namespace stand_in
