// How GraphiQL reaches the server: queries and mutations by POST, subscriptions by WebSocket.

import { createGraphiQLFetcher, type Fetcher } from "@graphiql/toolkit";
import { createClient, type Client } from "graphql-ws";
import { authorization } from "./token";

const url = new URL(location.href);
url.search = url.hash = "";

const socketUrl = new URL(url);
socketUrl.protocol = url.protocol === "https:" ? "wss:" : "ws:";

export const socket: Client = createClient({
  url: socketUrl.href,
  // A browser cannot send the header with a WebSocket's handshake.
  connectionParams: authorization,
  // The token stays the same until a person changes it, so the server would refuse it again: the
  // error would show only after all attempts, half a minute later.
  shouldRetry: (fault) => (fault as { code?: number }).code !== 4403,
});

export const fetcher: Fetcher = createGraphiQLFetcher({
  url: url.href,
  wsClient: socket,
  fetch: (input, init) =>
    fetch(input, {
      ...init,
      headers: { ...(init?.headers as Record<string, string>), ...authorization() },
    }),
});
