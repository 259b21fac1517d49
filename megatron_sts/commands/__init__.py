"""What a person types: one file a command, which checks, hands over and prints. Must not know how the work is done."""
