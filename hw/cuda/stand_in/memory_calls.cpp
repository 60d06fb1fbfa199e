// Calls that make, free, copy and fill memory.
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

std::shared_ptr<Work> filling(Address to, std::uint32_t pattern, std::uint32_t width, std::size_t count) {
    const auto work = std::make_shared<Work>();
    work->kind = Work::FILL;
    work->to = to, work->pattern = pattern, work->width = width, work->bytes = count;
    return work;
}

// Where it is plain already that this is no memory.
bool is_refused(const Work& work) {
    const auto refused = [](Address at, bool of_host, std::size_t bytes) {
        if (of_host) return at == 0 || is_device_address(at);
        const Allocation* const of = find(at);
        return !of || bytes > of->at + of->bytes - at;
    };
    const std::size_t bytes = work.bytes * work.width;
    return refused(work.to, work.to_host, bytes) || (work.kind == Work::MOVE && refused(work.from, work.from_host, bytes));
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
End end_of(Address at) { return is_device_address(at) ? ON_DEVICE : HOST; }

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

CALL cuMemAllocAsync(Address* at, std::size_t bytes, void* handle) {
    ENTER(CONTEXT);
    const Stream* const stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return NOT_SUPPORTED;
    return allocate(*stream->device, bytes, *at);
}

CALL cuMemFreeAsync(Address at, void* handle) {
    ENTER(CONTEXT);
    Stream* const stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return NOT_SUPPORTED;
    const Allocation* const of = find(at);
    if (!of || of->at != at) return INVALID_VALUE;
    const auto work = std::make_shared<Work>();
    work->kind = Work::FREE;
    work->to = at;
    return enqueue(*stream, work);
}

CALL cuMemHostAlloc(void** at, std::size_t bytes, unsigned) {
    ENTER(CONTEXT);
    return pin(bytes, *at);
}

CALL cuMemAllocHost_v2(void** at, std::size_t bytes) { return cuMemHostAlloc(at, bytes, 0); }

CALL cuMemFreeHost(void* at) {
    ENTER(CONTEXT);
    const std::size_t bytes = pinned_bytes_at(at);
    refuse_if_host_used(static_cast<char*>(at), static_cast<char*>(at) + bytes, "cuMemFreeHost");
    return unpin(at) ? SUCCESS : INVALID_VALUE;
}

CALL cuMemHostRegister_v2(void* at, std::size_t bytes, unsigned) {
    ENTER(CONTEXT);
    return pin_of_host(at, bytes);
}

CALL cuMemHostUnregister(void* at) {
    ENTER(CONTEXT);
    const std::size_t bytes = pinned_bytes_at(at);
    refuse_if_host_used(static_cast<char*>(at), static_cast<char*>(at) + bytes, "cuMemHostUnregister");
    return unpin_of_host(at) ? SUCCESS : NOT_REGISTERED;
}

CALL cuMemHostGetDevicePointer_v2(Address* device, void* at, unsigned) {
    ENTER(CONTEXT);
    if (!is_pinned(at)) return INVALID_VALUE;
    return *device = of(at), SUCCESS;
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

CALL cuMemcpyAsync(Address to, Address from, std::size_t bytes, void* stream) {
    ENTER(CONTEXT);
    return queue(stream_of(stream), copy(to, end_of(to), from, end_of(from), bytes));
}

CALL cuMemcpyHtoD_v2(Address to, const void* from, std::size_t bytes) {
    ENTER(CONTEXT);
    return queue_and_wait(entry, copy(to, ON_DEVICE, of(from), HOST, bytes));
}

CALL cuMemcpyDtoH_v2(void* to, Address from, std::size_t bytes) {
    ENTER(CONTEXT);
    return queue_and_wait(entry, copy(of(to), HOST, from, ON_DEVICE, bytes));
}

CALL cuMemcpy(Address to, Address from, std::size_t bytes) {
    ENTER(CONTEXT);
    return queue_and_wait(entry, copy(to, end_of(to), from, end_of(from), bytes));
}

// Nobody waits where only a device is concerned.
CALL cuMemcpyDtoD_v2(Address to, Address from, std::size_t bytes) {
    ENTER(CONTEXT);
    if (streams_in_capture() > 0) return CAPTURE_IMPLICIT;
    return queue(stream_of(nullptr), copy(to, ON_DEVICE, from, ON_DEVICE, bytes));
}

CALL cuMemsetD8_v2(Address to, unsigned char pattern, std::size_t count) {
    ENTER(CONTEXT);
    if (streams_in_capture() > 0) return CAPTURE_IMPLICIT;
    return queue(stream_of(nullptr), filling(to, pattern, 1, count));
}

CALL cuMemsetD32_v2(Address to, unsigned pattern, std::size_t count) {
    ENTER(CONTEXT);
    if (streams_in_capture() > 0) return CAPTURE_IMPLICIT;
    return queue(stream_of(nullptr), filling(to, pattern, 4, count));
}

CALL cuMemsetD8Async(Address to, unsigned char pattern, std::size_t count, void* stream) {
    ENTER(CONTEXT);
    return queue(stream_of(stream), filling(to, pattern, 1, count));
}

CALL cuMemsetD32Async(Address to, unsigned pattern, std::size_t count, void* stream) {
    ENTER(CONTEXT);
    if (to % 4 != 0) return INVALID_VALUE;
    return queue(stream_of(stream), filling(to, pattern, 4, count));
}

CALL cuPointerGetAttribute(void* data, int attribute, Address at) {
    ENTER(CONTEXT);
    const Allocation* const device = find(at);
    if (!device && !is_pinned(reinterpret_cast<void*>(at))) return INVALID_VALUE;
    // The context, the kind of memory, the number of the device.
    switch (attribute) {
        case 1: *static_cast<void**>(data) = device ? device->device : current; return SUCCESS;
        case 2: *static_cast<unsigned*>(data) = device ? 2 : 1; return SUCCESS;
        case 3: *static_cast<Address*>(data) = at; return SUCCESS;
        case 9: *static_cast<int*>(data) = device ? device->device->number : current->number; return SUCCESS;
        default: return NOT_SUPPORTED;
    }
}
