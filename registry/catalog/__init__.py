"""The built-in job types, one file per type."""
