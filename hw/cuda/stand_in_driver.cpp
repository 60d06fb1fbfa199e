// What the host side asks of a CUDA driver, for tests on machines that have none: as many calls as it takes to be found and looked at.
// LITE_LLM_STAND_IN says what it is: a device of that compute capability (ten times it), none (0), or a driver that fails (fails).
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

const char* wish() {
    const char* const wish = std::getenv("LITE_LLM_STAND_IN");
    return wish ? wish : "0";
}

constexpr int SUCCESS = 0, NO_DEVICE = 100, MISMATCH = 803, UNKNOWN = 999;
constexpr int MAJOR = 75, MINOR = 76;

}  // namespace

extern "C" {

int cuInit(unsigned) {
    if (std::strcmp(wish(), "fails") == 0) return MISMATCH;
    return std::strcmp(wish(), "0") == 0 ? NO_DEVICE : SUCCESS;
}

int cuDriverGetVersion(int* version) { return *version = 12080, SUCCESS; }

int cuDeviceGetCount(int* count) { return *count = 2, SUCCESS; }

int cuDeviceGet(int* device, int number) { return *device = number, SUCCESS; }

int cuDeviceGetName(char* name, int size, int device) {
    return std::snprintf(name, static_cast<std::size_t>(size), "Stand-in %d", device), SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    const int capability = std::atoi(wish());
    if (attribute != MAJOR && attribute != MINOR) return UNKNOWN;
    return *value = attribute == MAJOR ? capability / 10 : capability % 10, SUCCESS;
}

int cuDeviceTotalMem_v2(std::size_t* bytes, int) { return *bytes = std::size_t{24} << 30, SUCCESS; }

int cuGetErrorString(int, const char** text) { return *text = "system has unsupported display driver", SUCCESS; }
}
