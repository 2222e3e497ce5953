// From the tensors of a call to what the kernels are launched with.
#include <array>
#include <map>
#include <stdexcept>
#include <string>

#include "tucker2/tucker2.h"

namespace fastrank::tucker2 {
namespace {

// Groups of eight channels lie whole and aligned at every pixel.
bool in_groups(const View& view, int channels) {
  return view.c == 1 && channels % 8 == 0 && view.n % 8 == 0 && view.h % 8 == 0 && view.w % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
}

// The plan of a convolution, made once a thread: the search takes longer than a launch.
const Plan& plan_of(const Sizes& s, const Stream& w, const Card& card) {
  using Key = std::array<int64_t, 19>;
  static thread_local std::map<Key, Plan> plans;
  const Key key{s.batch,
                s.in_channels,
                s.height,
                s.width,
                s.rank_in,
                s.rank_out,
                s.out_channels,
                s.kernel_h,
                s.kernel_w,
                s.stride_h,
                s.stride_w,
                s.pad_h,
                s.pad_w,
                s.dilation_h,
                s.dilation_w,
                w.split,
                card.multiprocessors,
                card.shared_bytes,
                card.hopper};
  if (plans.size() >= 4096) plans.clear();
  const auto found = plans.find(key);
  return found != plans.end() ? found->second : plans.emplace(key, make_plan(s, w, card)).first->second;
}

}  // namespace

const char* reason(Refusal refusal) {
  switch (refusal) {
    case Refusal::kNone:
      return "";
    case Refusal::kRankOut:
      return "R_out is above what the registers hold, 224, or 768 where the blocks of a cluster share it";
    case Refusal::kChannels:
      return "there are more than 2048 input channels";
    case Refusal::kSharedMemory:
      return "no tile with its weights fits a block's shared memory";
    case Refusal::kGrid:
      return "there are more than 2^31 - 1 tiles";
  }
  return "";
}

Arguments arguments_for(const Sizes& sizes, int split, const Card& card, const View& x, const void* packed,
                        const View& residual, const View& out, Activation activation) {
  Arguments a{};
  a.sizes = sizes, a.stream = Stream::of(sizes, split), a.plan = plan_of(sizes, a.stream, card);
  if (a.plan.refusal != Refusal::kNone)
    throw std::runtime_error(std::string("the Tucker-2 kernels cannot run this convolution: ") +
                             reason(a.plan.refusal));
  a.x = x, a.residual = residual, a.out = out;
  a.packed = static_cast<const unsigned char*>(packed);
  a.activation = activation;
  // A tensor map has no stride of 0, which repeats pixels, and boxes of at most 256 pixels along a dimension.
  a.whole_x = in_groups(x, sizes.in_channels) && x.n > 0 && x.h > 0 && x.w > 0 && a.plan.box_h <= 256 &&
              a.plan.box_w <= 256;
  a.whole_rows =
      in_groups(out, sizes.out_channels) && (!residual.data || in_groups(residual, sizes.out_channels));
  return a;
}

#ifdef __CUDACC__

const Device& device(int index) {
  static thread_local std::array<Device, 64> devices;
  if (index < 0 || index >= 64) throw std::runtime_error("the device must be one of the first 64");
  Device& d = devices[index];
  if (d.known) return d;
  int major = 0, multiprocessors = 0, shared = 0;
  const bool ok =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index) == cudaSuccess &&
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess;
  if (!ok) throw std::runtime_error("the CUDA device could not be asked for its properties");
#ifdef FASTRANK_SM90A
  d.hopper = major == 9;
#endif
  d.card = d.hopper ? hopper_card(multiprocessors, shared) : ampere_card(multiprocessors, shared);
  d.known = true;
  return d;
}

#endif

}  // namespace fastrank::tucker2
