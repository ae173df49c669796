// Composes the subgraph of the queue, a file, with one of a shop that has jobs too: node compose.mjs FILE
import { readFileSync } from "node:fs";
import { composeServices } from "@apollo/composition";
import { parse } from "graphql";

const shop = `
  extend schema @link(url: "https://specs.apollo.dev/federation/v2.3", import: ["@key"])
  type Query { order(id: ID!): Order }
  type Order { id: ID!  payout: Job }
  type Job @key(fields: "id") { id: ID!  order: Order }
`;
const { errors, hints, schema } = composeServices([
  { name: "jobs", typeDefs: parse(readFileSync(process.argv[2], "utf8")) },
  { name: "shop", typeDefs: parse(shop) },
]);
const fields = schema?.toAPISchema().type("Job").fields().map((field) => field.name);
console.log(
  JSON.stringify({
    errors: (errors ?? []).map(String),
    hints: (hints ?? []).map((hint) => hint.message),
    joined: ["status", "payload", "order"].every((name) => fields?.includes(name)),
  }),
);
