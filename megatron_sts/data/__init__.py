"""Data: records, sources, templates, packing. Must not know models."""
