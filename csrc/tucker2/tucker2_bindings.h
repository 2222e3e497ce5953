// fastrank._host: plans of the Tucker-2 kernels, and the kernels compiled for the host. Include after
// tucker2/*.cu.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "tucker2/tucker2.h"

namespace fastrank::tucker2 {

// batch, in_channels, height, width, rank_in, rank_out, out_channels, then (vertical, horizontal) kernel,
// stride, padding and dilation.
using SizeList = std::array<int64_t, 15>;

inline Sizes sizes_of(const SizeList& v) {
  const auto at = [&](int i) { return static_cast<int>(v[i]); };
  return {v[0],  at(1), at(2),  at(3),  at(4),  at(5),  at(6), at(7),
          at(8), at(9), at(10), at(11), at(12), at(13), at(14)};
}

inline View view_of(std::uintptr_t data, const std::array<int64_t, 4>& strides) {
  return {reinterpret_cast<void*>(data), strides[0], strides[1], strides[2], strides[3]};
}

inline DType half_of(const std::string& name) {
  return name == "float16" ? DType::kFloat16 : DType::kBFloat16;
}

inline Card card_of(bool hopper, int multiprocessors, int shared_bytes) {
  return hopper ? hopper_card(multiprocessors, shared_bytes) : ampere_card(multiprocessors, shared_bytes);
}

inline pybind11::dict plan_dict(const Sizes& s, int split, const Card& card) {
  const Stream w = Stream::of(s, split);
  const Plan p = make_plan(s, w, card);
  pybind11::dict out;
  out["refusal"] = std::string(reason(p.refusal));
  if (p.refusal != Refusal::kNone) return out;
  out["tile"] = std::array<int, 2>{p.tile_h, p.tile_w};
  out["images"] = p.images;
  out["z"] = std::array<int, 2>{p.z_h, p.z_w};
  out["box"] = std::array<int, 2>{p.box_h, p.box_w};
  out["pitch"] = p.pitch;
  out["tiles"] = p.tiles;
  out["rows_in"] = p.rows_in;
  out["rows_out"] = p.rows_out();
  out["passes"] = p.passes;
  out["ring"] = p.ring;
  out["split"] = split;
  out["slots"] = w.slots(p.passes, 0);
  out["slot_bytes"] = w.slot_bytes();
  out["cluster"] = p.cluster;
  out["resident"] = p.resident;
  out["x_bytes"] = p.x_bytes(w);
  out["z_bytes"] = p.z_bytes();
  out["shared_bytes"] = p.shared_bytes;
  out["padded_ranks"] = std::array<int, 2>{w.p1, w.p2};
  out["packed_bytes"] = w.packed_bytes();
  out["weight_bytes"] = w.weight_bytes();
  out["clocks"] = clocks(s, w, card, p);
  return out;
}

// For each tile: the places in z1 that stage 1 writes, those that are cleared, and (row, n, y, x) of its
// outputs.
inline pybind11::list tile_map(const Sizes& s, const Plan& p) {
  pybind11::list out;
  for (int64_t index = 0; index < p.tiles; ++index) {
    const Tile t = tile_at(s, p, index);
    std::vector<std::array<int64_t, 5>> written;  // place, the pixel of x and its image
    for (int row = 0; row < p.m_tiles() * 64; ++row) {
      const Pixel at = pixel_at(row, p.box_h, p.box_w);
      written.push_back({z_place(p, t, row), t.image + at.image, t.box_y + at.y, t.box_x + at.x, row});
    }
    std::vector<std::array<int64_t, 4>> outputs;  // place of the first tap, the output pixel and its image
    for (int row = 0; row < p.rows_out(); ++row) {
      const Pixel at = pixel_at(row, p.tile_h, p.tile_w);
      outputs.push_back({first_tap(s, p, row), t.image + at.image, t.out_y + at.y, t.out_x + at.x});
    }
    out.append(pybind11::make_tuple(written, outputs));
  }
  return out;
}

inline void host_convolve(const SizeList& list, int split, bool hopper, int multiprocessors, int shared_bytes,
                          const std::string& dtype, std::uintptr_t x, const std::array<int64_t, 4>& x_strides,
                          std::uintptr_t packed, std::uintptr_t residual,
                          const std::array<int64_t, 4>& residual_strides, std::uintptr_t out,
                          const std::array<int64_t, 4>& out_strides, int activation) {
  Arguments a = arguments_for(sizes_of(list), split, card_of(hopper, multiprocessors, shared_bytes),
                              view_of(x, x_strides), reinterpret_cast<void*>(packed),
                              view_of(residual, residual_strides), view_of(out, out_strides),
                              static_cast<Activation>(activation));
  if (hopper) {
    convolve_hopper(a, half_of(dtype), multiprocessors, nullptr);
  } else {
    convolve_ampere(a, half_of(dtype), nullptr);
  }
}

inline void bind(pybind11::module_& m) {
  m.def("tucker2_split", [](const SizeList& list, bool hopper, int multiprocessors, int shared_bytes) {
    return best_split(sizes_of(list), card_of(hopper, multiprocessors, shared_bytes));
  });
  m.def("tucker2_plan",
        [](const SizeList& list, int split, bool hopper, int multiprocessors, int shared_bytes) {
          return plan_dict(sizes_of(list), split, card_of(hopper, multiprocessors, shared_bytes));
        });
  m.def("tucker2_tiles", [](const SizeList& list, int split, bool hopper, int multiprocessors,
                            int shared_bytes) {
    const Sizes s = sizes_of(list);
    return tile_map(s, make_plan(s, Stream::of(s, split), card_of(hopper, multiprocessors, shared_bytes)));
  });
  m.def("tucker2_pieces", [](const SizeList& list, int split, int passes, int rank) {
    const Stream w = Stream::of(sizes_of(list), split);
    std::vector<std::array<int64_t, 2>> out;
    for (int s = 0; s < w.slots(passes, rank); ++s)
      out.push_back({w.piece(s, passes, rank).offset, w.piece(s, passes, rank).bytes});
    return out;
  });
  m.def("tucker2_sources", [](const SizeList& list, int split) {
    const Stream w = Stream::of(sizes_of(list), split);
    std::vector<std::array<int, 3>> out;
    for (int64_t at = 0; at < w.weight_bytes(); at += 16)
      out.push_back({w.source(at).stage, w.source(at).row, w.source(at).k});
    return out;
  });
  m.def("tucker2_packed_bytes",
        [](const SizeList& list, int split) { return Stream::of(sizes_of(list), split).packed_bytes(); });
  m.def("tucker2_pack",
        [](const SizeList& list, int split, const std::string& dtype, std::uintptr_t w_in,
           const std::array<int64_t, 2>& in_strides, std::uintptr_t core,
           const std::array<int64_t, 4>& core_strides, std::uintptr_t w_out,
           const std::array<int64_t, 2>& out_strides, std::uintptr_t bias, bool flip, std::uintptr_t packed) {
          const auto at = [](std::uintptr_t address) { return reinterpret_cast<const void*>(address); };
          const Factors f{at(w_in),
                          at(core),
                          at(w_out),
                          at(bias),
                          in_strides[0],
                          in_strides[1],
                          core_strides[0],
                          core_strides[1],
                          core_strides[2],
                          core_strides[3],
                          out_strides[0],
                          out_strides[1],
                          flip};
          pack(sizes_of(list), split, f, reinterpret_cast<void*>(packed), half_of(dtype), nullptr);
        });
  m.def("tucker2_convolve", &host_convolve);
}

}  // namespace fastrank::tucker2
