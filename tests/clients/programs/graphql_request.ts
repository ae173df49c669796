import { print } from "graphql";
import { ClientError } from "graphql-request";
import { client } from "../graphql_request.js";
import { type Answer, type Execute, runScenario } from "./scenario.js";

const execute: Execute = async <Data>(
  document: Parameters<typeof print>[0],
  variables: Record<string, unknown>,
): Promise<Answer<Data>> => {
  try {
    return await client.rawRequest<Data>(print(document), variables);
  } catch (error) {
    // A request that is not executed is answered with the status 400.
    if (error instanceof ClientError) return { errors: error.response.errors ?? [] };
    throw error;
  }
};

await runScenario({ query: execute, mutate: execute });
