// Calls that are about streams, events and graphs.
#include <algorithm>
#include <set>

#include "driver.hpp"

using namespace stand_in;

namespace {

std::set<Event*> events;

Event* event_of(void* handle) {
    const auto found = events.find(static_cast<Event*>(handle));
    return found == events.end() ? nullptr : *found;
}

std::shared_ptr<const Work> mark() {
    static const auto work = std::make_shared<const Work>();
    return work;
}

// What may not be asked of a stream while it is captured, and ends the capture.
int refuse_in_capture(Stream& stream) {
    if (!stream.capture) return SUCCESS;
    stream.capture->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

}  // namespace

CALL cuStreamCreate(void** stream, unsigned flags) {
    ENTER(CONTEXT);
    if (flags > 1) return INVALID_VALUE;
    return *stream = new_stream(current, flags == 0), SUCCESS;
}

CALL cuStreamDestroy_v2(void* handle) {
    ENTER(CONTEXT);
    Stream* const stream = stream_of(handle);
    if (!stream || reinterpret_cast<std::uintptr_t>(handle) <= 2) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->invalid = true;
        auto& all = stream->capture->streams;
        all.erase(std::remove(all.begin(), all.end(), stream), all.end());
    }
    return forget(stream), SUCCESS;
}

CALL cuStreamSynchronize(void* handle) {
    ENTER(CONTEXT);
    Stream* const stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (const int code = refuse_in_capture(*stream)) return code;
    // Of the default stream also what others have to do before it goes on.
    for (const Op& op : before_next(*stream)) {
        if (op != stream->last && reinterpret_cast<std::uintptr_t>(handle) > 1) continue;
        if (const int code = wait_for(op, entry.lock)) return code;
    }
    return lost;
}

CALL cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
    ENTER(CONTEXT);
    Stream* const stream = stream_of(handle);
    const Event* const event = event_of(event_handle);
    if (!stream || !event) return INVALID_HANDLE;
    if (event->capture) {
        if (event->capture->invalid) return CAPTURE_INVALIDATED;
        if (stream->capture && stream->capture != event->capture) return CAPTURE_MERGE;
        if (reinterpret_cast<std::uintptr_t>(handle) <= 1) return CAPTURE_IMPLICIT;
        if (!stream->capture) {
            stream->capture = event->capture;
            stream->capture->streams.push_back(stream);
            stream->tails.clear();
        }
        for (const std::size_t node : event->nodes) {
            if (std::count(stream->tails.begin(), stream->tails.end(), node) == 0) stream->tails.push_back(node);
        }
        return SUCCESS;
    }
    if (stream->capture) {
        // A graph cannot wait for what is not of it.
        stream->capture->invalid = true;
        return CAPTURE_ISOLATION;
    }
    if (!event->op || event->op->done) return SUCCESS;
    return enqueue(*stream, mark(), {event->op});
}

CALL cuEventCreate(void** event, unsigned) {
    ENTER(CONTEXT);
    auto* const made = new Event;
    events.insert(made);
    return *event = made, SUCCESS;
}

CALL cuEventDestroy_v2(void* handle) {
    ENTER(CONTEXT);
    Event* const event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    events.erase(event);
    delete event;
    return SUCCESS;
}

CALL cuEventRecord(void* handle, void* stream_handle) {
    ENTER(CONTEXT);
    Event* const event = event_of(handle);
    Stream* const stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    if (stream->capture) {
        event->capture = stream->capture, event->nodes = stream->tails, event->op = nullptr;
        return stream->capture->invalid ? CAPTURE_INVALIDATED : SUCCESS;
    }
    event->capture = nullptr, event->nodes.clear();
    return enqueue(*stream, mark(), {}, &event->op);
}

CALL cuEventQuery(void* handle) {
    ENTER(CONTEXT);
    const Event* const event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    if (event->capture) {
        event->capture->invalid = true;
        return CAPTURED_EVENT;
    }
    const bool done = poll(event->op);
    return lost ? lost : done ? SUCCESS : NOT_READY;
}
