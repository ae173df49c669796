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
