// The tests' own: the token is given, and Node 20 has no WebSocket.
import WebSocket from "ws";

Object.assign(globalThis, { WebSocket });

export function token(): string {
  return process.env.TOKEN ?? "";
}
