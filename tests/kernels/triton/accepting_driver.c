/* A CUDA driver that runs nothing: Triton's whole road on the host, down to the launch, on CPU
 * tensors.
 *
 *   gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o FOLDER/libcuda.so.1 accepting_driver.c
 *   LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python ...
 *
 * Every call succeeds. Handles are made up; a chip has what an H200 has where Triton asks.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { MOST_SHARED = 97, PROCESSORS = 16, THREADS_OF_FUNCTION = 0 };
#define HANDLE ((void*)(uintptr_t)0x1000)

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuGetErrorString(int code, const char** text) { return *text = "no error", 0; }

int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == MOST_SHARED ? 232448 : attribute == PROCESSORS ? 132 : 1024;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = HANDLE, 0; }
int cuCtxGetCurrent(void** context) { return *context = HANDLE, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }

int cuModuleLoadData(void** module, const void* image) { return *module = HANDLE, 0; }
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = HANDLE, 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == THREADS_OF_FUNCTION ? 1024 : 0;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) {
  return *count = 1, 0;
}

/* Where a pointer leads on the device: where it leads on the host. */
int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  memcpy(value, &pointer, sizeof pointer);
  return 0;
}
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                           int interleave, int swizzle, int promotion, int fill) {
  memset(map, 0, 128);
  return 0;
}
int cuTensorMapEncodeIm2col(void* map) { return memset(map, 0, 128), 0; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = 0, 0; }
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
  return 0;
}
