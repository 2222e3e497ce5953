// The list of tensors that one launch serves: it travels as a kernel argument, so that no copy is made.
#pragma once

#include "common/device.cuh"
#include "gates/gates.h"

// A parameter of a kernel that stays where the launch put it. On the host a reference, so that no thread
// copies it.
#ifdef __CUDACC__
#define FASTRANK_ARGUMENT(type, name) const __grid_constant__ type name
#define FASTRANK_BOTH __host__ __device__
#else
#define FASTRANK_ARGUMENT(type, name) const type& name
#define FASTRANK_BOTH
#endif

namespace fastrank::gates {

// Arguments of a kernel hold 4 KiB, and 32764 bytes from CUDA 12.1 on. Short lists take the small table,
// which is cheaper to hand over. What is left is for the other arguments.
constexpr int kSmallTable = 3968;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kLargeTable = kSmallTable;
#else
constexpr int kLargeTable = 32000;
#endif
constexpr int64_t kMostBlocks = 0x7fffffff;

template <int kPointers>
struct Entry {
  void* at[kPointers];
  int64_t rows, row_size;
  int lanes, pack;
};

// Block b serves the last tensor t with first[t] <= b; first[0] is 0.
template <int kPointers, int kBytes>
struct Table {
  static constexpr int kCapacity =
      (kBytes - 8) / static_cast<int>(sizeof(Entry<kPointers>) + sizeof(uint32_t));
  Entry<kPointers> entries[kCapacity];
  uint32_t first[kCapacity];
  int count;
};

FASTRANK_BOTH inline int find_entry(const uint32_t* first, int count, uint32_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A list of `count` tensors, or tuples of kPointers of them, by columns. `rows` may be null: one row each.
template <int kPointers>
struct List {
  void* const* columns[kPointers];
  const int64_t *rows, *row_sizes;
  int count;

  // Whether packs can be read and written at the first `packed` pointers of a tensor.
  bool aligned(int tensor, int packed) const {
    std::uintptr_t bits = 0;
    for (int p = 0; p < packed; ++p) bits |= reinterpret_cast<std::uintptr_t>(columns[p][tensor]);
    return bits % kPackBytes == 0;
  }
};

// Put the tensors from `next` on that have blocks into `table`, as many as it holds; moves `next` past them
// and returns their blocks. `plan(i)` is the plan of tensor i.
template <int kPointers, int kBytes, typename Planner>
int64_t fill(Table<kPointers, kBytes>& table, const List<kPointers>& list, int& next, Planner&& plan) {
  int64_t blocks = 0;
  table.count = 0;
  for (; next < list.count && table.count < table.kCapacity; ++next) {
    const Plan own = plan(next);
    if (own.blocks == 0) continue;
    if (table.count > 0 && blocks + own.blocks > kMostBlocks)
      break;  // one tensor of too many: the launch says so
    Entry<kPointers>& entry = table.entries[table.count];
    for (int p = 0; p < kPointers; ++p) entry.at[p] = list.columns[p][next];
    entry.rows = list.rows ? list.rows[next] : 1;
    entry.row_size = list.row_sizes[next];
    entry.lanes = own.lanes, entry.pack = own.pack;
    table.first[table.count++] = static_cast<uint32_t>(blocks);
    blocks += own.blocks;
  }
  return blocks;
}

// Call `launch(table, blocks)` for tables that together hold the list.
template <int kPointers, typename Planner, typename Launch>
void for_tables(const List<kPointers>& list, Planner&& plan, Launch&& launch) {
  for (int next = 0; next < list.count;) {
    if (list.count - next <= Table<kPointers, kSmallTable>::kCapacity) {
      Table<kPointers, kSmallTable> table;
      if (const int64_t blocks = fill(table, list, next, plan)) launch(table, blocks);
    } else {
      Table<kPointers, kLargeTable> table;
      if (const int64_t blocks = fill(table, list, next, plan)) launch(table, blocks);
    }
  }
}

}  // namespace fastrank::gates
