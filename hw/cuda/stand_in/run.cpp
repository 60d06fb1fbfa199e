// Runs an operation on the CPU, having looked at what it touches.
#include <cstring>
#include <map>

#include "driver.hpp"

namespace stand_in {
namespace {

// The bytes of a device at an address, all of which have to be of one allocation of it.
char* bytes_of(const Device* device, Address at, std::size_t bytes) {
    const Allocation* const of = find(at);
    const auto where = static_cast<unsigned long long>(at);
    if (!of) report("no memory at %#llx, or not any more", where);
    if (of->device != device) report("%#llx is memory of another device", where);
    if (bytes > of->at + of->bytes - at) {
        report("%zu bytes at byte %llu of an allocation of %zu", bytes, static_cast<unsigned long long>(at - of->at), of->bytes);
    }
    return reach(at);
}

void move(const Operation& operation) {
    const Work& work = *operation.work;
    const Device* const device = operation.device;
    const char* const from = work.from_host ? reinterpret_cast<const char*>(work.from) : bytes_of(device, work.from, work.bytes);
    char* const to = work.to_host ? reinterpret_cast<char*>(work.to) : bytes_of(device, work.to, work.bytes);
    std::memmove(to, from, work.bytes);
    if (operation.fault.how == Fault::FLIP && work.bytes > 0) {
        to[draw(work.bytes)] ^= static_cast<char>(1 << draw(8));
    }
}

// What a kernel may write as it was before, where a bit of each list that it wrote is to be another. Lists end where the next begins,
// or the allocation does.
struct Written {
    std::map<Address, std::string> before;

    explicit Written(const Operation& operation) {
        const Work& work = *operation.work;
        for (std::size_t i = 0; operation.fault.how == Fault::FLIP && i < work.arguments.size(); i++) {
            const shim::Parameter& parameter = work.kernel->parameters[i];
            if (!parameter.is_pointer || parameter.is_const || !is_device_address(work.arguments[i].bits)) continue;
            const Address at = work.arguments[i].bits;
            const Allocation& of = *find(at);
            before[at] = std::string(reach(at), of.at + of.bytes - at);
        }
        for (auto list = before.begin(); list != before.end(); ++list) {
            const auto next = std::next(list);
            if (next != before.end() && next->first - list->first < list->second.size()) list->second.resize(next->first - list->first);
        }
    }
    void flip() const {
        for (const auto& [at, bytes] : before) {
            std::vector<char*> differing;
            for (std::size_t i = 0; i < bytes.size(); i++) {
                if (reach(at)[i] != bytes[i]) differing.push_back(reach(at) + i);
            }
            if (!differing.empty()) *differing[draw(differing.size())] ^= static_cast<char>(1 << draw(8));
        }
    }
};

void launch(const Operation& operation) {
    const Work& work = *operation.work;
    shim::Argument arguments[64];
    for (std::size_t i = 0; i < work.arguments.size(); i++) {
        arguments[i] = work.arguments[i];
        if (!work.kernel->parameters[i].is_pointer || !arguments[i].bits) continue;
        // Where buffers are empty, the end of another one may be given.
        if (is_device_address(arguments[i].bits)) {
            arguments[i].bits = reinterpret_cast<std::uint64_t>(bytes_of(operation.device, arguments[i].bits, 0));
        } else if (!is_pinned(reinterpret_cast<const void*>(arguments[i].bits))) {
            report("argument %zu is %#llx, which no device reaches", i, static_cast<unsigned long long>(arguments[i].bits));
        }
    }
    const Written written(operation);
    run_grid(*work.kernel, arguments, work.grid, work.block);
    if (operation.fault.how == Fault::FLIP) written.flip();
    for (std::size_t i = 0; i < work.arguments.size(); i++) {
        const bool writes = work.kernel->parameters[i].is_pointer && !work.kernel->parameters[i].is_const;
        if (writes && is_device_address(work.arguments[i].bits)) check_guards(*find(work.arguments[i].bits), false, "by this kernel");
    }
}

}  // namespace

bool run(Operation& operation) {
    running_now = operation.name();
    const Work& work = *operation.work;
    // What faults does nothing, so that nobody takes its results for good.
    const bool faults = operation.fault.how == Fault::CODE;
    bool done = true;
    if (!faults) {
        switch (work.kind) {
            case Work::MARK: break;
            case Work::RUN: launch(operation); break;
            case Work::MOVE: move(operation); break;
            case Work::MEET: done = work.exchange->advance(); break;
        }
    }
    running_now.clear();
    return done;
}

}  // namespace stand_in
