"""The queue of Job Registry, its worker, and its interfaces: GraphQL, REST and the command."""
