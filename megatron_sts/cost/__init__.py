"""What a run costs, from its config alone: FLOPs, parameters, bytes of the whole model. Torch-free."""
