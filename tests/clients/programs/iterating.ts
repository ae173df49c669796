// What the programs of graphql-ws and graphql-sse share: their clients have the same methods.

import { print } from "graphql";
import { type Answer, type Execute, runScenario } from "./scenario.js";

type Request = { query: string; variables: Record<string, unknown> };

type Sink<Data> = {
  next: (answer: Answer<Data>) => void;
  error: (error: unknown) => void;
  complete: () => void;
};

type IteratingClient = {
  iterate(request: Request): AsyncIterableIterator<unknown>;
  subscribe<Data>(request: Request, sink: Sink<Data>): () => void;
  dispose(): unknown;
};

export async function runWith(client: IteratingClient) {
  const execute: Execute = async <Data>(
    document: Parameters<typeof print>[0],
    variables: Record<string, unknown>,
  ): Promise<Answer<Data>> => {
    const results = client.iterate({ query: print(document), variables });
    try {
      return (await results.next()).value as Answer<Data>;
    } catch (errors) {
      // A request that is not executed ends with the list of its errors.
      if (Array.isArray(errors)) return { errors };
      throw errors;
    }
  };

  await runScenario({
    query: execute,
    mutate: execute,
    follow: (document, variables, next, fail) =>
      client.subscribe<never>(
        { query: print(document), variables },
        {
          next: ({ data, errors }) => (data ? next(data) : fail(errors)),
          error: fail,
          complete: () => fail("complete"),
        },
      ),
  });
  client.dispose();
}
