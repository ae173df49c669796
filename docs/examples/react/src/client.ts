// Apollo Client: requests over HTTP, events over WebSocket.

import { ApolloClient, ApolloLink, HttpLink, InMemoryCache } from "@apollo/client";
import { SetContextLink } from "@apollo/client/link/context";
import { GraphQLWsLink } from "@apollo/client/link/subscriptions";
import { OperationTypeNode } from "graphql";
import { createClient } from "graphql-ws";
import introspection from "./gen/possibleTypes";
import { authorization } from "./login";

const http = new SetContextLink(() => ({ headers: authorization() })).concat(
  new HttpLink({ uri: "/graphql" }),
);

const webSocket = createClient({
  url: new URL("/graphql", location.href.replace(/^http/, "ws")).href,
  connectionParams: authorization,
  retryAttempts: Infinity,
  shouldRetry: () => true,
  retryWait: async (retries) => {
    // By default, the wait doubles without a limit.
    const seconds = Math.min(2 ** retries, 30) * Math.random();
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  },
  on: {
    // The server does not repeat the events that were sent while there was no connection.
    connected: (_socket, _payload, wasRetry) => {
      if (wasRetry) void client.refetchQueries({ include: "active" });
    },
  },
});

export const client = new ApolloClient({
  link: ApolloLink.split(
    ({ operationType }) => operationType === OperationTypeNode.SUBSCRIPTION,
    new GraphQLWsLink(webSocket),
    http,
  ),
  cache: new InMemoryCache(introspection),
});
