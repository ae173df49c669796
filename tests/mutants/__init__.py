"""Mutation testing: `python -m tests.mutants` puts small faults into the core, one at a time."""
