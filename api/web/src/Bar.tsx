// What stands beside GraphiQL's tabs: the name, the token, and why there is no schema.

import { useGraphiQL, useGraphiQLActions } from "@graphiql/react";
import { useState, type FormEvent } from "react";
import { socket } from "./fetcher";
import { keepToken, readToken } from "./token";

export function Bar() {
  const { introspect } = useGraphiQLActions();
  const fault = useGraphiQL((state) => state.fetchError);
  const [token, setToken] = useState(readToken);

  function use(event: FormEvent) {
    event.preventDefault();
    keepToken(token.trim());
    // What is subscribed to connects anew, with the token.
    socket.terminate();
    void introspect();
  }

  return (
    <div className="bar">
      {fault !== null && (
        <p className="fault" role="alert" title={fault}>
          The schema cannot be read: {told(fault)}
        </p>
      )}
      <form className="token" onSubmit={use}>
        <label htmlFor="token">Bearer token</label>
        <input
          id="token"
          type="password"
          autoComplete="off"
          spellCheck={false}
          placeholder="token"
          value={token}
          onChange={(event) => setToken(event.target.value)}
        />
        <button type="submit">Use</button>
      </form>
      <strong>Job Registry</strong>
    </div>
  );
}

function told(fault: string): string {
  try {
    const messages = (JSON.parse(fault) as { errors: { message: string }[] }).errors;
    return messages.map((error) => error.message).join(" ");
  } catch {
    return fault;
  }
}
