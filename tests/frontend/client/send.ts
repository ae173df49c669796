// A client as small as it gets: a generated document, its variables, and fetch.

import type { TypedDocumentString } from "../gen/graphql/graphql.js";

export type Send = <Result, Variables>(
  document: TypedDocumentString<Result, Variables>,
  variables: Variables,
) => Promise<Result>;

export function sendTo(url: string): Send {
  return async (document, variables) => {
    const response = await fetch(url, {
      method: "POST",
      headers: {
        "content-type": "application/json",
        accept: "application/graphql-response+json",
      },
      body: JSON.stringify({ query: document.toString(), variables }),
    });
    const { data, errors } = await response.json();
    if (errors) throw new Error(JSON.stringify(errors));
    return data;
  };
}

/** A root field is null only where `errors` says why, and then `sendTo` has thrown. */
export function present<Value>(value: Value | null | undefined): Value {
  if (value === null || value === undefined) throw new Error("the field was not answered");
  return value;
}

export function unreachable(value: never): never {
  throw new Error(`not in the schema that this was compiled with: ${JSON.stringify(value)}`);
}
