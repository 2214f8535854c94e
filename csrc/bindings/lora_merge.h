#pragma once

#include "bindings/pointer.h"
#include "lora_merge/lora_merge.h"

namespace fused_lora {

namespace py = pybind11;

inline void bind_lora_merge(py::module_& m) {
  py::enum_<Rounding>(m, "Rounding", py::module_local())
      .value("nearest", Rounding::kNearest)
      .value("stochastic", Rounding::kStochastic);

  py::class_<MergeTypes>(m, "MergeTypes", py::module_local())
      .def(py::init([](DType w, DType out, DType adapter) { return MergeTypes{w, out, adapter}; }),
           py::kw_only(), py::arg("w"), py::arg("out"), py::arg("adapter"));

  py::class_<MergeItem>(m, "MergeItem", py::module_local())
      .def(py::init([](uintptr_t w, uintptr_t out, uintptr_t a, uintptr_t b, int64_t w_row,
                       int64_t out_row, std::pair<int64_t, int64_t> a_strides,
                       std::pair<int64_t, int64_t> b_strides, int32_t n, int32_t k, int32_t r,
                       float scale, int64_t offset) {
             MergeItem item = {};
             item.w = pointer<void>(w), item.out = pointer<void>(out);
             item.a = pointer<void>(a), item.b = pointer<void>(b);
             item.w_row = w_row, item.out_row = out_row;
             std::tie(item.a_r, item.a_k) = a_strides;
             std::tie(item.b_n, item.b_r) = b_strides;
             item.n = n, item.k = k, item.r = r;
             item.scale = scale, item.offset = offset;
             return item;
           }),
           py::kw_only(), py::arg("w"), py::arg("out"), py::arg("a"), py::arg("b"),
           py::arg("w_row"), py::arg("out_row"), py::arg("a_strides"), py::arg("b_strides"),
           py::arg("n"), py::arg("k"), py::arg("r"), py::arg("scale"), py::arg("offset"));

  m.attr("merge_item_bytes") = sizeof(MergeItem);

  m.def(
      "pack_merge_items",
      [](std::vector<MergeItem> items, MergeTypes types) {
        const PackedMerge packed = pack_merge_items(std::move(items), types);
        return py::make_tuple(py::bytes(packed.table), packed.tiles);
      },
      py::arg("items"), py::arg("types"), "The device table, as bytes, and its number of tiles.");

  m.def(
      "lora_merge",
      [](uintptr_t table, int32_t count, int64_t tiles, MergeTypes types, Rounding rounding,
         uint64_t seed, uint64_t step, int device, uintptr_t stream) {
        lora_merge(pointer<void>(table), count, tiles, types, rounding, {seed, step}, device,
                   pointer<void>(stream));
      },
      py::kw_only(), py::arg("table"), py::arg("count"), py::arg("tiles"), py::arg("types"),
      py::arg("rounding"), py::arg("seed"), py::arg("step"), py::arg("device"), py::arg("stream"),
      "w' = w + s b a for every item of a packed table that lies in device memory.");
}

}  // namespace fused_lora
