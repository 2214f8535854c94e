#pragma once

#include "bindings/pointer.h"
#include "lora_linear_sm90/lora_linear_sm90.h"

namespace fused_lora {
namespace py = pybind11;

using Placed = std::pair<uintptr_t, int64_t>;  // a matrix: address, elements from row to row

inline sm90::Matrix matrix(Placed placed) { return {pointer<void>(placed.first), placed.second}; }

inline sm90::LinearProblem linear_problem(Placed x, Placed w, Placed y, Placed u, Placed residual,
                                          uintptr_t bias, uintptr_t factor,
                                          const std::vector<sm90::LinearGroup>& groups,
                                          DType type) {
  sm90::LinearProblem problem = {};
  problem.x = matrix(x), problem.w = matrix(w), problem.y = matrix(y);
  problem.u = matrix(u), problem.residual = matrix(residual);
  problem.bias = pointer<void>(bias), problem.factor = pointer<void>(factor);
  if (groups.size() > sm90::kMostLinearGroups) {
    throw std::invalid_argument("lora_linear: serves up to " +
                                std::to_string(sm90::kMostLinearGroups) + " groups, got " +
                                std::to_string(groups.size()));
  }
  std::copy(groups.begin(), groups.end(), problem.group);
  problem.groups = static_cast<int32_t>(groups.size()), problem.type = type;
  return problem;
}

inline void bind_linear_plan(py::module_& m) {
  py::enum_<sm90::Right>(m, "Right", py::module_local())
      .value("rows", sm90::Right::kRows)
      .value("columns", sm90::Right::kColumns);

  py::class_<sm90::LinearPlan>(m, "LinearPlan", py::module_local())
      .def_readonly("tile_rows", &sm90::LinearPlan::tile_rows)
      .def_readonly("tile_columns", &sm90::LinearPlan::tile_columns)
      .def_readonly("stages", &sm90::LinearPlan::stages)
      .def_readonly("smem_bytes", &sm90::LinearPlan::smem_bytes)
      .def_readonly("blocks", &sm90::LinearPlan::blocks)
      .def_readonly("tiles", &sm90::LinearPlan::tiles);

  m.def(
      "plan_lora_linear",
      [](int64_t rows, int32_t columns, int32_t depth, int32_t ranks, sm90::Right right,
         Activation activation, int processors,
         std::optional<std::pair<int, int>> tile) -> std::optional<sm90::LinearPlan> {
        const sm90::LinearShape shape = {rows, columns, depth, ranks, right, activation};
        if (!tile) return sm90::plan_lora_linear(shape, processors);
        return sm90::plan_lora_linear(shape, processors, tile->first, tile->second);
      },
      py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("ranks"),
      py::arg("right"), py::arg("activation"), py::arg("processors"),
      py::arg("tile") = std::nullopt,
      "How the product is launched; None where the tile asked for is not compiled.");
}

inline void bind_lora_linear(py::module_& m) {
  m.attr("linear_most_groups") = sm90::kMostLinearGroups;
  bind_linear_plan(m);

  py::class_<sm90::LinearGroup>(m, "LinearGroup", py::module_local())
      .def(py::init([](Placed h, Placed border, int32_t first_column, int32_t columns,
                       int32_t rank) {
             return sm90::LinearGroup{matrix(h), matrix(border), first_column, columns, rank, 0};
           }),
           py::kw_only(), py::arg("h"), py::arg("border"), py::arg("first_column"),
           py::arg("columns"), py::arg("rank"));

  py::class_<sm90::LinearProblem>(m, "LinearProblem", py::module_local())
      .def(py::init(&linear_problem), py::kw_only(), py::arg("x"), py::arg("w"), py::arg("y"),
           py::arg("u"), py::arg("residual"), py::arg("bias"), py::arg("factor"), py::arg("groups"),
           py::arg("type"));

  m.def(
      "lora_linear",
      [](const sm90::LinearProblem& problem, const sm90::LinearPlan& plan, int device,
         uintptr_t stream) { sm90::lora_linear(problem, plan, device, pointer<void>(stream)); },
      py::kw_only(), py::arg("problem"), py::arg("plan"), py::arg("device"), py::arg("stream"),
      "y = residual + factor act(x right + h border + bias), of every group, in one sum.");
}

}  // namespace fused_lora
