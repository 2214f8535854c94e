// One block of lora_grad: a chunk of the columns of [x | dy] over a slice of the rows, a tile of
// 16 at a time, or of 8 where they are fp32.
//
//     16 columns a strip; a warp owns up to S strips, all of x or all of dy
//      [ x | x | x | dy | dy | dy | ... ]    make_x  of what is given for it, in its place:
//      GELU(u),
//                                                    or the LayerNorm of its input
//                                            shrink  h or dh of these rows: each warp its share
//   rows                                     settle  shares added in warp order, rounded
//                                            expand  da += xT dh, db += dyT h, in registers
//
// x and dy come by asynchronous copies, several tiles ahead: 16 bytes at a time that a thread waits
// for, or whole rows of a warp's columns that a barrier counts. The sums of a slice leave once, at
// the end; in a cluster of slices its blocks first add them up, each a share of the elements over
// all of them in order. Nothing depends on timing, so equal inputs give equal bits.
#pragma once

#include <type_traits>

#include "common/activation.h"
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
  // A thread settles one row of h and dh, in turns this many ranks apart.
  static constexpr int kRankStep = kGradThreads / L::kRows;
  static constexpr int kTurns = (L::kRanks + kRankStep - 1) / kRankStep;
  static constexpr bool kSumsBias = sizeof(T) == 4;
  static constexpr bool kMakesX = sizeof(T) == 2;           // where it is asked for
  static constexpr bool kCursor = forms && L::kLooksAhead;  // for dh; else found at each tile
  static constexpr int kBiasSums = kSumsBias ? S / 2 : 1;

 public:
  FL_DEVICE OnePass(const GradProblem& problem, const GradPlan& plan, char* shared, int slice,
                    int chunk)
      : problem_(problem), plan_(plan), shared_(shared), thread_(thread_index()), slice_(slice) {
    const int slot = chunk * kGradWarps + (bulk ? of_first_lane(warp()) : warp()),
              x_warps = plan.x_warps - chunk * kGradWarps;
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
    first_rank_ = slice % plan.cluster_slices;
    expands_ = expands(), shrinks_ = forms && shrinks(), t_mine_ = t(0, !is_dy_);
    hands_on_ = forms && problem.dh && chunk == 0;
    norms_ = kMakesX && !is_dy_ && problem.norm.mean;
    makes_x_ = norms_ || (kMakesX && !is_dy_ && problem.activation != Activation::kNone);
    settle_where();
    hand_on_where();
    copy_whence();
  }

  FL_DEVICE void run(float* partial) {
    prepare();
    for (int ahead = 0; ahead < plan_.stages - 1; ++ahead) copy(ahead);
    look_ahead();
    if (norms_ && L::kLooksAhead) read_statistics(tile_);
    int free = plan_.stages - 1;  // the stage that was read last
    for (int stage = 0, parity = 0, lap = 0; tile_ < end_; ++tile_, parity ^= 1) {
      wait(stage, lap);
      if constexpr (forms) {
        sync_warp();
        copy(free);
        if (makes_x_) make_x(stage);
        if (shrinks_) shrink(stage);
        sync_block();
        if (clusters()) share(parity);
      }
      settle(parity);
      look_ahead();
      sync_block();
      if constexpr (!forms) {
        copy(free);
        if (makes_x_) make_x(stage);
      }
      free = stage;
      if (expands_) expand(stage, parity);
      stage = stage + 1 == plan_.stages ? 0 : stage + 1;
      lap ^= stage == 0;
    }
    finish(partial);
  }

 private:
  FL_DEVICE int lane() const { return thread_ % 32; }
  FL_DEVICE int warp() const { return thread_ / 32; }
  FL_DEVICE bool clusters() const { return FL_CLUSTERS && plan_.in_clusters(); }
  FL_DEVICE bool adds_slices() const { return FL_CLUSTERS && plan_.cluster_slices > 1; }
  FL_DEVICE const GradSide& mine() const { return is_dy_ ? problem_.dy : problem_.x; }
  FL_DEVICE bool shrinks() const { return is_dy_ ? plan_.shape.forms_dh() : plan_.shape.forms_h(); }
  FL_DEVICE bool expands() const {
    return is_dy_ ? plan_.shape.needs_b || plan_.shape.needs_bias : plan_.shape.needs_a;
  }
  FL_DEVICE bool sums_bias() const { return kSumsBias && is_dy_ && plan_.shape.needs_bias; }
  // Whether no rank is left for this thread.
  FL_DEVICE bool beyond(int turn) const {
    return L::kRanks % kRankStep != 0 && rank_ + kRankStep * turn >= L::kRanks;
  }

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
  // This warp's sums, as the cluster reads them.
  FL_DEVICE float* totals() const {
    return reinterpret_cast<float*>(shared_ + L::kTotals + warp() * L::kWarpTotalBytes);
  }
  // In the cluster, of the first chunk of this slice; chunks are as far apart as there are slices.
  FL_DEVICE int first_rank() const { return FL_CLUSTERS ? first_rank_ : 0; }
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

  // Where this lane's next copy begins, or the warp's, and how many rows of the slice are left.
  FL_DEVICE void copy_whence() {
    const int row = bulk ? 0 : row_of_lane(), column = bulk ? 0 : lane() % 4 * L::kPiece;
    const int64_t first = static_cast<int64_t>(tile_) * L::kRows + row;
    const int64_t last = static_cast<int64_t>(end_) * L::kRows;
    left_ = static_cast<int>((last < problem_.rows ? last : problem_.rows) - first);
    eight_rows_ = 8 * mine().row;
    from_ = static_cast<const Bits*>(mine().z) + first_ + column + first * mine().row;
    narrow_ = width_ - column;
  }

  // Eight lanes write at once: to rows that begin half the banks apart.
  FL_DEVICE int row_of_lane() const { return lane() / 8 + lane() / 4 % 2 * 4; }

  // Of the next tile to this stage.
  FL_DEVICE void copy(int stage) {
    if constexpr (bulk) {
      copy_rows(stage);
    } else {
      copy_words(stage);
      commit_copies();
    }
    from_ += L::kRows / 8 * eight_rows_;
    left_ -= L::kRows;
  }

  // Four lanes have 64 bytes of a row, eight rows at a time. What lies beyond is zeros.
  FL_DEVICE void copy_words(int stage) {
    Bits* to = tile(stage) + row_of_lane() * L::kTilePitch + lane() % 4 * L::kPiece;
    const Bits* from = from_;
    FL_UNROLL
    for (int m = 0; m < L::kRows; m += 8, from += eight_rows_) {
      FL_UNROLL
      for (int c = 0; c < 16 * S; c += 4 * L::kPiece) {
        copy_16(to + m * L::kTilePitch + c, from + c, m < left_ && c < narrow_);
      }
    }
  }

  // One lane copies all rows: where the compiler sees that, and that their addresses are the
  // warp's, each is two or three instructions, and no loop over lanes. Rows past the last are
  // zeros, which nothing is copied over later.
  FL_DEVICE void copy_rows(int stage) {
    if (left_ <= 0 || width_ <= 0) return;
    const int bytes = static_cast<int>(sizeof(T)) * width_;
    if (left_ >= L::kRows) {
      if (elected()) copy_of_rows<true>(stage, L::kRows, bytes);
      return;
    }
    if (elected()) copy_of_rows<false>(stage, left_, bytes);
    if (lane() < left_ || lane() >= L::kRows) return;
    Bits* to = tile(stage) + lane() * L::kTilePitch;
    FL_UNROLL_BY(1)
    for (int c = 0; c < width_; c += L::kPiece) *reinterpret_cast<Sixteen*>(to + c) = {};
  }

  template <bool whole>  // a tile; the last of x and dy may not be
  FL_DEVICE void copy_of_rows(int stage, int rows, int bytes) {
    expect_bytes(barrier(stage), rows * bytes);
    const int64_t row = mine().row;
    const Bits* from = from_;
    FL_UNROLL_BY(whole ? L::kRows : 1)
    for (int m = 0; m < rows; ++m, from += row) {
      copy_bulk(tile(stage) + m * L::kTilePitch, from, bytes, barrier(stage));
    }
  }

  FL_DEVICE void wait(int stage, int lap) {
    if constexpr (bulk) {
      if (width_ > 0) wait_barrier(barrier(stage), lap);
      return;
    }
    wait_copies<L::kUsualStages - 2>();
    if constexpr (L::kUsualStages > 2) {
      if (plan_.stages != L::kUsualStages) wait_copies<0>();  // planned for another chip
    }
  }

  // Where this thread reads h or dh of the next tile, and how many rows are left from there on.
  struct Given {
    const Bits* at;
    int64_t tile;
    int left;

    Given() = default;
    FL_DEVICE Given(const GradSide& side, int64_t row, int rank, int rows)
        : at(static_cast<const Bits*>(side.given) + row * side.given_row + rank),
          tile(L::kRows * side.given_row),
          left(side.given ? rows : 0) {}
    FL_DEVICE void step() { at += tile, left -= L::kRows; }
  };

  // Threads of a warp settle two rows whose sums, and whose place in t, begin half the banks apart.
  FL_DEVICE void settle_where() {
    constexpr int kApart = 32 / L::kPiece / 2, kOfRanks = 16 * L::kRows;  // threads
    const int pair = thread_ % kOfRanks / 32;
    row_ = pair / kApart * 2 * kApart + pair % kApart + thread_ / 16 % 2 * kApart;
    rank_ = thread_ / kOfRanks * 16 + thread_ % 16;
    if constexpr (L::kLooksAhead) h_ = given_now(problem_.x), dh_ = given_now(problem_.dy);
  }

  // The row of this tile that this thread settles, and how many rows of the slice begin there.
  FL_DEVICE int64_t row_now() const { return static_cast<int64_t>(tile_) * L::kRows + row_; }
  FL_DEVICE int rows_left() const {
    const int64_t last = static_cast<int64_t>(end_) * L::kRows;
    return static_cast<int>((last < problem_.rows ? last : problem_.rows) - row_now());
  }

  FL_DEVICE Given given_now(const GradSide& side) const {
    return {side, row_now(), rank_, rows_left()};
  }

  // The elements of the next tile's h and dh that this thread settles, where they are given.
  FL_DEVICE void look_ahead() {
    if constexpr (L::kLooksAhead) {
      FL_UNROLL
      for (int i = 0; i < kTurns; ++i) {
        const Both h = given(h_, i), dh = given(dh_, i);
        given_[i] = h | dh << 8 * sizeof(T);
      }
      h_.step(), dh_.step();
    }
  }

  FL_DEVICE Bits given(const Given& side, int turn) const {
    const bool there = side.left > 0 && rank_ + kRankStep * turn < problem_.ranks;
    return there ? side.at[kRankStep * turn] : Bits(0);
  }

  // x of what is given for it, where this warp alone reads it. What lies beyond is zeros, and stays
  // so.
  FL_DEVICE void make_x(int stage) {
    if constexpr (kMakesX) {
      if (norms_) {
        normalise(stage);
      } else if (problem_.activation == Activation::kErf) {
        activate<Activation::kErf>(stage);
      } else {
        activate<Activation::kTanh>(stage);
      }
      if constexpr (bulk) fence_writes();
      sync_warp();
    }
  }

  // A lane has 16 bytes of a strip, eight lanes eight rows, which begin in different banks.
  FL_DEVICE Bits* pieces(int stage) const {
    return tile(stage) + lane() % L::kRows * L::kTilePitch + lane() / L::kRows * L::kPiece;
  }

  // The row of them in this tile.
  FL_DEVICE int64_t row_of_pieces(int tile) const {
    return static_cast<int64_t>(tile) * L::kRows + lane() % L::kRows;
  }

  FL_DEVICE void read_statistics(int tile) {
    const int64_t row = row_of_pieces(tile);
    if (row >= problem_.rows) return;
    mean_ = read_only(problem_.norm.mean + row), rstd_ = read_only(problem_.norm.rstd + row);
  }

  // (z - mean) rstd gamma + beta; without gamma (z - mean) rstd + beta, which then is rounded once.
  FL_DEVICE void normalise(int stage) {
    if (!L::kLooksAhead) read_statistics(tile_);
    const GradNorm& norm = problem_.norm;
    const float first = norm.gamma ? rstd_ : 1.0f, last = norm.gamma ? 1.0f : rstd_;
    const int columns = row_of_pieces(tile_) < problem_.rows ? width_ : 0;
    Bits* at = pieces(stage);
    FL_UNROLL_BY(1)
    for (int c = lane() / L::kRows * L::kPiece; c < columns; c += 16, at += 16) {
      Sixteen piece = *reinterpret_cast<Sixteen*>(at);
      FL_UNROLL
      for (int i = 0; i < 4; i += 2) {
        const Four gamma = four_of(norm.gamma, first_ + c + 2 * i, norm.type, last),
                   beta = four_of(norm.beta, first_ + c + 2 * i, norm.type, 0.0f);
        FL_UNROLL
        for (int j = 0; j < 2; ++j) {
          Pair x = pair_of<T>(piece.at, 2 * (i + j));
          FL_UNROLL
          for (int k = 0; k < 2; ++k) {
            x.at[k] = (x.at[k] - mean_) * first * gamma.at[2 * j + k] + beta.at[2 * j + k];
          }
          piece.at[i + j] = packed<T>(x);
        }
      }
      *reinterpret_cast<Sixteen*>(at) = piece;
    }
    if (L::kLooksAhead) read_statistics(tile_ + 1);
  }

  template <Activation activation>
  FL_DEVICE void activate(int stage) {
    Bits* at = pieces(stage);
    FL_UNROLL_BY(1)
    for (int s = 0; s < strips_; ++s, at += 16) {
      Sixteen piece = *reinterpret_cast<Sixteen*>(at);
      FL_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Pair u = pair_of<T>(piece.at, 2 * i);
        piece.at[i] = packed<T>({{activated<activation>(u.at[0]), activated<activation>(u.at[1])}});
      }
      *reinterpret_cast<Sixteen*>(at) = piece;
    }
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
    FL_UNROLL_BY(L::kLooksAhead ? kTurns : 1)
    for (int i = 0; i < kTurns; ++i) {
      if (beyond(i)) break;
      const int r = rank_ + kRankStep * i;
      Bits h, dh;
      if constexpr (L::kLooksAhead) {
        h = P::rounded(static_cast<Bits>(given_[i]));
        dh = P::rounded(static_cast<Bits>(given_[i] >> 8 * sizeof(T)));
      } else {
        h = P::rounded(given(given_now(problem_.x), i));
        dh = P::rounded(given(given_now(problem_.dy), i));
      }
      if constexpr (forms) {
        const Totals total = clusters() ? cluster_totals(parity, i) : block_totals(i);
        if (plan_.shape.forms_h()) h = nearest<T>(total.h).bits;
        if (plan_.shape.forms_dh()) dh = nearest<T>(scales()[r] * total.dh).bits;
      }
      if (r == problem_.ranks) h = nearest<T>(1.0f).bits;
      t(parity, false)[row_ * L::kTPitch + r] = h;
      t(parity, true)[row_ * L::kTPitch + r] = dh;
      if constexpr (forms) hand_on(i, dh);
    }
    if constexpr (kCursor) to_ += L::kRows * problem_.dh_row, to_left_ -= L::kRows;
  }

  struct Totals {
    float h, dh;
  };

  FL_DEVICE void hand_on_where() {
    if constexpr (!kCursor) return;
    to_ = static_cast<Bits*>(problem_.dh) + row_now() * problem_.dh_row + rank_;
    to_left_ = hands_on_ ? rows_left() : 0;
  }

  // dh as this thread settled it, to whoever forms dx; the blocks of a cluster have it alike.
  FL_DEVICE void hand_on(int turn, Bits dh) const {
    const int r = rank_ + kRankStep * turn;
    if constexpr (kCursor) {
      if (to_left_ > 0 && r < problem_.ranks) to_[kRankStep * turn] = dh;
    } else if (hands_on_ && row_now() < problem_.rows && r < problem_.ranks) {
      static_cast<Bits*>(problem_.dh)[row_now() * problem_.dh_row + r] = dh;
    }
  }

  // In warp order; warps of x come first.
  FL_DEVICE Totals block_totals(int turn) const {
    const float* share = sums(0) + row_ * L::kSumPitch + rank_ + kRankStep * turn;
    Totals total = {};
    FL_UNROLL
    for (int w = 0; w < kGradWarps; ++w) {
      const float of_warp = share[w * (L::kWarpSumBytes / 4)];
      (w < x_warps_ ? total.h : total.dh) += of_warp;
    }
    return total;
  }

  FL_DEVICE Totals cluster_totals(int parity, int turn) const {
    const int e = thread_ + kGradThreads * turn;
    Totals total = {};
    for (int chunk = 0, rank = first_rank(); chunk < plan_.chunks; ++chunk) {
      total.h += load_cluster(shares(parity, false) + e, rank);
      total.dh += load_cluster(shares(parity, true) + e, rank);
      rank += plan_.cluster_slices;
    }
    return total;
  }

  // This block's part of h and dh, for the whole cluster to add up.
  FL_DEVICE void share(int parity) {
    FL_UNROLL_BY(1)
    for (int i = 0; i < kTurns; ++i) {
      if (beyond(i)) break;
      const Totals total = block_totals(i);
      const int e = thread_ + kGradThreads * i;
      shares(parity, false)[e] = total.h, shares(parity, true)[e] = total.dh;
    }
    sync_cluster();
  }

  FL_DEVICE void expand(int stage, int parity) {
    if (sums_bias()) add_bias(stage);
    const Bits* mine = t_mine_ + parity * (L::kTBytes / sizeof(Bits) * 2);
    FL_UNROLL
    for (int first = 0; first < RB; first += L::kAtOnce) {
      uint32_t tb[L::kAtOnce][4];
      FL_UNROLL
      for (int b = 0; b < L::kAtOnce; ++b) {
        P::load_ranks(tb[b], mine + 16 * (first + b), L::kTPitch, lane());
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

  // The sums of this slice, or of its cluster, to where they belong of [partials, columns, R].
  FL_DEVICE void finish(float* partial) {
    const int64_t size = static_cast<int64_t>(plan_.columns()) * L::kRanks;
    const int before = (is_dy_ ? 16 * plan_.x_strips : 0) + first_;
    partial += slice_ / plan_.cluster_slices * size + before * L::kRanks;
    if (adds_slices()) leave_tiles();
    if (expands()) store(adds_slices() ? totals() : partial);
    if (adds_slices()) {
      sync_cluster();
      if (expands()) add_slices(partial);
    }
    if (clusters() || adds_slices()) sync_cluster();  // others may still read what this block has
  }

  // Until no block of the cluster has a use for what totals() are written over.
  FL_DEVICE void leave_tiles() {
    if constexpr (!bulk) wait_copies<0>();
    const int64_t tiles = (problem_.rows + L::kRows - 1) / L::kRows;
    const int64_t own = end_ - tiles * slice_ / plan_.slices;
    // Blocks that share h and dh meet at each tile, of which some slices have one more.
    if (clusters() && own * plan_.slices < tiles) sync_cluster();
    sync_cluster();
  }

  // This block's share of the elements, 16 bytes a lane, over the slices of the cluster in order.
  FL_DEVICE void add_slices(float* to) const {
    const int slices = plan_.cluster_slices, floats = 16 * strips_ * L::kRanks;
    const int first = cluster_rank() - first_rank();  // of those that have this chunk
    FL_UNROLL_BY(1)
    for (int i = 4 * (32 * first_rank() + lane()); i < floats; i += 128 * slices) {
      Four sum = {};
      FL_UNROLL_BY(4)
      for (int slice = 0; slice < slices; ++slice) {
        float next[4];
        load_cluster(next, totals() + i, first + slice);
        FL_UNROLL
        for (int j = 0; j < 4; ++j) sum.at[j] += next[j];
      }
      *reinterpret_cast<Four*>(to + i) = sum;
    }
  }

  // To [columns of this warp, R].
  FL_DEVICE void store(float* partial) {
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
  int thread_, slice_, first_rank_, x_warps_, strips_, first_, width_, tile_, end_;
  bool is_dy_, expands_, shrinks_;
  bool makes_x_, norms_;  // of what is given for it; as a LayerNorm
  float mean_, rstd_;     // of this lane's row
  bool hands_on_;         // dh, where it is formed: the first block of a cluster
  Bits* to_;              // where this thread's dh of the next tile goes,
  int to_left_;         // and how many rows are left from there on, none where it is not asked for
  const Bits* t_mine_;  // what this warp expands with
  const Bits* from_;    // this lane's next copy
  int64_t eight_rows_;
  int left_, narrow_;  // rows and columns from there on
  int row_, rank_;     // of h and dh, that this thread settles first
  Given h_, dh_;
  float sum_[S][2 * RB][4];  // da or db of this warp's columns
  float bias_[kBiasSums];    // of this lane's columns
  Fragment kept_[L::kKeeps ? L::kFragments : 1];
  Both given_[kTurns];  // of h below, of dh above
};

}  // namespace fused_lora
