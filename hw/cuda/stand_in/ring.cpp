// A way for bytes from one process to another.
#include "ring.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "driver.hpp"

namespace stand_in {
namespace {

// Smaller than what is moved at once, so that it goes piece by piece.
constexpr std::size_t ROOM = 64 << 10;

}  // namespace

struct Ring::Shared {
    std::atomic<std::uint64_t> written, taken;
    char bytes[ROOM];
};

Ring::Ring(const std::string& path) {
    const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) report("cannot have %s: %m", path.c_str());
    void* const at = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) report("cannot map %s: %m", path.c_str());
    close(file);
    shared = static_cast<Shared*>(at);
}

Ring::~Ring() { munmap(shared, sizeof(Shared)); }

std::uint64_t Ring::written() const { return shared->written.load(std::memory_order_acquire); }
std::uint64_t Ring::taken() const { return shared->taken.load(std::memory_order_acquire); }

std::size_t Ring::put(const char* bytes, std::size_t count) {
    const std::uint64_t begin = written();
    count = std::min<std::size_t>(count, ROOM - (begin - taken()));
    for (std::size_t done = 0; done < count;) {
        const std::size_t at = (begin + done) % ROOM, part = std::min(count - done, ROOM - at);
        std::memcpy(shared->bytes + at, bytes + done, part);
        done += part;
    }
    shared->written.store(begin + count, std::memory_order_release);
    return count;
}

std::size_t Ring::take(char* bytes, std::size_t count) {
    const std::uint64_t begin = taken();
    count = std::min<std::size_t>(count, written() - begin);
    for (std::size_t done = 0; done < count;) {
        const std::size_t at = (begin + done) % ROOM, part = std::min(count - done, ROOM - at);
        std::memcpy(bytes + done, shared->bytes + at, part);
        done += part;
    }
    shared->taken.store(begin + count, std::memory_order_release);
    return count;
}

}  // namespace stand_in
