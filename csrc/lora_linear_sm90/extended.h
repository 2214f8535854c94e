// One block of lora_linear, or of a pair that shares w, from tile to tile of y.
//
//   producer    copies a stage of x and of w, or of h and of a border, as soon as one is empty
//   consumers   multiply stage after stage into their sums, give them their epilogue, and copy y
//               out while the next stages arrive
//
//            K in steps of 64           R_g in steps of 64, for each group that the tile meets
//   tile  [ x w | x w | ... | x w ]  [ h_0 border_0 | ... ] [ h_1 border_1 | ... ]     one sum
//
// A border is zero outside its group's columns and a rank beyond the last is zero, as the copy
// engine fills what lies outside a matrix; so a tile may hold columns of several groups, and of
// none. What a sum passes through on its way to y is fp32, and rounded as it is stored.
//
// A pair of blocks is a cluster, and has tiles one below the other, with the same columns of w.
// Each block copies half of a stage of w to both, so that w is read once. A stage is full when
// both halves and the block's own x are there. It is empty when the consumers of both blocks have
// read it, since whoever fills it next writes to both.
//
//             block 0                block 1
//   stage   [ x 0 | w upper, w lower | x 1 ]       w upper copied by block 0, w lower by block 1
//
// Consumers share a tile, and write y together; or they are in ping-pong, a tile for each by turns,
// and while one writes its tile the other multiplies. Whose the next stages are not passes over
// them, and a stage is empty when the four warps it is for have read it:
//
//   consumer 0   [ multiply tile 0 ][ write tile 0    ]   [ multiply tile 2 ][ write tile 2 ...
//   consumer 1                      [ multiply tile 1 ][ write tile 1    ]  ...
//
// A consumer begins a tile when the other has seen all stages of the tile before full. Parity knows
// a phase from its neighbours alone: who waited for a stage whose last phase is still to come, as
// it belongs to the other's tile, would be let through by the phase before that.
//
//   w by rows     u = sum + bias      y = residual + factor act(u)
//   w by columns  u is read           y = residual + factor act'(u) (sum + bias)
#pragma once

#include "common/activation.h"
#include "common/hopper.h"
#include "lora_linear_sm90/arguments.h"

namespace fused_lora::sm90 {

// A place in the ring of stages. A stage's barriers have their first phase end at parity 0.
template <int stages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  FL_DEVICE void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }

  FL_DEVICE void skip(int count) {
    stage += count;
    parity ^= stage / stages % 2;
    stage %= stages;
  }
};

template <typename T,             // of every matrix
          typename Tile,          // LinearTile
          Right right,            // how w and the borders lie
          Activation activation>  // after the bias; by columns its derivative
class Extended {
  static constexpr int kSums = Tile::kConsumerColumns / 2;
  static constexpr bool kTransposed = right == Right::kColumns;
  static constexpr int kCluster = Tile::kCluster;

 public:
  FL_DEVICE Extended(const LinearArguments& arguments, char* shared, int block, int blocks)
      : arguments_(arguments),
        cluster_(block / kCluster),
        clusters_(blocks / kCluster),
        in_cluster_(block % kCluster) {
    const uint32_t address = shared_address(shared);
    shared_ = (address + kAlignment - 1) / kAlignment * kAlignment;
  }

  FL_DEVICE void run() {
    if (thread_index() == 0) {
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), 4 * Tile::kReaders * kCluster);
      }
      if (Tile::kPingPong) init_barrier(turn(0), 4), init_barrier(turn(1), 4);
      publish_barriers();
    }
    sync_block();
    if constexpr (kCluster > 1) sync_cluster();
    // A warpgroup each; 128 x 40 + 256 x 232 registers are all but a few of a processor's.
    if (thread_index() < 128) {
      give_registers<40>();
      if (thread_index() == 0) produce();
    } else {
      take_registers<232>();
      consume();
    }
    if constexpr (kCluster > 1) sync_cluster();  // its barriers are there as long as any arrives
  }

 private:
  using Ring = Place<Tile::kStages>;

  FL_DEVICE uint32_t stage_at(int stage) const { return shared_ + stage * Tile::kStageBytes; }
  FL_DEVICE uint32_t full(int stage) const { return shared_ + Tile::kBarriers + 16 * stage; }
  FL_DEVICE uint32_t empty(int stage) const { return full(stage) + 8; }
  FL_DEVICE uint32_t turn(int consumer) const { return shared_ + Tile::kTurns + 8 * consumer; }
  FL_DEVICE Corner corner(int64_t tile) const {
    Corner c = corner_of(tile, arguments_.columns, kCluster * Tile::kRows, Tile::kColumns);
    c.row += in_cluster_ * Tile::kRows;
    return c;
  }
  FL_DEVICE bool meets_group(const Corner& corner, int g) const {
    const LinearSpan& span = arguments_.span[g];
    return meets(corner.column, Tile::kColumns, span.first_column, span.columns);
  }
  FL_DEVICE int stages_of(const Corner& tile) const {
    int stages = (arguments_.depth + kDepth - 1) / kDepth;
    for (int g = 0; g < arguments_.groups; ++g) {
      if (meets_group(tile, g)) stages += (arguments_.span[g].rank + kDepth - 1) / kDepth;
    }
    return stages;
  }

  FL_DEVICE void produce() {
    Ring at;
    for (int64_t tile = cluster_; tile < arguments_.tiles; tile += clusters_) {
      const Corner c = corner(tile);
      for (int k = 0; k < arguments_.depth; k += kDepth, at.advance()) {
        fill(at, arguments_.x, arguments_.w, k, c.row, c.column);
      }
      for (int g = 0; g < arguments_.groups; ++g) {
        if (!meets_group(c, g)) continue;
        const LinearSpan& span = arguments_.span[g];
        for (int r = 0; r < span.rank; r += kDepth, at.advance()) {
          fill(at, arguments_.h[g], arguments_.border[g], r, c.row, c.column - span.first_column);
        }
      }
    }
  }

  // A stage that begins at this depth, row of the left matrix and column of the right one.
  FL_DEVICE void fill(const Ring& at, const TensorMap& left, const TensorMap& right_map, int depth,
                      int row, int column) {
    const uint32_t to = stage_at(at.stage), barrier = full(at.stage);
    wait_for(empty(at.stage), at.parity ^ 1);
    arrive_expecting(barrier, Tile::kStageBytes);
    load_box(to, left, depth, row, barrier);
    fill_right(to + Tile::kLeftBytes, right_map, depth, column, barrier);
  }

  // This block's share of it: some of the depth, where that is what lies row after row, or some of
  // the columns.
  FL_DEVICE void fill_right(uint32_t to, const TensorMap& map, int depth, int column,
                            uint32_t barrier) {
    if constexpr (kTransposed) {
      to += in_cluster_ * kDeepBoxBytes / kCluster, depth += in_cluster_ * kDepth / kCluster;
      FL_UNROLL
      for (int c = 0; c < Tile::kColumns; c += kBoxColumns) {
        share_box(to + c / kBoxColumns * kDeepBoxBytes, map, column + c, depth, barrier);
      }
    } else {
      to += in_cluster_ * Tile::kRightBytes / kCluster;
      share_box(to, map, depth, column + in_cluster_ * Tile::kColumns / kCluster, barrier);
    }
  }

  FL_DEVICE void share_box(uint32_t to, const TensorMap& map, int column, int row,
                           uint32_t barrier) {
    if constexpr (kCluster > 1) {
      load_box_to((1 << kCluster) - 1, to, map, column, row, barrier);
    } else {
      load_box(to, map, column, row, barrier);
    }
  }

  FL_DEVICE int consumer() const { return thread_index() / 128 - 1; }
  FL_DEVICE int lane() const { return thread_index() % 32; }

  FL_DEVICE void consume() {
    Ring at;
    int count = 0;  // of tiles before this one
    for (int64_t tile = cluster_; tile < arguments_.tiles; tile += clusters_, ++count) {
      const Corner c = corner(tile);
      if (Tile::kPingPong && count % 2 != consumer()) {
        at.skip(stages_of(c));
        continue;
      }
      if (Tile::kPingPong) await_turn(count / 2);
      for (int k = 0; k < arguments_.depth; k += kDepth, at.advance()) base(at, k > 0);
      for (int g = 0; g < arguments_.groups; ++g) {
        if (!meets_group(c, g)) continue;
        const int rank = arguments_.span[g].rank;
        for (int r = 0; r < rank; r += kDepth, at.advance()) extend(at, products_of(rank, r));
      }
      if (Tile::kPingPong) give_turn();
      wait_products<0>();
      settle(sum_);
      release(at);
      finish(c);
    }
    if (thread_index() % 128 == 0) wait_stores_read();
  }

  // Before its tile of this number; the first consumer's first turn is given by nobody.
  FL_DEVICE void await_turn(int number) {
    wait_for(turn(consumer()), (number + 1 + consumer()) % 2);
  }

  // Each warp has seen its last stage full, and asked for its last product.
  FL_DEVICE void give_turn() {
    if (lane() == 0) arrive(turn(1 - consumer()));
  }

  // The first stage of a tile has none before it to release.
  FL_DEVICE void base(const Ring& at, bool add) {
    wait_for(full(at.stage), at.parity);
    begin_products();
    FL_UNROLL
    for (int i = 0; i < kDepth / kProductDepth; ++i) product(at, i, add || i > 0);
    commit_products();
    if (add) {
      wait_products<1>();
      release(at);
    }
  }

  // A straight line for each count: the compiler fences a loop of products once more.
  FL_DEVICE void extend(const Ring& at, int products) {
    wait_for(full(at.stage), at.parity);
    switch (products) {
      case 1: add_products<1>(at); break;
      case 2: add_products<2>(at); break;
      case 3: add_products<3>(at); break;
      default: add_products<4>(at);
    }
    release(at);
  }

  template <int products>
  FL_DEVICE void add_products(const Ring& at) {
    begin_products();
    FL_UNROLL
    for (int i = 0; i < products; ++i) product(at, i, true);
    commit_products();
    wait_products<1>();
  }

  FL_DEVICE void product(const Ring& at, int i, bool add) {
    const uint32_t stage = stage_at(at.stage);
    const int row = Tile::first_row(consumer()), column = Tile::first_column(consumer());
    const uint64_t left = by_rows(stage, row, i);
    const uint64_t other = kTransposed ? by_columns(stage + Tile::kLeftBytes, column, i)
                                       : by_rows(stage + Tile::kLeftBytes, column, i);
    multiply<T, kTransposed>(sum_, left, other, add);
  }

  // The stage before this place is read; each warp says so, as each has waited.
  FL_DEVICE void release(const Ring& at) {
    const uint32_t barrier = empty(at.stage == 0 ? Tile::kStages - 1 : at.stage - 1);
    if constexpr (kCluster > 1) {
      if (lane() < kCluster) arrive_at(lane(), barrier);
    } else {
      if (lane() == 0) arrive(barrier);
    }
  }

  FL_DEVICE void finish(const Corner& tile) {
    const Corner c = {tile.row + Tile::first_row(consumer()),
                      tile.column + Tile::first_column(consumer())};
    add_bias(c);
    if constexpr (activation != Activation::kNone && kTransposed) {
      each_element(c, arguments_.epilogue.u, arguments_.epilogue.u_row,
                   [&](int i, float u) { sum_[i] *= activation_grad<activation>(u); });
    } else if constexpr (activation != Activation::kNone) {
      store(arguments_.u, c);
      FL_UNROLL
      for (int i = 0; i < kSums; ++i) sum_[i] = activated<activation>(sum_[i]);
    }
    scale_and_join(c);
    store(arguments_.y, c);
  }

  // Of y, what this thread's sums 4 j to 4 j + 3 belong to: two columns of two rows eight apart.
  FL_DEVICE int column_of(const Corner& c, int j) const {
    return c.column + 8 * j + lane() % 4 * 2;
  }
  FL_DEVICE int row_of_thread() const { return thread_index() % 128 / 32 * 16 + lane() / 4; }

  FL_DEVICE void add_bias(const Corner& c) {
    if (!arguments_.epilogue.bias) return;
    FL_UNROLL
    for (int j = 0; j < kSums / 4; ++j) {
      const int column = column_of(c, j);
      if (column >= arguments_.columns) continue;
      const Pair bias = pair_of<T>(arguments_.epilogue.bias, column);
      FL_UNROLL
      for (int i = 0; i < 4; ++i) sum_[4 * j + i] += bias.at[i % 2];
    }
  }

  FL_DEVICE void scale_and_join(const Corner& c) {
    const LinearEpilogue& epilogue = arguments_.epilogue;
    if (epilogue.factor) {
      FL_UNROLL
      for (int j = 0; j < kSums / 4; ++j) {
        const int column = column_of(c, j);
        if (column >= arguments_.columns) continue;
        const Pair factor = pair_of<T>(epilogue.factor, column);
        FL_UNROLL
        for (int i = 0; i < 4; ++i) sum_[4 * j + i] *= factor.at[i % 2];
      }
    }
    if (!epilogue.residual) return;
    each_element(c, epilogue.residual, epilogue.residual_row,
                 [&](int i, float residual) { sum_[i] += residual; });
  }

  // Calls visit(i, element) for every sum i of this thread's that lies in y, with the element of
  // another matrix at its place.
  template <typename Visit>
  FL_DEVICE void each_element(const Corner& c, const void* matrix, int64_t matrix_row,
                              Visit visit) {
    FL_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = static_cast<int64_t>(c.row) + row_of_thread() + 8 * half;
      if (row >= arguments_.rows) continue;
      FL_UNROLL
      for (int j = 0; j < kSums / 4; ++j) {
        const int column = column_of(c, j);
        if (column >= arguments_.columns) continue;
        const Pair pair = pair_of<T>(matrix, row * matrix_row + column);
        visit(4 * j + 2 * half, pair.at[0]), visit(4 * j + 2 * half + 1, pair.at[1]);
      }
    }
  }

  // The sums, rounded, to this place of the map's matrix.
  FL_DEVICE void store(const TensorMap& map, const Corner& c) {
    constexpr int kBoxes = Tile::kBoxesAtOnce;
    const uint32_t staged = shared_ + Tile::kStaged + consumer() * kBoxes * kBoxBytes;
    const bool leads = thread_index() % 128 == 0;
    FL_UNROLL
    for (int first = 0; first < Tile::kConsumerBoxes; first += kBoxes) {
      if (leads) wait_stores_read();
      sync_warpgroup(1 + consumer());
      FL_UNROLL
      for (int j = 0; j < 4 * kBoxes; ++j) stage_columns(staged, 4 * first + j, 16 * j);
      publish_writes();
      sync_warpgroup(1 + consumer());
      if (!leads) continue;
      FL_UNROLL
      for (int box = 0; box < kBoxes; ++box) {
        const int column = c.column + (first + box) * kBoxColumns;
        if (column < arguments_.columns && c.row < arguments_.rows) {
          store_box(map, column, c.row, staged + box * kBoxBytes);
        }
      }
      commit_stores();
    }
  }

  // Sixteen columns of sums: those of the tile's 16 j and on, to the staged `column` and on.
  FL_DEVICE void stage_columns(uint32_t staged, int j, int column) {
    uint32_t words[4];
    FL_UNROLL
    for (int i = 0; i < 4; ++i) {
      words[i] = packed<T>({{sum_[8 * j + 2 * i], sum_[8 * j + 2 * i + 1]}});
    }
    const int row = thread_index() % 128 / 32 * 16 + lane() % 16;
    store_matrices(staged_at(staged, row, column + lane() / 16 * 8), words);
  }

  const LinearArguments& arguments_;
  int cluster_, clusters_, in_cluster_;
  uint32_t shared_;
  float sum_[kSums];
};

}  // namespace fused_lora::sm90
