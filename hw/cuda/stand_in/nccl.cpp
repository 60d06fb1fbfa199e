// A stand-in for NCCL, with the calls that the host side makes. It is this very library under another name, so that it has the queues
// and the memory of the driver's stand-in; who does not give it that name has no NCCL.
//
// Processes find each other in a folder that the identifier names, and move bytes through files there (ring.hpp). An exchange is queued
// in a stream, runs late, and waits for the others without holding up what is in no stream after it. It is as strict as it can be:
//   - nothing waits within a call: whether a communicator is made, and whether a group is issued, has to be asked for, and what is
//     queued before that is reported
//   - a send ends only when all of it was taken, so that two ranks that each send first, and not in a group, wait for ever
//   - what is received is anything until it is there
//   - whoever is gone is waited for until the communicator is aborted
//   - counts that differ, memory that is not the device's, and a communicator that was aborted are reported
// Faults: unique and join, which fail with a code of NCCL or never end (join), and exchange: a code is what ncclCommGetAsyncError says
// when its turn has come, and neither that nor one that hangs ever ends; flip changes a bit of what was received.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "driver.hpp"
#include "ring.hpp"

using namespace stand_in;

namespace {

enum Result : int {
    UNHANDLED_CUDA_ERROR = 1,
    INVALID_ARGUMENT = 4,
    INVALID_USAGE = 5,
    IN_PROGRESS = 7,
};

struct UniqueId {
    char internal[128];
};

// As far as it is looked at.
struct Config {
    std::size_t size;
    unsigned magic, version;
    int blocking;
};

// The sizes of its types, by number.
constexpr std::size_t SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

// What goes before the bytes of a part.
struct Header {
    std::uint64_t magic, bytes;
};
constexpr std::uint64_t MAGIC = 0x6e63636c2d706172;

struct Part {
    bool is_sent;
    int rank;
    Address at;
    std::size_t bytes;
    // Of header and bytes, what was moved; where it ends among all that was ever sent to that rank.
    std::size_t moved = 0;
    std::uint64_t end = 0;
    bool done = false;
};

struct Communicator {
    int rank, ranks;
    std::string folder;
    Device* device;
    Fault fault;
    int state = IN_PROGRESS;
    bool joined = false, aborted = false;
    // So many times it is asked for before something has come to its end.
    std::uint64_t asked = draw(5);
    std::map<int, std::unique_ptr<Ring>> to, from;
    // A group that was not issued yet.
    std::shared_ptr<Work> unissued;
    Stream* stream = nullptr;

    std::string file(const std::string& name) const { return folder + "/" + name; }
    void ask();
    void look_for_others();
    void issue();
};

// By handles that are never used twice.
std::map<std::uintptr_t, std::shared_ptr<Communicator>> communicators;
std::uintptr_t handles_made;

std::shared_ptr<Communicator> communicator_of(void* handle, const char* call) {
    const auto found = communicators.find(reinterpret_cast<std::uintptr_t>(handle));
    if (found == communicators.end()) report("%s of a communicator that was aborted, or never made", call);
    return found->second;
}

struct Group : Exchange {
    std::shared_ptr<Communicator> of;
    std::vector<Part> parts;
    Fault fault;
    bool begun = false;

    bool uses(Address begin, Address end) const override {
        return std::any_of(parts.begin(), parts.end(), [&](const Part& part) { return part.at < end && begin < part.at + part.bytes; });
    }

    bool advance() override {
        if (of->aborted) return true;
        if (!begun) {
            begun = true;
            for (const Part& part : parts) {
                if (!part.is_sent) std::memset(reach(part.at), 0xa5, part.bytes);
            }
        }
        if (fault.how == Fault::CODE) of->state = fault.code;
        if (fault.how == Fault::CODE || fault.how == Fault::HANG) return false;
        bool all = true;
        for (std::size_t i = 0; i < parts.size(); i++) {
            Part& part = parts[i];
            // What goes the same way goes in its order.
            const auto is_before = [&](const Part& other) { return !other.done && other.is_sent == part.is_sent && other.rank == part.rank; };
            if (!part.done && std::none_of(parts.begin(), parts.begin() + static_cast<std::ptrdiff_t>(i), is_before)) {
                part.done = part.is_sent ? send(part) : receive(part);
            }
            all &= part.done;
        }
        if (all && fault.how == Fault::FLIP) flip();
        return all;
    }

    bool send(Part& part) const {
        Ring& ring = *of->to.at(part.rank);
        const Header header = {MAGIC, part.bytes};
        if (part.moved < sizeof(header)) part.moved += ring.put(reinterpret_cast<const char*>(&header) + part.moved, sizeof(header) - part.moved);
        if (part.moved < sizeof(header)) return false;
        part.moved += ring.put(reach(part.at) + (part.moved - sizeof(header)), part.bytes - (part.moved - sizeof(header)));
        if (part.moved < sizeof(header) + part.bytes) return false;
        if (part.end == 0) part.end = ring.written();
        return ring.taken() >= part.end;
    }

    bool receive(Part& part) const {
        Ring& ring = *of->from.at(part.rank);
        Header header;
        if (part.moved == 0) {
            if (ring.written() - ring.taken() < sizeof(header)) return false;
            part.moved += ring.take(reinterpret_cast<char*>(&header), sizeof(header));
            if (header.magic != MAGIC) report("rank %d receives from %d what is no part", of->rank, part.rank);
            if (header.bytes != part.bytes) {
                report("rank %d receives %zu bytes from %d, which sends %llu", of->rank, part.bytes, part.rank,
                       static_cast<unsigned long long>(header.bytes));
            }
        }
        part.moved += ring.take(reach(part.at) + (part.moved - sizeof(header)), part.bytes - (part.moved - sizeof(header)));
        return part.moved == sizeof(header) + part.bytes;
    }

    void flip() const {
        std::vector<const Part*> received;
        for (const Part& part : parts) {
            if (!part.is_sent) received.push_back(&part);
        }
        if (received.empty()) return;
        const Part& part = *received[draw(received.size())];
        reach(part.at)[draw(part.bytes)] ^= static_cast<char>(1 << draw(8));
    }
};

void write_file(const std::string& path, const std::string& text) {
    const std::string aside = path + ".new";
    std::FILE* const file = std::fopen(aside.c_str(), "w");
    if (!file || std::fputs(text.c_str(), file) < 0 || std::fclose(file) || std::rename(aside.c_str(), path.c_str())) {
        report("cannot write %s: %m", path.c_str());
    }
}

// The device of a rank, or nothing if it has not come yet.
int device_of(const std::string& path) {
    std::FILE* const file = std::fopen(path.c_str(), "r");
    int device = -1;
    if (file && std::fscanf(file, "%d", &device) != 1) device = -1;
    if (file) std::fclose(file);
    return device;
}

void Communicator::look_for_others() {
    for (int other = 0; other < ranks; other++) {
        const int found = device_of(file("rank-" + std::to_string(other)));
        if (found < 0) return;
        if (other != rank && found == device->number) state = INVALID_USAGE;
    }
    if (state != IN_PROGRESS) return;
    for (int other = 0; other < ranks; other++) {
        if (other == rank) continue;
        const auto name = [&](int one, int two) { return file(std::to_string(one) + "-to-" + std::to_string(two)); };
        to[other] = std::make_unique<Ring>(name(rank, other));
        from[other] = std::make_unique<Ring>(name(other, rank));
    }
    joined = true;
    state = SUCCESS;
}

// Somebody asks how it is.
void Communicator::ask() {
    if (joined && !unissued) return;
    if (asked > 0) {
        asked--;
    } else if (unissued) {
        issue();
    } else if (fault.how == Fault::CODE) {
        state = fault.code;
    } else if (fault.how != Fault::HANG && state == IN_PROGRESS) {
        look_for_others();
    }
}

void Communicator::issue() {
    stream->is_overtaken = false;
    if (state == IN_PROGRESS) state = SUCCESS;
    if (enqueue(*stream, std::move(unissued))) state = UNHANDLED_CUDA_ERROR;
    unissued = nullptr;
}

// What this thread has begun and not ended.
thread_local unsigned depth;
thread_local std::shared_ptr<Group> group;
thread_local Stream* stream_of_group;

int add(bool is_sent, Address at, std::size_t count, int type, int rank, void* handle, void* stream_handle, const char* call) {
    const std::shared_ptr<Communicator> of = communicator_of(handle, call);
    if (depth == 0) report("%s in no group", call);
    if (!of->joined || of->unissued) report("%s while the communicator is not ready", call);
    if (of->state) return of->state;
    Stream* const stream = stream_of(stream_handle);
    if (!stream || stream->device != of->device) report("%s in a stream of another device, or none", call);
    if (group && (group->of != of || stream_of_group != stream)) report("%s in a group of another communicator or stream", call);
    if (rank < 0 || rank >= of->ranks || rank == of->rank) report("%s with rank %d, by rank %d of %d", call, rank, of->rank, of->ranks);
    if (type < 0 || type >= static_cast<int>(sizeof(SIZES) / sizeof(*SIZES))) report("%s of type %d", call, type);
    const std::size_t size = SIZES[type], bytes = count * size;
    if (bytes == 0 || at % size) report("%s of %zu bytes at %#llx", call, bytes, static_cast<unsigned long long>(at));
    const Allocation* const memory = is_device_address(at) ? find(at) : nullptr;
    if (!memory || bytes > memory->at + memory->bytes - at || memory->device != of->device) {
        report("%s of memory that is not the device's: %zu bytes at %#llx", call, bytes, static_cast<unsigned long long>(at));
    }
    if (!group) group = std::make_shared<Group>(), group->of = of, stream_of_group = stream;
    for (const Part& other : group->parts) {
        const bool overlaps = at < other.at + other.bytes && other.at < at + bytes;
        if (overlaps && !(is_sent && other.is_sent)) report("%s of memory that another part of its group has", call);
    }
    group->parts.push_back({is_sent, rank, at, bytes});
    return SUCCESS;
}

#define NEEDS_CONTEXT                  \
    ::stand_in::Entry entry(CONTEXT);  \
    if (entry.code) return UNHANDLED_CUDA_ERROR

}  // namespace

CALL ncclGetVersion(int* version) { return *version = version_of_nccl(), SUCCESS; }

extern "C" __attribute__((visibility("default"))) const char* ncclGetErrorString(int code) {
    const char* const texts[] = {"no error",
                                 "unhandled cuda error",
                                 "unhandled system error",
                                 "internal error",
                                 "invalid argument",
                                 "invalid usage",
                                 "remote process exited or there was a network error",
                                 "NCCL operation in progress"};
    return code >= 0 && code <= IN_PROGRESS ? texts[code] : "unknown result code";
}

CALL ncclGetUniqueId(UniqueId* id) {
    NEEDS_CONTEXT;
    if (const Fault fault = count(UNIQUE); fault.how == Fault::CODE) return fault.code;
    std::string folder = folder_of_nccl() + "/nccl-XXXXXX";
    if (folder.size() >= sizeof(id->internal)) report("%s is too long for an identifier", folder.c_str());
    if (!mkdtemp(folder.data())) report("cannot make %s: %m", folder.c_str());
    std::memset(id, 0, sizeof(*id));
    std::memcpy(id->internal, folder.data(), folder.size());
    return SUCCESS;
}

CALL ncclCommInitRankConfig(void** handle, int ranks, UniqueId id, int rank, const Config* config) {
    NEEDS_CONTEXT;
    if (config->magic != 0xcafebeef || config->size < sizeof(Config)) return INVALID_ARGUMENT;
    if (config->blocking != 0) report("a communicator that waits within its calls");
    if (ranks < 1 || rank < 0 || rank >= ranks) return INVALID_ARGUMENT;
    const auto made = std::make_shared<Communicator>();
    made->rank = rank, made->ranks = ranks, made->device = current, made->folder = id.internal;
    made->fault = count(JOIN);
    handles_made += 16;
    communicators[handles_made] = made;
    *handle = reinterpret_cast<void*>(handles_made);
    // Whoever has not come is waited for.
    if (made->fault.how == Fault::NOTHING) write_file(made->file("rank-" + std::to_string(rank)), std::to_string(current->number));
    return IN_PROGRESS;
}

CALL ncclCommGetAsyncError(void* handle, int* state) {
    ENTER(NOTHING);
    const std::shared_ptr<Communicator> of = communicator_of(handle, "ncclCommGetAsyncError");
    if (lost) return *state = UNHANDLED_CUDA_ERROR, SUCCESS;
    of->ask();
    return *state = of->unissued ? IN_PROGRESS : of->state, SUCCESS;
}

CALL ncclCommAbort(void* handle) {
    ENTER(NOTHING);
    const std::shared_ptr<Communicator> of = communicator_of(handle, "ncclCommAbort");
    of->aborted = true;
    if (of->unissued) of->stream->is_overtaken = false;
    of->unissued = nullptr;
    communicators.erase(reinterpret_cast<std::uintptr_t>(handle));
    // The folder goes with the last.
    std::remove(of->file("rank-" + std::to_string(of->rank)).c_str());
    for (const auto& [other, ring] : of->from) {
        std::remove(of->file(std::to_string(other) + "-to-" + std::to_string(of->rank)).c_str());
    }
    rmdir(of->folder.c_str());
    return SUCCESS;
}

CALL ncclGroupStart() {
    ENTER(NOTHING);
    if (depth > 0) report("a group within a group");
    return depth++, SUCCESS;
}

CALL ncclGroupEnd() {
    NEEDS_CONTEXT;
    if (depth != 1) report("the end of a group that was not begun");
    depth = 0;
    const std::shared_ptr<Group> ended = std::move(group);
    group = nullptr;
    if (!ended) return SUCCESS;
    ended->fault = count(EXCHANGE);
    const std::shared_ptr<Communicator> of = ended->of;
    const auto work = std::make_shared<Work>();
    work->kind = Work::MEET, work->exchange = ended;
    of->unissued = work, of->stream = stream_of_group;
    of->asked = draw(4);
    stream_of_group->is_overtaken = true;
    if (of->asked > 0) return IN_PROGRESS;
    of->issue();
    return of->state;
}

CALL ncclSend(const void* at, std::size_t count, int type, int rank, void* handle, void* stream) {
    NEEDS_CONTEXT;
    return add(true, reinterpret_cast<Address>(at), count, type, rank, handle, stream, "ncclSend");
}

CALL ncclRecv(void* at, std::size_t count, int type, int rank, void* handle, void* stream) {
    NEEDS_CONTEXT;
    return add(false, reinterpret_cast<Address>(at), count, type, rank, handle, stream, "ncclRecv");
}
