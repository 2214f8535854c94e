// wgmma: a warpgroup multiplies two tiles of shared memory into its registers, in the background.
//
//   sum [64, N] += left [64, 16] right [16, N]      left, right by descriptor; see matrix.h
//
// Thread t of the warpgroup holds rows 16 (t / 32) + t % 32 / 4, and 8 below it, of columns
// 8 j + 2 (t % 4), and 1 beside it: sum[4 j], sum[4 j + 1], and sum[4 j + 2], sum[4 j + 3] below.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace fused_lora::sm90 {

// Registers written until here, to the products that follow.
FL_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
FL_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `open` of the youngest groups are still under way.
template <int open>
FL_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(open) : "memory");
}

// To the compiler, sums are known as soon as a product is issued: none may be read above this line.
template <int count>
FL_DEVICE void settle(float (&sum)[count]) {
  FL_UNROLL
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// clang-format off

#define FL_TEXT_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define FL_TEXT_64 FL_TEXT_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define FL_TEXT_96 FL_TEXT_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define FL_TEXT_128 FL_TEXT_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"


#define FL_SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define FL_SUMS_16(i) FL_SUMS_4(i), FL_SUMS_4(i + 4), FL_SUMS_4(i + 8), FL_SUMS_4(i + 12)
#define FL_SUMS_32 FL_SUMS_16(0), FL_SUMS_16(16)
#define FL_SUMS_64 FL_SUMS_32, FL_SUMS_16(32), FL_SUMS_16(48)
#define FL_SUMS_96 FL_SUMS_64, FL_SUMS_16(64), FL_SUMS_16(80)
#define FL_SUMS_128 FL_SUMS_96, FL_SUMS_16(96), FL_SUMS_16(112)
// clang-format on

// left is [M, K] with K contiguous; right likewise [N, K], or [K, N] with N contiguous.
template <typename T,       // of left and right
          int N,            // columns
          bool transposed>  // right has N contiguous
struct Product;

// The operands after the sums: left, right, whether to add to the sums, which way right lies.
#define FL_PRODUCT(Type, name, N, count, left, right, add, across)                            \
  template <bool transposed>                                                                  \
  struct Product<Type, N, transposed> {                                                       \
    static FL_DEVICE void add_to(float (&sum)[count], uint64_t a, uint64_t b, int add_sum) {  \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add                              \
                   ", 0;\n"                                                                   \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name            \
                   " {" FL_TEXT_##count "}, %" #left ", %" #right ", add, 1, 1, 0, %" #across \
                                        ";\n}"                                                \
                   : FL_SUMS_##count                                                          \
                   : "l"(a), "l"(b), "r"(add_sum), "n"(transposed ? 1 : 0));                  \
    }                                                                                         \
  };
#define FL_PRODUCTS(Type, name)                   \
  FL_PRODUCT(Type, name, 64, 32, 32, 33, 34, 35)  \
  FL_PRODUCT(Type, name, 128, 64, 64, 65, 66, 67) \
  FL_PRODUCT(Type, name, 192, 96, 96, 97, 98, 99) \
  FL_PRODUCT(Type, name, 256, 128, 128, 129, 130, 131)
FL_PRODUCTS(BFloat16, "bf16")
FL_PRODUCTS(Float16, "f16")
#undef FL_PRODUCTS
#undef FL_PRODUCT

// Adds a product to the sums, or with `add` 0 puts it in their place.
template <typename T, bool transposed, int count>
FL_DEVICE void multiply(float (&sum)[count], uint64_t left, uint64_t right, int add) {
  Product<T, 2 * count, transposed>::add_to(sum, left, right, add);
}

}  // namespace fused_lora::sm90
