// Device code that a plain C++ compiler can build too, so that its arithmetic is tested on a CPU.
#pragma once

#ifdef __CUDACC__
#define FL_DEVICE __device__ __forceinline__
#define FL_UNROLL _Pragma("unroll")
#define FL_PRAGMA(words) _Pragma(#words)
#define FL_UNROLL_BY(times) FL_PRAGMA(unroll(times))
#else
#define FL_DEVICE inline
#define FL_UNROLL
#define FL_UNROLL_BY(times)
#endif
