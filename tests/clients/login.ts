// The login of the tests: the token is in the environment. Node 20 has no WebSocket.
import WebSocket from "ws";

Object.assign(globalThis, { WebSocket });

export function token(): string {
  return process.env.TOKEN ?? "";
}
