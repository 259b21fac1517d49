"""The training run of one rank: loop, step, stages, metrics, checkpoints. Must not know how ranks are started."""
