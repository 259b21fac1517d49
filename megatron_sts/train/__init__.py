"""The training run of one rank, and how ranks are started."""
