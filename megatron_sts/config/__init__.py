"""The user's configuration: its schema, reading it, checking it, and deriving what follows. Torch-free; imports no room."""
