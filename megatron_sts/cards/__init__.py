"""What each example needs and gives, from the ``card.yaml`` in its folder. Must not know how anything runs or is planned."""
