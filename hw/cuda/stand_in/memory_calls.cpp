// Calls that make, free and copy memory.
#include <cstring>

#include "driver.hpp"

using namespace stand_in;

namespace {

enum End { HOST, ON_DEVICE };

std::shared_ptr<Work> copy(Address to, End to_end, Address from, End from_end, std::size_t bytes) {
    const auto work = std::make_shared<Work>();
    work->kind = Work::MOVE;
    work->to = to, work->from = from, work->bytes = bytes;
    work->to_host = to_end == HOST, work->from_host = from_end == HOST;
    return work;
}

// Where it is plain already that this is no memory.
bool is_refused(const Work& work) {
    const auto refused = [](Address at, bool of_host, std::size_t bytes) {
        if (of_host) return at == 0 || is_device_address(at);
        const Allocation* const of = find(at);
        return !of || bytes > of->at + of->bytes - at;
    };
    return refused(work.to, work.to_host, work.bytes) || refused(work.from, work.from_host, work.bytes);
}

int queue(Stream* stream, std::shared_ptr<Work> work, Op* made = nullptr) {
    if (!stream) return INVALID_HANDLE;
    if (work->bytes == 0) return SUCCESS;
    if (is_refused(*work)) return INVALID_VALUE;
    return enqueue(*stream, std::move(work), {}, made);
}

// As the legacy default stream does it, and waits.
int queue_and_wait(Entry& entry, std::shared_ptr<Work> work) {
    if (streams_in_capture() > 0) return CAPTURE_IMPLICIT;
    Op op;
    const int code = queue(stream_of(nullptr), std::move(work), &op);
    return code ? code : wait_for(op, entry.lock);
}

Address of(const void* host) { return reinterpret_cast<Address>(host); }

}  // namespace

CALL cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
    ENTER(CONTEXT);
    *total = memory_of_device();
    return *free = *total - current->used, SUCCESS;
}

CALL cuMemAlloc_v2(Address* at, std::size_t bytes) {
    ENTER(CONTEXT);
    return allocate(*current, bytes, *at);
}

CALL cuMemFree_v2(Address at) {
    ENTER(CONTEXT);
    if (at == 0) return SUCCESS;
    const Allocation* const of = find(at);
    if (of && of->at == at) refuse_if_used(at, at + of->bytes, "cuMemFree");
    release(at);
    return SUCCESS;
}

CALL cuMemHostAlloc(void** at, std::size_t bytes, unsigned) {
    ENTER(CONTEXT);
    return pin(bytes, *at);
}

CALL cuMemFreeHost(void* at) {
    ENTER(CONTEXT);
    const std::size_t bytes = pinned_bytes_at(at);
    refuse_if_host_used(static_cast<char*>(at), static_cast<char*>(at) + bytes, "cuMemFreeHost");
    return unpin(at) ? SUCCESS : INVALID_VALUE;
}

CALL cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, void* stream) {
    ENTER(CONTEXT);
    return queue(stream_of(stream), copy(to, ON_DEVICE, of(from), HOST, bytes));
}

CALL cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, void* stream) {
    ENTER(CONTEXT);
    return queue(stream_of(stream), copy(of(to), HOST, from, ON_DEVICE, bytes));
}

CALL cuMemcpyDtoDAsync_v2(Address to, Address from, std::size_t bytes, void* stream) {
    ENTER(CONTEXT);
    return queue(stream_of(stream), copy(to, ON_DEVICE, from, ON_DEVICE, bytes));
}

// For the stand-in of cuFile (cufile/cufile.cpp), and no call of a driver: bytes come to a device past streams, at once.
CALL stand_in_put(Address to, const void* from, std::size_t bytes) {
    ENTER(CONTEXT);
    const Allocation* const of = find(to);
    if (!of || of->device != current || bytes > of->at + of->bytes - to) return INVALID_VALUE;
    refuse_if_copied(to, to + bytes, "cuFileRead");
    // Or it is only asked whether they could.
    if (from && bytes > 0) std::memcpy(reach(to), from, bytes);
    return SUCCESS;
}

CALL cuMemcpyHtoD_v2(Address to, const void* from, std::size_t bytes) {
    ENTER(CONTEXT);
    return queue_and_wait(entry, copy(to, ON_DEVICE, of(from), HOST, bytes));
}

CALL cuMemcpyDtoH_v2(void* to, Address from, std::size_t bytes) {
    ENTER(CONTEXT);
    return queue_and_wait(entry, copy(of(to), HOST, from, ON_DEVICE, bytes));
}
