// Follows the jobs of a server by graphql-ws, and prints each event: node follow.mjs URL
import { createClient } from "graphql-ws";
import WebSocket from "ws";

const client = createClient({
  url: process.argv[2],
  webSocketImpl: WebSocket,
  // The server is back within seconds. In Node, a refused connection is an error and no close event.
  shouldRetry: () => true,
  retryAttempts: 20,
  retryWait: () => new Promise((resolve) => setTimeout(resolve, 200)),
  on: {
    connected: () => console.log("connected"),
    closed: (event) => console.log(`closed ${event.code ?? "without a code"}`),
  },
});
const query = "subscription { jobEvents { name jobId } }";
for await (const result of client.iterate({ query })) {
  console.log(`${result.data.jobEvents.name} ${result.data.jobEvents.jobId}`);
}
console.log("complete");
