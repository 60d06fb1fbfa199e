// Calls that load what a compiler made and launch kernels.
//
// Of an image it is only looked at whether a kernel is in it, and of machine code what a launch of it may have: what runs is the same
// sources on the CPU.
#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "driver.hpp"

using namespace stand_in;

namespace {

// Threads of a block and bytes of its shared memory, unless a kernel's own are fewer.
constexpr unsigned THREADS_MAX = 1024;
constexpr std::size_t SHARED_MAX = 48 << 10;

struct Module;

struct Function {
    const shim::Kernel* kernel;
    const Module* module;
    // As machine code says them: its bound for launches, and the shared memory that it has of itself.
    unsigned threads_max = THREADS_MAX;
    std::size_t shared_bytes = 0;
};

struct Module {
    std::string image;
    Device* device;
    bool is_ptx;
    std::map<std::string, Function> functions;
};

std::set<Module*> modules;
std::set<Function*> functions;

Elf64_Ehdr header_of(const char* image) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof(header));
    return header;
}

Elf64_Shdr section_of(const char* image, unsigned number) {
    const Elf64_Ehdr header = header_of(image);
    Elf64_Shdr section;
    std::memcpy(&section, image + header.e_shoff + std::size_t{number} * header.e_shentsize, sizeof(section));
    return section;
}

// How long machine code is, which nobody says: as far as its tables know.
std::size_t length_of(const char* image) {
    const Elf64_Ehdr header = header_of(image);
    std::size_t end = header.e_shoff + std::size_t{header.e_shentsize} * header.e_shnum;
    end = std::max<std::size_t>(end, header.e_phoff + std::size_t{header.e_phentsize} * header.e_phnum);
    for (unsigned i = 0; i < header.e_shnum; i++) {
        const Elf64_Shdr section = section_of(image, i);
        if (section.sh_type != SHT_NOBITS) end = std::max<std::size_t>(end, section.sh_offset + section.sh_size);
    }
    return end;
}

// The section of machine code with that name; one of no bytes if there is none.
Elf64_Shdr section_named(const char* image, const std::string& name) {
    const Elf64_Ehdr header = header_of(image);
    const char* const names = image + section_of(image, header.e_shstrndx).sh_offset;
    for (unsigned i = 0; i < header.e_shnum; i++) {
        const Elf64_Shdr section = section_of(image, i);
        if (names + section.sh_name == name) return section;
    }
    return {};
}

// What machine code says of a kernel: the bound that it was compiled with, among attributes of four bytes and, of one form, as many
// more as they say; and its shared memory, which has a section: of newer devices with a KiB that is the driver's.
void look_at_limits(Function& function, const char* image, const std::string& name) {
    constexpr unsigned char SIZED = 4, MAX_THREADS = 5;
    const Elf64_Shdr info = section_named(image, ".nv.info." + name);
    for (std::size_t at = 0; at + 4 <= info.sh_size;) {
        unsigned char head[4];
        std::memcpy(head, image + info.sh_offset + at, 4);
        const std::size_t bytes = head[0] == SIZED ? head[2] | head[3] << 8 : 0;
        if (head[0] == SIZED && head[1] == MAX_THREADS) {
            unsigned sides[3];
            std::memcpy(sides, image + info.sh_offset + at + 4, sizeof(sides));
            function.threads_max = sides[0] * sides[1] * sides[2];
        }
        at += 4 + bytes;
    }
    function.shared_bytes = section_named(image, ".nv.shared." + name).sh_size;
}

int load(Module& module, const char* image) {
    module.is_ptx = std::memcmp(image, ELFMAG, SELFMAG) != 0;
    if (!module.is_ptx) {
        module.image.assign(image, length_of(image));
        return SUCCESS;
    }
    module.image = image;
    return module.image.find(".version") == std::string::npos ? INVALID_IMAGE : SUCCESS;
}

bool has_kernel(const Module& module, const std::string& name) {
    // As machine code calls its sections, and as PTX begins a kernel.
    if (!module.is_ptx) return module.image.find(".text." + name + '\0') != std::string::npos;
    const std::string entry = ".entry " + name;
    for (std::size_t at = 0; (at = module.image.find(entry, at)) != std::string::npos; at++) {
        if (std::strchr("( \n\t", module.image[at + entry.size()])) return true;
    }
    return false;
}

const shim::Kernel* kernel_of(const char* name) {
    for (std::size_t i = 0; i < shim::kernels_count; i++) {
        if (std::strcmp(shim::kernels[i].name, name) == 0) return &shim::kernels[i];
    }
    return nullptr;
}

bool fits(uint3 grid, uint3 block) {
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) return false;
    if (block.x == 0 || block.x > 1024 || block.y == 0 || block.y > 1024 || block.z == 0 || block.z > 64) return false;
    return block.x * block.y * block.z <= THREADS_MAX;
}

}  // namespace

CALL cuModuleLoadData(void** module, const void* image) {
    ENTER(CONTEXT);
    const Fault fault = count(MODULE);
    if (fault.how == Fault::CODE) return fault.code;
    auto made = std::make_unique<Module>();
    made->device = current;
    if (const int code = load(*made, static_cast<const char*>(image))) return code;
    modules.insert(made.get());
    return *module = made.release(), SUCCESS;
}

CALL cuModuleUnload(void* handle) {
    ENTER(CONTEXT);
    auto* const module = static_cast<Module*>(handle);
    if (modules.erase(module) == 0) return INVALID_HANDLE;
    for (auto& [name, function] : module->functions) functions.erase(&function);
    delete module;
    return SUCCESS;
}

CALL cuModuleGetFunction(void** function, void* handle, const char* name) {
    ENTER(CONTEXT);
    auto* const module = static_cast<Module*>(handle);
    if (modules.count(module) == 0) return INVALID_HANDLE;
    if (!has_kernel(*module, name)) return NOT_FOUND;
    const shim::Kernel* const kernel = kernel_of(name);
    if (!kernel) report("%s is in the image, but not among the sources", name);
    Function& found = module->functions.try_emplace(name, Function{kernel, module}).first->second;
    if (!module->is_ptx) look_at_limits(found, module->image.data(), name);
    functions.insert(&found);
    return *function = &found, SUCCESS;
}

CALL cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                    unsigned block_z, unsigned shared_bytes, void* stream_handle, void** arguments, void** extra) {
    ENTER(CONTEXT);
    auto* const function = static_cast<Function*>(handle);
    Stream* const stream = stream_of(stream_handle);
    if (functions.count(function) == 0 || !stream) return INVALID_HANDLE;
    if (function->module->device != stream->device) return INVALID_CONTEXT;
    const uint3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    if (!fits(grid, block) || extra || !arguments) return INVALID_VALUE;
    if (block.x * block.y * block.z > function->threads_max) return INVALID_VALUE;
    if (shared_bytes + function->shared_bytes > SHARED_MAX) return INVALID_VALUE;
    const auto work = std::make_shared<Work>();
    work->kind = Work::RUN;
    work->kernel = function->kernel, work->grid = grid, work->block = block;
    work->arguments.resize(function->kernel->arguments);
    for (std::size_t i = 0; i < work->arguments.size(); i++) {
        work->arguments[i] = {true, 0};
        std::memcpy(&work->arguments[i].bits, arguments[i], function->kernel->parameters[i].bytes);
    }
    return enqueue(*stream, work);
}
