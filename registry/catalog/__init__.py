"""The built-in job types, a file each."""
