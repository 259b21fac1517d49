"""Public benchmarks, read from their official files and scored with their official metrics. Must not know how answers are made."""
