// Calls that are about the driver, its devices and their contexts.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.hpp"

namespace stand_in {

Device devices[DEVICES] = {{0, 0, 0}, {1, 0, 0}};
thread_local Device* current;
thread_local bool in_callback;
bool initialised;

// Never destroyed: whoever waits for ever may still have it when the process ends.
std::mutex& door() {
    static auto* const door = new std::mutex;
    return *door;
}

Entry::Entry(Needs needs) {
    if (in_callback) {
        code = NOT_PERMITTED;
        return;
    }
    lock = std::unique_lock<std::mutex>(door());
    if (needs >= DRIVER && !initialised) {
        code = NOT_INITIALISED;
    } else if (needs >= CONTEXT && lost) {
        code = lost;
    } else if (needs >= CONTEXT && (!current || current->retained == 0)) {
        code = INVALID_CONTEXT;
    }
}

namespace {

struct Text {
    int code;
    const char *name, *text;
};

const Text TEXTS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALISED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {DEVICE_UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const Text* text_of(int code) {
    for (const Text& text : TEXTS) {
        if (text.code == code) return &text;
    }
    return nullptr;
}

int attribute_of(int attribute) {
    const int capability = std::atoi(kind_of_driver());
    switch (attribute) {
        case 1: return 1024;           // threads of a block
        case 2: case 3: return 1024;   // of its x and y
        case 4: return 64;             // of its z
        case 5: return 0x7fffffff;     // blocks of a grid's x
        case 6: case 7: return 65535;  // of its y and z
        case 8: return 48 << 10;       // shared memory of a block
        case 9: return 64 << 10;       // constant memory
        case 10: return 32;            // a warp
        case 12: return 65536;         // registers of a block
        case 13: return 1500000;       // kHz
        case 14: return 512;
        case 15: case 31: return 1;    // copies and kernels beside kernels
        case 16: return 4;             // multiprocessors
        case 19: return 1;             // maps memory of the host
        case 33: return 1;             // its place
        case 36: return 2000000;       // kHz of memory
        case 37: return 256;           // bits of its bus
        case 38: return 4 << 20;       // cache
        case 39: return 2048;          // threads of a multiprocessor
        case 40: return 2;             // engines that copy
        case 41: return 1;             // one space of addresses
        case 75: return capability / 10;
        case 76: return capability % 10;
        case 78: return 1;             // priorities
        case 81: return 100 << 10;     // shared memory of a multiprocessor
        case 82: return 65536;
        case 97: return 99 << 10;      // shared memory that a block may ask for
        case 99: return 1;             // registers memory of the host
        case 106: return 32;
        case 111: return 1 << 10;
        case 115: return 1;            // memory in the order of streams
        default: return 0;
    }
}

bool is_device(int device) { return device >= 0 && device < DEVICES; }

void look_at_end() {
    // A thread that runs something, or hangs, goes down with the process.
    const std::unique_lock<std::mutex> lock(door(), std::try_to_lock);
    if (!lock) return;
    if (running_now.empty() && !lost) check_all_guards("found at the end");
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

CALL cuInit(unsigned) {
    ENTER(NOTHING);
    const Fault fault = count(INIT);
    if (fault.how == Fault::CODE) return fault.code;
    if (std::strcmp(kind_of_driver(), "fails") == 0) return MISMATCH;
    if (std::strcmp(kind_of_driver(), "0") == 0) return NO_DEVICE;
    if (!initialised) {
        watch_faults();
        std::atexit(look_at_end);
    }
    initialised = true;
    return SUCCESS;
}

CALL cuDriverGetVersion(int* version) { return *version = 12080, SUCCESS; }

CALL cuGetErrorString(int code, const char** text) {
    const Text* const found = text_of(code);
    *text = found ? found->text : nullptr;
    return found ? SUCCESS : INVALID_VALUE;
}

CALL cuGetErrorName(int code, const char** text) {
    const Text* const found = text_of(code);
    *text = found ? found->name : nullptr;
    return found ? SUCCESS : INVALID_VALUE;
}

CALL cuDeviceGetCount(int* count) {
    ENTER(DRIVER);
    return *count = DEVICES, SUCCESS;
}

CALL cuDeviceGet(int* device, int number) {
    ENTER(DRIVER);
    if (!is_device(number)) return INVALID_DEVICE;
    return *device = number, SUCCESS;
}

CALL cuDeviceGetName(char* name, int size, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    return std::snprintf(name, static_cast<std::size_t>(size), "Stand-in %d", device), SUCCESS;
}

CALL cuDeviceGetUuid_v2(void* uuid, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    std::memset(uuid, 0x50 + device, 16);
    return SUCCESS;
}

CALL cuDeviceGetUuid(void* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

CALL cuDeviceGetAttribute(int* value, int attribute, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    return *value = attribute_of(attribute), SUCCESS;
}

CALL cuDeviceTotalMem_v2(std::size_t* bytes, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    return *bytes = memory_of_device(), SUCCESS;
}

CALL cuDevicePrimaryCtxRetain(void** context, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    if (lost) return lost;
    if (is_busy(device)) return DEVICE_UNAVAILABLE;
    devices[device].retained++;
    return *context = &devices[device], SUCCESS;
}

CALL cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    if (lost) return lost;
    if (devices[device].retained == 0) return INVALID_CONTEXT;
    devices[device].retained--;
    return SUCCESS;
}

CALL cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    return *flags = 0, *active = devices[device].retained > 0, SUCCESS;
}

static thread_local std::vector<Device*> below;

static int make_current(void* context) {
    auto* const device = static_cast<Device*>(context);
    if (lost) return lost;
    if (device && (device < devices || device >= devices + DEVICES || device->retained == 0)) return INVALID_CONTEXT;
    return current = device, SUCCESS;
}

CALL cuCtxSetCurrent(void* context) {
    ENTER(DRIVER);
    return make_current(context);
}

CALL cuCtxGetCurrent(void** context) {
    ENTER(DRIVER);
    return *context = current, SUCCESS;
}

CALL cuCtxPushCurrent_v2(void* context) {
    ENTER(DRIVER);
    below.push_back(current);
    const int code = make_current(context);
    if (code) below.pop_back();
    return code;
}

CALL cuCtxPopCurrent_v2(void** context) {
    ENTER(DRIVER);
    if (!current) return INVALID_CONTEXT;
    if (context) *context = current;
    current = below.empty() ? nullptr : below.back();
    if (!below.empty()) below.pop_back();
    return SUCCESS;
}

CALL cuCtxGetDevice(int* device) {
    ENTER(CONTEXT);
    return *device = current->number, SUCCESS;
}

CALL cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER(CONTEXT);
    return *least = 0, *greatest = -5, SUCCESS;
}

CALL cuCtxSetFlags(unsigned) {
    ENTER(CONTEXT);
    return SUCCESS;
}

CALL cuCtxSynchronize() {
    ENTER(CONTEXT);
    if (streams_in_capture() > 0) return CAPTURE_UNSUPPORTED;
    return wait_for_all(*current, entry.lock);
}
