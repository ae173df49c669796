"""The README and the guides in docs/: every example in them is tested."""
