"""Seconds: what kernels, collectives, passes and steps take on given hardware. Torch-free."""
