// Device code that a plain C++ compiler can build too, so that its arithmetic is tested on a CPU.
#pragma once

#ifdef __CUDACC__
#define FL_DEVICE __device__ __forceinline__
#define FL_UNROLL _Pragma("unroll")
#define FL_NO_UNROLL _Pragma("unroll 1")
#else
#define FL_DEVICE inline
#define FL_UNROLL
#define FL_NO_UNROLL
#endif
