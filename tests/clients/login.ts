// The login of the tests: the token of the moment is in a file. Node 20 has no WebSocket.
import { readFileSync } from "node:fs";
import WebSocket from "ws";

Object.assign(globalThis, { WebSocket });

export function token(): string {
  return readFileSync(process.env.TOKEN_FILE ?? "", "utf-8");
}
