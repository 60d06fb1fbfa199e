// A way for bytes from one process to another: a file that both have mapped, and that a process may leave at any time.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace stand_in {

class Ring {
   public:
    // Both ends may be the first to come.
    explicit Ring(const std::string& path);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // Puts as many bytes as there is room for, and takes as many as are there.
    std::size_t put(const char* bytes, std::size_t count);
    std::size_t take(char* bytes, std::size_t count);
    // How many bytes were ever put, and taken.
    std::uint64_t written() const;
    std::uint64_t taken() const;

   private:
    struct Shared;
    Shared* shared;
};

}  // namespace stand_in
