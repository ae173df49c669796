"""The queue over SQL. It imports `job_registry`, and neither GraphQL nor HTTP."""
