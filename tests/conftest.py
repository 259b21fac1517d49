"""What holds for all tests."""

from hypothesis import settings

# An example's time says how busy the machine is, not whether the code is right.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
