"""This machine: devices, process groups, and what is installed. Must not know models or training."""
