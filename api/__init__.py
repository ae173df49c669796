"""The doors and the worker of Job Registry, over `job_registry_api.queue` and `registry`."""
