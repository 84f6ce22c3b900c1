"""GPU kernels in Triton, one operation a module, with a PyTorch reference beside each.

Each public function takes torch tensors and dispatches on their device: CUDA runs the Triton kernel, CPU
the reference. Imports nothing of `services`.
"""
