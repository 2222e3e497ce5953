// The geometry of the fused Tucker-2 convolution: tiles, shared memory, and the stream of packed weights.
//
// One block computes a tile of the output, up to kTileRows pixels, in three stages:
//   1  z1 (pixels of the tile with its halo, R_in)  = x * w_in^T      kept in shared memory
//   2  z2 (pixels of the tile, R_out)               = shifted z1 * core  kept in registers
//   3  y  (pixels of the tile, O)                   = z2 * w_out^T    bias, residual, activation, written
//   once
// Everything here is a pure function of sizes: the kernels, the launcher and the tests call the same ones.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTRANK_BOTH __host__ __device__
#else
#define FASTRANK_BOTH
#endif

namespace fastrank::tucker2 {

constexpr int kTileRows = 128;       // output pixels of a block: two warpgroups of 64
constexpr int kDepth = 64;           // channels of a chunk: 128 bytes, one row of the swizzled shared memory
constexpr int kRowBytes = 128;       // bytes of a row of a chunk
constexpr int kColumns = 64;         // columns of stages 1 and 3 that are computed at a time
constexpr int kPassTiles = 4;        // 64-row tiles that stage 1 takes at a time, two a warpgroup
constexpr int kMaxChunks = 32;       // chunks of input channels
constexpr int kMaxSlots = 16;        // of the ring of weights
constexpr int kMinSlots = 2;         // one is filled while another is read
constexpr int kSlotBytes = 16384;    // a slot holds at least this
constexpr int kPitchPadding = 16;    // bytes: eight rows of z1 then begin in eight different banks
constexpr int kBarrierBytes = 1024;  // what the barriers may take
constexpr int kMaxSplit = 8;         // blocks of a cluster that share a tile
constexpr int kSplitWidest = 96;     // the columns of z2 that a block of a split may take
constexpr int kWidths = 6, kSplitWidths = 3;

// Widths that R_out is padded to: the kernels are compiled for each.
FASTRANK_BOTH constexpr int width_at(int index) {
  constexpr int widths[kWidths] = {32, 64, 96, 128, 160, 224};
  return widths[index];
}

FASTRANK_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

FASTRANK_BOTH constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

FASTRANK_BOTH constexpr int at_least(int a, int b) {
  return a > b ? a : b;
}

FASTRANK_BOTH constexpr int at_most(int a, int b) {
  return a < b ? a : b;
}

// R_out padded to the next width; 0 where it is wider than all of them.
FASTRANK_BOTH constexpr int padded_out(int rank) {
  for (int i = 0; i < kWidths; ++i)
    if (rank <= width_at(i)) return width_at(i);
  return 0;
}

// Where byte `byte` of row `row` of a chunk lies in it: the 128-byte swizzle of the tensor cores' operands.
FASTRANK_BOTH constexpr int swizzled(int row, int byte) {
  return row * kRowBytes + (byte ^ (row % 8 * 16));
}

struct Sizes {
  int64_t batch;
  int in_channels, height, width;
  int rank_in, rank_out, out_channels;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  FASTRANK_BOTH constexpr int out_height() const {
    return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
  }
  FASTRANK_BOTH constexpr int out_width() const {
    return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
  }
  FASTRANK_BOTH constexpr int taps() const { return kernel_h * kernel_w; }
};

// A contiguous piece of the packed weights, which fills one slot of the ring.
struct Piece {
  int64_t offset;  // bytes
  int bytes;
};

// Where a packed group of eight values comes from: row and first summed index of the factor of a stage.
struct Source {
  int stage, row, k;
};

// The packed weights: chunks of [rows][64 values of the summed dimension], swizzled, in the order of their
// use. Stage 1: column tiles of w_in, each over all input channels. Stage 2: the core over taps x R_in, p2 of
// the R_out rows in a chunk, for one block of a split after the other. Stage 3: column tiles of w_out, each
// over R_out. Then bias as float32. Of `split` blocks, block `rank` takes the column tiles rank, rank +
// split, ... of stages 1 and 3.
struct Stream {
  int chunks_in;  // of input channels
  int p1, p2;     // R_in padded to 16, a block's share of R_out padded to a width
  int taps;
  int out_tiles;  // column tiles of stage 3
  int split;      // blocks that share a tile
  int depth_out;  // columns of z2, padded

  FASTRANK_BOTH static constexpr Stream of(const Sizes& s, int split) {
    const int width = padded_out(static_cast<int>(ceil_div(s.rank_out, split)));
    return {static_cast<int>(ceil_div(s.in_channels, kDepth)),
            round_up(s.rank_in, 16),
            width,
            s.taps(),
            static_cast<int>(ceil_div(s.out_channels, kColumns)),
            split,
            split > 1 ? round_up(s.rank_out, 16) : width};
  }

  // Of `tiles` column tiles, how many block `rank` takes.
  FASTRANK_BOTH constexpr int share(int tiles, int rank) const { return (tiles - rank + split - 1) / split; }

  // Stage 1: a tile has 64 columns, the last one 32 where that is enough; 32 in a split, for even shares.
  FASTRANK_BOTH constexpr int in_columns() const { return split > 1 ? kColumns / 2 : kColumns; }
  FASTRANK_BOTH constexpr int in_tiles() const { return static_cast<int>(ceil_div(p1, in_columns())); }
  FASTRANK_BOTH constexpr int in_tile_width(int j) const {
    return split == 1 && p1 - j * kColumns > kColumns / 2 ? kColumns : kColumns / 2;
  }
  FASTRANK_BOTH constexpr int in_slots_a_tile() const { return static_cast<int>(ceil_div(chunks_in, 2)); }
  FASTRANK_BOTH constexpr int in_slots(int rank) const { return share(in_tiles(), rank) * in_slots_a_tile(); }
  FASTRANK_BOTH constexpr int padded_in() const {
    return (in_tiles() - 1) * in_columns() + in_tile_width(in_tiles() - 1);
  }
  FASTRANK_BOTH constexpr int64_t in_bytes() const {
    return static_cast<int64_t>(padded_in()) * chunks_in * kRowBytes;
  }

  // Stage 2.
  FASTRANK_BOTH constexpr int core_steps() const { return taps * (p1 / 16); }
  FASTRANK_BOTH constexpr int core_chunks() const { return static_cast<int>(ceil_div(core_steps(), 4)); }
  FASTRANK_BOTH constexpr int core_chunk_bytes() const { return p2 * kRowBytes; }
  FASTRANK_BOTH constexpr int core_chunks_a_slot() const {
    return at_least(1, kSlotBytes / core_chunk_bytes());
  }
  FASTRANK_BOTH constexpr int core_slots() const {
    return static_cast<int>(ceil_div(core_chunks(), core_chunks_a_slot()));
  }
  FASTRANK_BOTH constexpr int64_t core_bytes() const {  // of one block
    return static_cast<int64_t>(core_chunks()) * core_chunk_bytes();
  }

  // Stage 3.
  FASTRANK_BOTH constexpr int out_chunks() const { return static_cast<int>(ceil_div(depth_out, kDepth)); }
  FASTRANK_BOTH constexpr int out_slots_a_tile() const { return static_cast<int>(ceil_div(out_chunks(), 2)); }
  FASTRANK_BOTH constexpr int out_slots(int rank) const {
    return share(out_tiles, rank) * out_slots_a_tile();
  }
  FASTRANK_BOTH constexpr int64_t out_bytes() const {
    return static_cast<int64_t>(out_tiles) * out_chunks() * kColumns * kRowBytes;
  }

  FASTRANK_BOTH constexpr int64_t weight_bytes() const {
    return in_bytes() + split * core_bytes() + out_bytes();
  }
  FASTRANK_BOTH constexpr int64_t packed_bytes() const {
    return weight_bytes() + static_cast<int64_t>(out_tiles) * kColumns * 4;
  }
  FASTRANK_BOTH constexpr int slot_bytes() const { return at_least(kSlotBytes, core_chunk_bytes()); }
  FASTRANK_BOTH constexpr int slots(int passes, int rank) const {
    return passes * in_slots(rank) + core_slots() + out_slots(rank);
  }

  // What slot number `s` of a tile holds for block `rank`: `passes` times stage 1's weights, then stage 2's
  // and 3's.
  FASTRANK_BOTH constexpr Piece piece(int s, int passes, int rank) const {
    const int in = in_slots(rank);
    if (s < passes * in) {
      const int j = rank + s % in / in_slots_a_tile() * split, first = s % in_slots_a_tile() * 2;
      const int count = at_most(2, chunks_in - first), chunk = in_tile_width(j) * kRowBytes;
      return {static_cast<int64_t>(j) * in_columns() * chunks_in * kRowBytes +
                  static_cast<int64_t>(first) * chunk,
              count * chunk};
    }
    s -= passes * in;
    if (s < core_slots()) {
      const int first = s * core_chunks_a_slot(),
                count = at_most(core_chunks_a_slot(), core_chunks() - first);
      return {in_bytes() + rank * core_bytes() + static_cast<int64_t>(first) * core_chunk_bytes(),
              count * core_chunk_bytes()};
    }
    s -= core_slots();
    const int tile = rank + s / out_slots_a_tile() * split, first = s % out_slots_a_tile() * 2;
    const int count = at_most(2, out_chunks() - first), chunk = kColumns * kRowBytes;
    return {in_bytes() + split * core_bytes() + (static_cast<int64_t>(tile) * out_chunks() + first) * chunk,
            count * chunk};
  }

  // What lies at byte `at`, a multiple of 16, of the weights.
  FASTRANK_BOTH constexpr Source source(int64_t at) const {
    if (at < in_bytes()) {
      const int64_t whole = static_cast<int64_t>(in_columns()) * chunks_in * kRowBytes;
      const int j = static_cast<int>(at / whole), chunk = in_tile_width(j) * kRowBytes;
      const int inside = static_cast<int>(at % whole);
      return in_chunk(1, inside % chunk, j * in_columns(), inside / chunk * kDepth);
    }
    at -= in_bytes();
    if (at < split * core_bytes()) {
      const int rank = static_cast<int>(at / core_bytes());
      at %= core_bytes();
      return in_chunk(2, static_cast<int>(at % core_chunk_bytes()), rank * p2,
                      static_cast<int>(at / core_chunk_bytes()) * kDepth);
    }
    at -= split * core_bytes();
    constexpr int chunk = kColumns * kRowBytes;
    const int index = static_cast<int>(at / chunk);
    return in_chunk(3, static_cast<int>(at % chunk), index / out_chunks() * kColumns,
                    index % out_chunks() * kDepth);
  }

 private:
  FASTRANK_BOTH static constexpr Source in_chunk(int stage, int byte, int first_row, int first_k) {
    const int row = byte / kRowBytes;
    return {stage, first_row + row, first_k + swizzled(row, byte % kRowBytes) % kRowBytes / 2};
  }
};

enum class Refusal { kNone, kRankOut, kChannels, kSharedMemory, kGrid };

// How a convolution is cut into tiles. z: the tile of z1 with its halo; box: the part of it that lies in the
// map, which is all that stage 1 computes (the rest is zero padding).
struct Plan {
  Refusal refusal;
  int tile_h, tile_w, images;  // output pixels of a block, in each of `images` images
  int z_h, z_w, box_h, box_w;
  int pitch;    // bytes between pixels of z1
  int rows_in;  // pixels of the box, over all images
  int tiles_h, tiles_w;
  int64_t tiles;
  int passes;         // of stage 1
  int ring, cluster;  // slots; blocks of a cluster: they share the weights they read, or in a split a tile
  bool resident;      // all weights stay in shared memory
  int shared_bytes;

  FASTRANK_BOTH constexpr int rows_out() const { return images * tile_h * tile_w; }
  FASTRANK_BOTH constexpr int m_tiles() const { return static_cast<int>(ceil_div(rows_in, 64)); }
  FASTRANK_BOTH constexpr int x_bytes(const Stream& w) const {
    return w.chunks_in * m_tiles() * 64 * kRowBytes;
  }
  FASTRANK_BOTH constexpr int z_bytes() const { return round_up(images * z_h * z_w * pitch, 128); }
  // Of a split: z2 in shared memory.
  FASTRANK_BOTH static constexpr int z2_pitch(const Stream& w) { return w.depth_out * 2 + kPitchPadding; }
  FASTRANK_BOTH constexpr int z2_bytes(const Stream& w) const {
    return w.split > 1 ? round_up(round_up(rows_out(), 16) * z2_pitch(w), 128) : 0;
  }
};

// Where a tile begins.
struct Tile {
  int64_t image;
  int out_y, out_x;  // its first output pixel
  int z_y, z_x;      // the pixel of x under its first pixel of z1; negative in the padding
  int box_y, box_x;  // the first pixel of x that stage 1 reads
};

FASTRANK_BOTH constexpr int clamp_start(int origin, int box, int size) {
  return at_least(0, at_most(origin, size - box));
}

FASTRANK_BOTH constexpr Tile tile_at(const Sizes& s, const Plan& p, int64_t index) {
  const int x = static_cast<int>(index % p.tiles_w), y = static_cast<int>(index / p.tiles_w % p.tiles_h);
  Tile t{};
  t.image = index / p.tiles_w / p.tiles_h * p.images;
  t.out_y = y * p.tile_h, t.out_x = x * p.tile_w;
  t.z_y = t.out_y * s.stride_h - s.pad_h, t.z_x = t.out_x * s.stride_w - s.pad_w;
  t.box_y = clamp_start(t.z_y, p.box_h, s.height), t.box_x = clamp_start(t.z_x, p.box_w, s.width);
  return t;
}

// A pixel of a tile: which of its images, and the row and column in it.
struct Pixel {
  int image, y, x;
};

FASTRANK_BOTH constexpr Pixel pixel_at(int row, int height, int width) {
  return {row / (height * width), row / width % height, row % width};
}

// The place in z1 (in pixels) of row `row` of the box, or -1 where the tile does not need it.
FASTRANK_BOTH constexpr int z_place(const Plan& p, const Tile& t, int row) {
  if (row >= p.rows_in) return -1;
  const Pixel at = pixel_at(row, p.box_h, p.box_w);
  const int y = t.box_y + at.y - t.z_y, x = t.box_x + at.x - t.z_x;
  if (y < 0 || y >= p.z_h || x < 0 || x >= p.z_w) return -1;
  return (at.image * p.z_h + y) * p.z_w + x;
}

// The place in z1 of the first tap of output row `row`; rows behind the last one read row 0's.
FASTRANK_BOTH constexpr int first_tap(const Sizes& s, const Plan& p, int row) {
  const Pixel at = pixel_at(row < p.rows_out() ? row : 0, p.tile_h, p.tile_w);
  return (at.image * p.z_h + at.y * s.stride_h) * p.z_w + at.x * s.stride_w;
}

// What a card offers, and what the kernel for it takes of it a clock and multiprocessor (for choosing, not
// for results).
struct Card {
  int multiprocessors;
  int shared_bytes;  // a block may have
  int macs_a_clock;  // of the tensor cores
  int flow_bytes_a_clock, l2_bytes_a_clock, memory_bytes_a_clock;
  bool hopper;  // clusters, and blocks that take one tile after another
};

// Rates of an H200 and of an A100; other cards of their kind differ by constant factors, which choose the
// same tiles.
constexpr Card hopper_card(int multiprocessors, int shared_bytes) {
  return {multiprocessors, shared_bytes, 2048, 64, 42, 18, true};
}
constexpr Card ampere_card(int multiprocessors, int shared_bytes) {
  return {multiprocessors, shared_bytes, 1024, 64, 40, 10, false};
}

constexpr Plan cut(const Sizes& s, const Stream& w, const Card& card, int tile_h, int tile_w, int images) {
  Plan p{};
  p.tile_h = tile_h, p.tile_w = tile_w, p.images = images;
  p.z_h = (tile_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  p.z_w = (tile_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  p.box_h = at_most(p.z_h, s.height), p.box_w = at_most(p.z_w, s.width);
  p.pitch = w.p1 * 2 + kPitchPadding;
  const int64_t rows = static_cast<int64_t>(images) * p.box_h * p.box_w;
  const int64_t places = static_cast<int64_t>(images) * p.z_h * p.z_w;
  p.refusal = Refusal::kSharedMemory;
  if (rows > 65536 || places * p.pitch > card.shared_bytes ||
      rows * w.chunks_in * kRowBytes > card.shared_bytes)
    return p;
  p.rows_in = static_cast<int>(rows);
  p.tiles_h = static_cast<int>(ceil_div(s.out_height(), tile_h));
  p.tiles_w = static_cast<int>(ceil_div(s.out_width(), tile_w));
  p.tiles = ceil_div(s.batch, images) * p.tiles_h * p.tiles_w;
  p.passes = static_cast<int>(ceil_div(p.m_tiles(), kPassTiles));
  const int fixed = p.x_bytes(w) + p.z_bytes() + p.z2_bytes(w) + kBarrierBytes;
  const int room = (card.shared_bytes - fixed) / w.slot_bytes();
  if (fixed > card.shared_bytes || room < kMinSlots) return p;
  const int slots = w.slots(p.passes, 0);  // no block of a split has more than its first
  p.resident =
      card.hopper && w.split == 1 && slots <= at_most(room, kMaxSlots) && p.tiles > card.multiprocessors;
  p.ring = at_most(at_most(room, card.hopper ? 8 : 3), slots);
  if (p.resident) p.ring = slots;
  p.ring = at_least(p.ring, kMinSlots);
  p.cluster = w.split > 1 ? w.split : card.hopper && !p.resident && p.tiles >= 2 ? 2 : 1;
  p.shared_bytes = fixed + p.ring * w.slot_bytes();
  p.refusal = Refusal::kNone;
  return p;
}

// Estimated clocks of a call: the slowest of tensor cores, what flows into a multiprocessor, L2 and memory a
// tile, times the rounds of blocks.
constexpr double clocks(const Sizes& s, const Stream& w, const Card& card, const Plan& p) {
  const double own_in = w.split > 1 ? w.share(w.in_tiles(), 0) * w.in_columns() : w.padded_in();
  const double own_out = static_cast<double>(w.share(w.out_tiles, 0)) * kColumns;
  const double rows = round_up(p.rows_out(), 64);
  const double macs = 64.0 * p.m_tiles() * own_in * w.chunks_in * kDepth +
                      rows * (16.0 * w.core_steps() * w.p2 + own_out * w.depth_out);
  const double weights = p.resident ? 0.0 : static_cast<double>(w.weight_bytes()) / w.split;
  const double read = 2.0 * p.rows_in * s.in_channels,
               written = 2.0 * p.rows_out() * s.out_channels / w.split;
  // z1 and z2 of a split come from all of its blocks.
  const double exchanged = w.split > 1 ? 2.0 * (p.rows_in * w.p1 + p.rows_out() * w.depth_out) : 0.0;
  const double flow = (weights + read + exchanged) / card.flow_bytes_a_clock;
  const double l2 = (weights / (w.split > 1 ? 1 : p.cluster) + read + written) / card.l2_bytes_a_clock;
  const double fresh = static_cast<double>(s.batch) * 2.0 *
                       (static_cast<double>(s.height) * s.width * s.in_channels +
                        static_cast<double>(s.out_height()) * s.out_width() * s.out_channels) /
                       static_cast<double>(p.tiles * w.split);
  const double memory = fresh / card.memory_bytes_a_clock, math = macs / (0.7 * card.macs_a_clock);
  double tile = math > flow ? math : flow;
  tile = tile > l2 ? tile : l2;
  tile = tile > memory ? tile : memory;
  const double rounds = static_cast<double>(
      ceil_div(p.tiles * w.split, at_least(1, card.multiprocessors / p.cluster) * p.cluster));
  return rounds * (tile + (w.split > 1 ? 1800.0 : 600.0)) + 2000.0;
}

// The cheapest way to cut a convolution into tiles of `split` blocks, or the reason why there is none.
constexpr Plan make_plan(const Sizes& s, const Stream& w, const Card& card) {
  Plan best{};
  best.refusal = w.p2 == 0 || (w.split > 1 && w.p2 > kSplitWidest) ? Refusal::kRankOut
                 : w.chunks_in > kMaxChunks                        ? Refusal::kChannels
                                                                   : Refusal::kSharedMemory;
  if (best.refusal != Refusal::kSharedMemory) return best;
  const int out_h = s.out_height(), out_w = s.out_width();
  double least = 0.0;
  for (int columns = 1; columns <= out_w; ++columns) {
    const int tile_w = static_cast<int>(ceil_div(out_w, columns));
    if (columns > 1 && tile_w == static_cast<int>(ceil_div(out_w, columns - 1))) continue;
    for (int tile_h = at_most(out_h, kTileRows / at_most(tile_w, kTileRows)); tile_h >= 1; --tile_h) {
      if (tile_w > kTileRows) break;
      const bool whole = tile_h == out_h && tile_w == out_w;
      const int most =
          whole ? at_most(kTileRows / (tile_h * tile_w), static_cast<int>(s.batch < 8 ? s.batch : 8)) : 1;
      for (int images = 1; images <= most; ++images) {
        const Plan p = cut(s, w, card, tile_h, tile_w, images);
        if (p.refusal != Refusal::kNone) continue;
        const double cost = clocks(s, w, card, p);
        if (best.refusal == Refusal::kNone && cost >= least) continue;
        best = p, least = cost;
      }
    }
  }
  if (best.refusal == Refusal::kNone && best.tiles * w.split > 0x7fffffff) best.refusal = Refusal::kGrid;
  return best;
}

// Into how many blocks a tile is best split: 1 where nothing is gained, or nothing fits.
constexpr int best_split(const Sizes& s, const Card& card) {
  int best = 1;
  if (!card.hopper) return best;
  const Stream whole = Stream::of(s, 1);
  const Plan plan = make_plan(s, whole, card);
  if (plan.refusal != Refusal::kNone && plan.refusal != Refusal::kRankOut &&
      plan.refusal != Refusal::kSharedMemory)
    return best;
  double least = plan.refusal == Refusal::kNone ? clocks(s, whole, card, plan) : 0.0;
  for (int split = 2; split <= kMaxSplit; split *= 2) {
    const Stream w = Stream::of(s, split);
    const Plan p = make_plan(s, w, card);
    if (p.refusal != Refusal::kNone) continue;
    const double cost = clocks(s, w, card, p);
    if (least > 0.0 && cost >= least) continue;
    best = split, least = cost;
  }
  return best;
}

}  // namespace fastrank::tucker2
