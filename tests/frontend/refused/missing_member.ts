// Does not compile: a member of the union has no case.

import { graphql } from "../gen/graphql/gql.js";
import type { RetryMutation } from "../gen/graphql/graphql.js";
import { unreachable } from "../client/send.js";

export const RETRY = graphql(`
  mutation Retry($id: ID!) {
    retryJob(id: $id) {
      __typename
    }
  }
`);

export function told(result: NonNullable<RetryMutation["retryJob"]>): string {
  switch (result.__typename) {
    case "JobChanged":
      return "again";
    case "JobNotFound":
      return "none";
    default:
      return unreachable(result);
  }
}
