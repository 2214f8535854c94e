// The current device is what it was once a native call is over, whatever became of it.
//
// This module has a CUDA runtime of its own, and torch another: what both see is the driver's
// current context of the thread. So that is what is put back, and "none" where there was none.
#pragma once

namespace fused_lora {

template <typename Driver>  // context(), set_context(context), set_device(device)
class ContextGuard {
 public:
  explicit ContextGuard(int device)
      : before_(Driver::context()), error_(Driver::set_device(device)) {}
  ~ContextGuard() {
    if (Driver::context() != before_) Driver::set_context(before_);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

  // A cudaError_t: why the device is not current inside.
  int error() const { return error_; }

 private:
  void* before_;
  int error_;
};

// In device_guard.cu.
struct CudaDriver {
  static void* context();
  static void set_context(void* context);
  static int set_device(int device);
};

using DeviceGuard = ContextGuard<CudaDriver>;

}  // namespace fused_lora
