// Calls that are about the driver, its devices and their contexts.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.hpp"

namespace stand_in {

Device devices[DEVICES_MAX];
thread_local Device* current;
bool initialised;

// Never destroyed: whoever waits for ever may still have it when the process ends.
std::mutex& door() {
    static auto* const door = new std::mutex;
    return *door;
}

Entry::Entry(Needs needs) {
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
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
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
    // Its major and its minor number; nobody asks for more.
    return attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 0;
}

bool is_device(int device) { return device >= 0 && device < device_count(); }

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
        for (int number = 0; number < DEVICES_MAX; number++) devices[number].number = number;
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
    return *count = device_count(), SUCCESS;
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

CALL cuDeviceGetUuid(char* uuid, int device) {
    ENTER(DRIVER);
    if (!is_device(device)) return INVALID_DEVICE;
    std::memcpy(uuid, "stand-in device ", 16);
    return uuid[15] = static_cast<char>(device), SUCCESS;
}

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

CALL cuCtxSetCurrent(void* context) {
    ENTER(DRIVER);
    auto* const device = static_cast<Device*>(context);
    if (lost) return lost;
    if (device && (device < devices || device >= devices + device_count() || device->retained == 0)) return INVALID_CONTEXT;
    return current = device, SUCCESS;
}

CALL cuCtxGetCurrent(void** context) {
    ENTER(DRIVER);
    return *context = current, SUCCESS;
}
