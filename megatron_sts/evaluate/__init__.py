"""How good a model is: questions asked of it, and the benchmarks' metrics of its answers. Must not know how it was trained."""
