"""The GraphQL schema, and the view that serves it over HTTP."""
