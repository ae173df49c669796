"""The doors and the worker of Job Registry, over `api.queue` and `registry`."""
