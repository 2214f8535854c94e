#pragma once

#include "bindings/pointer.h"
#include "lora_linear_sm90/lora_linear_sm90.h"

namespace fused_lora {
namespace py = pybind11;

// A launch bound to all but its tensors: in the calls of one program they alone change.
class BoundLinear {
 public:
  BoundLinear(const sm90::LinearPlan& plan, int64_t x_row, int64_t w_row, int64_t y_row,
              int64_t u_row, int64_t residual_row, const std::vector<sm90::LinearGroup>& groups,
              DType type)
      : plan_(plan) {
    problem_.x.row = x_row, problem_.w.row = w_row, problem_.y.row = y_row;
    problem_.u.row = u_row, problem_.residual.row = residual_row;
    if (groups.size() > sm90::kMostLinearGroups) {
      throw std::invalid_argument("lora_linear: serves up to " +
                                  std::to_string(sm90::kMostLinearGroups) + " groups, got " +
                                  std::to_string(groups.size()));
    }
    std::copy(groups.begin(), groups.end(), problem_.group);
    problem_.groups = static_cast<int32_t>(groups.size()), problem_.type = type;
  }

  // Addresses, 0 for what there is not: of x, w, y, u, residual, bias and factor, then of every h
  // and every border.
  void operator()(const std::vector<uintptr_t>& at, int device, uintptr_t stream) const {
    sm90::LinearProblem problem = problem_;
    const size_t groups = problem.groups, own = 7;
    if (at.size() != own + 2 * groups) {
      throw std::invalid_argument("lora_linear: " + std::to_string(groups) + " groups have " +
                                  std::to_string(own + 2 * groups) + " addresses, got " +
                                  std::to_string(at.size()));
    }
    problem.x.at = pointer<void>(at[0]), problem.w.at = pointer<void>(at[1]);
    problem.y.at = pointer<void>(at[2]), problem.u.at = pointer<void>(at[3]);
    problem.residual.at = pointer<void>(at[4]);
    problem.bias = pointer<void>(at[5]), problem.factor = pointer<void>(at[6]);
    for (size_t g = 0; g < groups; ++g) {
      problem.group[g].h.at = pointer<void>(at[own + g]);
      problem.group[g].border.at = pointer<void>(at[own + groups + g]);
    }
    sm90::lora_linear(problem, plan_, device, pointer<void>(stream));
  }

 private:
  sm90::LinearProblem problem_ = {};
  sm90::LinearPlan plan_;
};

inline void bind_linear_plan(py::module_& m) {
  py::enum_<sm90::Right>(m, "Right", py::module_local())
      .value("rows", sm90::Right::kRows)
      .value("columns", sm90::Right::kColumns);

  py::class_<sm90::LinearPlan>(m, "LinearPlan", py::module_local())
      .def_readonly("tile_rows", &sm90::LinearPlan::tile_rows)
      .def_readonly("tile_columns", &sm90::LinearPlan::tile_columns)
      .def_readonly("cluster", &sm90::LinearPlan::cluster)
      .def_readonly("ping_pong", &sm90::LinearPlan::ping_pong)
      .def_readonly("stages", &sm90::LinearPlan::stages)
      .def_readonly("smem_bytes", &sm90::LinearPlan::smem_bytes)
      .def_readonly("blocks", &sm90::LinearPlan::blocks)
      .def_readonly("tiles", &sm90::LinearPlan::tiles);

  m.def(
      "plan_lora_linear",
      [](int64_t rows, int32_t columns, int32_t depth, int32_t ranks, sm90::Right right,
         Activation activation, int processors,
         std::optional<std::tuple<int, int, int, bool>> tile) -> std::optional<sm90::LinearPlan> {
        const sm90::LinearShape shape = {rows, columns, depth, ranks, right, activation};
        if (!tile) return sm90::plan_lora_linear(shape, processors);
        const auto [tile_rows, tile_columns, cluster, ping_pong] = *tile;
        return sm90::plan_lora_linear(shape, processors, tile_rows, tile_columns, cluster,
                                      ping_pong);
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
      .def(py::init([](int64_t h_row, int64_t border_row, int32_t first_column, int32_t columns,
                       int32_t rank) {
             return sm90::LinearGroup{
                 {nullptr, h_row}, {nullptr, border_row}, first_column, columns, rank, 0};
           }),
           py::kw_only(), py::arg("h_row"), py::arg("border_row"), py::arg("first_column"),
           py::arg("columns"), py::arg("rank"));

  py::class_<BoundLinear>(
      m, "BoundLinear", py::module_local(),
      "y = residual + factor act(x right + h border + bias), of every group, in one sum.")
      .def(py::init<const sm90::LinearPlan&, int64_t, int64_t, int64_t, int64_t, int64_t,
                    const std::vector<sm90::LinearGroup>&, DType>(),
           py::kw_only(), py::arg("plan"), py::arg("x_row"), py::arg("w_row"), py::arg("y_row"),
           py::arg("u_row"), py::arg("residual_row"), py::arg("groups"), py::arg("type"))
      .def("__call__", &BoundLinear::operator(), py::arg("at"), py::arg("device"),
           py::arg("stream"));
}

}  // namespace fused_lora
