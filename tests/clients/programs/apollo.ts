import type { ErrorLike } from "@apollo/client";
import { CombinedGraphQLErrors } from "@apollo/client/errors";
import { client } from "../apollo.js";
import { type Answer, runScenario } from "./scenario.js";

const errorPolicy = "all";

function answer<Data>(result: { data?: unknown; error?: ErrorLike | undefined }): Answer<Data> {
  const { data, error } = result;
  if (error && !CombinedGraphQLErrors.is(error)) throw error;
  return { data: data as Data, errors: error?.errors ?? [] };
}

await runScenario({
  query: async (query, variables) =>
    answer(await client.query({ query, variables, errorPolicy } as never)),
  mutate: async (mutation, variables) =>
    answer(await client.mutate({ mutation, variables, errorPolicy } as never)),
  follow: (query, variables, next, fail) => {
    const subscription = client.subscribe({ query, variables }).subscribe({
      next: ({ data, error }) => (data ? next(data) : fail(error)),
      error: fail,
      complete: () => fail("complete"),
    });
    return () => subscription.unsubscribe();
  },
});
process.exit();
