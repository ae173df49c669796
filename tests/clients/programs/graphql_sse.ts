import { print } from "graphql";
import { client } from "../graphql_sse.js";
import { type Answer, type Execute, runScenario } from "./scenario.js";

const execute: Execute = async <Data>(
  document: Parameters<typeof print>[0],
  variables: Record<string, unknown>,
): Promise<Answer<Data>> => {
  const results = client.iterate<Data>({ query: print(document), variables });
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
