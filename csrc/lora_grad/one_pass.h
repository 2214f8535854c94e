// One block of lora_grad: a chunk of the columns of [x | dy] over a slice of the rows, a tile of
// 16 at a time, or of 8 where they are fp32.
//
//     16 columns a strip; a warp owns up to S strips, all of x or all of dy
//      [ x | x | x | dy | dy | dy | ... ]    shrink  h or dh of these rows: each warp its share
//   rows                                     settle  shares added in warp order, rounded
//                                            expand  da += xT dh, db += dyT h, in registers
//
// x and dy come by asynchronous copies, several tiles ahead: 16 bytes at a time that a thread waits
// for, or whole rows of a warp's columns that a barrier counts. The sums of a slice leave once, at
// the end. Nothing depends on timing, so equal inputs give equal bits.
#pragma once

#include <type_traits>

#include "lora_grad/products.h"

namespace fused_lora {

struct alignas(16) Sixteen {
  uint32_t at[4];
};

template <typename T,  // of products
          int S, int RB, bool forms,
          bool bulk  // copies of rows
          >
class OnePass {
  using L = GradLayout<T, S, RB, forms>;
  using P = Products<T>;
  using Bits = typename P::Bits;  // of an element of x, dy, h or dh
  using Both = std::conditional_t<sizeof(T) == 4, uint64_t, uint32_t>;
  static constexpr int kElements = L::kRows * L::kRanks;  // of h, or of dh, in a tile
  static constexpr int kTurns = (kElements + kGradThreads - 1) / kGradThreads;
  static constexpr bool kSumsBias = sizeof(T) == 4;
  static constexpr int kBiasSums = kSumsBias ? S / 2 : 1;

 public:
  FL_DEVICE OnePass(const GradProblem& problem, const GradPlan& plan, char* shared, int slice,
                    int chunk)
      : problem_(problem), plan_(plan), shared_(shared), thread_(thread_index()) {
    const int slot = chunk * kGradWarps + warp(), x_warps = plan.x_warps - chunk * kGradWarps;
    x_warps_ = x_warps < 0 ? 0 : x_warps < kGradWarps ? x_warps : kGradWarps;
    is_dy_ = slot >= plan.x_warps;
    const int before = (is_dy_ ? slot - plan.x_warps : slot) * plan.strips_per_warp;
    const int after = (is_dy_ ? plan.dy_strips : plan.x_strips) - before;
    strips_ = after < 0 ? 0 : after < plan.strips_per_warp ? after : plan.strips_per_warp;
    first_ = 16 * before;
    const int left = mine().columns - first_;
    width_ = left < 16 * strips_ ? left : 16 * strips_;
    const int64_t tiles = (problem.rows + L::kRows - 1) / L::kRows;
    tile_ = static_cast<int>(tiles * slice / plan.slices);
    end_ = static_cast<int>(tiles * (slice + 1) / plan.slices);
  }

  FL_DEVICE void run(float* partial) {
    prepare();
    for (int ahead = 0; ahead < plan_.stages - 1; ++ahead) copy(tile_ + ahead, ahead);
    look_ahead(tile_);
    for (int stage = 0, parity = 0, lap = 0; tile_ < end_; ++tile_, parity ^= 1) {
      wait(stage, lap);
      sync_warp();
      copy(tile_ + plan_.stages - 1, stage == 0 ? plan_.stages - 1 : stage - 1);
      if constexpr (forms) {
        if (shrinks()) shrink(stage);
        sync_block();
        if (clusters()) share(parity);
      }
      settle(parity);
      look_ahead(tile_ + 1);
      sync_block();
      if (expands()) expand(stage, parity);
      stage = stage + 1 == plan_.stages ? 0 : stage + 1;
      lap ^= stage == 0;
    }
    if (expands()) store(partial);
    if (clusters()) sync_cluster();  // others may still read this block's share
  }

 private:
  FL_DEVICE int lane() const { return thread_ % 32; }
  FL_DEVICE int warp() const { return thread_ / 32; }
  FL_DEVICE bool clusters() const { return FL_CLUSTERS && plan_.in_clusters(); }
  FL_DEVICE const GradSide& mine() const { return is_dy_ ? problem_.dy : problem_.x; }
  FL_DEVICE bool shrinks() const { return is_dy_ ? plan_.shape.forms_dh() : plan_.shape.forms_h(); }
  FL_DEVICE bool expands() const {
    return is_dy_ ? plan_.shape.needs_b || plan_.shape.needs_bias : plan_.shape.needs_a;
  }
  FL_DEVICE bool sums_bias() const { return kSumsBias && is_dy_ && plan_.shape.needs_bias; }
  // Whether no element of h is left for a thread.
  FL_DEVICE static bool beyond(int e) { return kElements % kGradThreads != 0 && e >= kElements; }

  FL_DEVICE float* scales() const { return reinterpret_cast<float*>(shared_ + L::kScales); }
  FL_DEVICE Bits* tile(int stage) const {
    return reinterpret_cast<Bits*>(shared_ + L::kTiles + stage * L::kStageBytes +
                                   warp() * L::kWarpTileBytes);
  }
  FL_DEVICE uint64_t* barrier(int stage) const {
    return reinterpret_cast<uint64_t*>(shared_ + L::kBarriers) + warp() * kMostStages + stage;
  }
  FL_DEVICE float* sums(int warp) const {
    return reinterpret_cast<float*>(shared_ + L::kSums + warp * L::kWarpSumBytes);
  }
  // h, or dh.
  FL_DEVICE Bits* t(int parity, bool is_dh) const {
    return reinterpret_cast<Bits*>(shared_ + L::kT + (2 * parity + is_dh) * L::kTBytes);
  }
  // A block's part of h, or of dh.
  FL_DEVICE float* shares(int parity, bool is_dh) const {
    return reinterpret_cast<float*>(shared_ + plan_.smem_bytes - L::kAllShareBytes +
                                    (2 * parity + is_dh) * L::kShareBytes);
  }
  // Of this lane: rank blocks of the first columns, of the next.
  FL_DEVICE Fragment& slot(int index) const {
    return reinterpret_cast<Fragment*>(shared_ + L::kSlotsAt +
                                       (warp() * L::kSlots + index) * L::kFragmentBytes)[lane()];
  }

  FL_DEVICE void prepare() {
    if constexpr (forms) {
      if (thread_ < L::kRanks) {
        const int g = group_of(problem_, thread_);
        scales()[thread_] = g < problem_.groups ? problem_.group[g].scale : 0.0f;
      }
      if constexpr (L::kKeeps) {
        FL_UNROLL
        for (int i = 0; i < L::kFragments; ++i) {
          if (i % L::kSlots == 0 && shrinks()) make_fragments(i);
          kept_[i] = shrinks() ? slot(i % L::kSlots) : Fragment{};
        }
        sync_block();  // tiles of other warps lie where fragments did
      } else {
        if (shrinks()) make_fragments(0);
      }
    }
    // No copy touches what lies beyond this warp's columns; it must not be NaN.
    for (int stage = 0; stage < plan_.stages; ++stage) {
      Sixteen* words = reinterpret_cast<Sixteen*>(tile(stage));
      for (int i = lane(); i < L::kWarpTileBytes / 16; i += 32) words[i] = {};
      if (bulk && lane() == 0) init_barrier(barrier(stage));
    }
    if (bulk) fence_copies();
    sync_warp();
    FL_UNROLL
    for (int s = 0; s < S; ++s) {
      FL_UNROLL
      for (int j = 0; j < 2 * RB; ++j) {
        FL_UNROLL
        for (int i = 0; i < 4; ++i) sum_[s][j][i] = 0.0f;
      }
    }
    for (float& sum : bias_) sum = 0.0f;
  }

  // As many as there are slots, from this one on.
  FL_DEVICE void make_fragments(int from) {
    constexpr int kAtOnce = 32 / L::kRows;  // so that sixteen loads are under way
    static_assert(L::kSlots % kAtOnce == 0);
    for (int i = 0; i < L::kSlots; i += kAtOnce) {
      Fragment made[kAtOnce];
      FL_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const int index = from + i + j;
        made[j] = fragment_of<T>(problem_, is_dy_, first_ + index / RB * L::kRows, index % RB * 16,
                                 lane());
      }
      FL_UNROLL
      for (int j = 0; j < kAtOnce; ++j) slot(i + j) = made[j];
    }
  }

  FL_DEVICE void copy(int from, int stage) {
    if constexpr (bulk) {
      if (from < end_ && width_ > 0) copy_rows(from, stage);
    } else {
      if (from < end_) copy_words(from, stage);
      commit_copies();
    }
  }

  FL_DEVICE const Bits* row_of(int64_t row) const {
    return static_cast<const Bits*>(mine().z) + first_ + row * mine().row;
  }

  FL_DEVICE void copy_words(int from, int stage) {
    constexpr int kPieces = 16 * S / L::kPiece;  // of a row
    Bits* to = tile(stage);
    FL_UNROLL_BY(1)  // addresses ahead would take the registers of sums
    for (int i = 0; i < S; ++i) {
      const int m = (lane() + 32 * i) / kPieces, c = (lane() + 32 * i) % kPieces * L::kPiece;
      const int64_t row = static_cast<int64_t>(from) * L::kRows + m;
      const bool inside = row < problem_.rows;
      if (c < width_) {
        copy_16(to + m * L::kTilePitch + c, row_of(inside ? row : 0) + c, inside);
      }
    }
  }

  // A lane has a row. Rows past the last are zeros, which nothing is copied over later.
  FL_DEVICE void copy_rows(int from, int stage) {
    const int64_t row = static_cast<int64_t>(from) * L::kRows + lane();
    const int64_t left = problem_.rows - (row - lane());
    const int rows = left < L::kRows ? static_cast<int>(left) : L::kRows;
    const int bytes = static_cast<int>(sizeof(T)) * width_;
    if (lane() == 0) expect_bytes(barrier(stage), rows * bytes);
    sync_warp();
    if (lane() >= L::kRows) return;
    Bits* to = tile(stage) + lane() * L::kTilePitch;
    if (lane() < rows) {
      copy_bulk(to, row_of(row), bytes, barrier(stage));
    } else {
      for (int c = 0; c < width_; c += L::kPiece) *reinterpret_cast<Sixteen*>(to + c) = {};
    }
  }

  FL_DEVICE void wait(int stage, int lap) {
    if constexpr (bulk) {
      if (width_ > 0) wait_barrier(barrier(stage), lap);
      return;
    }
    switch (plan_.stages) {
      case 2: return wait_copies<0>();
      case 3: return wait_copies<1>();
      default: return wait_copies<2>();
    }
  }

  // The elements of a tile's h and dh that this thread settles, where they are given.
  FL_DEVICE void look_ahead(int from) {
    if constexpr (!L::kLooksAhead) return;
    FL_UNROLL
    for (int i = 0; i < kTurns; ++i) {
      const int e = thread_ + kGradThreads * i;
      const Both h = given(problem_.x, from, e), dh = given(problem_.dy, from, e);
      given_[i] = h | dh << 8 * sizeof(T);
    }
  }

  FL_DEVICE Bits given(const GradSide& side, int from, int e) const {
    const int64_t row = static_cast<int64_t>(from) * L::kRows + e / L::kRanks;
    const int r = e % L::kRanks;
    if (!side.given || from >= end_ || row >= problem_.rows || r >= problem_.ranks) return 0;
    if (beyond(e)) return 0;
    return static_cast<const Bits*>(side.given)[row * side.given_row + r];
  }

  FL_DEVICE void shrink(int stage) {
    FL_UNROLL
    for (int first = 0; first < RB; first += L::kAtOnce) {
      float sum[L::kAtOnce][P::kShares][4] = {};
      FL_UNROLL
      for (int s = 0; s < S; ++s) {
        uint32_t zs[4];
        P::load_rows(zs, tile(stage) + 16 * s, L::kTilePitch, lane());
        FL_UNROLL
        for (int b = 0; b < L::kAtOnce; ++b) {
          Fragment f[P::kParts];
          FL_UNROLL
          for (int i = 0; i < P::kParts; ++i) {
            f[i] = fragment_at((s * P::kParts + i) * RB + first + b);
          }
          P::shrink(sum[b], zs, f);
        }
      }
      FL_UNROLL
      for (int b = 0; b < L::kAtOnce; ++b) {
        P::put(sums(warp()) + 16 * (first + b), sum[b], L::kSumPitch, lane());
      }
    }
  }

  FL_DEVICE Fragment fragment_at(int index) const {
    if constexpr (L::kKeeps) {
      return kept_[index];
    } else {
      return slot(index);
    }
  }

  // h and dh of this tile, from the warps' shares or as given. Rank `ranks` of h is one: its
  // gradient is dbias, unless that is added up beside the products.
  FL_DEVICE void settle(int parity) {
    settle(parity, false);
    settle(parity, true);
  }

  FL_DEVICE void settle(int parity, bool is_dh) {
    const bool formed = is_dh ? plan_.shape.forms_dh() : plan_.shape.forms_h();
    FL_UNROLL_BY(L::kLooksAhead ? kTurns : 1)
    for (int i = 0; i < kTurns; ++i) {
      const int e = thread_ + kGradThreads * i, m = e / L::kRanks, r = e % L::kRanks;
      if (beyond(e)) return;
      Bits bits;
      if (forms && formed) {
        const float total = clusters() ? cluster_total(shares(parity, is_dh) + e)
                                       : block_total(is_dh, m * L::kSumPitch + r);
        bits = nearest<T>(is_dh ? scales()[r] * total : total).bits;
      } else if constexpr (L::kLooksAhead) {
        bits = P::rounded(static_cast<Bits>(is_dh ? given_[i] >> 8 * sizeof(T) : given_[i]));
      } else {
        bits = P::rounded(given(is_dh ? problem_.dy : problem_.x, tile_, e));
      }
      if (!is_dh && r == problem_.ranks) bits = nearest<T>(1.0f).bits;
      t(parity, is_dh)[m * L::kTPitch + r] = bits;
    }
  }

  FL_DEVICE float block_total(bool is_dh, int at) const {
    float total = 0.0f;
    const int end = is_dh ? kGradWarps : x_warps_;
    for (int w = is_dh ? x_warps_ : 0; w < end; ++w) total += sums(w)[at];
    return total;
  }

  FL_DEVICE float cluster_total(const float* share) const {
    float total = 0.0f;
    for (int block = 0; block < plan_.chunks; ++block) total += load_cluster(share, block);
    return total;
  }

  // This block's part of h and dh, for the whole cluster to add up.
  FL_DEVICE void share(int parity) {
    FL_UNROLL_BY(1)
    for (int i = 0; i < 2 * kTurns; ++i) {
      const bool is_dh = i >= kTurns;
      const int e = thread_ + kGradThreads * (i % kTurns), m = e / L::kRanks, r = e % L::kRanks;
      if (beyond(e)) continue;
      if (is_dh ? plan_.shape.forms_dh() : plan_.shape.forms_h()) {
        shares(parity, is_dh)[e] = block_total(is_dh, m * L::kSumPitch + r);
      }
    }
    sync_cluster();
  }

  FL_DEVICE void expand(int stage, int parity) {
    if (sums_bias()) add_bias(stage);
    FL_UNROLL
    for (int first = 0; first < RB; first += L::kAtOnce) {
      uint32_t tb[L::kAtOnce][4];
      FL_UNROLL
      for (int b = 0; b < L::kAtOnce; ++b) {
        P::load_ranks(tb[b], t(parity, !is_dy_) + 16 * (first + b), L::kTPitch, lane());
      }
      FL_UNROLL
      for (int s = 0; s < S; ++s) {
        uint32_t zs[4];
        P::load_columns(zs, tile(stage) + 16 * s, L::kTilePitch, lane());
        FL_UNROLL
        for (int b = 0; b < L::kAtOnce; ++b) {
          multiply<T>(sum_[s][2 * (first + b)], zs, tb[b][0], tb[b][1]);
          multiply<T>(sum_[s][2 * (first + b) + 1], zs, tb[b][2], tb[b][3]);
        }
      }
    }
  }

  // dbias is a sum and no product: where products round dy, it is added up beside them.
  FL_DEVICE void add_bias(int stage) {
    FL_UNROLL
    for (int i = 0; i < kBiasSums; ++i) {
      FL_UNROLL
      for (int m = 0; m < L::kRows; ++m) {
        bias_[i] += float_of(tile(stage)[m * L::kTilePitch + 32 * i + lane()]);
      }
    }
  }

  // To this slice's [columns of x | dy, R].
  FL_DEVICE void store(float* partial) {
    partial += static_cast<int64_t>((is_dy_ ? 16 * plan_.x_strips : 0) + first_) * L::kRanks;
    float* to = partial + P::column(lane()) * L::kRanks + lane() % 4 * 2;
    FL_UNROLL
    for (int s = 0; s < S; ++s) {
      if (s >= strips_) break;
      FL_UNROLL
      for (int j = 0; j < 2 * RB; ++j) {
        float* low = to + 16 * s * L::kRanks + 8 * j;
        *reinterpret_cast<Two*>(low) = {{sum_[s][j][0], sum_[s][j][1]}};
        *reinterpret_cast<Two*>(low +
                                P::kNextColumn * L::kRanks) = {{sum_[s][j][2], sum_[s][j][3]}};
      }
    }
    if (sums_bias()) store_bias(partial);
  }

  FL_DEVICE void store_bias(float* partial) const {
    sync_warp();  // other lanes have stored ranks beside it
    FL_UNROLL
    for (int i = 0; i < kBiasSums; ++i) {
      const int c = 32 * i + lane();
      if (c < 16 * strips_) partial[c * L::kRanks + problem_.ranks] = bias_[i];
    }
  }

  const GradProblem& problem_;
  const GradPlan& plan_;
  char* shared_;
  int thread_, x_warps_, strips_, first_, width_, tile_, end_;
  bool is_dy_;
  float sum_[S][2 * RB][4];  // da or db of this warp's columns
  float bias_[kBiasSums];    // of this lane's columns
  Fragment kept_[L::kKeeps ? L::kFragments : 1];
  Both given_[kTurns];  // of h below, of dh above
};

}  // namespace fused_lora
