#include "lora_grad/add_partials.h"

#include <stdexcept>
#include <string>

#include "common/error.h"

namespace fused_lora {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("add_partials: " + what);
}

std::string text(int64_t number) { return std::to_string(number); }

void check_groups(const SumPiece& piece) {
  if (piece.groups < 1 || piece.groups > kMostGroups) {
    refuse("serves 1 to 4 groups, got " + text(piece.groups));
  }
  int first = 0;
  for (int g = 0; g < piece.groups; ++g) {
    const SumGroup& group = piece.group[g];
    const bool inside = group.first_column >= 0 && group.columns >= 0 &&
                        (!group.db || group.first_column + group.columns <= piece.n);
    if (!inside || group.rank < 0 || group.first_rank != first) {
      refuse("group " + text(g) + " has columns or ranks out of place: columns " +
             text(group.first_column) + " and " + text(group.columns) + " more of " +
             text(piece.n) + ", ranks " + text(group.first_rank) + " and " + text(group.rank) +
             " more");
    }
    first += group.rank;
  }
  if (first != piece.ranks) {
    refuse("the groups have " + text(first) + " ranks, the piece " + text(piece.ranks));
  }
}

void check(const SumPiece& piece) {
  if (piece.k < 0 || piece.n < 0 || piece.slices < 0 || piece.rank_blocks < 0) {
    refuse("sizes are negative: k " + text(piece.k) + ", n " + text(piece.n) + ", slices " +
           text(piece.slices) + ", rank blocks " + text(piece.rank_blocks));
  }
  const int ranks = piece.ranks + (piece.dbias != nullptr);
  if (ranks > 16 * piece.rank_blocks) {
    refuse(text(16 * piece.rank_blocks) + " ranks of a partial cannot hold " + text(ranks));
  }
  if (piece.elements() > INT32_MAX) {
    refuse("a slice has " + text(piece.elements()) + " elements, at most " + text(INT32_MAX));
  }
  check_groups(piece);
}

}  // namespace

void add_partials(Sums sums, int device, void* stream) {
  if (sums.pieces < 1 || sums.pieces > kMostPieces) {
    refuse("serves 1 to 6 pieces, got " + text(sums.pieces));
  }
  int64_t blocks = 0;
  for (int p = 0; p < sums.pieces; ++p) {
    check(sums.piece[p]);
    sums.first_block[p] = static_cast<int32_t>(blocks);
    blocks += sums.piece[p].elements() / kSumElements;
  }
  sums.first_block[sums.pieces] = static_cast<int32_t>(blocks);
  if (blocks == 0) return;
  const int error = launch_add_partials(sums, device, stream);
  if (error) throw std::runtime_error(std::string("add_partials: ") + cuda_error_text(error));
}

}  // namespace fused_lora
