#pragma once

#include "bindings/pointer.h"
#include "lora_grad/lora_grad.h"

namespace fused_lora {
namespace py = pybind11;
using Strides = std::pair<int64_t, int64_t>;

inline GradGroup grad_group(uintptr_t a, uintptr_t b, uintptr_t da, uintptr_t db, Strides a_strides,
                            Strides b_strides, Strides da_strides, Strides db_strides,
                            int32_t first_column, int32_t columns, int32_t first_rank, int32_t rank,
                            float scale) {
  GradGroup group = {};
  group.a = pointer<void>(a), group.b = pointer<void>(b);
  group.da = pointer<void>(da), group.db = pointer<void>(db);
  std::tie(group.a_r, group.a_k) = a_strides;
  std::tie(group.b_n, group.b_r) = b_strides;
  std::tie(group.da_r, group.da_k) = da_strides;
  std::tie(group.db_n, group.db_r) = db_strides;
  group.first_column = first_column, group.columns = columns;
  group.first_rank = first_rank, group.rank = rank;
  group.scale = scale;
  return group;
}

inline GradProblem grad_problem(const GradPlan& plan, uintptr_t x, uintptr_t dy, uintptr_t h,
                                uintptr_t dh, int64_t x_row, int64_t dy_row, int64_t h_row,
                                int64_t dh_row, const std::vector<GradGroup>& groups,
                                uintptr_t dbias, uintptr_t dh_out, int64_t dh_out_row, int64_t rows,
                                DType type, DType adapter, DType grad, DType dbias_type, bool add,
                                Activation activation) {
  GradProblem problem = {};
  problem.x = {pointer<void>(x), pointer<void>(h), x_row, h_row, plan.shape.k, 0};
  problem.dy = {pointer<void>(dy), pointer<void>(dh), dy_row, dh_row, plan.shape.n, 0};
  if (groups.size() > kMostGroups) {
    throw std::invalid_argument("lora_grad: serves 1 to 4 groups, got " +
                                std::to_string(groups.size()));
  }
  std::copy(groups.begin(), groups.end(), problem.group);
  problem.groups = static_cast<int32_t>(groups.size()), problem.ranks = plan.shape.ranks;
  problem.dbias = pointer<void>(dbias), problem.rows = rows;
  problem.dh = pointer<void>(dh_out), problem.dh_row = dh_out_row;
  problem.type = type, problem.adapter = adapter;
  problem.grad = grad, problem.dbias_type = dbias_type;
  problem.add = add, problem.activation = activation;
  return problem;
}

inline void bind_grad_plan(py::module_& m) {
  py::class_<GradPlan>(m, "GradPlan", py::module_local())
      .def_readonly("most_strips", &GradPlan::most_strips)
      .def_readonly("rank_blocks", &GradPlan::rank_blocks)
      .def_readonly("chunks", &GradPlan::chunks)
      .def_readonly("slices", &GradPlan::slices)
      .def_readonly("stages", &GradPlan::stages)
      .def_readonly("smem_bytes", &GradPlan::smem_bytes)
      .def_property_readonly("full", &GradPlan::full)
      .def_property_readonly("partial_floats", &GradPlan::partial_floats);

  m.def(
      "plan_lora_grad",
      [](int32_t k, int32_t n, int32_t ranks, bool h_given, bool dh_given, bool needs_a,
         bool needs_b, bool needs_bias, bool tf32, int64_t rows, int arch, int processors) {
        const GradShape shape = {k,       n,       ranks,      h_given, dh_given,
                                 needs_a, needs_b, needs_bias, tf32};
        return plan_lora_grad(shape, rows, arch, processors);
      },
      py::kw_only(), py::arg("k"), py::arg("n"), py::arg("ranks"), py::arg("h_given"),
      py::arg("dh_given"), py::arg("needs_a"), py::arg("needs_b"), py::arg("needs_bias"),
      py::arg("tf32") = false, py::arg("rows"), py::arg("arch"), py::arg("processors"),
      "How the gradients are launched; None where a block cannot hold them.");
}

inline void bind_lora_grad(py::module_& m) {
  m.attr("grad_most_groups") = kMostGroups;
  m.attr("grad_most_ranks") = kMostRanks;
  bind_grad_plan(m);

  py::class_<GradGroup>(m, "GradGroup", py::module_local())
      .def(py::init(&grad_group), py::kw_only(), py::arg("a"), py::arg("b"), py::arg("da"),
           py::arg("db"), py::arg("a_strides"), py::arg("b_strides"), py::arg("da_strides"),
           py::arg("db_strides"), py::arg("first_column"), py::arg("columns"),
           py::arg("first_rank"), py::arg("rank"), py::arg("scale"));

  py::class_<GradProblem>(m, "GradProblem", py::module_local())
      .def(py::init(&grad_problem), py::kw_only(), py::arg("plan"), py::arg("x"), py::arg("dy"),
           py::arg("h"), py::arg("dh"), py::arg("x_row"), py::arg("dy_row"), py::arg("h_row"),
           py::arg("dh_row"), py::arg("groups"), py::arg("dbias"), py::arg("dh_out") = 0,
           py::arg("dh_out_row") = 0, py::arg("rows"), py::arg("type"), py::arg("adapter"),
           py::arg("grad"), py::arg("dbias_type"), py::arg("add"),
           py::arg("activation") = Activation::kNone);

  m.def(
      "lora_grad",
      [](const GradProblem& problem, const GradPlan& plan, uintptr_t partial, int device,
         uintptr_t stream) {
        lora_grad(problem, plan, pointer<float>(partial), device, pointer<void>(stream));
      },
      py::kw_only(), py::arg("problem"), py::arg("plan"), py::arg("partial"), py::arg("device"),
      py::arg("stream"), "da, db and dbias from one read of x and dy.");
}

}  // namespace fused_lora
