// Mistakes in a typed job. Each has to be refused, or the unused directive is an error itself.

import { execute } from "./execute.js";
import { EnqueueTypedDocument } from "./gen/graphql.js";

const thumbnailCreate = { assetId: "a", versionNumber: 1 };
const payoutExecute = { batchId: "b", escrowId: "e" };

export const refused = [
  // @ts-expect-error A value of another type.
  () => execute(EnqueueTypedDocument, { job: { thumbnailCreate: { ...thumbnailCreate, assetId: 1 } } }),
  // @ts-expect-error A misspelled optional field.
  () => execute(EnqueueTypedDocument, { job: { thumbnailCreate: { ...thumbnailCreate, size: [64] } } }),
  // @ts-expect-error No job type.
  () => execute(EnqueueTypedDocument, { job: {} }),
  // @ts-expect-error Two job types.
  () => execute(EnqueueTypedDocument, { job: { thumbnailCreate, payoutExecute } }),
];
