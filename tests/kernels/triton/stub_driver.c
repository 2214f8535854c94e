/* A CUDA driver that runs nothing and refuses what a driver or a device would refuse.
 *
 *   gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -I TRITON/backends/nvidia/include \
 *       -o FOLDER/libcuda.so.1 stub_driver.c
 *   LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python ...
 *
 * Under it Triton's whole road on the host runs, down to the launch, on CPU tensors. Kernels are
 * read from their cubins: parameters, registers, threads, shared memory. What a driver cannot know
 * the tests tell through the functions named stub_: which chip it is, which memory is alive, what
 * the launcher is about to pass. A refusal is a CUDA error whose text, by cuGetErrorString, is a
 * sentence.
 */
#include <cuda.h>
#include <elf.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PARAMETERS = 256, MOST_KERNELS = 64, MOST_RANGES = 1 << 20, MAP_BYTES = 128 };
enum { SHARED_BYTES = 48 << 10, REGISTERS = 65536, THREADS = 1024 };

/* A parameter as the launcher was built to pass it. */
enum { PLAIN, POINTER, POINTER_OR_NULL, MAP };
typedef struct {
  int size, kind, alignment;
} Told;

typedef struct {
  char name[512];
  int parameters, sizes[MOST_PARAMETERS], at[MOST_PARAMETERS];
  int bank, bytes; /* of parameters: where in constant memory, and how many */
  int registers, local, shared, most_threads, required_threads;
  int dynamic_shared; /* what the attribute allows */
} Kernel;

typedef struct {
  int count;
  Kernel kernels[MOST_KERNELS];
} Module;

static int arch = 90, told_count = -1, live_count = -1;
static Told told[MOST_PARAMETERS];
static uint64_t live[MOST_RANGES][2];
static int launches, maps;
static char why[1024] = "no error";

static CUresult refuse(CUresult code, const char* format, ...) {
  va_list given;
  va_start(given, format);
  vsnprintf(why, sizeof why, format, given);
  va_end(given);
  return code;
}

/* What the tests tell, and ask. */

void stub_arch(int sm) { arch = sm; }
int stub_launches(void) { return launches; }
int stub_maps(void) { return maps; }

/* Ranges [begin, end) of memory that is alive; fewer than none: all of it. */
void stub_live(int count, const uint64_t* ranges) {
  live_count = count < MOST_RANGES ? count : MOST_RANGES;
  if (count > 0) memcpy(live, ranges, live_count * sizeof live[0]);
}

/* What the next launch passes; fewer than none: nothing is known of it. */
void stub_told(int count, const Told* parameters) {
  told_count = count < MOST_PARAMETERS ? count : MOST_PARAMETERS;
  if (count > 0) memcpy(told, parameters, told_count * sizeof told[0]);
}

static int is_live(uint64_t begin, uint64_t bytes) {
  for (int i = 0; i < live_count; ++i) {
    if (live[i][0] <= begin && begin + bytes <= live[i][1]) return 1;
  }
  return live_count < 0;
}

static int most_shared(void) {
  const int kib = arch == 80 || arch == 87 ? 163 : arch == 90 || arch / 10 == 10 ? 227 : 99;
  return kib << 10;
}

/* The device. */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char** text) { return *text = why, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal != 0) return refuse(CUDA_ERROR_INVALID_DEVICE, "device %d of one", ordinal);
  return *device = ordinal, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = SHARED_BYTES; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = most_shared(); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = most_shared() + (1 << 10);
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = THREADS; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = arch % 10; break;
    default: *value = 1024;
  }
  return CUDA_SUCCESS;
}

#define HANDLE ((void*)(uintptr_t)0x1000)
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = HANDLE, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = HANDLE, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

/* Where a pointer leads on the device: where it leads on the host. */
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof pointer);
  if (is_live(pointer, 1)) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "a pointer to memory that is not alive: %#llx",
                (unsigned long long)pointer);
}

/* Cubins: an ELF whose sections .nv.info tell what a loader must know, as records of a format, an
 * attribute, and a half word that is the value or the number of bytes that follow. */

enum { HALF_WORD = 3, WITH_BYTES = 4 };
enum { MAX_THREADS = 0x05, FRAME_SIZE = 0x11, REQNTID = 0x10, KPARAM_INFO = 0x17 };
enum { PARAM_CBANK = 0x0a, CBANK_PARAM_SIZE = 0x19, REGCOUNT = 0x2f };

typedef struct {
  const char* image;
  const Elf64_Shdr* sections;
  int count;
} Cubin;

static const char* name_of(const Cubin* c, const Elf64_Shdr* section) {
  const int names = ((const Elf64_Ehdr*)c->image)->e_shstrndx;
  return c->image + c->sections[names].sh_offset + section->sh_name;
}

static const char* symbol(const Cubin* c, unsigned index) {
  for (int i = 0; i < c->count; ++i) {
    const Elf64_Shdr* s = &c->sections[i];
    if (s->sh_type != SHT_SYMTAB || (index + 1) * sizeof(Elf64_Sym) > s->sh_size) continue;
    const Elf64_Sym* symbols = (const Elf64_Sym*)(c->image + s->sh_offset);
    return c->image + c->sections[s->sh_link].sh_offset + symbols[index].st_name;
  }
  return "";
}

static Kernel* find(Module* module, const char* name) {
  for (int i = 0; i < module->count; ++i) {
    if (!strcmp(module->kernels[i].name, name)) return &module->kernels[i];
  }
  return NULL;
}

static void read_record(const Cubin* c, Module* module, Kernel* kernel, int attribute,
                        const char* at, int value) {
  uint32_t word[3] = {0};
  if (attribute == CBANK_PARAM_SIZE) kernel->bytes = value;
  if (!at) return;
  memcpy(word, at, value < 12 ? value : 12);
  if (!kernel) kernel = find(module, symbol(c, word[0]));
  if (!kernel) return;
  switch (attribute) {
    case KPARAM_INFO: { /* of a parameter: which, where, and above two bits and a half word, bytes
                         */
      const int which = word[1] & 0xffff;
      if (which >= MOST_PARAMETERS) break;
      kernel->sizes[which] = word[2] >> 18;
      kernel->at[which] = word[1] >> 16;
      if (kernel->parameters <= which) kernel->parameters = which + 1;
      break;
    }
    case PARAM_CBANK: kernel->bank = word[1] & 0xffff; break;
    case MAX_THREADS: kernel->most_threads = word[0] * word[1] * word[2]; break;
    case REQNTID: kernel->required_threads = word[0] * word[1] * word[2]; break;
    case REGCOUNT: kernel->registers = word[1]; break;
    case FRAME_SIZE: kernel->local = word[1]; break;
  }
}

static void read_info(const Cubin* c, const Elf64_Shdr* section, Module* module, Kernel* kernel) {
  const char* at = c->image + section->sh_offset;
  for (const char* end = at + section->sh_size; at + 4 <= end;) {
    uint16_t value;
    memcpy(&value, at + 2, 2);
    const int attribute = (unsigned char)at[1], follows = at[0] == WITH_BYTES;
    if (follows || (kernel && at[0] == HALF_WORD)) {
      read_record(c, module, kernel, attribute, follows ? at + 4 : NULL, value);
    }
    at += 4 + (follows ? value : 0);
  }
}

/* 90 of sm_90: the low byte of an ELF's flags in the form before CUDA 13, the next one since. */
static int arch_of(const Elf64_Ehdr* elf) {
  return elf->e_ident[EI_ABIVERSION] < 8 ? elf->e_flags & 0xff : elf->e_flags >> 8 & 0xff;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const Elf64_Ehdr* elf = image;
  if (memcmp(elf->e_ident, ELFMAG, SELFMAG)) return refuse(CUDA_ERROR_INVALID_IMAGE, "no cubin");
  const int of = arch_of(elf);
  if (of / 10 != arch / 10 || of > arch) {
    return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "a cubin of sm_%d on sm_%d", of, arch);
  }
  const Cubin c = {image, (const Elf64_Shdr*)((const char*)image + elf->e_shoff), elf->e_shnum};
  Module* made = calloc(1, sizeof *made);
  const char info[] = ".nv.info.", shared[] = ".nv.shared.";
  for (int i = 0; i < c.count && made->count < MOST_KERNELS; ++i) {
    const char* name = name_of(&c, &c.sections[i]);
    if (strncmp(name, info, sizeof info - 1)) continue;
    Kernel* kernel = &made->kernels[made->count++];
    snprintf(kernel->name, sizeof kernel->name, "%s", name + sizeof info - 1);
    kernel->most_threads = THREADS;
    kernel->dynamic_shared = SHARED_BYTES;
    read_info(&c, &c.sections[i], made, kernel);
  }
  for (int i = 0; i < c.count; ++i) {
    const char* name = name_of(&c, &c.sections[i]);
    if (!strcmp(name, ".nv.info")) read_info(&c, &c.sections[i], made, NULL);
    Kernel* kernel =
        strncmp(name, shared, sizeof shared - 1) ? NULL : find(made, name + sizeof shared - 1);
    if (kernel) kernel->shared = (int)c.sections[i].sh_size;
  }
  return *module = (CUmodule)made, CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; } /* kernels may be launched yet */

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)find((Module*)module, name);
  return *function ? CUDA_SUCCESS : refuse(CUDA_ERROR_NOT_FOUND, "no kernel %s in a cubin", name);
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  const Kernel* kernel = (const Kernel*)function;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = kernel->required_threads ? kernel->required_threads : kernel->most_threads;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = kernel->shared; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->local; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Kernel* kernel = (Kernel*)function;
  switch ((int)attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: {
      const int most = most_shared() - kernel->shared;
      if (value > most) {
        return refuse(CUDA_ERROR_INVALID_VALUE,
                      "%d bytes of dynamic shared memory asked for %s, sm_%d has %d", value,
                      kernel->name, arch, most);
      }
      kernel->dynamic_shared = value;
      return CUDA_SUCCESS;
    }
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: return CUDA_SUCCESS;
  }
  return refuse(CUDA_ERROR_INVALID_VALUE, "no attribute %d of a kernel", attribute);
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function,
                                      const CUlaunchConfig* config) {
  return *count = 1, CUDA_SUCCESS;
}

/* Tensor maps. */

static int bytes_of(CUtensorMapDataType type) {
  switch ((int)type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

static const char seal[] = "made by cuTensorMapEncodeTiled";

/* Sizes and boxes in elements, strides in bytes, columns first. */
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const CUresult no = CUDA_ERROR_INVALID_VALUE;
  const uint64_t size = bytes_of(type), at = (uint64_t)address;
  if (arch < 90) return refuse(CUDA_ERROR_NOT_SUPPORTED, "a tensor map on sm_%d", arch);
  if ((uintptr_t)map % 64) return refuse(no, "a tensor map lies at no multiple of 64 bytes");
  if (rank < 1 || rank > 5) return refuse(no, "a tensor map of %u dimensions", rank);
  if (at % 16) return refuse(no, "a tensor map's address is no multiple of 16 bytes");
  uint64_t row = sizes[0] * size, last = row;
  for (unsigned i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32) {
      return refuse(no, "a tensor map's size %llu", (unsigned long long)sizes[i]);
    }
    if (box[i] < 1 || box[i] > 256) return refuse(no, "a tensor map's box of %u elements", box[i]);
    if (steps[i] < 1 || steps[i] > 8) return refuse(no, "a tensor map's step of %u", steps[i]);
    if (i + 1 == rank) break;
    if (strides[i] % 16 || strides[i] >= 1ull << 40) {
      return refuse(no, "a tensor map's stride of %llu bytes is no multiple of 16",
                    (unsigned long long)strides[i]);
    }
    if (strides[i] < row) {
      return refuse(no, "a tensor map's rows of %llu bytes overlap, %llu apart",
                    (unsigned long long)row, (unsigned long long)strides[i]);
    }
    row = strides[i] * sizes[i + 1];
    last += strides[i] * (sizes[i + 1] - 1);
  }
  const uint64_t inner = box[0] * size, span = 16ull << swizzle;
  if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) {
    if (inner % 16) return refuse(no, "a tensor map's box is no multiple of 16 bytes wide");
    if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return refuse(no, "a tensor map's swizzle");
    if (swizzle && inner > span) {
      return refuse(no, "a tensor map's box is %llu bytes wide, its swizzle %llu",
                    (unsigned long long)inner, (unsigned long long)span);
    }
  }
  if (!is_live(at, last)) {
    return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "a tensor map of memory that is not alive");
  }
  memset(map, 0, MAP_BYTES);
  memcpy((char*)map + MAP_BYTES / 2, seal, sizeof seal);
  ++maps;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                 const int* lower, const int* upper, cuuint32_t channels,
                                 cuuint32_t pixels, const cuuint32_t* steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return refuse(CUDA_ERROR_NOT_SUPPORTED, "no kernel here reads by im2col");
}

/* Launches. */

static CUresult check_shape(const Kernel* kernel, const CUlaunchConfig* c) {
  const CUresult no = CUDA_ERROR_INVALID_VALUE;
  if (c->gridDimX < 1 || c->gridDimX > 0x7fffffff || c->gridDimY < 1 || c->gridDimY > 65535 ||
      c->gridDimZ < 1 || c->gridDimZ > 65535) {
    return refuse(no, "a grid of %u x %u x %u blocks", c->gridDimX, c->gridDimY, c->gridDimZ);
  }
  const uint64_t threads = (uint64_t)c->blockDimX * c->blockDimY * c->blockDimZ;
  const uint64_t most = kernel->most_threads < THREADS ? kernel->most_threads : THREADS;
  if (threads < 1 || threads > most || c->blockDimZ > 64 ||
      (kernel->required_threads && threads != (uint64_t)kernel->required_threads)) {
    return refuse(no, "a block of %llu threads, %s is compiled for %d", (unsigned long long)threads,
                  kernel->name, kernel->required_threads ? kernel->required_threads : (int)most);
  }
  if ((kernel->registers + 7) / 8 * 8 * ((threads + 31) / 32 * 32) > REGISTERS) {
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%llu threads of %d registers",
                  (unsigned long long)threads, kernel->registers);
  }
  if ((int)c->sharedMemBytes > kernel->dynamic_shared) {
    return refuse(no, "%u bytes of dynamic shared memory, %d are allowed", c->sharedMemBytes,
                  kernel->dynamic_shared);
  }
  if ((int)c->sharedMemBytes + kernel->shared > most_shared()) {
    return refuse(no, "%u bytes of shared memory on sm_%d", c->sharedMemBytes, arch);
  }
  return CUDA_SUCCESS;
}

static CUresult check_attributes(const CUlaunchConfig* c) {
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    const unsigned x = c->attrs[i].value.clusterDim.x, y = c->attrs[i].value.clusterDim.y,
                   z = c->attrs[i].value.clusterDim.z;
    if (arch < 90 || x * y * z < 1 || x * y * z > 8 || c->gridDimX % x || c->gridDimY % y ||
        c->gridDimZ % z) {
      return refuse(CUDA_ERROR_INVALID_CLUSTER_SIZE, "clusters of %u x %u x %u on sm_%d", x, y, z,
                    arch);
    }
  }
  return CUDA_SUCCESS;
}

static CUresult check_pointer(const Kernel* kernel, int which, Told of, const void* at) {
  uint64_t pointer;
  memcpy(&pointer, at, sizeof pointer);
  if (!pointer && of.kind == POINTER_OR_NULL) return CUDA_SUCCESS;
  if (!pointer) {
    return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "parameter %d of %s is a null pointer", which,
                  kernel->name);
  }
  if (pointer % of.alignment) {
    return refuse(CUDA_ERROR_MISALIGNED_ADDRESS,
                  "parameter %d of %s, compiled for multiples of %d bytes, is %#llx", which,
                  kernel->name, of.alignment, (unsigned long long)pointer);
  }
  if (!is_live(pointer, 1)) {
    return refuse(CUDA_ERROR_ILLEGAL_ADDRESS,
                  "parameter %d of %s points to memory that is not alive", which, kernel->name);
  }
  return CUDA_SUCCESS;
}

static CUresult check_parameters(const Kernel* kernel, void** parameters) {
  if (told_count < 0) return CUDA_SUCCESS;
  if (told_count != kernel->parameters) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "%d parameters, %s takes %d", told_count, kernel->name,
                  kernel->parameters);
  }
  int end = kernel->bank; /* which they are aligned in */
  for (int i = 0; i < told_count; ++i) {
    const int alignment = told[i].kind == MAP ? 64 : told[i].size;
    const int at = (end + alignment - 1) / alignment * alignment;
    end = at + told[i].size;
    if (told[i].size != kernel->sizes[i] || at - kernel->bank != kernel->at[i]) {
      return refuse(CUDA_ERROR_INVALID_VALUE,
                    "parameter %d of %s is %d bytes at %d, passed are %d at %d", i, kernel->name,
                    kernel->sizes[i], kernel->at[i], told[i].size, at - kernel->bank);
    }
    if (!parameters[i]) return refuse(CUDA_ERROR_INVALID_VALUE, "parameter %d is not there", i);
    if (told[i].kind == MAP &&
        memcmp((const char*)parameters[i] + MAP_BYTES / 2, seal, sizeof seal)) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "parameter %d of %s is no tensor map", i,
                    kernel->name);
    }
    if (told[i].kind != POINTER && told[i].kind != POINTER_OR_NULL) continue;
    const CUresult result = check_pointer(kernel, i, told[i], parameters[i]);
    if (result) return result;
  }
  if (end - kernel->bank != kernel->bytes) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "%d bytes of parameters, %s takes %d",
                  end - kernel->bank, kernel->name, kernel->bytes);
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  const Kernel* kernel = (const Kernel*)function;
  CUresult result = check_shape(kernel, config);
  if (!result) result = check_attributes(config);
  if (!result) result = check_parameters(kernel, parameters);
  told_count = -1;
  if (!result) ++launches;
  return result;
}
