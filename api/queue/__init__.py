"""The queue over SQL. It knows job types through `registry`, and nothing of GraphQL or HTTP."""
