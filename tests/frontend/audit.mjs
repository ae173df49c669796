// Prints what each audit of graphql-http's suite found: one JSON object a line.

import { auditServer } from "graphql-http";

const url = process.argv[2];
for (const result of await auditServer({ url })) {
  const { id, name, status, reason } = result;
  console.log(JSON.stringify({ id, name, status, reason }));
}
