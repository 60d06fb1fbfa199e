// Calls that record graphs and launch them.
//
// A stream that is captured records what it is given, and so does every stream that waits for an event of such a one. A launch
// queues the nodes anew, each after those it was recorded after; what comes next in the stream comes after all of them.
#include <algorithm>
#include <set>

#include "driver.hpp"

using namespace stand_in;

namespace {

struct Graph {
    std::vector<Node> nodes;
};

struct Executable {
    std::vector<Node> nodes;
    // A graph does not run beside itself.
    Op last;
};

std::set<Graph*> graphs;
std::set<Executable*> executables;

// Whether every node is one of these or before them.
bool all_joined(const std::vector<Node>& nodes, const std::vector<std::size_t>& tails) {
    std::vector<bool> seen(nodes.size(), false);
    for (const std::size_t tail : tails) seen[tail] = true;
    for (std::size_t i = nodes.size(); i-- > 0;) {
        if (!seen[i]) return false;
        for (const std::size_t before : nodes[i].after) seen[before] = true;
    }
    return true;
}

std::shared_ptr<const Work> mark() {
    static const auto work = std::make_shared<const Work>();
    return work;
}

}  // namespace

CALL cuStreamBeginCapture_v2(void* handle, int mode) {
    ENTER(CONTEXT);
    Stream* const stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (reinterpret_cast<std::uintptr_t>(handle) <= 1) return CAPTURE_UNSUPPORTED;
    if (mode < 0 || mode > 2) return INVALID_VALUE;
    if (stream->capture) return 401;
    stream->capture = std::make_shared<Capture>();
    stream->capture->origin = stream, stream->capture->mode = mode;
    stream->capture->streams = {stream};
    stream->tails.clear();
    return SUCCESS;
}

CALL cuStreamEndCapture(void* handle, void** graph) {
    ENTER(CONTEXT);
    *graph = nullptr;
    Stream* const stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    const std::shared_ptr<Capture> capture = stream->capture;
    if (!capture) return 401;
    if (capture->origin != stream) {
        capture->invalid = true;
        return CAPTURE_UNMATCHED;
    }
    const bool joined = all_joined(capture->nodes, stream->tails);
    for (Stream* const other : capture->streams) other->capture = nullptr, other->tails.clear();
    // Events of it are of a capture that is over.
    const bool invalid = capture->invalid;
    capture->invalid = true;
    if (invalid) return CAPTURE_INVALIDATED;
    if (!joined) return CAPTURE_UNJOINED;
    auto* const made = new Graph{capture->nodes};
    graphs.insert(made);
    return *graph = made, SUCCESS;
}

CALL cuGraphInstantiateWithFlags(void** executable, void* handle, unsigned long long) {
    ENTER(CONTEXT);
    auto* const graph = static_cast<Graph*>(handle);
    if (graphs.count(graph) == 0) return INVALID_HANDLE;
    if (const Fault fault = count(GRAPH); fault.how == Fault::CODE) return fault.code;
    auto* const made = new Executable{graph->nodes, nullptr};
    executables.insert(made);
    return *executable = made, SUCCESS;
}

CALL cuGraphLaunch(void* handle, void* stream_handle) {
    ENTER(CONTEXT);
    auto* const executable = static_cast<Executable*>(handle);
    Stream* const stream = stream_of(stream_handle);
    if (executables.count(executable) == 0 || !stream) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->invalid = true;
        return NOT_SUPPORTED;
    }
    if (const Fault fault = count(REPLAY); fault.how == Fault::CODE) return fault.code;
    std::vector<Op> first = before_next(*stream), all;
    if (executable->last) first.push_back(executable->last);
    for (const Node& node : executable->nodes) {
        std::vector<Op> after;
        for (const std::size_t before : node.after) after.push_back(all[before]);
        all.push_back(enqueue_after(*stream, node.work, node.after.empty() ? first : after));
        if (!all.back()->number) return all.back()->fault.code;
    }
    return enqueue(*stream, mark(), all, &executable->last);
}

CALL cuGraphExecDestroy(void* handle) {
    ENTER(CONTEXT);
    auto* const executable = static_cast<Executable*>(handle);
    if (executables.erase(executable) == 0) return INVALID_HANDLE;
    delete executable;
    return SUCCESS;
}

CALL cuGraphDestroy(void* handle) {
    ENTER(CONTEXT);
    auto* const graph = static_cast<Graph*>(handle);
    if (graphs.erase(graph) == 0) return INVALID_HANDLE;
    delete graph;
    return SUCCESS;
}
