"""What a run will take: pipeline layouts, the schedule simulated, what skipping gains. Must not know torch."""
