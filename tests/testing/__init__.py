"""The test kit for users, by its public names."""
