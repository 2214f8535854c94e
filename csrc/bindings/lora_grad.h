#pragma once

#include "bindings/pointer.h"
#include "lora_grad/add_partials.h"
#include "lora_grad/lora_grad.h"

namespace fused_lora {
namespace py = pybind11;
using Strides = std::pair<int64_t, int64_t>;

inline GradGroup grad_group(Strides a_strides, Strides b_strides, int32_t first_column,
                            int32_t columns, int32_t first_rank, int32_t rank, float scale) {
  GradGroup group = {};
  std::tie(group.a_r, group.a_k) = a_strides;
  std::tie(group.b_n, group.b_r) = b_strides;
  group.first_column = first_column, group.columns = columns;
  group.first_rank = first_rank, group.rank = rank;
  group.scale = scale;
  return group;
}

// Addresses of a call, as many as it has tensors.
inline void check_addresses(const std::string& name, size_t wanted, size_t got) {
  if (got == wanted) return;
  throw std::invalid_argument(name + std::to_string(wanted) + " addresses, got " +
                              std::to_string(got));
}

inline void check_most(size_t most, const std::string& things, size_t got) {
  if (got >= 1 && got <= most) return;
  throw std::invalid_argument("lora_grad: serves 1 to " + std::to_string(most) + " " + things +
                              ", got " + std::to_string(got));
}

// A launch bound to all but its tensors: in the calls of one program they alone change.
class BoundGrad {
 public:
  BoundGrad(const GradPlan& plan, int64_t x_row, int64_t dy_row, int64_t h_row, int64_t dh_row,
            const std::vector<GradGroup>& groups, int64_t dh_out_row, int64_t rows, DType type,
            DType adapter, Activation activation, DType norm)
      : plan_(plan) {
    problem_.x = {nullptr, nullptr, x_row, h_row, plan.shape.k, 0};
    problem_.dy = {nullptr, nullptr, dy_row, dh_row, plan.shape.n, 0};
    check_most(kMostGroups, "groups", groups.size());
    std::copy(groups.begin(), groups.end(), problem_.group);
    problem_.groups = static_cast<int32_t>(groups.size()), problem_.ranks = plan.shape.ranks;
    problem_.dh_row = dh_out_row, problem_.rows = rows;
    problem_.type = type, problem_.adapter = adapter;
    problem_.activation = activation, problem_.norm.type = norm;
  }

  // Addresses, 0 for what there is not: of x, dy, h, dh, the dh that is written, the partial sums,
  // and of a LayerNorm mean, rstd, gamma and beta; then of every a and every b.
  void operator()(const std::vector<uintptr_t>& at, int device, uintptr_t stream) const {
    GradProblem problem = problem_;
    const size_t groups = problem.groups, own = 10;
    if (at.size() != own + 2 * groups) {
      check_addresses("lora_grad: " + std::to_string(groups) + " groups have ", own + 2 * groups,
                      at.size());
    }
    problem.x.z = pointer<void>(at[0]), problem.dy.z = pointer<void>(at[1]);
    problem.x.given = pointer<void>(at[2]), problem.dy.given = pointer<void>(at[3]);
    problem.dh = pointer<void>(at[4]);
    problem.norm.mean = pointer<float>(at[6]), problem.norm.rstd = pointer<float>(at[7]);
    problem.norm.gamma = pointer<void>(at[8]), problem.norm.beta = pointer<void>(at[9]);
    for (size_t g = 0; g < groups; ++g) {
      problem.group[g].a = pointer<void>(at[own + g]);
      problem.group[g].b = pointer<void>(at[own + groups + g]);
    }
    lora_grad(problem, plan_, pointer<float>(at[5]), device, pointer<void>(stream));
  }

 private:
  GradProblem problem_ = {};
  GradPlan plan_;
};

inline SumGroup sum_group(Strides da_strides, Strides db_strides, int32_t first_column,
                          int32_t columns, int32_t first_rank, int32_t rank, float scale) {
  SumGroup group = {};
  std::tie(group.da_r, group.da_k) = da_strides;
  std::tie(group.db_n, group.db_r) = db_strides;
  group.first_column = first_column, group.columns = columns;
  group.first_rank = first_rank, group.rank = rank;
  group.scale = scale;
  return group;
}

inline SumPiece sum_piece(int32_t slices, int32_t k, int32_t n, int32_t rank_blocks,
                          const std::vector<SumGroup>& groups, DType grad, DType dbias_type,
                          bool add) {
  SumPiece piece = {};
  check_most(kMostGroups, "groups", groups.size());
  std::copy(groups.begin(), groups.end(), piece.group);
  piece.groups = static_cast<int32_t>(groups.size());
  for (const SumGroup& group : groups) piece.ranks += group.rank;
  piece.slices = slices, piece.k = k, piece.n = n, piece.rank_blocks = rank_blocks;
  piece.grad = grad, piece.dbias_type = dbias_type, piece.add = add;
  return piece;
}

// Sums of one launch, bound likewise.
class BoundSums {
 public:
  explicit BoundSums(const std::vector<SumPiece>& pieces) {
    check_most(kMostPieces, "pieces", pieces.size());
    std::copy(pieces.begin(), pieces.end(), sums_.piece);
    sums_.pieces = static_cast<int32_t>(pieces.size());
  }

  // Addresses of each piece in turn, 0 for what there is not: of the partial sums and dbias, then
  // of every da and every db.
  void operator()(const std::vector<uintptr_t>& at, int device, uintptr_t stream) const {
    Sums sums = sums_;
    size_t wanted = 0;
    for (int p = 0; p < sums.pieces; ++p) wanted += 2 + 2 * sums.piece[p].groups;
    if (at.size() != wanted) {
      check_addresses("add_partials: " + std::to_string(sums.pieces) + " pieces have ", wanted,
                      at.size());
    }
    const uintptr_t* next = at.data();
    for (int p = 0; p < sums.pieces; ++p) {
      SumPiece& piece = sums.piece[p];
      piece.partial = pointer<float>(*next++), piece.dbias = pointer<void>(*next++);
      for (int g = 0; g < piece.groups; ++g) piece.group[g].da = pointer<void>(*next++);
      for (int g = 0; g < piece.groups; ++g) piece.group[g].db = pointer<void>(*next++);
    }
    add_partials(sums, device, pointer<void>(stream));
  }

 private:
  Sums sums_ = {};
};

inline void bind_grad_plan(py::module_& m) {
  py::class_<GradPlan>(m, "GradPlan", py::module_local())
      .def_readonly("most_strips", &GradPlan::most_strips)
      .def_readonly("rank_blocks", &GradPlan::rank_blocks)
      .def_readonly("chunks", &GradPlan::chunks)
      .def_readonly("slices", &GradPlan::slices)
      .def_readonly("cluster_slices", &GradPlan::cluster_slices)
      .def_property_readonly("partials", &GradPlan::partials)
      .def_readonly("stages", &GradPlan::stages)
      .def_readonly("smem_bytes", &GradPlan::smem_bytes)
      .def_property_readonly("full", &GradPlan::full)
      .def_property_readonly("columns", &GradPlan::columns)
      .def_property_readonly(
          "strips",
          [](const GradPlan& plan) { return std::make_pair(plan.x_strips, plan.dy_strips); })
      .def_property_readonly("partial_floats", &GradPlan::partial_floats);

  m.def(
      "plan_lora_grad",
      [](int32_t k, int32_t n, int32_t ranks, bool h_given, bool dh_given, bool needs_a,
         bool needs_b, bool needs_bias, bool tf32, bool writes_dh, int64_t rows, int arch,
         int processors, int32_t fours, int32_t eights) {
        const GradShape shape = {k,       n,       ranks,      h_given, dh_given,
                                 needs_a, needs_b, needs_bias, tf32,    writes_dh};
        return plan_lora_grad(shape, rows, arch, processors, {fours, eights});
      },
      py::kw_only(), py::arg("k"), py::arg("n"), py::arg("ranks"), py::arg("h_given"),
      py::arg("dh_given"), py::arg("needs_a"), py::arg("needs_b"), py::arg("needs_bias"),
      py::arg("tf32") = false, py::arg("writes_dh") = false, py::arg("rows"), py::arg("arch"),
      py::arg("processors"), py::arg("fours") = -1, py::arg("eights") = -1,
      "How the gradients are launched; None where a block cannot hold them.");

  m.def(
      "clusters_at_once",
      [](int device) {
        const ClusterCounts counts = clusters_at_once(device);
        return std::make_pair(counts.fours, counts.eights);
      },
      py::arg("device"),
      "Clusters of four blocks and of eight that the device runs at once; -1 where it cannot say.");
}

inline void bind_lora_grad(py::module_& m) {
  m.attr("grad_most_groups") = kMostGroups;
  m.attr("grad_most_ranks") = kMostRanks;
  bind_grad_plan(m);

  py::class_<GradGroup>(m, "GradGroup", py::module_local())
      .def(py::init(&grad_group), py::kw_only(), py::arg("a_strides"), py::arg("b_strides"),
           py::arg("first_column"), py::arg("columns"), py::arg("first_rank"), py::arg("rank"),
           py::arg("scale"));

  py::class_<BoundGrad>(m, "BoundGrad", py::module_local(),
                        "Partial sums of da, db and dbias from one read of x and dy.")
      .def(py::init<const GradPlan&, int64_t, int64_t, int64_t, int64_t,
                    const std::vector<GradGroup>&, int64_t, int64_t, DType, DType, Activation,
                    DType>(),
           py::kw_only(), py::arg("plan"), py::arg("x_row"), py::arg("dy_row"), py::arg("h_row"),
           py::arg("dh_row"), py::arg("groups"), py::arg("dh_out_row") = 0, py::arg("rows"),
           py::arg("type"), py::arg("adapter"), py::arg("activation") = Activation::kNone,
           py::arg("norm") = DType::kFloat32)
      .def("__call__", &BoundGrad::operator(), py::arg("at"), py::arg("device"), py::arg("stream"));
}

inline void bind_add_partials(py::module_& m) {
  m.attr("sum_most_pieces") = kMostPieces;

  py::class_<SumGroup>(m, "SumGroup", py::module_local())
      .def(py::init(&sum_group), py::kw_only(), py::arg("da_strides"), py::arg("db_strides"),
           py::arg("first_column"), py::arg("columns"), py::arg("first_rank"), py::arg("rank"),
           py::arg("scale"));

  py::class_<SumPiece>(m, "SumPiece", py::module_local())
      .def(py::init(&sum_piece), py::kw_only(), py::arg("slices"), py::arg("k"), py::arg("n"),
           py::arg("rank_blocks"), py::arg("groups"), py::arg("grad"), py::arg("dbias_type"),
           py::arg("add"));

  py::class_<BoundSums>(m, "BoundSums", py::module_local(),
                        "da, db and dbias of several passes from their partial sums.")
      .def(py::init<const std::vector<SumPiece>&>(), py::arg("pieces"))
      .def("__call__", &BoundSums::operator(), py::arg("at"), py::arg("device"), py::arg("stream"));
}

}  // namespace fused_lora
