"""The test kit for users' own tests, imported as `job_registry.testing`.

`queue.py` has the queue, `draining.py` runs its jobs, and `context.py` has the `JobContext` for
calling a handler directly. The fixtures of pytest are in `job_registry_api/pytest_plugin.py`.
"""
