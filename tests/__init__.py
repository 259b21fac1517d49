"""A package, because some libraries install a ``tests`` of their own, which would come before a folder without this file."""
