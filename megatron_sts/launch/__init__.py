"""How ranks start, end with their launcher, and say what went wrong. Must not know torch until ranks start, nor training."""
