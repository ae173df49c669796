import type { AnyVariables, OperationResult } from "@urql/core";
import { client } from "../urql.js";
import { type Answer, runScenario } from "./scenario.js";

function answer<Data>({ data, error }: OperationResult<Data, AnyVariables>): Answer<Data> {
  if (error?.networkError) throw error.networkError;
  return { data, errors: error?.graphQLErrors ?? [] };
}

await runScenario({
  query: async (document, variables) => answer(await client.query(document, variables as never)),
  mutate: async (document, variables) =>
    answer(await client.mutation(document, variables as never)),
  follow: (document, variables, next, fail) =>
    client
      .subscription(document, variables)
      .subscribe(({ data, error }) => (data ? next(data) : fail(error))).unsubscribe,
});
process.exit();
